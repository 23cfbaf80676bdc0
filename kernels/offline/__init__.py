"""Compiles kernels without the GPU they are for, and records what they need.

Used by ``python -m miras_kernels warmup --target`` (imported inside its functions) and by the tests; no call of a memory imports it.
"""
