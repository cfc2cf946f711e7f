#include "bank_cache.h"

#include <unistd.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstring>
#include <iomanip>
#include <sstream>

#include "crc32c.h"

namespace elute {
namespace {

using Clock = std::chrono::steady_clock;

enum Kind { kRead, kWait, kRelease };  // as in WeightStream::EventKind
int64_t nanoseconds(Clock::time_point at) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(at.time_since_epoch()).count();
}

bool has(const uint64_t* words, int row) { return !words || (words[row / 64] >> (row % 64) & 1); }

}  // namespace

BankCache::BankCache(const std::vector<std::string>& paths, std::vector<Bank> banks, std::vector<Use> uses, uint8_t* slots,
                     uint8_t* staging, int64_t half_bytes, const Options& options)
    : paths_(paths),
      banks_(std::move(banks)),
      uses_(std::move(uses)),
      staging_(staging),
      half_bytes_(half_bytes),
      request_bytes_(options.request_bytes),
      gap_bytes_(options.gap_bytes),
      predictor_(options.predictor),
      process_(getpid()),
      sums_(options.sums),
      first_page_(options.first_page) {
  for (const std::string& path : paths_) files_.emplace_back(path, options.direct);
  int most_blocks = 0;
  for (const Bank& bank : banks_) {
    State state;
    state.rows.assign(bank.n_rows, staging_);  // what a thread that comes late may read
    for (int row = 0; bank.resident && row < bank.n_rows; ++row)
      state.rows[row] = bank.resident + row / bank.rows_per_block * bank.block_bytes + row % bank.rows_per_block * bank.row_bytes;
    state.slot_of.assign(bank.n_blocks(), kNowhere);
    state.block_in.assign(bank.n_slots, kNowhere);
    state.count.assign(bank.n_blocks(), 0);
    state.slots = slots;
    state.n_free = bank.n_slots;
    slots += bank.n_slots * bank.block_bytes;
    states_.push_back(std::move(state));
    most_blocks = std::max(most_blocks, bank.n_blocks());
  }
  for (const Use& use : uses_) last_.emplace_back((banks_[use.bank].n_rows + 63) / 64, 0);
  present_.resize(uses_.size());
  for (Half& half : halves_) {
    half.at.assign(most_blocks, kNowhere);
    half.ahead.assign(most_blocks, 0);
  }
  if (paths_.empty()) return;
  reader_ = open_flash_reader(options.reader, options.depth);
  pending_.resize(reader_->depth());
  for (int id = reader_->depth(); id-- > 0;) free_ids_.push_back(id);
}

BankCache::~BankCache() {
  if (process_ != getpid()) {  // a forked child: reads in flight are the parent's
    reader_.release();
    return;
  }
  try {
    while (in_flight_ > 0) {
      reader_->wait();
      --in_flight_;
    }
  } catch (const std::exception&) {
    reader_.release();  // a ring that cannot be asked may still write: its memory stays mapped
  }
}

int64_t BankCache::slots_bytes(const std::vector<Bank>& banks) {
  int64_t sum = 0;
  for (const Bank& bank : banks) sum += bank.n_slots * bank.block_bytes;
  return sum;
}
int64_t BankCache::least_half(const std::vector<Bank>& banks) {
  int64_t most = 0;
  for (const Bank& bank : banks) most = std::max(most, bank.n_blocks() * bank.block_bytes);
  return most;
}

void BankCache::demand(int64_t forward, int use, const uint64_t* wanted, const uint64_t* ahead) {
  if (banks_[uses_[use].bank].resident) return;
  const int64_t sequence = forward * n_uses() + use;
  int64_t seen = claimed_.load(std::memory_order_acquire);
  if (seen < sequence && claimed_.compare_exchange_strong(seen, sequence, std::memory_order_acq_rel)) {
    try {
      if (!failed_) fill(sequence, use, wanted, ahead);
    } catch (const std::exception& error) {
      fail(error.what());
    }
    ready_.store(sequence, std::memory_order_release);
    ready_.notify_all();
    return;
  }
  int64_t ready = ready_.load(std::memory_order_acquire);
  if (ready >= sequence) return;
  const Clock::time_point started = Clock::now();
  for (; ready < sequence; ready = ready_.load(std::memory_order_acquire)) ready_.wait(ready, std::memory_order_acquire);
  waited_ns_.fetch_add(std::chrono::nanoseconds(Clock::now() - started).count(), std::memory_order_relaxed);
}

