// The shadow kernels: arrays in, arrays out. All of them let other threads run, an NPU's among them.
#include "shadow.h"


#include <algorithm>
#include <cmath>

#include "bind/bind.h"

namespace elute {
namespace {

using AnyMatrix = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;  // its type is checked by hand

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string text_of(int64_t number) { return std::to_string(number); }

const ShadowKernels& shadows_named(const std::string& isa) { return *kernels_named(isa).shadows; }

void want_scale(const char* name, float scale) {
  if (!(scale > 0 && std::isfinite(scale)))
    refuse(std::string(name) + ": found " + std::to_string(scale) + ", wanted a positive number");
}

void want_length(const char* name, int64_t found, int64_t wanted) {
  if (found != wanted) refuse(std::string(name) + ": found " + text_of(found) + " values, wanted " + text_of(wanted));
}

void want_below(const char* name, const ArrayIn<int32_t, 1>& indices, int64_t limit) {
  for (size_t i = 0; i < indices.size(); ++i)
    if (indices.data()[i] < 0 || indices.data()[i] >= limit)
      refuse(std::string(name) + ": found " + text_of(indices.data()[i]) + ", wanted 0 to " + text_of(limit - 1));
}

// Of each output, or one of all.
int scale_step(const ArrayIn<float, 1>& scales, int64_t n) {
  if (scales.size() != 1) want_length("weight_scales", static_cast<int64_t>(scales.size()), n);
  for (size_t i = 0; i < scales.size(); ++i) want_scale("weight_scales", scales.data()[i]);
  return scales.size() == 1 ? 0 : 1;
}

OutlierRows outlier_rows(const ArrayIn<int32_t, 1>& starts, const char* name, const ArrayIn<int32_t, 1>& at,
                         int64_t limit, const ArrayIn<int32_t, 1>& residuals) {
  const auto count = static_cast<int64_t>(at.size());
  want_length("residuals", static_cast<int64_t>(residuals.size()), count);
  const int32_t* begin = starts.data();
  if (starts.size() < 1 || begin[0] != 0 || begin[starts.size() - 1] != count ||
      !std::is_sorted(begin, begin + starts.size()))
    refuse("starts: wanted 0 to " + text_of(count) + ", ascending");
  want_below(name, at, limit);
  return {begin, at.data(), residuals.data(), static_cast<int64_t>(starts.size()) - 1};
}

nb::object split_outliers(const std::string& isa, const ArrayIn<float, 2>& x, float scale) {
  const ShadowKernels& kernels = shadows_named(isa);
  want_scale("scale", scale);
  const size_t rows = x.shape(0), k = x.shape(1);
  if (k && rows > size_t{INT32_MAX} / k) refuse("x: found more than 2^31 values");
  SplitRows split;
  std::unique_ptr<int32_t[]> channels, residuals;
  {
    nb::gil_scoped_release release;
    split = split_rows(kernels, x.data(), rows, k, scale);
    channels = std::make_unique_for_overwrite<int32_t[]>(split.count);
    residuals = std::make_unique_for_overwrite<int32_t[]>(split.count);
    std::copy_n(split.channels.get(), split.count, channels.get());
    std::copy_n(split.residuals.get(), split.count, residuals.get());
  }
  const auto count = static_cast<size_t>(split.count);
  return nb::make_tuple(owned_array(std::move(split.q), {rows, k}), owned_array(std::move(split.starts), {rows + 1}),
                        owned_array(std::move(channels), {count}), owned_array(std::move(residuals), {count}));
}

[[noreturn]] void refuse_weights() { refuse("weights: found one that is not finite; the model is damaged"); }

nb::object weight_columns(const std::string& isa, const ArrayIn<int32_t, 1>& channels,
                          const ArrayIn<float, 1>& weight_scales, const ArrayIn<uint8_t, 1>& planes,
                          const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int k, int bits,
                          int group_size, int zero, const std::string& affine) {
  const ShadowKernels& kernels = shadows_named(isa);
  const MatrixView w = matrix_view(planes, scales, offsets, n, k, bits, group_size, zero, affine, 0);
  want_below("channels", channels, k);
  const int step = scale_step(weight_scales, n);
  auto out = std::make_unique_for_overwrite<int8_t[]>(channels.size() * n);
  bool finite = true;
  {
    nb::gil_scoped_release release;
    for (size_t c = 0; c < channels.size(); ++c)
      finite &= kernels.weight_column(w, channels.data()[c], weight_scales.data(), step, out.get() + c * n);
  }
  if (!finite) refuse_weights();
  return owned_array(std::move(out), {channels.size(), static_cast<size_t>(n)});
}

nb::object weight_columns_of_rows(const std::string& isa, const ArrayIn<uint8_t, 2>& rows,
                                  const ArrayIn<int32_t, 1>& channels, const ArrayIn<float, 1>& weight_scales,
                                  const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int k, int bits,
                                  int group_size, int zero, const std::string& affine, int64_t offset) {
  const ShadowKernels& kernels = shadows_named(isa);
  const MatrixView shared = affine_view(scales, offsets, n, k, bits, group_size, zero, affine);
  const ChannelMatrix w{nullptr, offset, shared.scales, shared.offsets, n, k, bits, group_size, zero, shared.affine};
  want_below("channels", channels, k);
  const int step = scale_step(weight_scales, n);
  const auto width = static_cast<int64_t>(rows.shape(1));
  if (rows.shape(0) != channels.size() || offset < 0 || width < offset || width - offset < w.row_bytes())
    refuse("rows: found [" + text_of(rows.shape(0)) + ", " + text_of(width) + "], wanted " + text_of(channels.size()) +
           " of " + text_of(w.row_bytes()) + " bytes from byte " + text_of(offset));
  auto out = std::make_unique_for_overwrite<int8_t[]>(channels.size() * n);
  bool finite = true;
  {
    nb::gil_scoped_release release;
    for (size_t c = 0; c < channels.size(); ++c)
      finite &= kernels.weight_column_of_row(w, channels.data()[c], rows.data() + c * width + offset,
                                             weight_scales.data(), step, out.get() + c * n);
  }
  if (!finite) refuse_weights();
  return owned_array(std::move(out), {channels.size(), static_cast<size_t>(n)});
}

nb::object weight_rows(const std::string& isa, const ArrayIn<int32_t, 1>& outputs,
                       const ArrayIn<float, 1>& weight_scales, const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales,
                       const std::optional<HalvesIn>& offsets, int n, int k, int bits, int group_size, int zero,
                       const std::string& affine) {
  const ShadowKernels& kernels = shadows_named(isa);
  const MatrixView w = matrix_view(planes, scales, offsets, n, k, bits, group_size, zero, affine, 0);
  want_below("outputs", outputs, n);
  const int step = scale_step(weight_scales, n);
  auto out = std::make_unique_for_overwrite<int8_t[]>(outputs.size() * k);
  bool finite = true;
  {
    nb::gil_scoped_release release;
    const auto row = std::make_unique_for_overwrite<float[]>(k);
    for (size_t r = 0; r < outputs.size(); ++r) {
      const int output = outputs.data()[r];
      dequant_row(w, output, row.get());
      finite &= kernels.quantize_weights(row.get(), k, weight_scales.data()[int64_t{output} * step], out.get() + r * k);
    }
  }
  if (!finite) refuse_weights();
  return owned_array(std::move(out), {outputs.size(), static_cast<size_t>(k)});
}

using ProductOut = nb::ndarray<int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

nb::object product_of_outliers(const std::string& isa, const ArrayIn<int32_t, 1>& starts, const ArrayIn<int32_t, 1>& slots,
                               const ArrayIn<int32_t, 1>& residuals, const ArrayIn<int8_t, 2>& rows, nb::object out) {
  const ShadowKernels& kernels = shadows_named(isa);
  const OutlierRows outliers = outlier_rows(starts, "slots", slots, rows.shape(0), residuals);
  const size_t m = outliers.n_rows, n = rows.shape(1);
  ProductOut given;
  if (!out.is_none()) {
    if (!nb::try_cast(out, given, false) || given.shape(0) != m || given.shape(1) != n)
      refuse("out: wanted i32 [" + text_of(m) + ", " + text_of(n) + "], contiguous");
  }
  if (!product_fits_int32(outliers)) {
    auto wide = std::make_unique_for_overwrite<int64_t[]>(m * n);
    {
      nb::gil_scoped_release release;
      shadow_product(kernels, outliers, rows.data(), n, wide.get());
    }
    return owned_array(std::move(wide), {m, n});
  }
  std::unique_ptr<int32_t[]> own;
  if (out.is_none()) own = std::make_unique_for_overwrite<int32_t[]>(m * n);
  {
    nb::gil_scoped_release release;
    shadow_product(kernels, outliers, rows.data(), n, own ? own.get() : given.data());
  }
  return own ? owned_array(std::move(own), {m, n}) : out;
}

nb::object saturated_products(const std::string& isa, const ArrayIn<int8_t, 2>& q, const ArrayIn<int32_t, 1>& starts,
                              const ArrayIn<int32_t, 1>& channels, const ArrayIn<int32_t, 1>& residuals,
                              const ArrayIn<int8_t, 2>& rows, const ArrayIn<int32_t, 1>& at_rows,
                              const ArrayIn<int32_t, 1>& at_slots) {
  const ShadowKernels& kernels = shadows_named(isa);
  const auto k = static_cast<int64_t>(q.shape(1));
  const OutlierRows outliers = outlier_rows(starts, "channels", channels, k, residuals);
  want_length("starts", outliers.n_rows + 1, static_cast<int64_t>(q.shape(0)) + 1);
  want_length("rows", static_cast<int64_t>(rows.shape(1)), k);
  want_length("at_slots", static_cast<int64_t>(at_slots.size()), static_cast<int64_t>(at_rows.size()));
  want_below("at_rows", at_rows, q.shape(0));
  want_below("at_slots", at_slots, rows.shape(0));
  auto out = std::make_unique_for_overwrite<int64_t[]>(at_rows.size());
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < at_rows.size(); ++i) {
      const int64_t row = at_rows.data()[i], slot = at_slots.data()[i];
      const int32_t first = outliers.starts[row];
      out[i] = kernels.full_product(q.data() + row * k, rows.data() + slot * k, k, outliers.at + first,
                                    outliers.residuals + first, outliers.starts[row + 1] - first);
    }
  }
  return owned_array(std::move(out), {at_rows.size()});
}

