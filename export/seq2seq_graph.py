"""A ``Seq2Seq`` as two ONNX graphs of onnxruntime's operators, which share one data file.

The encoder's: ``input_ids`` and ``attention_mask`` ``[batch, length]`` go in; out come, for each
layer of the decoder, the keys and values ``cross.N.key`` and ``cross.N.value``
``[batch, heads, length, head_dim]`` of the text, computed once. The decoder's: ``input_ids``
``[batch, step]`` of the answer, ``encoder_attention_mask``, those keys and values, and the answer's
own so far, ``past.N.key`` and ``past.N.value`` ``[batch, heads, past, head_dim]``; out come
``logits`` ``[batch, step, vocab]`` and ``present.N.key`` and ``present.N.value``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from edgellm.architectures.seq2seq import EMBEDDING, Relative, Seq2Seq, Stack
from edgellm.export.layout import OutputTensor
from edgellm.export.linear_graph import Grids
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.quant.grid import GRIDS
from edgellm.tensors import TensorRef

FLOAT = GRIDS["f32"]

UNSEEN = float(np.finfo(np.float32).min)
"""What the attention adds to the scores of padding, as transformers."""

PARTS = ("key", "value")


def buckets_of(relative: Relative, *, both_sides: bool) -> npt.NDArray[np.int64]:
    """The bucket of each distance from ``-longest`` to ``longest``, key less query.

    As transformers' ``T5Attention._relative_position_bucket`` in float32. ``both_sides``: of the
    encoder; the decoder sees nothing behind, and those distances share the nearest one's bucket.
    """
    distance = np.arange(-relative.longest, relative.longest + 1)
    count, first = relative.buckets, np.zeros_like(distance)
    if both_sides:
        count //= 2
        first = np.where(distance > 0, count, 0)
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = count // 2
    near = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(near) / np.float32(math.log(relative.longest / exact))
    far = exact + (steps * np.float32(count - exact)).astype(np.int64)
    return first + np.where(distance < exact, distance, np.minimum(far, count - 1))


@dataclass
class Storage:
    """What both graphs refer to: the embedding that was stored last, and where the file ends."""

    embedding: OutputTensor | None = None
    data_bytes: int = 0
    tensors: list[OutputTensor] = field(default_factory=list)


@dataclass
class Side:
    """One side of ``model``, ``enc`` or ``dec``, written into ``graph``."""

    graph: GraphBuilder
    model: Seq2Seq
    tensors: Mapping[str, TensorRef]
    grids: Grids
    storage: Storage
    short: str

    @property
    def stack(self) -> Stack:
        return self.model.encoder if self.short == "enc" else self.model.decoder

    # --- both sides ------------------------------------------------------------------------------

    def embed(self, first: str) -> str:
        """The embedding of ``input_ids``, the first of which stands at position ``first``."""
        graph, model, storage = self.graph, self.model, self.storage
        operators = operators_of(self.grids.embed)
        assert operators.gather is not None, self.grids.embed
        role = EMBEDDING if self.short == "enc" else model.answer_embedding
        if storage.embedding is None or storage.embedding.role != role:
            storage.embedding = graph.store(
                role, [self.tensors[role]], self.grids.embed, operators.packer
            )
        stream = operators.gather(graph, "input_ids", storage.embedding, "token_embd")
        if model.embedding_scale != 1.0:
            stream = graph.node("Mul", [stream, self.number(model.embedding_scale)], "embd.scaled")
        if model.positions is not None:
            table = self.values(f"{self.short}.position_embd.weight")
            skipped = graph.constant("skipped", np.asarray(model.skipped_positions, np.int64))
            rows = graph.node("Add", [self.places(first), skipped], "positions.rows")
            places = graph.node("Gather", [table, rows], "position_embd")
            stream = graph.node("Add", [stream, places], "embd.placed")
        if model.embedding_norm:
            stream = self.norm_alone(f"{self.short}.token_embd_norm", stream)
        return stream

    def places(self, first: str) -> str:
        """Positions of the step's tokens, ``[step]``; made once."""
        graph = self.graph
        if not graph.has("positions"):
            graph.node("Shape", ["input_ids"], "positions.count", start=1, end=2)
            graph.node("Squeeze", ["positions.count"], "positions.step")
            graph.node("Add", [first, "positions.step"], "positions.stop")
            one = graph.constant("int64_one", np.asarray(1, np.int64))
            graph.node("Range", [first, "positions.stop", one], "positions")
        return "positions"

    def bias_of_distances(self, first: str) -> str:
        """T5's bias of every query's tokens ``[1, heads, step, total]``; empty for others."""
        graph, relative = self.graph, self.model.relative
        if relative is None:
            return ""
        both = self.short == "enc"
        buckets = graph.constant("buckets", buckets_of(relative, both_sides=both))
        zero = graph.constant("int64_zero", np.asarray(0, np.int64))
        one = graph.constant("int64_one", np.asarray(1, np.int64))
        queries = self.places(first)
        graph.node("Range", [zero, "positions.stop", one], "distance.keys")
        graph.node("Unsqueeze", [queries, graph.integers(1)], "distance.queries")
        graph.node("Sub", ["distance.keys", "distance.queries"], "distance")
        longest = graph.constant("longest", np.asarray(relative.longest, np.int64))
        nearest = graph.constant("nearest", np.asarray(-relative.longest, np.int64))
        graph.node("Clip", ["distance", nearest, longest], "distance.near")
        graph.node("Add", ["distance.near", longest], "distance.place")
        graph.node("Gather", [buckets, "distance.place"], "distance.bucket")
        table = self.values(f"{self.short}.attn_rel_b.weight")
        graph.node("Gather", [table, "distance.bucket"], "distance.bias")
        graph.node("Transpose", ["distance.bias"], "distance.by_head", perm=[2, 0, 1])
        return graph.node("Unsqueeze", ["distance.by_head", graph.integers(0)], "attention_bias")

    def attention(self, name: str, inputs: list[str], **attributes: Any) -> str:
        return self.graph.node(
            "MultiHeadAttention", inputs, name, contrib=True, num_heads=self.stack.heads,
            scale=self.model.attention_scale, mask_filter_value=UNSEEN, **attributes,
        )  # fmt: skip

    def before(self, role: str, stream: str, branch: str) -> tuple[str, str]:
        """What goes into a part of a layer, and the stream that its result is added to.

        ``branch``: what is still to be added to the stream.
        """
        if not self.model.pre_norm:
            return stream, stream
        if not branch:
            return self.norm_alone(role, stream), stream
        outputs = [role, "", "", f"{role}.stream"]
        operator = {
            "rms": "SkipSimplifiedLayerNormalization",
            "layer": "SkipLayerNormalization",
        }[self.model.norm.kind]
        self.graph.node(
            operator, [stream, branch, *self.norm_weights(role)], role,
            outputs=outputs, contrib=True, epsilon=self.model.norm.epsilon,
        )  # fmt: skip
        return role, outputs[3]

    def after(self, role: str, stream: str, branch: str) -> tuple[str, str]:
        """The stream behind a part of a layer, and what is still to be added to it."""
        if self.model.pre_norm:
            return stream, branch
        normed = self.graph.node(
            "SkipLayerNormalization", [branch, stream, *self.norm_weights(role)], role,
            contrib=True, epsilon=self.model.norm.epsilon,
        )  # fmt: skip
        return normed, ""

    def feed_forward(self, block: str, x: str) -> str:
        graph, activation = self.graph, self.model.activation
        operator, contrib = {
            "gelu": ("Gelu", True),
            "gelu_tanh": ("Gelu", False),
            "silu": ("QuickGelu", True),
            "relu": ("Relu", False),
            "tanh": ("Tanh", False),
        }[activation]
        # QuickGelu is x * sigmoid(alpha * x): SiLU in one operator.
        settings: dict[str, dict[str, Any]] = {
            "silu": {"alpha": 1.0},
            "gelu_tanh": {"approximate": "tanh"},
        }
        attributes = settings.get(activation, {})
        source = "ffn_gate" if self.model.gated_ffn else "ffn_up"
        wide = self.linear(f"{block}.{source}", x)
        wide = graph.node(operator, [wide], f"{block}.ffn_act", contrib=contrib, **attributes)
        if self.model.gated_ffn:
            up = self.linear(f"{block}.ffn_up", x)
            wide = graph.node("Mul", [wide, up], f"{block}.ffn_gated")
        return self.linear(f"{block}.ffn_down", wide)

    def last(self, stream: str, branch: str) -> str:
        """The stream behind the last layer, normed where norms come before."""
        if not self.model.pre_norm:
            return stream
        return self.before(f"{self.short}.output_norm", stream, branch)[0]

    def linear(self, role: str, x: str) -> str:
        weight = f"{role}.weight"
        grid = self.grids.of([weight])
        operators = operators_of(grid)
        tensor = self.graph.store(weight, [self.tensors[weight]], grid, operators.packer)
        bias = self.values(f"{role}.bias") if self.model.biased else None
        return operators.matmul(self.graph, x, tensor, role, bias)

    def norm_alone(self, role: str, x: str) -> str:
        norm = self.model.norm
        operator = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}[norm.kind]
        weights = self.norm_weights(role)
        return self.graph.node(operator, [x, *weights], role, axis=-1, epsilon=norm.epsilon)

    def norm_weights(self, role: str) -> list[str]:
        biased = self.model.norm.kind == "layer"
        return [
            self.values(f"{role}.weight"),
            *([self.values(f"{role}.bias")] if biased else ()),
        ]

    def values(self, role: str) -> str:
        ref = self.tensors[role]
        tensor = self.graph.store(role, [ref], FLOAT, "float")
        return self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, ref.shape)

    def number(self, value: float) -> str:
        return self.graph.constant(f"number_{value!r}", np.asarray(value, np.float32))

    def by_head(self, name: str, x: str) -> str:
        """``x`` ``[batch, length, values]`` as ``[batch, heads, length, head_dim]``."""
        graph = self.graph
        shape = graph.integers(0, 0, self.stack.heads, self.model.head_dim)
        graph.node("Reshape", [x, shape], f"{name}.heads")
        return graph.node("Transpose", [f"{name}.heads"], name, perm=[0, 2, 1, 3])

    def cache(self, extent: str) -> list[int | str]:
        return ["batch_size", self.model.decoder.heads, extent, self.model.head_dim]


