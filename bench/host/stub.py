"""The operators of a GPU on CPU tensors, their launches doing nothing."""

from __future__ import annotations

import os
import warnings

import torch

from bench.common.ptx import build


def install() -> None:
    """From now on the CPU's operators are Triton's, and launch on the stub. For a process of its own."""
    os.environ["STELLA_PTX_LIBRARIES"] = str(build("stub"))
    os.environ["STELLA_KERNELS_AUTOTUNE"] = "0"  # there is nothing to time
    from tests.ptx import driver

    driver.install(driver.STUB)

    from stella_kernels.operators import autograd
    from stella_kernels.triton_kernels.registration import launch_natively, operators
    from stella_kernels.triton_kernels.stiefel import launches

    def info_of_nothing(table: launches.Table) -> torch.Tensor:
        return torch.zeros(table.factors, launches.INFO_COLUMNS, dtype=torch.float64)

    launches._new_info = info_of_nothing  # the optimizer reads it: every factor was retracted
    autograd._adapter_goes_first = lambda x, W: False  # what a GPU is asked
    global _library
    _library = torch.library.Library("stella_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the CPU's own are replaced, on purpose
        for name, operator in operators().items():
            _library.impl(name, operator, "CPU", allow_override=True)
    launch_natively("CPU")
