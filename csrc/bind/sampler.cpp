#include "sampler.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include <cmath>
#include <tuple>

#include "bind/bind.h"

namespace elute {
namespace {

class BoundSampler {
 public:
  BoundSampler(const std::string& isa, int vocabulary, float inverse_temperature, int64_t top_k, double top_p, double gap,
               float repetition, double presence, double frequency, const ArrayIn<int32_t, 1>& prompt,
               const std::vector<std::pair<int32_t, float>>& biases)
      : sampler_(*kernels_named(isa).floats, checked(vocabulary), {inverse_temperature, top_k, top_p, gap},
                 {repetition, presence, frequency}) {
    // A NaN fails every comparison.
    want(inverse_temperature > 0 && std::isfinite(inverse_temperature), "a positive inverse_temperature");
    want(top_k >= 0 && top_p >= 0 && top_p <= 1 && gap <= 0, "top_k from 0, top_p of 0 to 1, gap of at most 0");
    want(repetition > 0 && std::isfinite(repetition), "a positive repetition penalty");
    want(std::isfinite(presence) && std::isfinite(frequency), "finite penalties");
    for (const auto& [id, bias] : biases) {
      want(id >= 0 && id < vocabulary && std::isfinite(bias), "finite biases of tokens of the vocabulary");
      sampler_.add_bias(id, bias);
    }
    const int64_t n = static_cast<int64_t>(prompt.shape(0));
    for (int64_t i = 0; i < n; ++i)
      want(prompt.data()[i] >= 0 && prompt.data()[i] < vocabulary, "a prompt of tokens of the vocabulary");
    sampler_.add_prompt(prompt.data(), n);
  }

  int choose(const ArrayIn<float, 1>& logits, double uniform) {
    check_logits(logits);
    want(uniform >= 0 && uniform < 1, "uniform in [0, 1)");
    return sampler_.choose(logits.data(), uniform);
  }

  std::tuple<double, double, std::vector<int32_t>> best(const ArrayIn<float, 1>& logits, int64_t n) {
    check_logits(logits);
    Sampler::Best found = sampler_.best(logits.data(), n);
    return {found.peak, found.mass, std::move(found.ids)};
  }

 private:
  static void want(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("sampler: wanted ") + what);
  }
  static int checked(int vocabulary) {
    want(vocabulary >= 1, "a vocabulary of at least 1");
    return vocabulary;
  }
  void check_logits(const ArrayIn<float, 1>& logits) const {
    if (static_cast<int64_t>(logits.shape(0)) != sampler_.vocabulary())
      throw std::invalid_argument("logits: found " + std::to_string(logits.shape(0)) + ", wanted " +
                                  std::to_string(sampler_.vocabulary()));
  }

  Sampler sampler_;
};

}  // namespace

void bind_sampler(nb::module_& m) {
  nb::class_<BoundSampler>(m, "Sampler", "Chooses the tokens of one answer; see csrc/sampler.h. One call at a time.")
      .def(nb::init<const std::string&, int, float, int64_t, double, double, float, double, double,
                    const ArrayIn<int32_t, 1>&, const std::vector<std::pair<int32_t, float>>&>(),
           nb::arg("isa"), nb::arg("vocabulary"), nb::arg("inverse_temperature"), nb::arg("top_k"), nb::arg("top_p"),
           nb::arg("gap"), nb::arg("repetition"), nb::arg("presence"), nb::arg("frequency"), nb::arg("prompt"),
           nb::arg("biases"))
      .def("choose", &BoundSampler::choose, nb::arg("logits"), nb::arg("uniform"),
           "logits f32 [vocabulary] -> token, -1 when a logit is not finite")
      .def("best", &BoundSampler::best, nb::arg("logits"), nb::arg("n"),
           "finite logits f32 [vocabulary] -> peak, mass, ids of the n first; log(sum(exp(logits))) = peak + log(mass)");
}

}  // namespace elute
