#include "executor.h"

#include <unistd.h>

#include <algorithm>

#include "bind/bind.h"

namespace elute {
namespace {

// Checks every index once, when an op is added, and keeps the arrays alive that the executor points into. Two calls at
// once are the caller's to prevent (runtime/executor.py does).
class BoundExecutor {
 public:
  BoundExecutor(const std::string& isa, int n_threads, int context, int chunk, int n_layers, int n_kv_heads,
                int head_width, const std::string& cache_type)
      : n_layers_(n_layers), n_kv_heads_(n_kv_heads), head_width_(head_width) {
    if (n_threads < 1 || n_threads > 512) throw std::invalid_argument("n_threads: wanted 1 to 512");
    if (context < 1 || context > kMaxContext || chunk < 1 || n_layers < 1 || n_kv_heads < 1 || head_width < 2 || head_width % 2)
      throw std::invalid_argument("executor: sizes must be positive, head_width even, context at most 2^24");
    const CacheType type = cache_type_named(cache_type);
    if (type == CacheType::q8 && head_width > kMostQ8Width)
      throw std::invalid_argument("executor: head_width beyond that of a q8 cache");
    executor_ = std::make_unique<Executor>(kernels_named(isa), n_threads, context, chunk, n_layers, n_kv_heads,
                                           head_width, type);
  }

  int add_register(int width) {
    want(!finished_, "registers after finish()");
    want(width >= 1, "register: width");
    widths_.push_back(width);
    return executor_->add_register(width);
  }
  int add_matrix(const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n,
                 int k, int bits, int group_size, int zero, const std::string& affine) {
    want(!finished_, "matrices after finish()");
    // A WeightSource promises the readable bytes after the planes; an array does not show them.
    matrices_.push_back(matrix_view(planes, scales, offsets, n, k, bits, group_size, zero, affine, 0));
    kept_.push_back(nb::cast(planes));
    kept_.push_back(nb::cast(scales));
    if (offsets) kept_.push_back(nb::cast(*offsets));
    return executor_->add_matrix(matrices_.back());
  }
  int add_rope_table(std::vector<float> inverse_frequencies, float factor) {
    want(!finished_, "rope tables after finish()");
    want(!inverse_frequencies.empty(), "rope table: frequencies");
    rope_halves_.push_back(static_cast<int>(inverse_frequencies.size()));
    return executor_->add_rope_table(std::move(inverse_frequencies), factor);
  }

