"""The Triton kernels: the table of cases in the interpreter, what they compile to, what their operators refuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from stella_kernels.operators.signatures import OPERATORS
from stella_kernels.verification.on_device import on

pytest.importorskip("triton")

from tests.triton_kernels import launches as triton_launches

ROOT = Path(__file__).parents[2]
SHARDS = 2


# Every so-many-th case of each operator: minutes, where all of them take a quarter of an hour.
@pytest.fixture(scope="module", params=[6, pytest.param(1, marks=pytest.mark.whole)])
def every(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def interpreted(every: int) -> list[dict[str, Any]]:
    """What tests/triton_kernels/cases.py runs, in processes beside each other."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.triton_kernels.cases", str(shard), str(SHARDS), str(every)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for shard in range(SHARDS)
    ]
    lines: list[dict[str, Any]] = []
    for process in processes:
        out, errors = process.communicate(timeout=1800)
        assert process.returncode == 0, errors[-4000:]
        lines += [json.loads(line) for line in out.splitlines()]
    return lines


@pytest.mark.slow
def test_table_of_cases_in_the_interpreter(interpreted: list[dict[str, Any]], every: int) -> None:
    lines = [line for line in interpreted if "case" in line]
    missed = [line for line in lines if not line["error"] <= line["tolerance"]]  # NaN does not pass
    assert not missed, "\n".join(
        f"{line['case']}: {line['what']}: error {line['error']:.2e}, tolerance {line['tolerance']:.2e}"
        for line in missed
    )
    names = [line["case"] for line in lines]
    for operator in OPERATORS:
        ran = [name for name in names if name.startswith(f"{operator}-")]
        assert len(ran) >= 15 // every, operator
        for dtype in ("float32", "float64", "bfloat16", "float16"):
            assert any(dtype in name for name in (ran if every == 1 else names)), (operator, dtype)
    for check in (
        "storages",
        "ranks",
        "masks",
        "gradients_asked_for",
        "nothing_to_do",
        "repeats",
        "not_finite",
        "refusals",
    ):
        assert any(name.startswith(f"{check}-") for name in names), check


@pytest.mark.pinned_triton
@pytest.mark.slow
def test_every_launch_in_the_interpreter_has_the_types_that_a_chip_takes(interpreted: list[dict[str, Any]]) -> None:
    """With every dtype, storage, diagonal S, part that is not asked for and size of one that the cases have.

    As far as Triton's own program; what defaults become on chips is asked elsewhere.
    """
    launches = {json.dumps(line["launch"], sort_keys=True): line["launch"] for line in interpreted if "launch" in line}
    failed = []
    for launch in launches.values():
        try:
            triton_launches.build(launch, 90)
        except Exception as error:  # of any kind that Triton has
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            failed.append(f"{launch['kernel']} {launch['constants']}: {error}")
    assert not failed, "\n".join(failed)
    kernels = {launch["kernel"].split(":")[1] for launch in launches.values()}
    assert {"gram_kernel", "solve_kernel", "update_kernel", "coupling_kernel", "subtract_kernel"} <= kernels
    assert {"project_kernel", "accumulate_kernel", "contract_kernel", "spread_kernel", "dropout_kernel"} <= kernels
    for name, wanted in (("DIAGONAL", {True, False}), ("KIND", {0, 1, 2})):
        assert {launch["constants"].get(name) for launch in launches.values()} >= wanted, name


