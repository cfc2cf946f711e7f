// Weights that come from flash while they are used.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>
#include <system_error>

#include "bank_cache.h"
#include "bind/bind.h"
#include "crc32c.h"
#include "page_check.h"
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

using BankTuple = std::tuple<int, int64_t, int64_t, int64_t, int, int, int>;  // file, offset, block_bytes, row_bytes, rows, rows a block, slots
using Resident = ArrayIn<uint8_t, 1>;
using Memory = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

Predictor predictor_named(const std::string& name) {
  if (name == "none") return Predictor::none;
  if (name == "model") return Predictor::model;
  if (name == "random") return Predictor::random;
  if (name == "inverse") return Predictor::inverse;
  throw std::invalid_argument("predictor: found " + name + ", wanted none, model, random or inverse");
}

std::vector<BankCache::Bank> checked_banks(const std::vector<BankTuple>& tuples, int n_files, bool slots) {
  const auto want = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("banks: ") + what);
  };
  want(!tuples.empty(), "none");
  std::vector<BankCache::Bank> banks;
  for (const auto& [file, offset, block_bytes, row_bytes, n_rows, rows_per_block, n_slots] : tuples) {
    want(!slots || (file >= 0 && file < n_files), "a file does not exist");
    want(offset >= 0 && offset % kFlashAlignment == 0 && block_bytes > 0 && block_bytes % kFlashAlignment == 0 && block_bytes <= 1 << 30,
         "not aligned to 4096");
    want(n_rows >= 1 && rows_per_block >= 1 && row_bytes >= 1 && row_bytes <= block_bytes / rows_per_block, "rows do not fit a block");
    BankCache::Bank bank{file, offset, block_bytes, row_bytes, n_rows, rows_per_block, n_slots};
    want(n_slots >= 0 && n_slots <= bank.n_blocks(), "slots");
    banks.push_back(bank);
  }
  return banks;
}

std::vector<BankCache::Use> checked_uses(const std::vector<std::pair<int, int>>& pairs, const std::vector<BankCache::Bank>& banks) {
  std::vector<BankCache::Use> uses;
  const int n = static_cast<int>(pairs.size());
  for (const auto& [bank, like] : pairs) {
    if (bank < 0 || bank >= static_cast<int>(banks.size()) || like < 0 || like >= n)
      throw std::invalid_argument("banks: a use of none");
    if (banks[pairs[like].first].n_rows != banks[bank].n_rows) throw std::invalid_argument("banks: a use like one of other rows");
    uses.push_back({bank, like});
  }
  if (uses.empty()) throw std::invalid_argument("banks: no uses");
  return uses;
}

BankCache* open_banks(const std::vector<std::string>& paths, const std::vector<BankTuple>& tuples,
                      const std::vector<std::pair<int, int>>& uses, const Memory& slots, const Memory& staging,
                      const std::string& reader, int depth, int64_t request_bytes, int64_t gap_bytes, bool direct,
                      const std::string& predictor, const std::optional<ArrayIn<uint32_t, 1>>& sums,
                      const std::vector<int64_t>& first_page) {
  const auto want = [](bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("banks: ") + what);
  };
  const auto banks = checked_banks(tuples, static_cast<int>(paths.size()), true);
  want(depth >= 1 && depth <= 1024, "depth: wanted 1 to 1024");
  want(request_bytes > 0 && request_bytes <= 1 << 30 && gap_bytes >= 0, "request_bytes, gap_bytes");
  for (const Memory* memory : {&slots, &staging})
    want(reinterpret_cast<uintptr_t>(memory->data()) % kFlashAlignment == 0, "memory not aligned to 4096");
  const int64_t half = static_cast<int64_t>(staging.size()) / 2 / kFlashAlignment * kFlashAlignment;
  want(static_cast<int64_t>(slots.size()) >= BankCache::slots_bytes(banks), "slots are too small");
  want(half >= BankCache::least_half(banks), "staging is too small");
  for (const BankCache::Bank& bank : banks) {
    if (!sums) break;
    want(first_page.size() == paths.size() && first_page[bank.file] >= 0, "first pages");
    const int64_t end = first_page[bank.file] + (bank.offset + bank.n_blocks() * bank.block_bytes) / kFlashAlignment;
    want(end <= static_cast<int64_t>(sums->size()), "sums are too few");
  }
  return new BankCache(paths, banks, checked_uses(uses, banks), slots.data(), staging.data(), half,
                       {reader, depth, request_bytes, gap_bytes, direct, predictor_named(predictor),
                        sums ? sums->data() : nullptr, first_page});
}

