"""What the kernels share: tiles of factors by a table of addresses, products, sums of partial Gram matrices.

A grouped kernel is told of its factors by a table of int64, a row of ``ROW`` for each factor: the header (n, r, its
first item, its number of items, and the
coupling's kind, address and strides) and five tensors of (address, row stride, column stride, storage). An item, of
two int64, is (factor, first row): what one program of a pass over the rows takes, ``CHUNK`` rows.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from ..launch.table import FIELDS, HEADER, ROW, WIDE_COLUMNS, WIDE_ROWS

# What becomes of a factor after the pass over its rows.
MOVE, LEAVE, RESCUE = 0, 1, 2

_ROW = tl.constexpr(ROW)
_HEADER = tl.constexpr(HEADER)
_FIELDS = tl.constexpr(FIELDS)
_WIDE_ROWS = tl.constexpr(WIDE_ROWS)
_WIDE_COLUMNS = tl.constexpr(WIDE_COLUMNS)


@triton.jit
def tensor_of(table, factor, tensor: tl.constexpr, start, ELEMENT: tl.constexpr):
    """Of a factor's tensor from row ``start``: address, row stride, column stride, storage. Loaded once a program."""
    field = table + factor * _ROW + _HEADER + tensor * _FIELDS
    row_stride = tl.load(field + 1)
    base = tl.load(field).to(tl.pointer_type(ELEMENT)) + start * row_stride
    return base, row_stride, tl.load(field + 2), tl.load(field + 3).to(tl.int32)


@triton.jit
def rows_left(n, start):
    """Rows from ``start`` on, as far as offsets inside a program's part go."""
    return tl.minimum(n - start, 1 << 30).to(tl.int32)


@triton.jit
def wide_rows(tensor, rows, columns, left, r, WIDTH: tl.constexpr, INDEX: tl.constexpr):
    """Pointers and mask of a tile whose rows lie side by side; what is known of them is said of the tiles, since what
    is said of a function's argument is lost when it is inlined."""
    mask = tl.max_constancy((rows < left)[:, None] & (columns < r)[None, :], (1, WIDTH))
    offsets = (rows * tensor[1].to(INDEX))[:, None] + columns[None, :]
    return tl.multiple_of(tensor[0] + offsets, (1, 16)), mask


@triton.jit
def wide_columns(tensor, rows, columns, left, r, WIDTH: tl.constexpr, INDEX: tl.constexpr):
    """As :func:`wide_rows`, of a tile whose columns lie side by side."""
    mask = tl.max_constancy((rows < left)[:, None] & (columns < r)[None, :], (WIDTH, 1))
    offsets = rows[:, None] + (columns * tensor[2].to(INDEX))[None, :]
    return tl.multiple_of(tensor[0] + offsets, (16, 1)), mask


@triton.jit
def any_places(tensor, rows, columns, left, r, INDEX: tl.constexpr):
    """As :func:`wide_rows`, of a tile by its strides."""
    mask = (rows < left)[:, None] & (columns < r)[None, :]
    return tensor[0] + (rows * tensor[1].to(INDEX))[:, None] + (columns * tensor[2].to(INDEX))[None, :], mask


@triton.jit
def load_tile(
    tensor, rows, columns, left, r, ELEMENT: tl.constexpr, TO: tl.constexpr, INDEX: tl.constexpr,
    WIDE: tl.constexpr = True
):  # fmt: skip
    """Elements (rows, columns) of a :func:`tensor_of`, zero outside (left, r), widened to the arithmetic's dtype.

    Offsets from its first row are of dtype INDEX: int32 where they fit, which halves the registers they take.
    Without WIDE every storage is read an element at a time: a third of the code, for where speed is not the point.
    """
    WIDTH: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    if WIDE and tensor[3] == _WIDE_ROWS:
        pointers, mask = wide_rows(tensor, rows, columns, left, r, WIDTH, INDEX)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif WIDE and tensor[3] == _WIDE_COLUMNS:
        pointers, mask = wide_columns(tensor, rows, columns, left, r, WIDTH, INDEX)
        tile = tl.load(pointers, mask=mask, other=0.0)
    else:
        pointers, mask = any_places(tensor, rows, columns, left, r, INDEX)
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile.to(TO)


@triton.jit
def store_tile(
    tensor, rows, columns, left, r, value, ELEMENT: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr = True
):
    """The counterpart of :func:`load_tile`; stores nothing outside (left, r)."""
    WIDTH: tl.constexpr = 128 // ELEMENT.primitive_bitwidth
    if ELEMENT.primitive_bitwidth == 16:
        value = value.to(tl.float32)  # no target narrows float64 to 16 bits in one step
    narrow = value.to(ELEMENT)
    if WIDE and tensor[3] == _WIDE_ROWS:
        pointers, mask = wide_rows(tensor, rows, columns, left, r, WIDTH, INDEX)
        tl.store(pointers, narrow, mask=mask)
    elif WIDE and tensor[3] == _WIDE_COLUMNS:
        pointers, mask = wide_columns(tensor, rows, columns, left, r, WIDTH, INDEX)
        tl.store(pointers, narrow, mask=mask)
    else:
        pointers, mask = any_places(tensor, rows, columns, left, r, INDEX)
        tl.store(pointers, narrow, mask=mask)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, TO: tl.constexpr):
    """``a @ b`` in float32 to float32's accuracy, or in float64."""
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=TO)


