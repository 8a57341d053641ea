"""The phases of a step on some rows of each factor (``signatures.PHASES``) on Triton: a constant number of launches.

The passes over rows are those of the operators for whole factors. What they leave for each chunk of rows is summed into
the flat buffer that processes add up, and the sums come back as if a factor had one chunk. A factor may have fewer rows
here than columns, or none: it then gives zeros, and its solve is as everywhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from ...operators import arguments, signatures
from ...operators import phases as reference
from ...operators.status import INFO_COLUMNS, grams_words
from ..launch.configuration import FUSION, MAX_RANK, arithmetic, element
from ..launch.device import Shared, capturing, keep_for_graphs, on_device_of, runs_on, sent
from ..launch.table import (
    FIELDS,
    GENERAL,
    HEADER,
    ROW,
    WIDE_ROWS,
    Identity,
    Table,
    identity_of,
    met_before,
    table_of,
)
from . import launches
from .gradient import coupling_kernel, subtract_kernel
from .moves import ADAMW, RETRACT, SETTINGS
from .sums import pack_kernel, unpack_kernel
from .tiles import MOVE

STEPS_TENSOR = 4  # in a table
# Of all rows of a factor, which no process knows: what a bound takes of it is the spacing of float16's least values.
_ROWS_AT_MOST = 1 << 24
_KEPT = 16


@dataclass(frozen=True)
class Layout:
    """What is known of factors by their shapes, on their device.

    Attributes:
        rows: (k, ROW) int64, a table in which the i-th factor has one item, the i-th.
        places: (k,) int64, where a factor begins in ``grams``; in ``sums`` a word later for each one before it.
        steps: (k, FIELDS) int64, a table's fields of the steps if they began at address 0.
        moves, refused: (k,) and (1,) int32, of a step that every factor takes and no gradient forbids.
        settings: (k, SETTINGS) float64 that mean nothing, where they are read and not used.
    """

    rows: Tensor
    places: Tensor
    steps: Tensor
    moves: Tensor
    refused: Tensor
    settings: Tensor
    sums_words: int
    grams_words: int
    steps_words: int
    shared: Shared


_layouts: OrderedDict[tuple[object, ...], Layout] = OrderedDict()
_one_at_a_time = RLock()  # of threads that look for a layout


def _layout_of(factors: Sequence[Tensor], table: Table) -> Layout:
    key = (table.device, table.dtype, *(factor.shape for factor in factors))
    with _one_at_a_time:
        layout = _layouts.get(key)
        if layout is None:
            layout = _new_layout(factors, table)
            if not capturing(table.device):  # else it has no contents before the graph's first replay
                _layouts[key] = layout
                if len(_layouts) > _KEPT:
                    _layouts.popitem(last=False)
        else:
            _layouts.move_to_end(key)
        layout.shared.use()
    keep_for_graphs(table.device, layout)
    return layout


def _new_layout(factors: Sequence[Tensor], table: Table) -> Layout:
    dtype = arithmetic(table.dtype)
    width = 16 // dtype.itemsize
    rows, places, steps = [], [], []
    place = step = 0
    for i, (n, r) in enumerate(factor.shape for factor in factors):
        rows.append([_ROWS_AT_MOST, r, i, 1] + [0] * (ROW - 4))
        places.append(place)
        storage = WIDE_ROWS if r % width == 0 and step % width == 0 else GENERAL
        steps.append([step * dtype.itemsize, r, 1, storage])
        place += grams_words(r)
        step += n * r
    k = len(rows)
    lists = [sent(torch.tensor(each, dtype=torch.int64), table.device) for each in (rows, places, steps)]
    moves, refused, settings = (
        torch.full((k,), MOVE, dtype=torch.int32, device=table.device),
        torch.zeros(1, dtype=torch.int32, device=table.device),
        torch.full((k, SETTINGS), 0.5, dtype=torch.float64, device=table.device),
    )
    shared = Shared(*lists, moves, refused, settings)
    return Layout(lists[0], lists[1], lists[2], moves, refused, settings, place + k, place, step, shared)


def _table(a: signatures.Signature) -> Table | None:
    """The table of a call, its tensors checked; None where no kernel takes it: the reference does.

    What does not depend on values is asked once for the same memory, of each phase by itself: some write, some do not.
    """
    columns = [getattr(a, name) for name, kind in a.arguments().items() if kind == "list[Tensor]"]
    columns = [each for each in columns if each]
    if not columns:
        arguments.check(a)
        return None
    try:
        plain = identity_of(columns)
    except (RuntimeError, NotImplementedError):  # of what has no address or no strides
        arguments.check_values(a)
        raise
    identity = Identity((*plain.addresses, signatures.PHASES.index(type(a))), (*plain.form, a.name))
    table = met_before(identity)
    if table is None:
        arguments.check(a)
        if all(factor.shape[1] <= MAX_RANK and runs_on(factor.device) for factor in columns[0]):
            table = table_of(identity, columns)
    return table


def _check_flat(a: Any, table: Table, **words: int) -> None:
    """Raise for a buffer that is not these factors', whatever was asked of their own tensors before."""
    for name, wanted in words.items():
        flat: Tensor = getattr(a, name)
        fits = flat.shape == (wanted,) and flat.dtype == arithmetic(table.dtype) and flat.device == table.device
        if not fits or not flat.is_contiguous():
            arguments.check_values(a)
            raise RuntimeError(
                f"{a.name}: {name}: found {tuple(flat.shape)}, {flat.dtype} on {flat.device}, wanted ({wanted},), "
                f"{arithmetic(table.dtype)} on {table.device}, contiguous."
            )


