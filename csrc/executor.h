// Runs an op list for the tokens of a chunk in one call. Built once per model from Python (runtime/executor.py), which
// also keeps the weights alive; knows no file format and no architecture.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <variant>
#include <vector>

#include "bank_cache.h"
#include "channel_mask.h"
#include "dispatch.h"
#include "expert_plan.h"
#include "thread_pool.h"
#include "weight_stream.h"

namespace elute {

// Zeroed pages straight from the kernel: those that are never touched cost no memory.
class Pages {
 public:
  Pages() = default;
  explicit Pages(int64_t bytes);  // throws std::bad_alloc
  ~Pages();
  Pages(Pages&& other) noexcept;
  Pages& operator=(Pages&& other) noexcept;
  template <typename T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

struct EmbedOp {
  int matrix, output;
  float scale;
};
struct RmsNormOp {
  int input, output;
  std::vector<float> weight;
  int width, n_runs;
  float eps;
};
// Of a stream, counted from a forward's first; end 0: none.
struct PieceRange {
  int begin = 0, end = 0;
};
struct LinearOp {
  // Weights that read the same input in the same column order: one quantization, one set of tables.
  int input;
  std::vector<int> matrices, outputs;
  std::vector<std::vector<float>> biases;  // an empty one: none
  std::vector<int32_t> columns;            // empty: as they are
  int use = -1;       // of a bank cache: matrices are add_channel_matrix()'s, all of that use's bank; -1: add_matrix()'s
  int mask = -1;      // add_mask()'s; -1: all channels of the input count
  int added_to = -1;                       // finish() moves an AddOp of the only output here
  PieceRange pieces;                       // stream(): those that must be in the window
};
struct RopeOp {
  int reg, width, n_heads, table;
};
struct AttentionOp {
  int query, key, value, output, layer, n_heads, n_kv_heads, width;
  float scale;
  int window;
  float softcap;
};
struct GateOp {
  int gate, up, output;
  Activation activation;
};
struct RouterOp {
  int input, output;
  const float* weight;  // [width of output][width of input]
};
struct ExpertsOp {
  int input, logits, output;
  std::vector<int> gates, ups, downs;  // [expert] matrices, of each kind all of one shape
  int top_k;
  bool normalized;
  Activation activation;
  int use = -1;                  // of a bank cache: a row is an expert; -1: the matrices are where they are said to be
  const float* ahead = nullptr;  // the next layer's router, of as many experts and as wide: what it will probably pick
  PieceRange pieces;             // as in LinearOp
};
struct AddOp {
  int input, output;
};
struct HeadOp {
  int input, matrix;
  std::vector<int32_t> columns;
  float softcap;
};
using Op = std::variant<EmbedOp, RmsNormOp, LinearOp, RopeOp, AttentionOp, GateOp, RouterOp, ExpertsOp, AddOp,
                        HeadOp>;

constexpr int kResultTiles = 64;  // tiles, times rows, of a chunk of products in channel order: 32 KiB until they are published
constexpr int kMaxContext = 1 << 24;  // the last position that is exact in f32, as rotary angles need it

// [bits]: the most rows that are looked up; more are multiplied. Index 0 is not used.
using LookupRows = std::array<int, 9>;

class Executor {
 public:
  // context: positions in the cache, at most kMaxContext, rounded up to whole tiles; chunk: most tokens of one call.
  // Throws std::runtime_error when the threads cannot be started.
  Executor(const KernelTable& kernels, int n_threads, int context, int chunk, int n_layers, int n_kv_heads,
           int head_width, CacheType cache_type);

  int add_register(int width);
  int add_matrix(const MatrixView& view);
  // In channel order, at `offset` of the rows of a bank of `banks`, which must outlive the executor and is the same always.
  int add_channel_matrix(const ChannelMatrix& matrix, BankCache& banks, int bank);
  int add_rope_table(std::vector<float> inverse_frequencies, float factor);
  int add_mask();  // of the inputs of linear ops; until set_mask() nothing is masked
  void add_op(Op op);
  void use_banks(BankCache& banks) { banks_ = &banks; }  // of ExpertsOp; must outlive the executor
  void finish(const LookupRows& lookup_rows);  // allocates; no additions after it
  // After finish(): matrix i of a LinearOp or ExpertsOp has its planes in the window when pieces[i] is a piece of
  // `stream`, counted in the order of use; -1: in memory. The stream must outlive the executor.
  void stream(WeightStream& stream, const std::vector<int>& pieces);

