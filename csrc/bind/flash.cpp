// Weights that come from flash while they are used.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <system_error>

#include "bind/bind.h"
#include "crc32c.h"
#include "flash_fetcher.h"
#include "page_check.h"
#include "read_timing.h"
#include "weight_stream.h"

namespace elute {
namespace {

using PieceTuple = std::tuple<int, int64_t, int64_t, int64_t>;  // file, offset, n_bytes, at

using SumsIn = ArrayIn<uint32_t, 1>;

void want(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("flash: ") + what);
}
bool aligned(int64_t x) { return x >= 0 && x % kFlashAlignment == 0; }
void check_requests(int depth, int64_t request_bytes) {
  want(depth >= 1 && depth <= 1024, "depth: wanted 1 to 1024");
  want(request_bytes > 0 && aligned(request_bytes) && request_bytes <= 1 << 30, "request_bytes: wanted a multiple of 4096");
}

WeightStream* make_stream(const std::vector<std::string>& paths, const std::vector<PieceTuple>& tuples,
                          const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& window,
                          const std::string& reader, int depth, int64_t request_bytes, bool direct,
                          const std::optional<SumsIn>& sums, const std::vector<int64_t>& first_page) {
  const auto n_window = static_cast<int64_t>(window.size());
  want(!tuples.empty(), "no pieces");
  check_requests(depth, request_bytes);
  want(reinterpret_cast<uintptr_t>(window.data()) % kFlashAlignment == 0, "window: wanted memory aligned to 4096");
  want(!sums || first_page.size() == paths.size(), "first_page: wanted one of each path");
  std::vector<WeightStream::Piece> pieces;
  for (const auto& [file, offset, n_bytes, at] : tuples) {
    want(file >= 0 && file < static_cast<int>(paths.size()), "a piece's file does not exist");
    want(aligned(offset) && aligned(at) && aligned(n_bytes) && n_bytes > 0, "a piece is not aligned to 4096");
    want(at <= n_window - n_bytes, "a piece lies beyond the window");
    if (sums) {
      const int64_t first = first_page[file], end = (offset + n_bytes) / kSummedPage, n = static_cast<int64_t>(sums->size());
      want(first >= 0 && first <= n && end <= n - first, "a piece has no sums");
    }
    pieces.push_back({file, offset, n_bytes, at});
  }
  return new WeightStream(paths, std::move(pieces), window.data(), reader, depth, request_bytes, direct,
                          {sums ? sums->data() : nullptr, first_page});
}

// What a fetch writes to stays until it has ended.
struct BoundFetch {
  BoundFetch(std::shared_ptr<FlashFetcher::Fetch> f, nb::object m) : fetch(std::move(f)), memory(std::move(m)) {}
  BoundFetch(BoundFetch&&) noexcept = default;
  ~BoundFetch() {
    if (fetch) fetch->wait();
  }
  std::shared_ptr<FlashFetcher::Fetch> fetch;
  nb::object memory;
};

class BoundFetcher {
 public:
  BoundFetcher(const std::vector<std::string>& paths, const std::string& reader, int depth, int64_t request_bytes, bool direct,
               const std::optional<SumsIn>& sums, const std::vector<int64_t>& first_page)
      : n_files_(static_cast<int>(paths.size())),
        n_sums_(sums ? static_cast<int64_t>(sums->size()) : -1),
        first_page_(first_page) {
    check_requests(depth, request_bytes);
    want(!sums || first_page.size() == paths.size(), "first_page: wanted one of each path");
    fetcher = std::make_unique<FlashFetcher>(paths, reader, depth, request_bytes, direct,
                                             FlashFetcher::Sums{sums ? sums->data() : nullptr, first_page});
  }
  BoundFetch begin(const std::vector<PieceTuple>& tuples, nb::object memory) {
    const auto array = nb::cast<nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>>(memory);
    const auto n_memory = static_cast<int64_t>(array.size());
    want(reinterpret_cast<uintptr_t>(array.data()) % kFlashAlignment == 0, "memory: wanted it aligned to 4096");
    std::vector<FlashFetcher::Piece> pieces;
    for (const auto& [file, offset, n_bytes, at] : tuples) {
      want(file >= 0 && file < n_files_, "a piece's file does not exist");
      want(aligned(offset) && aligned(at) && aligned(n_bytes) && n_bytes > 0, "a piece is not aligned to 4096");
      want(at <= n_memory - n_bytes, "a piece lies beyond the memory");
      want(n_sums_ < 0 || first_page_[file] + (offset + n_bytes) / kSummedPage <= n_sums_, "a piece has no sums");
      pieces.push_back({file, offset, n_bytes, array.data() + at});
    }
    return {fetcher->begin(pieces), std::move(memory)};
  }
  std::unique_ptr<FlashFetcher> fetcher;

