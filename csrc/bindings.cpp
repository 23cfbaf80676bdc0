// The extension module miras_kernels._C: turns tensors into parameter structs and hands them to the kernels.
// This, step_bindings.cpp and torch_api.cpp are the only units that know Python.
#include <array>
#include <bit>
#include <map>
#include <tuple>

#include "cpu/capability.h"
#include "step_bindings.h"
#include "tensors.h"

namespace miras {
namespace {

using miras::states;  // besides those of a memory, below

// A segment never holds more chunks than there are.
int longest_segment(const MemoryParams& p) {
  return int(std::min<int64_t>(p.checkpoint_every, std::max<int64_t>(1, (p.T + p.C - 1) / p.C)));
}

// S slots of chunk starts, a matrix or several each; empty without checkpoints
Tensor new_saved(const MemoryParams& p, int64_t matrices, int64_t rows, int64_t cols) {
  if (p.checkpoint_every == 0) return new_float({0});
  const Tensor saved = matrices == 1 ? new_float({p.slots(), p.H, rows, cols}) : new_float({p.slots(), p.H, matrices, rows, cols});
  if (p.cu_seqlens) saved.call("zero_");  // packed sequences need not fill all slots
  return saved;
}
float* checked_saved(const MemoryParams& p, const Tensor& saved, int64_t matrices, int64_t rows, int64_t cols) {
  require(p.checkpoint_every > 0, "the backward needs saved states");
  require(is_float(saved) && saved.is_contiguous() &&
              (matrices == 1 ? saved.has_shape({p.slots(), p.H, rows, cols})
                             : saved.has_shape({p.slots(), p.H, matrices, rows, cols})), "bad saved states");
  return saved.data<float>();
}

// A kernel over all tasks, without the interpreter's lock
template <class Params> void run(void (*kernel)(const Params&, int64_t, int64_t), const Params& p) {
  pybind11::gil_scoped_release nogil;
  parallel_for(p.tasks(), 1, [&](int64_t first, int64_t last) { kernel(p, first, last); });
}

// ---- linear memory ----

StateTensor states(const LinearParams& p, const Tensor& x, const char* what) {
  require(is_float(x) && x.has_shape({p.N, p.H, p.Dv, p.Dk}), what);
  return states(x);
}
Tensor new_states(StateTensor& to, const LinearParams& p) {
  const Tensor fresh = new_float({p.N, p.H, p.Dv, p.Dk});
  to = states(fresh);
  return fresh;
}

void fill(LinearParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, const OptionalTensor& log_decay,
          const OptionalTensor& delta, const OptionalTensor& momentum, const Tensor& dual, const OptionalTensor& carried,
          const OptionalTensor& cu_seqlens, const Code& bias, const Code& retention, int64_t chunk_size, int64_t checkpoint_every) {
  fill_tokens(p, q, k, v, lr, log_decay, delta, momentum, cu_seqlens, bias, retention, chunk_size, checkpoint_every);
  p.Dk = int(q.size(3)), p.Dv = int(v.size(3));
  require(p.Dk >= 1 && p.Dk <= 256 && p.Dv >= 1 && p.Dv <= 256, "Dk and Dv must be in 1..256");
  p.dual = states(p, dual, "dual must be float32 [N, H, Dv, Dk]");
  require(carried.has_value() == momentum.has_value(), "momentum and the carried momentum come together");
  if (carried) p.carried = states(p, *carried, "carried must be float32 [N, H, Dv, Dk]");

  // Fewer heads than threads: share out value rows as well, in panels of at least 32, where nothing couples them.
  const int64_t heads = p.N * p.H, threads = num_threads();
  p.panels = 1, p.panel_width = p.Dv;
  const bool coupled = bias_traits(p.bias).couples_row || retention_traits(p.retention).coupling == Coupling::matrix;
  if (heads > 0 && heads < threads && !coupled) {
    const int wanted = int(std::min<int64_t>((threads + heads - 1) / heads, p.Dv / 32));
    if (wanted > 1) {
      p.panel_width = ((p.Dv + wanted - 1) / wanted + 15) / 16 * 16;
      p.panels = (p.Dv + p.panel_width - 1) / p.panel_width;
    }
  }
}

// Exact steps in blocks of so many tokens, or 0: see cpu/block.h
void set_block(LinearParams& p, int64_t block, bool decay_first) {
  require(!decay_first || (block > 0 && p.C == 1), "decay first needs exact steps in blocks and chunks of one token");
  if (block == 0) return;
  p.decay_first = decay_first;
  require(p.bias == BiasTag::l2 && p.retention == RetentionTag::l2 && !p.momentum && !p.lr_per_channel && !p.decay_per_channel,
          "no exact steps in blocks for these rules and gates");
  require(block >= p.C && block <= 256 && block % p.C == 0, "a block must hold whole chunks, 256 tokens at most");
  p.chunk = p.C, p.C = int(block);
}

// (out, final dual, final carried, final start, final open log_decay, saved), empty where there is none
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_forward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
    const OptionalTensor& delta, const OptionalTensor& momentum, const Tensor& dual, const OptionalTensor& carried,
    const OptionalTensor& start, const OptionalTensor& position, const OptionalTensor& open_log_decay,
    const OptionalTensor& cu_seqlens, const Code& bias, const Code& retention, int64_t chunk_size, int64_t checkpoint_every,
    bool output_final_state, int64_t block, bool decay_first) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  LinearForward p;
  fill(p, q, k, v, lr, log_decay, delta, momentum, dual, carried, cu_seqlens, bias, retention, chunk_size, checkpoint_every);

