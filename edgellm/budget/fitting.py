"""A recipe whose grids were chosen tensor by tensor for a size, and what was found on the way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgellm.budget.choosing import choose
from edgellm.budget.cost import check_measuring, measuring_bytes
from edgellm.budget.measuring import PROBE_TOKENS, PROBE_WINDOWS, Measured, measure
from edgellm.budget.sizes import bytes_of
from edgellm.budget.units import Unit, units_of, with_grids
from edgellm.calibration.texts import TextWindows, calibration_windows
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.export.layout import Container, Layout
from edgellm.hardware import detect
from edgellm.progress import Progress, unwatched
from edgellm.recipe import Recipe, split_quant
from edgellm.source.model import ModelSource

FIT_TOKENS = 8192
"""Of calibration text for the statistics: sums of errors need fewer than solving does."""

MOST_ROUNDS = 8
"""How often the choice is made again for padding that the layout added."""


@dataclass(frozen=True)
class Entry:
    """One tensor's choice; ``kl`` is what it is expected to cost, in nats a token."""

    name: str
    grid: str
    nbytes: int
    kl: float


@dataclass(frozen=True)
class Fit:
    """What was chosen for ``budget_bytes``, of which ``nbytes`` are taken, and by what.

    ``least_bytes`` and ``most_bytes`` are what the candidates can reach. ``kl`` is the sum of what
    the tensors are expected to cost: it ranks choices, and is no measurement. ``seconds`` is what
    measuring took.
    """

    budget_bytes: int
    nbytes: int
    least_bytes: int
    most_bytes: int
    entries: tuple[Entry, ...]
    measured: Measured
    text: TextWindows
    seconds: float

    @property
    def kl(self) -> float:
        return sum(entry.kl for entry in self.entries)

    def reason(self) -> str:
        """A line on what was chosen."""
        counts = Counter(entry.grid for entry in self.entries)
        grids = ", ".join(f"{count} {grid}" for grid, count in counts.most_common())
        more = (
            "; more bytes than that would change nothing, all weights fit in 16 bits"
            if self.budget_bytes >= self.most_bytes
            else ""
        )
        return (
            f"grids for {self.budget_bytes / 1e6:.1f} MB: {grids} of {len(self.entries)} tensors, "
            f"{self.nbytes / 1e6:.1f} MB, expected KL {self.kl:.3g}, measured in "
            f"{self.seconds:.0f} s{more}"
        )

    def figures(self) -> dict[str, Any]:
        """For the manifest: what was measured, and what it led to."""
        return {
            "budget_bytes": self.budget_bytes,
            "nbytes": self.nbytes,
            "least_bytes": self.least_bytes,
            "most_bytes": self.most_bytes,
            "expected_kld": self.kl,
            "text": self.text.name,
            "ids_sha256": self.text.sha256,
            "tokens": self.text.tokens,
            "measured_s": round(self.seconds, 3),
            "probe_tokens": PROBE_TOKENS * PROBE_WINDOWS,
            "probed_layers": self.measured.probed_layers,
            "kld_by_relative_error": self.measured.factors,
            "tensors": {
                entry.name: {"grid": entry.grid, "nbytes": entry.nbytes, "expected_kld": entry.kl}
                for entry in self.entries
            },
        }


