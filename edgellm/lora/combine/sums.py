"""``cat``: the exact weighted sum of changes, whatever they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.lora.edit import Additive, Delta, Edit, LowRank
from edgellm.tensors import Array, LoadRows, TensorRef, derived, stacked_rows


@dataclass(frozen=True, slots=True)
class Weighted:
    """An edit at a weight of its own."""

    edit: Edit
    weight: float

    @property
    def rank(self) -> int:
        return self.edit.rank

    @property
    def scale(self) -> float:
        return self.edit.scale

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        return self.edit.apply(rows, start, stop, weight * self.weight)


@dataclass(frozen=True, slots=True)
class Sum(Additive):
    """Changes that are added, each at its weight."""

    changes: Sequence[Delta]
    weights: Sequence[float]

    @property
    def rank(self) -> int:
        """At most the sum of the ranks; 0 where one of them has none to speak of."""
        ranks = [change.rank for change in self.changes]
        return sum(ranks) if all(ranks) else 0

    @property
    def scale(self) -> float:
        return 1.0  # the changes hold theirs

    def delta(self, start: int, stop: int) -> Array:
        total = self.changes[0].delta(start, stop)
        total *= np.float32(self.weights[0])
        for change, weight in zip(self.changes[1:], self.weights[1:], strict=True):
            rows = change.delta(start, stop)
            rows *= np.float32(weight)
            total += rows
        return total


def concatenated(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The sum of ``parts`` as one: their ``a`` one below the other, their ``b`` side by side.

    The weights and scales go into ``a``, as PEFT's ``cat`` does.
    """
    factors = [np.float32(weight * part.scale) for part, weight in zip(parts, weights, strict=True)]
    above = [_times(part.a, factor) for part, factor in zip(parts, factors, strict=True)]
    beside = [part.b for part in parts]
    rank = sum(part.rank for part in parts)

    def load_a(start: int, stop: int) -> Array:
        return stacked_rows(above, start, stop)

    def load_b(start: int, stop: int) -> Array:
        return side_by_side(beside, start, stop)

    return LowRank(
        computed("cat lora_A", (rank, parts[0].a.shape[1]), load_a),
        computed("cat lora_B", (parts[0].b.shape[0], rank), load_b),
        1.0,
    )


def side_by_side(refs: Sequence[TensorRef], start: int, stop: int) -> Array:
    """Rows ``start:stop`` of ``refs`` beside each other, ``[stop - start, sum of columns]``."""
    return np.concatenate([ref.load(start, stop) for ref in refs], axis=1)


def computed(name: str, shape: tuple[int, ...], load_rows: LoadRows) -> TensorRef:
    """A tensor that ``load_rows`` computes; it has no role in the network."""
    return TensorRef(name, "", shape, "f32", 4 * int(np.prod(shape)), load_rows)


def _times(ref: TensorRef, factor: np.float32) -> TensorRef:
    return derived(ref, lambda rows: rows * factor)
