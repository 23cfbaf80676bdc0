"""What the CPU and the GPU benchmarks share: implementations to compare, clocks, measuring processes, targets and tables."""
