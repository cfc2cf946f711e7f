#include "faulty_reader.h"

#include <cerrno>
#include <charconv>
#include <chrono>
#include <deque>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace elute {
namespace {

using Clock = std::chrono::steady_clock;

struct When {
  int64_t nth = 0;  // 0: none
  int percent = 0;
};

struct Faults {
  std::string below;
  int64_t seed = 1, slow = 1;
  When eio, again, shorter, flip, late, full;
};

Faults parse(std::string_view text) {
  std::istringstream words{std::string(text)};
  Faults faults;
  words >> faults.below;
  for (std::string word; words >> word;) {
    const size_t mark = word.find_first_of("=@%");
    int64_t value = 0;
    const char* end = word.data() + word.size();
    const bool number = mark != std::string::npos &&
                        std::from_chars(word.data() + mark + 1, end, value).ptr == end && value > 0;
    const std::string name = word.substr(0, mark);
    const std::pair<const char*, When*> kinds[] = {{"eio", &faults.eio},   {"again", &faults.again},
                                                   {"short", &faults.shorter}, {"flip", &faults.flip},
                                                   {"late", &faults.late}, {"full", &faults.full}};
    bool known = false;
    if (number && word[mark] == '=') {
      known = name == "seed" || name == "slow";
      if (name == "seed") faults.seed = value;
      if (name == "slow") faults.slow = value;
    }
    if (number && (word[mark] == '@' || (word[mark] == '%' && value <= 100)))
      for (const auto& [kind, when] : kinds)
        if (name == kind) {
          known = true;
          word[mark] == '@' ? when->nth = value : when->percent = static_cast<int>(value);
        }
    if (!known) throw std::invalid_argument("reader: found the fault '" + word + "', wanted one of faulty_reader.h");
  }
  return faults;
}

class FaultyReader final : public RawReader {
 public:
  FaultyReader(Faults faults, int depth)
      : faults_(std::move(faults)),
        below_(open_raw_reader(faults_.below, depth)),
        name_(std::string(kFaulty) + std::string(below_->name())),
        random_(static_cast<uint64_t>(faults_.seed)) {}
  std::string_view name() const override { return name_; }
  int depth() const override { return below_->depth(); }
  void submit(const FlashRead& read) override {
    ++n_reads_;
    if (strikes(faults_.full) && !in_flight_.empty()) ready_.push_back(take());
    if (strikes(faults_.eio)) return ready_.push_back({{read.id, -EIO}, Clock::now()});
    if (strikes(faults_.again)) return ready_.push_back({{read.id, -EAGAIN}, Clock::now()});
    InFlight mine{read, Clock::now() - slept_, strikes(faults_.flip)};
    const int64_t n_pages = read.n_bytes / kFlashAlignment;
    if (strikes(faults_.shorter) && n_pages > 1) mine.read.n_bytes = n_pages / 2 * kFlashAlignment;
    below_->submit(mine.read);
    in_flight_.push_back(mine);
  }
  RawDone wait() override {
    if (ready_.empty()) ready_.push_back(take());
    const bool late = faults_.late.nth || faults_.late.percent;
    while (!in_flight_.empty() && strikes(faults_.late)) ready_.push_back(take());
    const size_t at = late ? random_() % ready_.size() : 0;
    const Ready ready = ready_[at];
    ready_.erase(ready_.begin() + static_cast<std::ptrdiff_t>(at));
    const Clock::time_point began = Clock::now();
    std::this_thread::sleep_until(ready.due);
    slept_ += Clock::now() - began;
    return ready.done;
  }

 private:
  struct InFlight {
    FlashRead read;
    Clock::time_point started;  // less what was slept before
    bool flip;
  };
  struct Ready {
    RawDone done;
    Clock::time_point due;
  };

  bool strikes(const When& when) {
    if (when.percent) return static_cast<int>(random_() % 100) < when.percent;
    return when.nth && when.nth == n_reads_;
  }
  Ready take() {
    const RawDone done = below_->wait();
    auto mine = in_flight_.begin();
    while (mine->read.id != done.id) ++mine;
    if (mine->flip && done.result > 0) {
      const uint64_t bit = random_() % (8 * static_cast<uint64_t>(done.result));
      mine->read.to[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
    }
    // A read is not slow because another one was: what was slept meanwhile is none of its time.
    const Clock::time_point now = Clock::now();
    const Ready ready{done, now + (faults_.slow - 1) * (now - slept_ - mine->started)};
    in_flight_.erase(mine);
    return ready;
  }

  const Faults faults_;
  const std::unique_ptr<RawReader> below_;
  const std::string name_;
  std::mt19937_64 random_;
  int64_t n_reads_ = 0;
  Clock::duration slept_{0};
  std::deque<InFlight> in_flight_;
  std::deque<Ready> ready_;
};

}  // namespace

std::unique_ptr<RawReader> open_faulty_reader(std::string_view text, int depth) {
  return std::make_unique<FaultyReader>(parse(text), depth);
}

}  // namespace elute