def build_encoder(side: Side) -> None:
    """Add the encoder, and the products of its result that the decoder's layers look at."""
    graph, model = side.graph, side.model
    text: list[int | str] = ["batch_size", "text_length"]
    graph.input("input_ids", TensorProto.INT64, text)
    graph.input("attention_mask", TensorProto.INT64, text)
    graph.node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
    first = graph.constant("int64_zero", np.asarray(0, np.int64))
    stream, branch = side.embed(first), ""
    bias = side.bias_of_distances(first)
    for index in range(model.encoder.layers):
        block = f"enc.blk.{index}"
        x, stream = side.before(f"{block}.attn_norm", stream, branch)
        parts = [side.linear(f"{block}.attn_{part}", x) for part in ("q", "k", "v")]
        found = side.attention(f"{block}.attn", [*parts, "", "mask", bias])
        branch = side.linear(f"{block}.attn_output", found)
        stream, branch = side.after(f"{block}.attn_norm", stream, branch)
        x, stream = side.before(f"{block}.ffn_norm", stream, branch)
        branch = side.feed_forward(block, x)
        stream, branch = side.after(f"{block}.ffn_norm", stream, branch)
    hidden = side.last(stream, branch)
    for index in range(model.decoder.layers):
        for part in PARTS:
            role = f"dec.blk.{index}.cross_attn_{part[0]}"
            side.by_head(f"cross.{index}.{part}", side.linear(role, hidden))
            graph.output(f"cross.{index}.{part}", TensorProto.FLOAT, side.cache("text_length"))


