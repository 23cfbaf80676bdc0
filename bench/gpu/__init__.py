"""The Triton kernels on a GPU: bench/README.md."""
