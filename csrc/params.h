// Plain parameter structs of the kernels. Filled once by bindings.cpp, read by every kernel; no torch, no ownership.
//
//   B  batch            T  tokens           H  heads            C  tokens of a chunk
//   N  sequences        Dk key channels     Dv value channels
//
// N = B, or the number of packed sequences (then B = 1). All strides are in elements.
#pragma once

#include "program.h"

// Small functions are always inlined: the kernel files are compiled for several instruction sets, and a shared out-of-line
// copy could be the one that this machine cannot run.
#ifdef __CUDACC__
#define MIRAS_FN __host__ __device__ __forceinline__
#else
#define MIRAS_FN inline __attribute__((always_inline))
#endif

namespace miras {

// The largest sizes; a test compares them with python/miras_kernels/tables/memories.py.
constexpr int64_t kMaxHead = 256, kMaxHidden = 1024, kMaxChunk = 256;

enum class Dtype : int { f32, bf16 };

// Tags of the attentional biases: one numbering for Python, Triton, CUDA and C++.
enum class BiasTag : int {
  dot = 0,
  l2 = 1,
  l1 = 2,
  lp = 3,
  lp_smooth = 4,
  huber_coordinate = 5,
  huber_norm = 6,
  huber_switch = 7,
  robust_l2 = 8,
  custom = 9,  // has a Program
};
constexpr int kBiasCount = 10;
constexpr int kBiasParams = 3;

// Tags of the retention gates, likewise.
enum class RetentionTag : int { l2 = 0, lq = 1, kl = 2, elastic = 3, sigmoid = 4, custom = 5 };
constexpr int kRetentionCount = 6;
constexpr int kRetentionParams = 2;

// q, k, v, gates and their gradients: [B, T, H] or [B, T, H, D]; `data` is float or bfloat16.
struct TokenTensor {
  void* data = nullptr;
  int64_t batch = 0, token = 0, head = 0, channel = 0;
  MIRAS_FN explicit operator bool() const { return data != nullptr; }
};

// A dual, or momenta or gradients shaped like it: [N, H, Dv, Dk] float32.
struct StateTensor {
  float* data = nullptr;
  int64_t seq = 0, head = 0, row = 0, col = 0;
  MIRAS_FN explicit operator bool() const { return data != nullptr; }
};

// What the memories have in common.
struct MemoryParams {
  int64_t B = 0, T = 0, H = 0, N = 0;
  int C = 1;

  Dtype dtype = Dtype::f32;  // of q, k, v, out, grad_out
  BiasTag bias = BiasTag::l2;
  float bias_params[kBiasParams] = {};
  RetentionTag retention = RetentionTag::l2;
  float retention_params[kRetentionParams] = {};
  const Program *bias_program = nullptr, *retention_program = nullptr;  // if custom

  TokenTensor q, k, v;                         // [B, T, H, D*], channel stride 1
  TokenTensor lr, log_decay, delta, momentum;  // float32 [B, T, H]; all but lr optional
  // ... or [B, T, H, Dv]
  bool lr_per_channel = false, decay_per_channel = false, delta_per_channel = false;

  const int64_t* cu_seqlens = nullptr;  // [N + 1]

  // Where threads share a task, the stages of a chunk are split into so many parts (cpu/parts.h).
  int parts = 1;
  void (*parallel_for)(int64_t count, int64_t grain, void (*body)(int64_t first, int64_t last, void* context), void* context) = nullptr;

  // States at chunk starts for the backward, [slots, H, ...] float32 as the kernels hold them: duals A, then with momentum S. Sequence
  // n has the states of its chunks 0, every, 2 every, ... in consecutive slots from `slot(n)` on.
  float* checkpoints = nullptr;
  int checkpoint_every = 0;

  MIRAS_FN int64_t begin(int64_t n) const { return cu_seqlens ? cu_seqlens[n] : 0; }
  MIRAS_FN int64_t length(int64_t n) const { return cu_seqlens ? cu_seqlens[n + 1] - cu_seqlens[n] : T; }
  MIRAS_FN int64_t batch(int64_t n) const { return cu_seqlens ? 0 : n; }

