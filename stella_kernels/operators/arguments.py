"""What every operator asks of its arguments, all of it before anything is written; ``RuntimeError`` otherwise.

For the reference, Triton and the fakes; ``csrc/cpu/torch/arguments.h`` asks the same of what the CPU kernels take. A
message names the argument, with its place in a list, what was found and what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..checks import FLOAT_DTYPES, METHODS
from . import memory, signatures
from .status import arithmetic_dtype, grams_words, sums_words

SETTINGS = 7  # of a factor: columns of hyperparameters


def _name(argument: str, index: int | None) -> str:
    return argument if index is None else f"{argument}[{index}]"


def _tensors(a: signatures.Signature) -> Iterator[tuple[str, int | None, Tensor, bool]]:
    """Name, place in its list, value of every tensor that was given, and whether it is written."""
    for each in fields(a):  # type: ignore[arg-type]
        value, written = getattr(a, each.name), bool(each.metadata.get("written"))
        if isinstance(value, Tensor):
            yield each.name, None, value, written
        elif isinstance(value, (list, tuple)):
            for i, item in enumerate(value):
                if isinstance(item, Tensor):
                    yield each.name, i, item, written


def check_devices(a: signatures.Signature) -> None:
    """Raise unless all are on one device: those of each factor, and factors on devices of one type.

    Hyperparameters stay on the CPU, or are beside the factors. All that a fake asks: one tensor without values (meta)
    calls the fake in place of the kernels, which would return memory that nobody wrote.
    """
    first: tuple[str, int | None, torch.device] | None = None
    own: dict[int, torch.device] = {}
    for name, index, tensor, _ in _tensors(a):
        device = tensor.device
        if first is None:
            first = name, index, device
        if name == "hyperparameters":
            fits = device.type in ("cpu", first[2].type)
        elif name == "couplings" and not tensor.numel():
            continue  # stands for one that is to be computed
        elif index is None:
            fits = device == first[2]
        else:
            fits = device.type == first[2].type and own.setdefault(index, device) == device
        if not fits:
            wanted = first[2] if index is None else own.get(index, first[2])
            raise RuntimeError(
                f"{a.name}: {_name(name, index)}: found on {device}, wanted on {wanted}, where "
                f"{_name(first[0], index if index in own else first[1])} is; move it there."
            )


def check_memory(a: signatures.Signature) -> None:
    """Raise for an argument without its memory, one that is written and has several elements in one place, or two that
    share memory."""
    given = [(name, index, t, written) for name, index, t, written in _tensors(a) if t.numel()]
    for name, index, tensor, written in given:
        if not memory.has_memory(tensor):
            raise RuntimeError(
                f"{a.name}: {_name(name, index)}: found a storage of {tensor.untyped_storage().nbytes()} bytes for "
                f"{tuple(tensor.shape)}, {tensor.dtype}, wanted "
                f"{(tensor.storage_offset() + memory.extent(tensor)) * tensor.element_size()}: it was freed or shrunk, "
                "as an offload does; bring it back first."
            )
        if written and memory.overlaps_itself(tensor):
            raise RuntimeError(
                f"{a.name}: {_name(name, index)}: found strides {tensor.stride()} for shape {tuple(tensor.shape)}, "
                "several elements in one place, wanted memory of its own for each, since it is written; pass a "
                "contiguous copy."
            )
    shared = memory.first_shared([t for _, _, t, _ in given], [written for _, _, _, written in given])
    if shared is not None:
        (name, index, *_), (other, place, *_) = given[shared[0]], given[shared[1]]
        raise RuntimeError(
            f"{a.name}: {_name(name, index)}: found memory that {_name(other, place)} has as well, wanted memory of "
            "its own, since it is written; pass a clone of one of them."
        )


def check(a: signatures.Signature) -> None:
    """Everything, in the order in which it can be asked."""
    check_values(a)
    check_memory(a)


def check_values(a: signatures.Signature) -> None:
    """Raise unless dtypes, shapes, devices and numbers go together; what is left is ``check_memory``."""
    _CHECKS[type(a)](a)


# ---- operators over lists --------------------------------------------------------------------------------------------


def _check_method(operator: str, method: str) -> None:
    if method not in METHODS:
        raise RuntimeError(f"{operator}: method: found {method!r}, wanted one of {', '.join(map(repr, METHODS))}.")


def _check_dense(operator: str, name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise RuntimeError(
            f"{operator}: {name}: found layout {tensor.layout}, wanted a dense tensor; convert it, with .to_dense()."
        )
    if tensor.dtype.is_complex:
        raise RuntimeError(
            f"{operator}: {name}: found {tensor.dtype}, wanted a real one: complex factors are not supported."
        )
    if tensor.dtype not in FLOAT_DTYPES:
        raise RuntimeError(
            f"{operator}: {name}: found {tensor.dtype}, wanted float32, float64, bfloat16 or float16; convert it."
        )


def _check_tall(operator: str, name: str, tensor: Tensor, dimensions: str = "(n, r)") -> None:
    _check_dense(operator, name, tensor)
    if tensor.dim() < 2 or (dimensions == "(n, r)" and tensor.dim() > 2) or tensor.shape[-2] < tensor.shape[-1]:
        raise RuntimeError(
            f"{operator}: {name}: found {tuple(tensor.shape)}, wanted {dimensions} with n >= r; pass a factor that is "
            "stored transposed as its .mT view."
        )


def _check_rows(operator: str, name: str, tensor: Tensor, first: Tensor) -> None:
    _check_dense(operator, name, tensor)
    if tensor.dim() != 2:
        raise RuntimeError(f"{operator}: {name}: found {tuple(tensor.shape)}, wanted some rows of a factor, (n_i, r).")
    if (tensor.dtype, tensor.device) != (first.dtype, first.device):
        raise RuntimeError(
            f"{operator}: {name}: found {_described(tensor)}, wanted {first.dtype} on {first.device}, as the first "
            "factor is: a call takes factors of one dtype and device."
        )


def _described(tensor: Tensor) -> str:
    layout = "" if tensor.layout is torch.strided else f" of layout {tensor.layout}"
    return f"{tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}{layout}"


def _check_lists(operator: str, main: str, factors: Sequence[Tensor], /, *some: str, **lists: Sequence[Tensor]) -> None:
    """Raise unless the lists are as long as ``main``'s, and each tensor is like the factor of its place.

    With 'some', they are some of a factor's rows, which may be fewer than its columns.
    """
    for name, tensors in lists.items():
        if len(tensors) != len(factors):
            raise RuntimeError(
                f"{operator}: {name}: found {len(factors)} and {len(tensors)} tensors in {main} and {name}, wanted as "
                "many of each."
            )
    for i, factor in enumerate(factors):
        if some:
            _check_rows(operator, f"{main}[{i}]", factor, factors[0])
        else:
            _check_tall(operator, f"{main}[{i}]", factor)
        if factor.device != factors[0].device and factor.device.type != factors[0].device.type:
            raise RuntimeError(
                f"{operator}: {main}[{i}]: found on {factor.device}, wanted on {factors[0].device}, where {main}[0] "
                "is; move it there."
            )
        kind = factor.shape, factor.dtype, factor.device, factor.layout
        for name, tensors in lists.items():
            tensor = tensors[i]
            if (tensor.shape, tensor.dtype, tensor.device, tensor.layout) != kind:
                raise RuntimeError(
                    f"{operator}: {name}[{i}]: found {_described(tensor)}, wanted {_described(factor)}: the same "
                    f"shape, the same dtype and the same device as {main}[{i}]; convert it."
                )


def _polar(a: signatures.Polar) -> None:
    _check_method(a.name, a.method)
    _check_tall(a.name, "M", a.M, "(..., n, r)")


def _riemannian_gradient_(a: signatures.RiemannianGradient) -> None:
    snapshots = {"snapshots": a.snapshots} if a.snapshots else {}
    _check_lists(a.name, "factors", a.factors, gradients=a.gradients, **snapshots)


def _project_retract_(a: signatures.ProjectRetract) -> None:
    _check_lists(a.name, "moved", a.moved, previous=a.previous)
    check_divisors(a)


def check_divisors(a: signatures.ProjectRetract) -> None:
    """What is asked of project_retract_ at every call, whatever was asked of its tensors before."""
    _check_method(a.name, a.method)
    check_numbers(a.name, a.divisors, len(a.moved))


def check_numbers(operator: str, divisors: Sequence[float], count: int) -> None:
    """Raise unless there is a positive divisor for each factor."""
    if len(divisors) != count:
        raise RuntimeError(f"{operator}: divisors: found {len(divisors)}, wanted {count}, one a factor.")
    for i, divisor in enumerate(divisors):
        if not 0.0 < divisor < inf:
            raise RuntimeError(f"{operator}: divisors[{i}]: found {divisor}, wanted a positive number.")


def _stella_adamw_(a: signatures.StellaAdamWStep) -> None:
    lists = {"gradients": a.gradients, "exp_avgs": a.exp_avgs, "exp_avg_sqs": a.exp_avg_sqs}
    _check_lists(a.name, "factors", a.factors, **lists)
    if len(a.couplings) != len(a.factors):
        raise RuntimeError(f"{a.name}: couplings: found {len(a.couplings)}, wanted {len(a.factors)}, one a factor.")
    check_hyperparameters(a)
    for i, (K, Y) in enumerate(zip(a.couplings, a.factors, strict=True)):
        if not K.numel():
            continue
        square = (Y.shape[1], Y.shape[1])
        if tuple(K.shape) != square or K.dtype not in (torch.float32, torch.float64) or K.device != Y.device:
            raise RuntimeError(
                f"{a.name}: couplings[{i}]: found {_described(K)}, wanted {square}, float32 or float64 on {Y.device}, "
                "or an empty tensor."
            )


def check_hyperparameters(a: signatures.StellaAdamWStep | signatures.AdamWGram) -> None:
    """What is asked of stella_adamw_ at every step, whatever was asked of its tensors before."""
    settings, wanted = a.hyperparameters, (len(a.factors), SETTINGS)
    if tuple(settings.shape) != wanted or settings.dtype != torch.float64:
        raise RuntimeError(
            f"{a.name}: hyperparameters: found {tuple(settings.shape)}, {settings.dtype}, wanted {wanted}, float64."
        )
    if a.factors and settings.device.type not in ("cpu", a.factors[0].device.type):
        raise RuntimeError(
            f"{a.name}: hyperparameters: found on {settings.device}, wanted on the CPU, or on {a.factors[0].device}."
        )
    if settings.device.type == "cpu":  # elsewhere nobody waits for them
        if bool(((settings[:, 5] > 0) & (settings[:, 4] >= 1)).all()):
            return
        for i, (_, _, _, _, step, divisor, _) in enumerate(settings.tolist()):
            if not (divisor > 0 and step >= 1):
                raise RuntimeError(
                    f"{a.name}: hyperparameters[{i}]: found divisor {divisor} and step {step}, wanted a positive "
                    "divisor, and steps from 1 on."
                )


# ---- the phases of a step on some rows of each factor ----------------------------------------------------------------


def _check_flat(operator: str, name: str, flat: Tensor, factors: Sequence[Tensor], words: Callable[[int], int]) -> None:
    wanted = sum(words(factor.shape[1]) for factor in factors)
    dtype = arithmetic_dtype(factors[0].dtype) if factors else flat.dtype
    if tuple(flat.shape) != (wanted,) or flat.dtype != dtype or not flat.is_contiguous():
        raise RuntimeError(f"{operator}: {name}: found {_described(flat)}, wanted ({wanted},), {dtype}, contiguous.")
    if factors and flat.device != factors[0].device:
        raise RuntimeError(f"{operator}: {name}: found on {flat.device}, wanted on {factors[0].device}; move it there.")


def _gradient_gram(a: signatures.GradientGram) -> None:
    _check_lists(a.name, "factors", a.factors, "some", gradients=a.gradients)


def _riemannian_gradient_rows_(a: signatures.RiemannianGradientRows) -> None:
    snapshots = {"snapshots": a.snapshots} if a.snapshots else {}
    _check_lists(a.name, "factors", a.factors, "some", gradients=a.gradients, **snapshots)
    _check_flat(a.name, "sums", a.sums, a.factors, sums_words)


def _retract_gram(a: signatures.RetractGram | signatures.RetractRows) -> None:
    _check_lists(a.name, "moved", a.moved, "some", previous=a.previous)
    check_numbers(a.name, a.divisors, len(a.moved))


def _retract_rows_(a: signatures.RetractRows) -> None:
    _retract_gram(a)
    _check_flat(a.name, "sums", a.sums, a.moved, sums_words)
    _check_flat(a.name, "grams", a.grams, a.moved, grams_words)


def _adamw_gram_(a: signatures.AdamWGram) -> None:
    lists = {"gradients": a.gradients, "exp_avgs": a.exp_avgs, "exp_avg_sqs": a.exp_avg_sqs}
    _check_lists(a.name, "factors", a.factors, "some", **lists)
    _check_flat(a.name, "sums", a.sums, a.factors, sums_words)
    check_hyperparameters(a)


def _adamw_rows_(a: signatures.AdamWRows) -> None:
    _check_lists(a.name, "factors", a.factors, "some")
    _check_flat(a.name, "sums", a.sums, a.factors, sums_words)
    _check_flat(a.name, "grams", a.grams, a.factors, grams_words)
    steps = a.steps
    alike = (steps.dtype, steps.device) == (a.sums.dtype, a.sums.device)
    if steps.dim() != 1 or not steps.is_contiguous() or not alike:
        found = _described(steps)
        raise RuntimeError(f"{a.name}: steps: found {found}, wanted what adamw_gram_ returned beside these sums.")


# ---- the adapter -----------------------------------------------------------------------------------------------------

_Adapter = signatures.AdapterForward | signatures.AdapterProduct | signatures.AdapterBackward


def _check_dropout(operator: str, x: Tensor, p: float, seed: Tensor | None) -> None:
    if not 0.0 <= p <= 1.0:
        raise RuntimeError(f"{operator}: p: found {p}, wanted a probability in [0, 1].")
    if p > 0.0 and (seed is None or seed.numel() != 1 or seed.dtype != torch.int64 or seed.device != x.device):
        found = "None" if seed is None else _described(seed)
        raise RuntimeError(
            f"{operator}: seed: found {found}, wanted an int64 scalar tensor on {x.device}, where x is, beside a "
            "dropout."
        )


def _check_layer(a: _Adapter, **rows: Tensor) -> None:
    """Raise unless the factors and what has a row for each of x's go together."""
    operator, x, U, S, Vt = a.name, a.x, a.U, a.S, a.Vt
    for name, tensor in {"x": x, "U": U, "S": S, "Vt": Vt, **rows}.items():
        if tensor.device != x.device:
            raise RuntimeError(
                f"{operator}: {name}: found on {tensor.device}, wanted on {x.device}, where x is; move it there."
            )
        _check_dense(operator, name, tensor)
    for name, tensor, shape in (("x", x, "(T, n)"), ("U", U, "(m, r)"), ("Vt", Vt, "(r, n)")):
        if tensor.dim() != 2:
            raise RuntimeError(f"{operator}: {name}: found {tuple(tensor.shape)}, wanted a matrix {shape}.")
    (m, r), (T, n) = U.shape, x.shape
    wanted: dict[str, tuple[int, ...]] = {"Vt": (r, n), "S": (r,) if S.dim() == 1 else (r, r), "b": (m,)}
    wanted |= {"y": (T, m), "grad_y": (T, m), "A": (T, r), "grad_x": (T, n)}
    for name, tensor in {"S": S, "Vt": Vt, **rows}.items():
        if tensor.shape != wanted[name]:
            raise RuntimeError(
                f"{operator}: {name}: found {tuple(tensor.shape)}, wanted {wanted[name]} beside U {tuple(U.shape)} "
                f"and x {tuple(x.shape)}."
            )
    _check_dropout(operator, x, a.p, a.seed)


