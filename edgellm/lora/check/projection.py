"""How well rounding keeps the direction of a low-rank change, told apart from rounding noise.

Quantizing moves every weight by about as much as a healthy fine-tune moves the whole matrix, so the
plain cosine between the change before and after is near zero even where the fine-tune is all there.
But that noise points everywhere, and the change only along the few rows and columns of its own
factors: projected on these, what is left of the noise is about ``rank / sqrt(out * in)`` of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgellm.lora.edit import Edit, LowRank
from edgellm.lora.kinds.dora import DoraColumns, DoraRows
from edgellm.tensors import Array, TensorRef, rows_within

Doubles = npt.NDArray[np.float64]
Round = Callable[[Array], Array]

SAMPLE_BYTES = 4 << 20
"""Float32 bytes of a tensor that are rounded at the most, in tiles spread evenly over its rows."""

TILE_ROWS = 32
"""Rows of a tile."""

SMALLEST_PART = 1e-7
"""Directions whose square is smaller, relative to the largest, are the factors' own rounding."""


def projected_cosine(
    before: TensorRef, after: TensorRef, factors: Sequence[LowRank], rounded: Round
) -> float | None:
    """Cosine of ``Q(after) - Q(before)`` with ``after - before``, both as ``P_U X P_V``.

    ``rounded`` is Q, row by row. U spans the columns of all B of ``factors``, V the rows of all A;
    the cosine is that of ``U^T X V`` ``[rank, rank]``. Of a large tensor both sides are restricted
    to the same sample of rows, which leaves less change to find under the same noise: the figure is
    then a little too low. None where the change has no direction.
    """
    tiles = list(_sampled(after.rows, after.columns))
    b = [np.concatenate([_rows(one, tile) for one in factors], axis=1) for tile in tiles]
    span_out = orthonormal(np.concatenate(b).astype(np.float64))
    span_in = orthonormal(np.concatenate([one.a_values for one in factors]).T.astype(np.float64))
    shape = (span_out.shape[1], span_in.shape[1])
    true, kept = np.zeros(shape), np.zeros(shape)
    place = 0
    for start, stop in tiles:
        new, old = after.load(start, stop), before.load(start, stop)
        rows = span_out[place : place + stop - start].T
        true += rows @ ((new - old) @ span_in)
        kept += rows @ ((rounded(new) - rounded(old)) @ span_in)
        place += stop - start
    lengths = float(np.linalg.norm(true)) * float(np.linalg.norm(kept))
    if not np.linalg.norm(true):
        return None
    return float(np.sum(true * kept)) / lengths if lengths else 0.0


def low_rank_factors(edits: Sequence[Edit]) -> list[LowRank] | None:
    """The factors of all ``edits``, DoRA's too; None where one's change does not lie in factors."""
    found = [edit.low_rank if isinstance(edit, DoraRows | DoraColumns) else edit for edit in edits]
    factors = [edit for edit in found if isinstance(edit, LowRank)]
    return factors if factors and len(factors) == len(found) else None


def orthonormal(columns: Doubles) -> Doubles:
    """Orthonormal columns that span those of ``columns`` ``[n, k]``: ``[n, at most k]``.

    By the eigenvectors of the Gram matrix, whose size is the rank's alone.
    """
    lengths = np.linalg.norm(columns, axis=0)
    scaled = columns / np.where(lengths, lengths, 1.0)
    squares, vectors = np.linalg.eigh(scaled.T @ scaled)
    kept = squares > SMALLEST_PART * max(squares.max(initial=0.0), 1e-300)
    basis: Doubles = scaled @ (vectors[:, kept] / np.sqrt(squares[kept]))
    return basis


def _rows(factors: LowRank, tile: tuple[int, int]) -> Array:
    return factors.b.load(*tile)


def _sampled(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """All rows of a small tensor; of a large one tiles at even distances, the same each time."""
    wanted = max(1, rows_within(SAMPLE_BYTES, columns) // TILE_ROWS)
    tiles = -(-rows // TILE_ROWS)
    for number in range(min(wanted, tiles)):
        start = number * tiles // min(wanted, tiles) * TILE_ROWS
        yield start, min(start + TILE_ROWS, rows)
