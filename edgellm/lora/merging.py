"""Adapters merged into a model: each changed tensor is computed slab by slab when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.lora.adapter import Adapter
from edgellm.lora.edit import Edit
from edgellm.source.model import ModelSource


@dataclass(frozen=True, slots=True)
class Combination:
    """How several adapters become one change: ``method`` is a row of ``combine.METHODS``.

    ``density``: the share of values that is kept, for the methods that prune. ``sign``: how ties
    elects signs (``total`` or ``frequency``). ``rank`` of the result, for the SVD methods; None for
    the largest of the adapters. ``seed`` of the random masks.
    """

    method: str = "cat"
    density: float | None = None
    sign: str = "total"
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Binding:
    """One adapter's change of one weight, and how strong it is wanted."""

    edit: Edit
    weight: float


def merged_source(
    source: ModelSource, adapters: Sequence[Adapter], combination: Combination
) -> ModelSource:
    """``source`` as if the adapters had been trained into it; no weight is read.

    Raises ``AdapterError`` for whatever does not match the base.
    """
    raise NotImplementedError


def bindings(source: ModelSource, adapter: Adapter) -> Mapping[str, Binding]:
    """The changes of ``adapter`` by role. Raises ``AdapterError`` for keys that match nothing."""
    raise NotImplementedError
