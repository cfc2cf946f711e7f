// Which order of the planes does decode read fastest? Measures the lookup loop of a product with one row over several
// orders of the same matrix, out of cache, beside plain reads. bench/layouts.py builds and runs it and prints the tables.
//
//     layouts BITS N K THREADS ROUNDS < variants
//
// A variant is a line of 10 numbers, see Variant. Output: a line per variant: bytes read, then the nanoseconds of each round.
//
// An order is (unit, panel): [units of `unit` quads][panels of `panel` outputs][quads of the unit][bytes of a quad]. A unit as
// long as the row is the panel-blocked order of docs/packed-format.md, a unit of 1 is quad-major. The bytes of a quad are those of
// packed-format.md with panel/2 for 16. No codes are packed: the arena holds random bytes, which every order reads its own way and
// which are checked against a scalar product that reads them the same way. So all orders share the same pages.
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "layouts_crew.h"
#include "layouts_vectors.h"

namespace {

constexpr int kGroupQuads = 16;  // 64 channels: a group of weights and a block of activations
constexpr int kTable = 16;       // bytes
constexpr int kLine = 64;
constexpr int64_t kArena = int64_t{192} << 20;  // at least; 6 times the 32 MiB L3 of machine B

// ---- variants ----
enum Walk {
  kRead,     // no product: a plain read in `wide` streams
  kPanels,   // panel by panel, `wide` at a time; sums in registers. Streams take turns of a quad
  kTurns,    // the same, streams take turns of a group of quads
  kColumns,  // `depth` quads of all outputs, then the next; sums of all outputs in memory, that is, in the caches
};
struct Variant {
  int walk;
  int unit;          // quads; 0: the row
  int panel;         // outputs
  int wide, depth;
  int active;        // quads skipped or kept together: 40 % of them are kept; 0: all quads
  int distance;      // prefetch, bytes ahead; 0: none
  int huge;          // pages
  int cut;           // outputs walked as if they were a thread's all; 0: a thread's share
  int apart;         // whether each cut is also stored as a matrix of its own
};
// What one product reads besides its arena.
struct Task {
  Variant v;
  int n, k, bits;
  int64_t bytes = 0;
  std::vector<int64_t> offsets;  // of the active quads in panel 0
  std::vector<int> quads, first;  // active quads; group g has quads[first[g]] up to first[g + 1]
  std::vector<uint8_t> tables;   // of the active quads
  std::vector<int32_t> constants;  // by group
  std::vector<float> acts;
  float* y;        // [n]
  uint8_t* sums;   // of the quads of a group so far, all outputs
  const uint8_t* planes;
  const uint16_t* scales;
  void (*run)(Task&, int begin, int end);
  int n_groups() const { return k / 4 / kGroupQuads; }
  int unit() const { return v.unit ? v.unit : k / 4; }
  int64_t panel_bytes() const { return int64_t{unit()} * bits * v.panel / 2; }  // of a unit
  int together() const { return v.apart ? v.cut : n; }  // outputs stored in one matrix
  const uint8_t* planes_of(int panel) const {
    const int before = panel * v.panel / together() * together();  // outputs in the matrices before this one
    return planes + int64_t{before} * k * bits / 8 + (panel - before / v.panel) * panel_bytes();
  }
  int64_t scale_at(int panel, int group) const {
    if (v.walk != kColumns) return (int64_t{panel} * n_groups() + group) * v.panel;
    const int row = panel * v.panel, before = row / together() * together();
    return int64_t{before} * n_groups() + int64_t{group} * together() + row - before;
  }
};

// ---- the lookup loop ----
template <int Bits, int P>
struct Sums {
  static constexpr int kQuad = Bits * P / 2;  // bytes
  static constexpr bool kTwoQuads = kQuad < kBytes;  // in a vector
  static constexpr int kVectors = kTwoQuads ? 1 : kQuad / kBytes;
  static constexpr int kInts = Bits == 4 || kTwoQuads ? 1 : 2;
  Bytes s[kVectors][2];  // low and high nibbles
  INLINE void clear() {
#pragma GCC unroll 8
    for (auto& halves : s) halves[0] = halves[1] = Bytes{};
  }
  INLINE void fetch(const uint8_t* from) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) s[v][0] = load(from + 2 * v * kBytes), s[v][1] = load(from + (2 * v + 1) * kBytes);
  }
  INLINE void keep(uint8_t* to) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(to + 2 * v * kBytes, s[v][0]), store(to + (2 * v + 1) * kBytes, s[v][1]);
  }
  INLINE void look_up(int v, Bytes t, Bytes codes) {
    s[v][0] = weigh<Bits>(s[v][0], lookup(t, low(codes)));
    s[v][1] = weigh<Bits>(s[v][1], lookup(t, high(codes)));
  }
  INLINE void finish(int32_t constant, float act, const uint16_t* scales, Floats* y) const {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        Bytes ints[2];
        widen<Bits, kTwoQuads>(s[v][half], ints);
#pragma GCC unroll 2
        for (int i = 0; i < kInts; ++i) {
          const int at = half * (P / 2 / kLanes) + v * kInts + i;
          y[at] = add_product(y[at], halves(scales + at * kLanes), act, floats(ints[i], constant));
        }
      }
  }
};