  void embed(int matrix, int output, float scale) {
    want(width(output) == at(matrix).k, "embed: output width");
    add(EmbedOp{matrix, output, scale});
  }
  void rms_norm(int input, int output, std::vector<float> weight, int n_runs, float eps) {
    const int w = static_cast<int>(weight.size());
    want(w > 0 && n_runs > 0 && int64_t{w} * n_runs == width(input) && width(output) == width(input), "rms_norm: widths");
    add(RmsNormOp{input, output, std::move(weight), w, n_runs, eps});
  }
  void linear(int input, std::vector<int> matrices, std::vector<int> outputs, std::vector<std::vector<float>> biases,
              std::vector<int32_t> columns, int mask, int use) {
    if (use >= 0) return linear_in_bank(input, std::move(matrices), std::move(outputs), std::move(biases), mask, use);
    want(mask == -1 || (mask >= 0 && mask < static_cast<int>(mask_widths_.size()) && mask_widths_[mask] == width(input)),
         "linear: mask");
    want(!matrices.empty() && matrices.size() == outputs.size() && matrices.size() == biases.size(), "linear: counts");
    for (size_t i = 0; i < matrices.size(); ++i) {
      want(at(matrices[i]).k == width(input) && at(matrices[i]).n == width(outputs[i]), "linear: widths");
      want(outputs[i] != input, "linear: output is the input");
      want(biases[i].empty() || static_cast<int>(biases[i].size()) == width(outputs[i]), "linear: bias");
    }
    check_columns(columns, width(input));
    LinearOp op{input, std::move(matrices), std::move(outputs), std::move(biases), std::move(columns)};
    op.mask = mask;
    add(std::move(op));
  }
  // In channel order, `offset` bytes into the rows of a bank.
  int add_channel_matrix(nb::object banks, int bank, int64_t offset, const HalvesIn& scales,
                         const std::optional<HalvesIn>& offsets, int n, int k, int bits, int group_size, int zero,
                         const std::string& affine) {
    want(!finished_, "matrices after finish()");
    auto& cache = nb::cast<BankCache&>(banks);
    want(!banks_ || banks_ == &cache, "channel matrix: a second cache");
    want(bank >= 0 && bank < cache.n_banks(), "channel matrix: bank");
    const MatrixView view = affine_view(scales, offsets, n, k, bits, group_size, zero, affine);
    const ChannelMatrix matrix{nullptr, offset, view.scales, view.offsets, n, k, bits, group_size, view.zero, view.affine};
    want(cache.bank(bank).n_rows == k && offset >= 0 && offset <= cache.bank(bank).row_bytes - matrix.row_bytes(),
         "channel matrix: rows of the bank");
    if (!banks_) kept_.push_back(banks);
    banks_ = &cache;
    process_ = getpid();
    kept_.push_back(nb::cast(scales));
    if (offsets) kept_.push_back(nb::cast(*offsets));
    in_banks_.push_back({bank, n, k});
    return executor_->add_channel_matrix(matrix, cache, bank);
  }
  // Of the channels of linear ops whose input has this width.
  int add_mask(int width) {
    want(!finished_, "masks after finish()");
    want(width >= 1, "mask: width");
    mask_widths_.push_back(width);
    return executor_->add_mask();
  }
  void set_mask(int mask, std::vector<float> importance, float threshold) {
    want(finished_, "set_mask: not finished");
    want(importance.empty() || static_cast<int>(importance.size()) == mask_width(mask), "set_mask: importance");
    for (float value : importance) want(value >= 0, "set_mask: importance");
    want(threshold >= 0, "set_mask: threshold");
    executor_->set_mask(mask, std::move(importance), threshold);
  }
  void set_cache_aware(float share) {
    want(finished_, "set_cache_aware: not finished");
    want(share >= 0 && share <= 1, "set_cache_aware: share");
    executor_->set_cache_aware(share);
  }
  void observe(bool on) {
    want(finished_, "observe: not finished");
    executor_->observe(on);
  }
  nb::object histogram(int mask) const {
    mask_width(mask);
    const std::vector<int64_t> bins = executor_->histogram(mask);
    auto copy = std::make_unique_for_overwrite<int64_t[]>(bins.size());
    std::copy(bins.begin(), bins.end(), copy.get());
    return owned_array(std::move(copy), {bins.size()});
  }
  void rope(int reg, int head_width, int table) {
    want(table >= 0 && table < static_cast<int>(rope_halves_.size()) && rope_halves_[table] * 2 == head_width,
         "rope: table");
    want(width(reg) % head_width == 0, "rope: widths");
    add(RopeOp{reg, head_width, width(reg) / head_width, table});
  }
  void attention(int query, int key, int value, int output, int layer, int n_heads, int n_kv_heads, int head_width,
                 float scale, int window, float softcap) {
    want(head_width == head_width_ && n_kv_heads == n_kv_heads_ && layer >= 0 && layer < n_layers_,
         "attention: the cache was built for other sizes");
    want(n_heads > 0 && n_heads % n_kv_heads == 0, "attention: heads");
    want(width(query) == int64_t{n_heads} * head_width && width(output) == width(query), "attention: query widths");
    want(width(key) == int64_t{n_kv_heads} * head_width && width(value) == width(key), "attention: key widths");
    want(window >= 0 && softcap >= 0, "attention: window");
    add(AttentionOp{query, key, value, output, layer, n_heads, n_kv_heads, head_width, scale, window, softcap});
  }
  void gate(int gate, int up, int output, const std::string& activation) {
    want(width(gate) == width(up) && width(gate) == width(output), "gate: widths");
    add(GateOp{gate, up, output, activation_named(activation)});
  }
  void router(int input, const ArrayIn<float, 2>& weight, int output) {
    want(static_cast<int>(weight.shape(0)) == width(output) && static_cast<int>(weight.shape(1)) == width(input),
         "router: widths");
    want(output != input, "router: output is the input");
    kept_.push_back(nb::cast(weight));
    add(RouterOp{input, output, weight.data()});
  }
  void experts(int input, int logits, int output, std::vector<int> gates, std::vector<int> ups, std::vector<int> downs,
               int top_k, bool normalized, const std::string& activation, int use, nb::object banks,
               const std::optional<ArrayIn<float, 2>>& ahead) {
    const size_t n = width(logits);
    want(gates.size() == n && ups.size() == n && downs.size() == n, "experts: counts");
    const int wide = at(gates[0]).n;
    for (size_t e = 0; e < n; ++e) {
      for (int m : {gates[e], ups[e]}) want(at(m).k == width(input) && at(m).n == wide, "experts: widths");
      want(at(downs[e]).k == wide && at(downs[e]).n == width(output), "experts: widths");
    }
    want(top_k >= 1 && top_k <= width(logits), "experts: top_k");
    want(logits != input && logits != output, "experts: registers");
    ExpertsOp op{input, logits, output, std::move(gates), std::move(ups), std::move(downs), top_k, normalized,
                 activation_named(activation)};
    if (use >= 0) {
      auto& cache = nb::cast<BankCache&>(banks);
      want(!banks_ || banks_ == &cache, "experts: a second cache");
      want(use == next_use_++ && use < cache.n_uses(), "experts: uses out of order");
      want(cache.bank(cache.use(use).bank).n_rows == static_cast<int>(n), "experts: rows of the bank");
      if (!banks_) {
        kept_.push_back(std::move(banks));
        executor_->use_banks(cache);
        banks_ = &cache;
        process_ = getpid();
      }
      op.use = use;
      if (ahead) {
        want(ahead->shape(0) == n && static_cast<int>(ahead->shape(1)) == width(input), "experts: the next router");
        op.ahead = ahead->data();
        kept_.push_back(nb::cast(*ahead));
      }
    }
    add(std::move(op));
  }
  void add_to(int input, int output) {
    want(width(input) == width(output), "add: widths");
    add(AddOp{input, output});
  }
  void head(int input, int matrix, std::vector<int32_t> columns, float softcap) {
    want(at(matrix).k == width(input), "head: widths");
    check_columns(columns, width(input));
    add(HeadOp{input, matrix, std::move(columns), softcap});
  }
  // lookup_rows: of 1 to 8 bits.
  void finish(const std::vector<int>& lookup_rows) {
    want(!finished_, "a second finish()");
    if (lookup_rows.size() != 8 || *std::min_element(lookup_rows.begin(), lookup_rows.end()) < 0)
      throw std::invalid_argument("lookup_rows: wanted 8 counts from 0, for 1 to 8 bits");
    LookupRows by_bits{};
    std::copy(lookup_rows.begin(), lookup_rows.end(), by_bits.begin() + 1);
    want(executor_->vocabulary() > 0 && executor_->embedding_rows() > 0, "executor: no embed or no head");
    want(!banks_ || next_use_ == banks_->n_uses(), "executor: uses of banks");
    executor_->finish(by_bits);
    finished_ = true;
  }
  // pieces: of the matrices, in the order in which they were added; -1: in memory.
  void stream(nb::object stream, const std::vector<int>& pieces) {
    want(finished_ && !stream_, "stream: not finished, or a second one");
    auto& source = nb::cast<WeightStream&>(stream);
    want(pieces.size() == matrices_.size(), "stream: pieces");
    for (int piece : pieces) want(piece >= -1 && piece < source.n_pieces(), "stream: piece ids");
    executor_->stream(source, pieces);
    stream_ = &source;
    process_ = getpid();
    kept_.push_back(std::move(stream));
  }

