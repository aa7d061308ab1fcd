"""Orders in which checkpoints store rows that the network takes in another.

What is stored is put into the network's own order where it is read (``as_network_takes``), and
back where it is written as a checkpoint, or where an adapter of the checkpoint's modules meets it
(``as_checkpoint_has``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgellm.tensors import TensorRef, derived, reordered

if TYPE_CHECKING:
    from edgellm.architectures.family import TensorRow

Order = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class FusedHeads:
    """Queries, keys and values head by head, where the network has all queries, keys, values.

    For each of ``kv_heads``: the ``group`` queries that share it, the key, the value, of
    ``head_dim`` rows each.
    """

    kv_heads: int
    group: int
    head_dim: int

    def places(self) -> Order:
        """For each row of the network's tensor, its place in the checkpoint's."""
        heads = self.kv_heads * (self.group + 2)
        rows = np.arange(heads * self.head_dim).reshape(self.kv_heads, -1, self.head_dim)
        parts = (rows[:, : self.group], rows[:, self.group], rows[:, self.group + 1])
        return np.concatenate([part.reshape(-1) for part in parts])


@dataclass(frozen=True, slots=True)
class PairedRope:
    """``dimensions`` rows of each head in pairs (x0, y0, ..), in the network in halves.

    Rotary positions turn a pair; the network has its two values half a rope apart. ``first``: where
    in a head those rows begin. ``columns``: not rows are in pairs but the values of every row, as
    in norms that have a row for each head.
    """

    heads: int
    head_dim: int
    dimensions: int
    first: int = 0
    columns: bool = False

    def places(self) -> Order:
        """For each row of the network's tensor, its place in the checkpoint's."""
        head = np.arange(self.head_dim)
        end = self.first + self.dimensions
        turned = head[self.first : end].reshape(-1, 2).T.reshape(-1)
        head = np.concatenate([head[: self.first], turned, head[end:]])
        return (np.arange(self.heads)[:, np.newaxis] * self.head_dim + head).reshape(-1)


RowOrder = FusedHeads | PairedRope


def as_network_takes(ref: TensorRef, row: TensorRow) -> TensorRef:
    """The checkpoint's tensor ``ref`` with its rows, or values, in the order of the network."""
    return ref if row.order is None else _in_order(ref, row.order, row.order.places())


def as_checkpoint_has(ref: TensorRef, row: TensorRow) -> TensorRef:
    """The network's tensor ``ref`` with its rows, or values, in the order of the checkpoint."""
    return ref if row.order is None else _in_order(ref, row.order, np.argsort(row.order.places()))


def sorts_columns(order: RowOrder | None) -> bool:
    """Whether ``order`` is that of the values of each row."""
    return isinstance(order, PairedRope) and order.columns


def _in_order(ref: TensorRef, order: RowOrder, places: Order) -> TensorRef:
    if sorts_columns(order):
        return derived(ref, lambda rows: rows[:, places])
    return reordered(ref, places)