  Tensor open;
  require(start.has_value() == position.has_value(), "start and position come together");
  if (start) {
    p.start = states(p, *start, "start must be float32 [N, H, Dv, Dk]");
    p.position = positions(p, *position);
    if (open_log_decay) {
      open = open_decays(p, *open_log_decay, p.Dv);
      p.open_log_decay = open.data<float>();
    }
  }
  set_block(p, block, decay_first);

  const Tensor out = new_tensor({p.B, p.T, p.H, p.Dv}, q.type());
  p.out = tokens(out);
  const Tensor nothing = new_float({0});
  Tensor final_dual = nothing, final_carried = nothing, final_start = nothing, final_log_decay = nothing;
  if (output_final_state) {
    final_dual = new_states(p.final_dual, p), final_start = new_states(p.final_start, p);
    if (momentum) final_carried = new_states(p.final_carried, p);
    final_log_decay = new_float(open_decay_shape(p, p.Dv));
    p.final_log_decay = final_log_decay.data<float>();
  }
  const Tensor saved = new_saved(p, momentum ? 2 : 1, p.Dk, p.Dv);
  if (checkpoint_every > 0) p.saved = saved.data<float>();

  run(p.chunk ? cpu::kernels().block_forward : cpu::kernels().linear_forward, p);
  return {out, final_dual, final_carried, final_start, final_log_decay, saved};
}

// ---- results that several tasks write a share of ----

// [count, ...], or without that dimension if there is but one
Tensor new_shares(int64_t count, Shape sizes, Type type) {
  if (count != 1) sizes.insert(sizes.begin(), count);
  return new_tensor(sizes, type);
}

uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7fc0;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Their sum, in order
Tensor sum_shares(const Tensor& shares, int64_t count, Type type) {
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
TokenTensor first_share(const MemoryParams& p, const Tensor& shares, int64_t channels) {
  const int64_t width = std::max<int64_t>(channels, 1);
  return {shares.data(), p.T * p.H * width, p.H * width, width, channels ? 1 : 0};
}

// The gradient of a gate of a linear memory: panels write their own channels, or else a share of [B, T, H] each.
OptionalTensor gate_gradient(TokenTensor& to, const LinearParams& p, const TokenTensor& gate, bool per_channel) {
  if (!gate) return {};
  const Tensor shares = per_channel ? new_float({p.B, p.T, p.H, p.Dv}) : new_shares(p.panels, {p.B, p.T, p.H}, kFloat32);
  to = first_share(p, shares, per_channel ? p.Dv : 0);
  return shares;
}
OptionalTensor sum_gate(const LinearParams& p, const OptionalTensor& shares, bool per_channel) {
  return shares && !per_channel ? OptionalTensor(sum_shares(*shares, p.panels, kFloat32)) : shares;
}

// (dq, dk, dv, dlr, dlog_decay, ddelta, dmomentum, d_dual, d_carried)
std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor, OptionalTensor>
linear_backward(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
                const OptionalTensor& delta, const OptionalTensor& momentum, const Tensor& dual, const OptionalTensor& carried,
                const OptionalTensor& cu_seqlens, const Tensor& saved, const Tensor& grad_out_,
                const OptionalTensor& grad_final_dual, const OptionalTensor& grad_final_carried, const Code& bias,
                const Code& retention, int64_t chunk_size, int64_t checkpoint_every, int64_t block,
                bool decay_first) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  LinearBackward p;
  fill(p, q, k, v, lr, log_decay, delta, momentum, dual, carried, cu_seqlens, bias, retention, chunk_size, checkpoint_every);
  set_block(p, block, decay_first);
  p.saved = checked_saved(p, saved, momentum ? 2 : 1, p.Dk, p.Dv);
  p.segment = longest_segment(p);

  require(grad_out_.has_shape(v.sizes()) && grad_out_.is(q.type()) && grad_out_.on_cpu(),
          "grad_out must be like out");
  const Tensor grad_out = channels_together(grad_out_);
  p.grad_out = tokens(grad_out);
  if (grad_final_dual) p.grad_final_dual = states(p, *grad_final_dual, "grad_final_dual must be like the dual");
  require(!grad_final_carried || momentum, "a gradient of a momentum that there is not");
  if (grad_final_carried) p.grad_final_carried = states(p, *grad_final_carried, "grad_final_carried must be like the dual");

  p.grad_dtype = p.panels > 1 ? Dtype::f32 : p.dtype;
  const auto new_keys = [&] { return new_shares(p.panels, {p.B, p.T, p.H, p.Dk}, p.panels > 1 ? kFloat32 : q.type()); };
  const Tensor dq = new_keys(), dk = new_keys(), dv = new_tensor({p.B, p.T, p.H, p.Dv}, q.type());
  p.dq = first_share(p, dq, p.Dk), p.dk = first_share(p, dk, p.Dk), p.dv = tokens(dv);
  p.key_part = p.B * p.T * p.H * p.Dk, p.gate_part = p.B * p.T * p.H;
  const OptionalTensor dlr = gate_gradient(p.dlr, p, p.lr, p.lr_per_channel);
  const OptionalTensor dlog_decay = gate_gradient(p.dlog_decay, p, p.log_decay, p.decay_per_channel);
  const OptionalTensor ddelta = gate_gradient(p.ddelta, p, p.delta, p.delta_per_channel);
  const OptionalTensor dmomentum = gate_gradient(p.dmomentum, p, p.momentum, false);
  const Tensor d_dual = new_states(p.d_dual, p);
  OptionalTensor d_carried;
  if (momentum) d_carried = new_states(p.d_carried, p);

  run(p.chunk ? cpu::kernels().block_backward : cpu::kernels().linear_backward, p);
  return {sum_shares(dq, p.panels, q.type()), sum_shares(dk, p.panels, q.type()), dv,
          sum_gate(p, dlr, p.lr_per_channel), sum_gate(p, dlog_decay, p.decay_per_channel),
          sum_gate(p, ddelta, p.delta_per_channel), sum_gate(p, dmomentum, false), d_dual, d_carried};
}

// ---- MLP memory ----

using Pair = std::array<Tensor, 2>;
using OptionalPair = std::optional<Pair>;

// W1 [N, H, D, Hd] and W2 [N, H, Hd, D]
void fill_states(StateTensor (&to)[2], const MlpParams& p, const Pair& from, const char* what) {
  require(is_float(from[0]) && from[0].has_shape({p.N, p.H, p.D, p.Hd}) && is_float(from[1]) &&
              from[1].has_shape({p.N, p.H, p.Hd, p.D}), what);
  to[0] = states(from[0]), to[1] = states(from[1]);
}
Pair new_states(StateTensor (&to)[2], const MlpParams& p) {
  const Pair fresh = {new_float({p.N, p.H, p.D, p.Hd}), new_float({p.N, p.H, p.Hd, p.D})};
  to[0] = states(fresh[0]), to[1] = states(fresh[1]);
  return fresh;
}

