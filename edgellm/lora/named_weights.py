"""Adapters put on a base by the Hugging Face names of its weights: the one place that knows which
weight an adapter means.

A base whose family is known gives its weights with their roles and orientations; any other gives
what its checkpoint holds. Nothing is loaded here: what comes back loads slab by slab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgellm.lora.adapter import Adapter
from edgellm.lora.edit import Target
from edgellm.lora.merging import Binding, Combination
from edgellm.tensors import TensorRef


@dataclass(frozen=True, slots=True)
class NamedWeight:
    """A weight that an adapter may change. ``ref`` is canonical: ``[out, in]``, turned if need be.

    ``ref.role`` is its GGUF name where the family is known, else its own name.
    """

    target: Target
    ref: TensorRef


@dataclass(frozen=True)
class NamedWeights:
    """A base model by the names of its checkpoint.

    ``where`` names it in messages. ``embedding`` and ``head`` are the names of the two tables of
    token rows, None where unknown; a ``tied`` head has no weight of its own. ``prefix`` may be
    missing from, or be added to, an adapter's names (``model.``).
    """

    where: str
    weights: dict[str, NamedWeight]
    embedding: str | None
    head: str | None
    tied: bool
    prefix: str = ""


@dataclass(frozen=True)
class MergedWeights:
    """What the adapters make of a base; names, shapes and orientation as the base has them.

    ``changed`` holds the weights that differ, and a head that was tied before and is no longer.
    ``bindings``: what each adapter does to which weight, in the order of the adapters. ``tied``:
    whether head and embedding are still one table. ``notes`` are facts that the user should see.
    """

    changed: dict[str, TensorRef]
    bindings: tuple[Mapping[str, Binding], ...]
    tied: bool
    notes: tuple[str, ...] = ()


def merge_by_name(
    base: NamedWeights, adapters: Sequence[Adapter], combination: Combination
) -> MergedWeights:
    """The weights of ``base`` as if ``adapters`` had been trained into it.

    Raises ``AdapterError`` for keys that match no weight, shapes that do not fit, two adapters that
    replace the same weight, and one of a tied pair trained alone where that cannot be told apart.
    """
    raise NotImplementedError
