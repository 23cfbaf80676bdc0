"""The functions of this library under the signatures of others: :mod:`miras_kernels.interop.fla`."""
