"""The KL that each tensor on each grid is expected to cost, from one pass over a calibration text.

Of a tensor on a grid the relative error of its output is computed from the statistics of its input,
``trace(e H e^T) / trace(w H w^T)`` for weights ``w`` and their error ``e``, on a sample of rows. It
is turned into KL by the tensor's factor, which a probe measures (``probes.Probes``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.budget.probes import Probes
from edgellm.budget.units import Unit
from edgellm.calibration.blocks import EMBEDDING, HEAD
from edgellm.calibration.passes import CalibrationPass
from edgellm.parallel import in_parallel, one_blas_thread
from edgellm.progress import Progress, ProgressEvent
from edgellm.quant import imatrix, rtn
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.quant.statistics import Statistics
from edgellm.slabs import values_of
from edgellm.source.model import ModelSource
from edgellm.tensors import Array, TensorRef, stacked_rows

SAMPLE_ROWS = 256
"""Rows of a tensor that are rounded to every candidate: errors of a row differ little."""

PROBE_TOKENS = 128
PROBE_WINDOWS = 2

PROBE_WORK = 6e12
"""Operations of all probes at the most (a minute or two on two cores): of a larger model every
second, third, ... layer is probed, and factors between are interpolated."""

PROBE_BITS = 4.0
"""Probes round to the candidate of about so many bits: an error well above float32's noise and
still small."""

Costs = dict[str, dict[str, float]]
"""Expected KL in nats a token, by name of the unit and of the grid."""


@dataclass(frozen=True)
class Measured:
    """``costs``, and how they came about: ``factors`` are KL by relative error of the output."""

    costs: Costs
    factors: dict[str, float]
    probed_layers: tuple[int, ...]


def measure(
    source: ModelSource,
    units: Sequence[Unit],
    windows: Sequence[Sequence[int]],
    threads: int,
    progress: Progress,
) -> Measured:
    """What every one of ``units`` costs on every one of its grids.

    Raises what ``CalibrationPass`` does.
    """
    layers = len(source.decoder.layers)
    probed = probed_layers(source, units)
    short = [window[:PROBE_TOKENS] for window in windows[:PROBE_WINDOWS]]
    with one_blas_thread():
        run = CalibrationPass(source, windows, threads=threads)
        run.begin()
        probes = Probes(source, short, threads)
        errors: Costs = {unit.name: {} for unit in units}
        moved: dict[str, float] = {}
        tables = Tables(source, [unit for unit in units if unit.layer is None])
        tables.move(probes, moved)
        for index in range(layers):
            found = run.layer(index)
            here = [unit for unit in units if unit.layer == index]
            changes = {}
            for unit in here:
                if index in probed:
                    changes[unit.name], moved[unit.name] = _rounded(source, unit, found)
            probes.layer(index, changes)
            _add_errors(source, here, found, errors, threads)
            progress(ProgressEvent("calibrate", f"layer {index}", 0, 0, index + 1, layers + 1))
        given = tables.divide(probes, moved, run.head(), errors)
        progress(ProgressEvent("calibrate", "head", 0, 0, layers + 1, layers + 1))
    factors = {
        name: max(kl, 0.0) / moved[name] if moved[name] > 0 else 0.0 for name, kl in given.items()
    }
    for unit in units:
        if unit.layer is not None and unit.name not in factors:
            factors[unit.name] = _between(unit, units, factors)
    costs = {
        unit.name: {grid: factors[unit.name] * error for grid, error in errors[unit.name].items()}
        for unit in units
        if unit.layer is not None
    }
    return Measured({**costs, **tables.costs(factors, errors)}, factors, probed)


def relative_error(rows: Array, rounded: Array, hessian: Array | None) -> float:
    """``trace(e H e^T) / trace(w H w^T)``; H is the identity where it is None."""

    def power(values: Array) -> float:
        through = values if hessian is None else values @ hessian
        return float(np.vdot(values.astype(np.float64), through))

    whole = power(rows)
    return max(power(rows - rounded), 0.0) / whole if whole > 0 else 0.0


def on_grid(rows: Array, grid: Grid, found: Statistics | None) -> Array:
    """What ``rows`` become on ``grid``, by the solver that weighs columns where it can."""
    if grid.name == "f16":
        return rows.astype(np.float16).astype(np.float32)
    if found is None:
        return values_of(rtn.solve(rows, grid))
    return values_of(imatrix.solve(rows, grid, found))


def probe_grid(unit: Unit) -> Grid:
    """The candidate of ``unit`` that is nearest to ``PROBE_BITS`` and needs no importance."""
    plain = [GRIDS[name] for name in unit.sizes if name not in (*VECTOR_CODEBOOKS, "f16")]
    return min(plain, key=lambda grid: abs(grid.bits - PROBE_BITS))


def probed_layers(source: ModelSource, units: Sequence[Unit]) -> tuple[int, ...]:
    """Every layer, or as many at equal distances, first and last included, as the work allows."""
    layers = len(source.decoder.layers)
    weights = sum(
        ref.size for role, ref in source.tensors.items() if role.startswith("blk.")
    ) / max(layers, 1)
    each = max(1, len([unit for unit in units if unit.layer is not None]) // max(layers, 1))
    operations = 2.0 * weights * PROBE_TOKENS * PROBE_WINDOWS * each
    for count in range(layers, 1, -1):
        places = sorted({round(place) for place in np.linspace(0, layers - 1, count)})
        if operations * sum(layers - place for place in places) <= PROBE_WORK:
            return tuple(places)
    return tuple(sorted({0, layers - 1}))


def _refs(source: ModelSource, unit: Unit) -> list[TensorRef]:
    return [source.tensors[role] for role in unit.roles]


def _rounded(
    source: ModelSource, unit: Unit, found: Mapping[str, Statistics]
) -> tuple[dict[str, Array], float]:
    """The weights of ``unit`` on its probe's grid, by role, and its output's relative error."""
    grid = probe_grid(unit)
    rows, changed = [], {}
    for ref in _refs(source, unit):
        rows.append(ref.load(0, ref.rows))
        changed[ref.role] = values_of(rtn.solve(rows[-1], grid))
    hessian = found[unit.roles[0]].hessian
    error = relative_error(np.concatenate(rows), np.concatenate([*changed.values()]), hessian)
    return changed, error


def sample(parts: Sequence[TensorRef]) -> Array:
    """``SAMPLE_ROWS`` rows of the stacked ``parts`` at equal distances, or all."""
    total = sum(part.rows for part in parts)
    if total <= SAMPLE_ROWS:
        return stacked_rows(parts, 0, total)
    runs = 16  # a few rows at a time: single ones are slow to read
    length = SAMPLE_ROWS // runs
    starts = np.linspace(0, total - length, runs).astype(int).tolist()
    return np.concatenate([stacked_rows(parts, start, start + length) for start in starts])


def _add_errors(
    source: ModelSource,
    units: Sequence[Unit],
    found: Mapping[str, Statistics],
    errors: Costs,
    threads: int,
) -> None:
    samples = {unit.name: sample(_refs(source, unit)) for unit in units}

    def work(each: tuple[Unit, str]) -> tuple[str, str, float]:
        unit, name = each
        rows, known = samples[unit.name], found[unit.roles[0]]
        error = relative_error(rows, on_grid(rows, GRIDS[name], known), known.hessian)
        return unit.name, name, error

    pairs = [(unit, name) for unit in units for name in unit.sizes]
    for unit_name, grid, error in in_parallel(work, pairs, threads):
        errors[unit_name][grid] = error


def _between(unit: Unit, units: Sequence[Unit], factors: Mapping[str, float]) -> float:
    """The factor of a layer that was not probed, between the logarithms of its neighbours'."""
    stem = unit.roles[0].split(".", 2)[2]
    known = [
        (other.layer, factors[other.name])
        for other in units
        if other.layer is not None
        and other.name in factors
        and other.roles[0].split(".", 2)[2] == stem
    ]
    places, values = zip(*sorted(known), strict=True)
    floor = max(values) * 1e-6 or 1e-30
    logs = np.log(np.maximum(values, floor))
    return float(np.exp(np.interp(unit.layer or 0, places, logs)))


