"""A ``Decoder`` as an ONNX graph of onnxruntime's operators, with a KV cache as inputs and outputs.

Inputs: ``input_ids`` ``[batch, sequence]``, ``attention_mask`` ``[batch, total]``, past keys and
values ``[batch, cache_heads, past, cache_dim]`` (of a short convolution its state, see
``short_convolution``), and ``logits_from``, which may be left out: the first position of the step
whose logits are wanted, counted from the end when negative (-1, the last, is the default; 0 gives
all). Outputs: ``logits`` and the present keys and values. Past and present may share one buffer.

Here stands the network layer by layer, from the embedding to the head; what its parts consist of is
in ``attention_graph``, ``feed_forward_graph``, ``short_convolution`` and ``state_space``, what they
are made of in ``linear_graph``, ``norms_graph`` and ``positions_graph``. The step is cut down to
the wanted positions before the last attention output and feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.experts import expert_of
from edgellm.architectures.family import SMALL_PRODUCT
from edgellm.export.attention_graph import AttentionGraph
from edgellm.export.experts_graph import Routed
from edgellm.export.feed_forward_graph import FeedForwardGraph
from edgellm.export.linear_graph import FLOAT, Grids, LinearGraph
from edgellm.export.norms_graph import NormsGraph
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.export.positions_graph import PositionsGraph
from edgellm.export.short_convolution import gated_convolution
from edgellm.export.state_space import StateSpaceLayer
from edgellm.tensors import TensorRef

EXPRESSIBLE = frozenset(Feature)
"""Features that this graph computes; each is proven against transformers in ``tests/parity``."""

HEAD_INPUT = "output_norm"
"""The output of ``DecoderGraph.build_output_norm``."""

INT64_MAX = np.iinfo(np.int64).max


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

    def __post_init__(self) -> None:
        graph, decoder = self.graph, self.decoder
        self._linear = LinearGraph(graph, self.tensors, self.grids, self.inputs)
        self._norms = NormsGraph(graph, decoder, self._linear)
        self._positions = PositionsGraph(graph, decoder, self._linear, self.context_length)
        self._attention = AttentionGraph(
            graph, decoder, self._linear, self._norms, self._positions, self.int8_cache
        )
        self._feed_forward = FeedForwardGraph(graph, decoder, self._linear)

    def build(self) -> None:
        """Add the whole network: inputs, layers, head, outputs."""
        graph, decoder = self.graph, self.decoder
        graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
        graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
        logits_from = graph.default_input("logits_from", np.asarray([-1], np.int64))
        self._positions.count()

        # `stream` is the residual stream, `branch` what is still to be added to it.
        stream, branch = self._embed(), ""
        last = len(decoder.layers) - 1
        for index in range(len(decoder.layers)):
            stream, branch = self._layer(
                index, stream, branch, logits_from if index == last else ""
            )
        normed, _ = self._norms.summed("output_norm", stream, branch)
        self._head(self._scaled("output_norm.scaled", normed, decoder.logit_scale))

    def build_layer(self, index: int, *, taps: bool = False) -> None:
        """Add one layer alone: whole sequences of the residual stream go in and come out.

        Inputs: ``stream`` ``[batch, sequence, hidden]``, ``seqlens_k`` ``[batch]`` (tokens of each
        sequence less one) and ``total_length`` (tokens of the longest). Output: ``stream_out``;
        with ``taps``, the inputs of the layer's products too (``self.inputs`` names them).
        Nothing is cached, and no token before the sequence is seen.
        """
        graph = self.graph
        shape = self._stream_shape()
        stream = graph.input("stream", TensorProto.FLOAT, shape)
        graph.input("seqlens_k", TensorProto.INT32, ["batch_size"])
        graph.input("total_length", TensorProto.INT32, [1])
        stream, branch = self._layer(index, stream, "", cached=False, taps=taps)
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
        self._norms.alone(HEAD_INPUT, stream)
        self.graph.output(HEAD_INPUT, TensorProto.FLOAT, shape)

    def _stream_shape(self) -> list[int | str]:
        return ["batch_size", "sequence_length", self.decoder.hidden_size]

    def _layer(
        self,
        index: int,
        stream: str,
        branch: str,
        cut_from: str = "",
        *,
        cached: bool = True,
        taps: bool = False,
    ) -> tuple[str, str]:
        """The stream after layer ``index``, and what is still to be added to it.

        With ``cut_from``, of the positions from there on only.
        """
        name, parallel = f"blk.{index}", self.decoder.parallel
        normed, stream = self._norms.pre_norm(f"{name}.attn_norm", stream, branch)
        layer = self.decoder.layers[index]
        if layer.scan is not None:
            branch, output = self._state_space(index, normed, cached=cached), "ssm_out"
        elif layer.convolution is not None:
            branch, output = self._convolution(index, normed, cached=cached), "shortconv.out_proj"
        else:
            branch, output = self._attention.build(index, normed, cached=cached), "attn_output"
        if cut_from:
            stream = self._cut(f"{name}.stream_cut", stream, cut_from)
            branch = self._cut(f"{name}.attn_cut", branch, cut_from)
            if self.decoder.shared_norm:
                normed = self._cut(f"{name}.norm_cut", normed, cut_from)
        branch = self._linear.of_layer(f"{name}.{output}", [output], branch, index)
        branch = self._norms.post_norm(f"{name}.post_attention_norm", branch)
        branch = self._scaled(f"{name}.attn_scaled", branch, self.decoder.residual_scale)
        if not self.decoder.feed_forward:
            return stream, branch
        if not parallel:
            normed, stream = self._norms.pre_norm(f"{name}.ffn_norm", stream, branch)
        elif not self.decoder.shared_norm:
            normed = self._norms.alone(f"{name}.ffn_norm", stream)
        mixed, self.routed = self._feed_forward.build(index, normed, taps=taps)
        mixed = self._norms.post_norm(f"{name}.post_ffw_norm", mixed)
        mixed = self._scaled(f"{name}.ffn_scaled", mixed, self.decoder.residual_scale)
        if parallel:
            mixed = self.graph.node("Add", [branch, mixed], f"{name}.both")
        return stream, mixed

    def _convolution(self, index: int, x: str, *, cached: bool) -> str:
        """What the output product of a short convolution is given."""
        settings, name = self.decoder.layers[index].convolution, f"blk.{index}.shortconv"
        assert settings is not None
        parts = self._linear.of_layer(f"{name}.in_proj", ["shortconv.in_proj"], x, index)
        bias = self._linear.vector(f"{name}.conv.bias") if settings.biased else None
        weight = self._linear.vector(f"{name}.conv.weight")
        return gated_convolution(
            self.graph, index, parts, weight, bias, settings.width, self.decoder.hidden_size,
            cached=cached,
        )  # fmt: skip

    def _state_space(self, index: int, x: str, *, cached: bool) -> str:
        """What the output product of a state-space layer is given."""
        settings, block = self.decoder.layers[index].scan, f"blk.{index}"
        assert settings is not None

        def product(part: str, value: str) -> str:
            small = FLOAT if part == SMALL_PRODUCT else None
            return self._linear.of_layer(f"{block}.{part}", [part], value, index, small)

        layer = StateSpaceLayer(
            self.graph, index, settings, lambda part: self._linear.vector(f"{block}.{part}"),
            product, epsilon=self.decoder.norm.epsilon, cached=cached,
        )  # fmt: skip
        return layer.scanned(x)

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
            stream = self._norms.alone("token_embd_norm", stream)
        if decoder.learned_positions is not None:
            stream = graph.node("Add", [stream, self._positions.learned()], "position_embd.sum")
        return stream

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
        bias = self._linear.vector("output.bias") if decoder.head_bias else None
        capped, narrow = decoder.logit_softcap is not None, graph.element != TensorProto.FLOAT
        name = "logits.narrow" if narrow else "logits.plain" if capped else "logits"
        logits = self._linear.product(name, x, tensor, ["output.weight"], bias)
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

    def _cut(self, name: str, x: str, start: str) -> str:
        graph = self.graph
        return graph.node("Slice", [x, start, graph.integers(INT64_MAX), graph.integers(1)], name)

    def _scaled(self, name: str, x: str, factor: float) -> str:
        """``x`` times ``factor``."""
        if factor == 1.0:
            return x
        number = self.graph.floats(f"{name}.factor", np.asarray([factor], np.float32))
        return self.graph.node("Mul", [x, number], name)
