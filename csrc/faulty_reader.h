// A disk that misbehaves by a schedule, over one that does not: for tests of what reads weights. Nothing but the name of a
// reader chooses it, and no option of a command or of load() takes one.
#pragma once
#include <memory>
#include <string_view>

#include "raw_reader.h"

namespace elute {

constexpr std::string_view kFaulty = "faulty:";

// text: the reader below, then faults, separated by blanks: "pread seed=3 slow=10 eio@12 late%50"
//   seed=N    of all that is left to chance (1)
//   slow=N    a read takes N times as long
//   eio       the read fails with EIO, and reads nothing
//   again     the read fails with EAGAIN, and reads nothing
//   short     the read ends after half of its pages, if it has more than one
//   flip      one bit of what was read is another
//   late      what is done comes back later than others that were asked for after it
//   full      to ask for the read waits until one in flight is done
// eio to full are followed by @N, the N-th read from 1 alone, or %P, each read with a chance of P in 100.
// Throws std::invalid_argument for another text, and as open_raw_reader does.
std::unique_ptr<RawReader> open_faulty_reader(std::string_view text, int depth);

}  // namespace elute
