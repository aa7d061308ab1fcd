"""How much of a fine-tune is still there after its merged weights were rounded.

Two figures. By answers: ``1 - KL(merged || quantized) / KL(merged || base)`` on a text, 1 when
rounding moved the answers by nothing against what the fine-tune moved them by, 0 when by as much.
By weights: for each weight the cosine of what is left of the change with the change itself, both
projected on the adapter's own rows and columns (``lora.check.projection``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from edgellm.architectures.row_order import as_checkpoint_has
from edgellm.calibration import texts
from edgellm.errors import RuntimeMissing, UnsupportedTarget, VerificationError
from edgellm.evaluation import Comparison, Divergence, session_logits
from edgellm.export.layout import Layout
from edgellm.hardware import detect
from edgellm.lora.check.projection import low_rank_factors, projected_cosine
from edgellm.lora.replication import replicated
from edgellm.parallel import one_blas_thread
from edgellm.progress import Progress, unwatched
from edgellm.quant import floats, ggml, rtn
from edgellm.quant.dequantize import dequantize
from edgellm.quant.ggml_types import NAMED
from edgellm.quant.grid import Grid, QTensor
from edgellm.source.model import ModelSource
from edgellm.tensors import Array

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.calibration.texts import TextWindows
    from edgellm.forward import Windows

MIN_SURVIVAL = 0.25
"""The least survival that a conversion is kept with, where none was asked for.

A LoRA that makes SmolLM2-135M talk like a pirate (KL to the base 1.84) has 0.99 in q8_0, 0.90 in
q4_k_m, 0.48 in int4-g32 and 0.32 in q2_k, and answers like one in the last three, though in q2_k
with less sense. At 0.3 of its weight (KL 0.16) it has 0.40 in q4_k_m and -2.5 in int4-g32, whose
rounding moves the answers by 3.5 times as much as the adapter does.
"""

KEPT_COSINE = 0.9
"""Median cosine from which on rounding left the change of the weights alone: keeping the adapters
apart from a base that is rounded alike would then not help."""

SMALLEST_KL = 1e-4
"""Nats between merged model and base below which a text does not show the fine-tune."""

MOST_WORK = 3e11
"""Parameters times tokens up to which a conversion measures survival unasked: three passes over the
text, each about 2 operations a parameter and token."""


class WeightSurvival(msgspec.Struct, frozen=True, kw_only=True):
    """``cosine``: of the projected change before and after rounding to ``grid``."""

    role: str
    name: str
    grid: str
    cosine: float


class Survival(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a fine-tune.

    ``survival`` is None where it could not be measured, and ``reason`` then says why. ``text``
    names what it was measured on. ``from_base`` is KL(merged || base), ``from_quantized``
    KL(merged || quantized). ``weights`` are those that a low-rank adapter changes.
    """

    survival: float | None
    reason: str
    text: str
    runtime: str = ""
    from_base: Divergence | None = None
    from_quantized: Divergence | None = None
    weights: tuple[WeightSurvival, ...] = ()

    @property
    def median_cosine(self) -> float | None:
        """The median over ``weights``; None of none."""
        return median(weight.cosine for weight in self.weights) if self.weights else None


@dataclass
class Shared:
    """What the pass over the text found beside survival; ``text`` is None where it did not run.

    ``to_quantized`` compares what was rounded with the merged model.
    """

    text: TextWindows | None = None
    to_quantized: Comparison = field(default_factory=Comparison)


