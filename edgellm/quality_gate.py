"""How far a new artifact's answers are from its source's, and whether that is too far.

Every conversion that rounds weights ends with it: the artifact on the runtime that ``run`` would
pick, the source in float, side by side over a short text. What is found stands in the manifest;
limits (``Recipe.max_kld``, ``Recipe.max_ppl_increase``) make it a gate.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgellm.calibration import BUILT_IN
from edgellm.calibration.texts import MEASURED_TOKENS, MEASURED_WINDOW, evaluation_windows
from edgellm.errors import (
    GenerationError,
    RuntimeMissing,
    UnsupportedModel,
    UnsupportedTarget,
    VerificationError,
)
from edgellm.evaluation import Comparison, Figures
from edgellm.export.writer import aside_of, check_output
from edgellm.progress import Progress, unwatched

if TYPE_CHECKING:
    from edgellm.answers import Answers
    from edgellm.artifact import Artifact
    from edgellm.calibration.texts import TextWindows
    from edgellm.evaluation_text import Cut
    from edgellm.plan import Plan
    from edgellm.recipe import Recipe

MOST_WORK = 3e11
"""Parameters times tokens up to which a conversion compares unasked: two passes over the text, each
about 2 operations a parameter and token; some seconds on two cores."""

LEAST_TOKENS = 128
"""Fewer would say too little: a larger model is not compared unasked."""

READ_BACK = ("gguf", "hf", "mlx")
"""Containers whose weights the float network reads."""

BEST_SOLVER = "gptq"

NO_RUNTIME = "float"
"""What computed an artifact that no runtime here opens: the values that its weights stand for."""


class Quality(Figures, frozen=True, kw_only=True):
    """The figures of an artifact against its source, and what they depend on.

    ``runtime`` computed the artifact, ``reference`` the source: the float network, or Python of its
    own.
    ``rejected`` says why the artifact was not kept, empty where it was.
    """

    text: str
    corpus_sha256: str
    windows_sha256: str
    scored: str
    runtime: str
    reference: str = NO_RUNTIME
    evaluate_s: float
    rejected: str = ""


def asked_for(recipe: Recipe) -> bool:
    """Whether ``recipe`` wants the comparison whatever it takes."""
    limits = (recipe.check_text, recipe.check_tokens, recipe.max_kld, recipe.max_ppl_increase)
    return any(limit is not None for limit in limits)


def check_ready(plan: Plan, out: Path, *, check: bool) -> None:
    """Raise before any work what a comparison would raise after it.

    ``UsageError`` for a text that cannot be read and ``OutputError`` where a rejected artifact
    could not be put aside.
    """
    if check_tokens(plan) and (check or asked_for(plan.recipe)):
        text_of(plan, check_tokens(plan))
    if plan.recipe.max_kld is not None or plan.recipe.max_ppl_increase is not None:
        check_output(aside_of(out), force=True)


def check_tokens(plan: Plan) -> int:
    """Tokens of text that the artifact of ``plan`` is compared on; 0: it is not.

    Unasked as many as ``MOST_WORK`` allows, and none where no weight is rounded.
    """
    recipe = plan.recipe
    if recipe.check_tokens is not None:
        return recipe.check_tokens
    if asked_for(recipe):
        return MEASURED_TOKENS
    if all(tensor.grid.kind == "float" for tensor in plan.layout.tensors):
        return 0
    parameters = sum(ref.size for ref in plan.source.tensors.values())
    tokens = min(MEASURED_TOKENS, int(MOST_WORK // max(1, parameters)))
    return tokens if tokens >= LEAST_TOKENS else 0


def compare(
    plan: Plan,
    artifact: Artifact,
    *,
    check: bool = True,
    reference: Answers | None = None,
    progress: Progress = unwatched,
) -> dict[str, dict[str, Any]]:
    """``survival`` and ``quality`` of ``artifact``, made by ``plan``, for the manifest.

    Each where it has something to say; without ``check`` where a limit was set. One pass over the
    text serves both. ``reference``: the source's answers, None for those of the float network.
    Raises what ``check_survival`` and ``check_quality`` do.
    """
    from edgellm.lora.check.survival import Shared
    from edgellm.lora.check.surviving import check_survival

    found: dict[str, dict[str, Any]] = {}
    shared, runtime = Shared(), ""
    if plan.source.merge is not None and (check or plan.recipe.min_survival):
        found["survival"] = check_survival(plan, artifact, shared=shared, progress=progress)
        runtime = found["survival"].get("runtime", "")
    if check or asked_for(plan.recipe):
        known = None if shared.text is None else (shared.text, shared.to_quantized, runtime)
        quality = check_quality(plan, artifact, known=known, reference=reference, progress=progress)
        if quality:
            found["quality"] = quality
    return found


def check_quality(
    plan: Plan,
    artifact: Artifact,
    *,
    known: tuple[TextWindows, Comparison, str] | None = None,
    reference: Answers | None = None,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """The quality of ``artifact``, made by ``plan``, as plain values for the manifest.

    ``known``: what another check has compared of them already, on which runtime. ``skipped`` says
    why nothing was compared; the dict is empty where there was nothing to compare. ``rejected``
    says which limit is exceeded. Raises ``VerificationError`` for an artifact that does not run,
    and ``RuntimeMissing`` or ``UnsupportedTarget`` where a limit cannot be checked.
    """
    from edgellm.evaluation_text import Cut, Passage, scored_text

    tokens = check_tokens(plan)
    if not tokens:
        floats = all(tensor.grid.kind == "float" for tensor in plan.layout.tensors)
        return {} if floats else {"skipped": _too_large(plan)}
    started = time.perf_counter()
    read = text_of(plan, tokens) if known is None else known[0]
    pieces = Cut(tuple(Passage(ids, 0) for ids in read.windows), "all", MEASURED_WINDOW)
    if known is not None:
        _, comparison, runtime = known
    else:
        try:
            comparison, runtime = _compare(plan, artifact, pieces, reference, progress)
        except (RuntimeMissing, UnsupportedTarget, UnsupportedModel) as error:
            if asked_for(plan.recipe):
                raise
            return {"skipped": f"not compared: {error}"}
    words, text_bytes = scored_text(plan.source.tokenizer, pieces.passages)
    found = Quality(
        **msgspec.structs.asdict(comparison.figures(words, text_bytes)),
        text=read.name,
        corpus_sha256=read.text_sha256,
        windows_sha256=pieces.sha256(),
        scored=pieces.description,
        runtime=runtime,
        reference=NO_RUNTIME if reference is None else reference.runtime,
        evaluate_s=round(time.perf_counter() - started, 3),
    )
    facts: dict[str, Any] = msgspec.to_builtins(found)
    return facts | {"rejected": rejection(found, plan.recipe)}


def text_of(plan: Plan, tokens: int) -> TextWindows:
    """The text that the artifact of ``plan`` is compared on."""
    source, layout = plan.source, plan.layout
    room = min(layout.context_length, source.decoder.context_length)
    return evaluation_windows(source.tokenizer, plan.recipe.check_text, tokens=tokens, context=room)


def rejection(found: Figures, recipe: Recipe) -> str:
    """Which of the recipe's limits ``found`` exceeds, in words; empty where none."""
    assert found.kld_mean is not None
    assert found.perplexity_increase is not None
    if recipe.max_kld is not None and found.kld_mean > recipe.max_kld:
        return (
            f"the answers are {_with_error(found.kld_mean, found.kld_mean_stderr)} nats (KL) from "
            f"the source's, and --max-kld allows {recipe.max_kld:g}"
        )
    limit = recipe.max_ppl_increase
    if limit is not None and 100 * found.perplexity_increase > limit:
        error = found.perplexity_increase_stderr
        more = _with_error(100 * found.perplexity_increase, None if error is None else 100 * error)
        return (
            f"the perplexity is {more} % above the source's, and --max-ppl-increase allows "
            f"{limit:g} %"
        )
    return ""


