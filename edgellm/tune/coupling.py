"""How rows of the tensors that are rounded are coupled, for the solver: ``quant.coupled``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgellm.calibration.folding import Folding
from edgellm.export.layout import Layout, OutputTensor
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.quant.coupled import couples
from edgellm.source.model import ModelSource
from edgellm.tensors import Array
from edgellm.tune.gradients import output_hessians
from edgellm.tune.planning import Tuning
from edgellm.tune.stored import StoredModel, parts_of
from edgellm.tune.threads import torch_threads


class RowCoupling:
    """The Hessians of outputs by role, in the order and the scale of rows that a container stores.

    ``folding``: what a transform divides rows by, so that an error there counts for as much more.
    """

    def __init__(
        self, hessians: Mapping[str, Array], stored: StoredModel, folding: Folding | None = None
    ) -> None:
        self._hessians, self._stored, self._folding = hessians, stored, folding

    def of(self, tensor: OutputTensor, start: int, stop: int) -> Array | None:
        """That of rows ``start:stop`` of ``tensor``; None where they are to be solved apart.

        Rows of different weights that are stored as one tensor are not coupled. Where a transform
        scales ``tensor``, its factors must have been found.
        """
        parts = list(parts_of(tensor))
        if not couples(tensor.grid) or not all(role in self._hessians for role, _ in parts):
            return None
        found = np.zeros((stop - start, stop - start), np.float32)
        for role, rows in parts:
            stored = np.arange(tensor.rows)[rows]
            inside = (stored >= start) & (stored < stop)
            places = self._stored.places(role)
            order = np.arange(len(stored)) if places is None else np.argsort(places)
            here, there = stored[inside] - start, order[inside]
            hessian = self._hessians[role][np.ix_(there, there)]
            divisors = self._folding.row_divisors(role, len(stored)) if self._folding else None
            if divisors is not None:
                hessian *= np.outer(divisors[there], divisors[there])
            found[np.ix_(here, here)] = hessian
        return found


def row_coupling(
    layout: Layout,
    source: ModelSource,
    folder: Path,
    tuning: Tuning,
    threads: int,
    progress: Progress = unwatched,
    folding: Folding | None = None,
) -> RowCoupling:
    """By gradients of ``source`` on the first of the text that ``tuning`` trains on.

    ``folder`` is where ``layout`` is written, with ``source`` as ``folding`` scales it.
    """
    windows = tuning.gradient_windows()

    def watch(done: int) -> None:
        progress(ProgressEvent("gradients", "of the source", 0, 0, done, len(windows)))

    with torch_threads(threads):
        hessians = output_hessians(source, windows, tuning.settings.seed, watch)
    return RowCoupling(hessians, StoredModel(layout, source, folder), folding)
