// Results to which several tasks contribute a share: gradients that the panels of a head, or all sequences, add to.
#pragma once

#include <algorithm>
#include <bit>

#include "tensors.h"

namespace miras {

// [count, ...], or without that dimension if there is only one
inline Tensor new_shares(int64_t count, Shape sizes, Type type) {
  if (count != 1) sizes.insert(sizes.begin(), count);
  return new_tensor(sizes, type);
}

inline uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Their sum, in order
inline Tensor sum_shares(const Tensor& shares, int64_t count, Type type) {
  if (count == 1) return shares;
  const Tensor total = new_tensor(shares.sizes().subspan(1), type);
  const int64_t size = total.numel();
  const float* from = shares.data<float>();
  parallel_for(size, 1 << 15, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      float x = 0.0f;
      for (int64_t share = 0; share < count; ++share) x += from[share * size + i];
      if (type == kFloat32) static_cast<float*>(total.data())[i] = x;
      else static_cast<uint16_t*>(total.data())[i] = to_bfloat16(x);
    }
  });
  return total;
}

// The first share of a gradient of q, k or a gate: contiguous [B, T, H], or [B, T, H, D] if there are channels
inline TokenTensor first_share(const MemoryParams& p, const Tensor& shares, int64_t channels) {
  const int64_t width = std::max<int64_t>(channels, 1);
  return {shares.data(), p.T * p.H * width, p.H * width, width, channels ? 1 : 0};
}

}  // namespace miras
