"""Rows of weights turned into tiles ``[tiles, columns, TILE_ROWS]`` and back.

Column by column, solvers want neighbouring rows next to each other. Tiles are all of one shape, so
that every product of BLAS is too: its kernels add up in another order at the edge of a matrix, and
a row must come out the same whatever other rows come with it.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

TILE_ROWS = 64
"""A multiple of every vector width, small enough that 128 columns of it stay in the first cache."""

Value = TypeVar("Value", bound=np.generic)


def to_tiles(rows: npt.NDArray[Value]) -> npt.NDArray[Value]:
    """``rows`` ``[rows, columns]`` as tiles; rows that are not there are zeros."""
    count, columns = rows.shape
    tiles = -(-count // TILE_ROWS)
    result = np.zeros((tiles, columns, TILE_ROWS), rows.dtype)
    for tile, start in enumerate(range(0, count, TILE_ROWS)):
        part = rows[start : start + TILE_ROWS]
        result[tile, :, : len(part)] = part.T
    return result


def from_tiles(tiles: npt.NDArray[Value], count: int) -> npt.NDArray[Value]:
    """The first ``count`` rows of ``tiles``, ``[count, columns]``; the inverse of ``to_tiles``."""
    rows = np.empty((count, tiles.shape[1]), tiles.dtype)
    for tile, start in enumerate(range(0, count, TILE_ROWS)):
        part = rows[start : start + TILE_ROWS]
        part[...] = tiles[tile, :, : len(part)].T
    return rows
