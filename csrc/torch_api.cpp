#include "torch_api.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <exception>
#include <stdexcept>
#include <string>

namespace miras {
namespace {

namespace py = pybind11;

[[noreturn]] void lacks(const std::string& what) {
  const auto version = py::str(py::module_::import("torch").attr("__version__")).cast<std::string>();
  throw py::import_error("it needs torch >= 2.11, and torch " + version + " has no " + what);
}

template <class Function> void find(Function*& to, void* library, const char* name) {
  to = reinterpret_cast<Function*>(dlsym(library, name));
  if (!to) lacks(name);
}

}  // namespace

void find_torch() {
  const py::module_ torch = py::module_::import("torch");
  const py::object capsule = py::getattr(torch.attr("Tensor"), "__dlpack_c_exchange_api__", py::none());
  const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule.ptr(), name)) lacks("Tensor.__dlpack_c_exchange_api__");
  auto* tensors = static_cast<const dlpack::DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), name));
  while (tensors && tensors->version.major > dlpack::kMajorVersion) tensors = tensors->previous;
  if (!tensors || tensors->version.major != dlpack::kMajorVersion || !tensors->dltensor_from_py_object_no_sync)
    lacks("DLPack exchange table of version 1");
  torch_api.tensors = tensors;

  // Of torch._C, which is loaded, and of the libraries that it is linked with.
  const auto path = torch.attr("_C").attr("__file__").cast<std::string>();
  void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (!library) lacks("library " + path);
  find(torch_api.parallel_for, library, "torch_parallel_for");
  find(torch_api.get_num_threads, library, "torch_get_num_threads");
}

int64_t num_threads() {
  uint32_t count = 1;
  if (torch_api.get_num_threads(&count) != 0) throw std::runtime_error("torch_get_num_threads failed");
  return count;
}

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  struct Run {
    void (*body)(int64_t, int64_t, void*);
    void* context;
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr error;
  } run{body, context, {}, {}};
  const auto guarded = [](int64_t first, int64_t last, void* self) {  // exceptions must not pass through C
    Run& run = *static_cast<Run*>(self);
    try {
      run.body(first, last, run.context);
    } catch (...) {
      if (!run.failed.test_and_set()) run.error = std::current_exception();
    }
  };
  const int32_t status = torch_api.parallel_for(0, count, grain, guarded, &run);
  if (run.error) std::rethrow_exception(run.error);
  if (status != 0) throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace miras
