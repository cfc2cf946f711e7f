// Random jobs on a ThreadPool whose threads are now and then held back, against the same jobs done in order. Built with
// -fsanitize=thread by test_thread_pool.py: what `publish` and plain chunks touch is not atomic, so a missing
// happens-before is a report. Prints the first difference and exits with 1.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include "thread_pool.h"

namespace {

using elute::ThreadPool;
using elute::Walk;

constexpr int kMostChunks = 5000;  // more than a step holds
constexpr int kThreads = 4;
constexpr int kJobs = 150;
constexpr int kRounds = 6;  // of three steps, in a job

// What computes read while later steps may write it is atomic, as the law of late computes demands of real memory.
std::vector<std::atomic<uint32_t>> input(kMostChunks);
std::vector<uint32_t> output(kMostChunks), n_published(kMostChunks);
uint32_t own[kThreads];
int met[kThreads];

uint32_t mix(uint32_t a, uint32_t b) { return (a * 2654435761u ^ b) * 2246822519u + 1; }
uint32_t value(int chunk, int n, uint32_t seed) {
  const uint32_t a = input[chunk].load(std::memory_order_relaxed);
  return mix(mix(a, input[(chunk * 7 + 3) % n].load(std::memory_order_relaxed)), seed);
}

// Chunks in the round's steps, alike for all threads.
int size(uint32_t seed, int round) {
  const uint32_t draw = mix(seed, round);
  return draw % 8 == 0 ? kMostChunks : draw % 8 < 3 ? 1 + draw % 3 : 1 + draw % 64;
}

void hold_back() {
  thread_local std::mt19937 random(static_cast<unsigned>(reinterpret_cast<uintptr_t>(&random) >> 12));
  if (random() % 300 == 0) usleep(random() % 3000);
}

[[noreturn]] void fail(const char* what, int job, int round, int chunk) {
  std::fprintf(stderr, "%s: job %d, round %d, chunk %d\n", what, job, round, chunk);
  std::_Exit(1);
}

void work(Walk& walk, const ThreadPool::Job& job) {
  const int number = static_cast<int>(job[0]);
  const auto seed = static_cast<uint32_t>(job[1]);
  if (job[2]) {
    met[walk.thread()] = number;
    walk.meet();
    for (int thread : met)
      if (thread != number) fail("meet() returned too early", number, 0, thread);
    walk.meet();
  }
  for (int round = 0; round < kRounds; ++round) {
    hold_back();
    const int n = size(seed, round);
    walk.share(
        n,
        [&](int c) {
          own[walk.thread()] = value(c, n, seed);
          hold_back();
        },
        [&](int c) {
          output[c] = own[walk.thread()];
          ++n_published[c];
        });
    walk.share(n, [&](int c) {
      if (n_published[c] != 1) fail("not published once", number, round, c);
      input[c].store(mix(output[c], output[n - 1 - c]), std::memory_order_relaxed);
      hold_back();
    });
    walk.share(n, [&](int c) { n_published[c] = 0; });
  }
}

}  // namespace

int main() {
  ThreadPool pool(kThreads, work);
  std::vector<uint32_t> wanted(kMostChunks);
  for (int c = 0; c < kMostChunks; ++c) input[c] = wanted[c] = mix(c, 1);
  for (int job = 0; job < kJobs; ++job) {
    const uint32_t seed = mix(job, 77);
    pool.run({static_cast<uint64_t>(job), seed, job % 5 == 0, 0});
    for (int round = 0; round < kRounds; ++round) {
      const int n = size(seed, round);
      std::vector<uint32_t> out(n);
      for (int c = 0; c < n; ++c) out[c] = mix(mix(wanted[c], wanted[(c * 7 + 3) % n]), seed);
      for (int c = 0; c < n; ++c) wanted[c] = mix(out[c], out[n - 1 - c]);
    }
    for (int c = 0; c < kMostChunks; ++c)
      if (input[c].load() != wanted[c]) fail("another result than in order", job, kRounds, c);
  }
}
