"""Plan: what a conversion will write and cost, known before a weight is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import psutil

from edgellm.architectures.experts import active_weights
from edgellm.errors import UsageError
from edgellm.export import CONTAINERS, container_named
from edgellm.export.layout import Container, Layout
from edgellm.export.writer import check_free, check_no_overlap
from edgellm.generation_defaults import sampling_keys
from edgellm.hardware import detect, peak_memory_bytes
from edgellm.keeping import holding_grid, keep_codes
from edgellm.progress import Progress, unwatched
from edgellm.quant import SOLVERS, devices
from edgellm.quant.grid import Grid
from edgellm.recipe import DEFAULT_SOLVER, Recipe, split_quant
from edgellm.runtimes import best_container
from edgellm.slabs import Slab, slab_bytes, slabs_of
from edgellm.source import ModelSource, open_source
from edgellm.source.quantized import stored_as
from edgellm.tensors import COLUMN_CHUNK_BYTES

if TYPE_CHECKING:
    from edgellm.budget.fitting import Fit
    from edgellm.calibration.planning import Calibration
    from edgellm.tune.planning import Tuning

COPIES = 4.0
"""Float32 slabs alive at once in a worker at the most: as read, in float32, its rows reordered, and
what they were rounded to (held against measurements by the memory test and a benchmark)."""

BYTES_PER_SECOND = {
    "float": 700e6,
    "ggml": 600e6,
    "affine": 350e6,
    "per_channel": 600e6,
    "codebook": 350e6,
    "q3_k": 200e6,
    "q6_k": 70e6,
    "q5_k": 60e6,
    "q4_k": 50e6,
    "q2_k": 50e6,
    "iq4_xs": 20e6,
    "iq4_nl": 20e6,
    "iq2_s": 20e6,
    "iq3_s": 13e6,
    "iq3_xxs": 10e6,
    "iq1_s": 12e6,
    "iq2_xxs": 5e6,
    "iq2_xs": 3e6,
    "iq1_m": 2e6,
}
"""Float32 bytes that one thread of a 2023 server core reads, rounds and writes in a second, by kind
of grid, or by name where ggml searches for scales; a guide, not a promise."""

MERGED_BYTES_PER_SECOND = 400e6
"""Float32 bytes of changed weights that one such core adds an adapter to and sums up."""

MERGE_PIECES = 4
"""Pieces of a slab (``COLUMN_CHUNK_BYTES``) alive at once while a worker merges."""


@dataclass(frozen=True)
class Plan:
    """A resolved recipe, the layout it leads to, and what that will take.

    ``peak_memory_bytes`` counts this process as it is now and the workers' slabs; ``disk_bytes`` is
    what must be free; ``seconds`` is a rough guess, without what measuring for ``fitted`` took
    already; ``reasons`` say why each default was chosen.
    """

    recipe: Recipe
    reasons: tuple[str, ...]
    source: ModelSource
    layout: Layout
    threads: int
    output_bytes: int
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float
    calibration: Calibration | None = None
    tuning: Tuning | None = None
    fitted: Fit | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts to be shown: of source, adapters, layout, calibration and tuning."""
        of_calibration = self.calibration.notes if self.calibration else ()
        of_tuning = self.tuning.notes if self.tuning else ()
        return (*self.source.notes, *self.layout.notes, *of_calibration, *of_tuning)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the tensors on disk by number of weights."""
        stored = {
            (array.file, array.offset): array.nbytes
            for tensor in self.layout.model_tensors
            for array in tensor.arrays
        }
        return 8 * sum(stored.values()) / self.layout.weights

    @property
    def active_weights(self) -> int:
        """Number of the source's weights without those of experts that a token does not pass."""
        return active_weights(self.source.decoder, self.source.tensors)

    def slabs(self) -> list[Slab]:
        """The units of work, in the order of the file; the same for any number of threads."""
        return slabs_of(self.layout.tensors, range(len(self.layout.tensors)))


def resolve(recipe: Recipe, grid: tuple[str, str] | None = None) -> tuple[Recipe, tuple[str, ...]]:
    """``recipe`` with the defaults filled in that no model decides, and a line for each with why.

    ``grid``: what takes the place of the container's default, and why. Which solver is the default
    follows from the model: ``make_plan`` chooses it.

    Raises ``UsageError`` for a container that does not exist.
    """
    reasons: list[str] = []
    chosen_format, chosen_quant = recipe.format, recipe.quant
    if chosen_format is None:
        chosen_format, why = _container_for(recipe)
        reasons.append(f"format {chosen_format}: {why}")
    container = container_named(chosen_format)
    if not recipe.grid:
        name, why = grid or (container.default_grid, f"the default of {chosen_format}")
        chosen_quant = str(split_quant(recipe.quant or "")._replace(grid=name))
        reasons.append(f"grid {name}: {why}")
    recipe = msgspec.structs.replace(recipe, format=chosen_format, quant=chosen_quant)
    return _with_layout(recipe, container, reasons), tuple(reasons)


