// Loops over runs of any length, in vectors of a float vocabulary S.
#pragma once
#include <cstdint>

namespace elute {
namespace {

// How a body touches memory: whole vectors, or the last n < kLanes values of a run. The arithmetic is the same,
// so a value does not depend on where in a run it stands.
template <class S>
struct Whole {
  template <class T>
  typename S::Float load(const T* p) const { return S::load(p); }
  template <class T>
  void store(T* p, typename S::Float a) const { S::store(p, a); }
};
template <class S>
struct Tail {
  int n;
  template <class T>
  typename S::Float load(const T* p) const { return S::load_n(p, n); }  // missing lanes are 0
  template <class T>
  void store(T* p, typename S::Float a) const { S::store_n(p, a, n); }
};

// body(first index, memory) for each vector of n values.
template <class S, class Body>
void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + S::kLanes <= n; i += S::kLanes) body(i, Whole<S>{});
  if (i < n) body(i, Tail<S>{static_cast<int>(n - i)});
}

}  // namespace
}  // namespace elute
