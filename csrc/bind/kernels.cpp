// The matmul kernels one by one, for tests and benchmarks: arrays in, arrays out.
#include "bind/bind.h"

#include <algorithm>
#include <cstring>

#include "activations.h"
#include "channel_mask.h"
#include "kernel_race.h"
#include "matmul_rows.h"

namespace elute {

// Without its planes.
MatrixView affine_view(const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int k, int bits,
                              int group_size, int zero, const std::string& affine) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument("matrix: " + what); };
  if (bits < 1 || bits > 8) refuse("bits=" + std::to_string(bits) + ", wanted 1 to 8");
  if (zero < 0 || zero > 255) refuse("zero=" + std::to_string(zero) + ", wanted 0 to 255");
  constexpr int kMostSide = 1 << 30;  // rounds up to whole panels and blocks within an int
  if (n < 1 || n > kMostSide || k < kLutWidth || k > kMostSide || k % kLutWidth)
    refuse("shape [" + std::to_string(n) + ", " + std::to_string(k) + "]");
  const bool groups_fit = group_size == k || (group_size >= kSumRun && k % group_size == 0 &&
                                              (kActBlock % group_size == 0 || group_size % kActBlock == 0));
  if (!groups_fit) refuse("group_size=" + std::to_string(group_size) + " does not fit K=" + std::to_string(k));
  MatrixView view{nullptr, nullptr, nullptr, n, k, bits, group_size, zero, Affine::symmetric};
  if (affine == "zero") view.affine = Affine::zero;
  else if (affine == "min") view.affine = Affine::min;
  else if (affine != "symmetric") refuse("affine '" + affine + "'");
  const auto halves = [&](const HalvesIn& a, const char* name) {
    if (a.dtype().code != static_cast<uint8_t>(nb::dlpack::dtype_code::Float) || a.dtype().bits != 16)
      refuse(std::string(name) + " are not float16");
    if (static_cast<int>(a.shape(0)) != view.n_panels() || static_cast<int>(a.shape(1)) != view.n_groups() ||
        a.shape(2) != kPanel)
      refuse(std::string(name) + " have the wrong shape");
    return static_cast<const uint16_t*>(a.data());
  };
  view.scales = halves(scales, "scales");
  if (view.affine != Affine::symmetric) {
    if (!offsets) refuse("offsets are missing");
    view.offsets = halves(*offsets, "offsets");
  }
  return view;
}

MatrixView matrix_view(const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales, const std::optional<HalvesIn>& offsets,
                       int n, int k, int bits, int group_size, int zero, const std::string& affine, int padding) {
  MatrixView view = affine_view(scales, offsets, n, k, bits, group_size, zero, affine);
  const int64_t wanted = view.n_panels() * view.panel_bytes() + padding;
  if (static_cast<int64_t>(planes.size()) < wanted)
    throw std::invalid_argument("matrix: planes hold " + std::to_string(planes.size()) + " bytes, wanted " +
                                std::to_string(wanted) + (padding ? " with padding" : ""));
  view.planes = planes.data();
  return view;
}

namespace {

// A matrix in channel order whose rows u8 [k, bytes] lie one behind the other, with every size checked.
struct ChannelRows {
  std::vector<const uint8_t*> rows;
  ChannelMatrix view;

  ChannelRows(const ArrayIn<uint8_t, 2>& bytes, const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int k,
              int bits, int group_size, int zero, const std::string& affine, int64_t offset) {
    const MatrixView shared = affine_view(scales, offsets, n, k, bits, group_size, zero, affine);
    view = {nullptr, offset, shared.scales, shared.offsets, n, k, bits, group_size, zero, shared.affine};
    const auto width = static_cast<int64_t>(bytes.shape(1));
    if (static_cast<int64_t>(bytes.shape(0)) != k || offset < 0 || width < offset || width - offset < view.row_bytes())
      throw std::invalid_argument("rows: found [" + std::to_string(bytes.shape(0)) + ", " + std::to_string(width) +
                                  "], wanted " + std::to_string(k) + " of " + std::to_string(view.row_bytes()) +
                                  " bytes from byte " + std::to_string(offset));
    for (int channel = 0; channel < k; ++channel) rows.push_back(bytes.data() + channel * width);
    view.rows = rows.data();
  }
};

template <typename T, typename D>
nb::object copied(const std::unique_ptr<T[], D>& data, std::initializer_list<size_t> shape) {
  size_t count = 1;
  for (size_t s : shape) count *= s;
  auto copy = std::make_unique<T[]>(count);
  std::memcpy(copy.get(), data.get(), count * sizeof(T));
  return owned_array(std::move(copy), shape);
}

}  // namespace