  // A sequence of l tokens needs ceil(l / span) slots, span = C * every. Packed sequences start at n + floor(begin / span):
  // consecutive starts are at least 1 + floor(l / span) apart, and N + floor(T / span) slots are enough for all of them.
  MIRAS_FN int64_t slot(int64_t n) const {
    const int64_t span = int64_t(C) * checkpoint_every;
    return cu_seqlens ? n + cu_seqlens[n] / span : n * ((T + span - 1) / span);
  }
  MIRAS_FN int64_t slots() const {
    const int64_t span = int64_t(C) * checkpoint_every;
    return cu_seqlens ? N + T / span : N * ((T + span - 1) / span);
  }

  // Threads share a single task if its chunks have several blocks of tokens and a stage takes longer than starting it. They would finish
  // two tasks later than side by side, unless there are many of them. `width`: hidden units or value rows, of a matrix of `size` numbers
  MIRAS_FN void share_task(int64_t tasks, int64_t threads, int64_t width, int64_t size) {
    constexpr int64_t kWidth = 32, kTokens = 32, kWork = int64_t(1) << 17;
    const int64_t tokens = C < T ? C : T;
    if (tasks != 1 || tokens < kTokens || tokens * size < kWork) return;
    const int64_t most = width / kWidth < threads ? width / kWidth : threads;
    parts = most > 1 ? int(most) : 1;
  }
};

struct LinearParams : MemoryParams {
  int Dk = 0, Dv = 0;

  // Value rows are shared out among `panels` tasks of `panel_width` rows when there are fewer heads than threads, unless something
  // couples them: then threads share a task.
  int panels = 1;
  int panel_width = 0;

  // Exact steps in blocks (cpu/block.h): tokens of a chunk, C being those of a block; else 0
  int chunk = 0;
  bool decay_first = false;  // errors are taken after the token's decay; chunks of one token only

  // Likewise: keys that are erased in the place of k, and decays of key channels in the place of log_decay (cpu/keyed.h)
  TokenTensor erase_k;        // [B, T, H, Dk], optional, like k
  TokenTensor key_log_decay;  // float32 [B, T, H, Dk], optional
  MIRAS_FN bool keyed() const { return erase_k || key_log_decay; }

  // A and, with momentum, S at the start. Checkpoints are transposed: [slots, H, Dk, Dv], with momentum [slots, H, 2, Dk, Dv].
  StateTensor dual, momenta;

  MIRAS_FN int64_t tasks() const { return N * H * panels; }
};

struct LinearForward : LinearParams {
  // An open chunk: sequence n is position[n] tokens into a chunk that began with the dual `start`.
  StateTensor start;
  const int64_t* position = nullptr;      // [N]
  const float* open_log_decay = nullptr;  // [N, H] or [N, H, Dv], what the open chunk has decayed so far

  TokenTensor out;                                     // [B, T, H, Dv]
  StateTensor final_dual, final_momenta, final_start;  // optional
  float* final_log_decay = nullptr;                    // like open_log_decay, optional
};

struct LinearBackward : LinearParams {
  int segment = 1;                                  // chunks of the longest segment: min(checkpoint_every, chunks there can be)
  TokenTensor grad_out;                             // [B, T, H, Dv]
  StateTensor grad_final_dual, grad_final_momenta;  // optional

  // With several panels dq, dk and the gradients of gates that are not channel-wise are partial sums, one after the other,
  // `*_part` elements apart, dq and dk float32.
  Dtype grad_dtype = Dtype::f32;                   // of dq, dk
  TokenTensor dq, dk, dv;                          // contiguous
  TokenTensor dlr, dlog_decay, ddelta, dmomentum;  // float32, shaped like the gates; all but dlr optional
  TokenTensor derase_k, dkey_log_decay;            // optional; partial sums too, derase_k like dk, dkey_log_decay float32
  int64_t key_part = 0, gate_part = 0;
  StateTensor d_dual, d_momenta;
};

// The MLP memory M(x) = x + LN(W1 gelu(W2 x)): duals W1 [N, H, D, Hd] and W2 [N, H, Hd, D], in this order everywhere, and with
// momentum as many momenta. Checkpoints are [slots, H, 2, Hd, D]: W1 transposed, then W2; with momentum [slots, H, 4, Hd, D], S1
// transposed and S2 after them. A task is one head of one sequence.
struct MlpParams : MemoryParams {
  int D = 0, Hd = 0;
  StateTensor dual[2], momenta[2];

  const float *ln_weight = nullptr, *ln_bias = nullptr;  // [H, D], contiguous
  float ln_eps = 0.0f;

