"""The adapter and its dropout: operators, launches, sizes and kernels."""
