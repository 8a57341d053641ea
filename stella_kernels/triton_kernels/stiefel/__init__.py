"""The Stiefel step: operators, launches and kernels."""
