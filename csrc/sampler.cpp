#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <utility>

namespace elute {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Below it std::sort is faster than three passes with their 2048 counters; both sort alike.
constexpr int64_t kRadixFrom = 2048;
constexpr int64_t kFirstNucleus = 64;  // tokens of the first attempt at top-p; 95 % of a chat model's mass is in fewer
constexpr int64_t kExactMasses = 1 << 19;  // so many masses have an exact sum in any order (FloatKernels::masses)
constexpr int kBuckets = 1 << 12;          // their sums fill 32 KB; of 60k tokens some 15 share one
constexpr int kBelow = 16;  // buckets more, for what is in none: additions to one and the same wait for each other
constexpr int kDigitBits = 11, kDigits = 3;  // 33 bits: the 32 of a logit

// Floats in descending order as ascending integers, above the id.
//   bits of x      sign   key
//   0x7f7fffff     +      0x00800000   the largest first
//   0x00000000     +      0x7fffffff
//   0x80000001     -      0x80000001   -0 is made +0, so that equals are equal
//   0xff7fffff     -      0xff7fffff
uint64_t rank_key(float x, int64_t id) {
  const float positive_zero = x + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, 4);
  const uint32_t descending = bits >> 31 ? bits : 0x7fffffffu - bits;
  return uint64_t{descending} << 32 | static_cast<uint32_t>(id);
}
int32_t id_of(uint64_t key) { return static_cast<int32_t>(key); }

// Stable, by the upper half of the keys, which come in order of their lower one.
void radix_sort(std::unique_ptr<uint64_t[]>& keys, std::unique_ptr<uint64_t[]>& spare, int64_t n) {
  constexpr uint32_t kMask = (1u << kDigitBits) - 1;
  std::vector<uint32_t> starts(kDigits << kDigitBits);
  const auto digit = [](uint64_t key, int d) { return static_cast<uint32_t>(key >> (32 + d * kDigitBits)) & kMask; };
  for (int64_t i = 0; i < n; ++i)
    for (int d = 0; d < kDigits; ++d) ++starts[(d << kDigitBits) + digit(keys[i], d)];
  for (int d = 0; d < kDigits; ++d) {
    uint32_t* start = starts.data() + (d << kDigitBits);
    uint32_t before = 0;
    for (uint32_t v = 0; v <= kMask; ++v) before += std::exchange(start[v], before);
    for (int64_t i = 0; i < n; ++i) spare[start[digit(keys[i], d)]++] = keys[i];
    std::swap(keys, spare);
  }
}

// The least float that is not below x, which is finite or -infinity and below the largest float.
float round_up(double x) {
  const float near = static_cast<float>(x);
  return near < x ? std::nextafter(near, std::numeric_limits<float>::infinity()) : near;
}

// The place of `uniform` in masses that sum to `total`: never the end itself, which a product may round to.
double place(double uniform, double total) { return std::min(uniform * total, std::nextafter(total, 0.0)); }

}  // namespace

Sampler::Sampler(const FloatKernels& kernels, int vocabulary, const Filters& filters, const Penalties& penalties)
    : kernels_(kernels),
      n_(vocabulary),
      n_blocks_((n_ + kPeakBlock - 1) / kPeakBlock),
      filters_(filters),
      penalties_(penalties),
      peaks_(n_blocks_),
      sums_(n_blocks_) {}

void Sampler::add_bias(int32_t id, float bias) { change_of(id).bias = bias; }

void Sampler::add_prompt(const int32_t* ids, int64_t n) {
  if (penalties_.repetition == 1) return;
  for (int64_t i = 0; i < n; ++i) change_of(ids[i]).seen = true;
}

Sampler::Change& Sampler::change_of(int32_t id) {
  const auto [found, is_new] = change_at_.try_emplace(id, changes_.size());
  if (is_new) changes_.push_back({id, 0, false, 0});
  return changes_[found->second];
}

