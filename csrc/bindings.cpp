// The extension module miras_kernels._C: turns tensors into parameter structs and hands them to the kernels.
// This file, *_bindings.cpp, step_signature.h, tensor.h and torch_api.cpp are the only ones that depend on Python.
#include <array>
#include <tuple>

#include "cpu/capability.h"
#include "shares.h"
#include "step_bindings.h"
#include "tensors.h"

namespace miras {
namespace {

using miras::states;  // besides the overloads below

// As Python passes them, with Matrices a tensor, or two of an MLP: duals and momenta; their gradients; start, position and
// open_log_decay of an open chunk.
template <class Matrices> using StateTuple = std::tuple<Matrices, std::optional<Matrices>>;
template <class Matrices> using GradStateTuple = std::tuple<std::optional<Matrices>, std::optional<Matrices>>;
template <class Matrices> using OpenChunkTuple = std::tuple<std::optional<Matrices>, OptionalTensor, OptionalTensor>;

// A segment has at most as many chunks as the sequence.
int longest_segment(const MemoryParams& p) {
  return int(std::min<int64_t>(p.checkpoint_every, std::max<int64_t>(1, (p.T + p.C - 1) / p.C)));
}

// Slots for the states at chunk starts, of one or several matrices each; undefined without checkpoints
Tensor new_checkpoints(const MemoryParams& p, int64_t matrices, int64_t rows, int64_t cols) {
  if (p.checkpoint_every == 0) return {};
  const Tensor checkpoints = matrices == 1 ? new_float({p.slots(), p.H, rows, cols}) : new_float({p.slots(), p.H, matrices, rows, cols});
  if (p.cu_seqlens) checkpoints.call("zero_");  // packed sequences may leave slots unused
  return checkpoints;
}
float* checked_checkpoints(const MemoryParams& p, const Tensor& checkpoints, int64_t matrices, int64_t rows, int64_t cols) {
  require(p.checkpoint_every > 0, "the backward needs checkpoints");
  require(is_float(checkpoints) && checkpoints.is_contiguous() &&
              (matrices == 1 ? checkpoints.has_shape({p.slots(), p.H, rows, cols})
                             : checkpoints.has_shape({p.slots(), p.H, matrices, rows, cols})),
          "bad checkpoints");
  return checkpoints.data<float>();
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

void fill(LinearParams& p, const Tokens& x, const StateTuple<Tensor>& state, const OptionalTensor& cu_seqlens, const RuleTuple& rules,
          int64_t checkpoint_every) {
  const auto& [dual, momenta] = state;
  fill_tokens(p, x, cu_seqlens, rules, checkpoint_every);
  p.Dk = int(x.q.size(3)), p.Dv = int(x.v.size(3));
  require(p.Dk >= 1 && p.Dk <= kMaxHead && p.Dv >= 1 && p.Dv <= kMaxHead, "Dk or Dv is out of range");
  p.dual = states(p, dual, "dual must be float32 [N, H, Dv, Dk]");
  require(momenta.has_value() == x.momentum.has_value(), "momentum and momenta come together");
  if (momenta) p.momenta = states(p, *momenta, "momenta must be float32 [N, H, Dv, Dk]");

  share_rows(p);
}

// Exact steps in blocks of that many tokens, or 0; decay first; erase_k and key_log_decay: see cpu/block.h, cpu/keyed.h
using BlockTuple = std::tuple<int64_t, bool, OptionalTensor, OptionalTensor>;

// `keys` keeps the tensors.
void set_block(LinearParams& p, const BlockTuple& given, const View& k, std::array<Tensor, 2>& keys) {
  const auto& [block, decay_first, erase_k, key_log_decay] = given;
  const bool variant = decay_first || erase_k || key_log_decay;
  require(!variant || (block > 0 && p.C == 1), "variants of the delta rule need exact steps in blocks and chunks of one token");
  if (block == 0) return;
  p.decay_first = decay_first;
  require(!(erase_k || key_log_decay) || block <= 16, "blocks with erase_k or key_log_decay have 16 tokens at most");
  if (erase_k) {
    require(erase_k->has_shape(k.sizes()) && erase_k->is(k.type()) && erase_k->on_cpu(), "erase_k must be like k");
    p.erase_k = tokens(keys[0] = channels_together(*erase_k));
  }
  if (key_log_decay) {
    require(key_log_decay->has_shape(k.sizes()) && is_float(*key_log_decay) && !p.log_decay,
            "key_log_decay must be float32 [B, T, H, Dk], without log_decay");
    p.key_log_decay = tokens(keys[1] = channels_together(*key_log_decay));
  }
  require(p.bias == BiasTag::l2 && p.retention == RetentionTag::l2 && !p.momentum && !p.lr_per_channel && !p.decay_per_channel,
          "no exact steps in blocks for these rules and gates");
  require(block >= p.C && block <= 256 && block % p.C == 0, "a block must hold whole chunks, 256 tokens at most");
  p.chunk = p.C, p.C = int(block);
}

// (out, final dual, final momenta, final start, final open_log_decay, checkpoints), None if absent
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_forward(const TokenTuple& tokens_, const StateTuple<Tensor>& state,
                                                                          const OpenChunkTuple<Tensor>& open_chunk,
                                                                          const OptionalTensor& cu_seqlens, const RuleTuple& rules,
                                                                          int64_t checkpoint_every, bool output_final_state,
                                                                          const BlockTuple& block) {
  const Tokens x(tokens_);
  const auto& [start, position, open_log_decay] = open_chunk;
  LinearForward p;
  fill(p, x, state, cu_seqlens, rules, checkpoint_every);

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
  std::array<Tensor, 2> keys;
  set_block(p, block, x.k, keys);

  const Tensor out = new_tensor({p.B, p.T, p.H, p.Dv}, x.q.type());
  p.out = tokens(out);
  Tensor final_dual, final_momenta, final_start, final_log_decay;
  if (output_final_state) {
    final_dual = new_states(p.final_dual, p), final_start = new_states(p.final_start, p);
    if (p.momentum) final_momenta = new_states(p.final_momenta, p);
    final_log_decay = new_float(open_decay_shape(p, p.Dv));
    p.final_log_decay = final_log_decay.data<float>();
  }
  const Tensor checkpoints = new_checkpoints(p, p.momentum ? 2 : 1, p.Dk, p.Dv);
  if (checkpoint_every > 0) p.checkpoints = checkpoints.data<float>();

  const cpu::Kernels& kernels = cpu::kernels();
  run_tasks(p.keyed() ? kernels.keyed_forward : p.chunk ? kernels.block_forward : kernels.linear_forward, p);
  return {out, final_dual, final_momenta, final_start, final_log_decay, checkpoints};
}

// ---- backward ----

// The gradient of a gate of a linear memory: each panel writes its own channels, or else a share of [B, T, H].
OptionalTensor gate_gradient(TokenTensor& to, const LinearParams& p, const TokenTensor& gate, bool per_channel) {
  if (!gate) return {};
  const Tensor shares = per_channel ? new_float({p.B, p.T, p.H, p.Dv}) : new_shares(p.panels, {p.B, p.T, p.H}, kFloat32);
  to = first_share(p, shares, per_channel ? p.Dv : 0);
  return shares;
}
OptionalTensor sum_gate(const LinearParams& p, const OptionalTensor& shares, bool per_channel) {
  return shares && !per_channel ? OptionalTensor(sum_shares(*shares, p.panels, kFloat32)) : shares;
}

// (dq, dk, dv, dlr, dlog_decay, ddelta, dmomentum, derase_k, dkey_log_decay, d_dual, d_momenta)
std::tuple<Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor,
           OptionalTensor>
linear_backward(const TokenTuple& tokens_, const StateTuple<Tensor>& state, const OptionalTensor& cu_seqlens, const RuleTuple& rules,
                int64_t checkpoint_every, const Tensor& checkpoints, const Tensor& grad_out_, const GradStateTuple<Tensor>& grad_state,
                const BlockTuple& block) {
  const Tokens x(tokens_);
  const Tensor &q = x.q, &v = x.v;
  const auto& [grad_final_dual, grad_final_momenta] = grad_state;
  LinearBackward p;
  fill(p, x, state, cu_seqlens, rules, checkpoint_every);
  std::array<Tensor, 2> keys;
  set_block(p, block, x.k, keys);
  p.checkpoints = checked_checkpoints(p, checkpoints, p.momentum ? 2 : 1, p.Dk, p.Dv);
  p.segment = longest_segment(p);

  require(grad_out_.has_shape(v.sizes()) && grad_out_.is(q.type()) && grad_out_.on_cpu(), "grad_out must be like out");
  const Tensor grad_out = channels_together(grad_out_);
  p.grad_out = tokens(grad_out);
  if (grad_final_dual) p.grad_final_dual = states(p, *grad_final_dual, "grad_final_dual must be like the dual");
  require(!grad_final_momenta || p.momentum, "a gradient of a momentum that there is not");
  if (grad_final_momenta) p.grad_final_momenta = states(p, *grad_final_momenta, "grad_final_momenta must be like the dual");

  p.grad_dtype = p.panels > 1 ? Dtype::f32 : p.dtype;
  const Type shared = p.panels > 1 ? kFloat32 : q.type();
  const auto new_keys = [&](Type type) { return new_shares(p.panels, {p.B, p.T, p.H, p.Dk}, type); };
  const Tensor dq = new_keys(shared), dk = new_keys(shared), dv = new_tensor({p.B, p.T, p.H, p.Dv}, q.type());
  p.dq = first_share(p, dq, p.Dk), p.dk = first_share(p, dk, p.Dk), p.dv = tokens(dv);
  p.key_part = p.B * p.T * p.H * p.Dk, p.gate_part = p.B * p.T * p.H;
  const OptionalTensor dlr = gate_gradient(p.dlr, p, p.lr, p.lr_per_channel);
  const OptionalTensor dlog_decay = gate_gradient(p.dlog_decay, p, p.log_decay, p.decay_per_channel);
  const OptionalTensor ddelta = gate_gradient(p.ddelta, p, p.delta, p.delta_per_channel);
  const OptionalTensor dmomentum = gate_gradient(p.dmomentum, p, p.momentum, false);
  OptionalTensor derase_k, dkey_log_decay;
  if (p.erase_k) derase_k = new_keys(shared), p.derase_k = first_share(p, *derase_k, p.Dk);
  if (p.key_log_decay) dkey_log_decay = new_keys(kFloat32), p.dkey_log_decay = first_share(p, *dkey_log_decay, p.Dk);
  const Tensor d_dual = new_states(p.d_dual, p);
  OptionalTensor d_momenta;
  if (p.momentum) d_momenta = new_states(p.d_momenta, p);

  const cpu::Kernels& kernels = cpu::kernels();
  run_tasks(p.keyed() ? kernels.keyed_backward : p.chunk ? kernels.block_backward : kernels.linear_backward, p);
  return {sum_shares(dq, p.panels, q.type()),
          sum_shares(dk, p.panels, q.type()),
          dv,
          sum_gate(p, dlr, p.lr_per_channel),
          sum_gate(p, dlog_decay, p.decay_per_channel),
          sum_gate(p, ddelta, p.delta_per_channel),
          sum_gate(p, dmomentum, false),
          derase_k ? OptionalTensor(sum_shares(*derase_k, p.panels, q.type())) : derase_k,
          sum_gate(p, dkey_log_decay, false),
          d_dual,
          d_momenta};
}

// ---- MLP memory ----

using Pair = std::array<Tensor, 2>;
using OptionalPair = std::optional<Pair>;

// ln_weight, ln_bias and ln_eps
using NormTuple = std::tuple<Tensor, Tensor, double>;
NormTuple contiguous(const NormTuple& x) { return {std::get<0>(x).contiguous(), std::get<1>(x).contiguous(), std::get<2>(x)}; }

// W1 [N, H, D, Hd] and W2 [N, H, Hd, D]
void fill_states(StateTensor (&to)[2], const MlpParams& p, const Pair& from, const char* what) {
  require(is_float(from[0]) && from[0].has_shape({p.N, p.H, p.D, p.Hd}) && is_float(from[1]) && from[1].has_shape({p.N, p.H, p.Hd, p.D}),
          what);
  to[0] = states(from[0]), to[1] = states(from[1]);
}
Pair new_states(StateTensor (&to)[2], const MlpParams& p) {
  const Pair fresh = {new_float({p.N, p.H, p.D, p.Hd}), new_float({p.N, p.H, p.Hd, p.D})};
  to[0] = states(fresh[0]), to[1] = states(fresh[1]);
  return fresh;
}

// ln_weight and ln_bias are contiguous.
void fill(MlpParams& p, const Tokens& x, const NormTuple& norm, const StateTuple<Pair>& state, const OptionalTensor& cu_seqlens,
          const RuleTuple& rules, int64_t checkpoint_every) {
  const auto& [ln_weight, ln_bias, ln_eps] = norm;
  const auto& [dual, momenta] = state;
  fill_tokens(p, x, cu_seqlens, rules, checkpoint_every);
  require(!p.lr_per_channel && !p.decay_per_channel && !p.delta_per_channel, "an MLP memory's gates must be [B, T, H]");
  require(x.v.has_shape(x.q.sizes()), "v must be like q");
  require(dual[0].dim() == 4, "W1 must have four dimensions");
  p.D = int(x.q.size(3)), p.Hd = int(std::min<int64_t>(dual[0].size(3), 1 << 20));
  require(p.D >= 1 && p.D <= kMaxHead && p.Hd >= 1 && p.Hd <= kMaxHidden, "D or Hd is out of range");
  fill_states(p.dual, p, dual, "the duals must be float32 [N, H, D, Hd] and [N, H, Hd, D]");
  require(momenta.has_value() == x.momentum.has_value(), "momentum and momenta come together");
  if (momenta) fill_states(p.momenta, p, *momenta, "the momenta must be like the duals");
  for (const Tensor* each : {&ln_weight, &ln_bias})
    require(is_float(*each) && each->has_shape({p.H, p.D}), "ln_weight and ln_bias must be float32 [H, D]");
  p.ln_weight = ln_weight.data<float>(), p.ln_bias = ln_bias.data<float>();
  p.ln_eps = float(ln_eps);
  p.share_task(p.tasks(), num_threads(), p.Hd, int64_t(p.D) * p.Hd);
  p.parallel_for = parallel_for;
}

// As linear_forward, then the products and the scores
std::tuple<Tensor, Pair, Pair, Pair, Tensor, Tensor, Tensor, Tensor> mlp_forward(const TokenTuple& tokens_, const NormTuple& norm_,
                                                                                 const StateTuple<Pair>& state,
                                                                                 const OpenChunkTuple<Pair>& open_chunk,
                                                                                 const OptionalTensor& cu_seqlens, const RuleTuple& rules,
                                                                                 int64_t checkpoint_every, bool output_final_state) {
  const Tokens x(tokens_);
  const NormTuple norm = contiguous(norm_);
  const auto& [start, position, open_log_decay] = open_chunk;
  MlpForward p;
  fill(p, x, norm, state, cu_seqlens, rules, checkpoint_every);

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

  const Tensor out = new_tensor({p.B, p.T, p.H, p.D}, x.q.type());
  p.out = tokens(out);
  Pair final_dual, final_momenta, final_start;
  Tensor final_log_decay, products, scores;
  if (output_final_state) {
    final_dual = new_states(p.final_dual, p), final_start = new_states(p.final_start, p);
    if (p.momentum) final_momenta = new_states(p.final_momenta, p);
    final_log_decay = new_float({p.N, p.H});
    p.final_log_decay = final_log_decay.data<float>();
  }
  const Tensor checkpoints = new_checkpoints(p, p.momentum ? 4 : 2, p.Hd, p.D);
  if (checkpoint_every > 0) {
    p.checkpoints = checkpoints.data<float>();
    products = new_float({2, p.B, p.H, p.T, p.D}), scores = new_float({p.B, p.H, p.T, p.C});
    p.products = products.data<float>(), p.scores = scores.data<float>();
  }

  run_tasks(cpu::kernels().mlp_forward, p);
  return {out, final_dual, final_momenta, final_start, final_log_decay, checkpoints, products, scores};
}

// (dq, dk, dv, dlr, dlog_decay, ddelta, dmomentum, dln_weight, dln_bias, d_dual, d_momenta)
std::tuple<Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor, Tensor, Tensor, Pair, OptionalPair>
mlp_backward(const TokenTuple& tokens_, const NormTuple& norm_, const StateTuple<Pair>& state, const OptionalTensor& cu_seqlens,
             const RuleTuple& rules, int64_t checkpoint_every, const Tensor& checkpoints, const Tensor& products, const Tensor& scores,
             const Tensor& grad_out_, const GradStateTuple<Pair>& grad_state) {
  const Tokens x(tokens_);
  const Tensor& q = x.q;
  const NormTuple norm = contiguous(norm_);
  const auto& [grad_final_dual, grad_final_momenta] = grad_state;
  MlpBackward p;
  fill(p, x, norm, state, cu_seqlens, rules, checkpoint_every);
  p.checkpoints = checked_checkpoints(p, checkpoints, p.momentum ? 4 : 2, p.Hd, p.D);
  require(is_float(products) && products.is_contiguous() && products.has_shape({2, p.B, p.H, p.T, p.D}), "bad products");
  require(is_float(scores) && scores.is_contiguous() && scores.has_shape({p.B, p.H, p.T, p.C}), "bad scores");
  p.products = products.data<float>(), p.scores = scores.data<float>();
  p.segment = longest_segment(p);

  require(grad_out_.has_shape(q.sizes()) && grad_out_.is(q.type()) && grad_out_.on_cpu(), "grad_out must be like out");
  const Tensor grad_out = channels_together(grad_out_);
  p.grad_out = tokens(grad_out);
  if (grad_final_dual) fill_states(p.grad_final_dual, p, *grad_final_dual, "grad_final_dual must be like the duals");
  require(!grad_final_momenta || p.momentum, "gradients of momenta that there are not");
  if (grad_final_momenta) fill_states(p.grad_final_momenta, p, *grad_final_momenta, "grad_final_momenta must be like the duals");

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
  OptionalPair d_momenta;
  if (p.momentum) d_momenta = new_states(p.d_momenta, p);

  run_tasks(cpu::kernels().mlp_backward, p);
  return {
      dq,     dk,       dv, dlr, dlog_decay, ddelta, dmomentum, sum_shares(dln_weight, p.N, kFloat32), sum_shares(dln_bias, p.N, kFloat32),
      d_dual, d_momenta};
}

}  // namespace
}  // namespace miras

PYBIND11_MODULE(_C, m) {
  namespace py = pybind11;
  using namespace pybind11::literals;
  miras::find_torch();
  m.doc() = "C++ kernels of miras_kernels; the public functions are in miras_kernels.memory";
  m.def("linear_forward", &miras::linear_forward, "tokens"_a, "state"_a, "open_chunk"_a, "cu_seqlens"_a, "rules"_a, "checkpoint_every"_a,
        "output_final_state"_a, "block"_a);
  m.def("linear_backward", &miras::linear_backward, "tokens"_a, "state"_a, "cu_seqlens"_a, "rules"_a, "checkpoint_every"_a, "checkpoints"_a,
        "grad_out"_a, "grad_state"_a, "block"_a);
  m.def("mlp_forward", &miras::mlp_forward, "tokens"_a, "norm"_a, "state"_a, "open_chunk"_a, "cu_seqlens"_a, "rules"_a,
        "checkpoint_every"_a, "output_final_state"_a);
  m.def("mlp_backward", &miras::mlp_backward, "tokens"_a, "norm"_a, "state"_a, "cu_seqlens"_a, "rules"_a, "checkpoint_every"_a,
        "checkpoints"_a, "products"_a, "scores"_a, "grad_out"_a, "grad_state"_a);
  using Lines = std::tuple<std::vector<double>, decltype(miras::StraightLine::instructions), std::vector<int>>;
  py::class_<miras::CompiledProgram, miras::ProgramPointer>(m, "Program")
      .def(py::init([](int inputs, const Lines& value, const Lines& derivatives) {
             const auto lines = [](const Lines& x) { return std::make_from_tuple<miras::StraightLine>(x); };
             return std::make_shared<miras::CompiledProgram>(inputs, lines(value), lines(derivatives));
           }),
           "inputs"_a, "value"_a, "derivatives"_a);
  miras::bind_steps(m);
  miras::bind_states(m);
  miras::bind_measuring(m);
  m.def("cpu_capability", [] { return miras::cpu::kernels().name; });
  m.def("cpu_capabilities", &miras::cpu::capabilities);
  m.def("cpu_capabilities_by_name", &miras::cpu::capabilities_by_name);
}
