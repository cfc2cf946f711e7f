// Which rows of a call go to which experts, and where their results lie. Knows no weights and no kernel.
#pragma once
#include <vector>

#include "kernels/matmul.h"

namespace elute {

// Logits of n experts into their shares, in place: softmax for the top_k largest (of equal ones those of the lower
// index), 0 for the others; normalized: divided by the sum of those that are left.
void share_out(float* logits, int n, int top_k, bool normalized);

// Every thread makes its own from the shares that the router's op wrote. One that comes late, while they are being
// overwritten, makes another plan than the rest, but a whole one: any content of `shares` gives one within its bounds.
class ExpertPlan {
 public:
  // Slots [first_slot, first_slot + n_rows) are the rows that picked the expert, ascending.
  struct Picked {
    int expert, first_slot, n_rows;
    MatrixView gate, up, down;  // Executor::find_experts fills them in
  };
  struct Pick {
    int slot;
    float share;
  };

  // Slots of n_rows rows that pick top_k each, those that are skipped included.
  static constexpr int most_slots(int n_rows, int top_k) {
    return n_rows * top_k + n_rows * top_k / kTileRows * (kTileRows - 1);
  }

  // Takes all the memory that make() needs for as much.
  ExpertPlan(int n_experts, int top_k, int most_rows);

  // shares f32 [n_rows][n_experts]: of each expert in each row, 0 where it was not picked, at most top_k others.
  // Experts of kTileRows rows and more begin on a multiple of that, as the tiles of activations want it.
  void make(const float* shares, int n_rows, int n_experts, int top_k);

  std::vector<Picked> picked;  // ascending
  int n_slots = 0;

  int row_of(int slot) const { return slots_[slot].row; }  // -1: a slot that is skipped
  float share_of(int slot) const { return slots_[slot].share; }
  // In ascending order of experts.
  int n_picks(int row) const { return n_picks_[row]; }
  const Pick& pick(int row, int i) const { return picks_[row * top_k_ + i]; }

 private:
  struct Slot {
    int row;
    float share;
  };
  int top_k_ = 0;
  std::vector<Slot> slots_;
  std::vector<int> n_picks_, of_expert_;  // [row]; [expert] rows, then the next slot
  std::vector<int> experts_;              // [row][top_k]
  std::vector<Pick> picks_;               // [row][top_k]
};

}  // namespace elute
