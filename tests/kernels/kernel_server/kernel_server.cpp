// The kernels and the executor of elute without Python, for CPUs that are only emulated here: answers the calls of
// elute._native that ../emulated.py sends, with the same names and the arguments in the same order.
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>

#include "activations.h"
#include "attention_call.h"
#include "bench.h"
#include "crc32c.h"
#include "executor.h"
#include "matmul_rows.h"
#include "shadow.h"
#include "wire.h"

namespace elute {
namespace {

using Call = std::function<void(Request&, Reply&)>;
using Calls = std::map<std::string, Call>;

const KernelTable& kernels_named(const std::string& isa) {
  const KernelTable* table = find_kernels(isa);
  if (!table) throw std::invalid_argument("isa: found '" + isa + "', wanted one that this CPU runs");
  return *table;
}
const FloatKernels& floats(Request& in) { return *kernels_named(in.text()).floats; }

// planes, scales, offsets, n, bits, group_size, zero, affine. K is that of the activations.
struct Matrix {
  Array<uint8_t> planes;
  Array<uint16_t> scales;
  std::optional<Array<uint16_t>> offsets;
  MatrixView view;

  Matrix(Request& in, int k)
      : planes(in.array<uint8_t>()), scales(in.array<uint16_t>()), offsets(in.optional_array<uint16_t>()) {
    view.planes = planes.data();
    view.scales = scales.data();
    view.offsets = offsets ? offsets->data() : nullptr;
    view.n = static_cast<int>(in.integer());
    view.k = k;
    view.bits = static_cast<int>(in.integer());
    view.group_size = static_cast<int>(in.integer());
    view.zero = static_cast<int>(in.integer());
    const std::string affine = in.text();
    view.affine = affine == "zero" ? Affine::zero : affine == "min" ? Affine::min : Affine::symmetric;
  }
};

// The same with rows u8 [K, bytes] in channel order for planes, and the offset in them.
struct Channels {
  Array<uint8_t> bytes;
  Array<uint16_t> scales;
  std::optional<Array<uint16_t>> offsets;
  std::vector<const uint8_t*> rows;
  ChannelMatrix view;

  Channels(Request& in, int k) : Channels{Matrix(in, k), in.integer()} {}  // braces: in this order