def run(code: str, **environment: str) -> str:
    """What a Python of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_importing_the_package_does_not_import_triton() -> None:
    assert run("import sys, stella_kernels; print('triton' in sys.modules)").strip() == "False"


def test_without_triton_the_reference_serves() -> None:
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from stella_kernels.operators import backends\n"
        "print(backends.triton_why_not(), backends.serving('polar', 'cuda'))"
    )
    assert run(code).strip() == "Triton is not installed; pip install triton reference"


def test_asked_for_without_a_gpu_is_an_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, "-c", "import stella_kernels"],
        cwd=ROOT, env=os.environ | {"STELLA_KERNELS_BACKEND": "triton"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "STELLA_KERNELS_BACKEND=triton: there is no GPU that torch can use" in done.stderr


LAUNCHES = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from triton.runtime import interpreter
from stella_kernels.triton_kernels.registration import operators

torch.manual_seed(0)
launched = []
call = interpreter.GridExecutor.__call__
def counted(self, *arguments, **named):
    launched.append(self.fn.__name__)
    return call(self, *arguments, **named)
interpreter.GridExecutor.__call__ = counted

def step(shapes):
    Y = [torch.linalg.qr(torch.randn(n, r)).Q for n, r in shapes]
    G = [torch.randn_like(y) for y in Y]
    m, v = [torch.zeros_like(y) for y in Y], [torch.zeros_like(y) for y in Y]
    rows = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 1.0]] * len(Y), dtype=torch.float64)
    counts = []
    for name, arguments in (
        ("stella_adamw_", (Y, G, m, v, [Y[0].new_empty(0)] * len(Y), rows)),
        ("riemannian_gradient_", (G, Y, [])),
        ("project_retract_", ([y + 0.01 for y in Y], Y, [1.0] * len(Y), "auto")),
    ):
        launched.clear()
        operators()[name](*arguments)
        counts.append(len(launched))
    return counts

def layer(T):
    m, n, r = 24, 300, 2
    x, y, U, S, Vt = (torch.randn(shape) for shape in ((T, n), (T, m), (m, r), (r, r), (r, n)))
    launched.clear()
    A = operators()["adapter_forward_"](y, x, U, S, Vt, 1.0, 0.0, None)
    forward = len(launched)
    operators()["adapter_backward_"](torch.empty_like(x), 0.0, y, x, A, U, S, Vt, 1.0, 0.0, None, [True] * 3)
    return [forward, len(launched) - forward]

steps = [[(20, 3)], [(20, 3), (40, 7), (33, 1), (90, 16)], [(70, 33), (20, 3)], [(140, 100)]]
print([*map(step, steps), layer(5), layer(200)])
"""


def test_launches_do_not_grow_with_the_factors() -> None:
    one, many, large, larger, *layers = json.loads(run(LAUNCHES))
    assert one == many == large == [5, 3, 3]
    assert larger == [6, 3, 3]
    assert layers == [[3, 5], [3, 5]]


REFUSED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import json, torch
from stella_kernels.triton_kernels.launch import device, table
from stella_kernels.triton_kernels.stiefel import launches
from stella_kernels.triton_kernels.registration import operators

torch.manual_seed(0)

def step(couplings, rows, dtype=torch.float32):
    Y = torch.linalg.qr(torch.randn(20, 4)).Q.to(dtype)
    before = Y.clone()
    try:
        arguments = [[Y], [torch.randn_like(Y)], [torch.zeros_like(Y)], [torch.zeros_like(Y)], couplings, rows]
        operators()["stella_adamw_"](*arguments)
    except RuntimeError as error:
        return [str(error), torch.equal(Y, before)]
    return ["", torch.equal(Y, before)]

rows = torch.tensor([[1e-3, 0.9, 0.999, 1e-8, 1.0, 1.0, 1.0]], dtype=torch.float64)
none = torch.empty(0)
refused = [step([K], rows) for K in (torch.zeros(2, 2), torch.zeros(4, 4).bfloat16(), torch.zeros(4, 4, device="meta"))]
refused += [step([], rows), step([none], rows.float()), step([none], rows), step([torch.zeros(4, 4)], rows)]

# the steps of half-precision factors are kept in one memory, wherever their gradients are
Y, held = torch.linalg.qr(torch.randn(20, 4)).Q.bfloat16(), []
kept = []
def found(columns, steps=False):
    kept.append(columns)
    identity = table.identity_of(columns)
    return table.met_before(identity, steps) or table.table_of(identity, columns, steps=steps)

for _ in range(3):
    held.append(found([[Y], [torch.randn_like(Y)], [torch.zeros_like(Y)], [torch.zeros_like(Y)]], steps=True))
assert len({t.held.tensors[0].data_ptr() for t in held}) == 1 and len({t.rows.data_ptr() for t in held}) == 3
assert found(kept[1], steps=True) is held[1]
for t, columns in zip(held, kept):
    assert t.rows[0, table.HEADER :: table.FIELDS][:4].tolist() == [c[0].data_ptr() for c in columns]

# of other memory, its addresses take the others' places, where nothing shares it and loads are as wide; else anew
one, two, odd = torch.randn(40, 4), torch.randn(40, 4), torch.randn(161)[1:].view(40, 4)
first = found([[one], [two]])
assert found([[two], [one]]).items is first.items and found([[one], [one]]).items is not first.items
assert found([[one], [odd]]).rows[0, table.HEADER + table.FIELDS + 3] == table.GENERAL
assert found([[one[:, :2]], [two[:, :2]]]).items is not first.items
assert table.met_before(table.identity_of([[one], [torch.empty(40, 4, device="meta")]])) is None