BankCache::Figures BankCache::figures() const {
  Figures figures = figures_;
  figures.waited_s += double(waited_ns_.load(std::memory_order_relaxed)) / 1e9;
  return figures;
}

void BankCache::fill(int64_t sequence, int use, const uint64_t* wanted, const uint64_t* ahead) {
  const Clock::time_point started = Clock::now();
  if (sequence > 0) note(kRelease, sequence - 1, nanoseconds(started), nanoseconds(started));
  const int bank = uses_[use].bank, half_index = static_cast<int>(sequence & 1);
  Half &half = halves_[half_index], &other = halves_[1 - half_index];
  wanted_blocks(bank, wanted);
  for (int block : blocks_) ++states_[bank].count[block];
  std::vector<uint64_t>& last = last_[use];
  if (wanted) std::copy(wanted, wanted + last.size(), last.begin());
  else std::fill(last.begin(), last.end(), ~uint64_t{0});
  if (half.sequence != sequence) {
    while (in_flight_ > 0) reap();  // nothing may be read into what is given away
    take(half, sequence, bank);
  }
  if (other.bank == bank) admit(other);  // may evict what is wanted now: before it is known what is missing
  for (int block : blocks_) {
    const bool cached = states_[bank].slot_of[block] != kNowhere;
    figures_.cached += cached;
    figures_.predicted += !cached && half.ahead[block];
  }
  figures_.blocks += static_cast<int64_t>(blocks_.size());
  plan_reads(half, bank, false, kAllRuns);
  if (in_flight_ == 0) first_read_ns_ = nanoseconds(Clock::now());
  const bool reads = in_flight_ > 0 || !runs_.empty();
  size_t next = 0;
  const auto submit_more = [&] {
    while (next < runs_.size() && in_flight_ < reader_->depth()) submit(runs_[next++], half);
  };
  submit_more();
  if (other.bank != bank) admit(other);  // while the disk works
  while (in_flight_ > 0 && !failed_) {
    reap();
    if (!failed_) submit_more();
  }
  place(half, bank);
  const Clock::time_point ready = Clock::now();
  if (reads) note(kRead, sequence, first_read_ns_, nanoseconds(ready));
  note(kWait, sequence, nanoseconds(started), nanoseconds(ready));
  figures_.waited_s += std::chrono::duration<double>(ready - started).count();
  if (!failed_) predict(sequence + 1, (use + 1) % n_uses(), ahead);
  if (keeps_present_) find_present(sequence + 1);
}

void BankCache::wanted_blocks(int bank, const uint64_t* wanted) {
  const Bank& b = banks_[bank];
  blocks_.clear();
  if (b.rows_per_block == 1 && wanted) {
    for (int word = 0; word * 64 < b.n_rows; ++word)
      for (uint64_t bits = wanted[word]; bits; bits &= bits - 1)
        if (const int row = word * 64 + std::countr_zero(bits); row < b.n_rows) blocks_.push_back(row);
    return;
  }
  for (int block = 0; block < b.n_blocks(); ++block)
    for (int row = block * b.rows_per_block; row < std::min(b.n_rows, (block + 1) * b.rows_per_block); ++row)
      if (has(wanted, row)) {
        blocks_.push_back(block);
        break;
      }
}

void BankCache::take(Half& half, int64_t sequence, int bank) {
  for (int block : half.blocks) {
    half.at[block] = kNowhere;
    half.ahead[block] = 0;
  }
  half.blocks.clear();
  half.used = 0;
  half.sequence = sequence;
  half.bank = bank;
}