  nb::object forward(const ArrayIn<int32_t, 1>& tokens, int position, bool all_logits, bool want_logits) {
    return run(tokens, position, all_logits, want_logits, [this](const int32_t* ids, int n, int at, bool all, float* logits) {
      executor_->forward(ids, n, at, all, logits);
    });
  }

  // linears: of the calls of linear(), counted from 0.
  void cut(std::vector<int> linears, int n_rows) {
    want(finished_, "cut: not finished");
    for (size_t i = 0; i < linears.size(); ++i)
      want(linears[i] >= 0 && linears[i] < executor_->n_linears() && (i == 0 || linears[i] > linears[i - 1]), "cut: linears");
    want(n_rows >= 1 && n_rows <= 1024 && linears.size() < 32767, "cut: counts");
    executor_->set_rows(n_rows);
    n_rows_ = n_rows;
    n_segments_ = static_cast<int>(linears.size()) + 1;
    executor_->cut(std::move(linears));
  }
  nb::object run_segment(int segment, bool whole, int rows, const ArrayIn<int32_t, 1>& tokens, int position,
                         bool all_logits, bool want_logits) {
    want(segment >= 0 && segment < n_segments_ && rows >= 0 && rows < n_rows_, "segment: cut() knows none like it");
    want(segment == n_segments_ - 1 || !want_logits, "segment: only the last has logits");
    return run(tokens, position, all_logits, want_logits,
               [=, this](const int32_t* ids, int n, int at, bool all, float* logits) {
                 executor_->run_segment(segment, whole, rows, ids, n, at, all, logits);
               });
  }
  // f32 [chunk, width], the executor's own memory.
  static nb::object register_of(nb::handle self, int rows, int reg) {
    auto& executor = nb::cast<BoundExecutor&>(self);
    want(executor.finished_ && rows >= 0 && rows < executor.n_rows_, "register: rows");
    const size_t width = executor.width(reg), chunk = executor.executor_->chunk();
    return nb::cast(nb::ndarray<nb::numpy, float>(executor.executor_->register_of(rows, reg), {chunk, width}, self));
  }

