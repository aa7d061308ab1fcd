"""Products whose rows do not depend on how a weight is cut, and factors kept while they are used.

A weight is changed slab by slab, and slabs are cut differently for each container, so a row must
come out the same whatever its neighbours. BLAS does not promise that: its kernels add up in another
order at the edge of a matrix. Here every product is of the same tiles of rows, wherever a slab
begins or ends.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from weakref import ReferenceType, ref

import numpy as np

from edgellm.tensors import Array

TILE_ROWS = 32
"""Rows that are multiplied at once: 64 is no faster, and a wide slab has only a few dozen rows."""

KEPT_BYTES = 64 << 20
"""How much of the adapters' factors stays in memory: a few tensors' worth, whatever the model."""


def by_tiles(rows: Array, first_row: int, columns: int, change: Callable[[Array], Array]) -> Array:
    """``change`` of ``rows``, asked for in tiles of ``TILE_ROWS`` that begin at multiples of it.

    ``rows`` is ``[n, k]`` and begins at row ``first_row`` of its matrix; the result is float32
    ``[n, columns]``, C-contiguous. ``change`` takes ``[TILE_ROWS, k]`` to ``[TILE_ROWS, columns]``,
    row by row; rows that are not there are zeros.
    """
    result = np.empty((len(rows), columns), dtype=np.float32)
    done = 0
    while done < len(rows):
        offset = (first_row + done) % TILE_ROWS
        taken = min(TILE_ROWS - offset, len(rows) - done)
        tile = rows[done : done + taken]
        if taken < TILE_ROWS:
            padded = np.zeros((TILE_ROWS, rows.shape[1]), dtype=np.float32)
            padded[offset : offset + taken] = tile
            tile = padded
        result[done : done + taken] = change(tile)[offset : offset + taken]
        done += taken
    return result


def row_product(left: Array, right: Array, first_row: int) -> Array:
    """``left @ right`` in float32; a row has the same bits however its matrix is cut into slabs.

    ``left`` is ``[n, k]`` and begins at row ``first_row`` of its matrix; ``right`` is
    ``[k, columns]``.
    """
    return by_tiles(left, first_row, right.shape[1], lambda tile: tile @ right)


class Kept:
    """Arrays that are asked for again and again, the latest of them kept within a budget.

    The newest always stays, however large. Two threads that ask at once may both make it. Owners
    are not kept alive: an adapter's files are closed when whoever opened it lets go of it.
    """

    def __init__(self, budget_bytes: int = KEPT_BYTES) -> None:
        self._budget_bytes = budget_bytes
        self._arrays: OrderedDict[int, tuple[ReferenceType[object], Array]] = OrderedDict()
        self._lock = Lock()

    def get(self, owner: object, make: Callable[[], Array]) -> Array:
        """What ``make`` gives for ``owner``, made now unless it is there; do not change it."""
        key = id(owner)
        with self._lock:
            found = self._arrays.get(key)
            if found is not None and found[0]() is owner:  # no other one that had its id before
                self._arrays.move_to_end(key)
                return found[1]
        array = make()
        with self._lock:
            for gone in [key for key, (kept_for, _) in self._arrays.items() if kept_for() is None]:
                del self._arrays[gone]
            self._arrays[key] = (ref(owner), array)
            self._arrays.move_to_end(key)
            held_bytes = sum(each.nbytes for _, each in self._arrays.values())
            while held_bytes > self._budget_bytes and len(self._arrays) > 1:
                _, (_, dropped) = self._arrays.popitem(last=False)
                held_bytes -= dropped.nbytes
        return array


kept = Kept()
"""Shared by all edits, so that the budget holds for a whole model."""
