"""What the operators refuse, on every backend of the CPU: by name and place, and before anything is written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stella_kernels.operators.fallback import REFERENCE
from stella_kernels.operators.signatures import SIGNATURES, Signature
from tests.random_matrices import orthonormal

kernels = torch.ops.stella_kernels
signatures: dict[str, type[Signature]] = {signature.name: signature for signature in SIGNATURES}

# the one that serves, and the reference beside it
each_backend = pytest.mark.parametrize("served", [True, False], ids=["served", "reference"])


def call(served: bool, operator: str, arguments: dict[str, Any]) -> Any:
    implementation: Callable[..., Any] = getattr(kernels, operator) if served else REFERENCE[operator]
    return implementation(*arguments.values())


def good(operator: str) -> dict[str, Any]:
    """Arguments that belong together: three factors of two shapes, or a layer."""
    shapes = [(9, 3), (5, 5), (9, 3)]
    factors = [orthonormal(n, r).float() for n, r in shapes]

    def like() -> list[Tensor]:
        return [torch.randn(shape).abs() for shape in shapes]

    T, m, n, r = 4, 6, 5, 2
    layer = {
        "U": torch.randn(m, r),
        "S": torch.randn(r, r),
        "Vt": torch.randn(r, n),
        "scale": 1.5,
        "p": 0.0,
        "seed": None,
    }
    settings = [[1e-3, 0.9, 0.99, 1e-8, 1.0, 1.0, 1.0]] * 3
    return {
        "polar": {"M": torch.randn(2, 5, 3), "method": "auto"},
        "riemannian_gradient_": {"gradients": like(), "factors": factors, "snapshots": like()},
        "project_retract_": {
            "moved": [Y + 0.1 for Y in factors],
            "previous": factors,
            "divisors": [1.0, 2.0, 1.0],
            "method": "auto",
        },
        "stella_adamw_": {
            "factors": factors,
            "gradients": like(),
            "exp_avgs": like(),
            "exp_avg_sqs": like(),
            "couplings": [torch.empty(0), torch.randn(5, 5), torch.empty(0)],
            "hyperparameters": torch.tensor(settings, dtype=torch.float64),
        },
        "philox_dropout": {"x": torch.randn(3, 4), "p": 0.5, "seed": torch.tensor(3)},
        "adapter_forward_": {"y": torch.randn(T, m), "x": torch.randn(T, n), **layer},
        "adapter_product": {"x": torch.randn(T, n), "b": torch.randn(m), **layer},
        "adapter_backward_": {
            "grad_x": torch.randn(T, n),
            "beta": 1.0,
            "grad_y": torch.randn(T, m),
            "x": torch.randn(T, n),
            "A": torch.randn(T, r),
            **layer,
            "needed": [True] * 3,
        },
    }[operator]


def tensors(arguments: dict[str, Any]) -> list[tuple[str, int | None, Tensor]]:
    found: list[tuple[str, int | None, Tensor]] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found.append((name, None, value))
        elif isinstance(value, list) and value and isinstance(value[0], Tensor):
            found += [(name, i, item) for i, item in enumerate(value)]
    return [(name, i, t) for name, i, t in found if t.numel()]


def replaced(arguments: dict[str, Any], name: str, index: int | None, value: object) -> dict[str, Any]:
    given = arguments[name]
    new = value if index is None else [*given[:index], value, *given[index + 1 :]]
    return {**arguments, name: new}


def called(name: str, index: int | None) -> str:
    return re.escape(name if index is None else f"{name}[{index}]")


def refused(served: bool, operator: str, arguments: dict[str, Any], message: str) -> None:
    """An error that says so, and nothing written: not even what came before in the lists."""
    plain = [t for _, _, t in tensors(arguments) if t.device.type == "cpu" and t.layout is torch.strided]
    before = [t.clone() for t in plain]
    with pytest.raises(RuntimeError, match=f"{operator}: {message}"):
        call(served, operator, arguments)
    assert all(torch.equal(t, copy) for t, copy in zip(plain, before, strict=True))


PLACES = [(operator, name, index) for operator in signatures for name, index, _ in tensors(good(operator))]
WRITTEN = [
    (operator, name, index)
    for operator, name, index in PLACES
    if any(
        each.name == name and each.metadata.get("written")
        for each in signatures[operator].__dataclass_fields__.values()
    )
]


@pytest.mark.parametrize("operator", signatures)
@each_backend
def test_good_arguments_are_taken(operator: str, served: bool) -> None:
    call(served, operator, good(operator))


@pytest.mark.parametrize(("operator", "name", "index"), [place for place in PLACES if place[0] != "polar"])
def test_a_tensor_without_values_among_real_ones(operator: str, name: str, index: int | None) -> None:
    """It calls the fake in place of the kernels, which has nothing to return but memory that nobody wrote."""
    arguments = good(operator)
    given = arguments[name] if index is None else arguments[name][index]
    first = next(iter(arguments))
    if (name, index) == (first, None) or (name, index) == (first, 0):
        message = ".*: found on cpu, wanted on meta"  # it stands first, and the others are away
    else:
        message = f"{called(name, index)}: found on meta, wanted on cpu, where"
    refused(True, operator, replaced(arguments, name, index, given.to("meta")), message)


@pytest.mark.parametrize("operator", signatures)
def test_tensors_without_values_alone_are_traced(operator: str) -> None:
    arguments = {
        name: value.to("meta")
        if isinstance(value, Tensor)
        else [item.to("meta") if isinstance(item, Tensor) else item for item in value]
        if isinstance(value, list)
        else value
        for name, value in good(operator).items()
    }
    call(True, operator, arguments)


@pytest.mark.parametrize(("operator", "name", "index"), WRITTEN)
@each_backend
def test_what_is_written_has_memory_of_its_own(operator: str, name: str, index: int | None, served: bool) -> None:
    arguments = good(operator)
    given = arguments[name] if index is None else arguments[name][index]
    n, r = given.shape
    for several in (given[:1].expand(n, r), given[:, :1].expand(n, r), torch.zeros(n + r).as_strided((n, r), (1, 1))):
        message = f"{called(name, index)}: found strides .*, several elements in one place"
        refused(served, operator, replaced(arguments, name, index, several), message)
    for other, place, shared in tensors(arguments):
        if (other, place) == (name, index) or shared.shape != given.shape or shared.dtype != given.dtype:
            continue
        if other == "couplings":
            continue  # copied before anything is written
        message = rf"{called(name, index)}: found memory that {called(other, place)} has as well"
        twice = rf"(({message})|({called(other, place)}: found memory that {called(name, index)} has as well))"
        refused(served, operator, replaced(arguments, name, index, shared), twice)


@each_backend
def test_neighbours_in_one_buffer_are_taken(served: bool) -> None:
    """Columns side by side, as of joined adapters, and rows after each other, as of a flat buffer."""
    for of in (lambda b: (b[:, :3], b[:, 3:6]), lambda b: (b[:9], b[9:18]), lambda b: (b[:18:2], b[1:18:2])):
        moved, previous = of(torch.zeros(18, 6))
        moved, previous = moved[:9, :3], previous[:9, :3]
        previous.copy_(orthonormal(9, 3))
        moved.copy_(previous + 0.1)
        alone = [moved.clone()]
        call(served, "project_retract_", {"a": alone, "b": [previous.clone()], "c": [1.0], "d": "auto"})
        call(served, "project_retract_", {"a": [moved], "b": [previous], "c": [1.0], "d": "auto"})
        # the same matrices in another storage: round-off of each of 27 elements
        assert float((moved - alone[0]).norm()) <= 27 * torch.finfo(torch.float32).eps


def lists_of(*operators: str) -> Sequence[tuple[str, str, int]]:
    return [(o, name, i) for o, name, i in PLACES if o in operators and i is not None and name != "couplings"]


@pytest.mark.parametrize(
    ("operator", "name", "index"), lists_of("riemannian_gradient_", "project_retract_", "stella_adamw_")
)
@each_backend
def test_one_of_a_list_that_is_unlike_its_factor(operator: str, name: str, index: int, served: bool) -> None:
    arguments = good(operator)
    given = arguments[name][index]
    main = {"project_retract_": "moved"}.get(operator, "factors")
    wrong = [
        (given.double(), "float64"),
        (given[:4], r"\(4, \d\)"),
        (given.to_sparse(), "sparse"),
        (given.bool(), "bool"),
    ]
    if name == main:
        wrong.append((given.mT if given.shape[0] > given.shape[1] else given[:4], "n >= r"))
    for value, found in wrong:
        at_fault = ".*" if name == main else called(name, index)  # the others are unlike the first of their place
        refused(served, operator, replaced(arguments, name, index, value), f"{at_fault}: (?i:.*{found})")
    short = f".*: found .* tensors in {main} and|.*: found 2, wanted 3|.*: found 3, wanted 2|.*hyperparameters"
    refused(served, operator, {**arguments, name: arguments[name][:2]}, short)


@pytest.mark.parametrize(("operator", "name", "index"), WRITTEN)
@each_backend
def test_a_negated_view_is_not_written(operator: str, name: str, index: int | None, served: bool) -> None:
    if not served:
        pytest.skip("torch resolves them before an implementation is called")
    arguments = good(operator)
    given = arguments[name] if index is None else arguments[name][index]
    message = f"{called(name, index)}: found a negated view"
    refused(served, operator, replaced(arguments, name, index, torch._neg_view(given.clone())), message)


@pytest.mark.parametrize("operator", signatures)
def test_a_negated_view_is_read(operator: str) -> None:
    for name, index, given in tensors(good(operator)):
        if (operator, name, index) in WRITTEN or name in ("hyperparameters", "seed"):
            continue
        results: list[list[Tensor]] = []
        for value in (-given, torch._neg_view(given)):
            torch.manual_seed(0)
            arguments = replaced(good(operator), name, index, value)
            returned = call(True, operator, arguments)
            written = [t for each, i, t in tensors(arguments) if (operator, each, i) in WRITTEN]
            results.append([*(returned if isinstance(returned, tuple) else [returned]), *written])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("operator", signatures)
@each_backend
def test_complex_is_not_told_to_drop_its_imaginary_part(operator: str, served: bool) -> None:
    name, index, given = next(place for place in tensors(good(operator)) if place[0] not in ("hyperparameters", "seed"))
    arguments = replaced(good(operator), name, index, given.to(torch.complex64))
    with pytest.raises(RuntimeError, match=r"complex factors are not supported|wanted .*same dtype|ComplexFloat"):
        call(served, operator, arguments)


NUMBERS = [
    ("polar", {"method": "fast"}, "method: found 'fast'"),
    ("project_retract_", {"method": "fast"}, "method: found 'fast'"),
    ("polar", {"M": torch.zeros(3, 5)}, r"M: found \(3, 5\), wanted \(\.\.\., n, r\) with n >= r"),
    *(
        ("project_retract_", {"divisors": [1.0, bad, 1.0]}, r"divisors\[1\]: found .*, wanted a positive number")
        for bad in (0.0, -1.0, math.nan, math.inf)
    ),
    ("project_retract_", {"divisors": [1.0]}, "divisors: found 1, wanted 3"),
    ("stella_adamw_", {"hyperparameters": torch.ones(3, 6, dtype=torch.float64)}, r"hyperparameters: found \(3, 6\)"),
    ("stella_adamw_", {"hyperparameters": torch.zeros(3, 7, dtype=torch.float64)}, r"hyperparameters\[0\]: found div"),
    ("stella_adamw_", {"couplings": [torch.zeros(2, 2)] * 3}, r"couplings\[0\]: found \(2, 2\)"),
    *(
        (operator, {"p": bad, "seed": torch.tensor(1)}, "p: found .*, wanted a probability")
        for operator in ("philox_dropout", "adapter_forward_", "adapter_product", "adapter_backward_")
        for bad in (-0.1, 1.5, math.nan)
    ),
    *(
        (operator, {"p": 0.5, "seed": seed}, "seed: found ")
        for operator in ("adapter_forward_", "adapter_product", "adapter_backward_")
        for seed in (None, torch.tensor(1.0), torch.tensor([1, 2]))
    ),
    *(
        (operator, {name: value}, f"{name}: found ")
        for operator in ("adapter_forward_", "adapter_product", "adapter_backward_")
        for name, value in (
            ("U", torch.zeros(6)),
            ("S", torch.zeros(3, 3)),
            ("Vt", torch.zeros(3, 5)),
            ("x", torch.zeros(4, 5, dtype=torch.int64)),
        )
    ),
    ("adapter_forward_", {"y": torch.zeros(3, 6)}, r"y: found \(3, 6\), wanted \(4, 6\)"),
    ("adapter_product", {"b": torch.zeros(5)}, r"b: found \(5,\), wanted \(6,\)"),
    ("adapter_backward_", {"grad_y": torch.zeros(4, 5)}, r"grad_y: found \(4, 5\), wanted \(4, 6\)"),
    ("adapter_backward_", {"A": torch.zeros(4, 5)}, r"A: found \(4, 5\), wanted \(4, 2\)"),
    ("adapter_backward_", {"grad_x": torch.zeros(4, 6)}, r"grad_x: found \(4, 6\), wanted \(4, 5\)"),
    ("adapter_backward_", {"needed": [True]}, "needed: found 1"),
]


@pytest.mark.parametrize(("operator", "changes", "message"), NUMBERS)
@each_backend
def test_shapes_and_numbers(operator: str, changes: dict[str, Any], message: str, served: bool) -> None:
    refused(served, operator, {**good(operator), **changes}, message)


# ---- nothing to do ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(
    ("T", "m", "n", "r"), [(3, 4, 5, 0), (3, 0, 0, 1), (3, 0, 5, 2), (3, 4, 0, 2), (0, 4, 5, 2), (0, 0, 0, 0)]
)
@each_backend
def test_layers_of_no_size(T: int, m: int, n: int, r: int, diagonal: bool, dtype: torch.dtype, served: bool) -> None:
    """No rank adds nothing, no features are sums of nothing; results of no size have their shapes."""
    x, y, grad_y, A = (torch.ones(shape, dtype=dtype) for shape in ((T, n), (T, m), (T, m), (T, r)))
    U, Vt, S = torch.ones(m, r), torch.ones(r, n), torch.ones(r) if diagonal else torch.ones(r, r)
    layer = {"U": U, "S": S, "Vt": Vt, "scale": 1.0, "p": 0.5, "seed": torch.tensor(7)}
    made = call(served, "adapter_forward_", {"y": y, "x": x, **layer})
    assert made.shape == (T, r)
    if r == 0 or n == 0:
        assert torch.equal(y, torch.ones_like(y))
        assert not made.any()
    bias = torch.arange(float(m))
    y, made = call(served, "adapter_product", {"x": x, "b": bias, **layer})
    assert (y.shape, made.shape, y.dtype) == ((T, m), (T, r), dtype)
    if r == 0 or n == 0:
        assert torch.equal(y, bias.to(dtype).expand(T, m))
    for beta in (0.0, 0.5, 1.0):
        grad_x = torch.full((T, n), 2.0, dtype=dtype)
        arguments = {"grad_x": grad_x, "beta": beta, "grad_y": grad_y, "x": x, "A": A, **layer, "needed": [True] * 3}
        grads = call(served, "adapter_backward_", arguments)
        assert [g.shape for g in grads] == [U.shape, S.shape, Vt.shape]
        if r == 0 or m == 0:
            assert torch.equal(grad_x, torch.full_like(grad_x, 2.0 * beta))
        if T == 0 or m == 0:
            assert not any(bool(g.any()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@each_backend
def test_factors_of_no_size(dtype: torch.dtype, served: bool) -> None:
    def factors() -> list[Tensor]:
        return [torch.zeros(4, 0, dtype=dtype), orthonormal(6, 2).to(dtype), torch.zeros(0, 0, dtype=dtype)]

    hyperparameters = torch.tensor([[1e-3, 0.9, 0.99, 1e-8, 1.0, 1.0, 1.0]] * 3, dtype=torch.float64)
    step: dict[str, Any] = {name: factors() for name in "abc"} | {"d": [f.abs() for f in factors()]}
    step |= {"e": [torch.empty(0)] * 3, "f": hyperparameters}
    for info in (
        call(served, "riemannian_gradient_", {"a": factors(), "b": factors(), "c": factors()}),
        call(served, "project_retract_", {"a": factors(), "b": factors(), "c": [1.0] * 3, "d": "auto"}),
        call(served, "stella_adamw_", step),
    ):
        assert info[:, 0].tolist() == [0.0] * 3
    for shape in ((2, 4, 0), (0, 0), (0, 5, 2), (3, 0, 4, 2)):
        Q, info = call(served, "polar", {"M": torch.zeros(shape, dtype=dtype), "method": "auto"})
        assert Q.shape == shape
        assert info.shape == (math.prod(shape[:-2]), 5)
