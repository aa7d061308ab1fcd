"""Mixtures of experts as GGUF has them: features of the graphs, keys, and stacks of weights."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.decoder import Decoder, Experts, Feature
from edgellm.architectures.experts import MOST_EXPERTS
from edgellm.architectures.family import GgufFacts, Value

NORMALIZED = frozenset({Feature.EXPERTS, Feature.NORMALIZED_ROUTER})
"""Of graphs that divide router weights by their sum, which is nothing that a key says there."""

PLAIN = frozenset({Feature.EXPERTS})
"""Of graphs that do not."""


def mixture_of(decoder: Decoder) -> Experts:
    """The experts of the layers that have some, which are alike in GGUF."""
    return next(layer.experts for layer in decoder.layers if layer.experts is not None)


def expert_keys(decoder: Decoder) -> dict[str, Value]:
    """The keys that all graphs with experts read."""
    experts = mixture_of(decoder)
    return {"expert_count": experts.count, "expert_used_count": experts.used}


def widths(decoder: Decoder) -> dict[str, Value]:
    """The keys of graphs whose experts have a width of their own."""
    experts = mixture_of(decoder)
    keys: dict[str, Value] = {"expert_feed_forward_length": experts.width}
    if experts.shared_width:
        keys["expert_shared_feed_forward_length"] = experts.shared_width
    return keys


def counts(facts: GgufFacts) -> tuple[int, int]:
    """How many experts a file says that there are, and that each token passes."""
    count = facts.keys.integer("expert_count", minimum=2, maximum=MOST_EXPERTS)
    return count, facts.keys.integer("expert_used_count", maximum=count)


def differences(decoder: Decoder) -> Iterator[str]:
    """What no graph with experts can be told, in words."""
    experts = mixture_of(decoder)
    if experts.count < 2:
        yield "a single expert"