 private:
  const int n_files_;
  const int64_t n_sums_;  // -1: none
  const std::vector<int64_t> first_page_;
};

void bind_fetcher(nb::module_& m) {
  nb::class_<BoundFetch>(m, "Fetch", "Pieces that were asked for at once; when it is gone nothing writes to their memory.")
      .def("wait",
           [](BoundFetch& f) {
             std::string failure;
             {
               nb::gil_scoped_release release;
               failure = f.fetch->wait();
             }
             if (!failure.empty()) throw std::runtime_error(failure);
           },
           "Returns when all of them are there; RuntimeError when one cannot be read.");
  nb::class_<BoundFetcher>(m, "Fetcher", "Reads pieces of files when somebody asks for them, while he goes on.")
      .def(nb::init<const std::vector<std::string>&, const std::string&, int, int64_t, bool, const std::optional<SumsIn>&,
                    const std::vector<int64_t>&>(),
           nb::arg("paths"), nb::arg("reader"), nb::arg("depth"), nb::arg("request_bytes"), nb::arg("direct") = true,
           nb::arg("sums").noconvert().none() = nb::none(), nb::arg("first_page") = std::vector<int64_t>(),
           nb::keep_alive<1, 7>(), "sums, first_page: as of open_stream")
      .def_prop_ro("reader", [](const BoundFetcher& f) { return std::string(f.fetcher->reader()); })
      .def_prop_ro("direct", [](const BoundFetcher& f) { return f.fetcher->direct(); })
      .def("figures",
           [](const BoundFetcher& f) {
             const auto figures = f.fetcher->figures();
             return std::make_pair(figures.read_bytes, figures.requests);
           },
           "(bytes, requests) asked for so far")
      .def("begin", &BoundFetcher::begin, nb::arg("pieces"), nb::arg("memory"), nb::keep_alive<0, 1>(),
           "pieces [(file, offset, n_bytes, at)] into memory u8 [n]");
}

const Crc32c& crc32c_named(const std::string& level) {
  for (const Crc32c& crc : crc32c_levels())
    if (crc.name == level) return crc;
  throw std::invalid_argument("crc32c: found '" + level + "', wanted one of crc32c_levels()");
}

void bind_sums(nb::module_& m) {
  m.def(
      "crc32c_levels",
      [] {
        std::vector<std::string> names;
        for (const Crc32c& crc : crc32c_levels()) names.emplace_back(crc.name);
        return names;
      },
      "What CRC-32C is computed with on this CPU, slowest first.");
  m.def(
      "crc32c",
      [](const ArrayIn<uint8_t, 1>& data, const std::optional<std::string>& level) {
        const Crc32c& crc = level ? crc32c_named(*level) : best_crc32c();
        return crc.of(data.data(), static_cast<int64_t>(data.size()));
      },
      nb::arg("data"), nb::arg("level").none() = nb::none(), "of u8 [n]");
  m.def(
      "crc32c_pages",
      [](const ArrayIn<uint8_t, 1>& data, const std::optional<std::string>& level) {
        want(aligned(static_cast<int64_t>(data.size())), "data: wanted whole pages of 4096 bytes");
        const Crc32c& crc = level ? crc32c_named(*level) : best_crc32c();
        const size_t n_pages = data.size() / kSummedPage;
        auto sums = std::make_unique<uint32_t[]>(n_pages);
        {
          nb::gil_scoped_release release;
          crc.of_pages(data.data(), static_cast<int64_t>(n_pages), sums.get());
        }
        return owned_array(std::move(sums), {n_pages});
      },
      nb::arg("data"), nb::arg("level").none() = nb::none(), "u8 [4096 * n] -> u32 [n]");
  m.def(
      "bad_pages",
      [](const std::string& path, int64_t first, const SumsIn& wanted, const std::string& reader, int depth,
         int64_t request_bytes, bool direct) {
        check_requests(depth, request_bytes);
        want(first >= 0 && wanted.size() <= INT64_MAX / kSummedPage - first, "first: wanted a page of the file");
        std::vector<BadPage> bad;
        {
          nb::gil_scoped_release release;
          const FlashFile file(path, direct);
          const auto opened = open_flash_reader(reader, depth);
          const auto n_pages = static_cast<int64_t>(wanted.size());
          if (n_pages) bad = bad_pages(file, *opened, first, n_pages, wanted.data(), request_bytes, direct);
        }
        std::vector<std::tuple<int64_t, int, uint32_t>> told;
        for (const BadPage& page : bad) told.emplace_back(page.page, page.error, page.found);
        return told;
      },
      nb::arg("path"), nb::arg("first"), nb::arg("wanted"), nb::arg("reader") = "auto", nb::arg("depth") = 8,
      nb::arg("request_bytes") = 1 << 20, nb::arg("direct") = true,
      "[(page, errno, sum)] of the pages from `first` that cannot be read (-1: beyond the file's end) or whose sum is not "
      "that of wanted u32 [n]; direct: past the page cache, else through it");
}

void bind_timing(nb::module_& m) {
  m.def(
      "time_reads",
      [](const std::string& path, const std::vector<int64_t>& offsets, int64_t n_bytes, int depth,
         const nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>& memory, double budget_s,
         const std::string& reader, bool direct) {
        check_requests(depth, n_bytes);
        want(!offsets.empty(), "no offsets");
        for (int64_t offset : offsets) want(aligned(offset), "an offset is not aligned to 4096");
        want(reinterpret_cast<uintptr_t>(memory.data()) % kFlashAlignment == 0 &&
                 static_cast<int64_t>(memory.size()) >= depth * n_bytes,
             "memory: wanted depth * n_bytes, aligned to 4096");
        ReadTimes times;
        std::string name;
        {
          nb::gil_scoped_release release;
          const FlashFile file(path, direct);
          const auto opened = open_flash_reader(reader, depth);
          name = opened->name();
          times = time_reads(file, *opened, offsets, n_bytes, memory.data(), budget_s);
        }
        if (times.error)
          throw std::system_error(times.error == kFlashShort ? EIO : times.error, std::generic_category(),
                                  path + ": byte " + std::to_string(times.offset));
        return std::make_tuple(times.n_reads, times.seconds, name);
      },
      nb::arg("path"), nb::arg("offsets"), nb::arg("n_bytes"), nb::arg("depth"), nb::arg("memory"), nb::arg("budget_s"),
      nb::arg("reader") = "auto", nb::arg("direct") = true,
      "(reads of n_bytes, seconds that they took together, the reader's name): at the offsets in turn, depth in flight");
}

}  // namespace

void bind_flash(nb::module_& m) {
  bind_sums(m);
  bind_timing(m);
  bind_fetcher(m);
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
        nb::arg("depth") = 8, nb::arg("request_bytes") = 1 << 20, nb::arg("direct") = true,
        nb::arg("sums").noconvert().none() = nb::none(), nb::arg("first_page") = std::vector<int64_t>(),
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 8>(),
        "pieces [(file, offset, n_bytes, at)] of paths into window u8 [n], in the order of use; with sums u32 [n], page p of "
        "paths[f] is checked against sums[first_page[f] + p]");
}

}  // namespace elute
