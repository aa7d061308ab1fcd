"""A tensor that is known but not loaded: the only way that weights travel through edgellm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
LoadRows = Callable[[int, int], Array]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Knowing a tensor is free; ``load`` costs.

    ``name`` is what the source calls it. ``role`` is what it does in the network, written as the
    GGUF tensor name (``blk.3.attn_q.weight``), whatever container it came from. ``shape`` is
    ``[out, in]`` for a linear weight and ``[n]`` for a vector. ``dtype`` names the stored type
    (``bf16``, ``f16``, ``f32``, ``q4_1``, ...).
    """

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    load_rows: LoadRows

    @property
    def rows(self) -> int:
        """Rows that can be loaded apart: the first dimension of a matrix, 1 for a vector."""
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def columns(self) -> int:
        """Values in a row."""
        return self.size // self.rows if self.rows else 0

    @property
    def size(self) -> int:
        """Number of values."""
        size = 1
        for dimension in self.shape:
            size *= dimension
        return size

    def load(self, start: int = 0, stop: int | None = None) -> Array:
        """Rows ``start:stop`` as float32 ``[stop - start, columns]``, C-contiguous, writable.

        Raises ``SourceError`` when the bytes cannot be read.
        """
        return self.load_rows(start, self.rows if stop is None else stop)

    def with_role(self, role: str) -> TensorRef:
        """The same tensor under another role."""
        return replace(self, role=role)


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

    return replace(ref, shape=shape or ref.shape, load_rows=load_rows)


def reordered(ref: TensorRef, order: npt.NDArray[np.intp]) -> TensorRef:
    """``ref`` with its rows taken in ``order`` (row ``i`` of the result is row ``order[i]``).

    Loads the span of source rows that a slab touches, so keep ``order`` local (within a head).
    """

    def load_rows(start: int, stop: int) -> Array:
        wanted = order[start:stop]
        if wanted.size == 0:
            return ref.load_rows(0, 0)
        low, high = int(wanted.min()), int(wanted.max()) + 1
        return np.ascontiguousarray(ref.load_rows(low, high)[wanted - low])

    return replace(ref, load_rows=load_rows)


def stacked_rows(parts: Sequence[TensorRef], start: int, stop: int) -> Array:
    """Rows ``start:stop`` of ``parts`` laid one below the other, float32 ``[stop - start, in]``."""
    pieces: list[Array] = []
    first = 0
    for part in parts:
        low, high = max(start - first, 0), min(stop - first, part.rows)
        if low < high:
            pieces.append(part.load_rows(low, high))
        first += part.rows
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