  // Between forwards: from the next one on. What was counted since observe(true) is there until observe(false).
  void set_mask(int mask, std::vector<float> importance, float threshold);
  void observe(bool on);
  std::vector<int64_t> histogram(int mask) const;  // [kScoreBins]
  // share: 0 to 1, of CacheAware, for tokens that are computed alone, where not all banks are in memory.
  void set_cache_aware(float share);

  // Runs n tokens at positions [position, position + n); logits f32 [n or 1, vocabulary], or null for none.
  // Indices are the caller's to check (bind/executor.cpp does).
  void forward(const int32_t* tokens, int n, int position, bool all_logits, float* logits);

  // A forward in parts, whose products are made elsewhere: `linears` of its ops, counted among LinearOps in the order of
  // addition, cut it into linears.size() + 1 segments. A segment leaves the op's input in its register, and the next one
  // finds the outputs there, bias included; or, `whole`, each makes the product at its end itself, as forward() does.
  // Several chunks of tokens may be under way, each in rows of its own. Weights that come from flash are read once for the
  // segments up to one that wants what was read for an earlier one, and then from the first one on again.
  void cut(std::vector<int> linears);
  void set_rows(int n);  // 1 or more; forward() uses the first
  void run_segment(int segment, bool whole, int rows, const int32_t* tokens, int n, int position, bool all_logits,
                   float* logits);
  float* register_of(int rows, int reg) const { return rows_[rows]->registers[reg].as<float>(); }
  int n_linears() const { return static_cast<int>(linear_steps_.size()); }

  int n_threads() const { return pool_.n_threads(); }
  int chunk() const { return chunk_; }
  int context() const { return context_; }
  int vocabulary() const;
  int embedding_rows() const;

 private:
  // What a forward works on, as a ThreadPool::Job: every thread has its copy, which a late one may outlive.
  struct Call {
    const int32_t* tokens;
    float* logits;
    int n, position;
    uint32_t pass;    // forwards before this one
    int16_t segment;  // kAll: all of them
    bool all_logits, whole;

    int first_logits_row() const { return all_logits ? 0 : n - 1; }
  };
  struct Product;
  struct ExpertProduct;
  static constexpr int16_t kAll = -1;
  struct RopeTable {
    std::vector<float> inverse_frequencies;
    float factor;
  };
  struct Turns {
    std::vector<float> cos, sin;  // [chunk][width / 2]
  };
  // What a chunk of tokens has of its own.
  struct Rows {
    std::vector<Pages> registers;
    std::vector<Turns> turns;  // [rope table], at n positions from `position` on
    int position = 0, n = 0;
  };

  // Ops up to the first that needs all rows: a chunk of rows goes through their row-wise parts at once, then the last
  // op's own part follows. A row alone is cut into n_parts by channels.
  struct Step {
    Range ops;
    int n_parts;
  };
  // Whole rows, or a part of the channels of one.
  struct Slice {
    Range rows;
    int part, n_parts;
    Range of(int n) const { return share(n, part, n_parts); }
    Range channels(int width) const;  // whole blocks of activations
  };
  struct Touch;
  struct InBank {
    ChannelMatrix matrix;
    int bank;
  };
  static constexpr int kLeastChannels = 256;  // of a row, that are worth a thread's while: some 0.2 us

  Range steps_of(int segment) const;  // that it runs whole
  bool fetches(const Step&) const;    // whether its product's weights may come from flash
  void run(const Call&, Walk&);
  void run_step(const Step&, bool with_last, const Call&, Walk&);
  void add_rows();
  void turn(Rows&, int position, int n) const;
  void start(const Rows&, const Call&);

  // executor_rows.cpp; thread: whose scratch is free.
  void plan_steps();
  static std::vector<Touch> touches(const Op&);
  int parts_of(Range ops) const;
  void run_rows(const EmbedOp&, const Call&, const Slice&, int thread);
  void run_rows(const RmsNormOp&, const Call&, const Slice&, int thread);
  void run_rows(const LinearOp&, const Call&, const Slice&, int thread);
  void run_rows(const RopeOp&, const Call&, const Slice&, int thread);
  void run_rows(const AttentionOp&, const Call&, const Slice&, int thread);
  void run_rows(const GateOp&, const Call&, const Slice&, int thread);
  void run_rows(const RouterOp&, const Call&, const Slice&, int) {}
  void run_rows(const ExpertsOp&, const Call&, const Slice&, int thread);
  void run_rows(const AddOp&, const Call&, const Slice&, int thread);
  void run_rows(const HeadOp&, const Call&, const Slice&, int thread);

