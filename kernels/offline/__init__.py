"""Compiles kernels for GPUs that are not here, and records what they need. No user imports it."""
