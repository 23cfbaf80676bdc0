// What only bench.cpu and the tests call.
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "bias.h"
#include "compile.h"
#include "cpu/capability.h"
#include "cpu/profile.h"
#include "cpu/scratch.h"
#include "params.h"
#include "retention.h"
#include "step_bindings.h"
#include "tensors.h"
#include "torch_api.h"

namespace miras {
namespace {

// So many on all threads together
void multiply_adds(int64_t operations) {
  const int64_t threads = num_threads();
  std::vector<float> results(threads);
  pybind11::gil_scoped_release nogil;
  parallel_for(threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) results[i] = cpu::kernels().multiply_adds(operations / threads);
  });
}

std::map<int, std::string> bias_names() {
  std::map<int, std::string> names;
  for (int tag = 0; tag < kBiasCount; ++tag) names[tag] = bias_traits(BiasTag(tag)).name;
  return names;
}

std::map<int, std::string> retention_names() {
  std::map<int, std::string> names;
  for (int tag = 0; tag < kRetentionCount; ++tag) names[tag] = retention_traits(RetentionTag(tag)).name;
  return names;
}

}  // namespace

void bind_measuring(pybind11::module_& m) {
  using namespace pybind11::literals;
  m.def("multiply_adds", &multiply_adds, "operations"_a,
        "Multiplications and additions in registers, as many as the instruction set and all threads can do: a yardstick.");
  m.def("scratch_bytes", &cpu::scratch_bytes, "The working memory of the calling thread, which grows when a call needs more and stays.");
  m.def("operations", &operations);
  m.def("bias_names", &bias_names);
  m.def("retention_names", &retention_names);
  m.def("limits", [] {
    return pybind11::dict("head"_a = kMaxHead, "hidden"_a = kMaxHidden, "chunk"_a = kMaxChunk, "bias_parameters"_a = kBiasParams,
                          "retention_parameters"_a = kRetentionParams);
  });
#ifdef MIRAS_PROFILE
  m.def("take_stages", &cpu::take_stages);
#endif
}

}  // namespace miras