float Sampler::changed(float x, const Change& change) const {
  const Penalties& p = penalties_;
  if (change.seen) x = x > 0 ? x / p.repetition : x * p.repetition;
  if (change.count) x -= static_cast<float>(p.presence + p.frequency * change.count);
  x += change.bias;
  constexpr float kLargest = std::numeric_limits<float>::max();
  return std::clamp(x, -kLargest, kLargest);
}

int Sampler::choose(const float* logits, double uniform) {
  if (!kernels_.block_peaks(logits, n_, peaks_.data())) return -1;
  const int token = choose_unchanged(changes_.empty() ? logits : with_changes(logits), uniform);
  if (penalties_.repetition != 1 || penalties_.presence != 0 || penalties_.frequency != 0) {
    Change& change = change_of(token);
    ++change.count;
    change.seen = true;
  }
  return token;
}

// A copy of the logits, changed; peaks_ become those of the copy.
const float* Sampler::with_changes(const float* logits) {
  if (!changed_) changed_ = std::make_unique_for_overwrite<float[]>(n_);
  std::copy_n(logits, n_, changed_.get());
  for (const Change& change : changes_) {
    float& logit = changed_[change.id];
    float& peak = peaks_[change.id / kPeakBlock];
    const bool was_peak = logit == peak;
    logit = changed(logit, change);
    if (was_peak && logit < peak) {
      const int64_t begin = change.id / kPeakBlock * kPeakBlock;
      kernels_.block_peaks(changed_.get() + begin, std::min<int64_t>(kPeakBlock, n_ - begin), &peak);
    } else {
      peak = std::max(peak, logit);
    }
  }
  return changed_.get();
}

int Sampler::choose_unchanged(const float* logits, double uniform) {
  const float peak = *std::max_element(peaks_.begin(), peaks_.end());
  if (filters_.top_k && filters_.top_k < n_) return choose_of_top_k(logits, peak, uniform);
  if (filters_.top_p >= 1 && filters_.gap == -kInfinity) return choose_by_id(logits, peak, uniform);
  return choose_of_all(logits, peak, uniform);
}

// The k-th largest peak: at least k logits are not below it. -infinity when there are fewer blocks.
float Sampler::kth_peak(int64_t k) {
  if (k > n_blocks_) return -std::numeric_limits<float>::infinity();
  selection_ = peaks_;
  std::nth_element(selection_.begin(), selection_.begin() + (k - 1), selection_.end(), std::greater<>());
  return selection_[k - 1];
}

double Sampler::total_mass(const float* logits, float peak, float inverse_temperature) {
  kernels_.block_masses(logits, n_, peak, inverse_temperature, sums_.data());
  double total = 0;
  for (double sum : sums_) total += sum;
  return total;
}

int Sampler::choose_by_id(const float* logits, float peak, double uniform) {
  const double at = place(uniform, total_mass(logits, peak, filters_.inverse_temperature));
  // `at` is below the total; the ends are watched for vocabularies whose sums are not exact.
  double sum = 0;
  int64_t block = 0;
  while (block + 1 < n_blocks_ && sum + sums_[block] <= at) sum += sums_[block++];
  const int64_t begin = block * kPeakBlock, n = std::min<int64_t>(kPeakBlock, n_ - begin);
  float masses[kPeakBlock];
  kernels_.masses(logits + begin, n, peak, filters_.inverse_temperature, masses);
  int64_t i = 0;
  for (sum += masses[0]; i + 1 < n && sum <= at; sum += masses[i]) ++i;
  return static_cast<int>(begin + i);
}

// Ranks all tokens whose logits are at least `least`.
void Sampler::rank(const float* logits, float least) {
  if (!keys_) keys_ = std::make_unique_for_overwrite<uint64_t[]>(n_);
  int64_t n = 0;
  for (int64_t block = 0; block < n_blocks_; ++block) {
    if (peaks_[block] < least) continue;
    const int64_t end = std::min(n_, (block + 1) * kPeakBlock);
    for (int64_t i = block * kPeakBlock; i < end; ++i) {
      keys_[n] = rank_key(logits[i], i);  // always written: which ones stay cannot be predicted
      n += logits[i] >= least;
    }
  }
  sort_keys(logits, n);
}

