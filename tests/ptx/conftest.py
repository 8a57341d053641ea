"""The emulator is of a process of its own: it replaces torch's allocator and Triton's driver."""

from __future__ import annotations

import os

import pytest

if "STELLA_PTX_LIBRARIES" not in os.environ:
    collect_ignore_glob = ["test_*.py", "*/test_*.py"]


def pytest_report_header() -> str:
    return f"PTX of sm_{os.environ.get('STELLA_PTX_ARCH', '80')}"


@pytest.fixture(autouse=True, scope="session")
def _emulator() -> None:
    """Before any test's tensors."""
    from tests.ptx import emulator

    emulator.library()


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The reference's products are small."""