 private:
  template <typename Forward>
  nb::object run(const ArrayIn<int32_t, 1>& tokens, int position, bool all_logits, bool want_logits, const Forward& forward) {
    want(finished_, "forward: not finished");
    if ((stream_ || (banks_ && banks_->reads())) && process_ != getpid())
      throw std::runtime_error("forward: found a forked child, which has nobody who reads weights from flash; load the model in it");
    const int n = static_cast<int>(tokens.shape(0));
    want(n >= 1 && n <= executor_->chunk(), "forward: tokens beyond the chunk");
    want(position >= 0 && position <= executor_->context() - n, "forward: position beyond the context");
    // A copy: without the GIL others may write to the array after it was checked.
    const std::vector<int32_t> ids(tokens.data(), tokens.data() + n);
    for (int32_t id : ids) want(id >= 0 && id < executor_->embedding_rows(), "forward: token id");
    const size_t rows = !want_logits ? 0 : all_logits ? n : 1, vocabulary = executor_->vocabulary();
    auto logits = std::make_unique_for_overwrite<float[]>(rows * vocabulary);
    {
      nb::gil_scoped_release release;
      forward(ids.data(), n, position, all_logits && want_logits, want_logits ? logits.get() : nullptr);
    }
    check_stream();
    return want_logits ? owned_array(std::move(logits), {rows, vocabulary}) : nb::none();
  }
  struct InBank {
    int bank, n, k;
  };
  void linear_in_bank(int input, std::vector<int> matrices, std::vector<int> outputs, std::vector<std::vector<float>> biases,
                      int mask, int use) {
    want(mask == -1 || mask_width(mask) == width(input), "linear: mask");
    want(banks_ && use < banks_->n_uses(), "linear: use");
    want(!matrices.empty() && matrices.size() == outputs.size() && matrices.size() == biases.size(), "linear: counts");
    for (size_t i = 0; i < matrices.size(); ++i) {
      want(matrices[i] >= 0 && matrices[i] < static_cast<int>(in_banks_.size()), "channel matrix ids");
      const InBank& in = in_banks_[matrices[i]];
      want(in.bank == banks_->use(use).bank && in.k == width(input) && in.n == width(outputs[i]), "linear: widths");
      want(outputs[i] != input, "linear: output is the input");
      want(biases[i].empty() || static_cast<int>(biases[i].size()) == in.n, "linear: bias");
    }
    want(use == next_use_++, "linear: uses out of order");
    LinearOp op{input, std::move(matrices), std::move(outputs), std::move(biases), {}};
    op.use = use;
    op.mask = mask;
    add(std::move(op));
  }
  static void want(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string(what) + " do not fit");
  }
  static Activation activation_named(const std::string& name) {
    if (name == "gelu_tanh") return Activation::gelu_tanh;
    if (name == "relu2") return Activation::relu2;
    want(name == "silu", "activation");
    return Activation::silu;
  }
  int width(int reg) const {
    want(reg >= 0 && reg < static_cast<int>(widths_.size()), "register ids");
    return widths_[reg];
  }
  int mask_width(int mask) const {
    want(mask >= 0 && mask < static_cast<int>(mask_widths_.size()), "mask ids");
    return mask_widths_[mask];
  }
  const MatrixView& at(int matrix) const {
    want(matrix >= 0 && matrix < static_cast<int>(matrices_.size()), "matrix ids");
    return matrices_[matrix];
  }
  static void check_columns(const std::vector<int32_t>& columns, int k) {
    want(columns.empty() || static_cast<int>(columns.size()) == k, "columns");
    for (int32_t c : columns) want(c >= 0 && c < k, "columns");
  }
  // What was computed after a failure is garbage.
  void check_stream() const {
    if (stream_ && !stream_->failure().empty()) throw std::runtime_error(stream_->failure());
    if (banks_ && !banks_->failure().empty()) throw std::runtime_error(banks_->failure());
  }
  void add(Op op) {
    want(!finished_, "ops after finish()");
    executor_->add_op(std::move(op));
  }

