// The extension module miras_kernels._C: turns tensors into parameter structs and hands them to the kernels.
// The only unit that knows torch. What arguments must look like is checked in validation.py; the checks here guard memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bias.h"
#include "cpu/capability.h"

namespace miras {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("miras_kernels._C: ") + what);
}

// ---- tensors to structs ----

// [B, T, H] or [B, T, H, D]. Size-1 and expanded dimensions need nothing special.
TokenTensor tokens(const Tensor& x) {
  TokenTensor t;
  t.data = x.data_ptr();
  t.batch = x.stride(0), t.token = x.stride(1), t.head = x.stride(2);
  t.channel = x.dim() == 4 ? x.stride(3) : 0;
  return t;
}

// [N, H, Dv, Dk]
StateTensor states(const Tensor& x) {
  StateTensor s;
  s.data = x.data_ptr<float>();
  s.seq = x.stride(0), s.head = x.stride(1), s.row = x.stride(2), s.col = x.stride(3);
  return s;
}

// Kernels read channels in vectors.
Tensor channels_together(const Tensor& x) { return x.size(3) == 1 || x.stride(3) == 1 ? x : x.contiguous(); }

Dtype dtype_of(const Tensor& x) {
  require(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, "q, k, v must be float32 or bfloat16");
  return x.scalar_type() == at::kFloat ? Dtype::f32 : Dtype::bf16;
}

bool is_float(const Tensor& x) { return x.device().is_cpu() && x.scalar_type() == at::kFloat; }

bool has_shape(const Tensor& x, std::initializer_list<int64_t> shape) { return x.sizes() == at::IntArrayRef(shape); }

Tensor new_float(at::IntArrayRef shape) { return at::empty(shape, at::TensorOptions().dtype(at::kFloat)); }
Tensor new_like(at::IntArrayRef shape, const Tensor& x) { return at::empty(shape, x.options()); }

// What all kernels share. q, k, v already have their channels together.
void fill_tokens(MemoryParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr,
                 const OptionalTensor& log_decay, const OptionalTensor& delta, const OptionalTensor& cu_seqlens, int64_t bias_tag,
                 const std::vector<double>& bias_params, int64_t chunk_size, int64_t checkpoint_every) {
  require(q.dim() == 4 && v.dim() == 4, "q and v must have four dimensions");
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(2);
  p.N = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
  p.C = int(chunk_size);
  require(chunk_size >= 1 && chunk_size <= 256, "chunk_size must be in 1..256");
  require(k.sizes() == q.sizes() && has_shape(v, {p.B, p.T, p.H, v.size(3)}), "k or v does not fit q");
  require(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), "q, k, v must have one dtype");
  require(q.device().is_cpu() && k.device().is_cpu() && v.device().is_cpu(), "q, k, v must be on the CPU");
  p.dtype = dtype_of(q);
  p.q = tokens(q), p.k = tokens(k), p.v = tokens(v);

  require(is_float(lr) && has_shape(lr, {p.B, p.T, p.H}), "lr must be float32 [B, T, H]");
  p.lr = tokens(lr);
  if (log_decay) {
    require(is_float(*log_decay) && has_shape(*log_decay, {p.B, p.T, p.H}), "log_decay must be float32 [B, T, H]");
    p.log_decay = tokens(*log_decay);
  }

  require(bias_tag >= 0 && bias_tag < kBiasCount, "unknown bias tag");
  p.bias = BiasTag(bias_tag);
  require(bias_params.size() <= size_t(kBiasParams), "too many bias parameters");
  std::copy(bias_params.begin(), bias_params.end(), p.bias_params);
  require(bias_traits(p.bias).uses_delta == delta.has_value(), "delta given to a bias without one, or missing");
  if (delta) {
    p.delta_per_channel = delta->dim() == 4;
    require(is_float(*delta) && (p.delta_per_channel ? has_shape(*delta, {p.B, p.T, p.H, v.size(3)})
                                                     : has_shape(*delta, {p.B, p.T, p.H})),
            "delta must be float32 [B, T, H] or [B, T, H, Dv]");
    require(!p.delta_per_channel || !bias_traits(p.bias).couples_row, "delta per channel needs a coordinate-wise bias");
    p.delta = tokens(*delta);
  }

  if (cu_seqlens) {
    require(p.B == 1 && cu_seqlens->scalar_type() == at::kLong && cu_seqlens->is_contiguous(), "bad cu_seqlens");
    p.cu_seqlens = cu_seqlens->const_data_ptr<int64_t>();
    require(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.N] == p.T, "cu_seqlens must run from 0 to T");
    for (int64_t n = 0; n < p.N; ++n) require(p.length(n) >= 0, "cu_seqlens must not decrease");
  }
  require(checkpoint_every >= 0 && checkpoint_every < (int64_t(1) << 31), "checkpoint_every must not be negative");
  p.checkpoint_every = int(checkpoint_every);
}

