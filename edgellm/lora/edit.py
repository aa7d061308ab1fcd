"""What an adapter does to one weight, by rows: the common ground of all kinds of adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from edgellm.architectures.family import Kind
from edgellm.lora.factors import kept, row_product
from edgellm.tensors import Array, TensorRef


@dataclass(frozen=True, slots=True)
class Target:
    """The weight that is changed. ``name`` is the Hugging Face name, ``shape`` ``[out, in]``.

    ``transposed``: the checkpoint stores it ``[in, out]`` (Conv1D), which ``fan_in_fan_out`` means.
    ``kind`` is ``embedding`` for a table of token rows, whose adapters are stored turned round, and
    ``bias`` for a vector. ``base`` is the weight itself, canonical, for the changes that depend on
    more of it than the row at hand (DoRA on an embedding); None where only shapes are known.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False
    base: TensorRef | None = None


class Edit(Protocol):
    """One adapter's change of one weight. Rows are of the canonical ``[out, in]`` weight."""

    @property
    def rank(self) -> int:
        """The rank of the change; 0 where it has none to speak of."""

    @property
    def scale(self) -> float:
        """What the adapter's product is multiplied by (alpha / r); 1 where the kind has none."""

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        """Rows ``start:stop`` as they are after the change, ``weight`` times as strong.

        ``rows`` is float32 ``[stop - start, in]``, of the weight as the base holds it, and may be
        changed in place. At weight 0 they stay as they are.
        """


class Delta(Edit, Protocol):
    """A change that is added, whatever the weight holds: several can be summed."""

    def delta(self, start: int, stop: int) -> Array:
        """What is added to rows ``start:stop`` at weight 1, float32, C-contiguous."""


class Additive:
    """The common ground of all ``Delta``: what is added, times the weight."""

    def delta(self, start: int, stop: int) -> Array:
        """What is added to rows ``start:stop`` at weight 1; the caller may change it in place."""
        raise NotImplementedError

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        """Rows ``start:stop`` with ``weight`` times the change added, in place."""
        change = self.delta(start, stop)
        if weight != 1.0:
            change *= np.float32(weight)
        rows += change
        return rows


@dataclass(frozen=True)
class LowRank(Additive):
    """``scale * B @ A``: the change of LoRA. ``a`` is ``[rank, in]``, ``b`` ``[out, rank]``."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def a_values(self) -> Array:
        """``A`` whole, float32 ``[rank, in]``; kept while it is in use, so do not change it."""
        return kept.get(self, self.a.load)

    def delta(self, start: int, stop: int) -> Array:
        product = row_product(self.b.load(start, stop), self.a_values, start)
        product *= self.scale
        return product
