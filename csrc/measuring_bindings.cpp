// What only bench.cpu and the tests call.
#include <pybind11/stl.h>

#include "cpu/capability.h"
#include "cpu/profile.h"
#include "cpu/scratch.h"
#include "step_bindings.h"
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

}  // namespace

void bind_measuring(pybind11::module_& m) {
  m.def("multiply_adds", &multiply_adds, pybind11::arg("operations"),
        "Multiplications and additions in registers, as many as the instruction set and all threads can do: a yardstick.");
  m.def("scratch_bytes", &cpu::scratch_bytes, "The working memory of the calling thread, which grows when a call needs more and stays.");
#ifdef MIRAS_PROFILE
  m.def("take_stages", &cpu::take_stages);
#endif
}

}  // namespace miras