// Puts those of blocks_ that are nowhere yet into runs_, at most most_runs, and gives them places in the half. A half has
// room for a whole bank, and no block is put there twice.
void BankCache::plan_reads(Half& half, int bank, bool ahead, size_t most_runs) {
  const Bank& b = banks_[bank];
  const State& state = states_[bank];
  const int most_gap = static_cast<int>(gap_bytes_ / b.block_bytes);
  const int most_run = static_cast<int>(std::max<int64_t>(1, request_bytes_ / b.block_bytes));
  runs_.clear();
  const auto put = [&](int block) {
    half.at[block] = half.used;
    half.ahead[block] = ahead;
    half.blocks.push_back(block);
    half.used += b.block_bytes;
  };
  for (int block : blocks_) {
    if (state.slot_of[block] != kNowhere || half.at[block] != kNowhere) continue;
    bool joins = !runs_.empty() && block - runs_.back().last - 1 <= most_gap && block - runs_.back().first < most_run;
    for (int between = joins ? runs_.back().last + 1 : block; joins && between < block; ++between)
      joins = half.at[between] == kNowhere;
    if (joins) {
      for (int between = runs_.back().last + 1; between < block; ++between) put(between);
      runs_.back().last = block;
    } else {
      if (runs_.size() == most_runs) break;
      runs_.push_back({block, block});
    }
    put(block);
    (ahead ? figures_.predicted_reads : figures_.missed) += 1;
    figures_.wanted_bytes += ahead ? 0 : b.block_bytes;
  }
}

void BankCache::submit(const Run& run, const Half& half) {
  const Bank& b = banks_[half.bank];
  const int64_t n_bytes = (run.last - run.first + 1) * b.block_bytes;
  ++figures_.requests;
  figures_.read_bytes += n_bytes;
  const int id = free_ids_.back();
  free_ids_.pop_back();
  pending_[id] = {{files_[b.file].descriptor(), b.offset + run.first * b.block_bytes, n_bytes,
                   memory(half) + half.at[run.first], id},
                  b.file};
  reader_->submit(pending_[id].read);
  ++in_flight_;
}

void BankCache::reap() {
  const FlashDone done = reader_->wait();
  --in_flight_;
  const Pending& pending = pending_[done.id];
  free_ids_.push_back(static_cast<int>(done.id));
  if (done.error) {
    return fail(where(pending.read, pending.file,
                      done.error == kFlashShort ? "the file ends before that" : std::strerror(done.error)));
  }
  files_[pending.file].forget(pending.read.offset, pending.read.n_bytes);
  if (sums_) check(pending.read, pending.file);
}

void BankCache::check(const FlashRead& read, int file) {
  const int64_t first = read.offset / kSummedPage, n_pages = read.n_bytes / kSummedPage;
  const uint32_t* wanted = sums_ + first_page_[file] + first;
  uint32_t found = 0;
  const int64_t page = first_wrong_page(read.to, n_pages, wanted, &found);
  if (page == n_pages) return;
  FlashRead bad = read;
  bad.offset += page * kSummedPage;
  bad.n_bytes = kSummedPage;
  std::ostringstream what;
  what << std::hex << std::setfill('0') << "their CRC-32C is " << std::setw(8) << found << ", wanted " << std::setw(8)
       << wanted[page];
  fail(where(bad, file, what.str()));
}

std::string BankCache::where(const FlashRead& read, int file, const std::string& what) const {
  return read_failure(paths_[file], read.offset, read.n_bytes, what);
}

// Least frequently used: a block of the half that was used more often than one that stays takes its place.
void BankCache::admit(const Half& half) {
  if (half.sequence < 0 || failed_) return;
  const Bank& b = banks_[half.bank];
  State& state = states_[half.bank];
  if (b.n_slots == 0) return;
  order_.clear();
  for (int block : half.blocks)
    if (state.slot_of[block] == kNowhere && state.count[block] > 0) order_.push_back(block);
  if (order_.empty()) return;
  const auto more = [&](int x, int y) { return state.count[x] != state.count[y] ? state.count[x] > state.count[y] : x < y; };
  std::sort(order_.begin(), order_.end(), more);
  victims_.clear();
  if (state.n_free < static_cast<int>(order_.size())) {
    for (int slot = 0; slot < b.n_slots; ++slot)
      if (state.block_in[slot] != kNowhere) victims_.push_back(state.block_in[slot]);
    std::sort(victims_.begin(), victims_.end(), [&](int x, int y) { return more(y, x); });
  }
  size_t victim = 0;
  int free_from = 0;
  for (int block : order_) {
    int slot = kNowhere;
    if (state.n_free > 0) {
      while (state.block_in[free_from] != kNowhere) ++free_from;
      slot = free_from;
      --state.n_free;
    } else {
      if (victim == victims_.size() || state.count[victims_[victim]] >= state.count[block]) break;
      slot = state.slot_of[victims_[victim]];
      state.slot_of[victims_[victim]] = kNowhere;
      ++victim;
    }
    std::memcpy(state.slots + slot * b.block_bytes, memory(half) + half.at[block], b.block_bytes);
    state.block_in[slot] = block;
    state.slot_of[block] = slot;
  }
}

