// The float kernels one by one, for tests and benchmarks. Results are new arrays, but for rope, add, scale, softcap and
// cache_write, which change the argument their contract (kernels/float_kernels.h) changes.
#include "attention_call.h"
#include "bind/bind.h"

#include <nanobind/stl/pair.h>

namespace elute {
struct Half {
  uint16_t bits;
};
}  // namespace elute

template <>
struct nanobind::detail::dtype_traits<elute::Half> {
  static constexpr dlpack::dtype value{static_cast<uint8_t>(dlpack::dtype_code::Float), 16, 1};
  static constexpr auto name = const_name("float16");
};

namespace elute {
namespace {

template <typename T, size_t Dims>
using ArrayInOut = nb::ndarray<T, nb::ndim<Dims>, nb::c_contig, nb::device::cpu>;

const uint16_t* bits(const Half* halves) { return reinterpret_cast<const uint16_t*>(halves); }
uint16_t* bits(Half* halves) { return reinterpret_cast<uint16_t*>(halves); }

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

template <typename Array>
std::string shape_of(const Array& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + "]";
}

template <typename Array>
void want_shape(const char* where, const Array& array, std::initializer_list<size_t> wanted) {
  bool same = array.ndim() == wanted.size();
  std::string text = "[";
  size_t i = 0;
  for (size_t size : wanted) {
    same = same && array.shape(i) == size;
    text += (i++ ? ", " : "") + std::to_string(size);
  }
  if (!same) refuse(std::string(where) + ": found shape " + shape_of(array) + ", wanted " + text + "]");
}

Activation activation_named(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "relu2") return Activation::relu2;
  refuse("gate: found activation '" + name + "', wanted silu, gelu_tanh or relu2");
}

// cache u8 [tiles, cache_tile_bytes] of one kv head.
template <typename Cache>
CacheView cache_view(const Cache& cache, const std::string& type_name, int head_width) {
  if (head_width < 2 || head_width % 2)
    refuse("cache: found head width " + std::to_string(head_width) + ", wanted an even one");
  const CacheType type = cache_type_named(type_name);
  if (type == CacheType::q8 && head_width > kMostQ8Width)
    refuse("cache: found head width " + std::to_string(head_width) + ", wanted at most " + std::to_string(kMostQ8Width));
  want_shape("cache", cache, {cache.shape(0), static_cast<size_t>(cache_tile_bytes(type, head_width))});
  // Reading kernels take the same view; they never write through it.
  return {const_cast<uint8_t*>(cache.data()), head_width, type};
}

// The kernels of one level.
class BoundFloatKernels {
 public:
  explicit BoundFloatKernels(const std::string& isa) : kernels_(kernels_named(isa).floats) {}

  nb::object dot(const ArrayIn<float, 2>& x, const ArrayIn<float, 2>& w) const {
    want_shape("dot: w", w, {w.shape(0), x.shape(1)});
    const size_t rows = x.shape(0), outputs = w.shape(0), width = x.shape(1);
    auto y = std::make_unique_for_overwrite<float[]>(rows * outputs);
    for (size_t r = 0; r < rows; ++r)
      for (size_t n = 0; n < outputs; ++n)
        y[r * outputs + n] = kernels_->dot(x.data() + r * width, w.data() + n * width, width);
    return owned_array(std::move(y), {rows, outputs});
  }
  nb::object rms_norm(const ArrayIn<float, 2>& x, const ArrayIn<float, 1>& w, float eps) const {
    want_shape("rms_norm: w", w, {x.shape(1)});
    auto y = std::make_unique<float[]>(x.size());
    const int64_t width = x.shape(1);
    for (size_t r = 0; r < x.shape(0); ++r) {
      const float* row = x.data() + r * width;
      kernels_->rms_scale(row, w.data(), kernels_->rms_factor(row, width, eps), y.get() + r * width, width);
    }
    return owned_array(std::move(y), {x.shape(0), x.shape(1)});
  }

  void rope(const ArrayInOut<float, 2>& x, const ArrayIn<float, 1>& cos, const ArrayIn<float, 1>& sin) const {
    if (x.shape(1) % 2) refuse("rope: found width " + std::to_string(x.shape(1)) + ", wanted an even one");
    want_shape("rope: cos", cos, {x.shape(1) / 2});
    want_shape("rope: sin", sin, {x.shape(1) / 2});
    kernels_->rope(x.data(), cos.data(), sin.data(), static_cast<int>(x.shape(1)), static_cast<int>(x.shape(0)));
  }

