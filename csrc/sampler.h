// Chooses the tokens of one answer from logits: penalties, filters, and the draw for a given random number. Twin in numpy,
// with which it agrees token for token: src/elute/kernels/sampling/reference.py. The random stream is runtime/sampler.py's.
#pragma once
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "kernels/float_kernels.h"

namespace elute {

// Tokens are ranked by logit, equal ones by id. Each filter keeps a first part of that order, at least one token:
// top_k tokens; of what it leaves, the fewest whose masses reach top_p of their sum; those with logits of at least
// peak + gap. Mass: FloatKernels::masses.
struct Filters {
  float inverse_temperature;  // positive
  int64_t top_k;              // 0: all
  double top_p;               // 0 to 1; 1: all
  double gap;                 // at most 0; -infinity: all
};

// What changes a token's logit x before the filters, in this order; the result is held between the largest floats.
//   repetition            x / r if x > 0, else x * r, for tokens of prompt and answer; 1 is off
//   presence, frequency   x - float(presence + frequency * count) for tokens that the answer has `count` times; 0 is off
//   bias                  x + bias
struct Penalties {
  float repetition;
  double presence, frequency;
};

// Not thread safe: the scratch is part of it.
class Sampler {
 public:
  Sampler(const FloatKernels& kernels, int vocabulary, const Filters& filters, const Penalties& penalties);

  // Before the first token.
  void add_bias(int32_t id, float bias);
  void add_prompt(const int32_t* ids, int64_t n);

  // The token at `uniform`, in [0, 1), of the masses of what the filters keep: in the order of the ranks, or of the ids
  // when the filters are all off. The penalties count it. -1, and nothing counted, when a logit is not finite.
  int choose(const float* logits, double uniform);

  struct Best {
    double peak, mass;         // log of the sum of e^logit = peak + log(mass)
    std::vector<int32_t> ids;  // the n first in rank
  };
  // Of finite logits.
  Best best(const float* logits, int64_t n);

  int vocabulary() const { return static_cast<int>(n_); }

 private:
  // A token whose logit is changed.
  struct Change {
    int32_t id, count;  // in the answer
    bool seen;          // in prompt or answer
    float bias;
  };
  Change& change_of(int32_t id);
  float changed(float x, const Change& change) const;
  const float* with_changes(const float* logits);

  int choose_unchanged(const float* logits, double uniform);
  float kth_peak(int64_t k);
  double total_mass(const float* logits, float peak, float inverse_temperature);
  int choose_by_id(const float* logits, float peak, double uniform);

  void rank(const float* logits, float least);
  void sort_keys(const float* logits, int64_t n);
  void weigh(int64_t n, float peak);
  int64_t nucleus(double wanted, float floor) const;
  int draw(int64_t kept, double uniform) const;
  void fill_buckets(const float* logits, float peak, float least);
  void rank_bucket(const float* logits, float peak, float least, uint16_t bucket);
  int choose_of_buckets(const float* logits, float peak, double uniform, double wanted, float least, bool last);
  int choose_of_top_k(const float* logits, float peak, double uniform);
  int choose_of_all(const float* logits, float peak, double uniform);

  const FloatKernels& kernels_;
  const int64_t n_, n_blocks_;
  const Filters filters_;
  const Penalties penalties_;
  std::vector<Change> changes_;
  std::unordered_map<int32_t, size_t> change_at_;  // by id
  std::vector<float> peaks_;           // of each block
  std::vector<float> selection_;       // scratch of kth_peak
  std::vector<double> sums_;           // masses of each block
  std::vector<double> bucket_masses_;
  std::unique_ptr<uint16_t[]> bucket_of_;  // [n]; of blocks whose peak is in one
  std::unique_ptr<float[]> changed_;   // logits [n]; made when first needed, as the two below
  std::unique_ptr<uint64_t[]> keys_, spare_;  // [n], ascending in rank
  int64_t n_ranked_ = 0;                      // of keys_ and values_
  std::vector<float> values_, masses_;        // of the ranked; weigh() says how many have a mass
};

}  // namespace elute
