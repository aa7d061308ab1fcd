"""Scales of a cache of int8 keys and values, from the weights alone.

What a norm lets through is about one in every place, so channel ``c`` of the keys spreads by the
length of its row of weights times the norm's weights, ``|w_c * g|``, around its bias. A value so
many spreads away from the bias is the largest that 127 stands for; what lies beyond is clipped. The
ropes turn two channels into one another, which therefore share a scale.

SmolLM2-135M with f32 weights over held-out text, KL to the f32 cache in nats by spreads of keys and
values: 10 and 6 0.006, 14 and 6 0.009, 10 and 9 0.010, 14 and 9 0.014, 20 and 12 0.024.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgellm.architectures.decoder import Decoder, Rope
from edgellm.architectures.latent import Latent
from edgellm.architectures.rope import inverse_frequencies
from edgellm.tensors import Array, TensorRef, rows_within

KEY_SPREADS = 10.0
VALUE_SPREADS = 6.0
"""How many spreads 127 stands for. Keys reach farther: some channels hardly depend on the text."""

LARGEST_CODE = 127

CHUNK_BYTES = 1 << 20
"""Float32 bytes of weights that are alive at once."""

Vector = npt.NDArray[np.float64]
Reach = Callable[[], Vector]
Join = Callable[[Vector, Vector], Vector]


@dataclass(frozen=True, slots=True)
class CacheScales:
    """Makes the scales of one layer's cache; ``tensors`` are the source's, by role."""

    decoder: Decoder
    tensors: Mapping[str, TensorRef]
    index: int

    def keys(self) -> TensorRef:
        """``[cache_heads * cache_dim]``, f32; the weights are read when it is loaded."""
        return self._lazy("attn_k_cache.scale", self._key_reach)

    def values(self) -> TensorRef:
        """``[cache_heads * cache_dim]``, f32; the weights are read when it is loaded."""
        # A latent that is cached is key and value at once.
        reach = self._key_reach if self.decoder.latent else self._value_reach
        return self._lazy("attn_v_cache.scale", reach)

    def _lazy(self, part: str, reach: Reach) -> TensorRef:
        role = f"blk.{self.index}.{part}"
        size = self.decoder.cache_heads * self.decoder.cache_dim

        def load_rows(start: int, stop: int) -> Array:
            found = reach()
            # A channel that is always zero stays so with any scale but zero.
            scale = np.where(found > 0, found, 1.0) / LARGEST_CODE
            return scale.astype(np.float32)[np.newaxis][start:stop]

        return TensorRef(role, role, (size,), "f32", 4 * size, load_rows)

    # --- the largest value that each channel can hold --------------------------------------------

    def _key_reach(self) -> Vector:
        rope = self.decoder.layers[self.index].rope
        if self.decoder.latent is not None:
            return self._latent_reach(self.decoder.latent, rope)
        if self.decoder.qk_norm:
            # A head's values have a mean square of one before the weights: none exceeds this.
            weight = np.abs(self._norm_weight("attn_k_norm"))
            if self.decoder.qk_norm_by_head:
                weight = weight * self.decoder.head_dim**0.5
            elif not self.decoder.qk_norm_whole:
                weight = np.tile(weight, self.decoder.kv_heads) * self.decoder.head_dim**0.5
            else:
                weight = weight * self.decoder.kv_size**0.5
            return self._turned(weight, rope, np.maximum)
        center, spread = self._centers_and_spreads("attn_k", self.decoder.query_size)
        spread = self._turned(spread, rope, lambda one, other: np.hypot(one, other) / 2**0.5)
        reach = self._turned(np.abs(center), rope, np.hypot) + KEY_SPREADS * spread
        clip = self.decoder.qkv_clip or np.inf
        # Two clipped values that are turned into one another reach the corner of their square.
        return np.minimum(reach, self._turned(np.full_like(reach, clip), rope, np.hypot))

    def _latent_reach(self, latent: Latent, rope: Rope | None) -> Vector:
        """The turned values, as keys are, and the latent behind its norm: of mean square one."""
        center, spread = self._of_rows("attn_kv_a_mqa", latent.rank, latent.rope_dim)
        spread = self._turned(spread, rope, lambda one, other: np.hypot(one, other) / 2**0.5)
        turned = self._turned(np.abs(center), rope, np.hypot) + KEY_SPREADS * spread
        most = min(KEY_SPREADS, latent.rank**0.5)
        latents = most * np.abs(self._norm_weight("attn_kv_a_norm"))
        return np.concatenate([turned, latents, np.zeros(latent.cache_dim - latent.width)])

    def _value_reach(self) -> Vector:
        first = self.decoder.query_size + self.decoder.kv_size
        center, spread = self._centers_and_spreads("attn_v", first)
        return np.minimum(np.abs(center) + VALUE_SPREADS * spread, self.decoder.qkv_clip or np.inf)

    def _turned(self, reach: Vector, rope: Rope | None, join: Join) -> Vector:
        """``reach`` with every two channels that the rope turns into one another joined."""
        if rope is None:
            return reach
        _, factor = inverse_frequencies(rope)
        heads = reach.reshape(self.decoder.cache_heads, -1).copy()
        half = rope.dimensions // 2
        one, other = heads[:, :half], heads[:, half : 2 * half]
        heads[:, :half] = heads[:, half : 2 * half] = factor * join(one, other)
        return heads.reshape(-1)

    def _centers_and_spreads(self, part: str, fused_first: int) -> tuple[Vector, Vector]:
        """By channel: the value at the middle of the norm's outputs, and the spread around it.

        ``fused_first`` is the first row of the part where q, k and v are one tensor.
        """
        if self.decoder.fused_qkv:
            return self._of_rows("attn_qkv", fused_first, self.decoder.kv_size)
        return self._of_rows(part, 0, self.decoder.kv_size)

    def _of_rows(self, part: str, first: int, size: int) -> tuple[Vector, Vector]:
        """The same for ``size`` rows of a product from ``first`` on."""
        role = f"blk.{self.index}.{part}"
        weight, bias = self.tensors[f"{role}.weight"], self.tensors.get(f"{role}.bias")
        gain, middle = self._norm_weight("attn_norm"), self._norm_bias("attn_norm")
        center, spread = np.empty(size), np.empty(size)
        step = rows_within(CHUNK_BYTES, weight.columns)
        for start in range(0, size, step):
            stop = min(start + step, size)
            rows = weight.load_rows(first + start, first + stop)
            center[start:stop] = rows @ middle
            spread[start:stop] = np.linalg.norm(rows * gain, axis=1)
        if bias is not None:
            center += bias.load_rows(0, 1).reshape(-1)[first : first + size]
        return center, spread

    def _norm_weight(self, name: str) -> Vector:
        if not self.decoder.norm.weight:
            return np.ones(self.decoder.hidden_size)
        weight = self.tensors[f"blk.{self.index}.{name}.weight"].load().reshape(-1)
        return weight.astype(np.float64) + float(self.decoder.norm.offset)

    def _norm_bias(self, name: str) -> Vector:
        bias = self.tensors.get(f"blk.{self.index}.{name}.bias")
        if bias is None:
            return np.zeros(self.decoder.hidden_size)
        return bias.load_rows(0, 1).reshape(-1).astype(np.float64)
