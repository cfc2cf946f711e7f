#include "read_timing.h"

#include <chrono>

namespace elute {

ReadTimes time_reads(const FlashFile& file, FlashReader& reader, const std::vector<int64_t>& offsets, int64_t n_bytes,
                     uint8_t* memory, double budget_s) {
  using Clock = std::chrono::steady_clock;
  ReadTimes times;
  std::vector<int64_t> asked(reader.depth());
  const Clock::time_point started = Clock::now();
  const auto elapsed = [&] { return std::chrono::duration<double>(Clock::now() - started).count(); };
  size_t next = 0;
  const auto submit = [&](int64_t slot) {
    asked[slot] = offsets[next++ % offsets.size()];
    reader.submit({file.descriptor(), asked[slot], n_bytes, memory + slot * n_bytes, slot});
  };
  int in_flight = 0;
  for (; in_flight < reader.depth(); ++in_flight) submit(in_flight);
  while (in_flight > 0) {
    const FlashDone done = reader.wait();
    ++times.n_reads;
    if (done.error && !times.error) {
      times.error = done.error;
      times.offset = asked[done.id];
    }
    file.forget(asked[done.id], n_bytes);
    if (times.error || elapsed() >= budget_s)
      --in_flight;
    else
      submit(done.id);
  }
  times.seconds = elapsed();
  return times;
}

}  // namespace elute
