"""What converting an encoder, alone or with a decoder, will write and cost, known before a weight
is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import msgspec
import psutil

from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.export.encoder_onnx import DEFAULT_GRID, lay_out_encoder
from edgellm.export.layout import Layout
from edgellm.hardware import detect
from edgellm.plan import COPIES, seconds_of
from edgellm.recipe import DEFAULT_SOLVER, Recipe, split_quant
from edgellm.slabs import slab_bytes
from edgellm.source.encoder_model import EncoderSource, FolderSource

CONTAINER = "onnx"

NOT_FOR_ENCODERS = {
    "layout": "it is for --format hf",
    "fit": "grids are chosen for a size by how a language model's answers change",
    "bits": "grids are chosen for a size by how a language model's answers change",
    "kv_cache": "an encoder has no cache",
    "compute": "its graph computes in f32",
    "rope_scaling": "its positions are a table",
    "adapters": "adapters are merged into models that generate text",
    "merge_base": "adapters are merged into models that generate text",
    "check_text": "its outputs are compared on built-in texts",
    "check_tokens": "its outputs are compared on built-in texts",
    "max_kld": "it does not predict the next token",
    "max_ppl_increase": "it does not predict the next token",
    "calibration": "weights are rounded without a calibration text",
    "calibration_tokens": "weights are rounded without a calibration text",
    "calibrate_on": "weights are rounded without a calibration text",
    "imatrix": "weights are rounded without a calibration text",
    "seed": "weights are rounded without a calibration text",
    "device": "weights are rounded on the CPU",
    "tune": "scales are trained for models that generate text",
}
"""Fields of a recipe that nothing here would heed, and why."""


Source = TypeVar("Source", bound=FolderSource)


@dataclass(frozen=True)
class FolderPlan(Generic[Source]):
    """A resolved recipe, the layout that it leads to, and what that will take.

    The fields are as in ``plan.Plan``.
    """

    recipe: Recipe
    reasons: tuple[str, ...]
    source: Source
    layout: Layout
    threads: int
    output_bytes: int
    peak_memory_bytes: int
    disk_bytes: int
    seconds: float

    @property
    def notes(self) -> tuple[str, ...]:
        """Facts to be shown: of source and layout."""
        return (*self.source.notes, *self.layout.notes)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the tensors on disk by number of weights."""
        return 8 * sum(tensor.nbytes for tensor in self.layout.tensors) / self.layout.weights


def _compared_bytes(layout: Layout) -> int:
    """What the float model takes that the result is compared with, where it is rounded."""
    if all(tensor.grid.name == "f32" for tensor in layout.tensors):
        return 0
    return 4 * layout.weights


EncoderPlan: TypeAlias = FolderPlan[EncoderSource]


def plan_encoder(
    recipe: Recipe, source: EncoderSource, *, threads: int | None = None
) -> EncoderPlan:
    """Everything that converting ``source`` by ``recipe`` will do; see ``plan_folder``."""
    family = source.encoder.family
    return plan_folder(recipe, source, lay_out_encoder, f"an encoder ({family})", threads)


def plan_folder(
    recipe: Recipe,
    source: Source,
    lay_out: Callable[[Source, Recipe], Layout],
    what: str,
    threads: int | None = None,
) -> FolderPlan[Source]:
    """Everything that converting ``source``, which is ``what``, will do; reads headers alone.

    Raises ``UsageError`` for options that are about language models, and ``UnsupportedTarget`` for
    other containers and solvers than there are for it.
    """
    for name, why in NOT_FOR_ENCODERS.items():
        if getattr(recipe, name) not in (None, (), False):
            option = name.replace("_", "-")
            raise UsageError(
                f"{source.name} is {what}, and {option} means nothing to it: {why}; leave it out"
            )
    if recipe.format not in (None, CONTAINER):
        raise UnsupportedTarget(
            f"--format {recipe.format}: {source.name} is {what}, which edgellm writes as ONNX "
            f"alone: choose --format {CONTAINER}, or leave it out"
        )
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    quant = split_quant(recipe.quant or "")
    if quant.transforms or quant.solver not in (None, DEFAULT_SOLVER):
        raise UnsupportedTarget(
            f"--quant {recipe.quant}: encoders are rounded to nearest, without solvers or "
            f"transforms that see the model work: choose --quant {quant.grid or DEFAULT_GRID}"
        )
    reasons = []
    if recipe.format is None:
        reasons.append(f"format {CONTAINER}: encoders are written as ONNX")
    if not quant.grid:
        reasons.append(f"grid {DEFAULT_GRID}: the default of encoders")
    recipe = msgspec.structs.replace(
        recipe, format=CONTAINER, quant=str(quant._replace(grid=quant.grid or DEFAULT_GRID))
    )
    layout = lay_out(source, recipe)
    workers = threads or detect().physical_cores.value
    sizes = {name: len(content) for name, content in layout.files.items()} | layout.data_files
    output = sum(sizes.values())
    slabs = workers * COPIES * max(map(slab_bytes, layout.tensors))
    return FolderPlan(
        recipe=recipe,
        reasons=tuple(reasons),
        source=source,
        layout=layout,
        threads=workers,
        output_bytes=output,
        peak_memory_bytes=int(psutil.Process().memory_info().rss + slabs),
        disk_bytes=output + _compared_bytes(layout) + (1 << 20),
        seconds=seconds_of(layout, workers),
    )
