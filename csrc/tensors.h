// From tensors to parameter structs: what all bindings share. Arguments are validated in validation.py; the checks here guard memory.
#pragma once

#include <algorithm>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "bias.h"
#include "compile.h"
#include "retention.h"
#include "tensor.h"

namespace miras {

// [B, T, H] or [B, T, H, D]; dimensions may be expanded.
inline TokenTensor tokens(const View& x) {
  TokenTensor t;
  t.data = x.data();
  t.batch = x.stride(0), t.token = x.stride(1), t.head = x.stride(2);
  t.channel = x.dim() == 4 ? x.stride(3) : 0;
  return t;
}

// [N, H, Dv, Dk]
inline StateTensor states(const View& x) {
  StateTensor s;
  s.data = x.data<float>();
  s.seq = x.stride(0), s.head = x.stride(1), s.row = x.stride(2), s.col = x.stride(3);
  return s;
}

// Kernels read channels as vectors.
inline bool are_channels_together(const View& x) { return x.size(3) == 1 || x.stride(3) == 1; }
inline Tensor channels_together(const Tensor& x) { return are_channels_together(x) ? x : x.contiguous(); }

inline Dtype dtype_of(const View& x) {
  require(x.is(kFloat32) || x.is(kBfloat16), "q, k, v must be float32 or bfloat16");
  return x.is(kFloat32) ? Dtype::f32 : Dtype::bf16;
}

inline bool is_float(const View& x) { return x.on_cpu() && x.is(kFloat32); }

// A row of the table of biases or retention gates: its tag, its parameters and the program of a custom one.
using ProgramPointer = std::shared_ptr<CompiledProgram>;
using RuleCode = std::tuple<int64_t, std::vector<double>, ProgramPointer>;

// A call as Python passes it, in tuples: q, k, v, lr, log_decay, delta and momentum; bias, retention and chunk_size.
using TokenTuple = std::tuple<Tensor, Tensor, Tensor, Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;
// Kernels read a program as long as such a tuple lives.
using RuleTuple = std::tuple<RuleCode, RuleCode, int64_t>;

struct Tokens {
  Tensor q, k, v, lr;
  OptionalTensor log_decay, delta, momentum;

  // q, k and v have their channels together.
  explicit Tokens(const TokenTuple& x) {
    std::tie(q, k, v, lr, log_decay, delta, momentum) = x;
    for (Tensor* each : {&q, &k, &v}) *each = channels_together(*each);
  }
};

template <class Tag, int kCount, int kParams>
void fill_code(Tag& tag, float (&params)[kParams], const Program*& program, int inputs, const RuleCode& code) {
  const auto& [number, values, compiled] = code;
  require(number >= 0 && number < kCount, "unknown tag of a bias or a retention gate");
  require(values.size() <= size_t(kParams), "too many parameters of a bias or a retention gate");
  require((Tag(number) == Tag::custom) == (compiled != nullptr), "a custom bias or gate needs a program, and no other has one");
  require(!compiled || compiled->get()->inputs == inputs, "a bias's program has the inputs e, norm2, delta; a gate's has A");
  tag = Tag(number);
  std::copy(values.begin(), values.end(), params);
  program = compiled ? compiled->get() : nullptr;
}

// float32 [B, T, H], or [B, T, H, Dv] if `per_channel` is given, which is then set; absent gates have no data
inline TokenTensor gate(const MemoryParams& p, const OptionalTensor& x, int64_t dv, bool* per_channel, const char* what) {
  if (!x) return {};
  const bool channels = per_channel && x->dim() == 4;
  require(is_float(*x) && (channels ? x->has_shape({p.B, p.T, p.H, dv}) : x->has_shape({p.B, p.T, p.H})), what);
  if (per_channel) *per_channel = channels;
  return tokens(*x);
}

// What all kernels share
inline void fill_tokens(MemoryParams& p, const Tokens& x, const OptionalTensor& cu_seqlens, const RuleTuple& rules,
                        int64_t checkpoint_every) {
  const auto& [bias, retention, chunk_size] = rules;
  const Tensor &q = x.q, &k = x.k, &v = x.v;
  require(q.dim() == 4 && v.dim() == 4, "q and v must have four dimensions");
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(2);
  p.N = cu_seqlens ? cu_seqlens->size(0) - 1 : p.B;
  p.C = int(chunk_size);
  require(chunk_size >= 1 && chunk_size <= kMaxChunk, "chunk_size is out of range");
  const int64_t dv = v.size(3);
  require(k.has_shape(q.sizes()) && v.has_shape({p.B, p.T, p.H, dv}), "k or v does not fit q");
  require(k.is(q.type()) && v.is(q.type()), "q, k, v must have one dtype");
  require(q.on_cpu() && k.on_cpu() && v.on_cpu(), "q, k, v must be on the CPU");
  p.dtype = dtype_of(q);
  p.q = tokens(q), p.k = tokens(k), p.v = tokens(v);

  p.lr = gate(p, x.lr, dv, &p.lr_per_channel, "lr must be float32 [B, T, H] or [B, T, H, Dv]");
  p.log_decay = gate(p, x.log_decay, dv, &p.decay_per_channel, "log_decay must be float32 [B, T, H] or [B, T, H, Dv]");
  p.delta = gate(p, x.delta, dv, &p.delta_per_channel, "delta must be float32 [B, T, H] or [B, T, H, Dv]");
  p.momentum = gate(p, x.momentum, dv, nullptr, "momentum must be float32 [B, T, H]");

  fill_code<BiasTag, kBiasCount>(p.bias, p.bias_params, p.bias_program, 3, bias);
  fill_code<RetentionTag, kRetentionCount>(p.retention, p.retention_params, p.retention_program, 1, retention);
  require(bias_traits(p.bias, p.bias_program).uses_delta == x.delta.has_value(), "delta given to a bias without one, or missing");
  require(!p.delta_per_channel || !bias_traits(p.bias, p.bias_program).couples_row, "delta per channel needs a coordinate-wise bias");

  if (cu_seqlens) {
    require(p.B == 1 && cu_seqlens->is(kInt64) && cu_seqlens->is_contiguous(), "bad cu_seqlens");
    p.cu_seqlens = cu_seqlens->data<int64_t>();
    require(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.N] == p.T, "cu_seqlens must run from 0 to T");
    for (int64_t n = 0; n < p.N; ++n) require(p.length(n) >= 0, "cu_seqlens must not decrease");
  }
  require(checkpoint_every >= 0 && checkpoint_every < (int64_t(1) << 31), "checkpoint_every must not be negative");
  p.checkpoint_every = int(checkpoint_every);
}

