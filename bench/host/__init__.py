"""``python -m bench host``: what the host takes for a layer and for a step on a GPU, its launches doing nothing.

Kernels are compiled and everything up to the driver's call runs; the driver is a stub (``tests/ptx/driver``), tensors
are small and of the CPU. What torch itself computes, for LoRA and for the base, is computed, on so little that the
host's time is nearly all of it.
"""