 private:
  Channels(const Matrix& matrix, int64_t offset)
      : bytes(matrix.planes), scales(matrix.scales), offsets(matrix.offsets) {
    const MatrixView& m = matrix.view;
    for (int channel = 0; channel < m.k; ++channel) rows.push_back(bytes.data() + int64_t{channel} * bytes.shape(1));
    view = {rows.data(), offset, m.scales, m.offsets, m.n, m.k, m.bits, m.group_size, m.zero, m.affine};
  }
};

CacheType cache_type(Request& in) { return in.text() == "q8" ? CacheType::q8 : CacheType::f16; }

void add_matmul_calls(Calls& calls) {
  calls["quantize_activations"] = [](Request& in, Reply& out) {
    const KernelTable& kernels = kernels_named(in.text());
    const auto x = in.array<float>();
    const Activations a(kernels, x.data(), x.shape(0), x.shape(1), true);
    const size_t rows = a.rows, blocks = a.blocks, runs = blocks * (kActBlock / kSumRun);
    out.add(a.q.get(), {rows, blocks * kActBlock});
    out.add(a.scales.get(), {rows, blocks});
    out.add(a.sums.get(), {rows, runs});
    out.add(a.tables.get(), {rows, blocks * kBlockQuads, size_t{kTableBytes}});
    out.add(a.lows.get(), {rows, runs});
  };
  calls["lut_matmul"] = [](Request& in, Reply& out) {
    const KernelTable& kernels = kernels_named(in.text());
    const auto x = in.array<float>();
    const Matrix matrix(in, x.shape(1));
    const MatrixView& w = matrix.view;
    const auto bias = in.optional_array<float>();
    const bool lookup = in.integer() != 0;
    const int rows = x.shape(0);
    const Activations a(kernels, x.data(), rows, w.k, lookup);
    const float* b = bias ? bias->data() : nullptr;
    std::vector<float> y(int64_t{rows} * w.n);
    const Range all{0, w.n_panels()};
    if (lookup) {
      matmul_by_lookup(*kernels.matmul, w, a.view, rows, all, b, y.data(), w.n);
    } else {
      const auto scratch = aligned<uint8_t>(gemm_scratch_bytes(rows));
      matmul_by_multiply(*kernels.matmul, w, a.view, rows, all, b, y.data(), w.n, scratch.get());
    }
    out.add(y.data(), {size_t(rows), size_t(w.n)});
  };
  calls["channel_matmul"] = [](Request& in, Reply& out) {
    const KernelTable& kernels = kernels_named(in.text());
    const auto x = in.array<float>();
    const auto active = in.array<uint8_t>();  // the bytes of the words
    const Channels matrix(in, x.shape(1));
    const ChannelMatrix& w = matrix.view;
    const auto bias = in.optional_array<float>();
    const Activations a(kernels, x.data(), x.shape(0), w.k, false);
    std::vector<uint64_t> words(active.size() / 8);
    std::memcpy(words.data(), active.data(), active.size());
    std::vector<float> y(int64_t{x.shape(0)} * w.n);
    for (int r = 0; r < x.shape(0); ++r)
      kernels.matmul->channel_matmul(w, a.view.from_row(r), words.data(), 0, w.n_tiles(), bias ? bias->data() : nullptr,
                                     y.data() + int64_t{r} * w.n);
    out.add(y.data(), {size_t(x.shape(0)), size_t(w.n)});
  };
  calls["channel_gemm"] = [](Request& in, Reply& out) {
    const KernelTable& kernels = kernels_named(in.text());
    const auto x = in.array<float>();
    const Channels matrix(in, x.shape(1));
    const ChannelMatrix& w = matrix.view;
    const auto bias = in.optional_array<float>();
    const int rows = x.shape(0);
    const Activations a(kernels, x.data(), rows, w.k, false);
    const auto scratch = aligned<uint8_t>(channel_gemm_scratch_bytes(rows));
    std::vector<float> y(int64_t{rows} * w.n);
    kernels.matmul->channel_gemm(w, a.view, rows, 0, w.n_tiles(), bias ? bias->data() : nullptr, y.data(), w.n,
                                 scratch.get());
    out.add(y.data(), {size_t(rows), size_t(w.n)});
  };
  // As codes of whole panels, in the order of the kernel: u8 [n_panels, K / 4, 32, 4].
  calls["lut_dequant"] = [](Request& in, Reply& out) {
    const KernelTable& kernels = kernels_named(in.text());
    const auto planes = in.array<uint8_t>();
    const int n = static_cast<int>(in.integer()), k = static_cast<int>(in.integer());
    const int bits = static_cast<int>(in.integer());
    const MatrixView w{planes.data(), nullptr, nullptr, n, k, bits, k, 0, Affine::symmetric};
    const auto codes = aligned<uint8_t>(panel_codes_bytes(k));
    const size_t panel_codes = size_t(k) * kPanel;
    std::string all;
    for (int panel = 0; panel < w.n_panels(); ++panel) {
      kernels.matmul->lut_dequant(w, panel, codes.get());
      all.append(reinterpret_cast<const char*>(codes.get()), panel_codes);
    }
    out.add(reinterpret_cast<const uint8_t*>(all.data()),
            {size_t(w.n_panels()), size_t(k / kLutWidth), size_t{kPanel}, size_t{kLutWidth}});
  };
  calls["matmul_seconds"] = [](Request& in, Reply& out) {
    const KernelTable& kernels = kernels_named(in.text());
    const auto x = in.array<float>();
    const Matrix matrix(in, x.shape(1));
    const int repeats = static_cast<int>(in.integer()), rows = x.shape(0);
    const Activations a(kernels, x.data(), rows, x.shape(1), rows == 1);
    std::vector<float> y(int64_t{rows} * matrix.view.n);
    matmul_seconds(kernels, 1, {matrix.view}, a, repeats, y.data());
    out.add(y.data(), {size_t(rows), size_t(matrix.view.n)});
  };
}

void add_float_calls(Calls& calls) {
  calls["rms_norm"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>(), w = in.array<float>();
    std::vector<float> y(x.size());
    const auto eps = static_cast<float>(in.number());
    const int width = x.shape(1);
    for (int r = 0; r < x.shape(0); ++r) {
      const float* row = x.data() + int64_t{r} * width;
      kernels.rms_scale(row, w.data(), kernels.rms_factor(row, width, eps), y.data() + int64_t{r} * width, width);
    }
    out.add(y.data(), x.sides());
  };
  calls["dot"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>(), w = in.array<float>();
    const int64_t rows = x.shape(0), outputs = w.shape(0), width = x.shape(1);
    std::vector<float> y(rows * outputs);
    for (int64_t i = 0; i < rows * outputs; ++i)
      y[i] = kernels.dot(x.data() + i / outputs * width, w.data() + i % outputs * width, width);
    out.add(y.data(), {size_t(rows), size_t(outputs)});
  };
  calls["rope"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>(), cos = in.array<float>(), sin = in.array<float>();
    kernels.rope(x.data(), cos.data(), sin.data(), x.shape(1), x.shape(0));
    out.add(x);
  };
  calls["gate"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto gate = in.array<float>(), up = in.array<float>();
    const std::string name = in.text();
    const Activation activation = name == "silu"        ? Activation::silu
                                  : name == "gelu_tanh" ? Activation::gelu_tanh
                                                        : Activation::relu2;
    std::vector<float> y(gate.size());
    kernels.gate(gate.data(), up.data(), y.data(), gate.size(), activation);
    out.add(y.data(), gate.sides());
  };
  calls["add"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>(), y = in.array<float>();
    kernels.add(x.data(), y.data(), x.size());
    out.add(y);
  };
  calls["scale"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>();
    kernels.scale(x.data(), static_cast<float>(in.number()), x.size());
    out.add(x);
  };
  calls["softcap"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>();
    kernels.softcap(x.data(), static_cast<float>(in.number()), x.size());
    out.add(x);
  };
  calls["block_peaks"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>();
    std::vector<float> peaks((x.size() + kPeakBlock - 1) / kPeakBlock);
    out.add(int64_t{kernels.block_peaks(x.data(), x.size(), peaks.data())});
    out.add(peaks.data(), {peaks.size()});
  };
  calls["masses"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>();
    const float peak = static_cast<float>(in.number()), inverse_temperature = static_cast<float>(in.number());
    std::vector<float> y(x.size());
    kernels.masses(x.data(), x.size(), peak, inverse_temperature, y.data());
    out.add(y.data(), x.sides());
  };
  calls["block_masses"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>();
    const float peak = static_cast<float>(in.number()), inverse_temperature = static_cast<float>(in.number());
    std::vector<double> sums((x.size() + kPeakBlock - 1) / kPeakBlock);
    kernels.block_masses(x.data(), x.size(), peak, inverse_temperature, sums.data());
    out.add(sums.data(), {sums.size()});
  };
  calls["to_f16"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<float>();
    std::vector<uint16_t> y(x.size());
    kernels.to_f16(x.data(), y.data(), x.size());
    out.add(y.data(), x.sides());
  };
  calls["from_f16"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto x = in.array<uint16_t>();
    std::vector<float> y(x.size());
    kernels.from_f16(x.data(), y.data(), x.size());
    out.add(y.data(), x.sides());
  };
  calls["cache_write"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto cache = in.array<uint8_t>();
    const auto key = in.array<float>(), value = in.array<float>();
    const int position = static_cast<int>(in.integer());
    kernels.cache_write({cache.data(), key.shape(0), cache_type(in)}, key.data(), value.data(), position);
    out.add(cache);
  };
  calls["attention"] = [](Request& in, Reply& out) {
    const FloatKernels& kernels = floats(in);
    const auto cache = in.array<uint8_t>();
    const auto query = in.array<float>();
    const auto positions = in.array<int32_t>();
    int64_t offsets[kAttentionRows];
    for (int r = 0; r < query.shape(0); ++r) offsets[r] = int64_t{r} * query.shape(1);
    const float scale = static_cast<float>(in.number());
    const int window = static_cast<int>(in.integer());
    const float softcap = static_cast<float>(in.number());
    const bool by_spans = in.integer() != 0;
    std::vector<float> output(query.size());
    attend(kernels, {cache.data(), query.shape(1), cache_type(in)},
           {query.data(), offsets, positions.data(), query.shape(0), scale, window, softcap}, by_spans, output.data());
    out.add(output.data(), query.sides());
  };
}

// One executor at a time, and what it points into.
Activation activation_named(const std::string& name) {
  return name == "silu" ? Activation::silu : name == "gelu_tanh" ? Activation::gelu_tanh : Activation::relu2;
}

struct Model {
  std::unique_ptr<Executor> executor;
  std::vector<Matrix> matrices;
  std::vector<std::vector<float>> routers;
};

void add_executor_calls(Calls& calls) {
  static Model model;
  const auto integer = [](Request& in) { return static_cast<int>(in.integer()); };
  calls["Executor"] = [=](Request& in, Reply&) {
    const KernelTable& kernels = kernels_named(in.text());
    int sizes[6];  // threads, context, chunk, layers, kv heads, head width
    for (int& size : sizes) size = integer(in);
    model = {};
    model.executor = std::make_unique<Executor>(kernels, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5],
                                                cache_type(in));
  };
  calls["add_register"] = [=](Request& in, Reply& out) {
    out.add(int64_t{model.executor->add_register(integer(in))});
  };
  calls["add_matrix"] = [=](Request& in, Reply& out) {
    const int k = integer(in);
    model.matrices.emplace_back(in, k);
    out.add(int64_t{model.executor->add_matrix(model.matrices.back().view)});
  };
  calls["add_rope_table"] = [](Request& in, Reply& out) {
    auto frequencies = in.list<float>();
    out.add(int64_t{model.executor->add_rope_table(std::move(frequencies), static_cast<float>(in.number()))});
  };
  calls["embed"] = [=](Request& in, Reply&) {
    EmbedOp op{integer(in), integer(in), static_cast<float>(in.number())};
    model.executor->add_op(op);
  };
  calls["rms_norm_op"] = [=](Request& in, Reply&) {
    RmsNormOp op{integer(in), integer(in), in.list<float>(), 0, integer(in), static_cast<float>(in.number())};
    op.width = static_cast<int>(op.weight.size());
    model.executor->add_op(std::move(op));
  };
  calls["linear"] = [=](Request& in, Reply&) {  // columns before the biases, which are as many as the matrices
    LinearOp op{integer(in), in.list<int32_t>(), in.list<int32_t>(), {}, in.list<int32_t>()};
    for (size_t i = 0; i < op.matrices.size(); ++i) op.biases.push_back(in.list<float>());
    model.executor->add_op(std::move(op));
  };
  calls["rope_op"] = [=](Request& in, Reply&) {  // register, head width, heads, table
    RopeOp op{integer(in), integer(in), integer(in), integer(in)};
    model.executor->add_op(op);
  };
  calls["attention_op"] = [=](Request& in, Reply&) {
    AttentionOp op{};
    for (int* field : {&op.query, &op.key, &op.value, &op.output, &op.layer, &op.n_heads, &op.n_kv_heads, &op.width})
      *field = integer(in);
    op.scale = static_cast<float>(in.number());
    op.window = integer(in);
    op.softcap = static_cast<float>(in.number());
    model.executor->add_op(op);
  };
  calls["gate_op"] = [=](Request& in, Reply&) {
    GateOp op{integer(in), integer(in), integer(in), Activation::silu};
    op.activation = activation_named(in.text());
    model.executor->add_op(op);
  };
  calls["router"] = [=](Request& in, Reply&) {  // input, output, weight
    RouterOp op{integer(in), integer(in), nullptr};
    const auto weight = in.array<float>();
    model.routers.emplace_back(weight.data(), weight.data() + weight.size());
    op.weight = model.routers.back().data();
    model.executor->add_op(op);
  };
  calls["experts"] = [=](Request& in, Reply&) {
    ExpertsOp op{};
    for (int* field : {&op.input, &op.logits, &op.output}) *field = integer(in);
    for (std::vector<int>* matrices : {&op.gates, &op.ups, &op.downs}) *matrices = in.list<int32_t>();
    op.top_k = integer(in);
    op.normalized = integer(in) != 0;
    op.activation = activation_named(in.text());
    model.executor->add_op(std::move(op));
  };
  calls["add_to"] = [=](Request& in, Reply&) {
    AddOp op{integer(in), integer(in)};
    model.executor->add_op(op);
  };
  calls["head"] = [=](Request& in, Reply&) {
    HeadOp op{integer(in), integer(in), in.list<int32_t>(), static_cast<float>(in.number())};
    model.executor->add_op(std::move(op));
  };
  calls["finish"] = [](Request& in, Reply&) {  // lookup_rows of 1 to 8 bits
    const auto of_1_to_8 = in.list<int32_t>();
    LookupRows lookup_rows{};
    for (size_t bits = 1; bits < lookup_rows.size(); ++bits) lookup_rows[bits] = of_1_to_8.at(bits - 1);
    model.executor->finish(lookup_rows);
  };
  calls["forward"] = [=](Request& in, Reply& out) {
    const auto tokens = in.array<int32_t>();
    const int position = integer(in);
    const bool all_logits = integer(in) != 0;
    const size_t rows = all_logits ? tokens.shape(0) : 1, vocabulary = model.executor->vocabulary();
    std::vector<float> logits(rows * vocabulary);
    model.executor->forward(tokens.data(), tokens.shape(0), position, all_logits, logits.data());
    out.add(logits.data(), {rows, vocabulary});
  };
}

const ShadowKernels& shadows(Request& in) { return *kernels_named(in.text()).shadows; }

// starts, channels or slots, residuals.
struct Outliers {
  Array<int32_t> starts, at, residuals;