void bind_kernels(nb::module_& m) {
  m.def(
      "quantize_activations",
      [](const std::string& isa, const ArrayIn<float, 2>& x) {
        const Activations a(kernels_named(isa), x.data(), static_cast<int>(x.shape(0)),
                            static_cast<int>(x.shape(1)), true);
        const size_t rows = a.rows, blocks = a.blocks, runs = blocks * (kActBlock / kSumRun);
        return nb::make_tuple(copied(a.q, {rows, blocks * kActBlock}), copied(a.scales, {rows, blocks}),
                              copied(a.sums, {rows, runs}),
                              copied(a.tables, {rows, blocks * kBlockQuads, size_t{kTableBytes}}),
                              copied(a.lows, {rows, runs}));
      },
      nb::arg("isa"), nb::arg("x"), "x f32 [M, K] -> (q, scales, sums of 16, tables, lows of 16)");

  m.def(
      "lut_matmul",
      [](const std::string& isa, const ArrayIn<float, 2>& x, const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales,
         const std::optional<HalvesIn>& offsets, int n, int bits, int group_size, int zero, const std::string& affine,
         const std::optional<ArrayIn<float, 1>>& bias, bool lookup, bool direct) {
        const KernelTable& kernels = kernels_named(isa);
        const int k = static_cast<int>(x.shape(1)), rows = static_cast<int>(x.shape(0));
        const MatrixView w = matrix_view(planes, scales, offsets, n, k, bits, group_size, zero, affine);
        if (direct && !kernels.matmul->lut_multiply)
          throw std::invalid_argument("direct: level " + isa + " has no such kernel");
        if (bias && static_cast<int>(bias->shape(0)) != n) throw std::invalid_argument("bias: wanted [N]");
        auto y = std::make_unique<float[]>(int64_t{rows} * n);
        {
          nb::gil_scoped_release release;
          const Activations a(kernels, x.data(), rows, k, lookup);
          const float* b = bias ? bias->data() : nullptr;
          const Range all{0, w.n_panels()};
          if (lookup) {
            matmul_by_lookup(*kernels.matmul, w, a.view, rows, all, b, y.get(), n);
          } else if (direct) {
            kernels.matmul->lut_multiply(w, a.view, rows, all.begin, all.end, b, y.get(), n);
          } else {
            auto scratch = aligned<uint8_t>(gemm_scratch_bytes(rows));
            kernels.matmul->lut_gemm(w, a.view, rows, all.begin, all.end, b, y.get(), n, scratch.get());
          }
        }
        return owned_array(std::move(y), {static_cast<size_t>(rows), static_cast<size_t>(n)});
      },
      nb::arg("isa"), nb::arg("x"), nb::arg("planes"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"),
      nb::arg("bits"), nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"), nb::arg("bias").none() = nb::none(),
      nb::arg("lookup") = true, nb::arg("direct") = false,
      "y f32 [M, N] = x @ w.T by lookup, or with lookup=False by multiply, codes unpacked in scratch or with direct=True "
      "in registers; the same bits.");
  m.def(
      "channel_matmul",
      [](const std::string& isa, const ArrayIn<float, 2>& x, const ArrayIn<uint64_t, 1>& active,
         const ArrayIn<uint8_t, 2>& rows, const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int bits,
         int group_size, int zero, const std::string& affine, int64_t offset, const std::optional<ArrayIn<float, 1>>& bias) {
        const KernelTable& kernels = kernels_named(isa);
        const int k = static_cast<int>(x.shape(1)), n_rows = static_cast<int>(x.shape(0));
        const ChannelRows w(rows, scales, offsets, n, k, bits, group_size, zero, affine, offset);
        if (static_cast<int64_t>(active.shape(0)) < (int64_t{k} + kActBlock - 1) / kActBlock)
          throw std::invalid_argument("active: wanted a word for 64 channels");
        if (bias && static_cast<int>(bias->shape(0)) != n) throw std::invalid_argument("bias: wanted [N]");
        auto y = std::make_unique<float[]>(int64_t{n_rows} * n);
        {
          nb::gil_scoped_release release;
          const Activations a(kernels, x.data(), n_rows, k, false);
          for (int r = 0; r < n_rows; ++r)
            kernels.matmul->channel_matmul(w.view, a.view.from_row(r), active.data(), 0, w.view.n_tiles(),
                                           bias ? bias->data() : nullptr, y.get() + int64_t{r} * n);
        }
        return owned_array(std::move(y), {static_cast<size_t>(n_rows), static_cast<size_t>(n)});
      },
      nb::arg("isa"), nb::arg("x"), nb::arg("active"), nb::arg("rows"), nb::arg("scales"), nb::arg("offsets").none(),
      nb::arg("n"), nb::arg("bits"), nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"), nb::arg("offset") = 0,
      nb::arg("bias").none() = nb::none(),
      "y f32 [M, N] = x @ w.T over the channels whose bit is set in active u64 [K / 64]; x of the others is 0. "
      "rows u8 [K, bytes]: w in channel order, from byte `offset` of each.");
  m.def(
      "channel_gemm",
      [](const std::string& isa, const ArrayIn<float, 2>& x, const ArrayIn<uint8_t, 2>& rows, const HalvesIn& scales,
         const std::optional<HalvesIn>& offsets, int n, int bits, int group_size, int zero, const std::string& affine,
         int64_t offset, const std::optional<ArrayIn<float, 1>>& bias) {
        const KernelTable& kernels = kernels_named(isa);
        const int k = static_cast<int>(x.shape(1)), n_rows = static_cast<int>(x.shape(0));
        const ChannelRows w(rows, scales, offsets, n, k, bits, group_size, zero, affine, offset);
        if (bias && static_cast<int>(bias->shape(0)) != n) throw std::invalid_argument("bias: wanted [N]");
        auto y = std::make_unique<float[]>(int64_t{n_rows} * n);
        {
          nb::gil_scoped_release release;
          const Activations a(kernels, x.data(), n_rows, k, false);
          auto scratch = aligned<uint8_t>(channel_gemm_scratch_bytes(n_rows));
          kernels.matmul->channel_gemm(w.view, a.view, n_rows, 0, w.view.n_tiles(), bias ? bias->data() : nullptr, y.get(),
                                       n, scratch.get());
        }
        return owned_array(std::move(y), {static_cast<size_t>(n_rows), static_cast<size_t>(n)});
      },
      nb::arg("isa"), nb::arg("x"), nb::arg("rows"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"),
      nb::arg("bits"), nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"), nb::arg("offset") = 0,
      nb::arg("bias").none() = nb::none(), "y f32 [M, N] = x @ w.T of all channels; rows as in channel_matmul.");
  m.def(
      "multiplies_directly", [](const std::string& isa) { return kernels_named(isa).matmul->lut_multiply != nullptr; },
      nb::arg("isa"), "whether the level has a kernel that multiplies few rows without scratch");

  m.def(
      "race_seconds",
      [](const std::string& isa, int bits, const std::vector<int>& rows, double budget_s) {
        const KernelTable& kernels = kernels_named(isa);
        if (bits < 1 || bits > 8 || rows.empty() || *std::min_element(rows.begin(), rows.end()) < 1 ||
            *std::max_element(rows.begin(), rows.end()) > 1024)
          throw std::invalid_argument("race_seconds: wanted bits of 1 to 8, rows of 1 to 1024");
        std::vector<double> seconds;
        {
          nb::gil_scoped_release release;
          seconds = race_seconds(kernels, bits, rows, budget_s);
        }
        auto out = std::make_unique<double[]>(seconds.size());
        std::copy(seconds.begin(), seconds.end(), out.get());
        return owned_array(std::move(out), {seconds.size() / rows.size() / 2, rows.size(), size_t{2}});
      },
      nb::arg("isa"), nb::arg("bits"), nb::arg("rows"), nb::arg("budget_s"),
      "-> seconds f64 [rounds, rows, 2] of lookup and multiply on one thread, in turns; see kernel_race.h");
  m.def(
      "lut_dequant",
      [](const std::string& isa, const ArrayIn<uint8_t, 1>& planes, int n, int k, int bits) {
        const KernelTable& kernels = kernels_named(isa);
        if (bits < 1 || bits > 8 || n < 1 || k < kLutWidth || k % kLutWidth)
          throw std::invalid_argument("lut_dequant: bad shape or bits");
        const MatrixView w{planes.data(), nullptr, nullptr, n, k, bits, k, 0, Affine::symmetric};
        if (static_cast<int64_t>(planes.size()) < w.n_panels() * w.panel_bytes() + kPlanesPadding)
          throw std::invalid_argument("lut_dequant: planes are too short");
        auto codes = std::make_unique<uint8_t[]>(int64_t{n} * k);
        auto panel_codes = aligned<uint8_t>(panel_codes_bytes(k));
        for (int panel = 0; panel < w.n_panels(); ++panel) {
          kernels.matmul->lut_dequant(w, panel, panel_codes.get());
          for (int i = 0; i < kPanel && panel * kPanel + i < n; ++i)
            for (int column = 0; column < k; ++column)
              codes[(int64_t{panel} * kPanel + i) * k + column] =
                  panel_codes[(int64_t{column / kLutWidth} * kPanel + i) * kLutWidth + column % kLutWidth];
        }
        return owned_array(std::move(codes), {static_cast<size_t>(n), static_cast<size_t>(k)});
      },
      nb::arg("isa"), nb::arg("planes"), nb::arg("n"), nb::arg("k"), nb::arg("bits"), "-> codes u8 [N, K]");

  m.def(
      "dequant_rows",
      [](const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales, const std::optional<HalvesIn>& offsets, int n, int k,
         int bits, int group_size, int zero, const std::string& affine) {
        const MatrixView w = matrix_view(planes, scales, offsets, n, k, bits, group_size, zero, affine);
        auto out = std::make_unique<float[]>(int64_t{n} * k);
        for (int row = 0; row < n; ++row) dequant_row(w, row, out.get() + int64_t{row} * k);
        return owned_array(std::move(out), {static_cast<size_t>(n), static_cast<size_t>(k)});
      },
      nb::arg("planes"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"), nb::arg("k"), nb::arg("bits"),
      nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"), "-> w f32 [N, K], stored column order");

  m.def(
      "column_squares",
      [](const std::string& isa, const ArrayIn<uint8_t, 1>& planes, const HalvesIn& scales,
         const std::optional<HalvesIn>& offsets, int n, int k, int bits, int group_size, int zero,
         const std::string& affine) {
        const MatrixView w = matrix_view(planes, scales, offsets, n, k, bits, group_size, zero, affine, 0);
        auto squares = std::make_unique<double[]>(k);
        {
          nb::gil_scoped_release release;
          const auto codes = aligned<uint8_t>(panel_codes_bytes(k));
          column_squares(*kernels_named(isa).matmul, w, codes.get(), squares.get());
        }
        return owned_array(std::move(squares), {static_cast<size_t>(k)});
      },
      nb::arg("isa"), nb::arg("planes"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("n"), nb::arg("k"),
      nb::arg("bits"), nb::arg("group_size"), nb::arg("zero"), nb::arg("affine"),
      "-> f64 [K], the sum of w[n, k]^2 over n, stored column order; of a WeightSource's arrays, padding unseen");
}

}  // namespace elute
