#include "bind/bind.h"

#if defined(__GLIBC__)
#include <malloc.h>
#endif

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a daemon thread keeps objects alive to the end of the program: no bug of ours
  m.doc() = "elute's native kernels and executor; elute.kernels and elute.runtime are the public side";
  m.def(
      "isas",
      [] {
        std::vector<std::string> names;
        for (const auto& table : elute::available_kernels()) names.emplace_back(table.isa);
        return names;
      },
      "Instruction-set levels that this CPU runs, slowest first.");
  m.def("best_isa", [] { return std::string(elute::best_kernels().isa); });
  m.def(
      "return_freed_memory",
      [] {
#if defined(__GLIBC__)
        malloc_trim(0);
#endif
      },
      "Gives the system the pages that were freed but that malloc keeps; elsewhere than with glibc, nothing.");
#ifdef ELUTE_EMULATE_AVX512
  m.attr("emulates_avx512") = true;
#else
  m.attr("emulates_avx512") = false;
#endif
  elute::bind_kernels(m);
  elute::bind_float_kernels(m);
  elute::bind_flash(m);elute::bind_banks(m);
  elute::bind_executor(m);
  elute::bind_sampler(m);
  elute::bind_shadow(m);
  elute::bind_bench(m);
}