  explicit Outliers(Request& in) : starts(in.array<int32_t>()), at(in.array<int32_t>()), residuals(in.array<int32_t>()) {}
  OutlierRows rows() const { return {starts.data(), at.data(), residuals.data(), starts.size() - 1}; }
};

void want_finite(bool finite) {
  if (!finite) throw std::invalid_argument("weights: found one that is not finite");
}

void add_shadow_calls(Calls& calls) {
  calls["split_outliers"] = [](Request& in, Reply& out) {
    const ShadowKernels& kernels = shadows(in);
    const auto x = in.array<float>();
    const size_t rows = x.shape(0), k = x.shape(1);
    const SplitRows split = split_rows(kernels, x.data(), rows, k, static_cast<float>(in.number()));
    const auto count = static_cast<size_t>(split.count);
    out.add(split.q.get(), {rows, k});
    out.add(split.starts.get(), {rows + 1});
    out.add(split.channels.get(), {count});
    out.add(split.residuals.get(), {count});
  };
  // Columns or outputs, weight scales, k, the matrix.
  calls["weight_columns"] = [](Request& in, Reply& out) {
    const ShadowKernels& kernels = shadows(in);
    const auto columns = in.list<int32_t>();
    const auto scales = in.list<float>();
    const Matrix matrix(in, static_cast<int>(in.integer()));
    const size_t n = matrix.view.n;
    std::vector<int8_t> weights(columns.size() * n);
    for (size_t c = 0; c < columns.size(); ++c)
      want_finite(kernels.weight_column(matrix.view, columns[c], scales.data(), scales.size() > 1, weights.data() + c * n));
    out.add(weights.data(), {columns.size(), n});
  };
  calls["weight_columns_of_rows"] = [](Request& in, Reply& out) {  // the matrix's rows are those of the columns
    const ShadowKernels& kernels = shadows(in);
    const auto columns = in.list<int32_t>();
    const auto scales = in.list<float>();
    const Matrix matrix(in, static_cast<int>(in.integer()));
    const MatrixView& m = matrix.view;
    const int64_t offset = in.integer(), width = matrix.planes.shape(1);
    const ChannelMatrix w{nullptr, offset, m.scales, m.offsets, m.n, m.k, m.bits, m.group_size, m.zero, m.affine};
    const size_t n = w.n;
    std::vector<int8_t> weights(columns.size() * n);
    for (size_t c = 0; c < columns.size(); ++c)
      want_finite(kernels.weight_column_of_row(w, columns[c], matrix.planes.data() + c * width + offset, scales.data(),
                                               scales.size() > 1, weights.data() + c * n));
    out.add(weights.data(), {columns.size(), n});
  };
  calls["weight_rows"] = [](Request& in, Reply& out) {
    const ShadowKernels& kernels = shadows(in);
    const auto outputs = in.list<int32_t>();
    const auto scales = in.list<float>();
    const Matrix matrix(in, static_cast<int>(in.integer()));
    const size_t k = matrix.view.k;
    std::vector<int8_t> weights(outputs.size() * k);
    std::vector<float> row(k);
    for (size_t r = 0; r < outputs.size(); ++r) {
      dequant_row(matrix.view, outputs[r], row.data());
      const float scale = scales[scales.size() > 1 ? outputs[r] : 0];
      want_finite(kernels.quantize_weights(row.data(), k, scale, weights.data() + r * k));
    }
    out.add(weights.data(), {outputs.size(), k});
  };
  calls["shadow_product"] = [](Request& in, Reply& out) {
    const ShadowKernels& kernels = shadows(in);
    const Outliers outliers(in);
    const auto rows = in.array<int8_t>();
    const size_t m = outliers.rows().n_rows, n = rows.shape(1);
    if (product_fits_int32(outliers.rows())) {
      std::vector<int32_t> product(m * n);
      shadow_product(kernels, outliers.rows(), rows.data(), n, product.data());
      out.add(product.data(), {m, n});
    } else {
      std::vector<int64_t> product(m * n);
      shadow_product(kernels, outliers.rows(), rows.data(), n, product.data());
      out.add(product.data(), {m, n});
    }
  };
  calls["saturated_products"] = [](Request& in, Reply& out) {
    const ShadowKernels& kernels = shadows(in);
    const auto q = in.array<int8_t>();
    const Outliers outliers(in);
    const auto rows = in.array<int8_t>();
    const auto at_rows = in.list<int32_t>(), at_slots = in.list<int32_t>();
    const int64_t k = q.shape(1);
    std::vector<int64_t> products;
    for (size_t i = 0; i < at_rows.size(); ++i) {
      const int32_t first = outliers.starts.data()[at_rows[i]], end = outliers.starts.data()[at_rows[i] + 1];
      products.push_back(kernels.full_product(q.data() + at_rows[i] * k, rows.data() + at_slots[i] * k, k,
                                              outliers.at.data() + first, outliers.residuals.data() + first, end - first));
    }
    out.add(products.data(), {products.size()});
  };
  // result, shadow, scales, bias, output_scale -> y
  calls["finish_product"] = [](Request& in, Reply& out) {
    const ShadowKernels& kernels = shadows(in);
    FinishedRow row{};
    std::optional<Array<int32_t>> sums, shadow;
    std::optional<Array<int8_t>> codes;
    std::optional<Array<float>> floats;
    std::optional<Array<int64_t>> wide;
    if (in.is_array_of<int32_t>()) sums = in.array<int32_t>(), row.type = DeviceOutput::int32;
    else if (in.is_array_of<int8_t>()) codes = in.array<int8_t>(), row.type = DeviceOutput::int8;
    else floats = in.array<float>(), row.type = DeviceOutput::float32;
    const std::vector<size_t> sides = sums ? sums->sides() : codes ? codes->sides() : floats->sides();
    if (in.is_array_of<int64_t>()) wide = in.array<int64_t>();
    else shadow = in.optional_array<int32_t>();
    std::vector<float> scales = in.list<float>();
    if (scales.size() == 1) scales.assign(sides[1], scales[0]);
    const auto bias = in.optional_array<float>();
    row.output_scale = static_cast<float>(in.number());
    row.scales = scales.data();
    row.bias = bias ? bias->data() : nullptr;
    row.n = static_cast<int64_t>(sides[1]);
    std::vector<float> y(sides[0] * sides[1]);
    for (size_t r = 0; r < sides[0]; ++r) {
      const int64_t at = int64_t(r) * row.n;
      if (sums) row.result = sums->data() + at;
      else if (codes) row.result = codes->data() + at;
      else row.result = floats->data() + at;
      if (shadow) row.shadow = shadow->data() + at;
      if (wide) row.wide_shadow = wide->data() + at;
      row.y = y.data() + at;
      kernels.finish(row);
    }
    out.add(y.data(), sides);
  };
}

const Crc32c& crc32c_named(const std::string& level) {
  for (const Crc32c& crc : crc32c_levels())
    if (crc.name == level) return crc;
  throw std::invalid_argument("crc32c: found '" + level + "', wanted one that this CPU runs");
}

void add_crc32c_calls(Calls& calls) {
  calls["crc32c_levels"] = [](Request&, Reply& out) {
    for (const Crc32c& crc : crc32c_levels()) out.add(std::string(crc.name));
  };
  calls["crc32c"] = [](Request& in, Reply& out) {
    const Crc32c& crc = crc32c_named(in.text());
    const auto data = in.array<uint8_t>();
    out.add(int64_t{crc.of(data.data(), data.size())});
  };
  calls["crc32c_pages"] = [](Request& in, Reply& out) {
    const Crc32c& crc = crc32c_named(in.text());
    const auto data = in.array<uint8_t>();
    std::vector<uint32_t> sums(data.size() / kSummedPage);
    crc.of_pages(data.data(), static_cast<int64_t>(sums.size()), sums.data());
    out.add(reinterpret_cast<const int32_t*>(sums.data()), {sums.size()});
  };
}

int serve() {
  Calls calls;
  calls["isas"] = [](Request&, Reply& out) {
    for (const KernelTable& table : available_kernels()) out.add(std::string(table.isa));
  };
  calls["best_isa"] = [](Request&, Reply& out) { out.add(std::string(best_kernels().isa)); };
  add_matmul_calls(calls);
  add_float_calls(calls);
  add_executor_calls(calls);
  add_shadow_calls(calls);
  add_crc32c_calls(calls);
  for (Request in; in.receive();) {
    Reply reply;
    try {
      reply.add(int64_t{1});  // it went well
      calls.at(in.text())(in, reply);
    } catch (const std::exception& error) {
      reply = Reply();
      reply.add(int64_t{0});
      reply.add(std::string(error.what()));
    }
    reply.send();
  }
  return 0;
}

}  // namespace
}  // namespace elute

int main() { return elute::serve(); }
