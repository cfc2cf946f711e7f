#include "weight_stream.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <iomanip>
#include <sstream>
#include <stdexcept>

#include "crc32c.h"

namespace elute {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int64_t kEverything = INT64_MAX;

int64_t now_ns() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

bool overlap(const WeightStream::Piece& a, const WeightStream::Piece& b) {
  return a.at < b.at + b.n_bytes && b.at < a.at + a.n_bytes;
}

}  // namespace

WeightStream::WeightStream(const std::vector<std::string>& paths, std::vector<Piece> pieces, uint8_t* window,
                           std::string_view reader, int depth, int64_t request_bytes, bool direct, Sums sums)
    : paths_(paths),
      pieces_(std::move(pieces)),
      window_(window),
      request_bytes_(request_bytes),
      sums_(std::move(sums)),
      process_(getpid()) {
  for (const std::string& path : paths) files_.emplace_back(path, direct);
  const int n = n_pieces();
  for (int i = 0; i < n; ++i) {
    int back = 1;  // at most n: a piece shares its place with itself, a pass ago
    while (!overlap(pieces_[i], pieces_[(i + n - back % n) % n])) ++back;
    distance_.push_back(back);
  }
  reader_ = open_flash_reader(reader, depth);
  thread_ = std::thread([this] { run(); });
}

WeightStream::~WeightStream() {
  if (process_ != getpid()) {  // a forked child: the threads are the parent's alone, and so are reads in flight
    new std::thread(std::move(thread_));
    reader_.release();
    return;
  }
  stop_ = true;
  released_.fetch_add(1);  // who waits for a change of it must see one
  released_.notify_all();
  thread_.join();
}

bool WeightStream::may_read(int64_t sequence) const {
  return released_.load(std::memory_order_acquire) > sequence - distance_[sequence % n_pieces()];
}

