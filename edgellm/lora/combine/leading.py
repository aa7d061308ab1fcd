"""The leading singular vectors of a matrix, without its SVD.

They are the eigenvectors of the matrix's square. The square is taken in float64, where squaring a
float32 matrix loses nothing that counts, so the result is nearer the truth than a float32 SVD.

A large matrix is not even squared. Its square is multiplied by a block of random vectors, that
product again, and so on, and the eigenvectors are sought among all of these (randomized block
Krylov: Musco and Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate
Singular Value Decomposition", 2015, algorithm 2). The residuals say when they are found; where that
takes too long, as for a matrix of pure noise, the square is solved whole.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from edgellm.tensors import COLUMN_CHUNK_BYTES, Array, rows_within

Doubles = npt.NDArray[np.float64]

EXTRA_VECTORS = 8
"""Random vectors in a block beyond the rank: with them the last ones come sooner."""

SMALL = 512
"""Shorter sides up to here are solved whole: that takes a tenth of a second."""

SHARE_SOUGHT = 1 / 8
"""Part of the shorter side that is sought through before the square is solved whole."""

RESIDUAL = 1e-8
"""Of an eigenpair of the square, as a share of the largest singular value times its own. A float32
SVD errs by some 1e-7 of it."""

LEAST = 1e-6
"""Share of the largest singular value below which one counts as that: it is rounding of float32."""


def leading_vectors(tall: Array, rank: int) -> Doubles:
    """The right singular vectors of the ``rank`` largest singular values, ``[columns, rank]``.

    ``tall`` is float32 ``[rows, columns]``, finite, with no fewer rows than columns. Takes
    ``leading_bytes`` of memory at most beyond it.
    """
    columns = tall.shape[1]
    if columns > SMALL and rank + EXTRA_VECTORS <= columns * SHARE_SOUGHT:
        found = _sought(tall, rank)
        if found is not None:
            return found
    square = np.zeros((columns, columns))
    for rows in _doubles(tall):
        square += rows.T @ rows
    return _eigenvectors(square, rank)[1]


def leading_bytes(columns: int) -> int:
    """Memory that ``leading_vectors`` takes at most: the square, its vectors and LAPACK's work."""
    return 8 * 4 * columns * columns


def _sought(tall: Array, rank: int) -> Doubles | None:
    """The vectors by block Krylov; None where they are not found within ``SHARE_SOUGHT``."""
    columns = tall.shape[1]
    block = _random(columns, rank + EXTRA_VECTORS)
    basis = images = np.empty((columns, 0))
    while basis.shape[1] + block.shape[1] <= columns * SHARE_SOUGHT:
        for _ in range(2):  # once leaves what rounding brought back
            block = block - basis @ (basis.T @ block)
            block = np.linalg.qr(block)[0]
        image = sum((rows.T @ (rows @ block) for rows in _doubles(tall)), np.zeros_like(block))
        basis = np.concatenate([basis, block], axis=1)
        images = np.concatenate([images, image], axis=1)
        squares, inner = _eigenvectors(basis.T @ images, rank)
        vectors: Doubles = basis @ inner
        values = np.sqrt(np.maximum(squares, 0))
        residuals = np.linalg.norm(images @ inner - vectors * squares, axis=0)
        if (residuals <= RESIDUAL * values[0] * np.maximum(values, LEAST * values[0])).all():
            return vectors
        block = image
    return None


def _eigenvectors(square: Doubles, rank: int) -> tuple[Doubles, Doubles]:
    """The ``rank`` largest eigenvalues, falling, and their vectors as columns."""
    found = np.linalg.eigh(square)
    values = np.asarray(found.eigenvalues, dtype=np.float64)
    vectors = np.asarray(found.eigenvectors, dtype=np.float64)
    return values[: -rank - 1 : -1], vectors[:, : -rank - 1 : -1]


def _doubles(tall: Array) -> Iterator[Doubles]:
    """``tall`` in float64, a chunk of its rows at a time."""
    step = rows_within(COLUMN_CHUNK_BYTES, tall.shape[1])
    for start in range(0, tall.shape[0], step):
        yield tall[start : start + step].astype(np.float64, order="C")


def _random(rows: int, columns: int) -> Doubles:
    """Numbers from -1 to 1, always the same."""
    raw = np.random.Philox(key=0).random_raw(rows * columns)
    numbers: Doubles = (raw >> np.uint64(11)).astype(np.float64)
    numbers *= 2.0**-52
    numbers -= 1
    return numbers.reshape(rows, columns)