// The first n of keys_, and their logits.
void Sampler::sort_keys(const float* logits, int64_t n) {
  if (n < kRadixFrom) {
    std::sort(keys_.get(), keys_.get() + n);
  } else {
    if (!spare_) spare_ = std::make_unique_for_overwrite<uint64_t[]>(n_);
    radix_sort(keys_, spare_, n);
  }
  values_.resize(n);
  for (int64_t i = 0; i < n; ++i) values_[i] = logits[id_of(keys_[i])];
  n_ranked_ = n;
}

// Gives the first n of the ranked their masses.
void Sampler::weigh(int64_t n, float peak) {
  masses_.resize(n);
  kernels_.masses(values_.data(), n, peak, filters_.inverse_temperature, masses_.data());
}

// Of those with a mass, how many have less than `wanted` before them and a logit of at least `floor`; at least 1.
int64_t Sampler::nucleus(double wanted, float floor) const {
  const int64_t n = static_cast<int64_t>(masses_.size());
  double before = masses_[0];
  int64_t kept = 1;
  while (kept < n && before < wanted && values_[kept] >= floor) before += masses_[kept++];
  return kept;
}

int Sampler::draw(int64_t kept, double uniform) const {
  double total = 0;
  for (int64_t i = 0; i < kept; ++i) total += masses_[i];
  const double at = place(uniform, total);
  int64_t i = 0;
  for (double sum = masses_[0]; sum <= at; sum += masses_[i]) ++i;
  return id_of(keys_[i]);
}

int Sampler::choose_of_top_k(const float* logits, float peak, double uniform) {
  rank(logits, kth_peak(filters_.top_k));
  weigh(filters_.top_k, peak);
  double wanted = kInfinity;
  if (filters_.top_p < 1) {
    double total = 0;
    for (float mass : masses_) total += mass;
    wanted = filters_.top_p * total;
  }
  return draw(nucleus(wanted, round_up(peak + filters_.gap)), uniform);
}

// Cuts the logits from `least` to the peak into buckets of equal width and sums the masses of each. A bucket's place
// cannot fall as a logit does, rounded as it is: each step to it is monotone.
void Sampler::fill_buckets(const float* logits, float peak, float least) {
  if (!bucket_of_) bucket_of_ = std::make_unique_for_overwrite<uint16_t[]>(n_blocks_ * kPeakBlock);
  bucket_masses_.assign(kBuckets + kBelow, 0);
  const double width = (double{peak} - least) / kBuckets;
  const float scale = width > 1e-30 ? static_cast<float>(1 / width) : 0;  // 0: all in one
  constexpr float kLast = kBuckets - 1;
  float masses[kPeakBlock];
  for (int64_t block = 0; block < n_blocks_; ++block) {
    if (peaks_[block] < least) continue;
    const int64_t begin = block * kPeakBlock, n = std::min<int64_t>(kPeakBlock, n_ - begin);
    uint16_t* bucket = bucket_of_.get() + begin;
    const float* x = logits + begin;
    kernels_.masses(x, n, peak, filters_.inverse_temperature, masses);
    // No branches: which logits are below cannot be predicted.
    for (int64_t i = 0; i < n; ++i) {
      const float at = (peak - x[i]) * scale;
      const int inside = static_cast<int>(at < kLast ? at : kLast), below = kBuckets + static_cast<int>(i % kBelow);
      const int is_below = -static_cast<int>(x[i] < least);
      bucket[i] = static_cast<uint16_t>((inside & ~is_below) | (below & is_below));
    }
    for (int64_t i = 0; i < n; ++i) bucket_masses_[bucket[i]] += masses[i];
  }
}

