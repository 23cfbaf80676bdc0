"""The benchmarks, run from the repository's root: ``python -m bench.cpu``, ``python -m bench.cpu.decode``, ``python -m bench.gpu``."""
