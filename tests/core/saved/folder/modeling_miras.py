"""Needs the package miras-kernels."""

from miras_kernels.hf import MirasLlamaConfig, MirasLlamaForCausalLM, MirasLlamaModel  # noqa: F401