void BankCache::place(const Half& half, int bank) {
  const Bank& b = banks_[bank];
  State& state = states_[bank];
  for (int block : blocks_) {
    const uint8_t* const at = state.slot_of[block] != kNowhere ? state.slots + state.slot_of[block] * b.block_bytes
                              : half.at[block] != kNowhere      ? memory(half) + half.at[block]
                                                                : staging_;
    const int first = block * b.rows_per_block, end = std::min(b.n_rows, first + b.rows_per_block);
    for (int row = first; row < end; ++row) state.rows[row] = at + (row - first) * b.row_bytes;
  }
}

// Reads ahead for the next use while this one is computed: as much as the reader takes at once, so that a wrong guess
// holds nobody up for long.
void BankCache::predict(int64_t sequence, int use, const uint64_t* ahead) {
  const int bank = uses_[use].bank;
  const Bank& b = banks_[bank];
  if (predictor_ == Predictor::none || b.resident) return;
  Half& half = halves_[sequence & 1];
  take(half, sequence, bank);
  const uint64_t* const like = ahead ? ahead : last_[uses_[use].like].data();
  if (predictor_ == Predictor::model) {
    wanted_blocks(bank, like);
  } else {
    blocks_.clear();
    for (int block = 0; block < b.n_blocks(); ++block)
      if (predictor_ == Predictor::inverse ? !has(like, block * b.rows_per_block) : random_() % 2 == 0)
        blocks_.push_back(block);
  }
  plan_reads(half, bank, true, reader_->depth());
  first_read_ns_ = nanoseconds(Clock::now());
  for (const Run& run : runs_) submit(run, half);
}

void BankCache::keep_present(bool on) {
  keeps_present_ = on;
  for (int use = 0; use < n_uses(); ++use) present_[use].assign(on ? last_[use].size() : 0, 0);
  if (on) find_present(claimed_ + 1);
}

void BankCache::find_present(int64_t sequence) {
  const int use = static_cast<int>(sequence % n_uses()), bank = uses_[use].bank;
  const Bank& b = banks_[bank];
  const State& state = states_[bank];
  const Half& half = halves_[sequence & 1];
  const bool read_ahead = half.sequence == sequence && half.bank == bank;
  std::vector<uint64_t>& words = present_[use];
  std::fill(words.begin(), words.end(), 0);
  for (int block = 0; block < b.n_blocks(); ++block) {
    if (!b.resident && state.slot_of[block] == kNowhere && !(read_ahead && half.at[block] != kNowhere)) continue;
    for (int row = block * b.rows_per_block; row < std::min(b.n_rows, (block + 1) * b.rows_per_block); ++row)
      words[row / 64] |= uint64_t{1} << (row % 64);
  }
}

void BankCache::note(int kind, int64_t sequence, int64_t start_ns, int64_t end_ns) {
  if (events_.size() < kEvents) events_.resize(events_.size() + 1);
  events_[next_event_++ % kEvents] = {kind, sequence, start_ns, end_ns};
}

std::vector<std::array<int64_t, 4>> BankCache::events() const {
  const size_t oldest = events_.size() < kEvents ? 0 : next_event_ % kEvents;
  std::vector<std::array<int64_t, 4>> found(events_.begin() + static_cast<std::ptrdiff_t>(oldest), events_.end());
  found.insert(found.end(), events_.begin(), events_.begin() + static_cast<std::ptrdiff_t>(oldest));
  return found;
}

void BankCache::fail(const std::string& what) {
  if (failed_) return;
  failure_ = what;
  failed_.store(true, std::memory_order_release);
}

void BankCache::forget() {
  for (State& state : states_) std::fill(state.count.begin(), state.count.end(), 0);
}

bool BankCache::direct() const {
  return std::all_of(files_.begin(), files_.end(), [](const FlashFile& file) { return file.direct(); });
}

}  // namespace elute
