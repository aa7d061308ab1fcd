"""Attention of the decoder graph: queries, keys and values, and the cache of them.

Past keys and values ``[batch, cache_heads, past, cache_dim]`` are inputs ``past_key_values.N.key``
and ``.value``, and with the step's they are outputs ``present.N.key`` and ``.value``. q, k and v
are one product where the attention takes them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from edgellm.architectures.decoder import Decoder, Rope
from edgellm.architectures.latent import Latent
from edgellm.export.kv_scales import CacheScales
from edgellm.export.latent_attention import (
    BY_HEAD,
    absorbed_queries,
    expanded_values,
    expansion,
    filled,
    mixed_latents,
)
from edgellm.export.linear_graph import FLOAT, LinearGraph
from edgellm.export.norms_graph import NormsGraph
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.positions_graph import PositionsGraph

BIAS_PLACE = 10
"""Where ``attention_bias`` stands among GroupQueryAttention's inputs."""

SCALES_PLACE = 12
"""Where ``k_scale`` and ``v_scale`` stand among GroupQueryAttention's inputs."""

TURNED = 16
"""What divides the values of a head that GroupQueryAttention turns itself."""


@dataclass(frozen=True)
class AttentionGraph:
    """Writes the attention of ``decoder``'s layers into ``graph``.

    ``linear``, ``norms`` and ``positions`` write its products, its norms and where tokens stand.
    ``int8_cache``: past and present are int8 by channel instead of what the graph computes in.
    """

    graph: GraphBuilder
    decoder: Decoder
    linear: LinearGraph
    norms: NormsGraph
    positions: PositionsGraph
    int8_cache: bool

    def build(self, index: int, x: str, *, cached: bool) -> str:
        """What the output product of layer ``index`` is given, for the normed stream ``x``."""
        if self.decoder.latent is not None:
            return self._latent_attention(index, x, self.decoder.latent, cached=cached)
        query, key, value = self._queries_keys_values(index, x)
        return self._attended(index, f"blk.{index}.attn", (query, key, value), x, cached=cached)

    def _queries_keys_values(self, index: int, x: str) -> tuple[str, str, str]:
        """All three in one value, the others empty, unless queries and keys are normed apart."""
        graph, decoder = self.graph, self.decoder
        name = f"blk.{index}.attn"
        parts = [f"{name}_q", f"{name}_k", f"{name}_v"]
        if decoder.fused_qkv:
            packed = self.linear.of_layer(f"{name}_qkv", ["attn_qkv"], x, index)
        elif not decoder.qk_norm:
            packed = self.linear.of_layer(f"{name}_qkv", ["attn_q", "attn_k", "attn_v"], x, index)
        if decoder.qkv_clip is not None and not decoder.qk_norm:
            bounds = [
                graph.floats(f"qkv_clip.{name}", np.asarray(sign * decoder.qkv_clip, np.float32))
                for name, sign in (("low", -1), ("high", 1))
            ]
            packed = graph.node("Clip", [packed, *bounds], f"{name}_clipped")
        if not decoder.qk_norm:
            return packed, "", ""
        if decoder.fused_qkv:
            widths = graph.integers(decoder.query_size, decoder.kv_size, decoder.kv_size)
            graph.node("Split", [packed, widths], f"{name}_split", outputs=parts, axis=-1)
        else:
            for part in parts:
                self.linear.of_layer(part, [part.rpartition(".")[2]], x, index)
        query = self._normed_heads(parts[0], decoder.heads)
        return query, self._normed_heads(parts[1], decoder.kv_heads), parts[2]

    def _normed_heads(self, name: str, heads: int) -> str:
        """The queries or keys ``name`` with each head normed apart, or all of them together."""
        graph, decoder = self.graph, self.decoder
        if decoder.qk_norm_whole:
            return self.norms.alone(f"{name}_norm", name)
        by_head = graph.integers(0, -1, heads, decoder.head_dim)
        split = graph.node("Reshape", [name, by_head], f"{name}.heads")
        if decoder.qk_norm_by_head:
            normed = self.norms.by_head(f"{name}_norm", split)
        else:
            normed = self.norms.alone(f"{name}_norm", split)
        flat = graph.integers(0, -1, heads * decoder.head_dim)
        return graph.node("Reshape", [normed, flat], f"{name}.normed")

    def _attended(
        self, index: int, name: str, parts: tuple[str, str, str], x: str, *, cached: bool
    ) -> str:
        """What attention gives for queries, keys and values, the two turned where they are."""
        graph, decoder = self.graph, self.decoder
        query, key, value = parts
        layer = decoder.layers[index]
        past, present = self._past_present(index) if cached else (["", ""], [])
        one = bool(key) and key == value  # cached once where the runtime knows of it
        inside = layer.rope is not None and layer.rope.dimensions % TURNED == 0 and not one
        if layer.rope is not None and not inside:
            query, key, value = self._turned_apart(name, layer.rope, query, key, value)
            value = key if one else value
        inputs = [query, key, value, *past, "seqlens_k", "total_length"]
        if layer.rope is not None and inside:
            inputs += self.positions.rope(layer.rope)
        if decoder.alibi:
            inputs += [""] * (BIAS_PLACE - len(inputs))
            inputs.append(self.positions.alibi(x))
        cache = self._int8_cache(index, inputs) if self.int8_cache else {}
        return graph.node(
            "GroupQueryAttention", inputs, name, outputs=[name, *present], contrib=True,
            num_heads=decoder.heads, kv_num_heads=decoder.cache_heads, scale=decoder.softmax_scale,
            do_rotary=int(inside), local_window_size=layer.window or -1,
            softcap=decoder.attention_softcap or 0.0, **cache,
        )  # fmt: skip

    def _turned_apart(
        self, name: str, rope: Rope, query: str, key: str, value: str
    ) -> tuple[str, str, str]:
        """All three apart, queries and keys turned, which the attention then need not do."""
        graph, decoder = self.graph, self.decoder
        if not key:
            parts = [f"{name}.{part}" for part in ("queries", "keys", "values")]
            widths = graph.integers(decoder.query_size, decoder.kv_size, decoder.kv_size)
            graph.node("Split", [query, widths], f"{name}.parts", outputs=parts, axis=-1)
            query, key, value = parts
        places = self.positions.places(query)
        turned = [
            graph.node(
                "RotaryEmbedding", [x, places, *self.positions.rope(rope)], f"{x}.turned",
                contrib=True, num_heads=heads, rotary_embedding_dim=rope.dimensions,
            )
            for x, heads in ((query, decoder.heads), (key, decoder.cache_heads))
        ]  # fmt: skip
        return turned[0], turned[1], value

    def _latent_attention(self, index: int, x: str, latent: Latent, *, cached: bool) -> str:
        """Attention over latents, one head of keys for all queries, and what it gives expanded."""
        graph, decoder, heads = self.graph, self.decoder, self.decoder.heads
        name, rank = f"blk.{index}.attn", latent.query_rank
        first, width = ("attn_q", decoder.query_size) if rank is None else ("attn_q_a", rank)
        made = self.linear.of_layer(f"{name}_a", [first, "attn_kv_a_mqa"], x, index)
        query, latents, turned = (f"{name}_{part}" for part in ("low_q", "low_kv", "k_rope"))
        widths = graph.integers(width, latent.rank, latent.rope_dim)
        graph.node(
            "Split", [made, widths], f"{name}_a.parts", outputs=[query, latents, turned], axis=-1
        )
        if rank is not None:
            query = self.norms.alone(f"{name}_q_a_norm", query, latent.epsilon)
            query = self.linear.of_layer(f"{name}_q_b", ["attn_q_b"], query, index)
        latents = self.norms.alone(f"{name}_kv_a_norm", latents, latent.epsilon)
        expanding = f"blk.{index}.{BY_HEAD}"
        self.linear.inputs.setdefault(latents, []).append(expanding)
        keys, values = expansion(
            graph, latent, heads, self.linear.tensors[expanding], self.linear.grids.body
        )
        query = absorbed_queries(graph, latent, heads, f"{name}_q", query, keys)
        key = filled(graph, latent, f"{name}_k", [turned, latents], 3)
        if self.int8_cache:
            mixed = self._attended(index, f"{name}_mixed", (query, key, key), x, cached=cached)
            return expanded_values(graph, latent, heads, name, mixed, values)
        rope = decoder.layers[index].rope
        if rope is not None:
            query, key, _ = self._turned_apart(f"{name}_mixed", rope, query, key, key)
        held = self._held(index, key) if cached else key
        seen, total = self.positions.seen(x)
        mixed = mixed_latents(
            graph, latent, heads, decoder.softmax_scale, f"{name}_mixed",
            (query, held, seen, total),
        )  # fmt: skip
        return expanded_values(graph, latent, heads, name, mixed, values)

    def _held(self, index: int, key: str) -> str:
        """Latents ``[batch, total, cache_dim]`` of all tokens, those of the step among them.

        An attention of one query head appends them in place, as others do; what it gives is left.
        Behind a shorter sequence of a batch lies what its buffer began with, zeros with genai.
        """
        graph, name = self.graph, f"blk.{index}.attn_kept"
        past, present = self._past_present(index)
        graph.node(
            "GroupQueryAttention", [key, key, key, *past, "seqlens_k", "total_length"], name,
            outputs=[name, *present], contrib=True, num_heads=1, kv_num_heads=1,
        )  # fmt: skip
        ends = graph.integers(0), "positions.total", graph.integers(2)
        held = graph.node("Slice", [present[0], *ends], f"{name}.tokens")
        return graph.node("Squeeze", [held, graph.integers(1)], f"{name}.latents")

    def _past_present(self, index: int) -> tuple[list[str], list[str]]:
        """The cached keys and values that come in, and with the step's that leave."""
        element = TensorProto.INT8 if self.int8_cache else self.graph.element
        before, after = self._cache_shape("past"), self._cache_shape("total")
        past = [
            self.graph.input(f"past_key_values.{index}.{part}", element, before)
            for part in ("key", "value")
        ]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        for output in present:
            self.graph.output(output, element, after)
        return past, present

    def _cache_shape(self, extent: str) -> list[int | str]:
        heads, width = self.decoder.cache_heads, self.decoder.cache_dim
        return ["batch_size", heads, f"{extent}_sequence_length", width]

    def _int8_cache(self, index: int, inputs: list[str]) -> dict[str, Any]:
        """Add the scales of keys and values to ``inputs``; returns what the attention is told."""
        scales = CacheScales(self.decoder, self.linear.tensors, index)
        shape = [self.decoder.cache_heads, 1, self.decoder.cache_dim]
        inputs += [""] * (SCALES_PLACE - len(inputs))
        for ref in (scales.keys(), scales.values()):
            stored = self.graph.store(ref.role, [ref], FLOAT, "float")
            inputs.append(self.graph.stored(stored.arrays[0], TensorProto.FLOAT, shape))
        by_channel = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        return {**by_channel, "kv_cache_bit_width": 8}