// A segment never holds more chunks than there are.
int longest_segment(const MemoryParams& p) {
  return int(std::min<int64_t>(p.checkpoint_every, std::max<int64_t>(1, (p.T + p.C - 1) / p.C)));
}

// The contiguous positions of an open chunk, checked.
const int64_t* positions(const MemoryParams& p, const Tensor& position) {
  require(position.scalar_type() == at::kLong && has_shape(position, {p.N}) && position.is_contiguous(),
          "position must be int64 [N]");
  require(p.checkpoint_every == 0, "no gradients through an open chunk");
  const int64_t* at = position.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < p.N; ++n) require(at[n] >= 0 && at[n] < p.C, "position must be in [0, chunk_size)");
  return at;
}

Tensor open_decays(const MemoryParams& p, const Tensor& open_log_decay) {
  require(is_float(open_log_decay) && has_shape(open_log_decay, {p.N, p.H}), "open_log_decay must be float32 [N, H]");
  return open_log_decay.contiguous();
}

void fill(LinearParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, const OptionalTensor& log_decay,
          const OptionalTensor& delta, const Tensor& dual, const OptionalTensor& cu_seqlens, int64_t bias_tag,
          const std::vector<double>& bias_params, int64_t chunk_size, int64_t checkpoint_every) {
  fill_tokens(p, q, k, v, lr, log_decay, delta, cu_seqlens, bias_tag, bias_params, chunk_size, checkpoint_every);
  p.Dk = int(q.size(3)), p.Dv = int(v.size(3));
  require(p.Dk >= 1 && p.Dk <= 256 && p.Dv >= 1 && p.Dv <= 256, "Dk and Dv must be in 1..256");
  require(is_float(dual) && has_shape(dual, {p.N, p.H, p.Dv, p.Dk}), "dual must be float32 [N, H, Dv, Dk]");
  p.dual = states(dual);

  // Fewer heads than threads: share out value rows as well, in panels of at least 32.
  const int64_t heads = p.N * p.H, threads = at::get_num_threads();
  p.panels = 1, p.panel_width = p.Dv;
  if (heads > 0 && heads < threads && !bias_traits(p.bias).couples_row) {
    const int wanted = int(std::min<int64_t>((threads + heads - 1) / heads, p.Dv / 32));
    if (wanted > 1) {
      p.panel_width = ((p.Dv + wanted - 1) / wanted + 15) / 16 * 16;
      p.panels = (p.Dv + p.panel_width - 1) / p.panel_width;
    }
  }
}

using Pair = std::array<Tensor, 2>;

// W1 [N, H, D, Hd] and W2 [N, H, Hd, D]
void fill_states(StateTensor (&to)[2], const MlpParams& p, const Pair& from, const char* what) {
  require(is_float(from[0]) && has_shape(from[0], {p.N, p.H, p.D, p.Hd}) && is_float(from[1]) &&
              has_shape(from[1], {p.N, p.H, p.Hd, p.D}), what);
  to[0] = states(from[0]), to[1] = states(from[1]);
}
Pair new_states(StateTensor (&to)[2], const MlpParams& p) {
  const Pair fresh = {new_float({p.N, p.H, p.D, p.Hd}), new_float({p.N, p.H, p.Hd, p.D})};
  to[0] = states(fresh[0]), to[1] = states(fresh[1]);
  return fresh;
}