@triton.jit
def add_apart(total, term, one):
    """``total + term``, with ``one`` = 1 known only at run time.

    A bare sum would be fused into the product's own accumulator, and tensor cores round what they accumulate towards
    zero: over many steps of positive terms, a Gram matrix's diagonal, that adds up to a bias.
    """
    return total + term * one


@triton.jit
def product_apart(a, b, one, PRECISION: tl.constexpr, TO: tl.constexpr):
    """:func:`product`, in a region of its own, entered always (``one`` = 1, known only at run time).

    Products that share an operand or follow from one another are otherwise laid out alike, all warps along the rows,
    and a tile of 16 rows is then computed by every warp.
    """
    value = tl.zeros((a.shape[0], b.shape[1]), dtype=TO)
    if one > 0.0:
        value = product(a, b, PRECISION, TO)
    return value


@triton.jit
def times_square(
    tensor, rows, left, r, matrix, ELEMENT: tl.constexpr, TO: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr, R: tl.constexpr, SLAB: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A tile of rows of a :func:`tensor_of` times an (r, r) matrix that is read anew, SLAB of its rows at a time."""
    total = tl.zeros((BLOCK, R), dtype=TO)
    for first in range(0, R, SLAB):
        part = first + tl.arange(0, SLAB)
        tile = load_tile(tensor, rows, part, left, r, ELEMENT, TO, INDEX)  # (BLOCK, SLAB)
        total += product(tile, load_rows(matrix, first, r, R, SLAB, TO), PRECISION, TO)
    return total


@triton.jit
def where_of(table, items):
    """Of this program's item: factor, n, r, its rows [begin, end)."""
    item = tl.program_id(0).to(tl.int64)
    factor = tl.load(items + 2 * item)
    begin = tl.load(items + 2 * item + 1)
    n = tl.load(table + factor * _ROW)
    r = tl.load(table + factor * _ROW + 1).to(tl.int32)
    return item, factor, n, r, begin


@triton.jit
def rows_from(begin, start, BLOCK: tl.constexpr):
    """Rows of a tile counted from ``begin``: they change from tile to tile, so that no addresses are kept in between.

    Those of three storages of every tensor, loop-invariant, would fill the registers.
    """
    return tl.multiple_of((start - begin).to(tl.int32), BLOCK) + tl.arange(0, BLOCK)


@triton.jit
def whole_vectors(rows, columns, r):
    """Mask of (r, r) scratch: its rows in vectors of 4, for loads and stores of 16 bytes at any r.

    What is stored past column r is zero, or NaN where the matrix has one too: the tiles it is made of are zero there.
    """
    return (rows < r)[:, None] & (columns // 4 < (r + 3) // 4)[None, :]


@triton.jit
def load_square(base, r, R: tl.constexpr, TO: tl.constexpr):
    """An (r, r) matrix of leading dimension R, zero outside."""
    i = tl.arange(0, R)
    return tl.load(base + i[:, None] * R + i[None, :], mask=whole_vectors(i, i, r), other=0.0).to(TO)


@triton.jit
def load_rows(base, first, r, R: tl.constexpr, SLAB: tl.constexpr, TO: tl.constexpr):
    """Rows [first, first + SLAB) of an (r, r) matrix of leading dimension R, zero outside."""
    i, j = first + tl.arange(0, SLAB), tl.arange(0, R)
    return tl.load(base + i[:, None] * R + j[None, :], mask=whole_vectors(i, j, r), other=0.0).to(TO)


@triton.jit
def store_square(base, value, r, R: tl.constexpr):
    """The counterpart of :func:`load_square`."""
    i = tl.arange(0, R)
    tl.store(base + i[:, None] * R + i[None, :], value, mask=whole_vectors(i, i, r))


@triton.jit
def sum_partials(base, count, stride, r, R: tl.constexpr, TO: tl.constexpr):
    """Sum of ``count`` (r, r) matrices ``stride`` apart, in their order, compensated (Kahan 1965): up to thousands."""
    total = load_square(base, r, R, TO)
    lost = tl.zeros((R, R), dtype=TO)
    for k in range(1, count):
        term = load_square(base + k * stride, r, R, TO) - lost
        grown = total + term
        lost = (grown - total) - term
        total = grown
    return total