def _by_rows(table: Table) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and constants of what goes through r × r blocks, a program for some rows of each factor's."""
    T = table.tiles.small
    return (table.factors, table.R // T), {"R": table.R, "T": T, **FUSION}


def _packed(table: Table, layout: Layout, partials: Tensor, norms: Tensor | None) -> Tensor:
    """A flat buffer, of ``sums`` with norms, from the blocks (count, 2 or 3, R, R) of every item: a launch."""
    flat = table.scratch(layout.grams_words if norms is None else layout.sums_words)
    grid, constants = _by_rows(table)
    pack_kernel[grid](
        *(table.rows, layout.places, partials, partials if norms is None else norms, flat),
        **{"NORM": norms is not None, "BLOCKS": partials.shape[1], "ITEMS": table.tiles.items},
        **{"TO": element(arithmetic(table.dtype)), **constants},
    )
    return flat


def _couplings(table: Table, layout: Layout, sums: Tensor) -> Tensor:
    """K of each factor (k, R, R): a launch."""
    blocks = table.scratch(table.factors, table.R, table.R)
    grid, constants = _by_rows(table)
    unpack_kernel[grid](layout.rows, layout.places, sums, sums, blocks, COUPLING=True, **constants)
    return blocks


def _with_steps(table: Table, layout: Layout, steps: Tensor) -> Table:
    """The same with the steps' addresses, in memory of its own: three small copies."""
    rows = table.rows.clone()
    begin = HEADER + STEPS_TENSOR * FIELDS
    rows[:, begin : begin + FIELDS] = layout.steps
    rows[:, begin] += steps.data_ptr()
    return replace(table, rows=rows)


def gradient_gram(a: signatures.GradientGram) -> Tensor:
    """Two launches. In full precision, whatever gradients forgive: YᵀY is what a retraction goes by."""
    table = _table(a)
    if table is None:
        return reference.gradient_gram(a)
    with on_device_of(a.factors[0]):
        layout = _layout_of(a.factors, table)
        partials = table.scratch(table.count, 2, table.R, table.R)
        norms = table.scratch(table.count)
        refused = table.scratch(1, dtype=torch.int32)
        SPLIT = table.tiles.slab < table.R
        if table.count:
            coupling_kernel[(table.count, 2 if SPLIT else 1)](
                *(table.items, table.rows, partials, norms, refused, 1.0),
                **{"GRADIENT": 0, "FACTOR": 1, "DRIFT": True, "SPLIT": SPLIT, "NORM": True},
                **launches.common(table),
            )
        return _packed(table, layout, partials, norms)


def riemannian_gradient_rows_(a: signatures.RiemannianGradientRows) -> Tensor:
    """Two launches."""
    table = _table(a)
    if table is None:
        return reference.riemannian_gradient_rows_(a)
    with on_device_of(a.factors[0]):
        layout = _layout_of(a.factors, table)
        _check_flat(a, table, sums=layout.sums_words)
        if table.count:
            subtract_kernel[(table.count,)](
                *(table.items, table.rows, _couplings(table, layout, a.sums), layout.moves, layout.refused),
                SNAPSHOTS=bool(a.snapshots),
                **launches.common(table, gradient=True) | table.tiles.streaming(table.R),
            )
    return a.sums.new_empty(0)


def retract_gram(a: signatures.RetractGram) -> Tensor:
    """Two launches."""
    table = _table(a)
    if table is None:
        return reference.retract_gram(a)
    arguments.check_numbers(a.name, a.divisors, len(a.moved))
    with on_device_of(a.moved[0]):
        layout = _layout_of(a.moved, table)
        settings = launches.settings_of(a.divisors, table.device)
        return _packed(table, layout, _gram(table, RETRACT, settings, layout, None, False), None)


def _gram(table: Table, KIND: int, settings: Tensor, layout: Layout, K: Tensor | None, STEPS: bool) -> Tensor:
    if not table.count:
        return table.scratch(0, 3, table.R, table.R)
    return launches.gram(table, KIND, settings, layout.moves, layout.refused, K, STEPS)


def _retract(
    table: Table, layout: Layout, KIND: int, settings: Tensor, sums: Tensor, grams: Tensor, STEPS: bool
) -> Tensor:
    """Solve and update, and the sums in the kernels' form before: three launches; info on the device."""
    info = table.scratch(table.factors, INFO_COLUMNS, dtype=torch.float64)
    state = table.scratch(table.factors, dtype=torch.int32)
    blocks = table.scratch(table.factors, 3, table.R, table.R)
    grid, constants = _by_rows(table)
    unpack_kernel[grid](layout.rows, layout.places, sums, grams, blocks, COUPLING=False, **constants)
    coefficients, scales = launches.solve(
        *(table, layout.rows, RETRACT, layout.settings, blocks, state, layout.refused, info), STEPS=False, SHARDED=True
    )
    if table.count:
        launches.update(table, KIND, settings, coefficients, scales, state, STEPS)
    return info


def retract_rows_(a: signatures.RetractRows) -> Tensor:
    """Three launches."""
    table = _table(a)
    if table is None:
        return _on_device_of(a.moved, reference.retract_rows_(a))
    arguments.check_numbers(a.name, a.divisors, len(a.moved))
    with on_device_of(a.moved[0]):
        layout = _layout_of(a.moved, table)
        _check_flat(a, table, sums=layout.sums_words, grams=layout.grams_words)
        settings = launches.settings_of(a.divisors, table.device)
        return _retract(table, layout, RETRACT, settings, a.sums, a.grams, False)


def adamw_gram_(a: signatures.AdamWGram) -> tuple[Tensor, Tensor]:
    """Three launches, four past rank 64, and the copies that put the steps into the table; steps are by rows."""
    table = _table(a)
    if table is None:
        return reference.adamw_gram_(a)
    arguments.check_hyperparameters(a)
    with on_device_of(a.factors[0]):
        layout = _layout_of(a.factors, table)
        _check_flat(a, table, sums=layout.sums_words)
        settings = launches.to_device(a.hyperparameters, table.device, a.name)
        steps = table.scratch(layout.steps_words)
        K = _couplings(table, layout, a.sums)
        partials = _gram(_with_steps(table, layout, steps), ADAMW, settings, layout, K, True)
        return _packed(table, layout, partials, None), steps


def adamw_rows_(a: signatures.AdamWRows) -> Tensor:
    """Three launches, and the copies that put the steps into the table."""
    table = _table(a)
    if table is None:
        return _on_device_of(a.factors, reference.adamw_rows_(a))
    with on_device_of(a.factors[0]):
        layout = _layout_of(a.factors, table)
        _check_flat(a, table, sums=layout.sums_words, grams=layout.grams_words, steps=layout.steps_words)
        steps = a.steps if a.steps.data_ptr() % 16 == 0 else a.steps.clone()  # loads are as wide as in adamw_gram_
        stepped = _with_steps(table, layout, steps)
        return _retract(stepped, layout, ADAMW, layout.settings, a.sums, a.grams, True)


def _on_device_of(factors: Sequence[Tensor], info: Tensor) -> Tensor:
    return info.to(factors[0].device) if factors else info


IMPLEMENTATIONS: dict[str, Callable[[Any], Any]] = {
    "gradient_gram": gradient_gram,
    "riemannian_gradient_rows_": riemannian_gradient_rows_,
    "retract_gram": retract_gram,
    "retract_rows_": retract_rows_,
    "adamw_gram_": adamw_gram_,
    "adamw_rows_": adamw_rows_,
}
