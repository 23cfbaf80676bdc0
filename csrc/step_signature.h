// What the bindings of decoding steps share: the two memories, how their kernels run, and the signature of a call's tokens.
#pragma once

#include <array>
#include <cmath>

#include "cpu/capability.h"
#include "tensors.h"

namespace miras {

namespace py = pybind11;

// How many elements of a state are worth a thread.
constexpr int64_t kGrain = int64_t(1) << 16;

// ---- the two memories ----

struct Linear {
  using Params = LinearStep;
  static constexpr int kMatrices = 1;
  static auto kernel(const cpu::Kernels& kernels) { return kernels.linear_step; }
  static void fill(LinearStep& p, int64_t dk, int64_t dv) {
    p.Dk = int(dk), p.Dv = int(dv), p.panel_width = int(dv);
    require(dk <= kMaxHead && dv <= kMaxHead, "Dk or Dv is out of range");
  }
  static std::array<int64_t, 2> shape(const LinearStep& p) { return {p.Dk, p.Dv}; }
};

struct Mlp {
  using Params = MlpStep;
  static constexpr int kMatrices = 2;
  static auto kernel(const cpu::Kernels& kernels) { return kernels.mlp_step; }
  static void fill(MlpStep& p, int64_t hd, int64_t d) {
    p.Hd = int(hd), p.D = int(d);
    require(d <= kMaxHead && hd <= kMaxHidden, "D or Hd is out of range");
    require(!p.lr_per_channel && !p.decay_per_channel && !p.delta_per_channel, "an MLP memory has no channel-wise gates");
  }
  static std::array<int64_t, 2> shape(const MlpStep& p) { return {p.Hd, p.D}; }
};

// ln_weight, ln_bias and ln_eps of an MLP memory; None for a linear one
using NormTuple = std::tuple<OptionalTensor, OptionalTensor, double>;
inline void fill_norm(LinearStep&, NormTuple& norm) {
  require(!std::get<0>(norm) && !std::get<1>(norm), "a linear memory has no LayerNorm");
}
inline void fill_norm(MlpStep& p, NormTuple& norm) {
  auto& [weight, bias, eps] = norm;
  for (OptionalTensor* x : {&weight, &bias}) {
    require(*x && is_float(**x) && (*x)->has_shape({p.H, p.D}), "ln_weight and ln_bias must be float32 [H, D]");
    *x = (*x)->contiguous();
  }
  p.ln_weight = weight->data<float>(), p.ln_bias = bias->data<float>();
  p.ln_eps = float(eps);
}

template <class Memory> void run(const typename Memory::Params& p, const cpu::Kernels& kernels) {
  const auto kernel = Memory::kernel(kernels);
  const auto [K, V] = Memory::shape(p);
  const int64_t tasks = p.N * p.H, task = Memory::kMatrices * K * V * p.T;
  if (tasks * task <= kGrain) {
    kernel(p, 0, tasks);
  } else {
    py::gil_scoped_release nogil;
    const int64_t grain = std::max<int64_t>(1, kGrain / task);
    parallel_for(tasks, grain, [&](int64_t first, int64_t last) { kernel(p, first, last); });
  }
  for (int64_t n = 0; n < p.N; ++n) p.state.position[n] = (p.state.position[n] + p.T) % p.C;
}

// ---- the signature of a call ----

// The properties of an argument that a step was prepared for.
struct Expected {
  Shape sizes;
  Type type = kFloat32;
  bool given = false;