def fit(
    asked: Recipe,
    recipe: Recipe,
    source: ModelSource,
    container: Container,
    threads: int,
    progress: Progress = unwatched,
) -> tuple[Recipe, Fit]:
    """``recipe``, the resolved one of ``asked``, with ``tensor_grids`` in place of its budget.

    Reads every weight and runs the float network over a calibration text. Raises ``UsageError``
    for a budget that contradicts other options or that no grids reach, and what measuring raises.
    """
    _check(asked)
    free = msgspec.structs.replace(recipe, fit=None, bits=None)
    if split_quant(asked.quant or "").solver == "rtn" and not recipe.calibrates:
        # The text is for the choice alone, and a recipe that repeats it has no use for one.
        seed = recipe.seed if recipe.adapters else None
        free = msgspec.structs.replace(free, calibration=None, calibration_tokens=None, seed=seed)
    units = units_of(free, source, container)
    if not units:
        raise UsageError("--fit and --bits have nothing to choose: every tensor's grid is named")
    smallest = [min(unit.sizes, key=lambda name: unit.sizes[name]) for unit in units]
    largest = [max(unit.sizes, key=lambda name: unit.sizes[name]) for unit in units]
    least = _laid(free, units, smallest, source, container)
    most = _laid(free, units, largest, source, container)
    budget = _budget(recipe, least, most)
    least_bytes, most_bytes = taken(least), taken(most)
    if budget < least_bytes:
        least_asked = (
            f"{least_bytes:,} bytes"
            if recipe.fit is not None
            else f"{8 * _weight_bytes(least) / least.weights:.2f} bits"
        )
        raise UnsupportedTarget(
            f"{_option(recipe)} is below what the grids of {container.name} reach for this model: "
            f"the least is {least_asked}; ask for that, or choose a smaller model"
            + ("" if recipe.solver != "rtn" or container.name != "gguf" else _FURTHER)
        )
    text = calibration_windows(
        source.tokenizer,
        recipe.calibration,
        tokens=min(recipe.calibration_tokens or FIT_TOKENS, FIT_TOKENS),
        seed=recipe.seed or 0,
        context=source.decoder.context_length,
    )
    probed = PROBE_TOKENS * PROBE_WINDOWS
    needed = measuring_bytes(source, units, text.tokens, probed, threads)
    check_measuring(_option(recipe), needed, detect().memory_bytes.value, threads)
    started = time.perf_counter()
    measured = measure(source, units, text.windows, threads, progress)
    seconds = time.perf_counter() - started
    names = [list(unit.sizes) for unit in units]
    options = [
        [(unit.sizes[name], measured.costs[unit.name][name]) for name in each]
        for unit, each in zip(units, names, strict=True)
    ]
    fixed = least_bytes - sum(unit.sizes[name] for unit, name in zip(units, smallest, strict=True))
    room = budget - fixed
    for _ in range(MOST_ROUNDS):
        places = choose(options, room)
        chosen = [each[place] for each, place in zip(names, places, strict=True)]
        nbytes = taken(_laid(free, units, chosen, source, container))
        if nbytes <= budget:
            break
        room -= nbytes - budget
    else:  # alignment alone is in the way: the smallest grids do fit
        chosen, nbytes = smallest, least_bytes
    entries = tuple(
        Entry(unit.name, name, unit.sizes[name], measured.costs[unit.name][name])
        for unit, name in zip(units, chosen, strict=True)
    )
    fitted = Fit(budget, nbytes, least_bytes, most_bytes, entries, measured, text, seconds)
    return with_grids(free, _table(units, chosen)), fitted


_FURTHER = ", or --quant gptq, whose importance allows smaller ones"


def taken(layout: Layout) -> int:
    """The bytes of all files of ``layout``; the manifest comes on top."""
    sizes = {name: len(content) for name, content in layout.files.items()} | layout.data_files
    return sum(sizes.values())


def _check(asked: Recipe) -> None:
    if asked.fit is not None and asked.bits is not None:
        raise UsageError("--fit and --bits are two budgets for one model: leave one of them out")
    option = _option(asked)
    if asked.grid:
        raise UsageError(
            f"{option} chooses the grids and --quant {asked.quant} names one: name a solver alone "
            "(--quant gptq), or fix single tensors with --tensor-grid"
        )
    if asked.keep_adapters:
        raise UsageError(
            f"{option} chooses grids by the answers of the model, which adapters beside it change: "
            "merge them (leave out --keep-adapters), or name a grid"
        )
    if asked.imatrix is not None:
        raise UsageError(
            f"{option} measures how the model works on a text, which --imatrix takes the place of: "
            "leave one of them out"
        )


def _option(recipe: Recipe) -> str:
    return f"--fit {recipe.fit}" if recipe.fit is not None else f"--bits {recipe.bits:g}"


def _budget(recipe: Recipe, least: Layout, most: Layout) -> int:
    """The budget in bytes of files; bits are those of the stored tensors by weight."""
    if recipe.fit is not None:
        return bytes_of(recipe.fit)
    assert recipe.bits is not None
    around = taken(least) - _weight_bytes(least)
    return int(recipe.bits * most.weights / 8) + around


def _weight_bytes(layout: Layout) -> int:
    return sum(tensor.nbytes for tensor in layout.model_tensors)


def _table(units: Sequence[Unit], chosen: Sequence[str]) -> dict[str, str]:
    return {role: name for unit, name in zip(units, chosen, strict=True) for role in unit.roles}


def _laid(
    recipe: Recipe,
    units: Sequence[Unit],
    chosen: Sequence[str],
    source: ModelSource,
    container: Container,
) -> Layout:
    return container.lay_out(source, with_grids(recipe, _table(units, chosen)))
