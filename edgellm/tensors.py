"""A tensor that is known but not loaded: the only way that weights travel through edgellm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgellm.errors import TensorError

Array = npt.NDArray[np.float32]
LoadRows = Callable[[int, int], Array]
Item = TypeVar("Item", bound=np.generic)

SLAB_BYTES = 8 << 20
"""Float32 bytes that a worker loads at once: small enough to stay in the cache's reach."""

COLUMN_CHUNK_BYTES = 1 << 20
"""Float32 bytes of whole rows that are alive at once while columns are cut out of them."""

LONG_RUN = 16
"""Consecutive rows, on average, that are worth a load of their own where rows are reordered."""

TURNED_ROWS = 64
"""Rows of a strip while a matrix is turned: what is written stays in the cache."""


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Knowing a tensor is free; ``load`` costs.

    ``name`` is what the source calls it. ``role`` is what it does in the network, written as the
    GGUF tensor name (``blk.3.attn_q.weight``), whatever container it came from. ``shape`` is
    ``[out, in]`` for a linear weight and ``[n]`` for a vector. ``dtype`` names the stored type
    (``bf16``, ``f16``, ``f32``, ``q4_1``, ...). ``column_loader`` is a quicker way to columns than
    cutting them out of rows, where the source has one.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    load_rows: LoadRows
    column_loader: LoadRows | None = None

    @property
    def rows(self) -> int:
        """Rows that can be loaded apart: the first dimension of a matrix, 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Values in a row."""
        return math.prod(self.shape[1:] if len(self.shape) > 1 else self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def load(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows ``start:stop`` as float32 ``[stop - start, columns]``, C-contiguous, writable.

        Raises ``SourceError`` when the bytes cannot be read.
        """
        return self.load_rows(start, self.rows if stop is None else stop)

    def load_columns(self, start: int, stop: int) -> Array:
        """Columns ``start:stop`` of every row as float32 ``[rows, stop - start]``, C-contiguous.

        Takes the memory of the result and ``COLUMN_CHUNK_BYTES``, but reads the whole tensor.
        Raises ``SourceError`` when the bytes cannot be read.
        """
        if self.column_loader is not None:
            return self.column_loader(start, stop)
        result = np.empty((self.rows, stop - start), dtype=np.float32)
        step = rows_within(COLUMN_CHUNK_BYTES, self.columns)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            result[first:last] = self.load_rows(first, last)[:, start:stop]
        return result

    def with_role(self, role: str) -> TensorRef:
        """The same tensor under another role."""
        return replace(self, role=role)


def rows_of(ref: TensorRef, first: int, rows: int, name: str = "") -> TensorRef:
    """Rows ``first`` to ``first + rows`` of the matrix ``ref`` as a tensor of their own."""

    def load_rows(start: int, stop: int) -> Array:
        return ref.load_rows(first + start, first + stop)

    return replace(
        ref,
        name=name or ref.name,
        shape=(rows, ref.columns),
        nbytes=ref.nbytes // ref.rows * rows,
        load_rows=load_rows,
        column_loader=None,
    )


def rows_within(nbytes: int, columns: int) -> int:
    """How many rows of ``columns`` float32 values take no more than ``nbytes``, at least one."""
    return max(1, nbytes // (4 * max(1, columns)))


def constant(name: str, values: npt.ArrayLike) -> TensorRef:
    """A tensor made by us (a rope table, a zero bias) that flows like a stored one."""
    array = np.ascontiguousarray(values, dtype=np.float32)
    table = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)

    def load_rows(start: int, stop: int) -> Array:
        return table[start:stop].copy()

    return TensorRef(name, name, array.shape, "f32", array.nbytes, load_rows)


def derived(
    ref: TensorRef, change: Callable[[Array], Array], *, shape: tuple[int, ...] | None = None
) -> TensorRef:
    """``ref`` with ``change`` applied to each slab of rows; ``change`` must treat rows alike.

    Use it where the result for a row depends on that row alone (``norm + 1``).
    """

    def load_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(change(ref.load_rows(start, stop)))

    return replace(ref, shape=shape or ref.shape, load_rows=load_rows, column_loader=None)


def reshaped(ref: TensorRef, shape: tuple[int, ...]) -> TensorRef:
    """The values of ``ref`` in ``shape``; it is read whole, so keep it to small tensors."""
    rows = shape[0] if len(shape) > 1 else 1

    def load_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(ref.load().reshape(rows, -1)[start:stop])

    return replace(ref, shape=shape, load_rows=load_rows, column_loader=None)


def transposed(ref: TensorRef) -> TensorRef:
    """The matrix ``ref`` turned round: a slab of its rows is loaded as columns of ``ref``.

    Memory stays at two slabs; ``ref`` is read whole once per slab, so make slabs large. Turned
    round twice it is what it was, with all that its loader knows.
    """
    if len(ref.shape) != 2:
        raise ValueError(f"only a matrix can be transposed, {ref.name} has shape {list(ref.shape)}")
    shape = (ref.shape[1], ref.shape[0])
    if isinstance(ref.load_rows, TurnedRows):
        first = ref.load_rows.ref
        return replace(
            ref, shape=shape, load_rows=first.load_rows, column_loader=first.column_loader
        )

    def load_columns(start: int, stop: int) -> Array:
        return _turned(ref.load_rows(start, stop))

    return replace(ref, shape=shape, load_rows=TurnedRows(ref), column_loader=load_columns)


@dataclass(frozen=True, eq=False)
class TurnedRows:
    """A ``LoadRows`` of the columns of ``ref``."""

    ref: TensorRef

    def __call__(self, start: int, stop: int) -> Array:
        return _turned(self.ref.load_columns(start, stop))


def _turned(matrix: Array) -> Array:
    """``matrix.T`` as an array of its own; in strips, several times faster than numpy's copy."""
    result = np.empty((matrix.shape[1], matrix.shape[0]), dtype=np.float32)
    for start in range(0, len(matrix), TURNED_ROWS):
        strip = matrix[start : start + TURNED_ROWS]
        result[:, start : start + len(strip)] = strip.T
    return result


def reordered(ref: TensorRef, order: npt.NDArray[np.intp]) -> TensorRef:
    """``ref`` with its rows taken in ``order`` (row ``i`` of the result is row ``order[i]``).

    Of a vector, its values. Loads the runs of source rows that a slab touches, or their span where
    runs are short, so keep ``order`` local (within a head) or in long runs.
    """
    if len(ref.shape) == 1:
        return derived(ref, lambda values: values[:, order])
    # One that knows more than values (quant.stored) takes that along.
    in_order: Callable[[npt.NDArray[np.intp]], LoadRows] | None
    in_order = getattr(ref.load_rows, "in_order", None)
    load_rows = in_order(order) if in_order else rows_in_order(ref.load_rows, order)
    return replace(ref, load_rows=load_rows, column_loader=None)


def rows_in_order(
    load: Callable[[int, int], npt.NDArray[Item]], order: npt.NDArray[np.intp]
) -> Callable[[int, int], npt.NDArray[Item]]:
    """A loader of the rows of ``load`` in ``order``; see ``reordered`` for what it loads."""

    def load_rows(start: int, stop: int) -> npt.NDArray[Item]:
        wanted = order[start:stop]
        if wanted.size == 0:
            return load(0, 0)
        breaks = np.flatnonzero(np.diff(wanted) != 1) + 1
        if (len(breaks) + 1) * LONG_RUN <= wanted.size:
            runs = np.split(wanted, breaks)
            return np.concatenate([load(int(run[0]), int(run[-1]) + 1) for run in runs])
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return np.ascontiguousarray(load(low, high)[wanted - low])

    return load_rows


def stacked_rows(parts: Sequence[TensorRef], start: int, stop: int) -> Array:
    """Rows ``start:stop`` of ``parts`` laid one below the other, float32 ``[stop - start, in]``.

    Raises ``TensorError`` where a part holds NaN or Inf, which a grid would make finite garbage.
    """
    pieces: list[Array] = []
    for part, low, high in spans_of(parts, start, stop):
        piece = part.load_rows(low, high)
        check_finite(piece, part.name, first_row=low)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def stacked(parts: Sequence[TensorRef], name: str) -> TensorRef:
    """``parts`` laid one below the other as one matrix called ``name``."""
    rows, columns = sum(part.rows for part in parts), parts[0].columns
    nbytes = sum(part.nbytes for part in parts)

    def load_rows(start: int, stop: int) -> Array:
        return stacked_rows(parts, start, stop)

    return TensorRef(name, parts[0].role, (rows, columns), parts[0].dtype, nbytes, load_rows)


def spans_of(
    parts: Sequence[TensorRef], start: int, stop: int
) -> Iterator[tuple[TensorRef, int, int]]:
    """The rows of each part that lie between ``start`` and ``stop`` of the stack of all."""
    first = 0
    for part in parts:
        low, high = max(start - first, 0), min(stop - first, part.rows)
        if low < high:
            yield part, low, high
        first += part.rows


def check_finite(rows: Array, name: str, *, first_row: int = 0) -> None:
    """Raise ``TensorError`` with the place of the first NaN or Inf in ``rows`` ``[rows, columns]``.

    ``first_row`` is where the slab lies in tensor ``name``. Quantizers turn such values into finite
    garbage, so look before rounding.
    """
    # A sum is several times faster than np.isfinite and never finite when a value is not; one that
    # overflows sends us to the exact look.
    with np.errstate(over="ignore", invalid="ignore"):
        total = rows.sum(dtype=np.float32)
    if np.isfinite(total):
        return
    bad = ~np.isfinite(rows.reshape(-1))
    count = int(np.count_nonzero(bad))
    if not count:
        return
    position = int(bad.argmax())
    row, column = divmod(position, rows.shape[-1])
    value = rows.reshape(-1)[position]
    others = f", and {count - 1} more near it" if count > 1 else ""
    raise TensorError(
        f"tensor {name} holds {value} at row {first_row + row}, column {column}{others}: it is "
        "damaged, or was trained into overflow; get an intact copy of it"
    )
