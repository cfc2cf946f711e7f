// Weights of which each forward needs only some.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <algorithm>

#include "bank_cache.h"
#include "bind/bind.h"

namespace elute {
namespace {

// file, offset, block_bytes, row_bytes, rows, rows a block, slots
using BankTuple = std::tuple<int, int64_t, int64_t, int64_t, int, int, int>;
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

void bind_banks(nb::module_& m) {
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
      .def("events",
           [](const BankCache& c) {
             const auto found = c.events();
             auto copy = std::make_unique_for_overwrite<int64_t[]>(4 * found.size());
             for (size_t i = 0; i < found.size(); ++i) std::copy(found[i].begin(), found[i].end(), copy.get() + 4 * i);
             return owned_array(std::move(copy), {found.size(), size_t{4}});
           },
           "As WeightStream.events, a piece being a use; between forwards.")
      .def("last",
           [](const BankCache& c, int use) {
             if (use < 0 || use >= c.n_uses()) throw std::invalid_argument("banks: a use of none");
             const std::vector<uint64_t>& words = c.last(use);
             auto copy = std::make_unique_for_overwrite<uint64_t[]>(words.size());
             std::copy(words.begin(), words.end(), copy.get());
             return owned_array(std::move(copy), {words.size()});
           },
           "The rows that a use wanted last: bit r % 64 of word r / 64; between forwards.")
      .def("present",
           [](const BankCache& c, int use) {
             if (use < 0 || use >= c.n_uses()) throw std::invalid_argument("banks: a use of none");
             const std::vector<uint64_t>& words = c.present(use);
             auto copy = std::make_unique_for_overwrite<uint64_t[]>(words.size());
             std::copy(words.begin(), words.end(), copy.get());
             return owned_array(std::move(copy), {words.size()});
           },
           "The rows that a use found in memory last, use 0 those that it will find; the same bits, none unless the choice of "
           "channels is cache-aware; between forwards.");
  m.def("open_banks", &open_banks, nb::rv_policy::take_ownership, nb::arg("paths"), nb::arg("banks"), nb::arg("uses"), nb::arg("slots"), nb::arg("staging"),
        nb::arg("reader"), nb::arg("depth"), nb::arg("request_bytes"), nb::arg("gap_bytes"), nb::arg("direct"), nb::arg("predictor"),
        nb::arg("sums").none() = nb::none(), nb::arg("first_page") = std::vector<int64_t>{},
        nb::keep_alive<0, 4>(), nb::keep_alive<0, 5>(), nb::keep_alive<0, 12>(),
        "banks [(file, offset, block_bytes, row_bytes, rows, rows a block, slots)], uses [(bank, use that predicts it)]");
  m.def("resident_banks", &resident_banks, nb::rv_policy::take_ownership, nb::arg("arrays"), nb::arg("banks"), nb::arg("uses"), nb::keep_alive<0, 1>());
}

}  // namespace elute
