"""The C++ kernels on the CPU: docs/benchmarks.md."""
