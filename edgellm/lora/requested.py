"""The adapters that a recipe asks for, opened and merged into its base before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgellm.calibration.texts import check_readable
from edgellm.errors import AdapterError, UnsupportedTarget, UsageError
from edgellm.lora.adapter import Adapter
from edgellm.lora.base.bases import common_base
from edgellm.lora.binding import Combination
from edgellm.lora.check.doctor import check_static
from edgellm.lora.combine.check import check, settled
from edgellm.lora.merging import merged_source
from edgellm.lora.reading.open import open_adapter
from edgellm.progress import Progress, unwatched
from edgellm.recipe import DEQUANTIZED
from edgellm.source.quantized import stored_as

if TYPE_CHECKING:
    from edgellm.export.layout import Container, Layout
    from edgellm.recipe import Recipe
    from edgellm.source import ModelSource


def with_adapters(
    base: ModelSource, recipe: Recipe, *, progress: Progress = unwatched
) -> ModelSource:
    """``base`` with the adapters of ``recipe`` merged into it; ``base`` itself where it has none.

    Raises ``AdapterError`` for an adapter that is damaged, or does not match the base, and
    ``UsageError`` for what cannot be combined as asked.
    """
    if not recipe.adapters:
        return base
    adapters, combination, facts = opened(recipe, progress=progress)
    trained_on = common_base(adapters, base, recipe.merge_base)
    source = merged_source(trained_on.of(base), adapters, combination)
    assert source.merge is not None
    report = check_static(source, allow_untrained=recipe.allow_untrained)
    into = f"{trained_on.kind} {trained_on.method}".strip()
    return replace(
        source,
        notes=(
            *report.warnings,
            trained_on.reason,
            *trained_on.notes,
            *report.notes,
            *facts,
        ),
        merge=replace(source.merge, into=into, reason=trained_on.reason),
    )


def opened(
    recipe: Recipe, *, progress: Progress = unwatched
) -> tuple[list[Adapter], Combination, tuple[str, ...]]:
    """The adapters of ``recipe``, how they are combined, and facts that the user should be shown.

    Raises as ``with_adapters`` does, for all that can be known without the base.
    """
    if recipe.check_text is not None:
        check_readable(recipe.check_text)
    adapters = [
        open_adapter(spec, ignore_config_keys=recipe.ignore_config_keys, progress=progress)
        for spec in recipe.adapter_specs()
    ]
    _refuse_twice(adapters)
    combination = settled(recipe.combination(), [adapter.config for adapter in adapters])
    return adapters, combination, check(combination, [adapter.weight for adapter in adapters])


def kept_apart(
    layout: Layout,
    base: ModelSource,
    container: Container,
    recipe: Recipe,
    progress: Progress = unwatched,
) -> Layout:
    """``layout`` of the bare ``base`` with the adapters of ``recipe`` beside it, unmerged.

    Raises ``UnsupportedTarget`` for a container whose runtime applies none, ``UsageError`` for
    options that are about merging, and ``AdapterError`` for what cannot stay apart, or would be
    refused when it is merged.
    """
    if container.keep_apart is None:
        raise UnsupportedTarget(
            f"--keep-adapters: an artifact of the format {container.name} has no inputs for "
            "adapters, so nothing could apply them beside it: choose --format gguf, or leave "
            "--keep-adapters out to merge them"
        )
    merging = (
        "density",
        "sign",
        "combine_rank",
        "seed",
        "merge_base",
        "min_survival",
    )
    given = [name for name in merging if getattr(recipe, name) is not None]
    if recipe.combine not in (None, "cat"):
        given.insert(0, "combine")
    if recipe.merge_base == DEQUANTIZED and stored_as(base.tensors):
        given.remove("merge_base")  # here it says that the base itself may be rounded again
    if given:
        raise UsageError(
            f"--{given[0].replace('_', '-')} says how adapters are merged, and --keep-adapters "
            "leaves them apart (applied together they are summed): leave one of the two out"
        )
    adapters, _, facts = opened(recipe, progress=progress)
    apart = container.keep_apart(layout, base, adapters)
    # Not to be written: what is wrong with a merge is wrong with both side by side.
    merged = merged_source(base, adapters, Combination())
    report = check_static(merged, allow_untrained=recipe.allow_untrained)
    found = [note for note in report.notes if note not in merged.notes]
    notes = [note for adapter in adapters for note in adapter.notes]
    return replace(apart, notes=(*report.warnings, *apart.notes, *found, *notes, *facts))


def _refuse_twice(adapters: list[Adapter]) -> None:
    """The same files twice are a slip: one weight says what is meant."""
    seen: dict[str, Adapter] = {}
    for adapter in adapters:
        twin = seen.setdefault(adapter.digest(), adapter)
        if twin is not adapter:
            raise AdapterError(
                f"{twin.path} and {adapter.path} are the same adapter: name it once, with the sum "
                f"of both weights ({adapter.path}={twin.weight + adapter.weight:g})"
            )
