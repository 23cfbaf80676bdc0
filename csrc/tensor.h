// Torch tensors in the bindings: a Python object, and its memory, found through DLPack.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "torch_api.h"

namespace miras {

using Shape = std::vector<int64_t>;
using Sizes = std::span<const int64_t>;
using Type = dlpack::DLDataType;

constexpr Type kFloat32 = {dlpack::kFloat, 32, 1}, kBfloat16 = {dlpack::kBfloat, 16, 1}, kInt64 = {dlpack::kInt, 64, 1};

inline void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("miras_kernels._C: ") + what);
}

// Shape, strides, dtype and memory of a tensor, valid while the object lives and is not changed; undefined if there is none.
class View {
 public:
  View() = default;
  // Undefined if the object is not a tensor, or has no memory.
  explicit View(pybind11::handle x) {
    if (x.is_none()) return;
    if (torch_api.tensors->dltensor_from_py_object_no_sync(x.ptr(), &x_) == 0) {
      x_.data = static_cast<char*>(x_.data) + x_.byte_offset;
    } else {
      PyErr_Clear();
      x_ = {};
    }
  }

  bool defined() const { return x_.dtype.bits != 0; }
  bool is(Type type) const { return x_.dtype == type; }
  Type type() const { return x_.dtype; }
  bool on_cpu() const { return x_.device.device_type == dlpack::kCpu; }
  int64_t dim() const { return x_.ndim; }
  int64_t size(int i) const { return x_.shape[i]; }
  int64_t stride(int i) const { return x_.strides[i]; }
  Sizes sizes() const { return {x_.shape, size_t(x_.ndim)}; }
  int64_t numel() const {
    int64_t count = 1;
    for (const int64_t size : sizes()) count *= size;
    return count;
  }
  bool is_contiguous() const {
    int64_t stride = 1;
    for (int i = x_.ndim - 1; i >= 0; --i) {
      if (size(i) != 1 && x_.strides[i] != stride) return numel() == 0;
      stride *= size(i);
    }
    return true;
  }
  bool has_shape(Sizes sizes) const { return std::ranges::equal(this->sizes(), sizes); }
  bool has_shape(std::initializer_list<int64_t> sizes) const { return std::ranges::equal(this->sizes(), sizes); }

  void* data() const { return x_.data; }
  template <class T> T* data() const {
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, int64_t>);
    require(is(std::is_same_v<T, float> ? kFloat32 : kInt64), "a tensor has another dtype than expected");
    return static_cast<T*>(x_.data);
  }

 private:
  dlpack::DLTensor x_ = {};
};

class Tensor : public View {
 public:
  Tensor() = default;
  explicit Tensor(pybind11::object x) : View(x), object_(std::move(x)) {}

  pybind11::handle object() const { return object_; }
  template <class... Arguments> Tensor call(const char* method, Arguments&&... arguments) const {
    return Tensor(object_.attr(method)(std::forward<Arguments>(arguments)...));
  }
  Tensor contiguous() const { return is_contiguous() ? *this : call("contiguous"); }

 private:
  pybind11::object object_;
};
using OptionalTensor = std::optional<Tensor>;

inline Tensor from_managed(dlpack::DLManagedTensorVersioned* managed) {
  void* object = nullptr;
  if (torch_api.tensors->managed_tensor_to_py_object_no_sync(managed, &object) != 0) throw pybind11::error_already_set();
  return Tensor(pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object)));
}

// A new uninitialised contiguous tensor on the CPU.
inline Tensor new_tensor(Sizes sizes, Type type) {
  const auto failed = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  dlpack::DLTensor wanted{nullptr, {dlpack::kCpu, 0}, int32_t(sizes.size()), type, const_cast<int64_t*>(sizes.data()), nullptr, 0};
  dlpack::DLManagedTensorVersioned* fresh = nullptr;
  if (torch_api.tensors->managed_tensor_allocator(&wanted, &fresh, nullptr, failed) != 0) throw pybind11::error_already_set();
  return from_managed(fresh);
}
inline Tensor new_tensor(std::initializer_list<int64_t> sizes, Type type) { return new_tensor(Sizes(sizes.begin(), sizes.size()), type); }
inline Tensor new_float(Sizes sizes) { return new_tensor(sizes, kFloat32); }
inline Tensor new_float(std::initializer_list<int64_t> sizes) { return new_tensor(sizes, kFloat32); }

