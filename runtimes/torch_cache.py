"""Keys and values for transformers' models, in buffers that grow by doubling.

transformers' own cache copies all of a layer's keys and values for every token. A window's keeps
only what the window sees, and could not be trimmed back; here the window is a mask alone.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from edgellm.errors import UnsupportedModel
from edgellm.hardware import free_memory_bytes
from edgellm.runtimes import limits
from edgellm.runtimes.kv_buffers import next_room

Arrays = tuple[torch.Tensor, ...]

GROUP = 32
"""Values of a key that share a scale where the cache is rounded, as in ggml's q8_0."""


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values, each ``[1, kv_heads, used, head_dim]``.

    What is kept of them are arrays with the tokens in the third place, views into larger buffers.
    The first of ``count`` layers, which is the ``lead`` of the others, chooses how much room all
    make.
    """

    exact = True
    """Whether what is kept is what came in."""

    def __init__(self, most_tokens: int, count: int = 1, lead: GrowingLayer | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most_tokens, self.count, self.lead = most_tokens, count, lead
        self.used = 0
        self.buffers: Arrays = ()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new ones; all of them."""
        first = self.used == 0
        self.append((*self.encoded(key_states), *self.encoded(value_states)))
        if first and self.exact:
            return key_states, value_states  # in one piece, which attention reads faster
        held = self.held()
        half = len(held) // 2
        # Not kept as the layer's own: that would be all of them as floats, until the next token.
        return self.decoded(held[:half], key_states), self.decoded(held[half:], value_states)

    def encoded(self, states: torch.Tensor) -> Arrays:
        """What is kept of keys or values."""
        return (states,)

    def decoded(self, arrays: Arrays, like: torch.Tensor) -> torch.Tensor:
        """Keys or values of the type of ``like``, from what was kept of them."""
        return arrays[0]

    def append(self, arrays: Arrays) -> None:
        """Keep these arrays behind those that are held, in buffers that grow where they must.

        Raises ``GenerationError`` before a CPU's memory is taken that it has not.
        """
        start, used = self.used, self.used + arrays[0].shape[2]
        if used > self.room:
            room = self.lead.room if self.lead else self._fitting(used, arrays)
            grown = tuple(
                each.new_empty((1, each.shape[1], room, each.shape[3])) for each in arrays
            )
            for buffer, old in zip(grown, self.held(), strict=False):
                buffer[:, :, :start] = old
            self.buffers = grown
            self.is_initialized = True
        for buffer, new in zip(self.buffers, arrays, strict=True):
            buffer[:, :, start:used] = new
        self.used = used

    @property
    def room(self) -> int:
        """How many tokens there is memory for."""
        return self.buffers[0].shape[2] if self.buffers else 0

    def _fitting(self, needed: int, arrays: Arrays) -> int:
        """Room to grow to: no more than ``needed`` where the usual does not fit into all layers."""
        room = next_room(self.room, needed, self.most_tokens)
        if arrays[0].device.type != "cpu":
            return room  # how much a GPU has left is known to its driver alone
        token_bytes = sum(each.nbytes // each.shape[2] for each in arrays) * self.count
        free = free_memory_bytes()
        room = room if room * token_bytes <= free else needed
        limits.check_kv_memory(room * token_bytes, free, "a smaller --context, or --kv-cache int8")
        return room

    def held(self) -> Arrays:
        """What is kept of the tokens that are held; nothing before the first one ever."""
        return tuple(buffer[:, :, : self.used] for buffer in self.buffers)

    def get_seq_length(self) -> int:
        """How many tokens are held."""
        return self.used


class Int8Layer(GrowingLayer):  # type: ignore[no-untyped-call]
    """Keys and values as whole numbers of -127 to 127 times a half for each group."""

    exact = False

    def encoded(self, states: torch.Tensor) -> Arrays:
        groups = _grouped(states)
        scales = (groups.abs().amax(-1) / 127).to(torch.float16)
        codes = torch.round(groups / _divisors(scales)).clamp(-127, 127).to(torch.int8)
        return codes.reshape(states.shape), scales

    def decoded(self, arrays: Arrays, like: torch.Tensor) -> torch.Tensor:
        codes, scales = arrays
        values = _grouped(codes) * scales.float().unsqueeze(-1)
        return values.reshape(codes.shape).to(like.dtype)


class Int4Layer(GrowingLayer):  # type: ignore[no-untyped-call]
    """Keys and values as one of 16 even steps from a minimum, two to a byte."""

    exact = False

    def encoded(self, states: torch.Tensor) -> Arrays:
        groups = _grouped(states)
        least = groups.amin(-1).to(torch.float16)
        scales = ((groups.amax(-1) - least.float()) / 15).to(torch.float16)
        steps = (groups - least.float().unsqueeze(-1)) / _divisors(scales)
        codes = torch.round(steps).clamp(0, 15).to(torch.uint8).reshape(states.shape)
        return codes[..., 0::2] | codes[..., 1::2] << 4, scales, least

    def decoded(self, arrays: Arrays, like: torch.Tensor) -> torch.Tensor:
        pairs, scales, least = arrays
        codes = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
        values = _grouped(codes) * scales.float().unsqueeze(-1) + least.float().unsqueeze(-1)
        return values.reshape(codes.shape).to(like.dtype)


ROUNDED: dict[str, type[GrowingLayer]] = {"int8": Int8Layer, "int4": Int4Layer}


def _grouped(values: torch.Tensor) -> torch.Tensor:
    """``[..., groups, values]`` in float32: of ``GROUP`` where that divides a head, else of one."""
    width = values.shape[-1]
    group = GROUP if width % GROUP == 0 else width
    return values.float().reshape(*values.shape[:-1], width // group, group)


def _divisors(scales: torch.Tensor) -> torch.Tensor:
    """As they are kept, so that codes are the nearest ones; 1 where all values are the same."""
    kept = scales.float().unsqueeze(-1)
    return torch.where(kept == 0, 1.0, kept)


def check_layers(config: Any) -> Any:
    """transformers' own cache for a model of ``config``.

    Raises ``UnsupportedModel`` where its layers keep more than keys and values.
    """
    usual = DynamicCache(config=config)
    kinds = {type(layer) for layer in usual.layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise UnsupportedModel(
            f"{config.model_type} keeps more than keys and values ({names}), which cannot be "
            "forgotten token by token: run it with transformers itself"
        )
    return usual


def growing_cache(config: Any, most_tokens: int, kv_dtype: str) -> Any:
    """A cache for a model of ``config``, rounded where ``kv_dtype`` is of ``ROUNDED``.

    Raises ``UnsupportedModel`` for other kinds of layers.
    """
    usual = check_layers(config)
    kind = ROUNDED.get(kv_dtype, GrowingLayer)
    lead = kind(most_tokens, len(usual.layers))
    return Cache(layers=[lead, *(kind(most_tokens, lead=lead) for _ in usual.layers[1:])])