// Adds quads to W panels: at offsets if Listed, else one behind the other.
template <int Bits, int P, int W, bool Listed>
INLINE void add_quads(Sums<Bits, P>* sums, const uint8_t* planes, int64_t stride, const int64_t* offsets, const uint8_t* tables,
                      int n_quads) {
  using S = Sums<Bits, P>;
  for (int q = 0; q < n_quads; q += 1 + S::kTwoQuads) {
    const Bytes t = S::kTwoQuads ? two_tables(tables + q * kTable) : table(tables + q * kTable);
#pragma GCC unroll 4
    for (int w = 0; w < W; ++w)
#pragma GCC unroll 8
      for (int v = 0; v < S::kVectors; ++v) {
        const uint8_t* p = planes + w * stride + v * kBytes;
        if constexpr (!Listed) sums[w].look_up(v, t, load(p + q * S::kQuad));
        else if constexpr (S::kTwoQuads) sums[w].look_up(v, t, join(p + offsets[q], p + offsets[q + 1]));
        else sums[w].look_up(v, t, load(p + offsets[q]));
      }
  }
}

template <int Bits, int P, int W, bool Listed, bool Turns>
void walk_panels(Task& t, int begin, int end) {
  using S = Sums<Bits, P>;
  constexpr int kGroup = kGroupQuads * S::kQuad;
  const int groups_ahead = (t.v.distance + kGroup - 1) / kGroup;
  const int64_t stride = t.panel_bytes();
  for (int panel = begin; panel < end; panel += W) {
    const uint8_t* planes = t.planes_of(panel);
    Floats y[W][P / kLanes];
    for (auto& of_panel : y)
      for (Floats& lanes : of_panel) lanes = zero();
    for (int g = 0; g < t.n_groups(); ++g) {
      const int first = t.first[g], n = Listed ? t.first[g + 1] - first : kGroupQuads;
      if (t.v.distance) {
        const bool next = g + groups_ahead >= t.n_groups();  // in the panels that follow these
        for (int w = 0; w < W; ++w) {
          const uint8_t* ahead = planes + (next ? W + w : w) * stride;
          if constexpr (Listed) {
            const int there = g + groups_ahead - (next ? t.n_groups() : 0);
            for (int i = t.first[there]; i < t.first[there + 1]; ++i)
              for (int at = 0; at < S::kQuad; at += kLine) prefetch(ahead + t.offsets[i] + at);
          } else {
            ahead += g * kGroup + t.v.distance - (next ? stride : 0);
            for (int at = 0; at < kGroup; at += kLine) prefetch(ahead + at);
          }
        }
      }
      if (n == 0) continue;
      S sums[W];
      for (auto& s : sums) s.clear();
      const uint8_t* at = planes + (Listed ? 0 : g * kGroup);
      const int64_t* offsets = t.offsets.data() + first;
      const uint8_t* tables = t.tables.data() + first * kTable;
      if constexpr (!Turns) add_quads<Bits, P, W, Listed>(sums, at, stride, offsets, tables, n);
      else
        for (int w = 0; w < W; ++w) add_quads<Bits, P, 1, Listed>(sums + w, at + w * stride, 0, offsets, tables, n);
      for (int w = 0; w < W; ++w) sums[w].finish(t.constants[g], t.acts[g], t.scales + t.scale_at(panel + w, g), y[w]);
    }
    for (int i = 0; i < W * P / kLanes; ++i) store(t.y + panel * P + i * kLanes, y[i / (P / kLanes)][i % (P / kLanes)]);
  }
}

