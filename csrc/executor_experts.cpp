// Layers of experts: a router's product in f32, what it picks, and the products of the picked experts with the rows
// that picked them. How many chunks a step has may not depend on what was picked: a late thread counts with what it reads.
#include <algorithm>
#include <cstring>

#include "executor.h"
#include "matmul_rows.h"

namespace elute {
namespace {

// Reading and unpacking a panel takes as long as multiplying some 16 rows by it.
constexpr int kPanelCost = 16;

int n_blocks(int k) { return (k + kActBlock - 1) / kActBlock; }

}  // namespace

// One matrix of a picked expert times the rows from slot `first` on, to y (of the first of them).
struct Executor::ExpertProduct {
  const MatrixView& w;
  const ExpertPlan::Picked& of;
  int first;
  float* y;
  int cost() const { return of.n_rows + kPanelCost; }  // of a panel
};

void Executor::allocate_experts() {
  int64_t gates = 0, downs = 0;
  int n_experts = 0, top_k = 0;
  for (const Op& op : ops_) {
    const auto* experts = std::get_if<ExpertsOp>(&op);
    if (!experts) continue;
    const int64_t n_slots = ExpertPlan::most_slots(chunk_, experts->top_k);
    gates = std::max(gates, n_slots * matrices_[experts->gates[0]].n);
    downs = std::max(downs, n_slots * matrices_[experts->downs[0]].n);
    n_experts = std::max(n_experts, static_cast<int>(experts->gates.size()));
    top_k = std::max(top_k, experts->top_k);
  }
  if (!n_experts) return;
  expert_gates_ = Pages(gates * 4);
  expert_ups_ = Pages(gates * 4);
  expert_downs_ = Pages(downs * 4);
  for (int thread = 0; thread < n_threads(); ++thread) {
    expert_plans_.emplace_back(n_experts, top_k, chunk_);
    const size_t n_words = (n_experts + 63) / 64;
    expert_words_.push_back({std::vector<uint64_t>(n_words), std::vector<uint64_t>(n_words), std::vector<float>(n_experts)});
  }
}

int64_t Executor::expert_activations() const {
  int64_t most = 0;
  for (const Op& op : ops_) {
    const auto* experts = std::get_if<ExpertsOp>(&op);
    if (!experts) continue;
    const int64_t n_slots = ExpertPlan::most_slots(chunk_, experts->top_k);
    for (int m : {experts->gates[0], experts->downs[0]})
      most = std::max(most, n_slots * n_blocks(matrices_[m].k) * kActBlock);
  }
  return most;
}

void Executor::run_all(const RouterOp& op, const Call& call, Walk& walk) {
  const int width = widths_[op.input], n_experts = widths_[op.output];
  const int most = std::max(1, kResultRows * kPanel / call.n);  // experts of a chunk
  const int n_chunks = std::max(chunks(n_experts, n_threads()), (n_experts + most - 1) / most);
  float* const results = results_[walk.thread()].as<float>();
  const auto compute = [&](int chunk) {
    const Range mine = share(n_experts, chunk, n_chunks);
    const int n = mine.end - mine.begin;
    for (int e = mine.begin; e < mine.end; ++e)
      for (int r = 0; r < call.n; ++r)
        results[r * n + e - mine.begin] = kernels_.floats->dot(row(op.input, r), op.weight + int64_t{e} * width, width);
  };
  walk.share(n_chunks, compute, [&](int chunk) {
    const Range mine = share(n_experts, chunk, n_chunks);
    const int n = mine.end - mine.begin;
    for (int r = 0; r < call.n; ++r) std::memcpy(row(op.output, r) + mine.begin, results + r * n, n * sizeof(float));
  });
}

void Executor::run_rows(const ExpertsOp& op, const Call&, const Slice& slice, int) {
  for (int r = slice.rows.begin; r < slice.rows.end; ++r)
    share_out(row(op.logits, r), widths_[op.logits], op.top_k, op.normalized);
}

void Executor::run_all(const ExpertsOp& op, const Call& call, Walk& walk) {
  ExpertPlan& plan = expert_plans_[walk.thread()];
  plan.make(row(op.logits, 0), call.n, widths_[op.logits], op.top_k);
  find_experts(op, call, plan, walk.thread());
  const int width = matrices_[op.gates[0]].n, hidden = widths_[op.output];
  const auto gate = [&](int slot) { return expert_gates_.as<float>() + int64_t{slot} * width; };
  const auto up = [&](int slot) { return expert_ups_.as<float>() + int64_t{slot} * width; };
  const auto down = [&](int slot) { return expert_downs_.as<float>() + int64_t{slot} * hidden; };

  const bool lone = call.n == 1;  // its experts share one row of activations
  const auto looks_in = [&](const ExpertPlan::Picked& p) {
    return looks_up(p.gate, p.n_rows) || looks_up(p.up, p.n_rows);
  };
  const auto looks_down = [&](const ExpertPlan::Picked& p) { return looks_up(p.down, p.n_rows); };
  if (lone) {
    const bool tables = std::any_of(plan.picked.begin(), plan.picked.end(), looks_in);
    const int n_parts = std::clamp(widths_[op.input] / kLeastChannels, 1, n_threads());
    walk.share(n_parts, [&](int part) {
      quantize_rows(op.input, {}, -1, widths_[op.input], {0, 1}, Slice{{0, 1}, part, n_parts}, tables, walk.thread());
    });
  } else {
    quantize_slots(plan, call.n * op.top_k, widths_[op.input], looks_in,
                   [&](int slot, Range) { return row(op.input, plan.row_of(slot)); }, walk);
  }
  const auto gate_or_up = [&](const ExpertPlan::Picked& p, int i) {
    return ExpertProduct{i ? p.up : p.gate, p, lone ? 0 : p.first_slot, i ? up(p.first_slot) : gate(p.first_slot)};
  };
  multiply_picked(op, call, plan, 2, gate_or_up, [](float*, int, int) {}, walk);

  const auto activate = [&](int slot, Range at) {
    kernels_.floats->gate(gate(slot) + at.begin, up(slot) + at.begin, gate(slot) + at.begin, at.end - at.begin,
                          op.activation);
    return gate(slot);
  };
  quantize_slots(plan, call.n * op.top_k, width, looks_down, activate, walk);
  const auto down_of = [&](const ExpertPlan::Picked& p, int) {
    return ExpertProduct{p.down, p, p.first_slot, down(p.first_slot)};
  };
  multiply_picked(op, call, plan, 1, down_of,
                  [&](float* y, int slot, int n) { kernels_.floats->scale(y, plan.share_of(slot), n); }, walk);

  const int n_parts = lone ? std::clamp(hidden / kLeastChannels, 1, n_threads()) : 1;
  const int n_chunks = lone ? n_parts : chunks(call.n, n_threads());
  walk.share(n_chunks, [&](int chunk) {
    const Slice slice = lone ? Slice{{0, 1}, chunk, n_parts} : Slice{share(call.n, chunk, n_chunks), 0, 1};
    const Range at = slice.channels(hidden);
    const int n = at.end - at.begin;
    for (int r = slice.rows.begin; r < slice.rows.end; ++r) {
      float* const y = row(op.output, r) + at.begin;
      if (plan.n_picks(r) == 0) std::memset(y, 0, n * sizeof(float));
      for (int i = 0; i < plan.n_picks(r); ++i) {
        const float* x = down(plan.pick(r, i).slot) + at.begin;
        if (i == 0) std::memcpy(y, x, n * sizeof(float));
        else kernels_.floats->add(x, y, n);
      }
    }
  });
}

// The one place that learns which experts a call needs before anything reads them. Those in banks are brought into memory,
// and their matrices, which lie at the placeholder until then, move to where they are.
void Executor::find_experts(const ExpertsOp& op, const Call& call, ExpertPlan& plan, int thread) {
  const uint8_t* const* rows = nullptr;
  if (op.use >= 0) {
    std::vector<uint64_t>& wanted = expert_words_[thread].wanted;
    std::fill(wanted.begin(), wanted.end(), 0);
    for (const ExpertPlan::Picked& p : plan.picked) wanted[p.expert / 64] |= uint64_t{1} << p.expert % 64;
    banks_->demand(call.pass, op.use, wanted.data(), call.n == 1 ? likely_experts(op, thread) : nullptr);
    rows = banks_->rows(banks_->use(op.use).bank);
  }
  for (ExpertPlan::Picked& p : plan.picked) {
    p.gate = matrices_[op.gates[p.expert]];
    p.up = matrices_[op.ups[p.expert]];
    p.down = matrices_[op.downs[p.expert]];
    if (!rows) continue;
    const ptrdiff_t by = rows[p.expert] - banks_->placeholder();
    for (MatrixView* w : {&p.gate, &p.up, &p.down}) {
      w->planes += by;
      w->scales += by / 2;
      if (w->offsets) w->offsets += by / 2;
    }
  }
}

// What the next layer's router picks from this layer's input, which is much like its own.
const uint64_t* Executor::likely_experts(const ExpertsOp& op, int thread) {
  if (!op.ahead) return nullptr;
  ExpertWords& words = expert_words_[thread];
  const int width = widths_[op.input], n = widths_[op.logits];
  for (int e = 0; e < n; ++e) words.logits[e] = kernels_.floats->dot(row(op.input, 0), op.ahead + int64_t{e} * width, width);
  share_out(words.logits.data(), n, op.top_k, op.normalized);
  std::fill(words.ahead.begin(), words.ahead.end(), 0);
  for (int e = 0; e < n; ++e)
    if (words.logits[e] > 0) words.ahead[e / 64] |= uint64_t{1} << e % 64;
  return words.ahead.data();
}

// Quantizes a row of k values for each slot. looks_up(picked): tables too; row_of(slot, channels): where the row is,
// once these channels of it have been made.
template <typename LooksUp, typename RowOf>
void Executor::quantize_slots(const ExpertPlan& plan, int n_picks, int k, const LooksUp& looks_up, const RowOf& row_of,
                              Walk& walk) {
  const int blocks = n_blocks(k);
  const int n_chunks = chunks(std::max(1, n_picks * blocks / (kLeastChannels / kActBlock)), n_threads());
  walk.share(n_chunks, [&](int chunk) {
    const Range mine = share(plan.n_slots * blocks, chunk, n_chunks);  // blocks of all slots
    for (const ExpertPlan::Picked& p : plan.picked) {
      const int first = std::max(mine.begin, p.first_slot * blocks);
      const int end = std::min(mine.end, (p.first_slot + p.n_rows) * blocks);
      if (first >= end) continue;
      const ActivationsView all = activations(k, p.n_rows, looks_up(p));
      for (int slot = first / blocks; slot * blocks < end; ++slot) {
        const int block = std::max(first - slot * blocks, 0), last = std::min(end - slot * blocks, blocks);
        const Range channels{block * kActBlock, std::min(last * kActBlock, k)};
        ActivationsView part = all.from_row(slot).from_block(block);
        if (all.tiles) {  // n_blocks, of the part from now on, no longer leads to the row's tile
          part.tiles = all.tiles + int64_t{slot / kTileRows} * blocks + block;
          part.row = slot % kTileRows;
        }
        part.n_blocks = last - block;
        kernels_.matmul->quantize(row_of(slot, channels) + channels.begin, channels.end - channels.begin, part);
      }
    }
  });
}

// product(picked, i): the i-th of n_each. finish(y, slot, n) is called for n of a row's results where they are whole.
template <typename Products, typename Finish>
void Executor::multiply_picked(const ExpertsOp& op, const Call& call, const ExpertPlan& plan, int n_each,
                               const Products& product, const Finish& finish, Walk& walk) {
  const int64_t n_picks = int64_t{call.n} * op.top_k;
  const int64_t panels = int64_t{n_each} * matrices_[(n_each == 1 ? op.downs : op.gates)[0]].n_panels();
  const int64_t most_cost = panels * (n_picks + std::min<int64_t>(n_picks, op.gates.size()) * kPanelCost);
  const int64_t least_chunks = (most_cost + kResultRows - 1) / kResultRows;  // their results must fit
  const int64_t wanted_chunks = chunks(static_cast<int>(panels * op.top_k), n_threads());
  const int n_chunks = walk.alone() ? 1 : static_cast<int>(std::max(wanted_chunks, least_chunks));
  int64_t total = 0;
  for (const ExpertPlan::Picked& p : plan.picked)
    for (int i = 0; i < n_each; ++i) total += int64_t{product(p, i).w.n_panels()} * product(p, i).cost();
  float* const results = results_[walk.thread()].as<float>();
  // The parts of products whose panels begin in the chunk's share of the cost: to their place, and to this thread's
  // results. body(product, y and its row length there, result)
  const auto for_each = [&](int chunk, const auto& body) {
    const int64_t begin = total * chunk / n_chunks, end = total * (chunk + 1) / n_chunks;
    int64_t cost = 0;  // of the products before this one
    float* result = results;
    for (const ExpertPlan::Picked& p : plan.picked) {
      for (int i = 0; i < n_each && cost < end; ++i) {
        const ExpertProduct whole = product(p, i);
        const auto panel = [&](int64_t at) {  // the first that begins there or later
          const int64_t n = (at - cost + whole.cost() - 1) / whole.cost();
          return static_cast<int>(std::clamp<int64_t>(at <= cost ? 0 : n, 0, whole.w.n_panels()));
        };
        const Range mine{panel(begin), panel(end)};
        cost += int64_t{whole.w.n_panels()} * whole.cost();
        if (mine.begin >= mine.end) continue;
        const MatrixView w = part_of(whole.w, mine);
        body(ExpertProduct{w, p, whole.first, whole.y + mine.begin * kPanel}, whole.w.n, result);
        result += int64_t{p.n_rows} * w.n;
      }
    }
  };
  const auto compute = [&](int chunk) {
    for_each(chunk, [&](const ExpertProduct& part, int ldy, float* result) {
      const int n_rows = part.of.n_rows;
      float* const y = walk.alone() ? part.y : result;
      if (!walk.alone()) ldy = part.w.n;
      const bool lookup = looks_up(part.w, n_rows);
      const ActivationsView all = activations(part.w.k, n_rows, lookup);
      ActivationsView x = all.from_row(part.first);
      x.row = 0;  // it begins a tile, or has none
      if (all.tiles) x.tiles = all.tiles + int64_t{part.first / kTileRows} * all.n_blocks;
      const Range panels{0, part.w.n_panels()};
      if (lookup) matmul_by_lookup(*kernels_.matmul, part.w, x, n_rows, panels, nullptr, y, ldy);
      else
        matmul_by_multiply(*kernels_.matmul, part.w, x, n_rows, panels, nullptr, y, ldy,
                           gemm_scratch_[walk.thread()].as<uint8_t>());
      for (int r = 0; r < n_rows; ++r) finish(y + int64_t{r} * ldy, part.of.first_slot + r, part.w.n);
    });
  };
  walk.share(n_chunks, compute, [&](int chunk) {
    for_each(chunk, [&](const ExpertProduct& part, int ldy, const float* result) {
      for (int r = 0; r < part.of.n_rows && !walk.alone(); ++r)
        std::memcpy(part.y + int64_t{r} * ldy, result + int64_t{r} * part.w.n, part.w.n * sizeof(float));
    });
  });
}

}  // namespace elute
