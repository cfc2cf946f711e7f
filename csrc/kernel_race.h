// Times lookup against multiply on one thread, so that this machine decides which one multiplies how many rows.
#pragma once
#include <vector>

#include "dispatch.h"

namespace elute {

// Seconds [round][i][2] that rows[i] rows of activations took, quantization included: by lookup, by multiply. The two
// take turns and go through more bytes than a second-level cache holds. Rounds fill budget_s; there are at least 5.
// Random codes in symmetric groups of 32; rows: at least one, each at least 1; bits 1 to 8.
std::vector<double> race_seconds(const KernelTable& kernels, int bits, const std::vector<int>& rows, double budget_s);

}  // namespace elute