# a graph's tables outlive the cache, and it takes no settings from the host
device.capturing = launches.capturing = table.capturing = lambda device: True
of_a_graph = found([[Y], [Y]])
for _ in range(2 * table._KEPT):
    found([[torch.linalg.qr(torch.randn(20, 4)).Q]] * 2)
assert any(each is of_a_graph for each in device._captured)
assert all(each is not of_a_graph for _, each in table._tables.values())
try:
    launches.to_device(rows, torch.device("meta"), "stella_adamw_")
except RuntimeError as error:
    refused.append([str(error), True])
print(json.dumps(refused))
"""


def test_what_does_not_belong_to_a_step_is_refused_and_nothing_changed() -> None:
    *refused, plain, coupled, captured = json.loads(run(REFUSED))
    for error, unchanged in refused[:3]:
        assert error.startswith("stella_adamw_: couplings[0]: found (")
        assert "wanted (4, 4), float32 or float64 on cpu" in error
        assert unchanged
    assert "couplings: found 0, wanted 1" in refused[3][0]
    assert "hyperparameters: found (1, 7), torch.float32, wanted (1, 7), float64" in refused[4][0]
    assert plain == coupled == ["", False]
    assert "hyperparameters: found on cpu while a CUDA graph is captured" in captured[0]


def test_without_a_c_compiler_the_reference_serves() -> None:
    code = (
        "import shutil; shutil.which = lambda name: None\n"
        "import sys; sys.platform = 'linux'\n"
        "from stella_kernels.operators import backends\n"
        "print(backends.triton_why_not(), backends.serving('polar', 'cuda'))"
    )
    assert "there is none; install gcc, or set CC reference" in run(code)


def test_compile_report_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    from stella_kernels.__main__ import main

    assert main(["compile-report", "--chips", "sm_99"]) == 2
    assert "--chips: found sm_99, wanted some of sm_80" in capsys.readouterr().out
    assert main(["compile-report", "--kernels", "nosuch"]) == 2
    assert "found no kernel whose name contains 'nosuch'" in capsys.readouterr().out


def test_on_another_device_is_the_same_call() -> None:
    """What ``verify`` wraps a GPU's operators in: here the copies are on the CPU too."""
    buffer = torch.randn(9, 4)
    view, other = buffer[1::2, ::2], buffer[0]

    def call(values: list[torch.Tensor], factor: float) -> torch.Tensor:
        assert values[0].data_ptr() != view.data_ptr()
        values[0].mul_(factor)
        return values[1].clone()

    before = buffer.clone()
    result = on("cpu", call)([view, other], 2.0)
    assert torch.equal(result, before[0])
    before[1::2, ::2] *= 2.0
    assert torch.equal(buffer, before)


# Of each chip one rank whole but for its solves, which take minutes; of one the solve too; and of all the kernel that
# is nearest to spilling. ``compile-report`` does everything.
WHOLE = {"sm_80": 128, "sm_90": 64, "sm_100": 32, "sm_120": 16}


@pytest.mark.pinned_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "chip", [pytest.param(c, marks=[pytest.mark.whole] * (c in ("sm_100", "sm_120"))) for c in WHOLE]
)
def test_compiled_kernels_keep_the_promises_of_their_defaults(chip: str) -> None:
    from stella_kernels.triton_kernels.report.compile_report import faults
    from stella_kernels.triton_kernels.report.compiled import CHIPS, compile_for
    from stella_kernels.triton_kernels.report.variants import RANKS, stiefel_variants

    missed, ranks = [], set()
    for R in RANKS:
        for variant in stiefel_variants(R, arch=CHIPS[chip].target.arch):
            whole = WHOLE[chip] == R and ("solve" not in variant.name or (R == 16 and "adamw" in variant.name))
            if not whole and "adamw gram" not in variant.name:
                continue
            ranks.add(R)
            resources = compile_for(variant, CHIPS[chip])
            assert 0.0 < resources.occupancy <= 1.0
            missed += [f"{variant.name}: {fault}" for fault in faults(resources)]
    assert ranks == set(RANKS)
    assert not missed, "\n".join(missed)