  Expected() = default;
  Expected(const Tensor& x) : sizes(x.sizes().begin(), x.sizes().end()), type(x.type()), given(true) {}
  Expected(const OptionalTensor& x) {
    if (x) *this = Expected(*x);
  }
  bool fits(py::handle object, const View& x) const { return given ? x.is(type) && x.has_shape(sizes) && x.on_cpu() : object.is_none(); }
};

// Whether all values of a gate [B, T, H] or [B, T, H, D] are valid
template <class Allowed> bool all_values(const TokenTensor& x, const Shape& sizes, Allowed&& allowed) {
  const float* data = static_cast<const float*>(x.data);
  const int64_t channels = sizes.size() == 4 ? sizes[3] : 1;
  for (int64_t b = 0; b < sizes[0]; ++b)
    for (int64_t t = 0; t < sizes[1]; ++t)
      for (int64_t h = 0; h < sizes[2]; ++h)
        for (int64_t j = 0; j < channels; ++j)
          if (!allowed(data[b * x.batch + t * x.token + h * x.head + j * x.channel])) return false;
  return true;
}

// Calls of one signature: everything that follows from shapes, dtypes and settings is checked once.
class Signature {
 public:
  Signature(const Tokens& x, bool check_values)
      : wanted_{x.q, x.k, x.v, x.lr, x.log_decay, x.delta, x.momentum}, check_values_(check_values) {}

  // The tokens of a call, with what they need while it runs
  struct Call {
    py::handle q, k, v, lr, log_decay, delta, momentum;
    Tensor copies[3] = {};
    float number = 0.0f;  // a delta that is one number for all tokens
  };
  // False if the tokens have another signature, or values that validation.py refuses
  bool fill(MemoryParams& p, Call& x) const {
    const View q(x.q), k(x.k), v(x.v), lr(x.lr), log_decay(x.log_decay), momentum(x.momentum);
    const View delta = PyFloat_Check(x.delta.ptr()) ? View() : View(x.delta);
    if (!wanted_.q.fits(x.q, q) || !wanted_.k.fits(x.k, k) || !wanted_.v.fits(x.v, v) || !wanted_.lr.fits(x.lr, lr) ||
        !wanted_.log_decay.fits(x.log_decay, log_decay) || !wanted_.momentum.fits(x.momentum, momentum) ||
        !(wanted_.delta.fits(x.delta, delta) || is_number(x.delta, x.number)))
      return false;
    p.q = rows(x.q, q, x.copies[0]), p.k = rows(x.k, k, x.copies[1]), p.v = rows(x.v, v, x.copies[2]);
    p.lr = tokens(lr);
    if (wanted_.log_decay.given) p.log_decay = tokens(log_decay);
    if (delta.defined()) p.delta = tokens(delta);
    else if (wanted_.delta.given) p.delta = TokenTensor{&x.number, 0, 0, 0, 0};
    if (wanted_.momentum.given) p.momentum = tokens(momentum);
    return !check_values_ || values_allowed(p);
  }
  bool fits_out(py::handle object, const View& x) const { return wanted_.v.fits(object, x); }
  Tensor new_out() const { return small_tensor(wanted_.v.sizes, wanted_.v.type); }

 private:
  // An argument if its channels are together, else a copy
  static TokenTensor rows(py::handle object, const View& x, Tensor& copy) {
    if (are_channels_together(x)) return tokens(x);
    copy = Tensor(py::reinterpret_borrow<py::object>(object)).contiguous();
    return tokens(copy);
  }
  bool is_number(py::handle x, float& number) const {
    if (!wanted_.delta.given || !PyFloat_Check(x.ptr())) return false;
    number = float(PyFloat_AS_DOUBLE(x.ptr()));
    return std::isfinite(number);
  }
  bool values_allowed(const MemoryParams& p) const {
    return (!wanted_.log_decay.given || all_values(p.log_decay, wanted_.log_decay.sizes, [](float x) { return !(x > 0.0f); })) &&
           (!wanted_.delta.given || all_values(p.delta, wanted_.delta.sizes, [](float x) { return !(x < 0.0f); })) &&
           (!wanted_.momentum.given || all_values(p.momentum, wanted_.momentum.sizes, [](float x) { return !(x < 0.0f || x >= 1.0f); }));
  }

  struct {
    Expected q, k, v, lr, log_decay, delta, momentum;
  } wanted_;
  bool check_values_;
};

}  // namespace miras
