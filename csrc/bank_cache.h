// Weights of which each forward needs only some: kept in banks of equal blocks, of which those that are used most stay in
// memory and the others are read when they are wanted. Knows no layer, no kernel and no token.
#pragma once
#include <sys/types.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "flash_reader.h"

namespace elute {

// Where predictions come from. None changes a bit of what is computed: what was not predicted is read on demand.
enum class Predictor { none, model, random, inverse };

class BankCache {
 public:
  // Rows lie behind one another in blocks, rows_per_block in each but the last.
  struct Bank {
    int file;
    int64_t offset;       // of block 0, in the file; all in multiples of kFlashAlignment
    int64_t block_bytes;
    int64_t row_bytes;
    int n_rows, rows_per_block;
    int n_slots;          // blocks that may stay
    const uint8_t* resident = nullptr;  // block 0 in memory, where all of them are; nothing is read

    int n_blocks() const { return (n_rows + rows_per_block - 1) / rows_per_block; }
  };
  // The n-th time that a forward wants rows.
  struct Use {
    int bank;
    int like;  // an earlier use, whose rows of this forward predict this one's; itself: those of the forward before
  };
  struct Options {
    std::string_view reader;
    int depth;
    int64_t request_bytes;  // most of one read
    int64_t gap_bytes;      // unwanted bytes between wanted ones that cost less to read than a second request
    bool direct;
    Predictor predictor;
    // What the pages of the files must sum to, by crc32c.h: page p of file f to sums[first_page[f] + p]; null: nothing is
    // checked. Outlives the cache.
    const uint32_t* sums = nullptr;
    std::vector<int64_t> first_page = {};
  };
  struct Figures {
    int64_t read_bytes = 0, wanted_bytes = 0, requests = 0;  // wanted: of blocks that were not there
    int64_t blocks = 0, cached = 0, predicted = 0, missed = 0;  // that were wanted; of these: in a slot, read ahead, neither
    int64_t predicted_reads = 0;                                // blocks that were read ahead
    double waited_s = 0;                                        // of all threads, for what was missed
  };

  // paths: of files; none where all banks are resident. slots: memory of slots_bytes(banks); staging: two halves of half_bytes, for what is in use and what is read ahead, each
  // at least least_half(banks). Both kFlashAlignment-aligned, this cache's alone and longer-lived.
  // Throws as FlashFile and open_flash_reader do.
  BankCache(const std::vector<std::string>& paths, std::vector<Bank> banks, std::vector<Use> uses, uint8_t* slots,
            uint8_t* staging, int64_t half_bytes, const Options& options);
  ~BankCache();
  BankCache(const BankCache&) = delete;
  BankCache& operator=(const BankCache&) = delete;

  static int64_t slots_bytes(const std::vector<Bank>& banks);
  static int64_t least_half(const std::vector<Bank>& banks);

  // Returns when the wanted rows of use `use` of forward number `forward` are in memory, or reading has failed: rows(bank)
  // then says where, until the next use's demand returns. wanted: bit r % 64 of word r / 64; null: all. Any thread, all
  // with the same arguments; who comes late finds it done. Forwards count from 0 and use the uses in order.
  // ahead: what the next use, of as many rows, will probably want; null: as its Use says.
  void demand(int64_t forward, int use, const uint64_t* wanted, const uint64_t* ahead = nullptr);
  // Where rows(bank)[row] points before the row was wanted; a whole row may be read there.
  const uint8_t* placeholder() const { return staging_; }
  const uint8_t* const* rows(int bank) const { return states_[bank].rows.data(); }

  // What was used often so far no longer counts. Between forwards.
  void forget();

  // Keeps present() from now on, or no longer. Between forwards.
  void keep_present(bool on);
  // The rows that a use finds in memory, or read ahead for it: bit r % 64 of word r / 64. Of the use that is next from the time
  // that the demand before it returned; of others, what they found last.
  const std::vector<uint64_t>& present(int use) const { return present_[use]; }

