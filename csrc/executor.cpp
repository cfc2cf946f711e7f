#include "executor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
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

struct Executor::Call {
  const int32_t* tokens;
  int n, position;
  bool all_logits;
  float* logits;
};

Executor::Executor(const KernelTable& kernels, int n_threads, int context, int chunk, int n_layers, int n_kv_heads,
                   int head_width)
    : kernels_(kernels),
      pool_(n_threads),
      context_(round_up(context, kCacheTile)),
      chunk_(chunk),
      n_layers_(n_layers),
      n_kv_heads_(n_kv_heads),
      head_width_(head_width) {}

int Executor::add_register(int width) {
  widths_.push_back(width);
  return static_cast<int>(widths_.size()) - 1;
}
int Executor::add_matrix(const MatrixView& view) {
  matrices_.push_back(view);
  return static_cast<int>(matrices_.size()) - 1;
}
int Executor::add_rope_table(std::vector<float> inverse_frequencies, float factor) {
  rope_tables_.push_back({std::move(inverse_frequencies), factor, {}, {}});
  return static_cast<int>(rope_tables_.size()) - 1;
}
void Executor::add_op(Op op) { ops_.push_back(std::move(op)); }

void Executor::finish(const LookupRows& lookup_rows) {
  lookup_rows_ = lookup_rows;
  for (int width : widths_) registers_.emplace_back(int64_t{chunk_} * width * 4);
  for (RopeTable& table : rope_tables_) {
    table.cos.resize(chunk_ * table.inverse_frequencies.size());
    table.sin.resize(table.cos.size());
  }
  cache_ = Pages(int64_t{n_layers_} * n_kv_heads_ * context_ * head_width_ * 2 * 2);
  int widest = 0, looked_up = 0;
  for (const MatrixView& m : matrices_) {
    widest = std::max(widest, m.k);
    looked_up = std::max(looked_up, std::min(lookup_rows_[m.bits], chunk_));
  }
  const int64_t padded = round_up(widest, kActBlock);
  q_ = Pages(chunk_ * padded);
  act_scales_ = Pages(chunk_ * padded / kActBlock * 4);
  sums_ = Pages(chunk_ * padded / kSumRun * 4);
  tables_ = Pages(looked_up * padded / kLutWidth * kTableBytes);
  lows_ = Pages(looked_up * padded / kSumRun * 4);
  for (int thread = 0; thread < n_threads(); ++thread) {
    gemm_scratch_.emplace_back(gemm_scratch_bytes(widest));
    attention_scratch_.emplace_back(attention_scratch_bytes(head_width_));
    gathered_.emplace_back(padded * 4);
  }
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

CacheView Executor::cache(int layer, int kv_head) const {
  const int64_t one = int64_t{context_} * head_width_;  // halves of keys or of values
  uint16_t* at = cache_.as<uint16_t>() + (int64_t{layer} * n_kv_heads_ + kv_head) * 2 * one;
  return {at, at + one, head_width_};
}

void Executor::forward(const int32_t* tokens, int n, int position, bool all_logits, float* logits) {
  for (RopeTable& table : rope_tables_) {
    const int half = static_cast<int>(table.inverse_frequencies.size());
    for (int r = 0; r < n; ++r) {
      for (int i = 0; i < half; ++i) {
        // The angle is rounded to f32 as the models' own code rounds it.
        const float angle = static_cast<float>(position + r) * table.inverse_frequencies[i];
        table.cos[r * half + i] = static_cast<float>(std::cos(double{angle})) * table.factor;
        table.sin[r * half + i] = static_cast<float>(std::sin(double{angle})) * table.factor;
      }
    }
  }
  const Call call{tokens, n, position, all_logits, logits};
  pool_.run([&](int thread) {
    // Ops that work row by row need no barrier between them: a thread keeps its rows. The others meet on their own.
    for (const Op& op : ops_) std::visit([&](const auto& o) { run(o, call, thread); }, op);
  });
}

void Executor::run(const EmbedOp& op, const Call& call, int thread) {
  const MatrixView& w = matrices_[op.matrix];
  const Range rows = share(call.n, thread, n_threads());
  for (int r = rows.begin; r < rows.end; ++r) {
    dequant_row(w, call.tokens[r], row(op.output, r));
    if (op.scale != 1.0f) kernels_.floats->scale(row(op.output, r), op.scale, w.k);
  }
}

void Executor::run(const RmsNormOp& op, const Call& call, int thread) {
  const Range rows = share(call.n, thread, n_threads());
  for (int r = rows.begin; r < rows.end; ++r)
    kernels_.floats->rms_norm(row(op.input, r), op.weight.data(), row(op.output, r), op.width, op.n_runs, op.eps);
}

ActivationsView Executor::activations(int k, bool tables) const {
  return {q_.as<int8_t>(),
          act_scales_.as<float>(),
          sums_.as<int32_t>(),
          tables ? tables_.as<uint8_t>() : nullptr,
          tables ? lows_.as<int32_t>() : nullptr,
          (k + kActBlock - 1) / kActBlock};
}

void Executor::quantize_rows(int input, const std::vector<int32_t>& columns, int k, int first_row, Range rows,
                             bool tables, int thread) {
  const ActivationsView all = activations(k, tables);
  for (int r = rows.begin; r < rows.end; ++r) {
    const float* x = row(input, first_row + r);
    if (!columns.empty()) {
      float* gathered = gathered_[thread].as<float>();
      for (int i = 0; i < k; ++i) gathered[i] = x[columns[i]];
      x = gathered;
    }
    kernels_.matmul->quantize(x, k, all.from_row(r));
  }
}

void Executor::multiply(const MatrixView& w, int n_rows, Range panels, const float* bias, float* y, int64_t ldy,
                        int thread) {
  const bool lookup = looks_up(w, n_rows);
  const ActivationsView x = activations(w.k, lookup);
  if (lookup) matmul_by_lookup(*kernels_.matmul, w, x, n_rows, panels, bias, y, ldy);
  else
    matmul_by_multiply(*kernels_.matmul, w, x, n_rows, panels, bias, y, ldy, gemm_scratch_[thread].as<uint8_t>());
}

void Executor::run(const LinearOp& op, const Call& call, int thread) {
  const int k = matrices_[op.matrices[0]].k;
  int total = 0;
  bool tables = false;
  for (int m : op.matrices) {
    total += matrices_[m].n_panels();
    tables |= looks_up(matrices_[m], call.n);
  }
  quantize_rows(op.input, op.columns, k, 0, share(call.n, thread, n_threads()), tables, thread);
  pool_.barrier();
  const Range mine = share(total, thread, n_threads());
  int first = 0;  // panels of the matrices before this one
  for (size_t i = 0; i < op.matrices.size(); ++i) {
    const MatrixView& w = matrices_[op.matrices[i]];
    const Range panels{std::max(mine.begin - first, 0), std::min(mine.end - first, w.n_panels())};
    multiply(w, call.n, panels, op.biases[i].empty() ? nullptr : op.biases[i].data(), row(op.outputs[i], 0),
             widths_[op.outputs[i]], thread);
    first += w.n_panels();
  }
  pool_.barrier();
}

void Executor::run(const RopeOp& op, const Call& call, int thread) {
  const RopeTable& table = rope_tables_[op.table];
  const Range rows = share(call.n, thread, n_threads());
  for (int r = rows.begin; r < rows.end; ++r) {
    const int64_t at = int64_t{r} * (op.width / 2);
    kernels_.floats->rope(row(op.reg, r), table.cos.data() + at, table.sin.data() + at, op.width, op.n_heads);
  }
}

void Executor::run(const AttentionOp& op, const Call& call, int thread) {
  const Range rows = share(call.n, thread, n_threads());
  for (int r = rows.begin; r < rows.end; ++r)
    for (int h = 0; h < op.n_kv_heads; ++h)
      kernels_.floats->cache_write(cache(op.layer, h), row(op.key, r) + h * op.width, row(op.value, r) + h * op.width,
                                   call.position + r);
  pool_.barrier();
  // Queries that share a kv head share the conversion of its keys and values; a lone token is split by query head.
  const int per_kv = op.n_heads / op.n_kv_heads;
  const int tokens = call.n == 1 ? 1 : std::max(1, kAttentionRows / per_kv);
  const int heads = call.n == 1 ? 1 : std::min(per_kv, kAttentionRows);
  const int head_blocks = (per_kv + heads - 1) / heads, token_blocks = (call.n + tokens - 1) / tokens;
  int64_t query_offsets[kAttentionRows], output_offsets[kAttentionRows];
  int32_t positions[kAttentionRows];
  const int items = op.n_kv_heads * head_blocks * token_blocks;
  for (int item = thread; item < items; item += n_threads()) {
    const int kv_head = item % op.n_kv_heads;
    const int head_block = item / op.n_kv_heads % head_blocks;
    const int token_block = item / op.n_kv_heads / head_blocks;
    int n_rows = 0;
    for (int t = token_block * tokens; t < std::min(call.n, (token_block + 1) * tokens); ++t) {
      for (int h = head_block * heads; h < std::min(per_kv, (head_block + 1) * heads); ++h) {
        const int64_t head = int64_t{kv_head} * per_kv + h;
        query_offsets[n_rows] = int64_t{t} * widths_[op.query] + head * op.width;
        output_offsets[n_rows] = int64_t{t} * widths_[op.output] + head * op.width;
        positions[n_rows] = call.position + t;
        ++n_rows;
      }
    }
    const AttentionBlock block{row(op.query, 0), row(op.output, 0), query_offsets, output_offsets, positions,
                               n_rows,           op.scale,          op.window,     op.softcap};
    kernels_.floats->attention(cache(op.layer, kv_head), block, attention_scratch_[thread].as<void>());
  }
  pool_.barrier();
}

void Executor::run(const GateOp& op, const Call& call, int thread) {
  const Range rows = share(call.n, thread, n_threads());
  for (int r = rows.begin; r < rows.end; ++r)
    kernels_.floats->gate(row(op.gate, r), row(op.up, r), row(op.output, r), widths_[op.output], op.activation);
}

void Executor::run(const AddOp& op, const Call& call, int thread) {
  const Range rows = share(call.n, thread, n_threads());
  for (int r = rows.begin; r < rows.end; ++r)
    kernels_.floats->add(row(op.input, r), row(op.output, r), widths_[op.output]);
}

void Executor::run(const HeadOp& op, const Call& call, int thread) {
  if (!call.logits) return;
  const MatrixView& w = matrices_[op.matrix];
  const int first_row = call.all_logits ? 0 : call.n - 1;
  const int n_rows = call.n - first_row;
  pool_.barrier();  // the last row may be another thread's
  quantize_rows(op.input, op.columns, w.k, first_row, share(n_rows, thread, n_threads()),
                looks_up(w, n_rows), thread);
  pool_.barrier();
  const Range panels = share(w.n_panels(), thread, n_threads());
  multiply(w, n_rows, panels, nullptr, call.logits, w.n, thread);
  if (op.softcap > 0) {
    const int begin = panels.begin * kPanel, end = std::min(panels.end * kPanel, w.n);
    for (int r = 0; r < n_rows && begin < end; ++r)
      kernels_.floats->softcap(call.logits + int64_t{r} * w.n + begin, op.softcap, end - begin);
  }
  pool_.barrier();
}

}  // namespace elute
