"""Statistics of a product's inputs, added up by threads to the same bits whatever their number."""

from __future__ import annotations

from threading import Condition

import numpy as np

from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array

CHUNK_TOKENS = 2048
"""Tokens whose inputs are kept until they are multiplied: enough for BLAS to be quick, and few
enough to be many pieces for the threads."""

STRIP_COLUMNS = 4096
"""Columns of a Hessian that are computed at once: 64 MiB of products for a square one."""


class InputSums:
    """Adds up ``x.T @ x`` and the largest magnitudes of pieces ``x`` ``[tokens, columns]``.

    Pieces are numbered from 0 and may come from several threads; products are computed side by
    side and added in the order of the numbers. Pieces must be begun in order, or whoever brings a
    later one waits for ever.
    """

    def __init__(self, columns: int, *, diagonal_only: bool = False) -> None:
        shape = (columns,) if diagonal_only else (columns, columns)
        self._sums = np.zeros(shape, np.float32)
        self._largest = np.zeros(columns, np.float32)
        self._squares = np.zeros(columns, np.float32)
        self._tokens = 0
        self._weight = 0.0
        self.columns = columns
        self.diagonal_only = diagonal_only
        self._turns = dict.fromkeys(range(0, columns, STRIP_COLUMNS), 0)
        self._changed = Condition()
        self._stopped = False

    def add(self, number: int, x: Array, weights: Array | None = None) -> None:
        """Count piece ``number``, its tokens by ``weights`` ``[tokens]`` in the Hessian.

        Where there are weights, ``x`` is changed. A piece may be of no tokens.
        """
        if not len(x):
            self._pass(number)
            return
        largest = np.maximum(x.max(axis=0), -x.min(axis=0))
        squares = None
        if weights is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.einsum("ij,ij->j", x, x)
                x *= np.sqrt(weights)[:, None]
        for first in self._turns:
            last = min(first + STRIP_COLUMNS, x.shape[1])
            strip = x[:, first:last]
            with np.errstate(over="ignore", invalid="ignore"):  # the pass looks, and explains
                products = self._products(x, strip, last)
            if not self._await_turn(first, number):
                return
            with np.errstate(over="ignore", invalid="ignore"):
                for place, values in products:
                    self._sums[first:last][..., place] += values
            here = slice(first, last)
            np.maximum(self._largest[here], largest[here], out=self._largest[here])
            if squares is not None:
                self._squares[here] += squares[here]
            if last == x.shape[1]:
                self._tokens += len(x)
                self._weight += len(x) if weights is None else float(weights.sum(dtype=np.float64))
            self._next(first)

    def _pass(self, number: int) -> None:
        for first in self._turns:
            if not self._await_turn(first, number):
                return
            self._next(first)

    def _next(self, first: int) -> None:
        with self._changed:
            self._turns[first] += 1
            self._changed.notify_all()

    @property
    def tokens(self) -> int:
        """How many were counted."""
        return self._tokens

    def stop(self) -> None:
        """Let nobody wait any more: a piece will not come."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def result(self) -> Statistics:
        """What the pieces come to; the sums must not be added to any more."""
        if not self.diagonal_only:
            self._mirror()
        self._sums /= np.float32(self._weight)
        weighed = self._weight != self._tokens
        squares = self._squares / np.float32(self._tokens) if weighed else None
        return Statistics(self._sums, self._largest, self._tokens, squares)

    def _products(self, x: Array, strip: Array, last: int) -> list[tuple[slice, Array]]:
        """Of the strip with itself and with what lies to its right, by place in the strip's rows.

        numpy asks BLAS for half of a product of a matrix with its own transpose (``syrk``).
        """
        if self.diagonal_only:
            return [(slice(None), np.einsum("ij,ij->j", strip, strip))]
        own = (slice(last - strip.shape[1], last), strip.T @ strip)
        right = x[:, last:]
        return [own, (slice(last, None), strip.T @ right)] if right.shape[1] else [own]

    def _await_turn(self, first: int, number: int) -> bool:
        with self._changed:
            while self._turns[first] != number and not self._stopped:
                self._changed.wait()
            return not self._stopped

    def _mirror(self) -> None:
        for first in self._turns:
            last = first + STRIP_COLUMNS
            self._sums[last:, first:last] = self._sums[first:last, last:].T