def _with_layout(recipe: Recipe, container: Container, reasons: list[str]) -> Recipe:
    """``recipe`` with the layout of its codes, where the container has several."""
    if container.default_layout is None:
        if recipe.layout is not None:
            raise UsageError(
                f"--layout {recipe.layout}: {container.name} lays codes out in one way alone; "
                "leave it out, or choose --format hf"
            )
        return recipe
    if recipe.layout is None:
        layout = container.default_layout(recipe.grid)
        if layout is not None:
            reasons.append(f"layout {layout}: the default of {recipe.grid}")
        return msgspec.structs.replace(recipe, layout=layout)
    return recipe


def _container_for(recipe: Recipe) -> tuple[str, str]:
    """The container that runs best here, unless only another one can do what was asked."""
    if recipe.keep_adapters:
        return "gguf", "the container whose runtime applies adapters beside a model"
    if recipe.layout is not None:
        return "hf", "the container that has more than one layout"
    (best, why), grid = best_container(), recipe.grid
    if not grid:
        return best, why
    holders = [name for name in CONTAINERS if grid in container_named(name).grids]
    if holders and best not in holders:
        return holders[0], f"the container that has {grid}"
    return best, why


def make_plan(
    recipe: Recipe,
    *,
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = unwatched,
) -> Plan:
    """Everything that converting by ``recipe`` will do.

    Reads headers and the tokenizer, and of a quantized source what its codes are scaled by; for a
    size that grids are to be chosen for, all weights, which takes minutes. ``trust_remote_code``:
    Python that the source brings may be run, to compare with. Raises
    every error that can be known beforehand: a damaged or unsupported source, a grid that
    the container cannot hold, a group that does not divide a row.
    """
    device, automatic = devices.choose(recipe.device), recipe.device == devices.AUTO
    asked = recipe
    if recipe.device is not None:
        asked = msgspec.structs.replace(recipe, device=device.name)
    recipe, reasons = resolve(asked)
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    base = open_source(
        recipe.source,
        ignore_config_keys=recipe.ignore_config_keys,
        context=recipe.context,
        rope_scaling=recipe.rope_scaling,
        quantized=True,
        text_only=bool(recipe.text_only),
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    sampling_keys(base.generation)  # what it suggests and is none is found before any work
    assert recipe.format is not None
    container = container_named(recipe.format)
    holding = holding_grid(asked, container.name, base)
    if holding is not None:
        recipe, reasons = resolve(asked, holding)
    source = base if recipe.keep_adapters else _with_adapters(base, recipe, progress)

    def lay_out(model: ModelSource, recipe: Recipe) -> Layout:
        layout = container.lay_out(model, recipe)
        if recipe.keep_adapters:
            from edgellm.lora.requested import kept_apart

            layout = kept_apart(layout, model, container, recipe, progress)
        return keep_codes(layout, recipe, source)

    hardware = detect()
    workers = threads or hardware.physical_cores.value
    fitted = None
    if recipe.fit is not None or recipe.bits is not None:
        from edgellm.budget.fitting import fit  # brings onnxruntime with it

        recipe, fitted = fit(asked, recipe, source, container, workers, progress)
        reasons = (*reasons, fitted.reason())
    recipe, layout, calibration, chosen = _calibrated(
        recipe, source, lay_out, workers, hardware.memory_bytes.value
    )
    recipe, where = _with_device(recipe, device, automatic)
    reasons = (*reasons, *filter(None, (chosen, where)))
    sizes = {name: len(content) for name, content in layout.files.items()} | layout.data_files
    output = sum(sizes.values())
    slabs = workers * COPIES * max(map(slab_bytes, layout.tensors), default=0)
    cost = calibration.cost if calibration else None
    tuning = _tuned(recipe, source, layout, workers)
    solving = (cost.memory_bytes if cost else 0) + (tuning.hessian_bytes if tuning else 0)
    needs = [slabs, solving, tuning.memory_bytes if tuning else 0]
    working = max(needs) + _merge_memory(source, workers)
    # Measuring for the choice of grids is over by now, in this very process.
    before = peak_memory_bytes() if fitted else 0
    seconds = seconds_of(layout, workers) + _merge_seconds(source, workers)
    plan = Plan(
        recipe=recipe,
        reasons=reasons,
        source=source,
        layout=layout,
        threads=workers,
        output_bytes=output,
        peak_memory_bytes=max(before, int(psutil.Process().memory_info().rss + working)),
        disk_bytes=output + (1 << 20) + (cost.disk_bytes if cost else 0),
        seconds=seconds + (cost.seconds if cost else 0) + (tuning.seconds if tuning else 0),
        calibration=calibration,
        tuning=tuning,
        fitted=fitted,
    )
    _check_memory(plan, hardware.memory_bytes.value)
    return plan


def _calibrated(
    recipe: Recipe,
    source: ModelSource,
    lay_out: Callable[[ModelSource, Recipe], Layout],
    workers: int,
    memory_bytes: int,
) -> tuple[Recipe, Layout, Calibration | None, str]:
    """``recipe`` with its solver, the layout that it leads to, the calibration, and why."""
    from edgellm.calibration.planning import choose_solver, plan_calibration, with_likely_solver

    # Some containers choose other types where a solver weighs columns.
    likely = with_likely_solver(recipe)
    layout = lay_out(source, likely)
    recipe, reason = choose_solver(recipe, layout, source, workers, memory_bytes)
    if recipe.solver != likely.solver:
        layout = lay_out(source, recipe)
    layout, calibration = plan_calibration(
        recipe, layout, source, lambda folded: lay_out(folded, recipe), workers
    )
    return recipe, layout, calibration, reason


def _with_device(recipe: Recipe, found: devices.Choice, automatic: bool) -> tuple[Recipe, str]:
    """``recipe`` with the device that solves, and why; raises ``UsageError`` where none would.

    ``automatic``: none was asked for by name.
    """
    if found.name == devices.CPU:
        return recipe, f"device cpu: {found.reason}" if automatic else ""
    if not SOLVERS[recipe.solver].on_torch:
        idle = f"{recipe.solver} solves nothing that a GPU could"
        if automatic:
            return msgspec.structs.replace(recipe, device=devices.CPU), f"device cpu: {idle}"
        able = " or ".join(name for name, solver in SOLVERS.items() if solver.on_torch)
        raise UsageError(
            f"--device {found.name}: {idle}; choose --quant {able}:{recipe.grid}, or leave "
            "--device out"
        )
    cpu = "the text is read and scales are searched for on the CPU"
    if recipe.tune is not None:
        cpu += ", and --tune trains there"
    return recipe, f"device {found.name}: {found.reason}; {cpu}, and times are the CPU's"


def _tuned(
    recipe: Recipe,
    source: ModelSource,
    layout: Layout,
    workers: int,
) -> Tuning | None:
    """How what was rounded will be tuned; costs nothing where it is not."""
    if recipe.tune is None:
        return None
    from edgellm.tune.planning import plan_tuning

    return plan_tuning(recipe, layout, source, workers, psutil.virtual_memory().available)


def _check_memory(plan: Plan, memory_bytes: int) -> None:
    """Refuse a calibration that would not fit: it cannot be cut into smaller slabs."""
    if plan.calibration is not None and plan.peak_memory_bytes > memory_bytes:
        fewer = "--threads 1 takes less, or " if plan.threads > 1 else ""
        raise UsageError(
            f"--quant {plan.recipe.quant} takes about {plan.peak_memory_bytes / 1e9:.1f} GB of "
            f"memory, and there are {memory_bytes / 1e9:.1f} GB: {fewer}choose "
            f"--quant {DEFAULT_SOLVER}:{plan.recipe.grid}"
        )


def _with_adapters(base: ModelSource, recipe: Recipe, progress: Progress) -> ModelSource:
    """``base`` with what the recipe wants merged; adapters cost nothing where there are none."""
    if not recipe.adapters:
        if recipe.merge_base and not stored_as(base.tensors):
            raise UsageError(
                f"--merge-base {recipe.merge_base} is about adapters or a model that is quantized "
                f"already, and {base.name} is in full precision: leave it out"
            )
        return base
    from edgellm.lora.requested import with_adapters

    return with_adapters(base, recipe, progress=progress)


def check_disk(plan: Plan, out: Path) -> None:
    """Raise ``OutputError`` when the disk of ``out`` has less room than the plan needs."""
    check_free(out, plan.disk_bytes)


def check_apart(source: ModelSource, out: Path) -> None:
    """Raise ``UsageError`` when ``out`` is the source or an adapter, lies in it, or holds it."""
    check_no_overlap(source.path, out)
    for adapter in source.merge.adapters if source.merge else ():
        check_no_overlap(adapter.path, out)


def _merge_memory(source: ModelSource, workers: int) -> int:
    """What merging takes beside the slabs: pieces of them, and what ``merge_bytes`` counts."""
    merge = source.merge
    if merge is None:
        return 0
    from edgellm.lora.memory import merge_bytes

    shapes = [source.tensors[role].shape for role in merge.changed]
    pieces = workers * MERGE_PIECES * COLUMN_CHUNK_BYTES
    return pieces + merge_bytes(merge.adapters, merge.combination, shapes)


def _merge_seconds(source: ModelSource, workers: int) -> float:
    if source.merge is None:
        return 0
    changed = sum(4 * source.tensors[role].size for role in source.merge.changed)
    return changed / MERGED_BYTES_PER_SECOND / workers


def seconds_of(layout: Layout, workers: int) -> float:
    """What rounding and writing ``layout`` takes, roughly."""

    def speed(grid: Grid) -> float:
        return BYTES_PER_SECOND.get(grid.name) or BYTES_PER_SECOND[grid.kind]

    busy = sum(4 * tensor.rows * tensor.columns / speed(tensor.grid) for tensor in layout.tensors)
    return 0.5 + busy / workers