// The positions of an open chunk, checked.
inline const int64_t* positions(const MemoryParams& p, const Tensor& position) {
  require(position.is(kInt64) && position.has_shape({p.N}) && position.is_contiguous(), "position must be int64 [N]");
  require(p.checkpoint_every == 0, "no gradients through an open chunk");
  const int64_t* at = position.data<int64_t>();
  for (int64_t n = 0; n < p.N; ++n) require(at[n] >= 0 && at[n] < p.C, "position must be in [0, chunk_size)");
  return at;
}

// [N, H], or [N, H, Dv] if decays are channel-wise
inline Shape open_decay_shape(const MemoryParams& p, int64_t dv) { return p.decay_per_channel ? Shape{p.N, p.H, dv} : Shape{p.N, p.H}; }
inline Tensor open_decays(const MemoryParams& p, const Tensor& open_log_decay, int64_t dv) {
  require(is_float(open_log_decay) && open_log_decay.has_shape(open_decay_shape(p, dv)),
          "open_log_decay must be float32 [N, H], or [N, H, Dv] if log_decay has channels");
  return open_log_decay.contiguous();
}

// With fewer heads than threads, split the value rows too, into panels of at least 32 rows, or, if something couples them, the stages of
// a chunk.
inline void share_rows(LinearParams& p) {
  const int64_t heads = p.N * p.H, threads = num_threads();
  p.panels = 1, p.panel_width = p.Dv;
  p.parallel_for = parallel_for;
  if (bias_traits(p.bias, p.bias_program).couples_row || retention_traits(p.retention).coupling == Coupling::matrix)
    return p.share_task(heads, threads, p.Dv, int64_t(p.Dk) * p.Dv);
  if (heads == 0 || heads >= threads) return;
  const int64_t wanted = std::min<int64_t>((threads + heads - 1) / heads, p.Dv / 32);
  if (wanted <= 1) return;
  p.panel_width = int(((p.Dv + wanted - 1) / wanted + 15) / 16 * 16);
  p.panels = (p.Dv + p.panel_width - 1) / p.panel_width;
}

// Runs a kernel over all tasks, side by side, or one that threads share; without the interpreter's lock
template <class Params> void run_tasks(void (*kernel)(const Params&, int64_t, int64_t), const Params& p) {
  pybind11::gil_scoped_release nogil;
  if (p.parts > 1) return kernel(p, 0, p.tasks());
  parallel_for(p.tasks(), 1, [&](int64_t first, int64_t last) { kernel(p, first, last); });
}

}  // namespace miras