  nb::object gate(const ArrayIn<float, 1>& gate, const ArrayIn<float, 1>& up, const std::string& activation) const {
    want_shape("gate: up", up, {gate.shape(0)});
    auto y = std::make_unique<float[]>(gate.size());
    kernels_->gate(gate.data(), up.data(), y.get(), static_cast<int64_t>(gate.size()), activation_named(activation));
    return owned_array(std::move(y), {gate.shape(0)});
  }

  void add(const ArrayIn<float, 1>& x, const ArrayInOut<float, 1>& y) const {
    want_shape("add: y", y, {x.shape(0)});
    kernels_->add(x.data(), y.data(), static_cast<int64_t>(x.size()));
  }
  void scale(const ArrayInOut<float, 1>& x, float s) const { kernels_->scale(x.data(), s, int64_t(x.size())); }
  void softcap(const ArrayInOut<float, 1>& x, float cap) const {
    if (!(cap > 0)) refuse("softcap: found cap " + std::to_string(cap) + ", wanted a positive one");
    kernels_->softcap(x.data(), cap, static_cast<int64_t>(x.size()));
  }

  std::pair<bool, nb::object> block_peaks(const ArrayIn<float, 1>& x) const {
    auto peaks = std::make_unique<float[]>(blocks_of(x));
    const bool finite = kernels_->block_peaks(x.data(), static_cast<int64_t>(x.size()), peaks.get());
    return {finite, owned_array(std::move(peaks), {blocks_of(x)})};
  }
  nb::object masses(const ArrayIn<float, 1>& x, float peak, float inverse_temperature) const {
    auto y = std::make_unique<float[]>(x.size());
    kernels_->masses(x.data(), static_cast<int64_t>(x.size()), peak, inverse_temperature, y.get());
    return owned_array(std::move(y), {x.shape(0)});
  }
  nb::object block_masses(const ArrayIn<float, 1>& x, float peak, float inverse_temperature) const {
    auto sums = std::make_unique<double[]>(blocks_of(x));
    kernels_->block_masses(x.data(), static_cast<int64_t>(x.size()), peak, inverse_temperature, sums.get());
    return owned_array(std::move(sums), {blocks_of(x)});
  }

  nb::object to_f16(const ArrayIn<float, 1>& x) const {
    auto y = std::make_unique<Half[]>(x.size());
    kernels_->to_f16(x.data(), bits(y.get()), static_cast<int64_t>(x.size()));
    return owned_array(std::move(y), {x.shape(0)});
  }
  nb::object from_f16(const ArrayIn<Half, 1>& x) const {
    auto y = std::make_unique<float[]>(x.size());
    kernels_->from_f16(bits(x.data()), y.get(), static_cast<int64_t>(x.size()));
    return owned_array(std::move(y), {x.shape(0)});
  }

  void cache_write(const ArrayInOut<uint8_t, 2>& cache, const ArrayIn<float, 1>& key, const ArrayIn<float, 1>& value,
                   int position, const std::string& cache_type) const {
    const CacheView view = cache_view(cache, cache_type, static_cast<int>(key.shape(0)));
    want_shape("cache_write: value", value, {key.shape(0)});
    want_position(position, cache.shape(0));
    kernels_->cache_write(view, key.data(), value.data(), position);
  }

  nb::object attention(const ArrayIn<uint8_t, 2>& cache, const ArrayIn<float, 2>& query,
                       const ArrayIn<int32_t, 1>& positions, float scale, int window, float softcap,
                       bool by_spans, const std::string& cache_type) const {
    const size_t rows = query.shape(0), width = query.shape(1);
    const CacheView view = cache_view(cache, cache_type, static_cast<int>(width));
    if (rows < 1 || rows > kAttentionRows)
      refuse("attention: found " + std::to_string(rows) + " queries, wanted 1 to " + std::to_string(kAttentionRows));
    want_shape("attention: positions", positions, {rows});
    if (!(scale > 0) || window < 0 || !(softcap >= 0))
      refuse("attention: scale must be positive, window and softcap not negative");
    int64_t offsets[kAttentionRows];
    for (size_t r = 0; r < rows; ++r) {
      want_position(positions.data()[r], cache.shape(0));
      offsets[r] = static_cast<int64_t>(r * width);
    }
    if (by_spans)
      for (size_t r = 1; r < rows; ++r)
        if (positions.data()[r] != positions.data()[0]) refuse("attention: by_spans wants queries at one position");
    auto output = std::make_unique<float[]>(rows * width);
    const AttentionBlock block{query.data(), offsets, positions.data(), static_cast<int>(rows), scale, window, softcap};
    {
      nb::gil_scoped_release release;
      attend(*kernels_, view, block, by_spans, output.get());
    }
    return owned_array(std::move(output), {rows, width});
  }