// ln_weight and ln_bias are contiguous already.
void fill(MlpParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, const OptionalTensor& log_decay,
          const OptionalTensor& delta, const Tensor& ln_weight, const Tensor& ln_bias, double ln_eps, const Pair& dual,
          const OptionalTensor& cu_seqlens, int64_t bias_tag, const std::vector<double>& bias_params, int64_t chunk_size,
          int64_t checkpoint_every) {
  fill_tokens(p, q, k, v, lr, log_decay, delta, cu_seqlens, bias_tag, bias_params, chunk_size, checkpoint_every);
  require(!p.delta_per_channel, "delta must be [B, T, H]");
  require(v.sizes() == q.sizes(), "v must be like q");
  require(dual[0].dim() == 4, "W1 must have four dimensions");
  p.D = int(q.size(3)), p.Hd = int(std::min<int64_t>(dual[0].size(3), 1 << 20));
  require(p.D >= 1 && p.D <= 256 && p.Hd >= 1 && p.Hd <= 1024, "D must be in 1..256 and Hd in 1..1024");
  fill_states(p.dual, p, dual, "the duals must be float32 [N, H, D, Hd] and [N, H, Hd, D]");
  for (const Tensor* x : {&ln_weight, &ln_bias})
    require(is_float(*x) && has_shape(*x, {p.H, p.D}), "ln_weight and ln_bias must be float32 [H, D]");
  p.ln_weight = ln_weight.const_data_ptr<float>(), p.ln_bias = ln_bias.const_data_ptr<float>();
  p.ln_eps = float(ln_eps);
}

template <class Params> void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p) {
  at::parallel_for(0, p.tasks(), 1, [&](int64_t first, int64_t last) { kernel(p, first, last); });
}

// ---- linear memory: forward ----

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_forward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
    const OptionalTensor& delta, const Tensor& dual, const OptionalTensor& start, const OptionalTensor& position,
    const OptionalTensor& open_log_decay, const OptionalTensor& cu_seqlens, int64_t bias_tag,
    const std::vector<double>& bias_params, int64_t chunk_size, int64_t checkpoint_every, bool output_final_state) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  LinearForward p;
  fill(p, q, k, v, lr, log_decay, delta, dual, cu_seqlens, bias_tag, bias_params, chunk_size, checkpoint_every);

  Tensor open;
  require(start.has_value() == position.has_value(), "start and position come together");
  if (start) {
    require(is_float(*start) && has_shape(*start, {p.N, p.H, p.Dv, p.Dk}), "start must be float32 [N, H, Dv, Dk]");
    p.start = states(*start);
    p.position = positions(p, *position);
    if (open_log_decay) {
      open = open_decays(p, *open_log_decay);
      p.open_log_decay = open.const_data_ptr<float>();
    }
  }

  const Tensor out = new_like({p.B, p.T, p.H, p.Dv}, q);
  p.out = tokens(out);
  Tensor final_dual = new_float({0}), final_start = new_float({0}), final_log_decay = new_float({0}), saved = new_float({0});
  if (output_final_state) {
    final_dual = new_float({p.N, p.H, p.Dv, p.Dk}), final_start = new_float({p.N, p.H, p.Dv, p.Dk});
    final_log_decay = new_float({p.N, p.H});
    p.final_dual = states(final_dual), p.final_start = states(final_start);
    p.final_log_decay = final_log_decay.data_ptr<float>();
  }
  if (checkpoint_every > 0) {
    saved = new_float({p.slots(), p.H, p.Dk, p.Dv});
    if (cu_seqlens) saved.zero_();  // packed sequences need not fill all slots
    p.saved = saved.data_ptr<float>();
  }

  const auto kernel = cpu::kernels().linear_forward;
  {
    pybind11::gil_scoped_release nogil;
    run(kernel, p);
  }
  return {out, final_dual, final_start, final_log_decay, saved};
}

