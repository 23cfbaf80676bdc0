// What is used here of DLPack 1.x (https://dmlc.github.io/dlpack), the C structs through which libraries hand tensors to each other.
// Their layout is fixed by the standard: it may grow at its end within a major version (the exchange table came with 1.3).
#pragma once

#include <cstdint>

namespace miras::dlpack {

constexpr uint32_t kMajorVersion = 1, kMinorVersion = 0;
constexpr int32_t kCpu = 1;                           // device_type
constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;  // codes of dtypes

struct DLDevice {
  int32_t device_type, device_id;
};

struct DLDataType {
  uint8_t code, bits;
  uint16_t lanes;
  bool operator==(const DLDataType&) const = default;
};

struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t *shape, *strides;  // [ndim], strides in elements
  uint64_t byte_offset;      // of the first element from `data`
};

struct DLPackVersion {
  uint32_t major, minor;
};

// A tensor with an owner, which frees it by the deleter.
struct DLManagedTensorVersioned {
  DLPackVersion version;
  void* context;
  void (*deleter)(DLManagedTensorVersioned* self);
  uint64_t flags;
  DLTensor tensor;
};

// A library's table of functions for its tensors as Python objects. They return 0, or -1 with Python's error set; the allocator
// reports by `set_error` instead.
struct DLPackExchangeAPI {
  DLPackVersion version;
  DLPackExchangeAPI* previous;
  int (*managed_tensor_allocator)(DLTensor* prototype, DLManagedTensorVersioned** out, void* context,
                                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_tensor_from_py_object_no_sync)(void* object, DLManagedTensorVersioned** out);
  int (*managed_tensor_to_py_object_no_sync)(DLManagedTensorVersioned* tensor, void** object);
  int (*dltensor_from_py_object_no_sync)(void* object, DLTensor* out);  // does not own what it points to; may be null
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace miras::dlpack
