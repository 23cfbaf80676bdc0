"""What the kernels of every memory share."""