// Ranks the tokens of one bucket and gives them their masses.
void Sampler::rank_bucket(const float* logits, float peak, float least, uint16_t bucket) {
  int64_t n = 0;
  for (int64_t block = 0; block < n_blocks_; ++block) {
    if (peaks_[block] < least) continue;
    const int64_t begin = block * kPeakBlock, end = std::min(n_, begin + kPeakBlock);
    const uint16_t* bucket_of = bucket_of_.get();
    uint16_t found = 0;  // as wide as what is compared: one vector of 8
    for (int64_t i = begin; i < end; ++i) found += bucket_of[i] == bucket;
    if (!found) continue;
    for (int64_t i = begin; i < end; ++i)
      if (bucket_of[i] == bucket) keys_[n++] = rank_key(logits[i], i);
  }
  sort_keys(logits, n);
  weigh(n, peak);
}

// The same as ranking all logits from `least` on, which a large nucleus makes dear: sums of masses are exact, so that
// only the buckets where the nucleus ends and where the draw falls need an order. -1: the nucleus goes on below `least`,
// which is not `last`.
int Sampler::choose_of_buckets(const float* logits, float peak, double uniform, double wanted, float least, bool last) {
  fill_buckets(logits, peak, least);
  double kept = 0;
  uint16_t end = 0;
  while (end < kBuckets && kept + bucket_masses_[end] < wanted) kept += bucket_masses_[end++];
  if (end == kBuckets && !last) return -1;
  if (end < kBuckets) {
    rank_bucket(logits, peak, least, end);
    int64_t i = 0;
    do kept += masses_[i++];
    while (i < n_ranked_ && kept < wanted);
  }
  const double at = place(uniform, kept);
  double sum = 0;  // `at` is below what is kept: its bucket is none behind `end`
  uint16_t bucket = 0;
  while (sum + bucket_masses_[bucket] <= at) sum += bucket_masses_[bucket++];
  if (bucket != end) rank_bucket(logits, peak, least, bucket);
  int64_t i = 0;
  for (sum += masses_[0]; sum <= at; sum += masses_[i]) ++i;
  return id_of(keys_[i]);
}

int Sampler::choose_of_all(const float* logits, float peak, double uniform) {
  const float floor = round_up(peak + filters_.gap);
  if (filters_.top_p >= 1) {
    rank(logits, floor);
    weigh(n_ranked_, peak);
    return draw(n_ranked_, uniform);
  }
  const double total = total_mass(logits, peak, filters_.inverse_temperature);
  // The nucleus is mostly among the first few. If not, it has no token with less than an equal share of the mass that
  // it leaves out. That threshold is rounded; all tokens are enough for certain.
  const double share = std::log((1 - filters_.top_p) * total / static_cast<double>(n_));
  const float attempts[] = {kth_peak(std::min(kFirstNucleus, n_blocks_)),
                            static_cast<float>(peak + share / filters_.inverse_temperature),
                            -std::numeric_limits<float>::infinity()};
  for (int attempt = 0;; ++attempt) {
    const float least = attempts[attempt];
    if (attempt == 1 && n_ <= kExactMasses && std::isfinite(least)) {
      const int token = choose_of_buckets(logits, peak, uniform, filters_.top_p * total, std::max(least, floor),
                                          least <= floor);
      if (token >= 0) return token;
      continue;
    }
    rank(logits, std::max(least, floor));
    weigh(n_ranked_, peak);
    const int64_t kept = nucleus(filters_.top_p * total, floor);
    if (kept < n_ranked_ || least <= floor) return draw(kept, uniform);
  }
}

Sampler::Best Sampler::best(const float* logits, int64_t n) {
  kernels_.block_peaks(logits, n_, peaks_.data());
  const float peak = *std::max_element(peaks_.begin(), peaks_.end());
  Best found{peak, total_mass(logits, peak, 1.0f), {}};
  n = std::min(n, n_);
  if (n > 0) {
    rank(logits, kth_peak(n));
    for (int64_t i = 0; i < n; ++i) found.ids.push_back(id_of(keys_[i]));
  }
  return found;
}

}  // namespace elute
