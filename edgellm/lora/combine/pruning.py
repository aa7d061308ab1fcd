"""Which values of a tensor are kept: the largest of all, found slab by slab.

The trimming of TIES (arXiv:2306.01708, section 4, step 1), and all that ``magnitude_prune`` does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgellm.tensors import SLAB_BYTES, Array, TensorRef, rows_within

Mask = npt.NDArray[np.bool_]

HALF_BITS = 16
"""Bits of a float32 that are counted at once while the smallest value that is kept is sought."""


class Pruning(Protocol):
    """Values of one tensor thrown away; the same ones however the rows are cut."""

    def prune(self, rows: Array, start: int) -> None:
        """Set what is not kept of ``rows``, which begin at row ``start``, to zero in place."""


@dataclass(frozen=True)
class LargestKept:
    """Keeps the ``count`` values of ``ref`` that are the largest without their sign.

    Among equals at the edge those of the first rows are kept (PEFT takes those that torch's
    ``topk`` happens to give). Reads the tensor two or three times, a slab in memory at a time.
    """

    ref: TensorRef
    count: int
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def prune(self, rows: Array, start: int) -> None:
        with self._lock:
            edge, last_equal = self._edge
        bits = _magnitude_bits(rows)
        keep = bits > edge
        first = start * self.ref.columns
        equal = np.flatnonzero(bits == edge)
        keep.reshape(-1)[equal[equal + first <= last_equal]] = True
        rows *= keep  # a product, not a choice: NaN stays NaN and is found later

    @cached_property
    def _edge(self) -> tuple[np.uint32, int]:
        """The bits of the smallest value that is kept, and the place of the last such value."""
        high, left = _bin_of(self._counts(None), self.count)
        low, left = _bin_of(self._counts(high), left)
        edge = np.uint32(high << HALF_BITS | low)
        if not edge:  # zeros are pruned or kept alike
            return edge, -1
        for first, bits in self._slabs():
            equal = np.flatnonzero(bits == edge)
            if len(equal) >= left:
                return edge, first + int(equal[left - 1])
            left -= len(equal)
        raise AssertionError(f"{self.ref.name} changed while it was read")

    def _counts(self, high: int | None) -> npt.NDArray[np.int64]:
        """How many values have each upper half; or each lower half, of those with ``high``."""
        counts = np.zeros(1 << HALF_BITS, dtype=np.int64)
        for _, bits in self._slabs():
            upper = bits >> HALF_BITS
            wanted = upper if high is None else bits[upper == high] & ((1 << HALF_BITS) - 1)
            counts += np.bincount(wanted.reshape(-1), minlength=len(counts))
        return counts

    def _slabs(self) -> Iterator[tuple[int, npt.NDArray[np.uint32]]]:
        for start, stop in slabs_of(self.ref):
            yield start * self.ref.columns, _magnitude_bits(self.ref.load(start, stop))


def slabs_of(ref: TensorRef) -> Iterator[tuple[int, int]]:
    """Start and stop of the slabs of rows that ``ref`` is read by."""
    step = rows_within(SLAB_BYTES, ref.columns)
    for start in range(0, ref.rows, step):
        yield start, min(start + step, ref.rows)


def _magnitude_bits(rows: Array) -> npt.NDArray[np.uint32]:
    """The bits of the values without their sign, which have the order of the values; NaN last."""
    return rows.view(np.uint32) & np.uint32(0x7FFFFFFF)


def _bin_of(counts: npt.NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin of the ``rank``-th value from the top, and which one of its bin that is, from 1."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, rank))
    place = rank - (int(above[index - 1]) if index else 0)
    return len(counts) - 1 - index, place
