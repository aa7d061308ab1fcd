"""An ``Encoder`` as an ONNX graph of onnxruntime's operators, for any batch and length.

Inputs: ``input_ids`` and ``attention_mask`` ``[batch, sequence]`` (0: padding, which nothing sees),
and ``token_type_ids`` of the same shape where there are types to choose from. Outputs by head:
``last_hidden_state`` ``[batch, sequence, hidden]``, with a pooler ``pooler_output``
``[batch, hidden]``, and ``sentence_embedding`` ``[batch, width]``, pooled and normalized as the
pipeline says; or ``logits`` ``[batch, labels]``, of every token ``[batch, sequence, labels]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from edgellm.architectures.encoder import Activation, Encoder
from edgellm.export.layout import OutputTensor
from edgellm.export.linear_graph import Grids
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.quant.grid import GRIDS, Grid
from edgellm.source.sentence_pipeline import Pooling, SentencePipeline
from edgellm.tensors import TensorRef

FLOAT = GRIDS["f32"]

HIDDEN = "last_hidden_state"
POOLED = "pooler_output"
EMBEDDING = "sentence_embedding"
LOGITS = "logits"
"""What leaves the graph, by the names that transformers and sentence-transformers have for it."""

UNSEEN = float(np.finfo(np.float32).min)
"""What the attention adds to the scores of padding, as transformers."""

NO_TOKENS = 1e-9
"""What sentence-transformers divides by where a text has no token."""

SHORTEST = 1e-12
"""The length that a vector is divided by at least (torch's ``normalize``)."""

BELOW_ALL = -1e9
"""What padding counts for in a maximum, as in sentence-transformers."""


@dataclass
class EncoderGraph:
    """Writes ``encoder`` into ``graph``; ``tensors`` are the source's, by role."""

    graph: GraphBuilder
    encoder: Encoder
    tensors: Mapping[str, TensorRef]
    grids: Grids
    pipeline: SentencePipeline | None = None
    _first_token: str = ""

    def build(self) -> None:
        """Add the whole network: inputs, layers, head, outputs."""
        graph = self.graph
        shape: list[int | str] = ["batch_size", "sequence_length"]
        graph.input("input_ids", TensorProto.INT64, shape)
        graph.input("attention_mask", TensorProto.INT64, shape)
        if self.encoder.token_types > 1:
            graph.input("token_type_ids", TensorProto.INT64, shape)
        graph.node("Cast", ["attention_mask"], "mask", to=TensorProto.INT32)
        stream = self._embed()
        for index in range(self.encoder.layers):
            last = index == self.encoder.layers - 1
            stream = self._layer(index, stream, HIDDEN if last else "")
        heads = {
            "embeddings": self._vectors,
            "sequence_classification": self._classes,
            "token_classification": self._classes,
            "masked_lm": self._masked,
        }
        heads[self.encoder.head.task](stream)

    # --- embedding -------------------------------------------------------------------------------

    def _embed(self) -> str:
        graph, encoder = self.graph, self.encoder
        operators = operators_of(self.grids.embed)
        assert operators.gather is not None, self.grids.embed
        self.embedding = graph.store(
            "token_embd.weight",
            [self.tensors["token_embd.weight"]],
            self.grids.embed,
            operators.packer,
        )
        tokens = operators.gather(graph, "input_ids", self.embedding, "token_embd")
        table = self._float("position_embd.weight")
        places = graph.node("Gather", [table, self._positions()], "position_embd")
        if encoder.token_types:
            types = self._float("token_types.weight")
            if encoder.token_types > 1:
                types = graph.node("Gather", [types, "token_type_ids"], "token_types")
            places = graph.node("Add", [places, types], "places")
        return self._norm("token_embd_norm", tokens, places)

    def _positions(self) -> str:
        """Rows of the table of positions, ``[sequence]`` or ``[batch, sequence]``."""
        graph, padding = self.graph, self.encoder.padding_id
        one = graph.constant("int64_one", np.asarray(1, np.int64))
        if padding is None:
            graph.node("Shape", ["input_ids"], "positions.length", start=1, end=2)
            zero = graph.constant("int64_zero", np.asarray(0, np.int64))
            stop = graph.node("Squeeze", ["positions.length"], "positions.stop")
            return graph.node("Range", [zero, stop, one], "positions")
        pad = graph.constant("padding_id", np.asarray(padding, np.int64))
        graph.node("Equal", ["input_ids", pad], "positions.padding")
        graph.node("Not", ["positions.padding"], "positions.token")
        graph.node("Cast", ["positions.token"], "positions.one", to=TensorProto.INT64)
        axis = graph.constant("int64_axis_1", np.asarray(1, np.int64))
        graph.node("CumSum", ["positions.one", axis], "positions.count")
        graph.node("Mul", ["positions.count", "positions.one"], "positions.counted")
        return graph.node("Add", ["positions.counted", pad], "positions")

    # --- layers ----------------------------------------------------------------------------------

    def _layer(self, index: int, stream: str, name: str) -> str:
        """The stream after layer ``index``, under ``name`` where it has one."""
        block = f"blk.{index}"
        parts = [self._linear(f"{block}.attn_{part}", stream) for part in ("q", "k", "v")]
        attention = self.graph.node(
            "MultiHeadAttention", [*parts, "", "mask"], f"{block}.attn", contrib=True,
            num_heads=self.encoder.heads, mask_filter_value=UNSEEN,
        )  # fmt: skip
        attention = self._linear(f"{block}.attn_output", attention)
        stream = self._norm(f"{block}.attn_output_norm", attention, stream)
        wide = self._linear(f"{block}.ffn_up", stream)
        wide = self._activate(f"{block}.ffn_act", wide, self.encoder.activation)
        narrow = self._linear(f"{block}.ffn_down", wide)
        return self._norm(f"{block}.layer_output_norm", narrow, stream, name)

    def _norm(self, role: str, x: str, branch: str, name: str = "") -> str:
        """The normed sum of ``x`` and ``branch``; ``name`` is its own where it is not the role."""
        weights = [self._float(f"{role}.weight"), self._float(f"{role}.bias")]
        return self.graph.node(
            "SkipLayerNormalization", [x, branch, *weights], role, outputs=[name or role],
            contrib=True, epsilon=self.encoder.epsilon,
        )  # fmt: skip

    def _activate(self, name: str, x: str, activation: Activation) -> str:
        if activation == "relu":
            return self.graph.node("Relu", [x], name)
        if activation == "tanh":
            return self.graph.node("Tanh", [x], name)
        if activation == "silu":
            # QuickGelu is x * sigmoid(alpha * x): SiLU in one operator.
            return self.graph.node("QuickGelu", [x], name, contrib=True, alpha=1.0)
        if activation == "gelu_tanh":
            # As exact as FastGelu, and took two thirds of its time on two cores.
            return self.graph.node("Gelu", [x], name, approximate="tanh")
        return self.graph.node("Gelu", [x], name, contrib=True)

    def _linear(self, role: str, x: str, grid: Grid | None = None, name: str = "") -> str:
        """``x`` by the weight of ``role``, and its bias; on the body's grid where none is given."""
        weight = f"{role}.weight"
        grid = grid or self.grids.of([weight])
        tensor = self.graph.store(weight, [self.tensors[weight]], grid, operators_of(grid).packer)
        return self._product(name or role, x, tensor, f"{role}.bias")

    def _product(self, name: str, x: str, tensor: OutputTensor, role: str) -> str:
        """``x`` by ``tensor``, with the bias of ``role`` where there is one."""
        bias = self._float(role) if role in self.tensors else None
        return operators_of(tensor.grid).matmul(self.graph, x, tensor, name, bias)

    def _float(self, role: str) -> str:
        ref = self.tensors[role]
        tensor = self.graph.store(role, [ref], FLOAT, "float")
        return self.graph.stored(tensor.arrays[0], TensorProto.FLOAT, ref.shape)

    # --- heads -----------------------------------------------------------------------------------

    def _vectors(self, hidden: str) -> None:
        graph, encoder = self.graph, self.encoder
        shape: list[int | str] = ["batch_size", "sequence_length", encoder.hidden_size]
        graph.output(HIDDEN, TensorProto.FLOAT, shape)
        if encoder.head.dense is not None:
            dense = self._linear("cls", self._first(hidden))
            self._activate(POOLED, dense, encoder.head.dense)
            graph.output(POOLED, TensorProto.FLOAT, ["batch_size", encoder.hidden_size])
        assert self.pipeline is not None, encoder.head
        pooled = [self._pooled(hidden, kind) for kind in self.pipeline.pooling]
        whole = pooled[0]
        if len(pooled) > 1:
            whole = graph.node("Concat", pooled, "pooled", axis=-1)
        for number, product in enumerate(self.pipeline.dense):
            whole = self._linear(f"dense.{number}", whole, FLOAT)
            if product.activation is not None:
                whole = self._activate(f"dense.{number}.act", whole, product.activation)
        if self.pipeline.normalize:
            graph.node("ReduceL2", [whole, graph.integers(-1)], "length", keepdims=1)
            least = graph.constant("shortest", np.asarray(SHORTEST, np.float32))
            graph.node("Max", ["length", least], "length.some")
            graph.node("Div", [whole, "length.some"], EMBEDDING)
        else:
            graph.node("Identity", [whole], EMBEDDING)
        width = self.pipeline.embedding_size(encoder.hidden_size)
        graph.output(EMBEDDING, TensorProto.FLOAT, ["batch_size", width])

    def _first(self, hidden: str) -> str:
        if not self._first_token:
            zero = self.graph.constant("int64_zero", np.asarray(0, np.int64))
            self._first_token = self.graph.node("Gather", [hidden, zero], "first", axis=1)
        return self._first_token

    def _pooled(self, hidden: str, kind: Pooling) -> str:
        graph, name = self.graph, f"pooled.{kind}"
        if kind == "cls":
            return self._first(hidden)
        graph.node("Unsqueeze", ["attention_mask", graph.integers(2)], f"{name}.at")
        if kind == "max":
            graph.node("Cast", [f"{name}.at"], f"{name}.seen", to=TensorProto.BOOL)
            below = graph.constant("below_all", np.asarray(BELOW_ALL, np.float32))
            graph.node("Where", [f"{name}.seen", hidden, below], f"{name}.values")
            return graph.node("ReduceMax", [f"{name}.values", graph.integers(1)], name, keepdims=0)
        graph.node("Cast", [f"{name}.at"], f"{name}.weights", to=TensorProto.FLOAT)
        graph.node("Mul", [hidden, f"{name}.weights"], f"{name}.values")
        graph.node("ReduceSum", [f"{name}.values", graph.integers(1)], f"{name}.sum", keepdims=0)
        graph.node("ReduceSum", [f"{name}.weights", graph.integers(1)], f"{name}.n", keepdims=0)
        least = graph.constant("no_tokens", np.asarray(NO_TOKENS, np.float32))
        count = graph.node("Max", [f"{name}.n", least], f"{name}.count")
        if kind == "mean_sqrt_len":
            count = graph.node("Sqrt", [count], f"{name}.root")
        return graph.node("Div", [f"{name}.sum", count], name)

    def _classes(self, hidden: str) -> None:
        head = self.encoder.head
        x = hidden
        shape: list[int | str] = ["batch_size", "sequence_length", len(head.labels)]
        if head.task == "sequence_classification":
            assert head.dense is not None, head
            x = self._activate("cls.act", self._linear("cls", self._first(hidden)), head.dense)
            shape = ["batch_size", len(head.labels)]
        # A few rows, which decide everything: rounding them would save next to nothing.
        self._linear("cls.output", x, FLOAT, LOGITS)
        self.graph.output(LOGITS, TensorProto.FLOAT, shape)

    def _masked(self, hidden: str) -> None:
        graph, head = self.graph, self.encoder.head
        assert head.dense is not None, head
        x = self._activate("cls.act", self._linear("cls", hidden), head.dense)
        weights = [self._float("cls.norm.weight"), self._float("cls.norm.bias")]
        normed = graph.node(
            "LayerNormalization", [x, *weights], "cls.norm", axis=-1, epsilon=self.encoder.epsilon
        )
        table = self.embedding
        if not head.tied or self.grids.head != self.grids.embed:
            source = "token_embd.weight" if head.tied else "output.weight"
            packer = operators_of(self.grids.head).packer
            table = graph.store("output.weight", [self.tensors[source]], self.grids.head, packer)
        self._product(LOGITS, normed, table, "output.bias")
        shape: list[int | str] = ["batch_size", "sequence_length", self.encoder.vocab_size]
        graph.output(LOGITS, TensorProto.FLOAT, shape)


def outputs_of(encoder: Encoder) -> tuple[str, ...]:
    """The outputs of the graph of ``encoder``, the one that answers first."""
    if encoder.head.task != "embeddings":
        return (LOGITS,)
    return (EMBEDDING, HIDDEN, *((POOLED,) if encoder.head.dense else ()))