def verdict(measured: dict[str, Any]) -> str:
    """Why a manifest's ``measured`` part says that the artifact is not to be kept, or nothing."""
    rejected: str = measured.get("quality", {}).get("rejected", "")
    return rejected


def refusal(rejected: str, aside: Path, recipe: Recipe) -> VerificationError:
    """The error of an artifact that is rejected, and was put ``aside``, with the next step."""
    better = ["more bits (--quant q5_k_m, q6_k, q8_0 or int8)", "or another limit"]
    if recipe.solver != BEST_SOLVER:
        grid = recipe.grid or "GRID"
        better.insert(1, f"a solver that makes good its errors (--quant {BEST_SOLVER}:{grid})")
    return VerificationError(
        f"{rejected} (text: {recipe.check_text or BUILT_IN}). It does not take its place and is "
        f"kept apart, in {aside}: choose {', '.join(better)}"
    )


def quality_line(measured: dict[str, Any], out: str, source: str) -> str:
    """What a manifest's ``measured`` part says of the answers, in one line; empty where nothing.

    ``out`` and ``source`` are named in the command that compares what was not.
    """
    found = measured.get("quality")
    if not found:
        return ""
    if "skipped" in found:
        return f"{found['skipped']} (edgellm eval {out} --reference {source})"
    by_values = ", by its values in float" if found["runtime"] == NO_RUNTIME else ""
    return (
        f"KL {_with_error(found['kld_mean'], found['kld_mean_stderr'])} nats to the source, "
        f"top-1 {found['top1_agreement']:.0%}, perplexity {found['reference_perplexity']:.4g} -> "
        f"{found['perplexity']:.4g} ({found['tokens']:,} tokens{by_values})"
    )


