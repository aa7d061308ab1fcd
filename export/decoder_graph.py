"""A ``Decoder`` as an ONNX graph of onnxruntime's operators, with a KV cache as inputs and outputs.

Inputs: ``input_ids`` ``[batch, sequence]``, ``attention_mask`` ``[batch, total]``, past keys and
values ``[batch, kv_heads, past, head_dim]``, and ``logits_from``, which may be left out: the first
position of the step whose logits are wanted, counted from the end when negative (-1, the last, is
the default; 0 gives all). Outputs: ``logits`` and the present keys and values. Past and present may
share one buffer.

Few, large products: q, k and v are one, gate and up are one, and the residual sums ride in the
norms. The step is cut down to the wanted positions before the last feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgellm.architectures.decoder import Decoder, Feature, Layer, Rope
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.export.rope_table import rope_tables
from edgellm.quant.grid import GRIDS, Grid
from edgellm.tensors import Array, TensorRef, derived

EXPRESSIBLE = frozenset(Feature)
"""Features that this graph computes; each is proven against transformers in ``tests/parity``."""

FLOAT = GRIDS["f32"]

INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Grids:
    """On which grid the linear layers, the embedding and the head stand."""

    body: Grid
    embed: Grid
    head: Grid


@dataclass
class DecoderGraph:
    """Writes ``decoder`` into ``graph``; ``tensors`` are the source's, by role."""

    graph: GraphBuilder
    decoder: Decoder
    tensors: Mapping[str, TensorRef]
    grids: Grids
    context_length: int
    _ropes: dict[Rope, tuple[str, str]] = field(default_factory=dict)

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
        for index, layer in enumerate(decoder.layers):
            name = f"blk.{index}"
            normed, stream = self._norm(f"{name}.attn_norm", stream, branch)
            branch = self._attention(index, layer, normed)
            if index == last:
                stream = self._cut(f"{name}.stream_cut", stream, logits_from)
                branch = self._cut(f"{name}.attn_cut", branch, logits_from)
            branch = self._linear(f"{name}.attn_output", ["attn_output"], branch, index)
            branch = self._post_norm(f"{name}.post_attention_norm", branch)
            normed, stream = self._norm(f"{name}.ffn_norm", stream, branch)
            branch = self._post_norm(f"{name}.post_ffw_norm", self._feed_forward(index, normed))
        normed, _ = self._norm("output_norm", stream, branch)
        self._head(normed)

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
        if decoder.embedding_scale != 1.0:
            scale = graph.constant("token_embd.scale", np.float32([decoder.embedding_scale]))
            stream = graph.node("Mul", [stream, scale], "token_embd.scaled")
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
        one = graph.constant("int64_one", np.asarray(1, np.int64))
        ids = graph.node("Range", [start, stop, one], "positions.ids")
        return graph.node("Gather", [table, ids], "position_embd")

    # --- parts of a layer ------------------------------------------------------------------------

    def _attention(self, index: int, layer: Layer, x: str) -> str:
        graph, decoder = self.graph, self.decoder
        name = f"blk.{index}.attn"
        packed = self._linear(f"{name}_qkv", self._qkv_roles(), x, index)
        query, key, value = packed, "", ""
        if decoder.qk_norm:
            query, key, value = self._normed_heads(index, packed)
        shape = ["batch_size", decoder.kv_heads, "past_sequence_length", decoder.head_dim]
        past = [
            graph.input(f"past_key_values.{index}.{part}", TensorProto.FLOAT, shape)
            for part in ("key", "value")
        ]
        present = [f"present.{index}.{part}" for part in ("key", "value")]
        shape = ["batch_size", decoder.kv_heads, "total_sequence_length", decoder.head_dim]
        inputs = [query, key, value, *past, "seqlens_k", "total_length"]
        if layer.rope is not None:
            inputs += self._rope(layer.rope)
        scale = decoder.attention_scale or decoder.head_dim**-0.5
        attention = graph.node(
            "GroupQueryAttention", inputs, name, outputs=[name, *present], contrib=True,
            num_heads=decoder.heads, kv_num_heads=decoder.kv_heads, scale=scale,
            do_rotary=int(layer.rope is not None), local_window_size=layer.window or -1,
        )  # fmt: skip
        for output in present:
            graph.output(output, TensorProto.FLOAT, shape)
        return attention

    def _qkv_roles(self) -> list[str]:
        return ["attn_qkv"] if self.decoder.fused_qkv else ["attn_q", "attn_k", "attn_v"]

    def _normed_heads(self, index: int, packed: str) -> tuple[str, str, str]:
        """Queries and keys, each head normed apart, and the values."""
        graph, decoder = self.graph, self.decoder
        name = f"blk.{index}.attn"
        widths = [heads * decoder.head_dim for heads in self._head_counts()]
        parts = [f"{name}_{part}.raw" for part in "qkv"]
        graph.node(
            "Split", [packed, graph.integers(*widths)], f"{name}_split", outputs=parts, axis=-1
        )
        normed: list[str] = []
        for part, raw, width in zip("qk", parts, widths, strict=False):
            prefix = f"{name}_{part}"
            by_head = graph.integers(0, -1, width // decoder.head_dim, decoder.head_dim)
            heads = graph.node("Reshape", [raw, by_head], f"{prefix}.heads")
            heads = self._norm_alone(f"{prefix}_norm", heads)
            flat = graph.integers(0, -1, width)
            normed.append(graph.node("Reshape", [heads, flat], f"{prefix}.normed"))
        return normed[0], normed[1], parts[2]

    def _head_counts(self) -> tuple[int, int, int]:
        return self.decoder.heads, self.decoder.kv_heads, self.decoder.kv_heads

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
            both = self._linear(f"{name}_gate_up", ["ffn_gate", "ffn_up"], x, index)
            halves = [f"{name}_gate", f"{name}_up"]
            graph.node("Split", [both], f"{name}_split", outputs=halves, axis=-1, num_outputs=2)
            gate = self._activate(f"{name}_act", halves[0])
            active = graph.node("Mul", [gate, halves[1]], f"{name}_gated")
        return self._linear(f"{name}_down", ["ffn_down"], active, index)

    def _activate(self, name: str, x: str) -> str:
        operator = {"silu": "QuickGelu", "gelu_tanh": "FastGelu", "gelu": "Gelu"}
        activation = self.decoder.activation
        # QuickGelu is x * sigmoid(alpha * x): SiLU in one operator.
        attributes = {"alpha": 1.0} if activation == "silu" else {}
        return self.graph.node(operator[activation], [x], name, contrib=True, **attributes)

    # --- linear layers and norms -----------------------------------------------------------------

    def _linear(self, name: str, roles: list[str], x: str, index: int) -> str:
        """One product with the weights of ``roles`` stacked, and their biases where there are any."""
        weights = [self.tensors[f"blk.{index}.{role}.weight"] for role in roles]
        operators = operators_of(self.grids.body)
        tensor = self.graph.store(f"{name}.weight", weights, self.grids.body, operators.packer)
        biases = [self.tensors.get(f"blk.{index}.{role}.bias") for role in roles]
        present = [bias for bias in biases if bias is not None]
        bias = self._stacked_bias(f"{name}.bias", present) if present else None
        return operators.matmul(self.graph, x, tensor, name, bias)

    def _stacked_bias(self, role: str, biases: list[TensorRef]) -> str:
        columns = [_as_column(bias) for bias in biases]
        tensor = self.graph.store(role, columns, FLOAT, "float")
        return self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, [tensor.rows])

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

    def _norm_alone(self, name: str, x: str) -> str:
        norm = self.decoder.norm
        operator = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}
        return self.graph.node(
            operator[norm.kind], [x, *self._norm_weights(name)], name, axis=-1, epsilon=norm.epsilon
        )

    def _post_norm(self, name: str, x: str) -> str:
        return self._norm_alone(name, x) if self.decoder.post_norms else x

    def _norm_weights(self, name: str) -> list[str]:
        weight = self.tensors[f"{name}.weight"]
        if self.decoder.norm.offset:
            weight = derived(weight, _plus_one)
        names = [self._stored_float(weight.with_role(f"{name}.weight"))]
        if self.decoder.norm.kind == "layer":
            names.append(self._vector(f"{name}.bias"))
        return names

    def _vector(self, role: str) -> str:
        return self._stored_float(self.tensors[role])

    def _stored_float(self, ref: TensorRef) -> str:
        tensor = self.graph.store(ref.role, [ref], FLOAT, "float")
        return self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, ref.shape)

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
        operators.matmul(graph, x, tensor, "logits", None)
        shape = ["batch_size", "logits_length", decoder.vocab_size]
        graph.output("logits", TensorProto.FLOAT, shape)


def _plus_one(weight: Array) -> Array:
    return weight + np.float32(1.0)


def _as_column(bias: TensorRef) -> TensorRef:
    """A vector ``[n]`` as ``[n, 1]``, so that several stack into one."""

    def load_rows(start: int, stop: int) -> Array:
        return np.ascontiguousarray(bias.load_rows(0, 1).reshape(-1, 1)[start:stop])

    return TensorRef(bias.name, bias.role, (bias.size, 1), bias.dtype, bias.nbytes, load_rows)
