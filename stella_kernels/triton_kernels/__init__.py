"""The GPU kernels, in Triton, which the rooms below import; ``registration.py`` does at an operator's first call."""
