"""The table of cases on every backend and instruction set; the commands ``info`` and ``verify``, which can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stella_kernels import __main__ as command
from stella_kernels.operators import backends
from stella_kernels.operators.native.build_info import build_info
from stella_kernels.operators.signatures import OPERATORS
from stella_kernels.verification import judge
from stella_kernels.verification.case_table import Case, cases

ROOT = Path(__file__).parents[2]
IMPLEMENTATIONS = judge.implementations()


def _affordable(case: Case) -> bool:
    """What torch's SVD does in well under a second; ``verify`` runs the reference over the rest too."""
    return all(shape[-1] <= 64 and shape[-2] <= 10000 for shape in case.shapes)


RUNS = [
    pytest.param(backend, case, id=f"{backend}-{case.name}")
    for backend, implementation in IMPLEMENTATIONS.items()
    for case in cases()
    if case.operator in implementation and (backend != "reference" or _affordable(case))
]


@pytest.mark.parametrize(("backend", "case"), RUNS)
def test_case(backend: str, case: Case, request: pytest.FixtureRequest) -> None:
    if backend == "reference":  # whose products are small: threads are for kernels that share rows between them
        request.getfixturevalue("one_thread")
    result = judge.check(case, backend, IMPLEMENTATIONS[backend])
    assert result.passed, f"{result.what}: error {result.error:.3e}, tolerance {result.tolerance:.3e}"


def test_names_are_unique() -> None:
    names = [case.name for case in cases()]
    assert len(names) == len(set(names))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "stella_kernels", *arguments],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_reader_that_leaves_is_no_error() -> None:
    command = [sys.executable, "-m", "stella_kernels", "info"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before it writes
        errors = process.stderr.read()
    assert "Error" not in errors
    assert process.returncode == 141


def instruction_sets() -> list[str]:
    native = build_info()
    return native.instruction_sets() if native is not None and backends.serving("polar") == "cpu" else []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_set(name: str) -> None:
    if name not in instruction_sets():
        pytest.skip(f"{name} is not in this build")
    native = build_info()
    assert native is not None
    if name not in native.instruction_sets_here():
        pytest.skip(f"this processor has no {name}")
    described = run("info", "--json", STELLA_KERNELS_ISA=name)
    assert json.loads(described.stdout)["native build"]["instruction set chosen"] == name
    done = run("verify", "--quick", STELLA_KERNELS_ISA=name)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_verify_on_the_reference_alone() -> None:
    done = run("verify", "--quick", STELLA_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reference polar" in done.stdout
    assert "backend 'cpu' was not run" in done.stdout


def _wrong_polar(M: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    Q, info = torch.ops.stella_kernels.polar(M, method)
    return Q * (1 + 64 * torch.finfo(Q.dtype).eps), info


def _wrong_gradient(
    gradients: list[torch.Tensor], factors: list[torch.Tensor], snapshots: list[torch.Tensor]
) -> torch.Tensor:
    return torch.ops.stella_kernels.riemannian_gradient_([*gradients[:-1], gradients[-1].clone()], factors, snapshots)


def _wrong_retract(
    moved: list[torch.Tensor], previous: list[torch.Tensor], divisors: list[float], method: str
) -> torch.Tensor:
    return torch.ops.stella_kernels.project_retract_(moved, previous, [1.01 * d for d in divisors], method)


def _wrong_adamw(
    factors: list[torch.Tensor], gradients: list[torch.Tensor], *rest: torch.Tensor | list[torch.Tensor]
) -> torch.Tensor:
    *moments_and_couplings, hyperparameters = rest
    slower = hyperparameters * torch.tensor([0.99, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
    return torch.ops.stella_kernels.stella_adamw_(factors, gradients, *moments_and_couplings, slower)


@pytest.mark.parametrize(
    ("operator", "wrong"),
    [
        ("polar", _wrong_polar),
        ("riemannian_gradient_", _wrong_gradient),
        ("project_retract_", _wrong_retract),
        ("stella_adamw_", _wrong_adamw),
    ],
)
@pytest.mark.usefixtures("one_thread")
def test_verify_fails_where_an_operator_is_wrong(
    operator: str, wrong: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [case for case in cases(quick=True) if case.operator == operator]
    monkeypatch.setattr(command, "cases", lambda quick: few)
    right = dict(judge.implementations()["reference"])
    monkeypatch.setattr(command, "implementations", lambda: {"reference": right})
    assert command.main(["verify", "--quick"]) == 0
    monkeypatch.setattr(command, "implementations", lambda: {"broken": right | {operator: wrong}})
    assert command.main(["verify", "--quick"]) == 1
    assert f"MISS broken {operator}" in capsys.readouterr().out


def _raising(M: torch.Tensor, method: str) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("out of order")


def test_an_operator_that_raises_is_a_miss() -> None:
    case = next(case for case in cases() if case.operator == "polar")
    result = judge.check(case, "broken", {**IMPLEMENTATIONS["reference"], "polar": _raising})
    assert not result.passed
    assert "out of order" in result.what


def test_nan_never_passes() -> None:
    result = judge.Result(cases()[0], "any", "value", float("nan"), 1.0)
    assert not result.passed
    assert result.ratio == float("inf")


def test_info_names_the_backend_of_every_operator(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["info"]) == 0
    text = capsys.readouterr().out
    assert command.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    for operator, served in facts["operators"]["cpu"].items():
        assert operator in text
        assert served["backend"] == backends.serving(operator)
        assert set(served["why not"]) == {backend.name for backend in backends.backends()} - {served["backend"]}
        assert all(served["why not"].values())
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()


def test_info_without_the_native_library() -> None:
    done = run("info", "--json", STELLA_KERNELS_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["environment"]["STELLA_KERNELS_BACKEND"] == "reference"
    assert facts["backends"]["cpu"].startswith("not available: STELLA_KERNELS_BACKEND=reference")
    assert facts["operators"]["cpu"]["polar"]["backend"] == "reference"


def test_without_arguments_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    said = capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    assert capsys.readouterr().out == said
    words = " ".join(said.split())  # however it was wrapped
    for what in ("info", "verify", "compile-report", "python -m bench"):
        assert what in words


def test_unknown_backend_is_an_error() -> None:
    done = run("info", STELLA_KERNELS_BACKEND="fastest")
    assert done.returncode != 0
    assert "STELLA_KERNELS_BACKEND: found 'fastest', wanted one of 'auto', 'reference', 'cpu'" in done.stderr


def test_info_agrees_with_the_dispatcher() -> None:
    for operator in OPERATORS:
        native = torch._C._dispatch_has_kernel_for_dispatch_key(f"stella_kernels::{operator}", "CPU")
        assert backends.serving(operator) == ("cpu" if native else "reference"), operator