// One step of walk_columns: n quads of the panels [begin, end). Depth: quads behind one another, 0: listed.
template <int Bits, int P, int Depth, bool Opens, bool Closes>
void add_columns(Task& t, int g, int q, int n, int begin, int end) {
  using S = Sums<Bits, P>;
  const int64_t stride = t.panel_bytes(), run = (end - begin) * stride;
  const int64_t distance = (t.v.distance + stride - 1) / stride * stride;
  const int64_t* offsets = t.offsets.data() + q;
  const uint8_t* const all_planes = t.planes_of(begin);
  const uint16_t* const all_scales = t.scales + t.scale_at(begin, g);
  for (int panel = begin; panel < end; ++panel) {
    if (distance) {
      const int64_t ahead = (panel - begin) * stride + distance;
      const int steps = int(ahead / run);  // as many steps later
      const uint8_t* there = all_planes + ahead % run;
      int from = std::min(q + n * steps, int(t.quads.size()) - n), to = from + n;
      if (Opens && Closes) {
        const int group = std::min(g + steps, t.n_groups() - 1);
        from = t.first[group], to = t.first[group + 1];
      }
      if constexpr (Depth > 0)
        for (int at = 0; at < Depth * S::kQuad; at += kLine) prefetch(there + t.offsets[from] + at);
      else
        for (int i = from; i < to; ++i)
          for (int at = 0; at < S::kQuad; at += kLine) prefetch(there + t.offsets[i] + at);
    }
    S sums;
    uint8_t* kept = t.sums + panel * sizeof sums;
    if constexpr (Opens) sums.clear();
    else sums.fetch(kept);
    const uint8_t* planes = all_planes + (panel - begin) * stride + (Depth ? offsets[0] : 0);
    add_quads<Bits, P, 1, Depth == 0>(&sums, planes, 0, offsets, t.tables.data() + q * kTable, Depth ? Depth : n);
    if constexpr (!Closes) {
      sums.keep(kept);
    } else {
      Floats y[P / kLanes];
      for (int i = 0; i < P / kLanes; ++i) y[i] = load(t.y + panel * P + i * kLanes);
      sums.finish(t.constants[g], t.acts[g], all_scales + (panel - begin) * P, y);
      for (int i = 0; i < P / kLanes; ++i) store(t.y + panel * P + i * kLanes, y[i]);
    }
  }
}

template <int Bits, int P, int Depth>
void walk_columns(Task& t, int begin, int end) {
  std::fill(t.y + begin * P, t.y + end * P, 0.0f);
  for (int g = 0; g < t.n_groups(); ++g)
    for (int q = t.first[g], n = 0; q < t.first[g + 1]; q += n) {
      n = Depth ? Depth : std::min(t.v.depth, t.first[g + 1] - q);
      const bool opens = q == t.first[g], closes = q + n == t.first[g + 1];
      if (opens && closes) add_columns<Bits, P, Depth, true, true>(t, g, q, n, begin, end);
      else if (opens) add_columns<Bits, P, Depth, true, false>(t, g, q, n, begin, end);
      else if (closes) add_columns<Bits, P, Depth, false, true>(t, g, q, n, begin, end);
      else add_columns<Bits, P, Depth, false, false>(t, g, q, n, begin, end);
    }
}

template <int Streams>
void read_streams(Task& t, int begin, int end) {  // in "panels" of 128 bytes
  constexpr int kRun = 2 * kLine;
  Bytes seen[kRun / kBytes] = {};
  const int64_t n = (end - begin) / Streams;
  for (int64_t i = 0; i < n; ++i)
    for (int s = 0; s < Streams; ++s)
      for (int v = 0; v < kRun / kBytes; ++v) seen[v] |= load(t.planes + (begin + s * n + i) * kRun + v * kBytes);
  for (int v = 0; v < kRun / kBytes; ++v) asm volatile("" ::"x"(seen[v]));
}

