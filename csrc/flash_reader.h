// Positioned reads from files past the page cache, several in flight: mechanism only, no policy.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace elute {

constexpr int64_t kFlashAlignment = 4096;  // of offsets, sizes and memory: what O_DIRECT asks for on common devices

// A file that is read. direct: past the page cache; where the file system refuses that, through it, and what was read is
// dropped from it again.
class FlashFile {
 public:
  // Throws std::system_error with the path.
  explicit FlashFile(const std::string& path, bool direct = true);
  ~FlashFile();
  FlashFile(FlashFile&& other) noexcept;
  FlashFile& operator=(FlashFile&&) = delete;
  int descriptor() const { return descriptor_; }
  bool direct() const { return direct_; }
  void forget(int64_t offset, int64_t n_bytes) const;  // what a read through the page cache left there

 private:
  int descriptor_;
  bool direct_;
};

struct FlashRead {
  int descriptor;
  int64_t offset, n_bytes;  // multiples of kFlashAlignment
  uint8_t* to;              // so aligned, too
  int64_t id;               // the caller's own
};

struct FlashDone {
  int64_t id;
  int error;  // 0, an errno, or kFlashShort
};
constexpr int kFlashShort = -1;  // the file ended before the read did

// Not thread-safe: one thread submits and waits.
class FlashReader {
 public:
  virtual ~FlashReader() = default;
  virtual std::string_view name() const = 0;
  virtual int depth() const = 0;  // most reads in flight
  // One read more; fewer than depth() must be in flight.
  virtual void submit(const FlashRead& read) = 0;
  // Blocks until one of those in flight is done.
  virtual FlashDone wait() = 0;
};

// kind: "io_uring", "pread" (as many threads as depth), or "auto": io_uring where the system allows it. Throws
// std::system_error where it does not, std::invalid_argument for another kind.
std::unique_ptr<FlashReader> open_flash_reader(std::string_view kind, int depth);

// The sentence for a read of weights that failed.
std::string read_failure(const std::string& path, int64_t offset, int64_t n_bytes, const std::string& what);

}  // namespace elute
