"""Mutation testing: one-line faults (mutants), each with the tests that must fail with it. ``make mutants`` lists those that survive.

Each mutant is applied alone to a copy of the source tree, in which only its tests run, up to the first failure. The mutants of the C++
kernels are compiled together, each behind a condition that an environment variable enables. Without a mutant the tests must pass.

    python tests/mutants.py [-k NAME] [-j PROCESSES]
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """Replaces ``text``, which must occur once in ``file``, by ``replacement``; in csrc/ (except csrc/cuda) both are expressions."""

    name: str
    file: str
    tests: tuple[str, ...]  # arguments of pytest, relative to tests/
    text: str
    replacement: str

    @property
    def compiled(self) -> bool:
        return self.file.startswith("csrc/") and not self.file.startswith("csrc/cuda/")


def cases(test: str, *names: str) -> tuple[str, ...]:
    """A parametrized test with these parameter ids."""
    return tuple(f"{test}[{name}]" for name in names)


def cpp(*names: str) -> tuple[str, ...]:
    return cases("cpp/test_cpp.py::test_float32", *names)


#: the forward of the MLP memory in CUDA C++
MLP_CHAIN = cases("cuda/test_mlp_chain.py::test_forward", "sm_80-torch.bfloat16-small")
LINEAR_BACKWARD = cases("cuda/test_linear_backward.py::test_gradients", "sm_90-small")
MLP_BACKWARD = cases("cuda/test_mlp_backward.py::test_gradients", "sm_80-torch.float16-small")
MLP_CLUSTER = cases("cuda/test_mlp_backward.py::test_gradients", "sm_90-torch.float16-cluster-whole")


def triton(*names: str) -> tuple[str, ...]:
    return cases("triton/test_triton.py::test_float32", *names)


def triton_mlp(*names: str) -> tuple[str, ...]:
    return cases("triton/test_triton.py::test_mlp_float32", *names)


def triton_steps(*names: str) -> tuple[str, ...]:
    return cases("triton/test_decode_gpu.py::test_triton_sizes", *names)


def decode(*names: str) -> tuple[str, ...]:
    return cases("core/test_decode.py::test_kernels_continue_a_prompt", *names)


HF = "hf/test_hf.py::test_"
GENERATE = "hf/test_hf_generate.py::test_"

MUTANTS = [
    # ------------------------------------------------------------------------------------------------- csrc: linear memory
    Mutant("cpp-decay-to-end-of-another-token", "csrc/cpu/chunk.h", cpp("linear-l2"),
           "reverse *= alpha[c - 1 - t]", "reverse *= alpha[t]"),
    Mutant("cpp-read-without-gamma", "csrc/cpu/linear_forward.h", cpp("linear-l2"),
           "o.scale_rows(gates.gamma + i)", "void(0)"),
    Mutant("cpp-resumed-chunk-stays-short", "csrc/cpu/linear_forward.h",
           cases("core/test_identities.py::test_pieces_equal_the_whole", "linear-l2-2-pieces-cpp"),
           "position = 0, open_start = nullptr", "open_start = nullptr"),
    Mutant("cpp-momentum-not-carried-on", "csrc/cpu/linear_forward.h", cpp("momentum-no-state"),
           "gates.advance_momenta(c, dk, s.KT, cp, s.U_step, cols, s.S, s.S)", "void(0)"),
    Mutant("cpp-own-writes-without-rho", "csrc/cpu/linear_forward.h", cpp("lq1.5"),
           "store(s.U + i, rho.value * u)", "store(s.U + i, u)"),
    Mutant("cpp-momentum-weight-without-decay", "csrc/cpu/chunk.h", cpp("momentum-strong-decay"),
           "b[t] = weight = alpha[t] * weight + product", "b[t] = weight = weight + product"),
    Mutant("cpp-decay-gradient-one-write-too-many", "csrc/cpu/chunk.h", cpp("linear-l2"),
           "sum(column < r ? y : zeros())", "sum(column <= r ? y : zeros())"),
    Mutant("cpp-write-gradient-not-decayed", "csrc/cpu/linear_backward.h", cpp("linear-l2"),
           "x.scale_rows(gates.to_end + i)", "void(0)"),
    Mutant("cpp-query-gradient-without-the-diagonal", "csrc/cpu/linear_backward.h", cpp("linear-l2"),
           "y.subtract(Rows{s.N + i * cp, cp}, s.K + j, dkp, 0, i + R)", "y.subtract(Rows{s.N + i * cp, cp}, s.K + j, dkp, 0, i)"),
    Mutant("cpp-key-gradient-without-the-next-chunk", "csrc/cpu/linear_backward.h", cpp("linear-l2"),
           "y.subtract(Rows{s.U_end + i * dvp, dvp}, s.J_plain + j, dkp, 0, task.dv, q_soon)", "void(0)"),
    Mutant("cpp-wrong-checkpoint", "csrc/cpu/linear_backward_task.h",
           cases("cpp/test_cpp.py::test_fewer_checkpoints_change_nothing", "1-linear-dot", "2-linear-dot"),
           "first / p.checkpoint_every", "(first > 0 ? first / p.checkpoint_every - 1 : 0)"),
    Mutant("cpp-rho-gradient-not-divided", "csrc/cpu/linear_backward_gates.h", cpp("lq1.5", "linear-l2-lq-momentum-split"),
           "float(total / x.rho.value)", "float(total)"),
    Mutant("cpp-channel-decays-end-without-momentum", "csrc/cpu/channel_decay.h", cpp("linear-l2-channel-wise-momentum"),
           "store(to_end + at(s, j), fade + more)", "store(to_end + at(s, j), fade)"),
    Mutant("cpp-packed-sequences-share-a-slot", "csrc/params.h", cpp("linear-l2-packed", "kl-momentum-packed"),
           "n + cu_seqlens[n] / span", "cu_seqlens[n] / span"),
    Mutant("cpp-block-substitution-without-the-diagonal", "csrc/cpu/block.h", cpp("blocks-chunk-1"),
           "broadcast(G[r * x.cp + s]) * u", "zeros() * u"),
    Mutant("cpp-block-errors-at-the-wrong-token", "csrc/cpu/block.h", cpp("blocks-chunk-2-no-decay"),
           "t / chunk_ * chunk_ - 1", "t - 1"),
    Mutant("cpp-block-gradient-without-later-errors", "csrc/cpu/block_backward.h", cpp("blocks-chunk-1"),
           "y.add(Cols{x.G + i, x.cp}, x.dE + j, dvp, i + R, c)", "void(0)"),
    Mutant("cpp-block-decay-gradient-without-the-errors", "csrc/cpu/block_backward.h", cpp("blocks-chunk-1"),
           "s.read_sums[before] += s.error_sums[t]", "s.read_sums[before] += 0.0f"),
    Mutant("cpp-block-start-of-the-open-chunk", "csrc/cpu/block_forward.h",
           cases("core/test_blocks.py::test_pieces_of_chunks_are_the_whole", "4"),
           "s.weights.row(start - 1)", "s.weights.row(start)"),
    Mutant("cpp-decay-first-sees-its-own-write", "csrc/cpu/block_backward.h",
           cases("core/test_variants.py::test_cpp_kernels", "decay_first-False-token-(33, 40, 20)"),
           "s.weights.clear_own(c, s.F);", ";"),
    Mutant("cpp-keyed-errors-decay-too-late", "csrc/cpu/keyed.h", cpp("variant-kda"),
           "p_.decay_first ? t : t - 1", "t - 1"),
    Mutant("cpp-keyed-channels-do-not-decay", "csrc/cpu/keyed_forward.h", cpp("variant-kda"),
           "s.keyed.gamma(c - 1)", "s.keyed.gamma(-1)"),
    Mutant("cpp-keyed-decay-gradient-without-pairs", "csrc/cpu/keyed_backward.h", cpp("variant-kda"),
           "g * key[t]", "zeros()"),
    Mutant("reference-decay-first-too-late", "python/miras_kernels/backends/reference/blocks.py",
           ("core/test_variants.py::test_the_recurrence_as_it_is_written[decay_first]",),
           "self.before = self.before + 1", "self.before = self.before + 0"),
    Mutant("decayed-state-of-a-single-token-without-its-decay", "python/miras_kernels/call.py",
           ("core/test_variants.py::test_a_single_token_runs_on_the_kernels_of_the_plain_rule[reference-token-decay_first]",),
           "MemoryState((alpha * dual,)", "MemoryState((dual,)"),
    Mutant("slope-of-tanh", "python/miras_kernels/expressions/graph.py",
           ("core/test_expressions.py::test_values_and_derivatives_are_those_of_autograd",),
           'apply("sub", number(1), node), apply("add"', 'apply("sub", number(1), node), apply("sub"'),
    Mutant("maximum-that-chooses-the-second-at-a-tie", "python/miras_kernels/expressions/graph.py",
           ("core/test_expressions.py::test_slopes_at_ties_and_kinks",),
           'apply("le", operands[1], operands[0])', 'apply("lt", operands[1], operands[0])'),
    Mutant("infinite-slope-of-a-square-root", "python/miras_kernels/expressions/graph.py",
           ("core/test_expressions.py::test_slopes_at_ties_and_kinks",),
           'self._unless_zero(x, apply("div", apply("mul", number(0.5), dx), node))', 'apply("div", apply("mul", number(0.5), dx), node)'),
    Mutant("brackets-in-an-expression", "python/miras_kernels/expressions/text.py",
           ("core/test_expressions.py::test_what_is_not_an_expression",), "(),<>=\\s]", "()[],<>=\\s]"),
    Mutant("infinity-times-zero-in-the-reference", "python/miras_kernels/tables/custom.py",
           ("core/test_expressions.py::test_finite_where_autograd_is_not",),
           "return _Psi.apply(self, e, delta)",
           "return evaluate(self.programs.psi, e, (e * e).sum(-1, keepdim=True), delta)[0].expand_as(e)"),
    Mutant("fla-keys-not-normalised", "python/miras_kernels/interop/fla.py",
           ("interop/test_fla.py::test_transformers_kimi_delta_attention",), "    if normalise:", "    if False:"),
    Mutant("reference-block-system-without-step-sizes", "python/miras_kernels/backends/reference/blocks.py",
           ("core/test_reference.py::test_hand_derived_form[linear-chunk-1-l2]",),
           "self.scores[:, :, n] * self.lr[:, :, n].transpose(-1, -2)", "self.scores[:, :, n]"),
    # ---------------------------------------------------------------------------------------------- csrc: biases and gates
    Mutant("cpp-interpreter-scalars-of-the-first-row", "csrc/cpu/interpret.h", cpp("linear-custom"),
           "(i - constant_count) * kPad + row", "(i - constant_count) * kPad"),
    Mutant("cpp-compiler-gives-places-away-too-early", "csrc/compile.cpp", ("cpp/test_interpreter.py::test_many_values_at_once",),
           "last_use[operand] == i", "last_use[operand] >= i"),
    Mutant("cpp-delta-gradient-without-its-sign", "csrc/bias.h", cpp("linear-huber_coordinate"),
           "Math<F>::abs(e) <= delta ? F{} : Math<F>::copysign(F{} + 1.0f, e)", "Math<F>::abs(e) <= delta ? F{} : F{} + 1.0f"),
    Mutant("cpp-smooth-lp-slope-without-a-term", "csrc/bias.h", cpp("linear-lp_smooth-p1.5-odd"),
           "(p - 1.0f) * h * e / m", "h * e / m"),
    Mutant("cpp-softmax-gradient-without-its-sum", "csrc/retention.h", cpp("kl-momentum-packed"),
           "w * (g - dot / mass)", "w * g"),
    Mutant("cpp-softmax-with-padding", "csrc/cpu/retention_states.h", cpp("mlp-kl-odd"),
           "m.without_padding(gate.weight(load(A + j), max), j)", "gate.weight(load(A + j), max)"),
    # -------------------------------------------------------------------------------------------------------- csrc: MLP
    Mutant("cpp-mlp-writes-do-not-decay", "csrc/cpu/mlp_chunk.h", cpp("mlp-huber_norm"),
           "gates.eta[t] * gates.to_end[t]", "gates.eta[t]"),
    Mutant("cpp-mlp-update-without-gelu-slope", "csrc/cpu/mlp_chunk.h", cpp("mlp-huber_norm"),
           "x.multiply(slopeT + at, cp)", "void(0)"),
    Mutant("cpp-mlp-norm-gradient-without-a-term", "csrc/cpu/mlp_backward_stages.h", cpp("mlp-huber_norm"),
           "load(s.dU + row + j) - shrink * load(x + j)", "load(s.dU + row + j)"),
    Mutant("cpp-mlp-weight-gradient-without-the-prediction", "csrc/cpu/mlp_backward_stages.h", cpp("mlp-huber_norm"),
           "load(s.dGw + at) * load(m.G + at) + dE * load(m.X + at)", "load(s.dGw + at) * load(m.G + at)"),
    Mutant("cpp-mlp-momentum-gradient-without-the-state", "csrc/cpu/mlp_backward.h", cpp("mlp-momentum-common"),
           "x.add_scaled(s.J[i] + at, dp, gates.momenta_end(c))", "void(0)"),
    # ----------------------------------------------------------------------------------------------- csrc: steps, bindings
    Mutant("cpp-step-keeps-without-decay", "csrc/cpu/step.h", decode("linear-common"),
           "load(alpha) * load_first(weights + j, n)", "load_first(weights + j, n)"),
    Mutant("cpp-step-ends-a-chunk-without-momentum", "csrc/cpu/step.h", decode("linear-wide"),
           "a.add(m.momenta, w.row(1), w.width)", "void(0)"),
    Mutant("cpp-step-reads-without-its-own-token", "csrc/cpu/linear_step.h", decode("linear-common"),
           "rho * (load(s.O + j) + own * load(s.U + j))", "rho * load(s.O + j)"),
    Mutant("cpp-step-takes-the-error-before-the-decay", "csrc/cpu/linear_step.h",
           ("core/test_variants.py::test_a_single_token_runs_on_the_kernels_of_the_plain_rule[cpp-token-decay_first]",),
           "store(s.U + j, load(w.gamma + j) * load(s.U + j))", "store(s.U + j, load(s.U + j))"),
    Mutant("state-in-place-not-written", "python/miras_kernels/state.py",
           ("core/test_inplace_state.py::test_the_given_state_is_overwritten[cpp-chunks-True]",), "to.copy_(x)", "pass"),
    Mutant("cpp-mlp-step-without-rho", "csrc/cpu/mlp_step.h", decode("mlp-chunk-1-lq"),
           "add_multiple(first.read_scale(), changed, dp, s.Uq)", "add_multiple(1.0f, changed, dp, s.Uq)"),
    Mutant("cpp-steps-advance-by-one-token", "csrc/step_signature.h", decode("linear-common"),
           "(p.state.position[n] + p.T) % p.C", "(p.state.position[n] + 1) % p.C"),
    Mutant("cpp-step-takes-a-momentum-of-one", "csrc/step_signature.h", ("core/test_decode.py::test_errors_of_values",),
           "!(x < 0.0f || x >= 1.0f)", "!(x < 0.0f || x > 1.0f)"),
    Mutant("cpp-panels-not-added-up", "csrc/shares.h", cases("cpp/test_cpp.py::test_any_number_of_threads", "(1, 1)-dot"),
           "x += from[share * size + i]", "x += 0.0f"),
    # ------------------------------------------------------------------------------------------------- csrc/cuda, with nvcc
    Mutant("cuda-momenta-not-decayed", "csrc/cuda/linear_step.cu", cases("cuda/test_cuda.py::test_steps", "linear-l2-elastic-pairs-8"),
           "weight_1 = alpha * weights[width] + moves_1", "weight_1 = weights[width] + moves_1"),
    Mutant("cuda-mlp-without-rho", "csrc/cuda/mlp_step.cu", cases("cuda/test_cuda.py::test_sizes", "mlp-entire"),
           "rho_2 * wq", "wq"),
    Mutant("cuda-open-chunk-keeps-its-log-decay", "csrc/cuda/linear_step.cu", cases("cuda/test_cuda.py::test_sizes", "coupled"),
           " = *open_log_decay = 0.0f", " = 0.0f"),
    Mutant("cuda-mlp-chain-wrong-matrix-of-a-fragment", "csrc/cuda/tiles.h", MLP_CHAIN,
           "(lane >> 4) * 8 + (lane & 7), (lane >> 3) & 1", "(lane >> 3 & 1) * 8 + (lane & 7), lane >> 4"),
    Mutant("cuda-mlp-chain-writes-do-not-decay", "csrc/cuda/mlp_block.h", MLP_CHAIN,
           "at<float>(S::kRaw + 4 * r), -dec,", "at<float>(S::kRaw + 4 * r), -1.0f,"),
    Mutant("cuda-mlp-backward-without-the-second-derivative-of-gelu", "csrc/cuda/mlp_reverse.h", MLP_BACKWARD,
           "first.x * low + second.x, first.y * high + second.y", "first.x * low, first.y * high"),
    Mutant("cuda-mlp-backward-reads-pairs-transposed", "csrc/cuda/mlp_reverse_block.h", MLP_BACKWARD,
           "ldmatrix_x4_trans(c, address(square + by_rows<kPieces>(16 * k, 16 * s, lane)))",
           "ldmatrix_x4(c, address(square + by_rows<kPieces>(16 * k, 16 * s, lane)))"),
    Mutant("cuda-mlp-backward-log-decay-without-the-state", "csrc/cuda/mlp_reverse.h", MLP_BACKWARD,
           "S::kGamma + 4 * (C - 1)) * inner + end", "S::kGamma + 4 * (C - 1)) * 0.0f + end"),
    Mutant("cuda-mlp-backward-of-queries-does-not-decay", "csrc/cuda/mlp_replay.h", MLP_BACKWARD,
           "packed(du, gamma)", "packed(du, 1.0f)"),
    Mutant("cuda-mlp-backward-of-one-block-alone", "csrc/cuda/mlp_block.h", MLP_CLUSTER,
           "s.x += x.x, s.y += x.y, s.z += x.z, s.w += x.w;  // in either block the same", "(void)x;"),
    Mutant("cuda-linear-backward-updates-do-not-decay", "csrc/cuda/linear_reverse_kernel.h", LINEAR_BACKWARD,
           "scale_rows(of_k, x.to_end)", "scale_rows(of_k, x.gamma)"),
    Mutant("cuda-linear-backward-log-decay-without-pairs", "csrc/cuda/linear_reverse_gates.h", LINEAR_BACKWARD,
           "  return decay_from_pairs(token, part);", "  return 0.0f;"),
    # ------------------------------------------------------------------------------------------------------------- Triton
    Mutant("triton-decay-to-end-off-by-a-token", "kernels/common/decays.py", triton("linear-l2-strong-decay"),
           "log_decay + row + H + o_g", "log_decay + row + o_g"),
    Mutant("triton-momentum-weight-from-theta", "kernels/common/decays.py", triton("linear-l2-lq-momentum-split"),
           "b_carry + b_pi", "b_carry + b_theta"),
    Mutant("triton-first-token-without-its-momentum-gradient", "kernels/common/decays_bwd.py", triton("linear-l2-lq-momentum-split"),
           "mask=m_before, other=1.0)", "mask=m_before, other=0.0)"),
    Mutant("triton-backward-loses-the-last-token", "kernels/linear/chain.py",
           cases("triton/test_triton.py::test_states_in_registers", "linear-l2-packed-shared"),
           "m_t = t0 + o_c < end\n", "m_t = t0 + o_c < end - 1\n"),
    Mutant("triton-initial-gradient-transposed", "kernels/linear/chain.py",
           cases("triton/test_triton.py::test_states_in_registers", "linear-huber_norm-heads-first"),
           "o_vk = o_v[None, :] * Dk + o_k[:, None]", "o_vk = o_k[:, None] * Dv + o_v[None, :]"),
    Mutant("triton-state-gradient-without-the-predictions", "kernels/linear/chain.py",
           cases("triton/test_triton.py::test_states_in_registers", "linear-huber_norm-heads-first"),
           "b_j += fitted_dot(tl.trans(b_r), b_de, DTYPE)", "b_j += 0.0"),
    Mutant("triton-block-tiles-joined-without-step-sizes", "kernels/linear/block.py",
           cases("triton/test_triton_blocks.py::test_float32", "no-decay"),
           "dot(b_g * b_lr[None, :], b_p)", "dot(b_g, b_p)"),
    Mutant("triton-block-errors-see-their-own-writes", "kernels/linear/block.py",
           cases("triton/test_triton_blocks.py::test_float32", "first"),
           "tl.where(o_t[None, :] > o_s[:, None], b_l, 0.0)", "tl.where(o_t[None, :] >= o_s[:, None], b_l, 0.0)"),
    Mutant("triton-block-errors-of-the-next-block-are-in-this-one", "kernels/common/decays_bwd.py",
           cases("triton/test_triton_blocks.py::test_float32", "plain"), "& (o_e < TOKENS)", "& (o_e <= TOKENS)"),
    Mutant("triton-erased-keys-read-as-those-written", "kernels/linear/block.py",
           cases("triton/test_triton_blocks.py::test_float32", "erase"),
           "return read(p, system, p.erase_k)", "return read(p, system, None)"),
    Mutant("triton-decay-by-key-channel-counts-a-token-itself", "kernels/linear/keyed.py",
           cases("triton/test_triton_blocks.py::test_float32", "keyed"),
           "tl.where((o_t < t)[:, None], b_g * b_seen + b_writes, 0.0)", "tl.where((o_t <= t)[:, None], b_g * b_seen + b_writes, 0.0)"),
    Mutant("triton-wrong-checkpoint", "kernels/linear/chain_streamed.py",
           cases("triton/test_calls.py::test_the_checkpoint_interval_does_not_change_a_bit", "linear-3"),
           "b_s, mask=only_if(i_c % EVERY == 0, m_kv)", "b_s, mask=only_if(i_c % EVERY == EVERY - 1, m_kv)"),
    Mutant("triton-read-without-gamma", "kernels/linear/read.py", triton("linear-l2-strong-decay"),
           "b_o *= load_gamma(decays, row, o_t * H, m_t, BC)[:, None]", "b_o *= 1.0"),
    Mutant("triton-fused-output-without-step-sizes", "kernels/linear/fused.py", cases("triton/test_fused.py::test_float32", "huber"),
           "fitted_dot(b_p, b_psi * b_lr[:, None], DTYPE)", "fitted_dot(b_p, b_psi, DTYPE)"),
    Mutant("triton-fused-wrong-checkpoint", "kernels/linear/fused.py",
           ("triton/test_fused.py::test_the_checkpoint_interval_does_not_change_a_bit",),
           "(i_next % EVERY == 0)", "(i_c % EVERY == 0)"),
    Mutant("triton-fused-resumed-chunk-predicts-with-its-state", "kernels/linear/fused.py",
           cases("triton/test_calls.py::test_resuming_anywhere_with_the_output_in_the_chain", "(5, 40, 17)"),
           "if PART == HEAD and BIAS.reads_memory", "if False and BIAS.reads_memory"),
    Mutant("triton-decay-gradient-counts-a-token-itself", "kernels/linear/read.py", triton("linear-l2-strong-decay"),
           "o_t[None, :] > o_s[:, None]", "o_t[None, :] >= o_s[:, None]"),
    Mutant("triton-own-writes-without-rho", "kernels/linear/read.py", triton("linear-l2-lq-p1.5"),
           "b_p *= rho", "b_p *= 1.0"),
    Mutant("triton-channel-momentum-not-decayed", "kernels/common/decays.py", triton("linear-l2-extreme-channel-decay-momentum"),
           "b_carry = b_carry * b_alpha", "b_carry = b_carry"),
    Mutant("triton-resumed-chunk-from-its-boundary", "kernels/common/chunks.py",
           cases("triton/test_calls.py::test_resuming_anywhere", "linear-huber_coordinate-batch-torch.float32"),
           "t0 -= tl.load(position + i_n)", "t0 -= 0"),
    Mutant("triton-open-chunk-counted-from-zero", "kernels/common/final_state.py",
           cases("triton/test_calls.py::test_resuming_anywhere", "linear-huber_coordinate-batch-torch.float32"),
           "whole = (before + end - begin) // size", "whole = (end - begin) // size"),
    Mutant("triton-delta-gradient-without-its-sign", "kernels/common/bias.py", triton("linear-huber_coordinate-channel-wise"),
           "tl.where(tl.abs(e) <= delta, 0.0, tl.where(e < 0, -1.0, 1.0))", "tl.where(tl.abs(e) <= delta, 0.0, 1.0)"),
    Mutant("triton-custom-pull-of-another-output", "kernels/common/bias.py",
           cases("triton/test_programs.py::test_same_numbers_as_the_built_in_row", "linear-bias-huber_norm"),
           "programs.constant(BIAS.derivatives), 1)", "programs.constant(BIAS.derivatives), 2)"),
    Mutant("triton-program-with-a-wrong-comparison", "kernels/common/programs.py",
           cases("triton/test_programs.py::test_every_operation", "lt"), "return a < b", "return a <= b"),
    Mutant("triton-lq-slope-with-a-wrong-factor", "kernels/common/retention.py", triton("linear-l2-lq-p1.5"),
           "slope = (RETENTION.r0 - 2.0) * power", "slope = RETENTION.r0 * power"),
    Mutant("triton-mlp-hidden-gradient-without-curvature", "kernels/mlp/inner.py", triton_mlp("mlp-huber_switch"),
           "gelu_slope(b_z) * b_da + gelu_curve(b_z) * b_ga * b_dgz", "gelu_slope(b_z) * b_da"),
    Mutant("triton-mlp-norm-gradient-without-a-term", "kernels/mlp/inner.py", triton_mlp("mlp-huber_switch"),
           " - b_inverse * b_x * row_mean(b_g * b_gu, D)", ""),
    Mutant("triton-mlp-state-with-the-momentums-weight", "kernels/mlp/write.py",
           cases("triton/test_calls.py::test_resuming_anywhere_under_a_gate", "mlp-lq-momentum"),
           "b_w2 += b_m2 * carry", "b_w2 += b_m2 * pi"),
    Mutant("triton-mlp-reads-without-decay", "kernels/mlp/read.py", triton_mlp("mlp-huber_coordinate-strong-decay"),
           "b_scores *= tl.load(p_pairs + o_c[:, None] * C + o_c[None, :])", "b_scores *= (o_c[:, None] >= o_c[None, :])"),
    Mutant("triton-step-position-runs-on", "kernels/decode/steps.py", triton_steps("wide"),
           "tl.store(position, (before + 1) % C)", "tl.store(position, before + 1)"),
    Mutant("triton-step-reads-without-rho", "kernels/decode/linear.py", triton_steps("entire"),
           "scale * b_read", "b_read"),
    Mutant("triton-mlp-step-reads-without-rho", "kernels/decode/mlp.py", triton_steps("mlp-entire"),
           "b_uq += rho_1 * tl.sum", "b_uq += tl.sum"),
    # -------------------------------------------------------------------------------------------- Python: between functions
    Mutant("end-position-without-the-open-chunk", "python/miras_kernels/autograd.py",
           cases("core/test_identities.py::test_pieces_equal_the_whole", "linear-l2-7-pieces-cpp"),
           "return (before + tokens) % call.chunk_size", "return tokens % call.chunk_size"),
    Mutant("gradients-of-a-state-in-the-wrong-places", "python/miras_kernels/autograd.py", cpp("momentum-strong-decay"),
           'for name in call.present()] + grads["state"]', 'for name in call.present()] + grads["state"][::-1]'),
    Mutant("packed-offsets-beyond-the-tokens", "python/miras_kernels/validation.py", ("core/test_errors.py",),
           "if values[-1] != t:", "if values[-1] > t:"),
    Mutant("momentum-of-one-accepted", "python/miras_kernels/validation.py", ("core/test_errors.py",),
           "(momentum >= 1)", "(momentum > 1)"),
    Mutant("float64-computed-in-float32", "python/miras_kernels/validation.py",
           cases("core/test_reference.py::test_vectors", "public-linear_l2_momentum"),
           "return torch.float64 if q.dtype == torch.float64 else torch.float32", "return torch.float32"),
    Mutant("decoder-loads-what-was-written-twice", "python/miras_kernels/decode/buffers.py",
           cases("core/test_decode.py::test_state_and_load_are_inverse", "linear-lq-momentum-reference"),
           "dual - self.gamma() * self.start, 0.0", "dual - self.start, 0.0"),
    Mutant("decoder-state-counts-a-row-to-come", "python/miras_kernels/decode/buffers.py",
           ("core/test_decode.py::test_rows_of_later_tokens_are_ignored",),
           "< 2 + self.position[:, None]", "<= 2 + self.position[:, None]"),
    Mutant("decoder-reorder-leaves-positions", "python/miras_kernels/decode/decoder.py",
           cases("core/test_decode.py::test_sequences_at_different_places", "linear-l2-cpp"),
           "for x in self.buffers.tensors():\n            x.copy_(x.index_select(0, index))",
           "for x in self.buffers.tensors()[:-1]:\n            x.copy_(x.index_select(0, index))"),
    Mutant("steps-without-the-norms-parameters", "python/miras_kernels/decode/operator.py",
           cases("core/test_stepping.py::test_a_block_decodes_in_place", "yaad"),
           "ln_weight, ln_bias = ln_weight.to(dtype), ln_bias.to(dtype)",
           "ln_weight, ln_bias = decoder.norm['ln_weight'], decoder.norm['ln_bias']"),
    Mutant("state-copies-share-positions", "python/miras_kernels/state.py", ("core/test_state.py",),
           "position = of_positions(state.open_chunk.position)", "position = state.open_chunk.position"),
    # ------------------------------------------------------------------------------------------------------ Python: layers
    Mutant("packed-convolution-without-room-for-contexts", "python/miras_kernels/layers/functional.py",
           cases("layers/test_layers.py::test_packed_sequences_equal_separate_calls", "yaad_linear"),
           "of_token * before  # [T], the start", "of_token  # [T], the start"),
    Mutant("padded-outputs-not-zero", "python/miras_kernels/layers/block.py",
           ("layers/test_layers.py::test_padded_outputs_are_zero_even_where_a_projection_has_a_bias",),
           "return out.masked_fill(~mask.unsqueeze(-1), 0), None", "return out, None"),
    Mutant("padding-not-masked", "python/miras_kernels/layers/block.py",
           cases("layers/test_layers.py::test_padding_is_exact_for_any_padded_values", "yaad_linear-left"),
           "order = torch.argsort(mask, dim=1, descending=True, stable=True)", "order = torch.arange(mask.shape[1]).expand_as(mask)"),
    Mutant("step-size-not-shared-with-momentum", "python/miras_kernels/layers/block.py",
           cases("layers/test_layers_recurrence.py::test_a_block_equals_the_written_out_recurrence", "titans"),
           'gates["lr"] * (1 - gates["momentum"])', 'gates["lr"]'),
    Mutant("state-of-a-row-of-padding-without-its-position", "python/miras_kernels/layers/state.py",
           ("layers/test_layers.py::test_a_row_of_only_padding_keeps_its_state",),
           "position = write(memory.open_chunk.position, news.open_chunk.position)", "position = memory.open_chunk.position"),
    # ---------------------------------------------------------------------------------------------------------- Python: hf
    Mutant("hf-grouped-keys-in-another-order", "python/miras_kernels/hf/attention.py", cases(f"{HF}init_from_attention", "Llama"),
           "t.repeat_interleave(heads // t.shape[2], 2)", "t.repeat(1, 1, heads // t.shape[2], 1)"),
    Mutant("hf-mask-of-the-first-tokens", "python/miras_kernels/hf/attention.py",
           cases(f"{GENERATE}several_turns_with_padding", "Llama-left"),
           "return mask[:, seen - tokens :] != 0", "return mask[:, :tokens] != 0"),
    Mutant("hf-positions-without-the-past", "python/miras_kernels/hf/attention.py",
           cases(f"{GENERATE}several_turns_with_padding", "Llama-left"),
           "(before + mask.long().cumsum(1) - 1)", "(mask.long().cumsum(1) - 1)"),
    Mutant("hf-documents-of-one-token-not-seen", "python/miras_kernels/hf/attention.py",
           cases(f"{HF}packed_documents_are_separate", "None-new-Llama-yaad_linear"),
           "position_ids.diff(dim=-1) != 1", "position_ids.diff(dim=-1) < 0"),
    Mutant("hf-cache-not-reordered", "python/miras_kernels/hf/cache.py",
           (f"{GENERATE}beams_and_samples_do_not_depend_on_the_cache", f"{GENERATE}operations_on_a_cache"),
           "self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))", "pass"),
    Mutant("hf-cache-counts-calls", "python/miras_kernels/hf/cache.py",
           (f"{GENERATE}the_state_is_in_the_models_cache_and_does_not_grow",),
           "self.state, self.length, self.is_initialized = state, self.length + tokens, True",
           "self.state, self.length, self.is_initialized = state, self.length + 1, True"),
    Mutant("hf-static-cache-keeps-its-length", "python/miras_kernels/hf/cache.py",
           ("hf/test_hf_static.py::test_several_turns_with_padding_and_a_cache_that_is_reused",),
           "self.length.zero_()", "pass"),
    Mutant("hf-static-cache-not-loaded", "python/miras_kernels/hf/cache.py",
           ("hf/test_hf_static.py::test_several_turns_with_padding_and_a_cache_that_is_reused",),
           "self.decoder.load(state)", "pass"),
    Mutant("hf-loaded-parameters-drawn-anew", "python/miras_kernels/hf/classes.py",
           ("hf/test_hf_save.py::test_a_missing_tensor_is_initialised_and_the_others_are_loaded",),
           "parameter.copy_(values)", "pass"),
    Mutant("hf-second-replacement-forgets-the-first", "python/miras_kernels/hf/replace.py", (f"{HF}two_calls_replace_different_layers",),
           "new.miras = plan.write([*before, group])", "new.miras = plan.write([group])"),
    Mutant("hf-memory-beside-attention-not-added", "python/miras_kernels/hf/attention.py",
           cases("hf/test_hf_parallel.py::test_outputs_do_not_change_before_training", "Llama"),
           "return out + read, weights", "return out, weights"),
    Mutant("hf-neighbouring-channels-not-turned", "python/miras_kernels/hf/attention.py",
           cases("hf/test_hf_hosts.py::test_a_memory_made_from_attention_has_its_queries_keys_and_values", "Cohere"),
           'elif self.host.rotary == "interleaved"', 'elif self.host.rotary == "x"'),
    Mutant("hf-a-cropped-cache-keeps-its-length", "python/miras_kernels/hf/cache.py",
           ("hf/test_hf_take_back.py::test_crop_of_a_cache",),
           "self.length = self.length - count", "pass"),
    # ------------------------------------------------------------------------------------------------ Python: taking back
    Mutant("window-forgets-the-tokens-that-stay", "python/miras_kernels/window.py",
           ("core/test_window.py::test_the_state_has_the_bits_of_one_that_never_read_the_tokens",),
           "state = kept.end()", "state = last.start"),
    Mutant("window-forgets-the-earlier-piece", "python/miras_kernels/window.py",
           ("core/test_window.py::test_the_state_has_the_bits_of_one_that_never_read_the_tokens",),
           "(last,) if last.count >= self.size else (*earlier[-1:], last)", "(last,)"),
    Mutant("decoder-keeps-no-copy-of-its-buffers", "python/miras_kernels/decode/past.py",
           ("core/test_window.py::test_a_decoder_has_the_bits_of_one_that_never_read_the_tokens",),
           "_Piece([x.clone() for x in buffers])", "_Piece(buffers)"),
]  # fmt: skip


def occurrences(mutant: Mutant) -> int:
    return (ROOT / mutant.file).read_text(encoding="utf-8").count(mutant.text)


# ---------------------------------------------------------------------------------------------------------------- running

#: inserted at the top of a C++ source that has mutants
SWITCH = """#ifndef MIRAS_MUTANTS
#define MIRAS_MUTANTS
#include <cstdlib>
inline const int miras_mutant = std::getenv("MIRAS_MUTANT") ? std::atoi(std::getenv("MIRAS_MUTANT")) : 0;
#endif
"""


def copied(folder: Path, tree: Path = ROOT) -> Path:
    """Copy the source tree without build products, except the C++ kernels, so that it can be imported before an installed package."""
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "dist", "__pycache__", ".*_cache", ".hypothesis", "out")
    shutil.copytree(tree, folder, ignore=ignored, symlinks=True)
    link = folder / "python" / "miras_kernels" / "kernels"
    link.unlink(missing_ok=True)
    link.symlink_to(folder / "kernels")
    return folder


def pytest(tree: Path, tests: tuple[str, ...], **environment: str) -> subprocess.CompletedProcess:
    """Run tests in a copy."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    path = os.pathsep.join(filter(None, [str(tree / "python"), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment}
    return subprocess.run(command, cwd=tree / "tests", env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)