 private:
  static size_t blocks_of(const ArrayIn<float, 1>& x) { return (x.size() + kPeakBlock - 1) / kPeakBlock; }
  static void want_position(int position, size_t n_tiles) {
    const size_t context = n_tiles * kCacheTile;
    if (position < 0 || static_cast<size_t>(position) >= context)
      refuse("position: found " + std::to_string(position) + ", wanted one below " + std::to_string(context));
  }

  const FloatKernels* kernels_;
};

}  // namespace

CacheType cache_type_named(const std::string& name) {
  if (name == "f16") return CacheType::f16;
  if (name == "q8") return CacheType::q8;
  refuse("cache_type: found '" + name + "', wanted f16 or q8");
}

void bind_float_kernels(nb::module_& m) {
  using Bound = BoundFloatKernels;
  nb::class_<Bound>(m, "float_kernels", "The float kernels of one instruction-set level.")
      .def(nb::init<const std::string&>(), nb::arg("isa"))
      .def("dot", &Bound::dot, nb::arg("x"), nb::arg("w"), "x [M, K], w [N, K] -> x @ w.T [M, N]")
      .def("rms_norm", &Bound::rms_norm, nb::arg("x"), nb::arg("w"), nb::arg("eps"), "x [M, K], w [K] -> y [M, K]")
      .def("rope", &Bound::rope, nb::arg("x").noconvert(), nb::arg("cos"), nb::arg("sin"),
           "x [H, D] in place; cos, sin [D / 2]")
      .def("gate", &Bound::gate, nb::arg("gate"), nb::arg("up"), nb::arg("activation"),
           "activation(gate) * up; silu, gelu_tanh or relu2")
      .def("add", &Bound::add, nb::arg("x"), nb::arg("y").noconvert(), "y += x in place")
      .def("scale", &Bound::scale, nb::arg("x").noconvert(), nb::arg("s"), "x *= s in place")
      .def("softcap", &Bound::softcap, nb::arg("x").noconvert(), nb::arg("cap"), "x = cap * tanh(x / cap) in place")
      .def("block_peaks", &Bound::block_peaks, nb::arg("x"), "x [n] -> whether all are finite, largest of each block")
      .def("masses", &Bound::masses, nb::arg("x"), nb::arg("peak"), nb::arg("inverse_temperature"),
           "x [n] <= peak -> y [n]")
      .def("block_masses", &Bound::block_masses, nb::arg("x"), nb::arg("peak"), nb::arg("inverse_temperature"),
           "x [n] <= peak -> f64, the sum of each block's masses")
      .def("to_f16", &Bound::to_f16, nb::arg("x"), "f32 -> f16, ties to even")
      .def("from_f16", &Bound::from_f16, nb::arg("x"), "f16 -> f32")
      .def("cache_write", &Bound::cache_write, nb::arg("cache").noconvert(), nb::arg("key"), nb::arg("value"),
           nb::arg("position"), nb::arg("cache_type"),
           "cache u8 [tiles, cache_tile_bytes(cache_type, D)] gets one position's key and value f32 [D]")
      .def("attention", &Bound::attention, nb::arg("cache"), nb::arg("query"), nb::arg("positions"), nb::arg("scale"),
           nb::arg("window") = 0, nb::arg("softcap") = 0.0f, nb::arg("by_spans") = false,
           nb::kw_only(), nb::arg("cache_type"),
           "query f32 [M, D] at positions i32 [M], M at most ATTENTION_ROWS -> f32 [M, D]; by_spans: in two steps");
  m.attr("ATTENTION_ROWS") = kAttentionRows;
  m.attr("ATTENTION_SPAN") = kAttentionSpan;
  m.def(
      "cache_tile_bytes",
      [](const std::string& type, int head_width) { return cache_tile_bytes(cache_type_named(type), head_width); },
      nb::arg("cache_type"), nb::arg("head_width"));
}

}  // namespace elute