// ln_weight and ln_bias are contiguous already.
void fill(MlpParams& p, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& lr, const OptionalTensor& log_decay,
          const OptionalTensor& delta, const OptionalTensor& momentum, const Tensor& ln_weight, const Tensor& ln_bias, double ln_eps,
          const Pair& dual, const OptionalPair& carried, const OptionalTensor& cu_seqlens, const Code& bias, const Code& retention,
          int64_t chunk_size, int64_t checkpoint_every) {
  fill_tokens(p, q, k, v, lr, log_decay, delta, momentum, cu_seqlens, bias, retention, chunk_size, checkpoint_every);
  require(!p.lr_per_channel && !p.decay_per_channel && !p.delta_per_channel, "an MLP memory's gates must be [B, T, H]");
  require(v.has_shape(q.sizes()), "v must be like q");
  require(dual[0].dim() == 4, "W1 must have four dimensions");
  p.D = int(q.size(3)), p.Hd = int(std::min<int64_t>(dual[0].size(3), 1 << 20));
  require(p.D >= 1 && p.D <= 256 && p.Hd >= 1 && p.Hd <= 1024, "D must be in 1..256 and Hd in 1..1024");
  fill_states(p.dual, p, dual, "the duals must be float32 [N, H, D, Hd] and [N, H, Hd, D]");
  require(carried.has_value() == momentum.has_value(), "momentum and the carried momenta come together");
  if (carried) fill_states(p.carried, p, *carried, "the carried momenta must be like the duals");
  for (const Tensor* x : {&ln_weight, &ln_bias})
    require(is_float(*x) && x->has_shape({p.H, p.D}), "ln_weight and ln_bias must be float32 [H, D]");
  p.ln_weight = ln_weight.data<float>(), p.ln_bias = ln_bias.data<float>();
  p.ln_eps = float(ln_eps);
}

// As linear_forward
std::tuple<Tensor, Pair, Pair, Pair, Tensor, Tensor> mlp_forward(
    const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
    const OptionalTensor& delta, const OptionalTensor& momentum, const Tensor& ln_weight_, const Tensor& ln_bias_, double ln_eps,
    const Pair& dual, const OptionalPair& carried, const OptionalPair& start, const OptionalTensor& position,
    const OptionalTensor& open_log_decay, const OptionalTensor& cu_seqlens, const Code& bias, const Code& retention,
    int64_t chunk_size, int64_t checkpoint_every, bool output_final_state) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  const Tensor ln_weight = ln_weight_.contiguous(), ln_bias = ln_bias_.contiguous();
  MlpForward p;
  fill(p, q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, ln_eps, dual, carried, cu_seqlens, bias, retention,
       chunk_size, checkpoint_every);

  Tensor open;
  require(start.has_value() == position.has_value(), "start and position come together");
  if (start) {
    fill_states(p.start, p, *start, "the starts must be like the duals");
    p.position = positions(p, *position);
    if (open_log_decay) {
      open = open_decays(p, *open_log_decay, p.D);
      p.open_log_decay = open.data<float>();
    }
  }

  const Tensor out = new_tensor({p.B, p.T, p.H, p.D}, q.type());
  p.out = tokens(out);
  const Tensor nothing = new_float({0});
  Pair final_dual = {nothing, nothing}, final_carried = {nothing, nothing}, final_start = {nothing, nothing};
  Tensor final_log_decay = nothing;
  if (output_final_state) {
    final_dual = new_states(p.final_dual, p), final_start = new_states(p.final_start, p);
    if (momentum) final_carried = new_states(p.final_carried, p);
    final_log_decay = new_float({p.N, p.H});
    p.final_log_decay = final_log_decay.data<float>();
  }
  const Tensor saved = new_saved(p, momentum ? 4 : 2, p.Hd, p.D);
  if (checkpoint_every > 0) p.saved = saved.data<float>();

  run(cpu::kernels().mlp_forward, p);
  return {out, final_dual, final_carried, final_start, final_log_decay, saved};
}