def _philox_dropout(a: signatures.PhiloxDropout) -> None:
    _check_dense(a.name, "x", a.x)
    _check_dropout(a.name, a.x, a.p, a.seed)


def _adapter_forward_(a: signatures.AdapterForward) -> None:
    _check_layer(a, y=a.y)


def _adapter_product(a: signatures.AdapterProduct) -> None:
    _check_layer(a, **({} if a.b is None else {"b": a.b}))


def _adapter_backward_(a: signatures.AdapterBackward) -> None:
    _check_layer(a, grad_y=a.grad_y, A=a.A, **({} if a.grad_x is None else {"grad_x": a.grad_x}))
    if len(a.needed) != 3:
        raise RuntimeError(f"{a.name}: needed: found {len(a.needed)} flags, wanted three, for U, S and Vt.")


_CHECKS: dict[type[signatures.Signature], Callable[[Any], None]] = {
    signatures.Polar: _polar,
    signatures.RiemannianGradient: _riemannian_gradient_,
    signatures.ProjectRetract: _project_retract_,
    signatures.StellaAdamWStep: _stella_adamw_,
    signatures.GradientGram: _gradient_gram,
    signatures.RiemannianGradientRows: _riemannian_gradient_rows_,
    signatures.RetractGram: _retract_gram,
    signatures.RetractRows: _retract_rows_,
    signatures.AdamWGram: _adamw_gram_,
    signatures.AdamWRows: _adamw_rows_,
    signatures.PhiloxDropout: _philox_dropout,
    signatures.AdapterForward: _adapter_forward_,
    signatures.AdapterProduct: _adapter_product,
    signatures.AdapterBackward: _adapter_backward_,
}