using Run = void (*)(Task&, int, int);
template <int Bits, int P, bool Listed>
Run panels_run(const Variant& v) {
  const bool turns = v.walk == kTurns;
  if (v.wide == 1) return walk_panels<Bits, P, 1, Listed, false>;
  if constexpr (!Listed && P <= 64)
    if (v.wide == 2) return turns ? walk_panels<Bits, P, 2, false, true> : walk_panels<Bits, P, 2, false, false>;
  if constexpr (!Listed && P == 32)
    if (v.wide == 4) return turns ? walk_panels<Bits, P, 4, false, true> : walk_panels<Bits, P, 4, false, false>;
  return nullptr;
}
template <int Bits, int P>
Run run_of(const Variant& v, int unit) {
  if (v.walk != kColumns) return v.active ? panels_run<Bits, P, true>(v) : panels_run<Bits, P, false>(v);
  const bool behind_one_another = v.active ? v.active == unit && unit == v.depth : unit == v.depth;
  if (!behind_one_another) return walk_columns<Bits, P, 0>;
  return v.depth == 16 ? walk_columns<Bits, P, 16> : v.depth == 4 ? walk_columns<Bits, P, 4>
         : Sums<Bits, P>::kTwoQuads ? nullptr : walk_columns<Bits, P, 1>;
}
template <int Bits>
Run run_of(const Variant& v, int unit) {
  return v.panel == 32 ? run_of<Bits, 32>(v, unit) : v.panel == 64 ? run_of<Bits, 64>(v, unit) : run_of<Bits, 128>(v, unit);
}

// ---- tasks, their check, their clock ----
float from_half(uint16_t h) { return _cvtsh_ss(h); }

// The product, one output at a time, in the order of float operations that every walk keeps.
std::vector<float> reference(const Task& t) {
  std::vector<float> y(t.n);
  for (int row = 0; row < t.n; ++row) {
    const int panel = row / t.v.panel, in_panel = row % t.v.panel, half = t.v.panel / 2;
    for (int g = 0; g < t.n_groups(); ++g) {
      if (t.first[g] == t.first[g + 1]) continue;
      int32_t dot = t.constants[g];
      for (int i = t.first[g]; i < t.first[g + 1]; ++i) {
        const uint8_t* bytes = t.planes_of(panel) + t.offsets[i] + in_panel % half * t.bits;
        for (int plane = 0; plane < t.bits; ++plane)
          dot += t.tables[i * kTable + (in_panel < half ? bytes[plane] & 15 : bytes[plane] >> 4)] << plane;
      }
      y[row] += from_half(t.scales[t.scale_at(panel, g) + in_panel]) * (t.acts[g] * float(dot));
    }
  }
  return y;
}

Task task_of(const Variant& v, int bits, int n, int k) {
  Task t{.v = v, .n = n, .k = k, .bits = bits};
  const int64_t quad_bytes = int64_t{bits} * n / 2, in_panel = bits * v.panel / 2;
  if (v.walk == kRead) {
    t.bytes = quad_bytes * (k / 4);
    t.run = v.wide == 1 ? read_streams<1> : v.wide == 2 ? read_streams<2> : read_streams<3>;
    return t;
  }
  std::mt19937 random(v.active);  // the same quads in all orders
  const bool pad = v.active && in_panel < kBytes;
  const int together = std::max(v.active, 1), n_runs = k / 4 / together;
  std::vector<int> keep(n_runs);
  std::fill_n(keep.begin(), v.active ? n_runs * 2 / 5 : n_runs, 1);
  std::shuffle(keep.begin(), keep.end(), random);
  t.first.push_back(0);
  for (int quad = 0; quad < k / 4; ++quad) {
    if (keep[quad / together]) {
      t.quads.push_back(quad);
      for (int i = 0; i < kTable; ++i) t.tables.push_back(uint8_t(random() >> 8));
    }
    if ((quad + 1) % kGroupQuads) continue;
    const int n_kept = int(t.quads.size()) - t.first.back();
    t.bytes += n_kept * quad_bytes + (n_kept ? 2 * n : 0);
    if (pad && n_kept % 2) {  // vectors hold two quads: a table of zeros adds nothing
      t.quads.push_back(t.quads.back());
      t.tables.resize(t.tables.size() + kTable, 0);
    }
    t.first.push_back(int(t.quads.size()));
    t.constants.push_back(int(random() % 4000) - 8000);
    t.acts.push_back(float(random() % 1000 + 1) / 1e5f);
  }
  for (int quad : t.quads)
    t.offsets.push_back(int64_t{quad / t.unit()} * t.together() / v.panel * t.panel_bytes() + quad % t.unit() * in_panel);
  t.run = bits == 4 ? run_of<4>(v, t.unit()) : run_of<2>(v, t.unit());
  return t;
}

struct Arena {
  uint8_t* bytes;
  Arena(int64_t size, bool huge) {
    const int64_t page = int64_t{2} << 20;
    void* p = mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) std::perror("mmap"), std::exit(1);
    bytes = (uint8_t*)((uintptr_t(p) + page - 1) / page * page);
    madvise(bytes, size, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
  }
};

