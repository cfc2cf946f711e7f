// Timings of kernels and of what bounds them, for `elute bench kernels`.
#include "bench.h"

#include "bind/bind.h"
#include "matmul_rows.h"

namespace elute {
namespace {

using HalvesOfCopies = nb::ndarray<nb::ndim<4>, nb::c_contig, nb::device::cpu, nb::ro>;

void check(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}
void check_threads(int n_threads) {
  check(n_threads >= 1 && n_threads <= 512, "n_threads: found " + std::to_string(n_threads) + ", wanted 1 to 512");
}

// The halves of the first copy; dtype and shape are matrix_view's to check.
HalvesIn first_copy(const HalvesOfCopies& halves, size_t n_copies, const char* name) {
  check(halves.shape(0) == n_copies, std::string(name) + ": found " + std::to_string(halves.shape(0)) +
                                         " copies, wanted " + std::to_string(n_copies) + " as of planes");
  return HalvesIn(halves.data(), {halves.shape(1), halves.shape(2), halves.shape(3)}, nb::handle(), {}, halves.dtype());
}

// planes [copies, bytes and padding], scales and offsets [copies, n_panels, n_groups, kPanel].
std::vector<MatrixView> views(const ArrayIn<uint8_t, 2>& planes, const HalvesOfCopies& scales,
                              const std::optional<HalvesOfCopies>& offsets, int n, int k, int bits, int group_size,
                              int zero, const std::string& affine) {
  const size_t n_copies = planes.shape(0);
  check(n_copies >= 1, "planes: found 0 copies, wanted at least 1");
  const HalvesIn first_scales = first_copy(scales, n_copies, "scales");
  std::optional<HalvesIn> first_offsets;
  if (offsets) first_offsets = first_copy(*offsets, n_copies, "offsets");
  const MatrixView first = matrix_view(ArrayIn<uint8_t, 1>(planes.data(), {planes.shape(1)}),
                                       first_scales, first_offsets, n, k, bits, group_size, zero, affine);
  const int64_t halves = int64_t{first.n_panels()} * first.n_groups() * kPanel;
  std::vector<MatrixView> all(n_copies, first);
  for (size_t i = 0; i < n_copies; ++i) {
    all[i].planes += i * planes.shape(1);
    all[i].scales += static_cast<int64_t>(i) * halves;
    if (first.offsets) all[i].offsets += static_cast<int64_t>(i) * halves;
  }
  return all;
}

}  // namespace

void bind_bench(nb::module_& m) {
  m.def(
      "read_gb_s",
      [](const std::string& isa, int n_threads, const ArrayIn<uint8_t, 1>& data, int n_streams) {
        const KernelTable& kernels = kernels_named(isa);
        check_threads(n_threads);
        const int64_t n_bytes = static_cast<int64_t>(data.size()), least = int64_t{n_threads} * kReadRun;
        check(n_bytes >= least && n_bytes <= int64_t{kReadRun} << 30,
              "data: found " + std::to_string(n_bytes) + " bytes, wanted " + std::to_string(least) + " to " +
                  std::to_string(int64_t{kReadRun} << 30));
        check(n_streams >= 1 && n_streams <= kMostStreams, "n_streams: found " + std::to_string(n_streams) +
                                                               ", wanted 1 to " + std::to_string(kMostStreams));
        Read done;
        {
          nb::gil_scoped_release release;
          done = read(kernels, n_threads, data.data(), n_bytes, n_streams);
        }
        return nb::make_tuple(done.gb_s, done.seen);
      },
      nb::arg("isa"), nb::arg("n_threads"), nb::arg("data"), nb::arg("n_streams"),
      "-> (GB/s at which the threads read data u8 [n] once, in n_streams streams each; the or of all its words)");
  m.attr("MOST_STREAMS") = kMostStreams;
  m.def(
      "multiply_gops",
      [](const std::string& isa, int n_threads) {
        const KernelTable& kernels = kernels_named(isa);
        check_threads(n_threads);
        nb::gil_scoped_release release;
        return multiply_gops(kernels, n_threads);
      },
      nb::arg("isa"), nb::arg("n_threads"), "int8 multiplies and adds a nanosecond, all threads together");
  m.def(
      "fma_gflops",
      [](const std::string& isa, int n_threads) {
        const KernelTable& kernels = kernels_named(isa);
        check_threads(n_threads);
        nb::gil_scoped_release release;
        return fma_gflops(kernels, n_threads);
      },
      nb::arg("isa"), nb::arg("n_threads"), "f32 multiplies and adds a nanosecond, all threads together");
  m.def(
      "matmul_seconds",
      [](const std::string& isa, int n_threads, const ArrayIn<float, 2>& x, const ArrayIn<uint8_t, 2>& planes,
         const HalvesOfCopies& scales, const std::optional<HalvesOfCopies>& offsets, int n, int bits, int group_size,
         int zero, const std::string& affine, int repeats, bool lookup) {
        const KernelTable& kernels = kernels_named(isa);
        check_threads(n_threads);
        constexpr size_t kMostRows = 1 << 20;
        check(x.shape(0) >= 1 && x.shape(0) <= kMostRows,
              "x: found " + std::to_string(x.shape(0)) + " rows, wanted 1 to " + std::to_string(kMostRows));
        check(repeats >= 1, "repeats: found " + std::to_string(repeats) + ", wanted at least 1");
        const size_t kMostColumns = 1 << 30;
        check(x.shape(1) <= kMostColumns, "x: found K=" + std::to_string(x.shape(1)) + ", wanted at most " +
                                              std::to_string(kMostColumns));
        const int k = static_cast<int>(x.shape(1)), rows = static_cast<int>(x.shape(0));
        const auto copies = views(planes, scales, offsets, n, k, bits, group_size, zero, affine);
        auto y = std::make_unique<float[]>(int64_t{rows} * n);
        std::vector<double> seconds;
        {
          nb::gil_scoped_release release;
          const Activations activations(kernels, x.data(), rows, k, lookup);
          seconds = matmul_seconds(kernels, n_threads, copies, activations, repeats, y.get());
        }
        const char* kernel = lookup                                        ? "lut_matmul"
                             : multiplies_directly(*kernels.matmul, rows) ? "lut_multiply"
                                                                          : "lut_gemm";
        return nb::make_tuple(seconds, owned_array(std::move(y), {size_t(rows), size_t(n)}), kernel);
      },
      nb::arg("isa"), nb::arg("n_threads"), nb::arg("x"), nb::arg("planes"), nb::arg("scales"),
      nb::arg("offsets").none(), nb::arg("n"), nb::arg("bits"), nb::arg("group_size"), nb::arg("zero"),
      nb::arg("affine"), nb::arg("repeats"), nb::arg("lookup"),
      "-> (seconds of each product, the last y f32 [M, N], the name of the kernel)");
}

}  // namespace elute
