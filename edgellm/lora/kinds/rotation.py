"""Orthogonal matrices in blocks: Cayley's transform, and rows turned block by block.

A layer's inputs are turned, so each row of ``[out, in]`` is turned by itself.
"""

from __future__ import annotations

import numpy as np

from edgellm.lora.factors import by_tiles
from edgellm.tensors import Array


def skew_from_upper(values: Array, size: int) -> Array:
    """The skew-symmetric ``[size, size]`` whose part above the diagonal is ``values``, by rows."""
    matrix = np.zeros((size, size), dtype=np.float32)
    matrix[np.triu_indices(size, 1)] = values
    matrix -= matrix.T
    return matrix


def cayley(skew: Array) -> Array:
    """``(I - Q) (I + Q)^-1`` of a skew-symmetric ``Q``, which is orthogonal.

    I + Q of a skew-symmetric Q is never singular. Solved in float64: its condition grows with Q.
    """
    identity = np.eye(len(skew))
    # Both factors commute, so the inverse may as well stand on the left.
    result: Array = np.linalg.solve(identity + skew, identity - skew).astype(np.float32)
    return result


def cayley_neumann(skew: Array, terms: int, *, half_last: bool = True) -> Array:
    """Cayley's transform with its inverse as a Neumann series: ``I + 2Q + 2Q^2 + ...``.

    Signs are PEFT's: ``Q`` here is minus the ``Q`` of ``cayley``. ``terms`` counts ``I`` as the
    first, as ``OFTRotationModule._cayley_batch`` does (peft 0.21.2), which takes the last of four
    or more terms once instead of twice, and four terms where three are asked for. ``half_last``
    False: each term twice, and three are three, as before peft 0.18.
    """
    result: Array = np.eye(len(skew), dtype=np.float32)
    if half_last and terms == 3:
        terms = 4
    power = skew
    for exponent in range(1, terms):
        if exponent > 1:
            power = power @ skew
        once = half_last and exponent == terms - 1 and terms > 3
        result += power if once else 2 * power
    return result


def turned(rows: Array, blocks: Array, first_row: int) -> Array:
    """``rows @ block_diagonal(blocks)``; a row has the same bits however its matrix is cut.

    ``rows`` is ``[n, in]`` and begins at row ``first_row`` of its matrix; ``blocks`` is
    ``[in / size, size, size]``, or ``[1, size, size]`` for one block that serves all.
    """
    size, columns = blocks.shape[-1], rows.shape[1]

    def turn(tile: Array) -> Array:
        pieces = tile.reshape(len(tile), columns // size, size).transpose(1, 0, 2)
        result: Array = (pieces @ blocks).transpose(1, 0, 2).reshape(len(tile), columns)
        return result

    return by_tiles(rows, first_row, columns, turn)
