// What ops do row by row: norms, rotary embedding, gates, residuals, quantization of activations. Between two ops that
// need all rows, a chunk of rows goes through all of it in one step; a row alone is cut by channels.
#include <algorithm>
#include <bit>

#include "executor.h"

namespace elute {

// How an op's row-wise part uses a register: in units of so many channels, or each value depends on the whole row.
struct Executor::Touch {
  static constexpr int kWhole = 0;
  int reg, unit;
  bool writes;
};

std::vector<Executor::Touch> Executor::touches(const Op& op) {
  struct Of {
    std::vector<Touch> operator()(const EmbedOp& o) const { return {{o.output, Touch::kWhole, true}}; }
    std::vector<Touch> operator()(const RmsNormOp& o) const {
      if (o.n_runs == 1) return {{o.input, Touch::kWhole, false}, {o.output, kActBlock, true}};
      return {{o.input, o.width, false}, {o.output, o.width, true}};
    }
    std::vector<Touch> operator()(const LinearOp& o) const {
      return {{o.input, o.columns.empty() ? kActBlock : Touch::kWhole, false}};
    }
    std::vector<Touch> operator()(const HeadOp& o) const {
      return {{o.input, o.columns.empty() ? kActBlock : Touch::kWhole, false}};
    }
    std::vector<Touch> operator()(const RopeOp& o) const { return {{o.reg, o.width, true}}; }
    std::vector<Touch> operator()(const AttentionOp& o) const {
      return {{o.key, o.width, false}, {o.value, o.width, false}};
    }
    std::vector<Touch> operator()(const GateOp& o) const {
      return {{o.gate, kActBlock, false}, {o.up, kActBlock, false}, {o.output, kActBlock, true}};
    }
    std::vector<Touch> operator()(const RouterOp&) const { return {}; }
    std::vector<Touch> operator()(const ExpertsOp& o) const { return {{o.logits, Touch::kWhole, true}}; }
    std::vector<Touch> operator()(const AddOp& o) const {
      return {{o.input, kActBlock, false}, {o.output, kActBlock, true}};
    }
  };
  return std::visit(Of{}, op);
}

void Executor::plan_steps() {
  std::vector<Op> ops;
  for (Op& op : ops_) {
    const auto* add = std::get_if<AddOp>(&op);
    auto* linear = ops.empty() ? nullptr : std::get_if<LinearOp>(&ops.back());
    if (add && linear && linear->outputs.size() == 1 && linear->outputs[0] == add->input && linear->added_to < 0)
      linear->added_to = add->output;
    else ops.push_back(std::move(op));
  }
  ops_ = std::move(ops);
  const int n_ops = static_cast<int>(ops_.size());
  for (Range step{0, 0}; step.begin < n_ops; step.begin = step.end) {
    while (step.end < n_ops && !needs_all_rows(ops_[step.end])) ++step.end;
    step.end = std::min(step.end + 1, n_ops);
    if (std::holds_alternative<LinearOp>(ops_[step.end - 1])) linear_steps_.push_back(static_cast<int>(steps_.size()));
    steps_.push_back({step, parts_of(step)});
  }
}

// Parts may run at the same time, so what one writes another may not touch: a register that is written must be used in
// the same units by all ops of the step.
int Executor::parts_of(Range ops) const {
  std::vector<Touch> all;
  for (int i = ops.begin; i < ops.end; ++i)
    for (const Touch& touch : touches(ops_[i])) all.push_back(touch);
  int widest = 0;
  for (const Touch& written : all) {
    widest = std::max(widest, widths_[written.reg]);
    if (!written.writes) continue;
    for (const Touch& other : all)
      if (other.reg == written.reg && (other.unit != written.unit || other.unit == Touch::kWhole)) return 1;
  }
  return std::clamp(widest / kLeastChannels, 1, n_threads());
}

Range Executor::Slice::channels(int width) const {
  const Range blocks = of((width + kActBlock - 1) / kActBlock);
  return {blocks.begin * kActBlock, std::min(blocks.end * kActBlock, width)};
}

void Executor::run_rows(const EmbedOp& op, const Call& call, const Slice& slice, int) {
  const MatrixView& w = matrices_[op.matrix];
  for (int r = slice.rows.begin; r < slice.rows.end; ++r) {
    dequant_row(w, call.tokens[r], row(op.output, r));
    if (op.scale != 1.0f) kernels_.floats->scale(row(op.output, r), op.scale, w.k);
  }
}

void Executor::run_rows(const RmsNormOp& op, const Call&, const Slice& slice, int) {
  // One run is cut by channels, several by runs.
  const Range runs = op.n_runs == 1 ? Range{0, 1} : slice.of(op.n_runs);
  const Range channels = op.n_runs == 1 ? slice.channels(op.width) : Range{0, op.width};
  for (int r = slice.rows.begin; r < slice.rows.end; ++r) {
    for (int run = runs.begin; run < runs.end; ++run) {
      const float* x = row(op.input, r) + int64_t{run} * op.width;
      float* y = row(op.output, r) + int64_t{run} * op.width;
      kernels_.floats->rms_scale(x + channels.begin, op.weight.data() + channels.begin,
                                 kernels_.floats->rms_factor(x, op.width, op.eps), y + channels.begin,
                                 channels.end - channels.begin);
    }
  }
}

void Executor::run_rows(const RopeOp& op, const Call&, const Slice& slice, int) {
  const Turns& turns = current_.load(std::memory_order_relaxed)->turns[op.table];
  const Range heads = slice.of(op.n_heads);
  for (int r = slice.rows.begin; r < slice.rows.end; ++r) {
    const int64_t at = int64_t{r} * (op.width / 2);
    kernels_.floats->rope(row(op.reg, r) + heads.begin * op.width, turns.cos.data() + at, turns.sin.data() + at,
                          op.width, heads.end - heads.begin);
  }
}

void Executor::run_rows(const GateOp& op, const Call&, const Slice& slice, int) {
  const Range channels = slice.channels(widths_[op.output]);
  const int at = channels.begin;
  for (int r = slice.rows.begin; r < slice.rows.end; ++r)
    kernels_.floats->gate(row(op.gate, r) + at, row(op.up, r) + at, row(op.output, r) + at, channels.end - at,
                          op.activation);
}

void Executor::run_rows(const AddOp& op, const Call&, const Slice& slice, int) {
  const Range channels = slice.channels(widths_[op.output]);
  const int at = channels.begin;
  for (int r = slice.rows.begin; r < slice.rows.end; ++r)
    kernels_.floats->add(row(op.input, r) + at, row(op.output, r) + at, channels.end - at);
}

void Executor::run_rows(const LinearOp& op, const Call& call, const Slice& slice, int thread) {
  bool tables = false;
  for (int m : op.matrices) tables |= op.use < 0 && looks_up(matrices_[m], call.n);
  const bool aware = op.use >= 0 && call.n == 1 && cache_aware_.share > 0;
  quantize_rows(op.input, op.columns, op.mask, input_width(op), {0, call.n}, slice, tables, thread,
                aware ? banks_->present(op.use).data() : nullptr);
  if (op.use >= 0 && call.n == 1) find_active(input_width(op), slice);
}

void Executor::run_rows(const HeadOp& op, const Call& call, const Slice& slice, int thread) {
  if (!call.logits) return;
  const MatrixView& w = matrices_[op.matrix];
  const int first_row = call.first_logits_row();
  quantize_rows(op.input, op.columns, -1, w.k, {first_row, call.n}, slice, looks_up(w, call.n - first_row), thread);
}

void Executor::quantize_rows(int input, const std::vector<int32_t>& columns, int mask, int k, Range rows,
                             const Slice& slice, bool tables, int thread, const uint64_t* present) {
  const Range channels = slice.channels(k);
  if (channels.begin >= channels.end) return;
  const ActivationsView all = activations(k, rows.end - rows.begin, tables);
  const ChannelMask* const masked = mask < 0 || masks_[mask].importance.empty() ? nullptr : &masks_[mask];
  for (int r = std::max(slice.rows.begin, rows.begin); r < slice.rows.end; ++r) {
    const float* x = row(input, r);
    if (masked || !columns.empty()) {
      float* gathered = gathered_[thread].as<float>();
      for (int i = channels.begin; i < channels.end; ++i) {
        const int channel = columns.empty() ? i : columns[i];
        gathered[i] = masked ? masked->masked(channel, x[channel]) : x[channel];
      }
      if (masked && present) {
        int n_present = 0;
        for (int word = 0; word * 64 < k; ++word) n_present += std::popcount(present[word]);
        const float least[] = {cache_aware_.absent(masked->threshold), cache_aware_.present(masked->threshold, n_present, k)};
        for (int i = channels.begin; i < channels.end; ++i)
          gathered[i] = masked->masked(i, x[i], least[present[i / 64] >> (i % 64) & 1]);
      }
      if (masked && observing_) {
        int64_t* const bins = histograms_[mask * n_threads() + thread].as<int64_t>();
        for (int i = channels.begin; i < channels.end; ++i) {
          const int channel = columns.empty() ? i : columns[i];
          ++bins[score_bin(masked->score(channel, x[channel]))];
        }
      }
      x = gathered;
    }
    ActivationsView part = all.from_row(r - rows.begin).from_block(channels.begin / kActBlock);
    part.n_blocks = (channels.end - channels.begin + kActBlock - 1) / kActBlock;
    kernels_.matmul->quantize(x + channels.begin, channels.end - channels.begin, part);
  }
}

}  // namespace elute