bool is_type(const AnyMatrix& array, nb::dlpack::dtype_code code, int bits) {
  return array.dtype().code == static_cast<uint8_t>(code) && array.dtype().bits == bits && array.dtype().lanes == 1;
}

void want_same_shape(const char* name, const AnyMatrix& array, size_t m, size_t n) {
  if (array.shape(0) != m || array.shape(1) != n)
    refuse(std::string(name) + ": found [" + text_of(array.shape(0)) + ", " + text_of(array.shape(1)) + "], wanted [" +
           text_of(m) + ", " + text_of(n) + "]");
}

void finish_product(const std::string& isa, const AnyMatrix& result, const std::optional<AnyMatrix>& shadow,
                    const ArrayIn<float, 1>& scales, const std::optional<ArrayIn<float, 1>>& bias,
                    const nb::ndarray<float, nb::ndim<2>, nb::device::cpu>& y, float output_scale) {
  using Code = nb::dlpack::dtype_code;
  const ShadowKernels& kernels = shadows_named(isa);
  const size_t m = result.shape(0), n = result.shape(1);
  FinishedRow row{};
  int64_t result_bytes = 4;
  if (is_type(result, Code::Int, 32)) row.type = DeviceOutput::int32;
  else if (is_type(result, Code::Float, 32)) row.type = DeviceOutput::float32;
  else if (is_type(result, Code::Int, 8)) row.type = DeviceOutput::int8, result_bytes = 1;
  else refuse("result: wanted int32, int8 or float32");
  if (row.type == DeviceOutput::int8) want_scale("output_scale", output_scale);
  row.output_scale = output_scale;
  if (shadow) {
    if (!is_type(*shadow, Code::Int, 32) && !is_type(*shadow, Code::Int, 64)) refuse("shadow: wanted int32 or int64");
    want_same_shape("shadow", *shadow, m, n);
  }
  if (y.shape(0) != m || y.shape(1) != n || (n > 1 && y.stride(1) != 1) ||
      (m > 1 && y.stride(0) < static_cast<int64_t>(n)))
    refuse("y: wanted f32 [" + text_of(m) + ", " + text_of(n) + "] of contiguous rows");
  if (scales.size() != 1) want_length("scales", static_cast<int64_t>(scales.size()), n);
  if (bias) want_length("bias", static_cast<int64_t>(bias->size()), n);
  nb::gil_scoped_release release;
  std::vector<float> repeated;
  if (scales.size() == 1 && n != 1) repeated.assign(n, scales.data()[0]);
  row.scales = repeated.empty() ? scales.data() : repeated.data();
  row.bias = bias ? bias->data() : nullptr;
  row.n = static_cast<int64_t>(n);
  for (size_t r = 0; r < m; ++r) {
    row.result = static_cast<const uint8_t*>(result.data()) + int64_t(r) * row.n * result_bytes;
    if (shadow && is_type(*shadow, Code::Int, 32)) row.shadow = static_cast<const int32_t*>(shadow->data()) + r * n;
    else if (shadow) row.wide_shadow = static_cast<const int64_t*>(shadow->data()) + r * n;
    row.y = y.data() + int64_t(r) * y.stride(0);
    kernels.finish(row);
  }
}

}  // namespace