  std::string failure() const { return failed_.load(std::memory_order_acquire) ? failure_ : std::string(); }
  Figures figures() const;  // between forwards
  // What happened of late, oldest first, as WeightStream::Event: kind, sequence (forward * n_uses + use), start, end in ns.
  // Between forwards.
  std::vector<std::array<int64_t, 4>> events() const;
  // The rows that a use wanted last, as bits. Between forwards.
  const std::vector<uint64_t>& last(int use) const { return last_[use]; }
  std::string_view reader() const { return reader_ ? reader_->name() : "none"; }
  bool direct() const;
  bool reads() const { return reader_ != nullptr; }  // not all banks are resident
  int n_uses() const { return static_cast<int>(uses_.size()); }
  const Bank& bank(int i) const { return banks_[i]; }
  int n_banks() const { return static_cast<int>(banks_.size()); }
  const Use& use(int i) const { return uses_[i]; }

 private:
  static constexpr int kNowhere = -1;
  static constexpr size_t kAllRuns = SIZE_MAX;
  struct State {
    std::vector<const uint8_t*> rows;
    std::vector<int> slot_of;       // [block], or kNowhere
    std::vector<int> block_in;      // [slot], or kNowhere
    std::vector<uint32_t> count;    // [block], uses
    uint8_t* slots;
    int n_free;
  };
  // What lies in a half of the staging memory: blocks of one bank, for one use.
  struct Half {
    int64_t sequence = -1;          // forward * n_uses + use that it is for
    int bank = -1;
    int64_t used = 0;               // bytes
    std::vector<int64_t> at;        // [block], or kNowhere
    std::vector<int> blocks;        // in the order in which they were put there
    std::vector<uint8_t> ahead;     // [block] whether it was predicted
  };
  struct Run {
    int first, last;  // blocks
  };

  void fill(int64_t sequence, int use, const uint64_t* wanted, const uint64_t* ahead);
  void wanted_blocks(int bank, const uint64_t* wanted);
  void take(Half& half, int64_t sequence, int bank);
  void plan_reads(Half& half, int bank, bool ahead, size_t most_runs);
  void submit(const Run& run, const Half& half);
  uint8_t* memory(const Half& half) const { return staging_ + (&half == &halves_[1] ? half_bytes_ : 0); }
  void reap();
  void check(const FlashRead& read, int file);
  std::string where(const FlashRead& read, int file, const std::string& what) const;
  void admit(const Half& half);
  void place(const Half& half, int bank);
  void predict(int64_t sequence, int use, const uint64_t* ahead);
  void find_present(int64_t sequence);
  void note(int kind, int64_t sequence, int64_t start_ns, int64_t end_ns);
  void fail(const std::string& what);

  const std::vector<std::string> paths_;
  const std::vector<Bank> banks_;
  const std::vector<Use> uses_;
  uint8_t* const staging_;
  const int64_t half_bytes_, request_bytes_, gap_bytes_;
  const Predictor predictor_;
  const pid_t process_;
  std::vector<FlashFile> files_;
  std::unique_ptr<FlashReader> reader_;
  std::vector<State> states_;
  std::vector<std::vector<uint64_t>> last_;  // [use], words of rows
  std::vector<std::vector<uint64_t>> present_;  // the same; of no words unless it is kept
  bool keeps_present_ = false;
  Half halves_[2];
  int in_flight_ = 0;
  struct Pending {
    FlashRead read;
    int file;
  };
  std::vector<Pending> pending_;     // by id
  std::vector<int> free_ids_;
  const uint32_t* const sums_;
  const std::vector<int64_t> first_page_;
  std::vector<Run> runs_;            // to be read
  std::vector<int> blocks_;          // that are wanted
  std::vector<int> order_, victims_; // of admission
  std::mt19937_64 random_{1};
  static constexpr size_t kEvents = 8192;
  std::vector<std::array<int64_t, 4>> events_;  // a ring
  size_t next_event_ = 0;
  int64_t first_read_ns_ = 0;                   // of the reads for the use that is next
  Figures figures_;                   // of the thread that claims a use
  std::atomic<int64_t> waited_ns_{0};  // of the others
  std::string failure_;
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<int64_t> claimed_{-1};  // the last sequence that a thread has begun
  alignas(64) std::atomic<int64_t> ready_{-1};    // and the last that is done
};

}  // namespace elute