// ---- linear memory: backward ----

// parts [panels, ...] float32 -> their sum, in order, in the dtype of q
Tensor sum_parts(const Tensor& parts, at::ScalarType dtype) {
  if (parts.size(0) == 1) return parts.select(0, 0);
  const Tensor total = at::empty(parts.sizes().slice(1), at::TensorOptions().dtype(dtype));
  const int64_t panels = parts.size(0), size = total.numel();
  const float* from = parts.const_data_ptr<float>();
  const auto add_up = [&](auto* to) {
    at::parallel_for(0, size, 1 << 15, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        float x = from[i];
        for (int64_t panel = 1; panel < panels; ++panel) x += from[panel * size + i];
        to[i] = x;
      }
    });
  };
  if (dtype == at::kFloat) add_up(total.data_ptr<float>());
  else add_up(total.data_ptr<at::BFloat16>());
  return total;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, Tensor> linear_backward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
    const OptionalTensor& delta, const Tensor& dual, const OptionalTensor& cu_seqlens, const Tensor& saved,
    const Tensor& grad_out_, const OptionalTensor& grad_final_dual, int64_t bias_tag,
    const std::vector<double>& bias_params, int64_t chunk_size, int64_t checkpoint_every) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  LinearBackward p;
  fill(p, q, k, v, lr, log_decay, delta, dual, cu_seqlens, bias_tag, bias_params, chunk_size, checkpoint_every);

  require(checkpoint_every > 0, "the backward needs saved states");
  require(is_float(saved) && saved.is_contiguous() && has_shape(saved, {p.slots(), p.H, p.Dk, p.Dv}), "bad saved states");
  p.saved = saved.data_ptr<float>();
  p.segment = longest_segment(p);

  require(grad_out_.sizes() == v.sizes() && grad_out_.scalar_type() == q.scalar_type() && grad_out_.device().is_cpu(),
          "grad_out must be like out");
  const Tensor grad_out = channels_together(grad_out_);
  p.grad_out = tokens(grad_out);
  if (grad_final_dual) {
    require(is_float(*grad_final_dual) && grad_final_dual->sizes() == dual.sizes(), "grad_final_dual must be like the dual");
    p.grad_final_dual = states(*grad_final_dual);
  }

  const auto key_dtype = p.panels > 1 ? at::kFloat : q.scalar_type();
  p.grad_dtype = p.panels > 1 ? Dtype::f32 : p.dtype;
  const auto parts = [&](at::ScalarType dtype, std::vector<int64_t> shape) {
    shape.insert(shape.begin(), p.panels);
    return at::empty(shape, at::TensorOptions().dtype(dtype));
  };
  const auto first_part = [](const Tensor& x) { return tokens(x.select(0, 0)); };

  const Tensor dq = parts(key_dtype, {p.B, p.T, p.H, p.Dk}), dk = parts(key_dtype, {p.B, p.T, p.H, p.Dk});
  const Tensor dv = new_like({p.B, p.T, p.H, p.Dv}, q);
  const Tensor dlr = parts(at::kFloat, {p.B, p.T, p.H});
  const Tensor d_dual = new_float({p.N, p.H, p.Dv, p.Dk});
  p.dq = first_part(dq), p.dk = first_part(dk), p.dv = tokens(dv), p.dlr = first_part(dlr), p.d_dual = states(d_dual);
  p.key_part = p.B * p.T * p.H * p.Dk, p.gate_part = p.B * p.T * p.H;

  Tensor dlog_decay, ddelta;
  if (log_decay) {
    dlog_decay = parts(at::kFloat, {p.B, p.T, p.H});
    p.dlog_decay = first_part(dlog_decay);
  }
  if (delta && p.delta_per_channel) {
    ddelta = new_float({p.B, p.T, p.H, p.Dv});
    p.ddelta = tokens(ddelta);
  } else if (delta) {
    ddelta = parts(at::kFloat, {p.B, p.T, p.H});
    p.ddelta = first_part(ddelta);
  }

  const auto kernel = cpu::kernels().linear_backward;
  {
    pybind11::gil_scoped_release nogil;
    run(kernel, p);
  }

  OptionalTensor dlog_decay_sum, ddelta_sum;
  if (log_decay) dlog_decay_sum = sum_parts(dlog_decay, at::kFloat);
  if (delta) ddelta_sum = p.delta_per_channel ? ddelta : sum_parts(ddelta, at::kFloat);
  return {sum_parts(dq, q.scalar_type()), sum_parts(dk, q.scalar_type()), dv, sum_parts(dlr, at::kFloat),
          dlog_decay_sum, ddelta_sum, d_dual};
}

