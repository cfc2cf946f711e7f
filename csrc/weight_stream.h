// Weights that do not fit memory pass through a window: read ahead in the order in which a forward uses them, forward
// after forward, each into its fixed place as soon as what lay there has been used. Knows no layer and no kernel.
#pragma once
#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "flash_reader.h"

namespace elute {

class WeightStream {
 public:
  // The planes of a matrix: where they are in a file, and where in the window they go.
  struct Piece {
    int file;
    int64_t offset, n_bytes, at;  // multiples of kFlashAlignment
  };
  // What happened, for who draws it; times of std::chrono::steady_clock.
  enum class EventKind : int64_t { kRead, kWait, kRelease };
  struct Event {
    EventKind kind;
    int64_t sequence;  // pass * n_pieces + piece: the piece that was read, or the last one that was waited for or released
    int64_t start_ns, end_ns;  // of a read: submitted, done; of a release: the same
  };
  struct Figures {
    int64_t read_bytes = 0;
    double waited_s = 0;  // of the first thread, for pieces that were not there yet
  };

  // What the pages of the files must sum to, by crc32c.h: page p of file f to of[first_page[f] + p].
  struct Sums {
    const uint32_t* of = nullptr;  // null: nothing is checked
    std::vector<int64_t> first_page;
  };

  // window: kFlashAlignment-aligned, of window_bytes, this stream's alone and longer-lived, as are the sums. pieces: in the
  // order of use; those of one use must not overlap. request_bytes: most of one read. Throws as FlashFile and
  // open_flash_reader do.
  WeightStream(const std::vector<std::string>& paths, std::vector<Piece> pieces, uint8_t* window, std::string_view reader,
               int depth, int64_t request_bytes, bool direct, Sums sums);
  ~WeightStream();
  WeightStream(const WeightStream&) = delete;
  WeightStream& operator=(const WeightStream&) = delete;

  int n_pieces() const { return static_cast<int>(pieces_.size()); }

  // Returns when the pieces before `end` of pass number `pass` are in the window, or the stream has failed. Any thread.
  void wait(int64_t pass, int end);
  // Says that those pieces may be overwritten. Any thread, in any order: what is past already changes nothing.
  void release(int64_t pass, int end);

  // Empty, or why pieces cannot be read; from then on what wait() returned to is not to be used.
  std::string failure() const;
  Figures figures() const;
  // The last kEvents events, oldest first. What is being written at that moment is left out.
  std::vector<Event> events() const;
  // Takes the pieces in turn without any work on them, and returns the seconds of a pass: what reading alone takes.
  double read_through(int64_t first_pass, int passes);
  std::string_view reader() const { return reader_->name(); }
  bool direct() const;

 private:
  static constexpr int64_t kEvents = 8192;  // some ten tokens of a 7B model; 320 KB
  // Fields of an event, and last its number + 1, which a writer clears first: a reader sees whole events or none.
  struct Slot {
    std::atomic<int64_t> kind{0}, sequence{0}, start_ns{0}, end_ns{0}, number{0};
  };
  void note(EventKind kind, int64_t sequence, int64_t start_ns, int64_t end_ns);
  void run();
  void read_ahead();
  bool may_read(int64_t sequence) const;
  void fail(const std::string& what);
  // A read in flight: `n_bytes` of a piece from its byte `at`.
  struct Request {
    int64_t sequence, at, n_bytes;
  };
  void check(const Request& request);
  std::string where(const Request& request, const std::string& what) const;

  const std::vector<std::string> paths_;
  const std::vector<Piece> pieces_;
  std::vector<int> distance_;  // how many pieces before it the last one lies that shares its place: 1 to n_pieces
  uint8_t* const window_;
  const int64_t request_bytes_;
  const Sums sums_;
  const pid_t process_;  // that has the threads
  std::vector<FlashFile> files_;
  std::unique_ptr<FlashReader> reader_;

  // Pieces are counted on over all passes: sequence = pass * n_pieces + piece.
  alignas(64) std::atomic<int64_t> loaded_{0};    // all before it are in the window
  alignas(64) std::atomic<int64_t> released_{0};  // all before it may be overwritten
  std::atomic<bool> stop_{false}, failed_{false};
  std::string failure_;  // written before failed_
  std::atomic<int64_t> read_bytes_{0}, waited_ns_{0};
  std::unique_ptr<Slot[]> slots_{new Slot[kEvents]};
  std::atomic<int64_t> noted_{0};
  std::thread thread_;  // last
};

}  // namespace elute
