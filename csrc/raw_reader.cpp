#include "raw_reader.h"

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "faulty_reader.h"

namespace elute {
namespace {

[[noreturn]] void fail(const char* what) { throw std::system_error(errno, std::generic_category(), what); }

// Threads that each read one piece at a time.
class PoolReader final : public RawReader {
 public:
  explicit PoolReader(int depth) {
    try {
      for (int i = 0; i < depth; ++i) threads_.emplace_back([this] { work(); });
    } catch (...) {
      stop();
      throw;
    }
  }
  ~PoolReader() override { stop(); }
  std::string_view name() const override { return "pread"; }
  int depth() const override { return static_cast<int>(threads_.size()); }
  void submit(const FlashRead& read) override {
    {
      const std::lock_guard lock(mutex_);
      wanted_.push_back(read);
    }
    wanted_changed_.notify_one();
  }
  RawDone wait() override {
    std::unique_lock lock(mutex_);
    done_changed_.wait(lock, [&] { return !done_.empty(); });
    const RawDone done = done_.front();
    done_.pop_front();
    return done;
  }

 private:
  void work() {
    std::unique_lock lock(mutex_);
    while (true) {
      wanted_changed_.wait(lock, [&] { return stop_ || !wanted_.empty(); });
      if (stop_) return;
      const FlashRead read = wanted_.front();
      wanted_.pop_front();
      lock.unlock();
      const ssize_t n = pread(read.descriptor, read.to, read.n_bytes, read.offset);
      const RawDone done{read.id, n < 0 ? -int64_t{errno} : n};
      lock.lock();
      done_.push_back(done);
      done_changed_.notify_one();
    }
  }
  void stop() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wanted_changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  std::mutex mutex_;
  std::condition_variable wanted_changed_, done_changed_;
  std::deque<FlashRead> wanted_;
  std::deque<RawDone> done_;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

// Linux's rings by their system calls: liburing is not everywhere.
class RingReader final : public RawReader {
 public:
  explicit RingReader(int depth) : depth_(depth) {
    io_uring_params params{};
    ring_ = static_cast<int>(syscall(SYS_io_uring_setup, depth, &params));
    if (ring_ < 0) fail("io_uring_setup");
    try {
      map(params);
    } catch (...) {
      unmap();
      throw;
    }
  }
  // The kernel must not write to memory that is somebody else's by then.
  ~RingReader() override {
    while (in_flight_ > 0) wait();
    unmap();
  }
  std::string_view name() const override { return "io_uring"; }
  int depth() const override { return depth_; }
  void submit(const FlashRead& read) override {
    const unsigned tail = *submit_tail_, at = tail & *submit_mask_;
    io_uring_sqe& entry = entries_[at];
    entry = {};
    entry.opcode = IORING_OP_READ;
    entry.fd = read.descriptor;
    entry.addr = reinterpret_cast<uint64_t>(read.to);
    entry.len = static_cast<unsigned>(read.n_bytes);
    entry.off = static_cast<uint64_t>(read.offset);
    entry.user_data = static_cast<uint64_t>(read.id);
    submit_array_[at] = at;
    std::atomic_ref(*submit_tail_).store(tail + 1, std::memory_order_release);
    enter(1, 0, 0);
    ++in_flight_;
  }
  RawDone wait() override {
    while (true) {
      const unsigned head = *completed_head_;
      if (head == std::atomic_ref(*completed_tail_).load(std::memory_order_acquire)) {
        enter(0, 1, IORING_ENTER_GETEVENTS);
        continue;
      }
      const io_uring_cqe event = completed_[head & *completed_mask_];
      std::atomic_ref(*completed_head_).store(head + 1, std::memory_order_release);
      --in_flight_;
      return {static_cast<int64_t>(event.user_data), event.res};
    }
  }

 private:
  void* map_at(int64_t n_bytes, uint64_t at) {
    void* p = mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, static_cast<off_t>(at));
    if (p == MAP_FAILED) fail("io_uring: mmap");
    mapped_.push_back({p, n_bytes});
    return p;
  }
  void map(const io_uring_params& params) {
    auto* submit = static_cast<uint8_t*>(map_at(params.sq_off.array + params.sq_entries * 4, IORING_OFF_SQ_RING));
    auto* complete =
        static_cast<uint8_t*>(map_at(params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING));
    entries_ = static_cast<io_uring_sqe*>(map_at(params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES));
    submit_tail_ = reinterpret_cast<unsigned*>(submit + params.sq_off.tail);
    submit_mask_ = reinterpret_cast<unsigned*>(submit + params.sq_off.ring_mask);
    submit_array_ = reinterpret_cast<unsigned*>(submit + params.sq_off.array);
    completed_head_ = reinterpret_cast<unsigned*>(complete + params.cq_off.head);
    completed_tail_ = reinterpret_cast<unsigned*>(complete + params.cq_off.tail);
    completed_mask_ = reinterpret_cast<unsigned*>(complete + params.cq_off.ring_mask);
    completed_ = reinterpret_cast<io_uring_cqe*>(complete + params.cq_off.cqes);
  }
  void unmap() {
    for (const auto& [p, n_bytes] : mapped_) munmap(p, n_bytes);
    close(ring_);
  }
  void enter(unsigned n_submit, unsigned n_wait, unsigned flags) {
    while (syscall(SYS_io_uring_enter, ring_, n_submit, n_wait, flags, nullptr, 0) < 0)
      if (errno != EINTR && errno != EAGAIN && errno != EBUSY) fail("io_uring_enter");
  }

  const int depth_;
  int ring_, in_flight_ = 0;
  std::vector<std::pair<void*, int64_t>> mapped_;
  io_uring_sqe* entries_ = nullptr;
  io_uring_cqe* completed_ = nullptr;
  unsigned *submit_tail_ = nullptr, *submit_mask_ = nullptr, *submit_array_ = nullptr;
  unsigned *completed_head_ = nullptr, *completed_tail_ = nullptr, *completed_mask_ = nullptr;
};

}  // namespace

std::unique_ptr<RawReader> open_raw_reader(std::string_view kind, int depth) {
  if (kind.starts_with(kFaulty)) return open_faulty_reader(kind.substr(kFaulty.size()), depth);
  if (kind == "pread") return std::make_unique<PoolReader>(depth);
  if (kind == "io_uring") return std::make_unique<RingReader>(depth);
  if (kind != "auto")
    throw std::invalid_argument("reader: found " + std::string(kind) + ", wanted auto, io_uring or pread");
  try {
    return std::make_unique<RingReader>(depth);
  } catch (const std::system_error&) {  // forbidden here, as in many containers; name() says what is used
    return std::make_unique<PoolReader>(depth);
  }
}

}  // namespace elute