def build_decoder(side: Side) -> None:
    """Add the decoder and the head."""
    graph, model = side.graph, side.model
    graph.input("input_ids", TensorProto.INT64, ["batch_size", "step_length"])
    graph.input("encoder_attention_mask", TensorProto.INT64, ["batch_size", "text_length"])
    graph.node("Cast", ["encoder_attention_mask"], "mask", to=TensorProto.INT32)
    graph.node("Shape", ["past.0.key"], "past.count", start=2, end=3)
    first = graph.node("Squeeze", ["past.count"], "past.length")
    stream, branch = side.embed(first), ""
    bias = side.bias_of_distances(first)
    for index in range(model.decoder.layers):
        block = f"dec.blk.{index}"
        pasts, crossed, presents = [], [], []
        for part in PARTS:
            element, past = TensorProto.FLOAT, side.cache("past_length")
            pasts.append(graph.input(f"past.{index}.{part}", element, past))
            crossed.append(graph.input(f"cross.{index}.{part}", element, side.cache("text_length")))
            presents.append(f"present.{index}.{part}")
            graph.output(presents[-1], element, side.cache("total_length"))
        x, stream = side.before(f"{block}.attn_norm", stream, branch)
        parts = [side.linear(f"{block}.attn_{part}", x) for part in ("q", "k", "v")]
        name = f"{block}.attn"
        found = side.attention(
            name, [*parts, "", "", bias, *pasts], outputs=[name, *presents], unidirectional=1
        )
        branch = side.linear(f"{block}.attn_output", found)
        stream, branch = side.after(f"{block}.attn_norm", stream, branch)
        x, stream = side.before(f"{block}.cross_attn_norm", stream, branch)
        query = side.linear(f"{block}.cross_attn_q", x)
        found = side.attention(f"{block}.cross_attn", [query, *crossed, "", "mask"])
        branch = side.linear(f"{block}.cross_attn_output", found)
        stream, branch = side.after(f"{block}.cross_attn_norm", stream, branch)
        x, stream = side.before(f"{block}.ffn_norm", stream, branch)
        branch = side.feed_forward(block, x)
        stream, branch = side.after(f"{block}.ffn_norm", stream, branch)
    _head(side, side.last(stream, branch))


def _head(side: Side, x: str) -> None:
    graph, model, grids = side.graph, side.model, side.grids
    if model.head_scale != 1.0:
        x = graph.node("Mul", [x, side.number(model.head_scale)], "output.scaled")
    operators = operators_of(grids.head)
    table = side.storage.embedding
    assert table is not None
    if not model.tied_head or grids.head != grids.embed:
        source = model.answer_embedding if model.tied_head else "output.weight"
        table = graph.store("output.weight", [side.tensors[source]], grids.head, operators.packer)
    if model.head_bias:
        product = operators.matmul(graph, x, table, "output.product", None)
        graph.node("Add", [product, side.values("output.bias")], "logits")
    else:
        operators.matmul(graph, x, table, "logits", None)
    shape: list[int | str] = ["batch_size", "step_length", model.head_rows]
    graph.output("logits", TensorProto.FLOAT, shape)
