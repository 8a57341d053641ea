"""Every test starts from its own seed, so that a failure repeats whatever else ran before it; a log says of what."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch


def pytest_report_header() -> str:
    """Versions that ``make test`` runs more than one of."""

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"no {name}"

    return ", ".join(map(found, ("torch", "triton", "numpy", "peft", "torchao")))


@pytest.fixture(autouse=True)
def _own_seed(request: pytest.FixtureRequest) -> None:
    _, name = request.node.nodeid.split("::", 1)  # wherever its file is
    torch.manual_seed(zlib.crc32(name.encode()))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of many small products, which threads only slow down, tenfold where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
