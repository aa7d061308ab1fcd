"""A ``Decoder`` as an ONNX graph of onnxruntime's operators, with a KV cache as inputs and outputs.

Inputs: ``input_ids`` ``[batch, sequence]``, ``attention_mask`` ``[batch, total]``, past keys and
values ``[batch, cache_heads, past, cache_dim]`` (of a short convolution its state, see
``short_convolution``), and ``logits_from``, which may be left out: the first position of the step
whose logits are wanted, counted from the end when negative (-1, the last, is the default; 0 gives
all). Outputs: ``logits`` and the present keys and values. Past and present may share one buffer.

q, k and v are one product where the attention takes them together, and the residual sums ride in
the norms. Gate and up are two: as one they need a copy to part them, which no second thread helps
with and which costs a tenth of the prefill on two threads, and a token gains nothing. The step is
cut down to the wanted positions before the last attention output and feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto

from edgellm.architectures.decoder import Decoder, Feature, Rope
from edgellm.architectures.experts import ROUTER, SHARED_GATE, expert_of
from edgellm.architectures.family import SMALL_PRODUCT
from edgellm.architectures.latent import Latent
from edgellm.errors import UnsupportedTarget
from edgellm.export.experts_graph import ExpertsGraph, Routed, for_one_operator
from edgellm.export.kv_scales import CacheScales
from edgellm.export.latent_attention import (
    BY_HEAD,
    absorbed_queries,
    expanded_values,
    expansion,
    filled,
    mixed_latents,
)
from edgellm.export.layout import OutputTensor
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.export.rope_table import rope_tables
from edgellm.export.short_convolution import gated_convolution
from edgellm.export.state_space import StateSpaceLayer
from edgellm.quant.grid import GRIDS, Grid
from edgellm.quant.llm_int8 import channels_role, floats_role
from edgellm.tensors import Array, TensorRef, derived

EXPRESSIBLE = frozenset(Feature)
"""Features that this graph computes; each is proven against transformers in ``tests/parity``."""

FLOAT = GRIDS["f32"]

OUTLIERS = GRIDS["f16"]
"""What columns that are multiplied apart are stored in, as in the paper."""

BIAS_PLACE = 10
"""Where ``attention_bias`` stands among GroupQueryAttention's inputs."""

SCALES_PLACE = 12
"""Where ``k_scale`` and ``v_scale`` stand among GroupQueryAttention's inputs."""

TURNED = 16
"""What divides the values of a head that GroupQueryAttention turns itself."""

HEAD_INPUT = "output_norm"
"""The output of ``DecoderGraph.build_output_norm``."""

INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Grids:
    """On which grid the linear layers, the embedding and the head stand.

    ``by_role``: those linear layers whose grid is not the body's.
    """

    body: Grid
    embed: Grid
    head: Grid
    by_role: Mapping[str, Grid] = field(default_factory=dict)

    def of(self, roles: Sequence[str]) -> Grid:
        """The grid of the weights of ``roles``, which are stacked into one product.

        Raises ``UnsupportedTarget`` where they were given different ones.
        """
        names = {role: self.by_role.get(role, self.body) for role in roles}
        grid = names[roles[0]]
        if any(other != grid for other in names.values()):
            apart = ", ".join(f"{role} {other.name}" for role, other in names.items())
            raise UnsupportedTarget(
                f"tensor_grids: ONNX computes {' and '.join(roles)} as one product, which has one "
                f"grid, and they were given {apart}: give all of them the same, or --format gguf"
            )
        return grid