void share(Task& t, int thread, int n_threads) {
  const bool read = t.v.walk == kRead;
  const int per = read ? 1 : 128 / t.v.panel;  // shares are whole panels of 128, whatever the panel
  const int64_t all = read ? t.bytes / 128 : t.n / 128;
  const int begin = int(all * thread / n_threads) * per, end = int(all * (thread + 1) / n_threads) * per;
  const int step = t.v.cut ? t.v.cut / t.v.panel : end - begin;
  for (int at = begin; at < end; at += step) t.run(t, at, std::min(at + step, end));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return std::fputs("usage: layouts BITS N K THREADS ROUNDS < variants\n", stderr), 2;
  const int bits = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]), rounds = std::atoi(argv[5]);
  if ((bits != 2 && bits != 4) || n % 256 || k % 64) return std::fputs("BITS is 2 or 4, N a multiple of 256, K of 64\n", stderr), 2;
  const int64_t matrix = int64_t{n} * k * bits / 8, matrix_scales = int64_t{n} * k / 64;
  const int copies = int(kArena / matrix) + 1;
  std::vector<Task> tasks;
  for (Variant v; std::scanf("%d %d %d %d %d %d %d %d %d %d", &v.walk, &v.unit, &v.panel, &v.wide, &v.depth, &v.active, &v.distance,
                             &v.huge, &v.cut, &v.apart) == 10;) {
    tasks.push_back(task_of(v, bits, n, k));
    if (!tasks.back().run) return std::fprintf(stderr, "variant %zu: no such walk\n", tasks.size()), 2;
  }

  const Arena arenas[2] = {{copies * matrix, false}, {copies * matrix, true}};
  const Arena scale_arenas[2] = {{copies * matrix_scales * 2, false}, {copies * matrix_scales * 2, true}};
  const Arena results(n * 4, false), sums(n * 4, false);
  for (int huge = 0; huge < 2; ++huge) {
    std::mt19937_64 random(huge);
    for (int64_t i = 0; i < copies * matrix / 8; ++i) ((uint64_t*)arenas[huge].bytes)[i] = random();
    for (int64_t i = 0; i < copies * matrix_scales; ++i)
      ((uint16_t*)scale_arenas[huge].bytes)[i] = uint16_t(0x1c00 + (random() & 0x83ff));  // 2**-8 to 2**-7, either sign
  }
  const auto aim = [&](Task& t, int copy) {
    t.y = (float*)results.bytes;
    t.sums = sums.bytes;
    t.planes = arenas[t.v.huge].bytes + copy * matrix;
    t.scales = (const uint16_t*)scale_arenas[t.v.huge].bytes + copy * matrix_scales;
  };

  const int n_threads = std::atoi(argv[4]);
  Crew crew(n_threads);
  const auto nanoseconds = [&](Task& t) { return crew.nanoseconds([&](int thread) { share(t, thread, n_threads); }); };
  std::map<std::vector<int>, std::vector<float>> wanted;
  for (size_t i = 0; i < tasks.size(); ++i) {
    Task& t = tasks[i];
    if (t.v.walk == kRead) continue;
    aim(t, 1);
    auto& want = wanted[{t.v.walk == kColumns, t.v.unit, t.v.panel, t.v.active, t.v.huge, t.v.apart * t.v.cut}];
    if (want.empty()) want = reference(t);
    nanoseconds(t);
    if (!std::equal(want.begin(), want.end(), t.y)) return std::fprintf(stderr, "variant %zu: wrong result\n", i + 1), 1;
  }

  std::vector<std::vector<double>> ns(tasks.size());
  std::vector<int> order(tasks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int(i);
  std::mt19937 random(1);
  int copy[2] = {};
  for (int round = 0; round < rounds; ++round) {
    std::shuffle(order.begin(), order.end(), random);
    for (int i : order) {
      double taken = 0;
      for (int tries = 0; tries < 10 && (tries == 0 || !crew.undisturbed()); ++tries) {
        int& next = copy[tasks[i].v.huge];
        aim(tasks[i], next = (next + 1) % copies);
        taken = nanoseconds(tasks[i]);
      }
      ns[i].push_back(taken);
    }
  }
  for (size_t i = 0; i < tasks.size(); ++i) {
    std::printf("%lld", (long long)tasks[i].bytes);
    for (double each : ns[i]) std::printf(" %.0f", each);
    std::puts("");
  }
}