void bind_shadow(nb::module_& m) {
  m.def("split_outliers", split_outliers, nb::arg("isa"), nb::arg("x"), nb::arg("scale"),
        "x f32 [M, K] -> q i8 [M, K], starts i32 [M + 1], channels i32, residuals i32: clip(round(x / scale)) and what "
        "was clipped, channels ascending within a row. ValueError where x is not finite or beyond 2^24 steps.");
  m.def("weight_columns", weight_columns, nb::arg("isa"), nb::arg("channels"), nb::arg("weight_scales"), nb::arg("planes"),
        nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"), nb::arg("k"), nb::arg("bits"), nb::arg("group_size"),
        nb::arg("zero"), nb::arg("affine"), "-> i8 [C, N], rows of Wq.T for stored columns; padding unseen");
  m.def("weight_columns_of_rows", weight_columns_of_rows, nb::arg("isa"), nb::arg("rows"), nb::arg("channels"),
        nb::arg("weight_scales"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"), nb::arg("k"), nb::arg("bits"),
        nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"), nb::arg("offset") = 0,
        "The same from rows u8 [C, bytes] in channel order, of the matrix from byte `offset` of each.");
  m.def("weight_rows", weight_rows, nb::arg("isa"), nb::arg("outputs"), nb::arg("weight_scales"), nb::arg("planes"),
        nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"), nb::arg("k"), nb::arg("bits"), nb::arg("group_size"),
        nb::arg("zero"), nb::arg("affine"), "-> i8 [R, K], rows of Wq, stored column order; padding unseen");
  m.def("shadow_product", product_of_outliers, nb::arg("isa"), nb::arg("starts"), nb::arg("slots"), nb::arg("residuals"),
        nb::arg("rows"), nb::arg("out").none() = nb::none(),
        "-> i32 [M, N], in `out` where it is given; a new i64 one where a sum may not fit. rows i8 [C, N].");
  m.def("saturated_products", saturated_products, nb::arg("isa"), nb::arg("q"), nb::arg("starts"), nb::arg("channels"),
        nb::arg("residuals"), nb::arg("rows"), nb::arg("at_rows"), nb::arg("at_slots"),
        "-> i64: (q + residuals)[at_rows[i]] . rows[at_slots[i]]");
  m.def("finish_product", finish_product, nb::arg("isa"), nb::arg("result"), nb::arg("shadow").none(), nb::arg("scales"),
        nb::arg("bias").none(), nb::arg("y").noconvert(), nb::arg("output_scale") = 0.0f,
        "y f32 [M, N], rows strided, of a device's result i32, i8 or f32 and the shadow's i32 or i64");
}

}  // namespace elute
