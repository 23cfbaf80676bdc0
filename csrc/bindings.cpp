// The extension module miras_kernels._C: turns tensors into parameter structs and hands them to the kernels.
// The only unit that knows torch. What arguments must look like is checked in validation.py; the checks here guard memory.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
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

// What both directions share. q, k, v already have their channels together.
void fill(LinearParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, const OptionalTensor& log_decay,
          const OptionalTensor& delta, const Tensor& dual, const OptionalTensor& cu_seqlens, int64_t bias_tag,
          const std::vector<double>& bias_params, int64_t chunk_size, int64_t checkpoint_every) {
  require(q.dim() == 4 && v.dim() == 4 && dual.dim() == 4, "q, v and dual must have four dimensions");
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(2);
  p.Dk = int(q.size(3)), p.Dv = int(v.size(3));
  p.N = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
  p.C = int(chunk_size);
  require(p.Dk >= 1 && p.Dk <= 256 && p.Dv >= 1 && p.Dv <= 256, "Dk and Dv must be in 1..256");
  require(chunk_size >= 1 && chunk_size <= 256, "chunk_size must be in 1..256");
  require(has_shape(k, {p.B, p.T, p.H, p.Dk}) && has_shape(v, {p.B, p.T, p.H, p.Dv}), "k or v does not fit q");
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
    require(is_float(*delta) && (p.delta_per_channel ? has_shape(*delta, {p.B, p.T, p.H, p.Dv})
                                                     : has_shape(*delta, {p.B, p.T, p.H})),
            "delta must be float32 [B, T, H] or [B, T, H, Dv]");
    require(!p.delta_per_channel || !bias_traits(p.bias).couples_row, "delta per channel needs a coordinate-wise bias");
    p.delta = tokens(*delta);
  }

  require(is_float(dual) && has_shape(dual, {p.N, p.H, p.Dv, p.Dk}), "dual must be float32 [N, H, Dv, Dk]");
  p.dual = states(dual);
  if (cu_seqlens) {
    require(p.B == 1 && cu_seqlens->scalar_type() == at::kLong && cu_seqlens->is_contiguous(), "bad cu_seqlens");
    p.cu_seqlens = cu_seqlens->const_data_ptr<int64_t>();
    require(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.N] == p.T, "cu_seqlens must run from 0 to T");
    for (int64_t n = 0; n < p.N; ++n) require(p.length(n) >= 0, "cu_seqlens must not decrease");
  }
  require(checkpoint_every >= 0 && checkpoint_every < (int64_t(1) << 31), "checkpoint_every must not be negative");
  p.checkpoint_every = int(checkpoint_every);

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

template <class Params> void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p) {
  at::parallel_for(0, p.tasks(), 1, [&](int64_t first, int64_t last) { kernel(p, first, last); });
}

// ---- forward ----

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
    require(position->scalar_type() == at::kLong && has_shape(*position, {p.N}) && position->is_contiguous(),
            "position must be int64 [N]");
    require(checkpoint_every == 0, "no gradients through an open chunk");
    p.start = states(*start);
    p.position = position->const_data_ptr<int64_t>();
    for (int64_t n = 0; n < p.N; ++n) require(p.position[n] >= 0 && p.position[n] < p.C, "position must be in [0, chunk_size)");
    if (open_log_decay) {
      require(is_float(*open_log_decay) && has_shape(*open_log_decay, {p.N, p.H}), "open_log_decay must be float32 [N, H]");
      open = open_log_decay->contiguous();
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

// ---- backward ----

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
  // A segment never holds more chunks than there are.
  p.segment = int(std::min<int64_t>(checkpoint_every, std::max<int64_t>(1, (p.T + p.C - 1) / p.C)));

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
  m.def("bias_names", &miras::bias_names);
  m.def("cpu_capability", [] { return miras::cpu::kernels().name; });
  m.def("cpu_capabilities", &miras::cpu::capabilities);
}
