"""Whether a conversion measures how much of a fine-tune survived, and keeps what was made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from edgellm.progress import Progress, unwatched

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.lora.check.survival import Shared
    from edgellm.plan import Plan

TOO_LARGE = (
    "not measured: on a model of this size it would take longer than the conversion; "
    "--min-survival SHARE or --check-text FILE measure it all the same"
)


def check_survival(
    plan: Plan,
    artifact: Artifact,
    *,
    shared: Shared | None = None,
    progress: Progress = unwatched,
) -> dict[str, Any]:
    """The survival of the adapters of ``plan`` in ``artifact``, as plain values for the manifest.

    Measured where it was asked for (``min_survival``, ``check_text``), and unasked where that
    is quick; else ``skipped`` says why not. Raises ``VerificationError`` where less is left than
    was asked for, by default ``survival.MIN_SURVIVAL``. ``shared`` takes up what the pass compared.
    """
    from edgellm.calibration.texts import MEASURED_TOKENS
    from edgellm.lora.check.survival import affordable, measure, require

    recipe = plan.recipe
    if recipe.min_survival is None and recipe.check_text is None and not affordable(plan.source):
        return {"skipped": TOO_LARGE}
    found = measure(
        plan.source,
        plan.layout,
        artifact,
        text=recipe.check_text,
        tokens=recipe.check_tokens or MEASURED_TOKENS,
        shared=shared,
        threads=plan.threads,
        progress=progress,
    )
    require(found, recipe.min_survival)
    facts: dict[str, Any] = msgspec.to_builtins(found)
    return facts | {"median_cosine": found.median_cosine}


def survival_line(measured: dict[str, Any]) -> str:
    """What a manifest's ``measured`` part says of survival, in one line; empty where nothing."""
    found = measured.get("survival")
    if not found:
        return ""
    if "skipped" in found:
        return str(found["skipped"])
    cosine = found.get("median_cosine")
    directions = "" if cosine is None else f"; median cosine of the changes {cosine:.3f}"
    if found["survival"] is None:
        return f"could not be measured: {found['reason']}{directions}"
    return (
        f"{found['survival']:.1%} of the fine-tune is left after rounding "
        f"(KL {found['from_base']['kl']:.3g} to the base, {found['from_quantized']['kl']:.3g} to "
        f"what was rounded; text: {found['text']}){directions}"
    )