@dataclass
class DecoderGraph:
    """Writes ``decoder`` into ``graph``; ``tensors`` are the source's, by role.

    ``int8_cache``: past and present are int8 by channel instead of what the graph computes in.
    Logits are f32 whatever that is.
    """

    graph: GraphBuilder
    decoder: Decoder
    tensors: Mapping[str, TensorRef]
    grids: Grids
    context_length: int
    int8_cache: bool = False
    inputs: dict[str, list[str]] = field(default_factory=dict)
    """Roles of the weights that each value of the graph is multiplied by, layer by layer."""
    routed: Routed | None = None
    """Of a layer alone whose inputs are looked at, what its experts are given."""
    _taps: bool = False
    _counted: str = ""
    _biased: str = ""
    _ropes: dict[Rope, tuple[str, str]] = field(default_factory=dict)
    _apart: dict[str, tuple[str, str]] = field(default_factory=dict)

    def build(self) -> None:
        """Add the whole network: inputs, layers, head, outputs."""
        graph, decoder = self.graph, self.decoder
        graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        logits_from = graph.default_input("logits_from", np.asarray([-1], np.int64))
        self._count_positions()

        # `stream` is the residual stream, `branch` what is still to be added to it.
        stream, branch = self._embed(), ""
        last = len(decoder.layers) - 1
        for index in range(len(decoder.layers)):
            stream, branch = self._layer(
                index, stream, branch, logits_from if index == last else ""
            )
        normed, _ = self._norm("output_norm", stream, branch)
        self._head(self._scaled("output_norm.scaled", normed, decoder.logit_scale))

    def build_layer(self, index: int, *, taps: bool = False) -> None:
        """Add one layer alone: whole sequences of the residual stream go in and come out.

        Inputs: ``stream`` ``[batch, sequence, hidden]``, ``seqlens_k`` ``[batch]`` (tokens of each
        sequence less one) and ``total_length`` (tokens of the longest). Output: ``stream_out``;
        with ``taps``, the inputs of the layer's products too (``self.inputs`` names them).
        Nothing is cached, and no token before the sequence is seen.
        """
        graph, self._taps = self.graph, taps
        shape = self._stream_shape()
        stream = graph.input("stream", TensorProto.FLOAT, shape)
        graph.input("seqlens_k", TensorProto.INT32, ["batch_size"])
        graph.input("total_length", TensorProto.INT32, [1])
        stream, branch = self._layer(index, stream, "", cached=False)
        graph.node("Add", [stream, branch], "stream_out")
        graph.output("stream_out", TensorProto.FLOAT, shape)
        if taps:
            self._output_inputs()

    def _output_inputs(self) -> None:
        graph, routed = self.graph, self.routed
        if routed is not None:
            for x, roles in routed.inputs.items():
                columns = self.tensors[roles[0][0]].columns
                graph.output(x, TensorProto.FLOAT, ["assignments", columns])
            graph.output(routed.order, TensorProto.INT64, ["assignments"])
            graph.output(routed.counts, TensorProto.INT64, [routed.experts.count])
            # What each expert is given is a part of those.
            self.inputs = {
                x: roles for x, roles in self.inputs.items() if expert_of(roles[0]) is None
            }
        for x, weights in self.inputs.items():
            columns = self.tensors[weights[0]].columns
            graph.output(x, TensorProto.FLOAT, ["batch_size", "sequence_length", columns])

    def build_output_norm(self) -> None:
        """Add the norm before the head alone: ``stream`` ``[batch, sequence, hidden]`` goes in."""
        shape = self._stream_shape()
        stream = self.graph.input("stream", TensorProto.FLOAT, shape)
        self._norm_alone(HEAD_INPUT, stream)
        self.graph.output(HEAD_INPUT, TensorProto.FLOAT, shape)

    def _stream_shape(self) -> list[int | str]:
        return ["batch_size", "sequence_length", self.decoder.hidden_size]

    def _layer(
        self, index: int, stream: str, branch: str, cut_from: str = "", *, cached: bool = True
    ) -> tuple[str, str]:
        """The stream after layer ``index``, and what is still to be added to it.

        With ``cut_from``, of the positions from there on only.
        """
        name, parallel = f"blk.{index}", self.decoder.parallel
        normed, stream = self._pre_norm(f"{name}.attn_norm", stream, branch)
        layer = self.decoder.layers[index]
        if layer.scan is not None:
            branch, output = self._state_space(index, normed, cached=cached), "ssm_out"
        elif layer.convolution is not None:
            branch, output = self._convolution(index, normed, cached=cached), "shortconv.out_proj"
        else:
            branch, output = self._attention(index, normed, cached=cached), "attn_output"
        if cut_from:
            stream = self._cut(f"{name}.stream_cut", stream, cut_from)
            branch = self._cut(f"{name}.attn_cut", branch, cut_from)
            if self.decoder.shared_norm:
                normed = self._cut(f"{name}.norm_cut", normed, cut_from)
        branch = self._linear(f"{name}.{output}", [output], branch, index)
        branch = self._post_norm(f"{name}.post_attention_norm", branch)
        branch = self._scaled(f"{name}.attn_scaled", branch, self.decoder.residual_scale)
        if not self.decoder.feed_forward:
            return stream, branch
        if not parallel:
            normed, stream = self._pre_norm(f"{name}.ffn_norm", stream, branch)
        elif not self.decoder.shared_norm:
            normed = self._norm_alone(f"{name}.ffn_norm", stream)
        mixed = self._mixture(index, normed) or self._feed_forward(index, normed)
        mixed = self._post_norm(f"{name}.post_ffw_norm", mixed)
        mixed = self._scaled(f"{name}.ffn_scaled", mixed, self.decoder.residual_scale)
        if parallel:
            mixed = self.graph.node("Add", [branch, mixed], f"{name}.both")
        return stream, mixed

    # --- positions -------------------------------------------------------------------------------

    def _count_positions(self) -> None:
        """``seqlens_k``: cached tokens less one, by sequence; ``total_length``: of the longest."""
        graph = self.graph
        graph.node(
            "ReduceSum", ["attention_mask", graph.integers(1)], "positions.tokens", keepdims=0
        )
        graph.node("Sub", ["positions.tokens", graph.integers(1)], "positions.last")
        graph.node("Cast", ["positions.last"], "seqlens_k", to=TensorProto.INT32)
        graph.node("Shape", ["attention_mask"], "positions.total", start=1, end=2)
        graph.node("Cast", ["positions.total"], "total_length", to=TensorProto.INT32)

    def _embed(self) -> str:
        graph, decoder = self.graph, self.decoder
        operators = operators_of(self.grids.embed)
        assert operators.gather is not None, self.grids.embed
        weight = self.tensors["token_embd.weight"]
        self.embedding = graph.store(
            "token_embd.weight", [weight], self.grids.embed, operators.packer
        )
        stream = operators.gather(graph, "input_ids", self.embedding, "token_embd")
        stream = self._scaled("token_embd.scaled", stream, decoder.embedding_scale)
        if decoder.embedding_norm:
            stream = self._norm_alone("token_embd_norm", stream)
        if decoder.learned_positions is not None:
            stream = graph.node("Add", [stream, self._learned_positions()], "position_embd.sum")
        return stream

    def _learned_positions(self) -> str:
        """Rows of the position table for the step's tokens, which end at ``total``."""
        graph = self.graph
        table = self._vector("position_embd.weight")
        graph.node("Shape", ["input_ids"], "positions.step", start=1, end=2)
        graph.node("Sub", ["positions.total", "positions.step"], "positions.first")
        scalar = graph.constant("int64_axes", np.asarray([0], np.int64))
        start = graph.node("Squeeze", ["positions.first", scalar], "positions.start")
        stop = graph.node("Squeeze", ["positions.total", scalar], "positions.stop")
        if self.decoder.skipped_positions:
            rows = np.asarray(self.decoder.skipped_positions, np.int64)
            skipped = graph.constant("positions.skipped", rows)
            start = graph.node("Add", [start, skipped], "positions.start_row")
            stop = graph.node("Add", [stop, skipped], "positions.stop_row")
        one = graph.constant("int64_one", np.asarray(1, np.int64))
        ids = graph.node("Range", [start, stop, one], "positions.ids")
        return graph.node("Gather", [table, ids], "position_embd")

    # --- parts of a layer ------------------------------------------------------------------------

    def _attention(self, index: int, x: str, *, cached: bool) -> str:
        if self.decoder.latent is not None:
            return self._latent_attention(index, x, self.decoder.latent, cached=cached)
        query, key, value = self._queries_keys_values(index, x)
        return self._attended(index, f"blk.{index}.attn", (query, key, value), x, cached=cached)

    def _latent_attention(self, index: int, x: str, latent: Latent, *, cached: bool) -> str:
        """Attention over latents, one head of keys for all queries, and what it gives expanded."""
        graph, decoder, heads = self.graph, self.decoder, self.decoder.heads
        name, rank = f"blk.{index}.attn", latent.query_rank
        first, width = ("attn_q", decoder.query_size) if rank is None else ("attn_q_a", rank)
        made = self._linear(f"{name}_a", [first, "attn_kv_a_mqa"], x, index)
        query, latents, turned = (f"{name}_{part}" for part in ("low_q", "low_kv", "k_rope"))
        widths = graph.integers(width, latent.rank, latent.rope_dim)
        graph.node(
            "Split", [made, widths], f"{name}_a.parts", outputs=[query, latents, turned], axis=-1
        )
        if rank is not None:
            query = self._norm_alone(f"{name}_q_a_norm", query, latent.epsilon)
            query = self._linear(f"{name}_q_b", ["attn_q_b"], query, index)
        latents = self._norm_alone(f"{name}_kv_a_norm", latents, latent.epsilon)
        expanding = f"blk.{index}.{BY_HEAD}"
        self.inputs.setdefault(latents, []).append(expanding)
        keys, values = expansion(graph, latent, heads, self.tensors[expanding], self.grids.body)
        query = absorbed_queries(graph, latent, heads, f"{name}_q", query, keys)
        key = filled(graph, latent, f"{name}_k", [turned, latents], 3)
        if self.int8_cache:
            mixed = self._attended(index, f"{name}_mixed", (query, key, key), x, cached=cached)
            return expanded_values(graph, latent, heads, name, mixed, values)
        rope = decoder.layers[index].rope
        if rope is not None:
            query, key, _ = self._turned_apart(f"{name}_mixed", rope, query, key, key)
        held = self._held(index, key) if cached else key
        seen, total = self._seen(x)
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

    def _seen(self, x: str) -> tuple[str, str]:
        """What is added to scores ``[batch, sequence, 1, total]``, and the total ``[1]``.

        Minus infinity where a token comes after the one that asks. Alike in every layer.
        """
        graph, seen, total = self.graph, "positions.seen", "positions.seen_total"
        if not graph.has(seen):
            zero, one = (graph.constant(f"int64_at_{n}", np.asarray(n, np.int64)) for n in (0, 1))
            scalar = graph.constant("int64_axes", np.asarray([0], np.int64))
            graph.node("Cast", ["total_length"], total, to=TensorProto.INT64)
            stop = graph.node("Squeeze", [total, scalar], f"{seen}_stop")
            keys = graph.node("Range", [zero, stop, one], f"{seen}_keys")
            rows = graph.node("Unsqueeze", [self._places(x), graph.integers(2, 3)], f"{seen}_rows")
            before = graph.node("LessOrEqual", [keys, rows], f"{seen}_before")
            nothing, never = (
                graph.floats(f"{seen}_{name}", np.asarray(value, np.float32))
                for name, value in (("zero", 0.0), ("never", -np.inf))
            )
            graph.node("Where", [before, nothing, never], seen)
        return seen, total

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
            inputs += self._rope(layer.rope)
        if decoder.alibi:
            inputs += [""] * (BIAS_PLACE - len(inputs))
            inputs.append(self._alibi(x))
        cache = self._int8_cache(index, inputs) if self.int8_cache else {}
        return graph.node(
            "GroupQueryAttention", inputs, name, outputs=[name, *present], contrib=True,
            num_heads=decoder.heads, kv_num_heads=decoder.cache_heads, scale=decoder.softmax_scale,
            do_rotary=int(inside), local_window_size=layer.window or -1,
            softcap=decoder.attention_softcap or 0.0, **cache,
        )  # fmt: skip

    def _convolution(self, index: int, x: str, *, cached: bool) -> str:
        """What the output product of a short convolution is given."""
        settings, name = self.decoder.layers[index].convolution, f"blk.{index}.shortconv"
        assert settings is not None
        parts = self._linear(f"{name}.in_proj", ["shortconv.in_proj"], x, index)
        bias = self._vector(f"{name}.conv.bias") if settings.biased else None
        return gated_convolution(
            self.graph, index, parts, self._vector(f"{name}.conv.weight"), bias, settings.width,
            self.decoder.hidden_size, cached=cached,
        )  # fmt: skip

    def _state_space(self, index: int, x: str, *, cached: bool) -> str:
        """What the output product of a state-space layer is given."""
        settings, block = self.decoder.layers[index].scan, f"blk.{index}"
        assert settings is not None

        def product(part: str, value: str) -> str:
            small = FLOAT if part == SMALL_PRODUCT else None
            return self._linear(f"{block}.{part}", [part], value, index, small)

        layer = StateSpaceLayer(
            self.graph, index, settings, lambda part: self._vector(f"{block}.{part}"), product,
            epsilon=self.decoder.norm.epsilon, cached=cached,
        )  # fmt: skip
        return layer.scanned(x)

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

    def _int8_cache(self, index: int, inputs: list[str]) -> dict[str, Any]:
        """Add the scales of keys and values to ``inputs``; returns what the attention is told."""
        scales = CacheScales(self.decoder, self.tensors, index)
        shape = [self.decoder.cache_heads, 1, self.decoder.cache_dim]
        inputs += [""] * (SCALES_PLACE - len(inputs))
        for ref in (scales.keys(), scales.values()):
            stored = self.graph.store(ref.role, [ref], FLOAT, "float")
            inputs.append(self.graph.stored(stored.arrays[0], TensorProto.FLOAT, shape))
        by_channel = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL"}
        return {**by_channel, "kv_cache_bit_width": 8}

    def _cache_shape(self, extent: str) -> list[int | str]:
        heads, width = self.decoder.cache_heads, self.decoder.cache_dim
        return ["batch_size", heads, f"{extent}_sequence_length", width]

    def _queries_keys_values(self, index: int, x: str) -> tuple[str, str, str]:
        """All three in one value, the others empty, unless queries and keys are normed apart."""
        graph, decoder = self.graph, self.decoder
        name = f"blk.{index}.attn"
        parts = [f"{name}_q", f"{name}_k", f"{name}_v"]
        if decoder.fused_qkv:
            packed = self._linear(f"{name}_qkv", ["attn_qkv"], x, index)
        elif not decoder.qk_norm:
            packed = self._linear(f"{name}_qkv", ["attn_q", "attn_k", "attn_v"], x, index)
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
                self._linear(part, [part.rpartition(".")[2]], x, index)
        query = self._normed_heads(parts[0], decoder.heads)
        return query, self._normed_heads(parts[1], decoder.kv_heads), parts[2]

    def _normed_heads(self, name: str, heads: int) -> str:
        """The queries or keys ``name`` with each head normed apart, or all of them together."""
        graph, decoder = self.graph, self.decoder
        if decoder.qk_norm_whole:
            return self._norm_alone(f"{name}_norm", name)
        by_head = graph.integers(0, -1, heads, decoder.head_dim)
        split = graph.node("Reshape", [name, by_head], f"{name}.heads")
        if decoder.qk_norm_by_head:
            normed = self._normed_by_head(f"{name}_norm", split)
        else:
            normed = self._norm_alone(f"{name}_norm", split)
        flat = graph.integers(0, -1, heads * decoder.head_dim)
        return graph.node("Reshape", [normed, flat], f"{name}.normed")

    def _normed_by_head(self, name: str, x: str) -> str:
        """``x`` ``[batch, sequence, heads, head_dim]`` normed, and weighed by a row for each head.

        onnxruntime's norms have the same weights everywhere.
        """
        graph, norm = self.graph, self.decoder.norm
        operator = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}
        ones = graph.floats("head_norm.ones", np.ones(self.decoder.head_dim, np.float32))
        plain = graph.node(
            operator[norm.kind], [x, ones], f"{name}.plain", axis=-1, epsilon=norm.epsilon
        )
        return graph.node("Mul", [plain, self._vector(f"{name}.weight")], name)

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
        places = self._places(query)
        turned = [
            graph.node(
                "RotaryEmbedding", [x, places, *self._rope(rope)], f"{x}.turned", contrib=True,
                num_heads=heads, rotary_embedding_dim=rope.dimensions,
            )
            for x, heads in ((query, decoder.heads), (key, decoder.cache_heads))
        ]  # fmt: skip
        return turned[0], turned[1], value

    def _places(self, x: str) -> str:
        """The position of every token of the step, ``[batch, sequence]``, as the attention counts.

        A step's tokens end where those of its sequence do; a prompt begins at 0 where it is padded.
        """
        graph = self.graph
        if not self._counted:
            self._counted = "positions.places"
            scalar = graph.constant("int64_axes", np.asarray([0], np.int64))
            zero, one = (graph.constant(f"int64_at_{n}", np.asarray(n, np.int64)) for n in (0, 1))
            step = graph.node("Shape", [x], "positions.length", start=1, end=2)
            last = graph.node("Cast", ["seqlens_k"], "positions.held", to=TensorProto.INT64)
            after = graph.node("Add", [last, one], "positions.end")
            before = graph.node("Sub", [after, step], "positions.past")
            first = graph.node("Max", [before, zero], "positions.begin")
            column = graph.node("Unsqueeze", [first, graph.integers(1)], "positions.column")
            count = graph.node("Squeeze", [step, scalar], "positions.count")
            offsets = graph.node("Range", [zero, count, one], "positions.offsets")
            graph.node("Add", [column, offsets], self._counted)
        return self._counted

    def _alibi(self, x: str) -> str:
        """What is added to the scores, ``[batch, heads, sequence, total]``, alike in every layer.

        Zero for a token itself, which is where rounding must not be felt; what it gives to tokens
        that come after is masked.
        """
        graph, name = self.graph, "alibi"
        if not self._biased:
            self._biased = name
            places = self._places(x)
            zero, one = (graph.constant(f"int64_at_{n}", np.asarray(n, np.int64)) for n in (0, 1))
            scalar = graph.constant("int64_axes", np.asarray([0], np.int64))
            total = graph.node("Cast", ["total_length"], f"{name}.total", to=TensorProto.INT64)
            stop = graph.node("Squeeze", [total, scalar], f"{name}.stop")
            keys = graph.node("Range", [zero, stop, one], f"{name}.keys")
            rows = graph.node("Unsqueeze", [places, graph.integers(1, 3)], f"{name}.queries")
            age = graph.node("Sub", [keys, rows], f"{name}.distance")
            age = graph.node("Cast", [age], f"{name}.distance_float", to=graph.element)
            slopes = np.asarray(self.decoder.alibi, np.float32).reshape(-1, 1, 1)
            graph.node("Mul", [age, graph.floats(f"{name}.slopes", slopes)], name)
        return self._biased

    def _rope(self, rope: Rope) -> tuple[str, str]:
        if rope not in self._ropes:
            name = f"rope.{len(self._ropes)}"
            tables = rope_tables(name, rope, self.context_length)
            self._ropes[rope] = (self._stored_float(tables[0]), self._stored_float(tables[1]))
        return self._ropes[rope]

    def _feed_forward(self, index: int, x: str) -> str:
        graph, decoder = self.graph, self.decoder
        name = f"blk.{index}.ffn"
        if not decoder.gated_mlp:
            hidden = self._linear(f"{name}_up", ["ffn_up"], x, index)
            active = self._activate(f"{name}_act", hidden)
        else:
            if decoder.fused_gate_up:
                both = self._linear(f"{name}_gate_up", ["ffn_up"], x, index)
                halves = graph.integers(decoder.ffn_size, decoder.ffn_size)
                gate, up = f"{name}_gate", f"{name}_up"
                graph.node("Split", [both, halves], f"{name}_split", outputs=[gate, up], axis=-1)
            else:
                gate = self._linear(f"{name}_gate", ["ffn_gate"], x, index)
                up = self._linear(f"{name}_up", ["ffn_up"], x, index)
            active = self._gated(name, gate, up)
        return self._linear(f"{name}_down", ["ffn_down"], active, index)

    def _gated(self, name: str, gate: str, up: str) -> str:
        gate = self._activate(f"{name}_act", gate)
        return self.graph.node("Mul", [gate, up], f"{name}_gated")

    def _mixture(self, index: int, x: str) -> str:
        """The answers of a layer's experts; empty where it has none."""
        experts = self.decoder.layers[index].experts
        if experts is None:
            return ""
        gates = (ROUTER, SHARED_GATE)[: 1 + experts.shared_gate]
        self.inputs[x] = [f"blk.{index}.{role}" for role in gates]
        fused = None
        if self.decoder.activation == "silu" and not self._taps:
            grids = self.grids
            fused = for_one_operator(
                self.graph, experts, index, self.tensors,
                lambda role: grids.by_role.get(role, grids.body),
            )  # fmt: skip
        mixture = ExpertsGraph(
            self.graph,
            experts,
            self.decoder.hidden_size,
            index,
            lambda name, roles, x: self._linear(name, roles, x, index),
            self._vector,
            self._gated,
            fused,
        )
        answers, self.routed = mixture.build(x, taps=self._taps)
        return answers

    def _activate(self, name: str, x: str) -> str:
        activation = self.decoder.activation
        if activation == "relu":
            return self.graph.node("Relu", [x], name)
        operator = {"silu": "QuickGelu", "gelu_tanh": "FastGelu", "gelu": "Gelu"}
        # QuickGelu is x * sigmoid(alpha * x): SiLU in one operator.
        attributes: dict[str, Any] = {"alpha": 1.0} if activation == "silu" else {}
        return self.graph.node(operator[activation], [x], name, contrib=True, **attributes)

    # --- linear layers and norms -----------------------------------------------------------------

    def _linear(
        self, name: str, roles: list[str], x: str, index: int, grid: Grid | None = None
    ) -> str:
        """One product with the weights of ``roles`` stacked, and the biases that there are.

        ``grid``: where it is not the one that was chosen for them.
        """
        weights = [self.tensors[f"blk.{index}.{role}.weight"] for role in roles]
        whole_roles = [f"blk.{index}.{role}.weight" for role in roles]
        self.inputs.setdefault(x, []).extend(whole_roles)
        grid = grid or self.grids.of(whole_roles)
        packer = operators_of(grid).packer
        tensor = self.graph.store(f"{name}.weight", weights, grid, packer)
        biases = [self.tensors.get(f"blk.{index}.{role}.bias") for role in roles]
        present = [bias for bias in biases if bias is not None]
        bias = self._stacked_bias(f"{name}.bias", present) if present else None
        return self._product(name, x, tensor, whole_roles, bias)

    def _product(
        self, name: str, x: str, tensor: OutputTensor, roles: list[str], bias: str | None
    ) -> str:
        """``x`` by ``tensor``, which holds ``roles``, and in float by the columns cut out of it."""
        graph, operators = self.graph, operators_of(tensor.grid)
        if floats_role(roles[0]) not in self.tensors:
            return operators.matmul(graph, x, tensor, name, bias)
        outliers, rest = self._taken_apart(x, roles[0])
        columns = [self.tensors[floats_role(role)] for role in roles]
        floats = operators_of(OUTLIERS)
        weight = graph.store(floats_role(tensor.name), columns, OUTLIERS, floats.packer)
        exact = floats.matmul(graph, outliers, weight, f"{name}.exact", None)
        rounded = operators.matmul(graph, rest, tensor, f"{name}.rounded", bias)
        return graph.node("Add", [rounded, exact], name)

    def _taken_apart(self, x: str, role: str) -> tuple[str, str]:
        """The channels of ``x`` that weight ``role`` multiplies as floats, and ``x`` without them.

        Done once for all products of ``x``. Channels are stored as floats, which all files of ours
        consist of beside codes; onnxruntime makes integers and the mask of them when it opens the
        model.
        """
        if x in self._apart:
            return self._apart[x]
        graph, ref = self.graph, self.tensors[channels_role(role)]
        name = f"{x}.outliers"
        channels = graph.node("Cast", [self._stored_float(ref)], f"{name}.at", to=TensorProto.INT64)
        columns = self.tensors[role].columns
        ones = graph.constant(f"ones_{columns}", np.ones(columns, np.float32))
        zeros = graph.constant(f"zeros_{ref.columns}", np.zeros(ref.columns, np.float32))
        mask = graph.node("ScatterElements", [ones, channels, zeros], f"{name}.mask")
        self._apart[x] = (
            graph.node("Gather", [x, channels], name, axis=-1),
            graph.node("Mul", [x, mask], f"{x}.rest"),
        )
        return self._apart[x]

    def _stacked_bias(self, role: str, biases: list[TensorRef]) -> str:
        columns = [_as_column(bias) for bias in biases]
        tensor = self.graph.store(role, columns, FLOAT, "float")
        stored = self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, [tensor.rows])
        return self.graph.computed(stored)

    def _pre_norm(self, name: str, stream: str, branch: str) -> tuple[str, str]:
        """As ``_norm``, or the sum alone where no norm stands before a part of a layer."""
        if self.decoder.pre_norms:
            return self._norm(name, stream, branch)
        # By a name of its own, also where the stream is what the graph is given.
        if branch:
            stream = self.graph.node("Add", [stream, branch], f"{name}.stream")
        else:
            stream = self.graph.node("Identity", [stream], f"{name}.stream")
        return stream, stream

    def _norm(self, name: str, stream: str, branch: str) -> tuple[str, str]:
        """The normed sum of stream and branch, and the sum itself: the new residual stream."""
        if not branch:
            return self._norm_alone(name, stream), stream
        norm = self.decoder.norm
        operator = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}
        outputs = [name, "", "", f"{name}.stream"]
        self.graph.node(
            operator[norm.kind], [stream, branch, *self._norm_weights(name)], name,
            outputs=outputs, contrib=True, epsilon=norm.epsilon,
        )  # fmt: skip
        return outputs[0], outputs[3]

    def _norm_alone(self, name: str, x: str, epsilon: float | None = None) -> str:
        """``x`` normed; ``epsilon`` where it is not that of the other norms."""
        norm = self.decoder.norm
        operator = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}
        return self.graph.node(
            operator[norm.kind],
            [x, *self._norm_weights(name)],
            name,
            axis=-1,
            epsilon=epsilon or norm.epsilon,
        )

    def _post_norm(self, name: str, x: str) -> str:
        return self._norm_alone(name, x) if self.decoder.post_norms else x

    def _norm_weights(self, name: str) -> list[str]:
        norm = self.decoder.norm
        if not norm.weight:
            ones = np.ones(self.decoder.hidden_size, np.float32)
            return [self.graph.floats("norm.ones", ones)]
        weight = self.tensors[f"{name}.weight"]
        if norm.offset:
            weight = derived(weight, _plus_one)
        names = [self._stored_float(weight.with_role(f"{name}.weight"))]
        return [*names, self._vector(f"{name}.bias")] if norm.biased else names

    def _scaled(self, name: str, x: str, factor: float) -> str:
        """``x`` times ``factor``."""
        if factor == 1.0:
            return x
        number = self.graph.floats(f"{name}.factor", np.asarray([factor], np.float32))
        return self.graph.node("Mul", [x, number], name)

    def _vector(self, role: str) -> str:
        return self._stored_float(self.tensors[role])

    def _stored_float(self, ref: TensorRef) -> str:
        tensor = self.graph.store(ref.role, [ref], FLOAT, "float")
        stored = self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, ref.shape)
        return self.graph.computed(stored)

    # --- head ------------------------------------------------------------------------------------

    def _cut(self, name: str, x: str, start: str) -> str:
        graph = self.graph
        return graph.node("Slice", [x, start, graph.integers(INT64_MAX), graph.integers(1)], name)

    def _head(self, x: str) -> None:
        graph, decoder = self.graph, self.decoder
        operators = operators_of(self.grids.head)
        if decoder.tied_head and self.grids.head == self.grids.embed:
            tensor = self.embedding
        else:
            source = "token_embd.weight" if decoder.tied_head else "output.weight"
            tensor = graph.store(
                "output.weight", [self.tensors[source]], self.grids.head, operators.packer
            )
        bias = self._vector("output.bias") if decoder.head_bias else None
        capped, narrow = decoder.logit_softcap is not None, graph.element != TensorProto.FLOAT
        name = "logits.narrow" if narrow else "logits.plain" if capped else "logits"
        logits = self._product(name, x, tensor, ["output.weight"], bias)
        if narrow:
            name = "logits.plain" if capped else "logits"
            logits = graph.node("Cast", [logits], name, to=TensorProto.FLOAT)
        if decoder.logit_softcap is not None:
            cap = graph.constant("logits.cap", np.asarray(decoder.logit_softcap, np.float32))
            small = graph.node("Div", [logits, cap], "logits.small")
            graph.node("Mul", [graph.node("Tanh", [small], "logits.tanh"), cap], "logits")
        # One position is what the default gives, and what tells genai not to expect them all. A
        # caller who asks for more gets more, and a warning in onnxruntime's log.
        shape: list[int | str] = ["batch_size", 1, decoder.vocab_size]
        graph.output("logits", TensorProto.FLOAT, shape)


def _plus_one(weight: Array) -> Array:
    return weight + np.float32(1.0)


def _as_column(bias: TensorRef) -> TensorRef:
    """A vector ``[n]`` as ``[n, 1]``, so that several stack into one."""

    def load_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(bias.load_rows(0, 1).reshape(-1, 1)[start:stop])

    return TensorRef(bias.name, bias.role, (bias.size, 1), bias.dtype, bias.nbytes, load_rows)
