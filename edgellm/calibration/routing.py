"""Statistics of what each expert of a mixture is given: of the tokens alone that are sent to it.

Experts that too few tokens reached have no statistics worth the name. Their gate and up are then
rounded by the inputs of the whole layer, for those are vectors of one stream, and their down, whose
inputs are the expert's own, counts all channels alike, as llama.cpp does where its importance
matrix knows nothing of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgellm.calibration.sums import InputSums
from edgellm.export.experts_graph import Routed
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array

Integers = npt.NDArray[np.int64]

FEW_TOKENS = 32
"""Below so many, what was seen of an expert's inputs is not taken for what they are like."""

OF_ALL = "by the inputs of the whole layer"
ALIKE = "with all channels of the input counted alike"
"""How an expert that few tokens reached is rounded (``Statistics.instead``)."""


class RoutedSums:
    """Sums of the inputs of each expert's products, cut out of a layer's sorted assignments."""

    def __init__(
        self, routed: Routed, widths: Mapping[str, int], sums: Callable[[int], InputSums]
    ) -> None:
        """``widths``: columns of ``routed.inputs``; ``sums`` makes an empty one of some columns."""
        self.routed = routed
        self.widths = dict(widths)
        count = routed.experts.count
        self.sums = {x: [sums(width) for _ in range(count)] for x, width in widths.items()}

    def outputs(self, tokens: int) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays for what the graph is to give of ``tokens`` tokens, by its name there."""
        rows = tokens * self.routed.experts.used
        found: dict[str, npt.NDArray[np.generic]] = {
            x: np.empty((rows, width), np.float32) for x, width in self.widths.items()
        }
        found[self.routed.order] = np.empty(rows, np.int64)
        found[self.routed.counts] = np.empty(self.routed.experts.count, np.int64)
        return found

    def add(
        self,
        number: int,
        windows: Sequence[Mapping[str, npt.NDArray[np.generic]]],
        weights: Sequence[Array | None],
    ) -> None:
        """Count piece ``number``: what the graph gave of each window, whose tokens count so."""
        for x, sums in self.sums.items():
            for expert, total in enumerate(sums):
                pieces = [self._of(each, x, expert) for each in windows]
                counted = [
                    each[self._tokens(values, expert)]
                    for values, each in zip(windows, weights, strict=True)
                    if each is not None
                ]
                rows = np.concatenate(pieces)
                total.add(number, rows, np.concatenate(counted) if counted else None)

    def stop(self) -> None:
        """Let nobody wait any more."""
        for sums in self.sums.values():
            for total in sums:
                total.stop()

    def results(self, whole: Statistics) -> Iterator[tuple[Statistics, tuple[str, ...]]]:
        """Statistics of every expert's inputs, and the weights that are multiplied by them.

        ``whole``: those of all that the layer's experts were given.
        """
        for x, roles in self.routed.inputs.items():
            sums = self.sums[x]
            few = [total.tokens < FEW_TOKENS for total in sums]
            shared = whole if len(roles[0]) > 1 else None
            instead = self._instead(sums[0], shared) if any(few) else whole
            for total, names, is_few in zip(sums, roles, few, strict=True):
                # One object for all of them: what is made of it is made once.
                yield instead if is_few else total.result(), names

    def _instead(self, sums: InputSums, whole: Statistics | None) -> Statistics:
        """What stands in for an expert's own; ``whole`` where all are given parts of one input."""
        if whole is not None:
            return replace(whole, instead=OF_ALL)
        ones = np.ones(sums.columns, np.float32)
        hessian = ones if sums.diagonal_only else np.diag(ones)
        return Statistics(hessian, ones.copy(), 0, instead=ALIKE)

    def _bounds(
        self, values: Mapping[str, npt.NDArray[np.generic]], expert: int
    ) -> tuple[int, int]:
        counts = values[self.routed.counts]
        return int(counts[:expert].sum()), int(counts[: expert + 1].sum())

    def _of(self, values: Mapping[str, npt.NDArray[np.generic]], x: str, expert: int) -> Array:
        first, last = self._bounds(values, expert)
        found: Array = values[x][first:last].astype(np.float32, copy=False)
        return found

    def _tokens(self, values: Mapping[str, npt.NDArray[np.generic]], expert: int) -> Integers:
        first, last = self._bounds(values, expert)
        order = values[self.routed.order][first:last].astype(np.int64, copy=False)
        found: Integers = order // self.routed.experts.used
        return found