void WeightStream::run() {
  try {
    read_ahead();
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

void WeightStream::read_ahead() {
  struct Reading {
    int64_t sequence;
    int requests;  // that are not done
    bool complete;  // all were submitted
    int64_t started_ns;
  };
  std::deque<Reading> reading;  // in order; the first is loaded_
  std::vector<Request> requests(reader_->depth());
  std::vector<int> free;
  for (int slot = reader_->depth(); slot-- > 0;) free.push_back(slot);
  int64_t next = 0, at = 0;     // the piece to read next, and how much of it was asked for
  int in_flight = 0;
  while (!stop_) {
    // As many requests as the reader takes, of pieces whose place is free.
    while (in_flight < reader_->depth() && !failed_ && !stop_) {
      if (at == 0 && !may_read(next)) break;
      const Piece& piece = pieces_[next % n_pieces()];
      if (at == 0) reading.push_back({next, 0, false, now_ns()});
      const int64_t n_bytes = std::min(request_bytes_, piece.n_bytes - at);
      const int slot = free.back();
      free.pop_back();
      requests[slot] = {next, at, n_bytes};
      reader_->submit({files_[piece.file].descriptor(), piece.offset + at, n_bytes, window_ + piece.at + at, slot});
      ++in_flight;
      ++reading.back().requests;
      at += n_bytes;
      read_bytes_.fetch_add(n_bytes, std::memory_order_relaxed);
      if (at == piece.n_bytes) {
        reading.back().complete = true;
        at = 0;
        ++next;
      }
    }
    if (in_flight == 0) {
      if (failed_) return;
      const int64_t seen = released_.load(std::memory_order_acquire);
      if (!may_read(next) && !stop_) released_.wait(seen, std::memory_order_acquire);
      continue;
    }
    const FlashDone done = reader_->wait();
    --in_flight;
    const Request& request = requests[done.id];
    free.push_back(static_cast<int>(done.id));
    if (done.error)
      fail(where(request, done.error == kFlashShort ? "the file ends before that" : std::strerror(done.error)));
    else if (sums_.of && !failed_)
      check(request);
    for (Reading& r : reading)
      if (r.sequence == request.sequence) --r.requests;
    while (!reading.empty() && reading.front().complete && reading.front().requests == 0 && !failed_) {
      const Piece& piece = pieces_[reading.front().sequence % n_pieces()];
      files_[piece.file].forget(piece.offset, piece.n_bytes);
      note(EventKind::kRead, reading.front().sequence, reading.front().started_ns, now_ns());
      reading.pop_front();
      loaded_.fetch_add(1, std::memory_order_release);
      loaded_.notify_all();
    }
  }
  while (in_flight-- > 0) reader_->wait();  // they write to the window
}

// Here, while others of its piece are read: the pages are in a cache still, and the threads that multiply wait for none.
void WeightStream::check(const Request& request) {
  const Piece& piece = pieces_[request.sequence % n_pieces()];
  const int64_t first = (piece.offset + request.at) / kSummedPage, n_pages = request.n_bytes / kSummedPage;
  const uint32_t* wanted = sums_.of + sums_.first_page[piece.file] + first;
  uint32_t found = 0;
  const int64_t page = first_wrong_page(window_ + piece.at + request.at, n_pages, wanted, &found);
  if (page == n_pages) return;
  std::ostringstream what;
  what << std::hex << std::setfill('0') << "their CRC-32C is " << std::setw(8) << found << ", wanted " << std::setw(8)
       << wanted[page];
  fail(where({request.sequence, request.at + page * kSummedPage, kSummedPage}, what.str()));
}

std::string WeightStream::where(const Request& request, const std::string& what) const {
  const Piece& piece = pieces_[request.sequence % n_pieces()];
  return read_failure(paths_[piece.file], piece.offset + request.at, request.n_bytes, what);
}

void WeightStream::fail(const std::string& what) {
  if (failed_) return;
  failure_ = what;
  failed_.store(true, std::memory_order_release);
  loaded_.store(kEverything, std::memory_order_release);  // nobody waits any longer
  loaded_.notify_all();
}

void WeightStream::wait(int64_t pass, int end) {
  const int64_t wanted = pass * n_pieces() + end;
  int64_t seen = loaded_.load(std::memory_order_acquire);
  if (seen >= wanted) return;
  const int64_t started = now_ns();
  while (seen < wanted) {
    loaded_.wait(seen, std::memory_order_acquire);
    seen = loaded_.load(std::memory_order_acquire);
  }
  const int64_t ended = now_ns();
  waited_ns_.fetch_add(ended - started, std::memory_order_relaxed);
  note(EventKind::kWait, wanted - 1, started, ended);
}

void WeightStream::release(int64_t pass, int end) {
  const int64_t mine = pass * n_pieces() + end;
  int64_t seen = released_.load(std::memory_order_relaxed);
  while (seen < mine && !released_.compare_exchange_weak(seen, mine, std::memory_order_release, std::memory_order_relaxed)) {
  }
  if (seen >= mine) return;
  released_.notify_all();
  const int64_t now = now_ns();
  note(EventKind::kRelease, mine - 1, now, now);
}

void WeightStream::note(EventKind kind, int64_t sequence, int64_t start_ns, int64_t end_ns) {
  const int64_t number = noted_.fetch_add(1, std::memory_order_relaxed);
  Slot& slot = slots_[number % kEvents];
  slot.number.store(0, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  slot.kind.store(static_cast<int64_t>(kind), std::memory_order_relaxed);
  slot.sequence.store(sequence, std::memory_order_relaxed);
  slot.start_ns.store(start_ns, std::memory_order_relaxed);
  slot.end_ns.store(end_ns, std::memory_order_relaxed);
  slot.number.store(number + 1, std::memory_order_release);
}

std::vector<WeightStream::Event> WeightStream::events() const {
  std::vector<Event> found;
  const int64_t end = noted_.load(std::memory_order_acquire);
  for (int64_t number = std::max<int64_t>(0, end - kEvents); number < end; ++number) {
    const Slot& slot = slots_[number % kEvents];
    if (slot.number.load(std::memory_order_acquire) != number + 1) continue;
    const Event event{static_cast<EventKind>(slot.kind.load(std::memory_order_relaxed)),
                      slot.sequence.load(std::memory_order_relaxed), slot.start_ns.load(std::memory_order_relaxed),
                      slot.end_ns.load(std::memory_order_relaxed)};
    std::atomic_thread_fence(std::memory_order_acquire);
    if (slot.number.load(std::memory_order_relaxed) == number + 1) found.push_back(event);
  }
  return found;
}

double WeightStream::read_through(int64_t first_pass, int passes) {
  const int64_t started = now_ns();
  for (int64_t pass = first_pass; pass < first_pass + passes; ++pass) {
    for (int end = 1; end <= n_pieces(); ++end) {
      wait(pass, end);
      release(pass, end);
    }
  }
  return double(now_ns() - started) / 1e9 / passes;
}

std::string WeightStream::failure() const { return failed_.load(std::memory_order_acquire) ? failure_ : std::string(); }

WeightStream::Figures WeightStream::figures() const {
  return {read_bytes_.load(std::memory_order_relaxed), double(waited_ns_.load(std::memory_order_relaxed)) / 1e9};
}

bool WeightStream::direct() const {
  return std::all_of(files_.begin(), files_.end(), [](const FlashFile& file) { return file.direct(); });
}

}  // namespace elute
