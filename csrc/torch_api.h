// What the extension uses of the installed torch, looked up at import: only C functions, so that building needs neither headers nor
// libraries of torch, and one build works with every torch that has them (>= 2.11).
#pragma once

#include <cstdint>

#include "dlpack.h"

namespace miras {

struct TorchApi {
  const dlpack::DLPackExchangeAPI* tensors = nullptr;  // of torch.Tensor
  // torch/csrc/stable/c/shim.h; 0 if all went well
  int32_t (*parallel_for)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) = nullptr;
  int32_t (*get_num_threads)(uint32_t* count) = nullptr;
};

// Set by find_torch, which throws pybind11::import_error if torch lacks any of it.
inline TorchApi torch_api;
void find_torch();

int64_t num_threads();

// body(first, last) over parts of [0, count) by torch's threads; rethrows the first exception of a part. Needs no interpreter lock.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context);
template <class Body> void parallel_for(int64_t count, int64_t grain, const Body& body) {
  const auto call = [](int64_t first, int64_t last, void* self) { (*static_cast<const Body*>(self))(first, last); };
  parallel_for(count, grain, call, const_cast<Body*>(&body));
}

}  // namespace miras
