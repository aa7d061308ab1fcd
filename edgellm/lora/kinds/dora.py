"""DoRA: the direction of ``W + scale * B @ A``, its lengths learnt apart.

Liu et al. 2024, https://arxiv.org/abs/2402.09353, section 4.1: ``m * (W + BA) / |W + BA|``. PEFT
takes the lengths over the inputs of a linear layer, which are rows of ``[out, in]``, and over the
tokens of an embedding, which are its columns (``DoraLinearLayer.get_weight_norm`` and
``DoraEmbeddingVariant.merge_unsafe``, peft 0.21.2).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock

import numpy as np
import numpy.typing as npt

from edgellm.errors import AdapterError
from edgellm.lora.edit import LowRank
from edgellm.lora.factors import TILE_ROWS, kept
from edgellm.tensors import SLAB_BYTES, Array, TensorRef, rows_within

Lengths = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DoraRows:
    """DoRA of a linear layer: ``magnitude`` holds the length of each row."""

    low_rank: LowRank
    magnitude: TensorRef
    name: str

    @property
    def rank(self) -> int:
        return self.low_rank.rank

    @property
    def scale(self) -> float:
        return self.low_rank.scale

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        changed = rows + self.low_rank.delta(start, stop)
        magnitude = kept.get(self, lambda: _flat(self.magnitude))[start:stop]
        factors = _factors(magnitude, _row_lengths(changed), f"{self.name}: row", start)
        changed *= factors[:, None]
        return _between(rows, changed, weight)


@dataclass(frozen=True)
class DoraColumns:
    """DoRA of an embedding: ``magnitude`` holds the length of each column.

    The lengths need all tokens, so ``base``, the whole weight, is read once in slabs before the
    first row comes out; what stays in memory is a value for each column. Threads that ask
    meanwhile wait for it.
    """

    low_rank: LowRank
    magnitude: TensorRef
    name: str
    base: TensorRef | None
    _reading: Lock = field(init=False, repr=False, compare=False, default_factory=Lock)

    @property
    def rank(self) -> int:
        return self.low_rank.rank

    @property
    def scale(self) -> float:
        return self.low_rank.scale

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        changed = rows + self.low_rank.delta(start, stop)
        with self._reading:
            factors = self._column_factors
        changed *= factors
        return _between(rows, changed, weight)

    @cached_property
    def _column_factors(self) -> Array:
        if self.base is None:
            raise ValueError(f"DoRA on {self.name} needs the weight itself: give Target its base")
        squares = np.zeros(self.base.columns)
        step = rows_within(SLAB_BYTES, self.base.columns)
        for start in range(0, self.base.rows, step):
            stop = min(start + step, self.base.rows)
            rows = self.base.load(start, stop)
            rows += self.low_rank.delta(start, stop)
            squares += np.einsum("ij,ij->j", rows, rows, dtype=np.float64)
        return _factors(_flat(self.magnitude), np.sqrt(squares), f"{self.name}: column", 0)


def _flat(magnitude: TensorRef) -> Array:
    """All lengths as one vector; old versions of PEFT stored ``[1, n]``."""
    return magnitude.load().reshape(-1)


def _row_lengths(rows: Array) -> Lengths:
    """The length of each row, added up in float64 and in the same order wherever the row lies."""
    tiles = range(0, len(rows), TILE_ROWS)
    squares = [np.square(rows[i : i + TILE_ROWS], dtype=np.float64).sum(axis=1) for i in tiles]
    return np.sqrt(np.concatenate(squares)) if squares else np.zeros(0)


def _factors(magnitude: Array, lengths: Lengths, where: str, first: int) -> Array:
    """What each direction is multiplied by, float32.

    A direction of length zero has none: it stays zero where zero is also its magnitude (the
    padding of a vocabulary), and anything else raises ``AdapterError``; PEFT divides by zero there.
    """
    empty = lengths == 0.0
    lost = empty & (magnitude != 0.0)
    if lost.any():
        index = int(lost.argmax())
        raise AdapterError(
            f"{where} {first + index} is all zeros with the adapter's product added, so it has no "
            f"direction to give the length {magnitude[index]:g} to: the adapter was trained on "
            "another model, or is damaged; name its own base"
        )
    factors: Array = (magnitude / np.where(empty, 1.0, lengths)).astype(np.float32)
    return factors


def _between(before: Array, after: Array, weight: float) -> Array:
    """``before`` at weight 0, ``after`` at weight 1, and on the line through both otherwise."""
    if weight == 1.0:
        return after
    after -= before
    after *= weight
    before += after
    return before
