// Pieces of files that are read when somebody asks for them, while he goes on with something else. Knows no weight.
#pragma once
#include <sys/types.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "flash_reader.h"

namespace elute {

class FlashFetcher {
 public:
  struct Piece {
    int file;
    int64_t offset, n_bytes;  // multiples of kFlashAlignment
    uint8_t* to;              // so aligned, too
  };
  // What the pages of the files must sum to, by crc32c.h: page p of file f to of[first_page[f] + p].
  struct Sums {
    const uint32_t* of = nullptr;  // null: nothing is checked
    std::vector<int64_t> first_page;
  };
  // Pieces that were asked for at once.
  class Fetch {
   public:
    // Blocks until nothing is written to their memory any longer; empty, or why a piece cannot be read. Any thread.
    std::string wait();

   private:
    friend class FlashFetcher;
    std::mutex mutex_;
    std::condition_variable done_;
    int64_t left_ = 0;  // requests
    std::string failure_;
    pid_t process_ = 0;
  };

  // request_bytes: most of one read. Throws as FlashFile and open_flash_reader do.
  FlashFetcher(const std::vector<std::string>& paths, std::string_view reader, int depth, int64_t request_bytes, bool direct,
               Sums sums);
  // Ends the reads that are under way; those that were not begun fail.
  ~FlashFetcher();
  FlashFetcher(const FlashFetcher&) = delete;
  FlashFetcher& operator=(const FlashFetcher&) = delete;

  // Never waits for the disk. The pieces' memory must outlive the fetch's wait(). Throws std::runtime_error in a forked child
  // and after the reader itself has failed. Any thread.
  std::shared_ptr<Fetch> begin(const std::vector<Piece>& pieces);
  struct Figures {
    int64_t read_bytes = 0, requests = 0;  // asked for so far
  };
  Figures figures() const;
  std::string_view reader() const { return reader_->name(); }
  bool direct() const;

 private:
  struct Request {
    Piece piece;
    std::shared_ptr<Fetch> fetch;
  };
  void run();
  void read();
  std::string check(const Piece& piece) const;
  static void finish(Request& request, const std::string& failure);

  const std::vector<std::string> paths_;
  const int64_t request_bytes_;
  const Sums sums_;
  const pid_t process_;  // that has the threads
  std::vector<FlashFile> files_;
  std::unique_ptr<FlashReader> reader_;
  mutable std::mutex mutex_;  // of what follows
  std::condition_variable wanted_;
  std::deque<Request> queue_;
  Figures figures_;
  bool stop_ = false;
  std::string broken_;  // why the reader can be asked no more
  std::vector<Request> in_flight_;  // by slot; the reading thread's alone
  std::thread thread_;  // last
};

}  // namespace elute