def _compare(
    plan: Plan,
    artifact: Artifact,
    pieces: Cut,
    reference: Answers | None,
    progress: Progress,
) -> tuple[Comparison, str]:
    """The artifact's answers against the source's, and the runtime that gave them."""
    from edgellm.answers import FloatAnswers
    from edgellm.side_by_side import compared

    room = max(len(ids) for ids in pieces.windows)
    if reference is None:
        reference = FloatAnswers(plan.source, threads=plan.threads, progress=progress)
    try:
        with closing(_open(artifact, room, plan.threads, progress)) as made:
            comparison, _ = compared([made, reference], pieces, progress)
            return comparison, made.runtime
    except GenerationError as error:
        raise VerificationError(
            f"what was made does not run, and is not kept (--no-check would): {error}"
        ) from error


def _open(artifact: Artifact, room: int, threads: int, progress: Progress) -> Answers:
    """The artifact on its runtime, without adapters that were kept beside it: the source has none.

    Where no runtime here opens it, or none that is quick, its weights in float.
    """
    from edgellm.answers import FLOAT, SessionAnswers, open_answers, runs_quickly
    from edgellm.chat import open as open_model  # a backend takes long to import

    readable = artifact.container in READ_BACK
    if not readable or runs_quickly(artifact.container):
        try:
            return SessionAnswers(
                open_model(
                    artifact.path, verify=False, context_tokens=room, threads=threads, adapters=[]
                )
            )
        except (RuntimeMissing, UnsupportedTarget):
            if not readable:
                raise
    return open_answers(str(artifact.path), runtime=FLOAT, threads=threads, progress=progress)


def _too_large(plan: Plan) -> str:
    parameters = sum(ref.size for ref in plan.source.tensors.values())
    return (
        f"not compared with the source: with {parameters / 1e9:.1f} billion parameters it takes "
        "longer than is done unasked (--check-tokens N does it)"
    )


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.3g}" + ("" if error is None else f" ± {error:.2g}")
