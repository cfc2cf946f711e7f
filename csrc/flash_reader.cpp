#include "flash_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>
#include <utility>
#include <vector>

#include "raw_reader.h"

namespace elute {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::system_error(errno, std::generic_category(), what); }

// Whether the file takes reads aligned to kFlashAlignment directly. A kernel that cannot say (before 6.1) is believed.
bool takes_aligned_reads(int descriptor) {
#ifdef STATX_DIOALIGN
  struct statx about{};
  if (statx(descriptor, "", AT_EMPTY_PATH, STATX_DIOALIGN, &about) != 0) return true;
  if (!(about.stx_mask & STATX_DIOALIGN)) return true;
  return about.stx_dio_offset_align != 0 && kFlashAlignment % about.stx_dio_offset_align == 0 &&
         kFlashAlignment % about.stx_dio_mem_align == 0;
#else
  (void)descriptor;
  return true;
#endif
}

// Goes on with what was cut short or interrupted.
class WholeReader final : public FlashReader {
 public:
  explicit WholeReader(std::unique_ptr<RawReader> raw) : raw_(std::move(raw)), left_(raw_->depth()) {
    for (int slot = depth(); slot-- > 0;) free_.push_back(slot);
  }
  std::string_view name() const override { return raw_->name(); }
  int depth() const override { return static_cast<int>(left_.size()); }
  void submit(const FlashRead& read) override {
    const int slot = free_.back();
    free_.pop_back();
    left_[slot] = read;
    go_on(slot);
  }
  FlashDone wait() override {
    while (true) {
      const auto [slot, result] = raw_->wait();
      FlashRead& left = left_[slot];
      const bool again = result == -EINTR || result == -EAGAIN;
      if (again || (result > 0 && result < left.n_bytes && result % kFlashAlignment == 0)) {
        const int64_t n_bytes = again ? 0 : result;
        left.to += n_bytes;
        left.offset += n_bytes;
        left.n_bytes -= n_bytes;
        go_on(static_cast<int>(slot));
        continue;
      }
      free_.push_back(static_cast<int>(slot));
      // Files stop a read elsewhere than at a page only at their end.
      return {left.id, result < 0 ? static_cast<int>(-result) : result < left.n_bytes ? kFlashShort : 0};
    }
  }

 private:
  void go_on(int slot) {
    FlashRead read = left_[slot];
    read.id = slot;
    raw_->submit(read);
  }

  const std::unique_ptr<RawReader> raw_;
  std::vector<FlashRead> left_;  // of the reads in flight
  std::vector<int> free_;
};

}  // namespace

FlashFile::FlashFile(const std::string& path, bool direct) : descriptor_(-1), direct_(direct) {
  if (direct_) descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
  if (descriptor_ >= 0 && !takes_aligned_reads(descriptor_)) {
    close(descriptor_);
    descriptor_ = -1;
  }
  if (descriptor_ >= 0) return;
  direct_ = false;
  descriptor_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor_ < 0) fail(path);
  posix_fadvise(descriptor_, 0, 0, POSIX_FADV_RANDOM);  // no readahead: the window is ours
}
FlashFile::~FlashFile() {
  if (descriptor_ >= 0) close(descriptor_);
}
FlashFile::FlashFile(FlashFile&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), direct_(other.direct_) {}
void FlashFile::forget(int64_t offset, int64_t n_bytes) const {
  if (!direct_) posix_fadvise(descriptor_, offset, n_bytes, POSIX_FADV_DONTNEED);
}

std::unique_ptr<FlashReader> open_flash_reader(std::string_view kind, int depth) {
  return std::make_unique<WholeReader>(open_raw_reader(kind, depth));
}

std::string read_failure(const std::string& path, int64_t offset, int64_t n_bytes, const std::string& what) {
  return path + ": cannot read " + std::to_string(n_bytes) + " bytes from byte " + std::to_string(offset) + " (" + what +
         "); run elute verify " + path.substr(0, path.find_last_of('/')) +
         " to see what is damaged, check the disk, or convert the model again";
}

}  // namespace elute
