"""What a merge did to each weight, noted while the rows stream by: norms and a checksum.

Rows may be loaded in any order, by any thread and more than once. Every row's figures depend on
that row alone and are summed in the order of the rows, so that the result is always the same.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.parallel import one_blas_thread
from edgellm.tensors import Array

DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Change:
    """One weight that adapters changed.

    ``relative`` is the Frobenius norm of the change over that of the weight before; infinite where
    all of it was zero. ``sha256`` is taken over the SHA-256 of each row of the merged weight
    (float32, little-endian, canonical order), so that it is the same for every container and
    grid; on another kind of processor the last bits of a product may differ, and it with them.
    """

    change_norm: float
    weight_norm: float
    sha256: str

    @property
    def relative(self) -> float:
        if self.weight_norm:
            return self.change_norm / self.weight_norm
        return math.inf if self.change_norm else 0.0


class _Rows:
    """The rows of one weight that have been seen; made with the first, gone with the last."""

    def __init__(self, rows: int) -> None:
        self.unseen = np.ones(rows, dtype=np.bool_)
        self.squares: npt.NDArray[np.float64] = np.zeros((2, rows))
        self.digests = np.zeros((rows, DIGEST_BYTES), dtype=np.uint8)


class MergeRecord:
    """The changes of a merge by the name of the weight, complete when every row was loaded once.

    ``watch`` names a weight, its number of rows and a way to load it, for ``complete``.
    """

    def __init__(self) -> None:
        self._expected: dict[str, int] = {}
        self._rows: dict[str, _Rows] = {}
        self._loaders: dict[str, Callable[[], object]] = {}
        self._changes: dict[str, Change] = {}
        self._lock = threading.Lock()

    def watch(self, name: str, rows: int, load_all: Callable[[], object]) -> None:
        """Expect ``rows`` rows of ``name``."""
        self._expected[name] = rows
        self._loaders[name] = load_all

    def note(self, name: str, start: int, before: Array, after: Array) -> bool:
        """Rows ``start:...`` of ``name`` before and after; whether that was the last of them."""
        if name not in self._expected:  # seen whole already
            return False
        stop = start + len(after)
        change = after - before
        # A row is summed in float32, the rows in float64: five digits at a quarter of the cost.
        with np.errstate(over="ignore"):
            squares = np.stack([_row_squares(change), _row_squares(before)])
        digests = [hashlib.sha256(np.ascontiguousarray(row).data).digest() for row in after]
        with self._lock:
            if name not in self._expected:
                return False
            if name not in self._rows:
                self._rows[name] = _Rows(self._expected[name])
            rows = self._rows[name]
            rows.squares[:, start:stop] = squares
            rows.digests[start:stop] = np.frombuffer(b"".join(digests), np.uint8).reshape(
                -1, DIGEST_BYTES
            )
            rows.unseen[start:stop] = False
            if rows.unseen.any():
                return False
            del self._expected[name], self._rows[name]
            change_square, weight_square = (math.fsum(line.tolist()) for line in rows.squares)
            digest = hashlib.sha256(rows.digests.tobytes()).hexdigest()
            self._changes[name] = Change(math.sqrt(change_square), math.sqrt(weight_square), digest)
            return True

    def complete(self) -> dict[str, Change]:
        """The changes of every watched weight, by name in sorted order.

        Loads those of which a container left rows out (positions beyond a capped context).
        """
        with one_blas_thread() if self._expected else nullcontext():
            for name in list(self._expected):
                self._loaders[name]()
        return dict(sorted(self._changes.items()))

    def sha256(self) -> str:
        """SHA-256 over the names and digests of all changed weights; see ``complete``."""
        digest = hashlib.sha256()
        for name, change in self.complete().items():
            digest.update(f"{name} {change.sha256}\n".encode())
        return digest.hexdigest()


def _row_squares(values: Array) -> Array:
    squares: Array = np.einsum("ij,ij->i", values, values)
    return squares
