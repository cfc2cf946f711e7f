// The float kernels one by one, for tests and benchmarks. Results are new arrays, but for rope, add, scale, softcap and
// cache_write, which change the argument their contract (kernels/float_kernels.h) changes.
#include "bind/bind.h"

#include <nanobind/stl/pair.h>

#include <cstdlib>
#include <cstring>

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

// keys [tiles, D, kCacheTile], values [tiles * kCacheTile, D] of one kv head.
template <typename Keys, typename Values>
CacheView cache_view(const Keys& keys, const Values& values) {
  const size_t width = keys.shape(1);
  if (width < 2 || width % 2) refuse("keys: found head width " + std::to_string(width) + ", wanted an even one");
  want_shape("keys", keys, {keys.shape(0), width, size_t{kCacheTile}});
  want_shape("values", values, {keys.shape(0) * kCacheTile, width});
  // Reading kernels take the same view; they never write through it.
  return {const_cast<uint16_t*>(bits(keys.data())), const_cast<uint16_t*>(bits(values.data())),
          static_cast<int>(width)};
}

// The kernels of one level.
class BoundFloatKernels {
 public:
  explicit BoundFloatKernels(const std::string& isa) : kernels_(kernels_named(isa).floats) {}

  nb::object rms_norm(const ArrayIn<float, 2>& x, const ArrayIn<float, 1>& w, float eps) const {
    want_shape("rms_norm: w", w, {x.shape(1)});
    auto y = std::make_unique<float[]>(x.size());
    kernels_->rms_norm(x.data(), w.data(), y.get(), static_cast<int>(x.shape(1)), static_cast<int>(x.shape(0)), eps);
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

  void cache_write(const ArrayInOut<Half, 3>& keys, const ArrayInOut<Half, 2>& values, const ArrayIn<float, 1>& key,
                   const ArrayIn<float, 1>& value, int position) const {
    const CacheView cache = cache_view(keys, values);
    want_shape("cache_write: key", key, {keys.shape(1)});
    want_shape("cache_write: value", value, {keys.shape(1)});
    want_position(position, values.shape(0));
    kernels_->cache_write(cache, key.data(), value.data(), position);
  }

  nb::object attention(const ArrayIn<Half, 3>& keys, const ArrayIn<Half, 2>& values, const ArrayIn<float, 2>& query,
                       const ArrayIn<int32_t, 1>& positions, float scale, int window, float softcap) const {
    const CacheView cache = cache_view(keys, values);
    const size_t rows = query.shape(0), width = keys.shape(1);
    if (rows < 1 || rows > kAttentionRows)
      refuse("attention: found " + std::to_string(rows) + " queries, wanted 1 to " + std::to_string(kAttentionRows));
    want_shape("attention: query", query, {rows, width});
    want_shape("attention: positions", positions, {rows});
    if (window < 0 || !(softcap >= 0)) refuse("attention: window and softcap must not be negative");
    int64_t offsets[kAttentionRows];
    for (size_t r = 0; r < rows; ++r) {
      want_position(positions.data()[r], values.shape(0));
      offsets[r] = static_cast<int64_t>(r * width);
    }
    auto output = std::make_unique<float[]>(rows * width);
    const AttentionBlock block{query.data(), output.get(), offsets, offsets, positions.data(), static_cast<int>(rows),
                               scale,        window,       softcap};
    const size_t bytes = (attention_scratch_bytes(cache.head_width) + 63) / 64 * 64;
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
    if (!scratch) throw std::bad_alloc();
    std::memset(scratch.get(), 0xff, bytes);  // NaNs: a kernel that reads what it did not write is seen
    {
      nb::gil_scoped_release release;
      kernels_->attention(cache, block, scratch.get());
    }
    return owned_array(std::move(output), {rows, width});
  }

 private:
  static size_t blocks_of(const ArrayIn<float, 1>& x) { return (x.size() + kPeakBlock - 1) / kPeakBlock; }
  static void want_position(int position, size_t context) {
    if (position < 0 || static_cast<size_t>(position) >= context)
      refuse("position: found " + std::to_string(position) + ", wanted one below " + std::to_string(context));
  }

  const FloatKernels* kernels_;
};

}  // namespace

void bind_float_kernels(nb::module_& m) {
  using Bound = BoundFloatKernels;
  nb::class_<Bound>(m, "float_kernels", "The float kernels of one instruction-set level.")
      .def(nb::init<const std::string&>(), nb::arg("isa"))
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
      .def("cache_write", &Bound::cache_write, nb::arg("keys").noconvert(), nb::arg("values").noconvert(),
           nb::arg("key"), nb::arg("value"), nb::arg("position"),
           "keys f16 [context / 64, D, 64] and values f16 [context, D] get one position in place")
      .def("attention", &Bound::attention, nb::arg("keys"), nb::arg("values"), nb::arg("query"), nb::arg("positions"),
           nb::arg("scale"), nb::arg("window") = 0, nb::arg("softcap") = 0.0f,
           "query f32 [M, D] at positions i32 [M], M at most 64 -> f32 [M, D]");
}

}  // namespace elute
