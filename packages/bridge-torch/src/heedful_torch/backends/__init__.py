"""PyTorch's kernels as backends of heedful, one file each; every file ends in `backend = …`."""
