"""The adapters that a recipe asks for, opened and merged into its base before a weight is read."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgellm.errors import AdapterError, UsageError
from edgellm.lora.adapter import Adapter
from edgellm.lora.binding import Combination
from edgellm.lora.combine.check import check, settled
from edgellm.lora.merging import merged_source
from edgellm.lora.open import open_adapter
from edgellm.progress import Progress, unwatched

if TYPE_CHECKING:
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
    source = merged_source(base, adapters, combination)
    return replace(source, notes=(*source.notes, *facts))


def opened(
    recipe: Recipe, *, progress: Progress = unwatched
) -> tuple[list[Adapter], Combination, tuple[str, ...]]:
    """The adapters of ``recipe``, how they are combined, and facts that the user should be shown.

    Raises as ``with_adapters`` does, for all that can be known without the base.
    """
    refuse_what_is_missing(recipe)
    adapters = [open_adapter(spec, progress=progress) for spec in recipe.adapter_specs()]
    _refuse_twice(adapters)
    combination = settled(recipe.combination(), [adapter.config for adapter in adapters])
    return adapters, combination, check(combination, [adapter.weight for adapter in adapters])


def refuse_what_is_missing(recipe: Recipe) -> None:
    """Raise ``UsageError`` for options that are understood and not there yet."""
    for name in ("merge_base", "keep_adapters", "min_survival"):
        if getattr(recipe, name) not in (None, False):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} is not available in this version: leave it out")


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
