"""What a transform is given and gives back: factors for the input channels of coupled weights.

``search(weights, statistics, coupling, corrected=...) -> Scaling`` is the shape of every row of
``TRANSFORMS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from edgellm.architectures.couplings import Coupling
from edgellm.quant.grid import Grid
from edgellm.quant.statistics import Statistics
from edgellm.tensors import Array, TensorRef


class Weight(NamedTuple):
    """A consumer of a coupling as the source has it, and the grid that it will be rounded to."""

    ref: TensorRef
    grid: Grid


@dataclass(frozen=True)
class Scaling:
    """``factors`` float32 ``[channels]``, positive and finite: columns times them, inputs divided.

    ``strength`` says how far along its one parameter (``alpha``) the transform went; 0 where the
    weights are better left alone. ``error`` is what the transform minimized, with the factors,
    relative to without: 1 where they are ones. ``reason``: why there was nothing to search for.
    """

    factors: Array
    strength: float = 0.0
    error: float = 1.0
    reason: str = ""


class Search(Protocol):
    """Chooses factors for one coupling; the same ones for any number of threads.

    ``corrected``: the solver makes the error of each column good by later ones (gptq).
    """

    def __call__(
        self,
        weights: Sequence[Weight],
        statistics: Statistics,
        coupling: Coupling,
        *,
        corrected: bool = False,
    ) -> Scaling: ...


def unscaled(coupling: Coupling, reason: str = "") -> Scaling:
    """Factors of one, and why."""
    return Scaling(np.ones(coupling.channels, np.float32), reason=reason)


SAMPLED_ROWS = 1024
"""Rows of a weight that a search looks at; runs of ``RUN_ROWS`` spread over all of them."""

RUN_ROWS = 32


def sampled_rows(ref: TensorRef) -> Array:
    """All rows of a small weight, else some spread evenly, float32 ``[rows, columns]``."""
    if ref.rows <= SAMPLED_ROWS:
        return ref.load()
    runs = SAMPLED_ROWS // RUN_ROWS
    starts = np.linspace(0, ref.rows - RUN_ROWS, runs).round().astype(int)
    return np.concatenate([ref.load(start, start + RUN_ROWS) for start in starts.tolist()])
