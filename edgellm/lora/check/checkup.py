"""``adapter-check``: what adapters would do to a base, and what is left of it in an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from edgellm.artifact import Artifact, open_artifact
from edgellm.errors import AdapterError, EdgeError, VerificationError
from edgellm.export import container_named
from edgellm.lora.check import doctor, survival
from edgellm.lora.check.doctor import AdapterReport
from edgellm.lora.check.survival import Survival
from edgellm.lora.requested import with_adapters
from edgellm.progress import Progress, unwatched
from edgellm.recipe import ONLY_CHECKED, Recipe, make_recipe
from edgellm.source import open_source
from edgellm.source.model import ModelSource


class Checkup(msgspec.Struct, frozen=True, kw_only=True):
    """A report, the survival in an artifact where one was given, and all that is wrong.

    ``exit_code`` is that of the first of ``faults``, 0 without any.
    """

    report: AdapterReport
    survival: Survival | None
    faults: tuple[str, ...]
    exit_code: int


def check_up(
    recipe: Recipe,
    *,
    artifact: Path | None = None,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> Checkup:
    """What the adapters of ``recipe`` do to its source, every changed weight read.

    With an ``artifact`` that was made of them, combined as it says, also how much of the fine-tune
    is left in it, on the recipe's ``check_text`` or the built-in one. Raises ``AdapterError``
    for adapters that match nothing or other ones than the artifact's, and what opening raises.
    """
    made = open_artifact(artifact) if artifact is not None else None
    if made is not None:
        recipe = _recipe_of(made, recipe)
    base = open_source(
        recipe.source,
        ignore_config_keys=recipe.ignore_config_keys,
        context=recipe.context,
        quantized=True,
        progress=progress,
    )
    # An untrained adapter is a fault among others here, to be reported with them.
    lenient = msgspec.structs.replace(recipe, allow_untrained=True)
    merged = with_adapters(base, lenient, progress=progress)
    report = doctor.check(
        merged, allow_untrained=recipe.allow_untrained, threads=threads, progress=progress
    )
    errors: list[EdgeError] = [AdapterError(fault) for fault in report.faults]
    left = None
    if made is not None:
        _refuse_others(made, merged)
        layout = container_named(made.container).lay_out(merged, recipe)
        left = survival.measure(
            merged,
            layout,
            made,
            text=recipe.check_text,
            threads=threads,
            progress=progress,
        )
        try:
            survival.require(left, recipe.min_survival)
        except VerificationError as error:
            errors.append(error)
    return Checkup(
        report=report,
        survival=left,
        faults=tuple(str(error) for error in errors),
        exit_code=errors[0].exit_code if errors else 0,
    )


def _recipe_of(artifact: Artifact, asked: Recipe) -> Recipe:
    """The recipe that ``artifact`` was made with, for the source and adapters of ``asked``."""
    if artifact.manifest is None or artifact.manifest.artifact.merge is None:
        raise AdapterError(
            f"{artifact.path} says of no adapter that it was merged into it, so nothing of one can "
            "be left: give an artifact that `edgellm convert --adapter` made"
        )
    given: Mapping[str, Any] = artifact.manifest.artifact.recipe
    ours = {name: getattr(asked, name) for name in ("source", "adapters", *ONLY_CHECKED)}
    return make_recipe({**given, **ours}, origin=str(artifact.path))


def _refuse_others(artifact: Artifact, merged: ModelSource) -> None:
    """Raise ``AdapterError`` unless ``artifact`` holds the very weights of ``merged``, rounded."""
    assert artifact.manifest is not None
    assert merged.merge is not None
    entry = artifact.manifest.artifact.merge
    assert entry is not None
    if entry.merged_sha256 == merged.merge.record.sha256():
        return
    names = ", ".join(f"{adapter.name}={adapter.weight:g}" for adapter in entry.adapters)
    raise AdapterError(
        f"{artifact.path} was made of {artifact.manifest.artifact.base.name} with {names}, and the "
        "base and adapters given come to other merged weights (by checksum): give the same base, "
        "adapters and weights, in the same order"
    )
