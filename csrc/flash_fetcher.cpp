#include "flash_fetcher.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <iomanip>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "crc32c.h"

namespace elute {

std::string FlashFetcher::Fetch::wait() {
  if (process_ != getpid()) return "weights are read by the process that opened them alone; load the model again";
  std::unique_lock lock(mutex_);
  done_.wait(lock, [&] { return left_ == 0; });
  return failure_;
}

FlashFetcher::FlashFetcher(const std::vector<std::string>& paths, std::string_view reader, int depth, int64_t request_bytes,
                           bool direct, Sums sums)
    : paths_(paths), request_bytes_(request_bytes), sums_(std::move(sums)), process_(getpid()) {
  for (const std::string& path : paths) files_.emplace_back(path, direct);
  reader_ = open_flash_reader(reader, depth);
  in_flight_.resize(reader_->depth());
  thread_ = std::thread([this] { run(); });
}

FlashFetcher::~FlashFetcher() {
  if (process_ != getpid()) {  // a forked child: the thread is the parent's alone, and so are reads in flight
    new std::thread(std::move(thread_));
    reader_.release();
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wanted_.notify_all();
  thread_.join();
}

std::shared_ptr<FlashFetcher::Fetch> FlashFetcher::begin(const std::vector<Piece>& pieces) {
  if (process_ != getpid())
    throw std::runtime_error("weights are read by the process that opened them alone; load the model again");
  auto fetch = std::make_shared<Fetch>();
  fetch->process_ = process_;
  std::vector<Piece> requests;
  for (const Piece& piece : pieces)
    for (int64_t at = 0; at < piece.n_bytes; at += request_bytes_)
      requests.push_back({piece.file, piece.offset + at, std::min(request_bytes_, piece.n_bytes - at), piece.to + at});
  fetch->left_ = static_cast<int64_t>(requests.size());
  {
    const std::lock_guard lock(mutex_);
    if (!broken_.empty()) throw std::runtime_error(broken_);
    for (const Piece& request : requests) {
      queue_.push_back({request, fetch});
      figures_.read_bytes += request.n_bytes;
      ++figures_.requests;
    }
  }
  wanted_.notify_all();
  return fetch;
}

void FlashFetcher::finish(Request& request, const std::string& failure) {
  const std::shared_ptr<Fetch> fetch = std::move(request.fetch);
  const std::lock_guard lock(fetch->mutex_);
  if (fetch->failure_.empty()) fetch->failure_ = failure;
  if (--fetch->left_ == 0) fetch->done_.notify_all();
}

void FlashFetcher::run() {
  std::string why = "the model was closed";
  try {
    read();
  } catch (const std::exception& error) {  // of the reader itself: its reads can no longer be waited for
    why = error.what();
  }
  const std::lock_guard lock(mutex_);
  broken_ = why;
  for (Request& request : in_flight_)
    if (request.fetch) finish(request, why);
  for (Request& request : queue_) finish(request, why);
  queue_.clear();
}

void FlashFetcher::read() {
  std::vector<int> free;
  for (int slot = reader_->depth(); slot-- > 0;) free.push_back(slot);
  const size_t depth = free.size();
  std::vector<int> taken;
  while (true) {
    taken.clear();
    {
      std::unique_lock lock(mutex_);
      if (free.size() == depth) wanted_.wait(lock, [&] { return stop_ || !queue_.empty(); });
      if (stop_ && free.size() == depth) return;
      while (!stop_ && !free.empty() && !queue_.empty()) {
        in_flight_[free.back()] = std::move(queue_.front());
        queue_.pop_front();
        taken.push_back(free.back());
        free.pop_back();
      }
    }
    for (int slot : taken) {
      const Piece& piece = in_flight_[slot].piece;
      reader_->submit({files_[piece.file].descriptor(), piece.offset, piece.n_bytes, piece.to, slot});
    }
    const FlashDone done = reader_->wait();
    const auto slot = static_cast<int>(done.id);
    const Piece piece = in_flight_[slot].piece;
    std::string failure;
    if (done.error)
      failure = read_failure(paths_[piece.file], piece.offset, piece.n_bytes,
                             done.error == kFlashShort ? "the file ends before that" : std::strerror(done.error));
    else if (sums_.of)
      failure = check(piece);
    files_[piece.file].forget(piece.offset, piece.n_bytes);
    finish(in_flight_[slot], failure);
    free.push_back(slot);
  }
}

std::string FlashFetcher::check(const Piece& piece) const {
  const int64_t first = piece.offset / kSummedPage, n_pages = piece.n_bytes / kSummedPage;
  const uint32_t* wanted = sums_.of + sums_.first_page[piece.file] + first;
  uint32_t found = 0;
  const int64_t page = first_wrong_page(piece.to, n_pages, wanted, &found);
  if (page == n_pages) return {};
  std::ostringstream what;
  what << std::hex << std::setfill('0') << "their CRC-32C is " << std::setw(8) << found << ", wanted " << std::setw(8)
       << wanted[page];
  return read_failure(paths_[piece.file], piece.offset + page * kSummedPage, kSummedPage, what.str());
}

FlashFetcher::Figures FlashFetcher::figures() const {
  const std::lock_guard lock(mutex_);
  return figures_;
}

bool FlashFetcher::direct() const {
  return std::all_of(files_.begin(), files_.end(), [](const FlashFile& file) { return file.direct(); });
}

}  // namespace elute
