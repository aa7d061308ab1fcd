"""A source whose weights are cut along their inputs, once it is known which channels stand out.

As ``Folding`` scales tensors when they are loaded, ``Splitting`` cuts them: a weight loses the
columns that a row of ``quant.SPLITS`` chose, which stand in a tensor of their own beside it, with
the list of their channels in another. Both are named after the weight (``floats_role``,
``channels_role``), and a container that multiplies them apart lays all three out. None may be
loaded before the layer was reached.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from edgellm.calibration.blocks import LAYER_ROLE
from edgellm.calibration.folding import Folding
from edgellm.errors import UnsupportedTarget
from edgellm.export.layout import Layout
from edgellm.quant.grid import Grid
from edgellm.quant.llm_int8 import (
    Channels,
    channels_role,
    floats_role,
    room,
    without,
)
from edgellm.quant.statistics import Statistics
from edgellm.source.model import ModelSource
from edgellm.tensors import COLUMN_CHUNK_BYTES, Array, TensorRef, rows_within

OTHER_WAYS = {
    "hf": "bitsandbytes looks for outliers when it runs (--quant int8-dynamic --layout "
    "bitsandbytes), or ",
}
"""What a container without room for such columns has instead."""


@dataclass(frozen=True)
class Cut:
    """The ``channels`` of an input that stand out, and how large all and the others get."""

    channels: Channels
    largest: float
    largest_left: float


@dataclass
class Splitting:
    """The cuts of the weights called ``roles``, found layer by layer after any ``folding``.

    Called as a ``Folding`` is, whose factors come first.
    """

    choose: Callable[[Statistics], Channels]
    roles: tuple[str, ...]
    layers: int
    folding: Folding | None = None
    cuts: dict[str, Cut] = field(default_factory=dict)

    def fill_layer(
        self,
        index: int,
        statistics: Mapping[str, Statistics],
        grids: Mapping[str, Grid],
        threads: int = 1,
    ) -> dict[str, Statistics]:
        """Find the cuts of unit ``index``; returns ``statistics`` of what is left of the inputs.

        Weights that share an input share its cut.
        """
        found = dict(statistics)
        if self.folding is not None:
            found = self.folding.fill_layer(index, statistics, grids, threads)
        made: dict[int, tuple[Cut, Statistics]] = {}
        for role in self._of(index):
            given = found[role]
            if id(given) not in made:
                channels = self.choose(given)
                rest = without(given, channels)
                cut = Cut(channels, float(given.largest.max()), float(rest.largest.max()))
                made[id(given)] = cut, rest
            self.cuts[role], found[role] = made[id(given)]
        return found

    def factors(self, index: int) -> dict[str, Array]:
        """What unit ``index`` found, to be recorded for ``restore``."""
        kept = self.folding.factors(index) if self.folding is not None else {}
        for role in self._of(index):
            cut = self.cuts[role]
            kept[channels_role(role)] = np.asarray(
                [cut.largest, cut.largest_left, *cut.channels], np.float32
            )
        return kept

    def restore(self, index: int, factors: Mapping[str, Array]) -> None:
        """Fill unit ``index`` with what was found before."""
        if self.folding is not None:
            self.folding.restore(index, factors)
        for role in self._of(index):
            largest, left, *channels = factors[channels_role(role)].tolist()
            self.cuts[role] = Cut(np.asarray(channels, np.intp), largest, left)

    def check_laid_out(self, layout: Layout) -> None:
        """Raise ``UnsupportedTarget`` where ``layout`` has no place for columns of their own."""
        placed = {part.role for tensor in layout.tensors for part in tensor.parts}
        if not placed.issuperset(map(floats_role, self.roles)):
            other = OTHER_WAYS.get(layout.container, "")
            raise UnsupportedTarget(
                f"llm_int8: {layout.container} cannot hold columns that are multiplied apart from "
                f"the rest: {other}choose --format onnx"
            )

    def figures(self) -> dict[str, Any]:
        """Of each weight the channels that are multiplied apart, and what that takes off."""
        return {
            role: {
                "channels": cut.channels.tolist(),
                "largest": cut.largest,
                "largest_left": cut.largest_left,
            }
            for role, cut in self.cuts.items()
        }

    def _of(self, index: int) -> list[str]:
        return [role for role in self.roles if self._unit(role) == index]

    def _unit(self, role: str) -> int:
        layer = LAYER_ROLE.match(role)
        return int(layer[1]) if layer else self.layers

    # --- tensors ---------------------------------------------------------------------------------

    def _channels(self, role: str) -> Channels:
        if role not in self.cuts:
            raise AssertionError(
                f"{role} was loaded before it was cut: call fill_layer({self._unit(role)}, ...) "
                "first"
            )
        return self.cuts[role].channels

    def cut(self, role: str, ref: TensorRef) -> dict[str, TensorRef]:
        """The three tensors that weight ``role`` becomes, by role."""

        def load_rest(start: int, stop: int) -> Array:
            rows = ref.load_rows(start, stop)
            rows[:, self._channels(role)] = 0
            return rows

        def load_floats(start: int, stop: int) -> Array:
            return _columns(ref, start, stop, self._channels(role))

        def load_channels(start: int, stop: int) -> Array:
            return self._channels(role).astype(np.float32)[np.newaxis][start:stop]

        count = room(ref.columns)
        shape = (ref.rows, count)
        floats = TensorRef(
            f"{ref.name}, outliers", floats_role(role), shape, "f32", 4 * ref.rows * count,
            load_floats,
        )  # fmt: skip
        channels = TensorRef(
            f"{ref.name}, channels", channels_role(role), (count,), "f32", 4 * count, load_channels
        )
        rest = replace(ref, load_rows=load_rest, column_loader=None)
        return {each.role: each for each in (rest, floats, channels)}


def _columns(ref: TensorRef, start: int, stop: int, channels: Channels) -> Array:
    """Of rows ``start:stop`` what stands in ``channels``, read a few rows at a time."""
    found = np.empty((stop - start, len(channels)), np.float32)
    step = rows_within(COLUMN_CHUNK_BYTES, ref.columns)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        found[first - start : last - start] = ref.load_rows(first, last)[:, channels]
    return found


def split_source(
    source: ModelSource,
    choose: Callable[[Statistics], Channels],
    grids: Mapping[str, Grid],
    folding: Folding | None = None,
) -> tuple[ModelSource, Splitting]:
    """``source`` with the weights whose products round activations cut, once channels are known.

    ``grids`` are those of the linear layers and the head, by role; ``folding``: what scales
    ``source``.
    """
    roles = tuple(role for role, grid in grids.items() if grid.kind == "per_channel")
    splitting = Splitting(choose, roles, len(source.decoder.layers), folding)
    tensors = dict(source.tensors)
    for role in roles:
        tensors |= splitting.cut(role, tensors[role])
    return replace(source, tensors=tensors), splitting