class Tables:
    """The embedding and the head among the units; a tied table is probed as both."""

    def __init__(self, source: ModelSource, units: Sequence[Unit]) -> None:
        self.source = source
        self.units = units
        self.tied = source.decoder.tied_head

    def _uses(self, unit: Unit) -> list[str]:
        """What ``unit`` serves as: names of its probes."""
        role = unit.roles[0]
        if role == EMBEDDING:
            return ["embedding", "head"] if self.tied else ["embedding"]
        return ["head"] if role == HEAD else []

    def _unit(self, use: str) -> Unit | None:
        return next((unit for unit in self.units if use in self._uses(unit)), None)

    def move(self, probes: Probes, moved: dict[str, float]) -> None:
        """Begin the embedding's probe, where it is a unit."""
        unit = self._unit("embedding")
        if unit is None:
            return
        grid = probe_grid(unit)
        before = probes.streams[""]
        probes.move_embedding("embedding", lambda rows: values_of(rtn.solve(rows, grid)))
        scale = np.float32(self.source.decoder.embedding_scale)
        change = (probes.streams["embedding"] - before) / scale
        looked_up = np.concatenate([self._rows(window) for window in probes.windows])
        flat = change.reshape(-1, change.shape[-1])
        moved["embedding"] = relative_error(looked_up, looked_up + flat, None)

    def _rows(self, window: Sequence[int]) -> Array:
        table = self.source.tensors[EMBEDDING]
        return np.concatenate([table.load(token, token + 1) for token in window])

    def divide(
        self, probes: Probes, moved: dict[str, float], found: Statistics, errors: Costs
    ) -> dict[str, float]:
        """The KL of every probe, the head's among them; fills in the tables' errors."""
        for use in ("embedding", "head"):
            unit = self._unit(use)
            if unit is None:
                continue
            known = found if use == "head" else None
            rows = sample([self.source.tensors[EMBEDDING if self.tied else unit.roles[0]]])
            hessian = None if known is None else known.hessian
            errors[use] = {
                name: relative_error(rows, on_grid(rows, GRIDS[name], known), hessian)
                for name in unit.sizes
            }
        unit = self._unit("head")
        if unit is None:
            return probes.divergences(None, "")
        grid = probe_grid(unit)
        rows = sample([self.source.tensors[EMBEDDING if self.tied else unit.roles[0]]])
        moved["head"] = relative_error(rows, values_of(rtn.solve(rows, grid)), found.hessian)
        return probes.divergences(lambda rows: values_of(rtn.solve(rows, grid)), "head")

    def costs(self, factors: Mapping[str, float], errors: Costs) -> Costs:
        return {
            unit.name: {
                grid: sum(factors[use] * errors[use][grid] for use in self._uses(unit))
                for grid in unit.sizes
            }
            for unit in self.units
        }
