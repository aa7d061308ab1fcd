"""What an adapter does to one weight, by rows: the common ground of all kinds of adapter."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from edgellm.architectures.family import Kind
from edgellm.tensors import Array, TensorRef


@dataclass(frozen=True, slots=True)
class Target:
    """The weight that is changed. ``name`` is the Hugging Face name, ``shape`` ``[out, in]``.

    ``transposed``: the checkpoint stores it ``[in, out]`` (Conv1D), which ``fan_in_fan_out`` means.
    ``kind`` is ``embedding`` for a table of token rows, whose adapters are stored turned round.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False


class Edit(Protocol):
    """One adapter's change of one weight. Rows are of the canonical ``[out, in]`` weight."""

    @property
    def rank(self) -> int:
        """The rank of the change; 0 where it has none to speak of."""

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        """Rows ``start:stop`` as they are after the change, ``weight`` times as strong.

        ``rows`` is float32 ``[stop - start, in]`` and may be changed in place.
        """


class Delta(Edit, Protocol):
    """A change that is added, whatever the weight holds: several can be summed."""

    def delta(self, start: int, stop: int) -> Array:
        """What is added to rows ``start:stop`` at weight 1, float32, C-contiguous."""


@dataclass(frozen=True)
class LowRank:
    """``scale * B @ A``: the change of LoRA. ``a`` is ``[rank, in]``, ``b`` ``[out, rank]``."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @cached_property
    def a_values(self) -> Array:
        """``A`` whole, float32 ``[rank, in]``; small, and read once."""
        return self.a.load()

    def delta(self, start: int, stop: int) -> Array:
        product: Array = self.b.load(start, stop) @ self.a_values
        product *= self.scale
        return product

    def apply(self, rows: Array, start: int, stop: int, weight: float) -> Array:
        change = self.delta(start, stop)
        if weight != 1.0:
            change *= weight
        rows += change
        return rows