def replace(tree: Path, mutant: Mutant, replacement: str) -> None:
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.text) == 1, mutant.name
    path.write_text(text.replace(mutant.text, replacement), encoding="utf-8")


def build(tree: Path, mutants: list[Mutant]) -> None:
    """Compile the kernels with all these mutants; MIRAS_MUTANT=i enables the i-th."""
    for i, mutant in enumerate(mutants, 1):
        replace(tree, mutant, f"(miras_mutant == {i} ? ({mutant.replacement}) : ({mutant.text}))")
    for file in {mutant.file for mutant in mutants}:
        path = tree / file
        path.write_text(SWITCH + path.read_text(encoding="utf-8"), encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of ninja
    env = {**os.environ, "MIRAS_REQUIRE_CPP": "1", "MIRAS_CUDA": "0", "PATH": path}
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the kernels with mutants do not compile:\n{done.stdout[-5000:]}{done.stderr[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-k", default="", metavar="NAME", help="only mutants whose name contains this")
    parser.add_argument("-j", type=int, default=2, metavar="PROCESSES", help="so many at a time")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if args.k in mutant.name]
    if runpy.run_path(str(ROOT / "csrc" / "cuda" / "build.py"))["nvcc"]() is None:
        print("mutants of csrc/cuda are left out: there is no nvcc here")
        chosen = [mutant for mutant in chosen if not mutant.file.startswith("csrc/cuda/")]
    wrong = [f"{m.name}: its text occurs {occurrences(m)} times in {m.file}" for m in chosen if occurrences(m) != 1]
    if wrong or not chosen:
        print("\n".join(wrong) or f"no mutant's name contains {args.k!r}", file=sys.stderr)
        return 2
    compiled = [mutant for mutant in chosen if mutant.compiled]

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.j) as pool:
        right, switched = copied(Path(folder, "right")), Path(folder, "switched")
        if compiled:
            build(copied(switched, right), compiled)

        def sound() -> subprocess.CompletedProcess:
            tests = tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))
            return pytest(switched if compiled else right, tests)

        def run(mutant: Mutant) -> tuple[str, float]:
            began = time.perf_counter()
            if mutant.compiled:
                done = pytest(switched, mutant.tests, MIRAS_MUTANT=str(compiled.index(mutant) + 1))
            else:
                tree = copied(Path(folder, mutant.name), right)
                replace(tree, mutant, mutant.replacement)
                done = pytest(tree, mutant.tests)
                shutil.rmtree(tree)
            broken = f"NOT RUN: pytest ended with {done.returncode}\n{done.stdout[-2000:]}"
            return {0: "SURVIVED", 1: "caught"}.get(done.returncode, broken), time.perf_counter() - began

        first, outcomes = pool.submit(sound), []
        for mutant, (outcome, seconds) in zip(chosen, pool.map(run, chosen), strict=True):
            outcomes.append(outcome)
            print(f"{mutant.name:60s} {mutant.file:45s} {seconds:4.0f} s  {outcome}", flush=True)
        if first.result().returncode != 0:
            print(f"the tests fail without a mutant too:\n{first.result().stdout[-3000:]}", file=sys.stderr)
            return 2
    print(f"{outcomes.count('caught')} of {len(chosen)} mutants caught")
    return 0 if outcomes.count("caught") == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
