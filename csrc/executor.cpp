#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

#include "matmul_rows.h"

namespace elute {
namespace {

int round_up(int x, int to) { return (x + to - 1) / to * to; }

}  // namespace

Pages::Pages(int64_t bytes) : bytes_(std::max<int64_t>(bytes, 1)) {
  data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data_ == MAP_FAILED) {
    data_ = nullptr;
    throw std::bad_alloc();
  }
}
Pages::~Pages() {
  if (data_) munmap(data_, bytes_);
}
Pages::Pages(Pages&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
Pages& Pages::operator=(Pages&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

// Rows times panels of `w`, to y (of output 0) with ldy floats a row; what is added to `sum` (null: nothing) likewise.
struct Executor::Product {
  const MatrixView& w;
  const float* bias;
  float* y;
  float* sum;
  int64_t ldy;
};

Executor::Executor(const KernelTable& kernels, int n_threads, int context, int chunk, int n_layers, int n_kv_heads,
                   int head_width, CacheType cache_type)
    : kernels_(kernels),
      context_(round_up(context, kCacheTile)),
      chunk_(chunk),
      n_layers_(n_layers),
      n_kv_heads_(n_kv_heads),
      head_width_(head_width),
      cache_type_(cache_type),
      pool_(n_threads, [this](Walk& walk, const ThreadPool::Job& job) { run(std::bit_cast<Call>(job), walk); }) {}

int Executor::add_register(int width) {
  widths_.push_back(width);
  return static_cast<int>(widths_.size()) - 1;
}
int Executor::add_matrix(const MatrixView& view) {
  matrices_.push_back(view);
  return static_cast<int>(matrices_.size()) - 1;
}
int Executor::add_channel_matrix(const ChannelMatrix& matrix, BankCache& banks, int bank) {
  banks_ = &banks;
  in_banks_.push_back({matrix, bank});
  return static_cast<int>(in_banks_.size()) - 1;
}
int Executor::add_rope_table(std::vector<float> inverse_frequencies, float factor) {
  rope_tables_.push_back({std::move(inverse_frequencies), factor});
  return static_cast<int>(rope_tables_.size()) - 1;
}
int Executor::add_mask() {
  masks_.emplace_back();
  return static_cast<int>(masks_.size()) - 1;
}
void Executor::set_mask(int mask, std::vector<float> importance, float threshold) {
  masks_[mask] = {std::move(importance), threshold};
}
void Executor::observe(bool on) {
  observing_ = on;
  histograms_.clear();
  if (!on) return;
  for (size_t i = 0; i < masks_.size() * n_threads(); ++i) histograms_.emplace_back(kScoreBins * int64_t{sizeof(int64_t)});
}
void Executor::set_cache_aware(float share) {
  cache_aware_ = {banks_ && banks_->reads() ? share : 0};
  if (banks_) banks_->keep_present(cache_aware_.share > 0);
}
std::vector<int64_t> Executor::histogram(int mask) const {
  std::vector<int64_t> sum(kScoreBins, 0);
  for (int thread = 0; !histograms_.empty() && thread < n_threads(); ++thread)
    for (int bin = 0; bin < kScoreBins; ++bin) sum[bin] += histograms_[mask * n_threads() + thread].as<int64_t>()[bin];
  return sum;
}
void Executor::add_op(Op op) { ops_.push_back(std::move(op)); }

void Executor::finish(const LookupRows& lookup_rows) {
  plan_steps();
  lookup_rows_ = lookup_rows;
  add_rows();
  current_ = rows_[0].get();
  allocate_cache();
  int widest = 0, looked_up = 0;
  for (const MatrixView& m : matrices_) {
    widest = std::max(widest, m.k);
    looked_up = std::max(looked_up, std::min(lookup_rows_[m.bits], chunk_));
  }
  for (const InBank& m : in_banks_) widest = std::max(widest, m.matrix.k);
  allocate_experts();
  const int64_t padded = round_up(widest, kActBlock), n_values = std::max(chunk_ * padded, expert_activations());
  active_ = Pages(padded / 64 * 8);
  q_ = Pages(n_values + kActPadding);
  act_scales_ = Pages(n_values / kActBlock * 4);
  sums_ = Pages(n_values / kSumRun * 4);
  pairs_ = Pages(n_values / kActBlock * int64_t{sizeof(PairSums)});
  if (kernels_.matmul->wants_tiles)
    tiles_ = Pages((n_values + (kTileRows - 1) * padded) / (kTileRows * kActBlock) * int64_t{sizeof(ActTile)});
  const int64_t n_looked_up = looked_up ? std::max(looked_up * padded, expert_activations()) : 0;
  tables_ = Pages(n_looked_up / kLutWidth * kTableBytes);
  lows_ = Pages(n_looked_up / kSumRun * 4);
  for (int thread = 0; thread < n_threads(); ++thread) {
    gemm_scratch_.emplace_back(in_banks_.empty() ? gemm_scratch_bytes(chunk_) : channel_gemm_scratch_bytes(chunk_));
    attention_scratch_.emplace_back(attention_scratch_bytes(head_width_));
    gathered_.emplace_back(padded * 4);
    const int tiles = in_banks_.empty() ? 0 : std::max(kResultTiles, chunk_) * kChannelTile;
    results_.emplace_back(4 * std::max<int64_t>({tiles, (kResultRows + chunk_) * kPanel, attention_result_floats()}));
  }
}

void Executor::stream(WeightStream& stream, const std::vector<int>& pieces) {
  const auto add = [&](PieceRange& range, const std::vector<int>& matrices) {
    for (int m : matrices) {
      if (pieces[m] < 0) continue;
      range.begin = range.end ? std::min(range.begin, pieces[m]) : pieces[m];
      range.end = std::max(range.end, pieces[m] + 1);
    }
  };
  for (Op& op : ops_) {
    if (auto* linear = std::get_if<LinearOp>(&op); linear && linear->use < 0) add(linear->pieces, linear->matrices);
    if (auto* experts = std::get_if<ExpertsOp>(&op))
      for (const auto* matrices : {&experts->gates, &experts->ups, &experts->downs}) add(experts->pieces, *matrices);
  }
  stream_ = &stream;
}

int Executor::vocabulary() const {
  for (const Op& op : ops_)
    if (const auto* head = std::get_if<HeadOp>(&op)) return matrices_[head->matrix].n;
  return 0;
}
int Executor::embedding_rows() const {
  for (const Op& op : ops_)
    if (const auto* embed = std::get_if<EmbedOp>(&op)) return matrices_[embed->matrix].n;
  return 0;
}

void Executor::add_rows() {
  auto rows = std::make_unique<Rows>();
  for (int width : widths_) rows->registers.emplace_back(int64_t{chunk_} * width * 4);
  for (const RopeTable& table : rope_tables_) {
    const size_t size = chunk_ * table.inverse_frequencies.size();
    rows->turns.push_back({std::vector<float>(size), std::vector<float>(size)});
  }
  rows_.push_back(std::move(rows));
}
void Executor::set_rows(int n) {
  while (static_cast<int>(rows_.size()) < n) add_rows();
}

void Executor::turn(Rows& rows, int position, int n) const {
  if (rows.position == position && rows.n >= n) return;
  for (size_t t = 0; t < rope_tables_.size(); ++t) {
    const RopeTable& table = rope_tables_[t];
    const int half = static_cast<int>(table.inverse_frequencies.size());
    for (int r = 0; r < n; ++r) {
      for (int i = 0; i < half; ++i) {
        // The angle is rounded to f32 as the models' own code rounds it.
        const float angle = static_cast<float>(position + r) * table.inverse_frequencies[i];
        rows.turns[t].cos[r * half + i] = static_cast<float>(std::cos(double{angle})) * table.factor;
        rows.turns[t].sin[r * half + i] = static_cast<float>(std::sin(double{angle})) * table.factor;
      }
    }
  }
  rows.position = position;
  rows.n = n;
}

void Executor::start(const Rows& rows, const Call& call) {
  current_.store(&rows, std::memory_order_relaxed);
  pool_.run(std::bit_cast<ThreadPool::Job>(call));
}

void Executor::forward(const int32_t* tokens, int n, int position, bool all_logits, float* logits) {
  turn(*rows_[0], position, n);  // only rows read these, so no late thread of the call before does
  if (banks_ && position == 0) banks_->forget();
  if (fetched_step_ >= 0) ++passes_;  // segments used some of what this pass reads
  fetched_step_ = -1;
  start(*rows_[0], Call{tokens, logits, n, position, passes_++, kAll, all_logits, true});
}

void Executor::cut(std::vector<int> linears) {
  cuts_.clear();
  for (int linear : linears) cuts_.push_back(linear_steps_[linear]);
  std::sort(cuts_.begin(), cuts_.end());
}

void Executor::run_segment(int segment, bool whole, int rows, const int32_t* tokens, int n, int position,
                           bool all_logits, float* logits) {
  turn(*rows_[rows], position, n);
  if (banks_ && position == 0 && segment == 0) banks_->forget();
  const auto [first, end] = steps_of(segment);
  const int made = end + (whole && end < static_cast<int>(steps_.size()) ? 1 : 0);
  int first_fetched = -1, last_fetched = -1;
  for (int s = first; s < made; ++s) {
    if (!fetches(steps_[s])) continue;
    if (first_fetched < 0) first_fetched = s;
    last_fetched = s;
  }
  if (first_fetched >= 0) {
    if (first_fetched <= fetched_step_) ++passes_;
    fetched_step_ = last_fetched;
  }
  start(*rows_[rows], Call{tokens, logits, n, position, passes_, static_cast<int16_t>(segment), all_logits, whole});
}

Range Executor::steps_of(int segment) const {
  const int n_steps = static_cast<int>(steps_.size()), n_cuts = static_cast<int>(cuts_.size());
  return {segment == 0 ? 0 : cuts_[segment - 1] + 1, segment < n_cuts ? cuts_[segment] : n_steps};
}

bool Executor::fetches(const Step& step) const {
  const Op& last = ops_[step.ops.end - 1];
  const auto* linear = std::get_if<LinearOp>(&last);
  const auto* experts = std::get_if<ExpertsOp>(&last);
  return (linear && (linear->use >= 0 || linear->pieces.end)) || (experts && (experts->use >= 0 || experts->pieces.end));
}

void Executor::run(const Call& call, Walk& walk) {
  const int n_steps = static_cast<int>(steps_.size());
  if (call.segment == kAll) {
    for (const Step& step : steps_) run_step(step, true, call, walk);
    return;
  }
  const auto [first, end] = steps_of(call.segment);
  if (first > 0 && !call.whole) {
    const auto& made = std::get<LinearOp>(ops_[steps_[first - 1].ops.end - 1]);
    const int n_chunks = made.added_to < 0 ? 0 : chunks(call.n, n_threads());
    walk.share(n_chunks, [&](int chunk) {
      const Range mine = share(call.n, chunk, n_chunks);
      for (int r = mine.begin; r < mine.end; ++r)
        kernels_.floats->add(row(made.outputs[0], r), row(made.added_to, r), widths_[made.added_to]);
    });
  }
  for (int s = first; s < end; ++s) run_step(steps_[s], true, call, walk);
  if (end < n_steps) run_step(steps_[end], call.whole, call, walk);
}

void Executor::run_step(const Step& step, bool with_last, const Call& call, Walk& walk) {
  const int rows_end = with_last ? step.ops.end : step.ops.end - 1;
  const int n_parts = call.n == 1 ? step.n_parts : 1;
  const int n_chunks = rows_end == step.ops.begin ? 0 : call.n == 1 ? n_parts : chunks(call.n, n_threads());
  walk.share(n_chunks, [&](int chunk) {
    const Slice slice = call.n == 1 ? Slice{{0, 1}, chunk, n_parts} : Slice{share(call.n, chunk, n_chunks), 0, 1};
    for (int i = step.ops.begin; i < rows_end; ++i)
      std::visit([&](const auto& op) { run_rows(op, call, slice, walk.thread()); }, ops_[i]);
  });
  if (!with_last) return;
  const Op& last = ops_[step.ops.end - 1];
  const auto* linear = std::get_if<LinearOp>(&last);
  const auto* experts = std::get_if<ExpertsOp>(&last);
  const PieceRange pieces = !stream_ ? PieceRange{} : linear ? linear->pieces : experts ? experts->pieces : PieceRange{};
  if (pieces.end) {
    stream_->release(call.pass, pieces.begin);  // those of products that were made elsewhere: nobody else says so
    stream_->wait(call.pass, pieces.end);
  }
  if (linear && linear->use >= 0)
    banks_->demand(call.pass, linear->use, call.n == 1 ? active_.as<uint64_t>() : nullptr);
  std::visit([&](const auto& op) { run_all(op, call, walk); }, last);
  if (pieces.end) stream_->release(call.pass, pieces.end);  // a late thread may read what is overwritten; its result is dropped
}

ActivationsView Executor::activations(int k, int n_rows, bool tables) const {
  return {q_.as<int8_t>(),
          act_scales_.as<float>(),
          sums_.as<int32_t>(),
          pairs_.as<PairSums>(),
          tables ? tables_.as<uint8_t>() : nullptr,
          tables ? lows_.as<int32_t>() : nullptr,
          (k + kActBlock - 1) / kActBlock,
          kernels_.matmul->wants_tiles && n_rows >= kTileRows ? tiles_.as<ActTile>() : nullptr};
}

void Executor::multiply(const Product& product, int n_rows, int thread) {
  const MatrixView& w = product.w;
  const bool lookup = looks_up(w, n_rows);
  const ActivationsView x = activations(w.k, n_rows, lookup);
  const Range panels{0, w.n_panels()};
  if (lookup) matmul_by_lookup(*kernels_.matmul, w, x, n_rows, panels, product.bias, product.y, product.ldy);
  else
    matmul_by_multiply(*kernels_.matmul, w, x, n_rows, panels, product.bias, product.y, product.ldy,
                       gemm_scratch_[thread].as<uint8_t>());
}

// product(i): the i-th of n_products, which read the same activations.
template <typename Products>
void Executor::multiply_all(int n_products, const Products& product, int n_rows, float softcap, Walk& walk) {
  int total = 0;
  for (int i = 0; i < n_products; ++i) total += product(i).w.n_panels();
  const int most = std::max(1, kResultRows / n_rows);  // panels of a chunk
  const int n_chunks = walk.alone() ? 1 : std::max(chunks(total, n_threads()), (total + most - 1) / most);
  float* const results = results_[walk.thread()].as<float>();
  // The products of a chunk: to their place, and to this thread's results.
  const auto for_each = [&](int chunk, const auto& body) {
    const Range mine = share(total, chunk, n_chunks);
    float* result = results;
    int first = 0;  // panels of the products before this one
    for (int i = 0; i < n_products; ++i) {
      const Product whole = product(i);
      const Range panels{std::max(mine.begin - first, 0), std::min(mine.end - first, whole.w.n_panels())};
      first += whole.w.n_panels();
      if (panels.begin >= panels.end) continue;
      const MatrixView w = part_of(whole.w, panels);
      const int at = panels.begin * kPanel;
      const float* bias = whole.bias ? whole.bias + at : nullptr;
      body(Product{w, bias, whole.y + at, whole.sum ? whole.sum + at : nullptr, whole.ldy},
           Product{w, bias, result, nullptr, w.n});
      result += int64_t{n_rows} * w.n;
    }
  };
  const auto compute = [&](int chunk) {
    for_each(chunk, [&](const Product& final, const Product& own) {
      const Product& to = walk.alone() ? final : own;
      multiply(to, n_rows, walk.thread());
      for (int r = 0; softcap > 0 && r < n_rows; ++r) kernels_.floats->softcap(to.y + r * to.ldy, softcap, to.w.n);
    });
  };
  walk.share(n_chunks, compute, [&](int chunk) {
    for_each(chunk, [&](const Product& final, const Product& own) {
      for (int r = 0; r < n_rows; ++r) {
        float* const y = final.y + r * final.ldy;
        if (!walk.alone()) std::memcpy(y, own.y + r * own.ldy, own.w.n * sizeof(float));
        if (final.sum) kernels_.floats->add(y, final.sum + r * final.ldy, own.w.n);
      }
    });
  });
}

void Executor::run_all(const LinearOp& op, const Call& call, Walk& walk) {
  if (op.use >= 0) return multiply_channels(op, call, walk);
  const auto product = [&](int i) {
    return Product{matrices_[op.matrices[i]], op.biases[i].empty() ? nullptr : op.biases[i].data(),
                   row(op.outputs[i], 0), op.added_to < 0 ? nullptr : row(op.added_to, 0), widths_[op.outputs[i]]};
  };
  multiply_all(static_cast<int>(op.matrices.size()), product, call.n, 0, walk);
}

void Executor::run_all(const HeadOp& op, const Call& call, Walk& walk) {
  if (!call.logits) return;
  const MatrixView& w = matrices_[op.matrix];
  const auto product = [&](int) { return Product{w, nullptr, call.logits, nullptr, w.n}; };
  multiply_all(1, product, call.n - call.first_logits_row(), op.softcap, walk);
}

}  // namespace elute
