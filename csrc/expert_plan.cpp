#include "expert_plan.h"

#include <algorithm>
#include <cmath>

namespace elute {

void share_out(float* logits, int n, int top_k, bool normalized) {
  float largest = 0, least = 0;  // of the picked ones
  int last = -1;                 // the one of the highest index that has the least of their logits
  for (int i = 0; i < top_k; ++i) {
    int next = -1;
    for (int e = 0; e < n; ++e) {
      const bool is_left = last < 0 || logits[e] < least || (logits[e] == least && e > last);
      if (is_left && (next < 0 || logits[e] > logits[next])) next = e;
    }
    if (next < 0) break;  // NaN is left; the residual stream has it too
    if (last < 0) largest = logits[next];
    least = logits[next];
    last = next;
  }
  const auto is_picked = [=](float logit, int e) { return logit > least || (logit == least && e <= last); };
  float total = 0;
  for (int e = 0; e < n; ++e)
    if (!normalized || is_picked(logits[e], e)) total += std::exp(logits[e] - largest);
  for (int e = 0; e < n; ++e) logits[e] = is_picked(logits[e], e) ? std::exp(logits[e] - largest) / total : 0;
}

ExpertPlan::ExpertPlan(int n_experts, int top_k, int most_rows) {
  const int n_picks = most_rows * top_k;
  picked.reserve(std::min(n_experts, n_picks));
  slots_.resize(most_slots(most_rows, top_k));
  n_picks_.resize(most_rows);
  of_expert_.resize(n_experts);
  experts_.resize(n_picks);
  picks_.resize(n_picks);
}

void ExpertPlan::make(const float* shares, int n_rows, int n_experts, int top_k) {
  top_k_ = top_k;
  std::fill_n(of_expert_.begin(), n_experts, 0);
  for (int r = 0; r < n_rows; ++r) {
    int n = 0;
    for (int e = 0; e < n_experts && n < top_k; ++e) {
      const float share = shares[int64_t{r} * n_experts + e];
      if (share == 0) continue;
      experts_[r * top_k + n] = e;
      picks_[r * top_k + n++].share = share;
      ++of_expert_[e];
    }
    n_picks_[r] = n;
  }
  picked.clear();
  int at = 0;
  for (int e = 0; e < n_experts; ++e) {
    const int n = of_expert_[e];
    if (n == 0) continue;
    const int first = n < kTileRows ? at : (at + kTileRows - 1) / kTileRows * kTileRows;
    for (; at < first; ++at) slots_[at].row = -1;
    picked.push_back({e, first, n, {}, {}, {}});
    of_expert_[e] = first;
    at = first + n;
  }
  n_slots = at;
  for (int r = 0; r < n_rows; ++r) {
    for (int i = 0; i < n_picks_[r]; ++i) {
      Pick& pick = picks_[r * top_k + i];
      pick.slot = of_expert_[experts_[r * top_k + i]]++;
      slots_[pick.slot] = {r, pick.share};
    }
  }
}

}  // namespace elute
