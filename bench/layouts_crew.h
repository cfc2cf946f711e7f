// Threads that do one thing together and tell how long it took.
#pragma once
#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>
#include <vector>

// Each thread stays on a core of its own. The caller is thread 0.
class Crew {
 public:
  using Work = std::function<void(int thread)>;

  explicit Crew(int n_threads) : n_threads_(n_threads), switches_(n_threads) {
    for (int i = 1; i < n_threads; ++i) threads_.emplace_back([this, i] {
      stay_on(i);
      while (meet(), work_) run(i), meet();
    });
    stay_on(0);
  }
  ~Crew() {
    work_ = nullptr;
    meet();
    for (auto& thread : threads_) thread.join();
  }

  double nanoseconds(const Work& work) {
    work_ = &work;
    meet();
    const auto started = std::chrono::steady_clock::now();
    run(0);
    meet();
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - started).count();
  }
  // Whether no core was given to another program during the last work.
  bool undisturbed() const { return std::all_of(switches_.begin(), switches_.end(), [](int n) { return n == 0; }); }

 private:
  static void stay_on(int core) {
    cpu_set_t cores;
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    sched_setaffinity(0, sizeof cores, &cores);
  }
  static int switches() {
    rusage used;
    getrusage(RUSAGE_THREAD, &used);
    return int(used.ru_nivcsw + used.ru_nvcsw);
  }
  void run(int thread) {
    const int before = switches();
    (*work_)(thread);
    switches_[thread] = switches() - before;
  }
  void meet() {
    const int generation = generation_.load();
    if (waiting_.fetch_add(1) + 1 == n_threads_) {
      waiting_ = 0;
      ++generation_;
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins)
      if (spins > 10000) std::this_thread::yield();  // a core may be shared with the one that is waited for
  }

  const int n_threads_;
  std::vector<int> switches_;
  const Work* work_ = nullptr;
  std::atomic<int> waiting_{0}, generation_{0};
  std::vector<std::thread> threads_;
};
