"""Keys and values for transformers' models, in buffers that grow by doubling.

transformers' own cache copies all of a layer's keys and values for every token. A window's keeps
only what the window sees, and could not be trimmed back; here the window is a mask alone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from edgellm.errors import UnsupportedModel
from edgellm.runtimes.kv_buffers import next_room


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values ``[1, kv_heads, used, head_dim]``: views into larger buffers."""

    def __init__(self, most_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_tokens = most_tokens
        self.used = 0
        self.buffers: tuple[torch.Tensor, ...] = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new ones; all of them."""
        start, used = self.used, self.used + key_states.shape[-2]
        self.reserve(used, (key_states, value_states))
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:used] = states
        self.used = used
        self.keys, self.values = self.held()
        return self.keys, self.values

    def reserve(self, total: int, like: tuple[torch.Tensor, ...]) -> None:
        """Have room for ``total`` tokens in buffers of the heads, widths and types of ``like``."""
        room = self.buffers[0].shape[2] if self.buffers else 0
        if total <= room:
            return
        room = next_room(room, total, self.most_tokens)
        grown = tuple(each.new_empty((1, each.shape[1], room, each.shape[3])) for each in like)
        for buffer, old in zip(grown, self.held(), strict=False):
            buffer[:, :, : self.used] = old
        self.buffers = grown
        self.is_initialized = True

    def held(self) -> tuple[torch.Tensor, ...]:
        """Keys and values of the tokens that are held; nothing before the first one ever."""
        return tuple(buffer[:, :, : self.used] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        """How many tokens are held."""
        return self.used


def growing_cache(config: Any, most_tokens: int) -> Any:
    """A cache for a model of ``config``; raises ``UnsupportedModel`` for other kinds of layers."""
    usual = DynamicCache(config=config)
    kinds = {type(layer) for layer in usual.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedModel(
            f"{config.model_type} keeps more than keys and values ({names}), which cannot be "
            "forgotten token by token: run it with transformers itself"
        )
    return Cache(layers=[GrowingLayer(most_tokens) for _ in usual.layers])