// ---- MLP memory ----

std::tuple<Tensor, Pair, Pair, Tensor, Tensor> mlp_forward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
    const OptionalTensor& delta, const Tensor& ln_weight_, const Tensor& ln_bias_, double ln_eps, const Pair& dual,
    const std::optional<Pair>& start, const OptionalTensor& position, const OptionalTensor& open_log_decay,
    const OptionalTensor& cu_seqlens, int64_t bias_tag, const std::vector<double>& bias_params, int64_t chunk_size,
    int64_t checkpoint_every, bool output_final_state) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  const Tensor ln_weight = ln_weight_.contiguous(), ln_bias = ln_bias_.contiguous();
  MlpForward p;
  fill(p, q, k, v, lr, log_decay, delta, ln_weight, ln_bias, ln_eps, dual, cu_seqlens, bias_tag, bias_params, chunk_size,
       checkpoint_every);

  Tensor open;
  require(start.has_value() == position.has_value(), "start and position come together");
  if (start) {
    fill_states(p.start, p, *start, "the starts must be like the duals");
    p.position = positions(p, *position);
    if (open_log_decay) {
      open = open_decays(p, *open_log_decay);
      p.open_log_decay = open.const_data_ptr<float>();
    }
  }

  const Tensor out = new_like({p.B, p.T, p.H, p.D}, q);
  p.out = tokens(out);
  const Tensor nothing = new_float({0});
  Pair final_dual = {nothing, nothing}, final_start = {nothing, nothing};
  Tensor final_log_decay = nothing, saved = nothing;
  if (output_final_state) {
    final_dual = new_states(p.final_dual, p), final_start = new_states(p.final_start, p);
    final_log_decay = new_float({p.N, p.H});
    p.final_log_decay = final_log_decay.data_ptr<float>();
  }
  if (checkpoint_every > 0) {
    saved = new_float({p.slots(), p.H, 2, p.Hd, p.D});
    if (cu_seqlens) saved.zero_();  // packed sequences need not fill all slots
    p.saved = saved.data_ptr<float>();
  }

  const auto kernel = cpu::kernels().mlp_forward;
  {
    pybind11::gil_scoped_release nogil;
    run(kernel, p);
  }
  return {out, final_dual, final_start, final_log_decay, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, Tensor, Tensor, Pair> mlp_backward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
    const OptionalTensor& delta, const Tensor& ln_weight_, const Tensor& ln_bias_, double ln_eps, const Pair& dual,
    const OptionalTensor& cu_seqlens, const Tensor& saved, const Tensor& grad_out_, const std::optional<Pair>& grad_final_dual,
    int64_t bias_tag, const std::vector<double>& bias_params, int64_t chunk_size, int64_t checkpoint_every) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  const Tensor ln_weight = ln_weight_.contiguous(), ln_bias = ln_bias_.contiguous();
  MlpBackward p;
  fill(p, q, k, v, lr, log_decay, delta, ln_weight, ln_bias, ln_eps, dual, cu_seqlens, bias_tag, bias_params, chunk_size,
       checkpoint_every);

  require(checkpoint_every > 0, "the backward needs saved states");
  require(is_float(saved) && saved.is_contiguous() && has_shape(saved, {p.slots(), p.H, 2, p.Hd, p.D}), "bad saved states");
  p.saved = saved.data_ptr<float>();
  p.segment = longest_segment(p);

  require(grad_out_.sizes() == q.sizes() && grad_out_.scalar_type() == q.scalar_type() && grad_out_.device().is_cpu(),
          "grad_out must be like out");
  const Tensor grad_out = channels_together(grad_out_);
  p.grad_out = tokens(grad_out);
  if (grad_final_dual) fill_states(p.grad_final_dual, p, *grad_final_dual, "grad_final_dual must be like the duals");

  const Tensor dq = new_like(q.sizes(), q), dk = new_like(q.sizes(), q), dv = new_like(q.sizes(), q);
  const Tensor dlr = new_float({p.B, p.T, p.H});
  p.dq = tokens(dq), p.dk = tokens(dk), p.dv = tokens(dv), p.dlr = tokens(dlr);
  OptionalTensor dlog_decay, ddelta;
  if (log_decay) {
    dlog_decay = new_float({p.B, p.T, p.H});
    p.dlog_decay = tokens(*dlog_decay);
  }
  if (delta) {
    ddelta = new_float({p.B, p.T, p.H});
    p.ddelta = tokens(*ddelta);
  }
  const Tensor dln_weight = new_float({p.N, p.H, p.D}), dln_bias = new_float({p.N, p.H, p.D});
  p.dln_weight = dln_weight.data_ptr<float>(), p.dln_bias = dln_bias.data_ptr<float>();
  const Pair d_dual = new_states(p.d_dual, p);

  const auto kernel = cpu::kernels().mlp_backward;
  {
    pybind11::gil_scoped_release nogil;
    run(kernel, p);
  }
  return {dq, dk, dv, dlr, dlog_decay, ddelta, sum_parts(dln_weight, at::kFloat), sum_parts(dln_bias, at::kFloat), d_dual};
}

