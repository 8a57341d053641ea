"""The operators of ``torch.ops.stella_kernels``: signatures, reference, fakes, gradients, and which backend serves."""
