"""Adapters merged into a model: each changed tensor is computed slab by slab when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edgellm.lora.adapter import Adapter
from edgellm.lora.binding import Binding as Binding
from edgellm.lora.binding import Combination as Combination
from edgellm.source.model import ModelSource


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
