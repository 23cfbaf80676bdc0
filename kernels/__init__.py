"""Triton kernels, installed as miras_kernels.kernels (sources in kernels/)."""