std::map<int, std::string> bias_names() {
  std::map<int, std::string> names;
  for (int tag = 0; tag < kBiasCount; ++tag) names[tag] = bias_traits(BiasTag(tag)).name;
  return names;
}

}  // namespace
}  // namespace miras

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  m.doc() = "C++ kernels of miras_kernels; the public functions are in miras_kernels.memory";
  m.def("linear_forward", &miras::linear_forward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "dual"_a, "start"_a,
        "position"_a, "open_log_decay"_a, "cu_seqlens"_a, "bias_tag"_a, "bias_params"_a, "chunk_size"_a, "checkpoint_every"_a,
        "output_final_state"_a);
  m.def("linear_backward", &miras::linear_backward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "dual"_a,
        "cu_seqlens"_a, "saved"_a, "grad_out"_a, "grad_final_dual"_a, "bias_tag"_a, "bias_params"_a, "chunk_size"_a,
        "checkpoint_every"_a);
  m.def("mlp_forward", &miras::mlp_forward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "ln_weight"_a, "ln_bias"_a,
        "ln_eps"_a, "dual"_a, "start"_a, "position"_a, "open_log_decay"_a, "cu_seqlens"_a, "bias_tag"_a, "bias_params"_a,
        "chunk_size"_a, "checkpoint_every"_a, "output_final_state"_a);
  m.def("mlp_backward", &miras::mlp_backward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "ln_weight"_a, "ln_bias"_a,
        "ln_eps"_a, "dual"_a, "cu_seqlens"_a, "saved"_a, "grad_out"_a, "grad_final_dual"_a, "bias_tag"_a, "bias_params"_a,
        "chunk_size"_a, "checkpoint_every"_a);
  m.def("bias_names", &miras::bias_names);
  m.def("cpu_capability", [] { return miras::cpu::kernels().name; });
  m.def("cpu_capabilities", &miras::cpu::capabilities);
}