  int n_layers_, n_kv_heads_, head_width_;
  int n_segments_ = 0, n_rows_ = 1;
  bool finished_ = false;
  std::vector<int> widths_, rope_halves_, mask_widths_;
  std::vector<MatrixView> matrices_;
  std::vector<nb::object> kept_;  // beyond executor_'s life, whose threads use it
  const WeightStream* stream_ = nullptr;
  BankCache* banks_ = nullptr;
  std::vector<InBank> in_banks_;
  int next_use_ = 0;
  pid_t process_ = 0;  // that has the stream's thread
  std::unique_ptr<Executor> executor_;
};

}  // namespace

void bind_executor(nb::module_& m) {
  nb::class_<BoundExecutor>(m, "Executor")
      .def(nb::init<const std::string&, int, int, int, int, int, int, const std::string&>(), nb::arg("isa"), nb::arg("n_threads"),
           nb::arg("context"), nb::arg("chunk"), nb::arg("n_layers"), nb::arg("n_kv_heads"), nb::arg("head_width"),
           nb::arg("cache_type"))
      .def("add_register", &BoundExecutor::add_register, nb::arg("width"))
      .def("add_matrix", &BoundExecutor::add_matrix, nb::arg("planes"), nb::arg("scales"), nb::arg("offsets").none(),
           nb::arg("n"), nb::arg("k"), nb::arg("bits"), nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"))
      .def("add_rope_table", &BoundExecutor::add_rope_table, nb::arg("inverse_frequencies"), nb::arg("factor"))
      .def("embed", &BoundExecutor::embed, nb::arg("matrix"), nb::arg("output"), nb::arg("scale"))
      .def("rms_norm", &BoundExecutor::rms_norm, nb::arg("input"), nb::arg("output"), nb::arg("weight"),
           nb::arg("n_runs"), nb::arg("eps"))
      .def("linear", &BoundExecutor::linear, nb::arg("input"), nb::arg("matrices"), nb::arg("outputs"),
           nb::arg("biases"), nb::arg("columns"), nb::arg("mask") = -1, nb::arg("use") = -1)
      .def("add_channel_matrix", &BoundExecutor::add_channel_matrix, nb::arg("banks"), nb::arg("bank"), nb::arg("offset"),
           nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"), nb::arg("k"), nb::arg("bits"), nb::arg("group_size"),
           nb::arg("zero"), nb::arg("affine"))
      .def("add_mask", &BoundExecutor::add_mask, nb::arg("width"))
      .def("set_mask", &BoundExecutor::set_mask, nb::arg("mask"), nb::arg("importance"), nb::arg("threshold"))
      .def("set_cache_aware", &BoundExecutor::set_cache_aware, nb::arg("share"))
      .def("observe", &BoundExecutor::observe, nb::arg("on"))
      .def("histogram", &BoundExecutor::histogram, nb::arg("mask"))
      .def("rope", &BoundExecutor::rope, nb::arg("register"), nb::arg("head_width"), nb::arg("table"))
      .def("attention", &BoundExecutor::attention, nb::arg("query"), nb::arg("key"), nb::arg("value"),
           nb::arg("output"), nb::arg("layer"), nb::arg("n_heads"), nb::arg("n_kv_heads"), nb::arg("head_width"),
           nb::arg("scale"), nb::arg("window"), nb::arg("softcap"))
      .def("gate", &BoundExecutor::gate, nb::arg("gate"), nb::arg("up"), nb::arg("output"), nb::arg("activation"))
      .def("router", &BoundExecutor::router, nb::arg("input"), nb::arg("weight"), nb::arg("output"))
      .def("experts", &BoundExecutor::experts, nb::arg("input"), nb::arg("logits"), nb::arg("output"), nb::arg("gates"),
           nb::arg("ups"), nb::arg("downs"), nb::arg("top_k"), nb::arg("normalized"), nb::arg("activation"),
           nb::arg("use") = -1, nb::arg("banks").none() = nb::none(), nb::arg("ahead").none() = nb::none())
      .def("add", &BoundExecutor::add_to, nb::arg("input"), nb::arg("output"))
      .def("head", &BoundExecutor::head, nb::arg("input"), nb::arg("matrix"), nb::arg("columns"), nb::arg("softcap"))
      .def("finish", &BoundExecutor::finish, nb::arg("lookup_rows"))
      .def("stream", &BoundExecutor::stream, nb::arg("stream"), nb::arg("pieces"))
      .def("forward", &BoundExecutor::forward, nb::arg("tokens"), nb::arg("position"), nb::arg("all_logits") = false,
           nb::arg("want_logits") = true)
      .def("cut", &BoundExecutor::cut, nb::arg("linears"), nb::arg("n_rows"))
      .def("run_segment", &BoundExecutor::run_segment, nb::arg("segment"), nb::arg("whole"), nb::arg("rows"),
           nb::arg("tokens"), nb::arg("position"), nb::arg("all_logits") = false, nb::arg("want_logits") = false)
      .def("register_of", &BoundExecutor::register_of, nb::arg("rows"), nb::arg("register"));
}

}  // namespace elute