// (dq, dk, dv, dlr, dlog_decay, ddelta, dmomentum, dln_weight, dln_bias, d_dual, d_carried)
std::tuple<Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor, Tensor, Pair, OptionalPair>
mlp_backward(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& lr, const OptionalTensor& log_decay,
             const OptionalTensor& delta, const OptionalTensor& momentum, const Tensor& ln_weight_, const Tensor& ln_bias_,
             double ln_eps, const Pair& dual, const OptionalPair& carried, const OptionalTensor& cu_seqlens, const Tensor& saved,
             const Tensor& grad_out_, const OptionalPair& grad_final_dual, const OptionalPair& grad_final_carried, const Code& bias,
             const Code& retention, int64_t chunk_size, int64_t checkpoint_every) {
  const Tensor q = channels_together(q_), k = channels_together(k_), v = channels_together(v_);
  const Tensor ln_weight = ln_weight_.contiguous(), ln_bias = ln_bias_.contiguous();
  MlpBackward p;
  fill(p, q, k, v, lr, log_decay, delta, momentum, ln_weight, ln_bias, ln_eps, dual, carried, cu_seqlens, bias, retention,
       chunk_size, checkpoint_every);
  p.saved = checked_saved(p, saved, momentum ? 4 : 2, p.Hd, p.D);
  p.segment = longest_segment(p);

  require(grad_out_.has_shape(q.sizes()) && grad_out_.is(q.type()) && grad_out_.on_cpu(),
          "grad_out must be like out");
  const Tensor grad_out = channels_together(grad_out_);
  p.grad_out = tokens(grad_out);
  if (grad_final_dual) fill_states(p.grad_final_dual, p, *grad_final_dual, "grad_final_dual must be like the duals");
  require(!grad_final_carried || momentum, "gradients of momenta that there are not");
  if (grad_final_carried) fill_states(p.grad_final_carried, p, *grad_final_carried, "grad_final_carried must be like the duals");

  const Tensor dq = new_tensor(q.sizes(), q.type()), dk = new_tensor(q.sizes(), q.type()), dv = new_tensor(q.sizes(), q.type());
  const Tensor dlr = new_float({p.B, p.T, p.H});
  p.dq = tokens(dq), p.dk = tokens(dk), p.dv = tokens(dv), p.dlr = tokens(dlr);
  const auto gradient = [&](TokenTensor& to, const TokenTensor& gate) {
    if (!gate) return OptionalTensor();
    const Tensor fresh = new_float({p.B, p.T, p.H});
    to = tokens(fresh);
    return OptionalTensor(fresh);
  };
  const OptionalTensor dlog_decay = gradient(p.dlog_decay, p.log_decay), ddelta = gradient(p.ddelta, p.delta);
  const OptionalTensor dmomentum = gradient(p.dmomentum, p.momentum);
  const Tensor dln_weight = new_shares(p.N, {p.H, p.D}, kFloat32), dln_bias = new_shares(p.N, {p.H, p.D}, kFloat32);
  p.dln_weight = dln_weight.data<float>(), p.dln_bias = dln_bias.data<float>();
  const Pair d_dual = new_states(p.d_dual, p);
  OptionalPair d_carried;
  if (momentum) d_carried = new_states(p.d_carried, p);

  run(cpu::kernels().mlp_backward, p);
  return {dq, dk, dv, dlr, dlog_decay, ddelta, dmomentum, sum_shares(dln_weight, p.N, kFloat32),
          sum_shares(dln_bias, p.N, kFloat32),
          d_dual, d_carried};
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
}  // namespace miras

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  miras::find_torch();
  m.doc() = "C++ kernels of miras_kernels; the public functions are in miras_kernels.memory";
  m.def("linear_forward", &miras::linear_forward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "momentum"_a, "dual"_a,
        "carried"_a, "start"_a, "position"_a, "open_log_decay"_a, "cu_seqlens"_a, "bias"_a, "retention"_a, "chunk_size"_a,
        "checkpoint_every"_a, "output_final_state"_a, "block"_a, "decay_first"_a);
  m.def("linear_backward", &miras::linear_backward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "momentum"_a, "dual"_a,
        "carried"_a, "cu_seqlens"_a, "saved"_a, "grad_out"_a, "grad_final_dual"_a, "grad_final_carried"_a, "bias"_a,
        "retention"_a, "chunk_size"_a, "checkpoint_every"_a, "block"_a, "decay_first"_a);
  m.def("mlp_forward", &miras::mlp_forward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "momentum"_a, "ln_weight"_a,
        "ln_bias"_a, "ln_eps"_a, "dual"_a, "carried"_a, "start"_a, "position"_a, "open_log_decay"_a, "cu_seqlens"_a, "bias"_a,
        "retention"_a, "chunk_size"_a, "checkpoint_every"_a, "output_final_state"_a);
  m.def("mlp_backward", &miras::mlp_backward, "q"_a, "k"_a, "v"_a, "lr"_a, "log_decay"_a, "delta"_a, "momentum"_a, "ln_weight"_a,
        "ln_bias"_a, "ln_eps"_a, "dual"_a, "carried"_a, "cu_seqlens"_a, "saved"_a, "grad_out"_a, "grad_final_dual"_a,
        "grad_final_carried"_a, "bias"_a, "retention"_a, "chunk_size"_a, "checkpoint_every"_a);
  miras::bind_steps(m);
  m.def("bias_names", &miras::bias_names);
  m.def("retention_names", &miras::retention_names);
  m.def("cpu_capability", [] { return miras::cpu::kernels().name; });
  m.def("cpu_capabilities", &miras::cpu::capabilities);
}