  // Sums over the hidden units, kept by the forward for the backward, float32: what the LayerNorms of a chunk's keys and queries read,
  // A W1' and gamma (Aq W1'), [2, B, H, T, D]; and Aq A', [B, H, T, C], of which the lower triangle counts.
  float *products = nullptr, *scores = nullptr;
  MIRAS_FN float* product(int i, int64_t b, int64_t h, int64_t token) const {
    return products + (((i * B + b) * H + h) * T + token) * D;
  }
  MIRAS_FN float* chunk_scores(int64_t b, int64_t h, int64_t token) const { return scores + ((b * H + h) * T + token) * C; }

  MIRAS_FN int64_t tasks() const { return N * H; }
};

struct MlpForward : MlpParams {
  // As in LinearForward.
  StateTensor start[2];
  const int64_t* position = nullptr;
  const float* open_log_decay = nullptr;

  TokenTensor out;  // [B, T, H, D]
  StateTensor final_dual[2], final_momenta[2], final_start[2];
  float* final_log_decay = nullptr;
};

struct MlpBackward : MlpParams {
  int segment = 1;
  TokenTensor grad_out;                                   // [B, T, H, D]
  StateTensor grad_final_dual[2], grad_final_momenta[2];  // optional

  TokenTensor dq, dk, dv;                            // contiguous
  TokenTensor dlr, dlog_decay, ddelta, dmomentum;    // float32; all but dlr optional
  float *dln_weight = nullptr, *dln_bias = nullptr;  // [N, H, D], a share of every sequence
  StateTensor d_dual[2], d_momenta[2];
};

// ---- steps: a few tokens read into a state in place ----

// The buffers of a decoder, contiguous, in the order of python/miras_kernels/decode/buffers.py, which says what they hold. A head's m
// matrices [K, V] are W' [Dk, Dv] of a linear memory, W1' and W2 [Hd, D] of an MLP. R = C rows of factors have weights kappa and mu:
//
//   A = gamma A_0 + kappa_0 D + kappa_1 S_0 + sum_i left_i (kappa_(2+i) o right_i)'    S = mu_1 S_0 + sum_i mu_(2+i) left_i right_i'
#define MIRAS_STEP_BUFFERS(BUFFER)                                                \
  BUFFER(float, start)            /* [N, H, m, K, V]  A_0                      */ \
  BUFFER(float, primal)           /* likewise; optional: phi of start          */ \
  BUFFER(float, rho)              /* [N, H, m]; optional                       */ \
  BUFFER(float, written)          /* [N, H, m, K, V]  D; optional              */ \
  BUFFER(float, momenta)          /* likewise, S_0; optional                   */ \
  BUFFER(float, left)             /* [N, H, m, R, K]                           */ \
  BUFFER(float, right)            /* [N, H, m, R, V]                           */ \
  BUFFER(float, weights)          /* [N, H, 2 + R, width]  kappa               */ \
  BUFFER(float, momentum_weights) /* [N, H, 2 + R]  mu; optional               */ \
  BUFFER(float, open_log_decay)   /* [N, H, width]  log gamma                  */ \
  BUFFER(int64_t, position)       /* [N]; read by tasks, advanced at the end   */

#define MIRAS_BUFFER_NAME(type, name) #name,
constexpr const char* kStepBuffers[] = {MIRAS_STEP_BUFFERS(MIRAS_BUFFER_NAME)};

struct StepBuffers {
#define MIRAS_BUFFER_POINTER(type, name) type* name = nullptr;
  MIRAS_STEP_BUFFERS(MIRAS_BUFFER_POINTER)
  int width = 1;  // 1, or Dv
  int rows = 1;   // R

  // Where the dual goes when a chunk closes, if not into `start`, which is then left as it is. Linear memory only.
  float* result = nullptr;

  // A state as a value: `written` and `start` hold its dual and, of an open chunk, its start; the dual and the momenta after the
  // tokens take the places of `written` and `momenta`. No other buffer has been set, and R = min(T, C) is enough.
  bool by_value = false;
};

struct LinearStep : LinearParams {
  StepBuffers state;
  TokenTensor out;  // [N, T, H, Dv]
};

struct MlpStep : MlpParams {
  StepBuffers state;
  TokenTensor out;  // [N, T, H, D]
};

}  // namespace miras