// Banks that are in memory: arrays of whole blocks.
BankCache* resident_banks(const std::vector<Resident>& arrays, const std::vector<BankTuple>& tuples,
                          const std::vector<std::pair<int, int>>& uses) {
  auto banks = checked_banks(tuples, 0, false);
  if (arrays.size() != banks.size()) throw std::invalid_argument("banks: arrays");
  for (size_t i = 0; i < banks.size(); ++i) {
    if (static_cast<int64_t>(arrays[i].size()) < banks[i].n_blocks() * banks[i].block_bytes)
      throw std::invalid_argument("banks: an array is too small");
    banks[i].resident = arrays[i].data();
  }
  return new BankCache({}, banks, checked_uses(uses, banks), nullptr, nullptr, 0,
                       {"auto", 1, kFlashAlignment, 0, true, Predictor::none, nullptr, {}});
}

}  // namespace

void bind_flash(nb::module_& m) {
  bind_sums(m);
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
      .def("load",
           [](WeightStream& s) {
             nb::gil_scoped_release release;
             s.wait(0, s.n_pieces());
           },
           "Returns when all pieces were read once, or one could not be: see failure.");
  nb::class_<BankCache>(m, "BankCache", "Banks of blocks: those used most stay in memory, the others are read when wanted.")
      .def_prop_ro("reader", [](const BankCache& c) { return std::string(c.reader()); })
      .def_prop_ro("direct", &BankCache::direct)
      .def_prop_ro("failure", &BankCache::failure)
      .def("figures",
           [](const BankCache& c) {
             const BankCache::Figures f = c.figures();
             nb::dict told;
             told["read_bytes"] = f.read_bytes;
             told["wanted_bytes"] = f.wanted_bytes;
             told["requests"] = f.requests;
             told["blocks"] = f.blocks;
             told["cached"] = f.cached;
             told["predicted"] = f.predicted;
             told["missed"] = f.missed;
             told["predicted_reads"] = f.predicted_reads;
             told["waited_s"] = f.waited_s;
             return told;
           },
           "Since it was opened; between forwards.")
      .def("last",
           [](const BankCache& c, int use) {
             if (use < 0 || use >= c.n_uses()) throw std::invalid_argument("banks: a use of none");
             const std::vector<uint64_t>& words = c.last(use);
             auto copy = std::make_unique_for_overwrite<uint64_t[]>(words.size());
             std::copy(words.begin(), words.end(), copy.get());
             return owned_array(std::move(copy), {words.size()});
           },
           "The rows that a use wanted last: bit r % 64 of word r / 64; between forwards.");
  m.def("open_banks", &open_banks, nb::rv_policy::take_ownership, nb::arg("paths"), nb::arg("banks"), nb::arg("uses"), nb::arg("slots"), nb::arg("staging"),
        nb::arg("reader"), nb::arg("depth"), nb::arg("request_bytes"), nb::arg("gap_bytes"), nb::arg("direct"), nb::arg("predictor"),
        nb::arg("sums").none() = nb::none(), nb::arg("first_page") = std::vector<int64_t>{},
        nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(), nb::keep_alive<0, 12>(),
        "banks [(file, offset, block_bytes, row_bytes, rows, rows a block, slots)], uses [(bank, use that predicts it)]");
  m.def("resident_banks", &resident_banks, nb::rv_policy::take_ownership, nb::arg("arrays"), nb::arg("banks"), nb::arg("uses"), nb::keep_alive<0, 1>());
  m.def("open_stream", &make_stream, nb::rv_policy::take_ownership, nb::arg("paths"), nb::arg("pieces"), nb::arg("window"), nb::arg("reader") = "auto",
        nb::arg("depth") = 8, nb::arg("request_bytes") = 1 << 20, nb::arg("direct") = true,
        nb::arg("sums").noconvert().none() = nb::none(), nb::arg("first_page") = std::vector<int64_t>(),
        nb::keep_alive<0, 3>(), nb::keep_alive<0, 8>(),
        "pieces [(file, offset, n_bytes, at)] of paths into window u8 [n], in the order of use; with sums u32 [n], page p of "
        "paths[f] is checked against sums[first_page[f] + p]");
}

}  // namespace elute