  // What an op does when that is done for all rows.
  static bool needs_all_rows(const Op& op) {
    return std::holds_alternative<LinearOp>(op) || std::holds_alternative<AttentionOp>(op) ||
           std::holds_alternative<RouterOp>(op) || std::holds_alternative<ExpertsOp>(op) ||
           std::holds_alternative<HeadOp>(op);
  }
  void run_all(const LinearOp&, const Call&, Walk&);
  void multiply_channels(const LinearOp&, const Call&, Walk&);  // executor_channels.cpp
  void find_active(int width, const Slice&);
  int input_width(const LinearOp& op) const { return widths_[op.input]; }
  void run_all(const AttentionOp&, const Call&, Walk&);
  void run_all(const RouterOp&, const Call&, Walk&);
  void run_all(const ExpertsOp&, const Call&, Walk&);
  void run_all(const HeadOp&, const Call&, Walk&);
  template <typename RowOp>
  void run_all(const RowOp&, const Call&, Walk&) {}

  float* row(int reg, int r) const {
    return current_.load(std::memory_order_relaxed)->registers[reg].as<float>() + int64_t{r} * widths_[reg];
  }
  // executor_attention.cpp
  struct QueryRows;
  void allocate_cache();
  int n_heads() const;  // most of an attention op
  int64_t attention_result_floats() const;
  CacheView cache(int layer, int kv_head) const;
  void attend_blocks(const AttentionOp&, const Call&, int heads, Walk&);
  void attend_spans(const AttentionOp&, const Call&, Walk&);
  // executor_experts.cpp
  void allocate_experts();
  int64_t expert_activations() const;  // quantized at a time, padding included
  void find_experts(const ExpertsOp&, const Call&, ExpertPlan&, int thread);
  const uint64_t* likely_experts(const ExpertsOp&, int thread);
  template <typename LooksUp, typename RowOf>
  void quantize_slots(const ExpertPlan&, int n_picks, int k, const LooksUp&, const RowOf&, Walk&);
  template <typename Products, typename Finish>
  void multiply_picked(const ExpertsOp&, const Call&, const ExpertPlan&, int n_each, const Products&, const Finish&, Walk&);
  ActivationsView activations(int k, int n_rows, bool tables) const;  // of the op that runs
  // present: of the channels, bits; null: the mask's own threshold is that of all.
  void quantize_rows(int input, const std::vector<int32_t>& columns, int mask, int k, Range rows, const Slice&,
                     bool tables, int thread, const uint64_t* present = nullptr);
  bool looks_up(const MatrixView& w, int n_rows) const { return n_rows <= lookup_rows_[w.bits]; }
  void multiply(const Product&, int n_rows, int thread);
  template <typename Products>
  void multiply_all(int n_products, const Products& product, int n_rows, float softcap, Walk& walk);

  const KernelTable& kernels_;
  const int context_, chunk_, n_layers_, n_kv_heads_, head_width_;
  const CacheType cache_type_;
  std::vector<int> widths_;
  std::vector<std::unique_ptr<Rows>> rows_;  // never fewer: a late thread may read them
  std::atomic<const Rows*> current_{nullptr};
  std::vector<MatrixView> matrices_;
  std::vector<InBank> in_banks_;
  BankCache* banks_ = nullptr;
  LookupRows lookup_rows_{};
  std::vector<RopeTable> rope_tables_;
  std::vector<ChannelMask> masks_;
  CacheAware cache_aware_;
  bool observing_ = false;
  std::vector<Pages> histograms_;  // [mask * n_threads + thread], of kScoreBins
  std::vector<Op> ops_;
  std::vector<Step> steps_;
  std::vector<int> linear_steps_;  // [LinearOp]
  std::vector<int> cuts_;          // steps, ascending, whose LinearOps are computed elsewhere
  Pages cache_, partials_, q_, act_scales_, sums_, pairs_, tiles_, tables_, lows_;
  Pages active_;  // of a lone row: a bit for each channel whose q is not 0
  Pages expert_gates_, expert_ups_, expert_downs_;  // [slot of an ExpertPlan][width]
  std::vector<ExpertPlan> expert_plans_;            // [thread]
  struct ExpertWords {                              // of a thread
    std::vector<uint64_t> wanted, ahead;            // a bit for each expert
    std::vector<float> logits;
  };
  std::vector<ExpertWords> expert_words_;           // [thread]
  std::vector<Pages> gemm_scratch_, attention_scratch_, gathered_, results_;  // [thread]
  WeightStream* stream_ = nullptr;
  uint32_t passes_ = 0;
  int fetched_step_ = -1;  // of the pass that segments make, the last whose weights come from flash
  ThreadPool pool_;  // last: its threads use the others until it is gone
};

}  // namespace elute
