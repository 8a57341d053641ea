"""The GPU kernels, in Triton: importing this imports Triton, which ``triton_backend.py`` does at the first call."""
