// Weights that come from flash while they are used.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <system_error>

#include "bind/bind.h"
#include "weight_stream.h"

namespace elute {
namespace {

using PieceTuple = std::tuple<int, int64_t, int64_t, int64_t>;  // file, offset, n_bytes, at

WeightStream* make_stream(const std::vector<std::string>& paths, const std::vector<PieceTuple>& tuples,
                                          const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& window,
                                          const std::string& reader, int depth, int64_t request_bytes, bool direct) {
  const auto want = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("stream: ") + what);
  };
  const auto aligned = [](int64_t x) { return x >= 0 && x % kFlashAlignment == 0; };
  const auto n_window = static_cast<int64_t>(window.size());
  want(!tuples.empty(), "no pieces");
  want(depth >= 1 && depth <= 1024, "depth: wanted 1 to 1024");
  want(request_bytes > 0 && aligned(request_bytes) && request_bytes <= 1 << 30, "request_bytes: wanted a multiple of 4096");
  want(reinterpret_cast<uintptr_t>(window.data()) % kFlashAlignment == 0, "window: wanted memory aligned to 4096");
  std::vector<WeightStream::Piece> pieces;
  for (const auto& [file, offset, n_bytes, at] : tuples) {
    want(file >= 0 && file < static_cast<int>(paths.size()), "a piece's file does not exist");
    want(aligned(offset) && aligned(at) && aligned(n_bytes) && n_bytes > 0, "a piece is not aligned to 4096");
    want(at <= n_window - n_bytes, "a piece lies beyond the window");
    pieces.push_back({file, offset, n_bytes, at});
  }
  return new WeightStream(paths, std::move(pieces), window.data(), reader, depth, request_bytes, direct);
}

}  // namespace

void bind_flash(nb::module_& m) {
  nb::class_<WeightStream>(m, "WeightStream", "Reads pieces of files into a window, in a cycle, ahead of their use.")
      .def_prop_ro("reader", [](const WeightStream& s) { return std::string(s.reader()); })
      .def_prop_ro("direct", &WeightStream::direct)
      .def_prop_ro("failure", &WeightStream::failure)
      .def("figures",
           [](const WeightStream& s) {
             const auto f = s.figures();
             return std::make_pair(f.read_bytes, f.waited_s);
           },
           "(bytes read so far, seconds that threads waited for them)")
      .def("events",
           [](const WeightStream& s) {
             auto* events = new std::vector<WeightStream::Event>(s.events());
             static_assert(sizeof(WeightStream::Event) == 4 * sizeof(int64_t));
             nb::capsule owner(events, [](void* p) noexcept { delete static_cast<std::vector<WeightStream::Event>*>(p); });
             return nb::ndarray<nb::numpy, int64_t, nb::ndim<2>>(events->data(), {events->size(), 4}, owner);
           },
           "i64 [n, 4]: kind (0 read, 1 wait, 2 release), pass * pieces + piece, start and end in ns of CLOCK_MONOTONIC")
      .def("read_through",
           [](WeightStream& s, int64_t first_pass, int passes) {
             if (first_pass < 0 || passes < 1) throw std::invalid_argument("read_through: wanted passes from 0 on, 1 or more");
             nb::gil_scoped_release release;
             return s.read_through(first_pass, passes);
           },
           nb::arg("first_pass"), nb::arg("passes"),
           "Takes pieces in turn without work on them; seconds a pass. For passes that no executor takes.")
      .def("load",
           [](WeightStream& s) {
             nb::gil_scoped_release release;
             s.wait(0, s.n_pieces());
           },
           "Returns when all pieces were read once, or one could not be: see failure.");
  m.def("open_stream", &make_stream, nb::rv_policy::take_ownership, nb::arg("paths"), nb::arg("pieces"), nb::arg("window"), nb::arg("reader") = "auto",
        nb::arg("depth") = 8, nb::arg("request_bytes") = 1 << 20, nb::arg("direct") = true, nb::keep_alive<0, 3>(),
        "pieces [(file, offset, n_bytes, at)] of paths into window u8 [n], in the order of use");
}

}  // namespace elute