// Aligned memory shared by tensors; filled with NaN in builds for AddressSanitizer, so that reading before writing shows.
using Storage = std::shared_ptr<void>;
// Freed blocks of some size, the latest last. The next tensor of the same size takes one: a state that every decoding step returned to the
// system and asked for anew would cost more in page faults than the step.
class FreeBlocks {
 public:
  static FreeBlocks& all() {
    static FreeBlocks* const blocks = new FreeBlocks;  // never destroyed: tensors may be freed after it
    return *blocks;
  }
  void* take(size_t size) {
    const std::lock_guard lock(mutex_);
    for (size_t i = blocks_.size(); i-- > 0;) {
      if (blocks_[i].size != size) continue;
      void* const data = blocks_[i].data;
      blocks_.erase(blocks_.begin() + int64_t(i)), total_ -= size;
      return data;
    }
    return nullptr;
  }
  void keep(void* data, size_t size) {
    const std::lock_guard lock(mutex_);
    blocks_.push_back({data, size}), total_ += size;
    for (; total_ > kMost; blocks_.erase(blocks_.begin())) std::free(blocks_.front().data), total_ -= blocks_.front().size;
  }
  static bool takes(size_t size) {
#ifdef __SANITIZE_ADDRESS__
    return false;
#else
    return size >= kLeast && size <= kMost / 4;
#endif
  }

 private:
  static constexpr size_t kLeast = size_t(1) << 16, kMost = size_t(1) << 25;
  struct Block {
    void* data;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t total_ = 0;
  std::mutex mutex_;
};

inline Storage new_storage(int64_t bytes) {
  const size_t size = (size_t(std::max<int64_t>(bytes, 1)) + 63) / 64 * 64;
  void* const kept = FreeBlocks::takes(size) ? FreeBlocks::all().take(size) : nullptr;
  void* const data = kept ? kept : std::aligned_alloc(64, size);
  if (!data) throw std::bad_alloc();
#ifdef __SANITIZE_ADDRESS__
  std::memset(data, 0xff, size);
#endif
  return Storage(data, [size](void* x) { FreeBlocks::takes(size) ? FreeBlocks::all().keep(x, size) : std::free(x); });
}

// A tensor of at most four dimensions in part of a storage
inline Tensor tensor_in(const Storage& storage, void* data, Sizes sizes, Sizes strides, Type type) {
  struct Holder {
    dlpack::DLManagedTensorVersioned managed;
    Storage storage;
    int64_t sizes[4], strides[4];
  };
  require(sizes.size() <= 4 && sizes.size() == strides.size(), "a tensor of too many dimensions");
  auto* holder = new Holder{{}, storage, {}, {}};
  std::ranges::copy(sizes, holder->sizes), std::ranges::copy(strides, holder->strides);
  const auto release = [](dlpack::DLManagedTensorVersioned* self) { delete static_cast<Holder*>(self->context); };
  holder->managed = {{dlpack::kMajorVersion, dlpack::kMinorVersion},
                     holder,
                     release,
                     0,
                     {data, {dlpack::kCpu, 0}, int32_t(sizes.size()), type, holder->sizes, holder->strides, 0}};
  return from_managed(&holder->managed);
}

// Like new_tensor, without torch's allocator: a third faster, which matters for short calls.
inline Tensor small_tensor(Sizes sizes, Type type) {
  int64_t strides[4], count = 1;
  require(sizes.size() <= 4, "a tensor of too many dimensions");
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  const Storage storage = new_storage(count * type.bits / 8);
  return tensor_in(storage, storage.get(), sizes, Sizes(strides, sizes.size()), type);
}

}  // namespace miras

template <> struct pybind11::detail::type_caster<miras::Tensor> {
  PYBIND11_TYPE_CASTER(miras::Tensor, const_name("torch.Tensor"));
  bool load(handle x, bool) {
    value = miras::Tensor(reinterpret_borrow<object>(x));
    return value.defined();
  }
  static handle cast(const miras::Tensor& x, return_value_policy, handle) { return x.defined() ? x.object().inc_ref() : none().release(); }
};
