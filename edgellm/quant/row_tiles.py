"""Rows of weights turned into tiles ``[tiles, columns, TILE_ROWS]`` and back.

Column by column, solvers want neighbouring rows next to each other. Tiles are all of one shape, so
that every product of BLAS is too: a row must come out the same whatever other rows come with it.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgellm.tensors import Array

TILE_ROWS = 64
"""Rows whose 128 columns just fit in a core's first cache: 32 KiB."""

STRIP_ROWS = 16
"""Rows that are multiplied by a matrix at once. BLAS adds up in another order at the edge of what
its kernels hold, so that of 32 or 64 rows each came out by where it stood (OpenBLAS on AVX2). 16
are one vector of AVX512, two of AVX2. A fifth of the products' speed goes for it."""

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


def product(matrix: Array, tiles: Array) -> Array:
    """``matrix`` ``[n, columns]`` times each of ``tiles``, ``[tiles, n, TILE_ROWS]``."""
    count, columns, _ = tiles.shape
    strips = tiles.reshape(count, columns, -1, STRIP_ROWS).swapaxes(1, 2)
    products: Array = (matrix @ strips).swapaxes(1, 2)
    return products.reshape(count, len(matrix), TILE_ROWS)