def measure(
    merged: ModelSource,
    layout: Layout,
    artifact: Artifact,
    *,
    text: str | None = None,
    tokens: int = texts.MEASURED_TOKENS,
    shared: Shared | None = None,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> Survival:
    """The survival of the adapters of ``merged`` in ``artifact``, which has its ``layout``.

    Base and merged model are computed in float32 layer by layer, the artifact by the runtime that
    ``run`` would pick. ``text`` is a file, or None for the built-in one. Raises what reading,
    loading and computing raise.
    """
    weights = weight_survivals(merged, layout, threads=threads)
    read = _windows(merged, layout.context_length, text, tokens)
    windows = read.windows
    unmeasured = partial(Survival, survival=None, text=read.name, weights=weights)
    from edgellm.chat import open as open_model  # a backend takes long to import

    room = max(len(window) for window in windows)
    try:
        chat = open_model(artifact.path, verify=False, context_tokens=room, threads=threads)
    except (RuntimeMissing, UnsupportedTarget) as error:
        return unmeasured(reason=f"nothing here runs it: {error}")
    if shared is not None:
        shared.text = read
    with chat:
        return divergences(
            merged,
            session_logits(chat.session, windows),
            windows,
            unmeasured(reason="", runtime=chat.choice.runtime),
            to_quantized=None if shared is None else shared.to_quantized,
            threads=threads,
            progress=progress,
        )


def divergences(
    merged: ModelSource,
    quantized: Iterator[Array],
    windows: Windows,
    known: Survival,
    *,
    to_quantized: Comparison | None = None,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> Survival:
    """``known`` with the survival by answers; ``quantized`` gives logits window by window.

    ``to_quantized``, where given, adds up what rounding did.
    """
    from edgellm.forward import window_logits  # onnx takes long to import

    assert merged.merge is not None, "nothing was merged into this source"
    to_base, to_quantized = Comparison(), to_quantized or Comparison()
    base = window_logits(merged.merge.base, windows, threads=threads, progress=progress)
    ours = window_logits(merged, windows, threads=threads, progress=progress)
    for window, of_base, of_merged, of_quantized in zip(
        windows, base, ours, quantized, strict=True
    ):
        to_base.add(of_merged, of_base, window)
        to_quantized.add(of_merged, of_quantized, window)
    return with_survival(known, to_base.result(), to_quantized.result())


def with_survival(known: Survival, from_base: Divergence, from_quantized: Divergence) -> Survival:
    """``known`` with both divergences, and their ratio where the first is large enough."""
    survival, reason = None, ""
    if from_base.kl < SMALLEST_KL:
        reason = (
            f"on this text the merged model answers as the base does (KL {from_base.kl:.1e} nats): "
            "name a text of what the adapter was trained for with --check-text FILE"
        )
    else:
        survival = 1.0 - from_quantized.kl / from_base.kl
    return msgspec.structs.replace(
        known, survival=survival, reason=reason, from_base=from_base, from_quantized=from_quantized
    )


def affordable(merged: ModelSource, tokens: int = texts.MEASURED_TOKENS) -> bool:
    """Whether a conversion measures unasked: parameters times tokens are at most ``MOST_WORK``."""
    return sum(ref.size for ref in merged.tensors.values()) * tokens <= MOST_WORK


def require(survival: Survival, minimum: float | None) -> None:
    """Raise ``VerificationError`` where less than ``minimum`` is left; 0 lets everything pass.

    None is ``MIN_SURVIVAL``. What could not be measured passes: its ``reason`` says why.
    """
    minimum = MIN_SURVIVAL if minimum is None else minimum
    if survival.survival is None or not minimum or survival.survival >= minimum:
        return
    assert survival.from_base is not None
    assert survival.from_quantized is not None
    cosine = survival.median_cosine
    kept = cosine is not None and cosine >= KEPT_COSINE
    what = (
        f". The change of the weights itself is kept (cosine {cosine:.3f}), and it is the rounding "
        "of the whole model that drowns it: choose more bits (--quant q5_k_m, q6_k, q8_0 or int8)"
        if kept
        else ". Choose more bits (--quant q5_k_m, q6_k, q8_0 or int8), keep the adapters apart "
        "(--keep-adapters)"
    )
    raise VerificationError(
        f"{max(survival.survival, 0):.0%} of the fine-tune is left after rounding and "
        f"{100 * minimum:.4g}% is asked for: the adapters moved the answers by KL "
        f"{survival.from_base.kl:.3g}, rounding moved them by {survival.from_quantized.kl:.3g} "
        f"(text: {survival.text}){what}, measure on a text of what they were trained for "
        "(--check-text FILE), or take it as it is (--min-survival 0)"
    )


def weight_survivals(
    merged: ModelSource, layout: Layout, *, threads: int | None = None
) -> tuple[WeightSurvival, ...]:
    """The projected cosine of every weight that low-rank adapters change, in the layout's order.

    Base and merged rows are plainly rounded to the grid that ``layout`` gives them: a solver that
    corrects its errors moves other weights too. Grids that need importance are left out.
    """
    merge = merged.merge
    assert merge is not None, "nothing was merged into this source"
    base = replicated(merge.base, merge.adapters)
    grids = _grids(layout)
    rows = {row.role: row for row in merged.family.tensors(merged.decoder)}

    def survive(role: str) -> WeightSurvival | None:
        before, after = base.tensors.get(role), merged.tensors[role]
        edits = [found[role].edit for found in merge.bindings if role in found]
        factors = low_rank_factors(edits)
        if before is None or before.shape != after.shape or factors is None:
            return None
        if any(factor.b.shape[0] != after.rows for factor in factors):
            return None
        grid = grids[role]
        # Factors have their rows as the checkpoint has them.
        before, after = (as_checkpoint_has(ref, rows[role]) for ref in (before, after))
        try:
            cosine = projected_cosine(
                before, after, factors, lambda rows: _values(rtn.solve(rows, grid))
            )
        except UnsupportedTarget:
            return None
        if cosine is None:
            return None
        return WeightSurvival(role=role, name=after.name, grid=grid.name, cosine=cosine)

    roles = [role for role in grids if role in merge.changed]
    workers = threads or detect().physical_cores.value
    with one_blas_thread(), ThreadPoolExecutor(workers) as pool:
        return tuple(found for found in pool.map(survive, roles) if found is not None)


def _grids(layout: Layout) -> Mapping[str, Grid]:
    """The grid that each tensor of the source is rounded to; that of its first place."""
    grids: dict[str, Grid] = {}
    for tensor in layout.tensors:
        for part in tensor.parts:
            grids.setdefault(part.role, tensor.grid)
    return grids


def _windows(
    merged: ModelSource, context: int, text: str | None, tokens: int = texts.MEASURED_TOKENS
) -> TextWindows:
    """The text as tokens that base and merged model both have."""
    assert merged.merge is not None
    base = merged.merge.base
    room = min(context, base.decoder.context_length)
    found = texts.evaluation_windows(merged.tokenizer, text, tokens=tokens, context=room)
    if max(max(window) for window in found.windows) < base.decoder.vocab_size:
        return found
    return texts.evaluation_windows(base.tokenizer, text, tokens=tokens, context=room)


def _values(tensor: QTensor) -> Array:
    """The values that rounded rows stand for."""
    if tensor.packed is None:
        return dequantize(tensor)
    if tensor.grid.kind == "float":
        return floats.decode(tensor.packed, tensor.grid.name)
    return ggml.dequantize(tensor.packed, NAMED[tensor.grid.name])
