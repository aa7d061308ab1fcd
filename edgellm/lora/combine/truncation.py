"""Sums of adapters cut to a low rank: the nearest matrix of that rank (Eckart and Young, 1936).

Neither way takes the SVD of an ``[out, in]`` matrix, as PEFT does: a sum of low-rank changes has a
small core, and of any other matrix only the leading vectors are sought.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from edgellm.lora.combine.leading import Doubles, leading_bytes, leading_vectors
from edgellm.lora.combine.pruning import slabs_of
from edgellm.lora.combine.sums import side_by_side
from edgellm.lora.edit import LowRank
from edgellm.lora.factors import row_product
from edgellm.tensors import Array, TensorRef, check_finite

_ONE_MATRIX = threading.Lock()
"""Held while a whole matrix is in memory, so that there is one at most."""


@dataclass(frozen=True)
class LowRankSum:
    """The sum of ``parts`` at ``weights``, cut to ``rank``, as two factors that load by rows.

    With ``M = B A``, where B holds the parts' ``b`` side by side and A their ``a`` one below the
    other, and ``B = Q R``, the right singular vectors V of the small ``R A`` are those of M, and
    the nearest matrix of the rank is ``M V V^T``. Kept in memory: V and ``A V``, float32.
    """

    parts: Sequence[LowRank]
    weights: Sequence[float]
    rank: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def load_a(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of ``V^T``, ``[rank, in]``."""
        return self._solved()[0][start:stop].copy()

    def load_b(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of ``B A V``, ``[out, rank]``."""
        rows = side_by_side([part.b for part in self.parts], start, stop)
        return row_product(rows, self._solved()[1], start)

    def _solved(self) -> tuple[Array, Array]:
        with self._lock:
            return self._factors

    @cached_property
    def _factors(self) -> tuple[Array, Array]:
        a = self._a()
        right = np.linalg.svd(self._triangle() @ a, full_matrices=False)[2][: self.rank]
        inner = a @ right.T
        return right.astype(np.float32), inner.astype(np.float32)

    def _a(self) -> Doubles:
        stacked = []
        for part, weight in zip(self.parts, self.weights, strict=True):
            rows = part.a.load()
            check_finite(rows, part.a.name)
            stacked.append(rows.astype(np.float64) * (weight * part.scale))
        return np.concatenate(stacked)

    def _triangle(self) -> Doubles:
        """R of ``B = Q R``, from one pass over the rows of B."""
        triangle: Doubles = np.empty((0, sum(part.rank for part in self.parts)))
        for start, stop in slabs_of(self.parts[0].b):
            rows = side_by_side([part.b for part in self.parts], start, stop)
            check_finite(rows, self.parts[0].b.name, first_row=start)
            stacked = np.concatenate([triangle, rows.astype(np.float64)])
            triangle = np.asarray(np.linalg.qr(stacked, mode="r"))
        return triangle


@dataclass(frozen=True)
class WholeMatrix:
    """A matrix cut to ``rank``, as two factors that load by rows.

    ``ref`` is read whole, once, at the first load, which takes ``whole_matrix_bytes``. Kept: the
    factors.
    """

    ref: TensorRef
    rank: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def load_a(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the factor ``[rank, in]``."""
        return self._solved()[0][start:stop].copy()

    def load_b(self, start: int, stop: int) -> Array:
        """Rows ``start:stop`` of the factor ``[out, rank]``."""
        return self._solved()[1][start:stop].copy()

    def _solved(self) -> tuple[Array, Array]:
        with self._lock:
            return self._factors

    @cached_property
    def _factors(self) -> tuple[Array, Array]:
        with _ONE_MATRIX:
            matrix = np.empty(self.ref.shape, dtype=np.float32)
            for start, stop in slabs_of(self.ref):
                matrix[start:stop] = self.ref.load(start, stop)
                check_finite(matrix[start:stop], self.ref.name, first_row=start)
            return truncated(matrix, self.rank)


def whole_matrix_bytes(shape: tuple[int, ...]) -> int:
    """Memory that ``WholeMatrix`` takes at most while it computes, slabs of rows aside.

    One at a time does, however many threads ask.
    """
    rows, columns = shape
    return 4 * rows * columns + leading_bytes(min(shape))


def truncated(matrix: Array, rank: int) -> tuple[Array, Array]:
    """Factors ``[rank, in]`` and ``[out, rank]`` of the nearest matrix of ``rank``."""
    wide = matrix.shape[0] < matrix.shape[1]
    vectors = leading_vectors(matrix.T if wide else matrix, rank).astype(np.float32)
    if wide:
        return np.ascontiguousarray(vectors.T @ matrix), vectors
    return np.ascontiguousarray(vectors.T), np.ascontiguousarray(matrix @ vectors)
