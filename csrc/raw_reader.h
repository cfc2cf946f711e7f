// Positioned reads as the system gives them, several in flight: a read may come back short, interrupted or with an error.
// flash_reader.h makes whole reads of them.
#pragma once
#include <cstdint>
#include <memory>
#include <string_view>

#include "flash_reader.h"

namespace elute {

struct RawDone {
  int64_t id;
  int64_t result;  // bytes, or -errno
};

// Not thread-safe. When it is destroyed nothing writes to memory any longer.
class RawReader {
 public:
  virtual ~RawReader() = default;
  virtual std::string_view name() const = 0;
  virtual int depth() const = 0;  // most reads in flight
  virtual void submit(const FlashRead& read) = 0;  // fewer than depth() must be in flight
  virtual RawDone wait() = 0;                      // blocks until one of those in flight is done
};

// kind: as of open_flash_reader, which throws the same.
std::unique_ptr<RawReader> open_raw_reader(std::string_view kind, int depth);

}  // namespace elute
