"""The implementations of a memory: the reference, C++, Triton and CUDA C++. :class:`miras_kernels.dispatch.Backend` is what each offers."""
