"""Norms of the decoder graph; the sums of the residual stream ride in those before its parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgellm.architectures.decoder import Decoder
from edgellm.export.linear_graph import LinearGraph
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.tensors import Array, derived


@dataclass(frozen=True)
class NormsGraph:
    """Writes the norms of ``decoder`` into ``graph``; ``linear`` stores their weights."""

    graph: GraphBuilder
    decoder: Decoder
    linear: LinearGraph

    def pre_norm(self, name: str, stream: str, branch: str) -> tuple[str, str]:
        """As ``summed``, or the sum alone where no norm stands before a part of a layer."""
        if self.decoder.pre_norms:
            return self.summed(name, stream, branch)
        # By a name of its own, also where the stream is what the graph is given.
        if branch:
            stream = self.graph.node("Add", [stream, branch], f"{name}.stream")
        else:
            stream = self.graph.node("Identity", [stream], f"{name}.stream")
        return stream, stream

    def summed(self, name: str, stream: str, branch: str) -> tuple[str, str]:
        """The normed sum of stream and branch, and the sum itself: the new residual stream."""
        if not branch:
            return self.alone(name, stream), stream
        norm = self.decoder.norm
        operator = {"rms": "SkipSimplifiedLayerNormalization", "layer": "SkipLayerNormalization"}
        outputs = [name, "", "", f"{name}.stream"]
        self.graph.node(
            operator[norm.kind], [stream, branch, *self._weights(name)], name,
            outputs=outputs, contrib=True, epsilon=norm.epsilon,
        )  # fmt: skip
        return outputs[0], outputs[3]

    def alone(self, name: str, x: str, epsilon: float | None = None) -> str:
        """``x`` normed; ``epsilon`` where it is not that of the other norms."""
        norm = self.decoder.norm
        operator = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}
        return self.graph.node(
            operator[norm.kind],
            [x, *self._weights(name)],
            name,
            axis=-1,
            epsilon=epsilon or norm.epsilon,
        )

    def post_norm(self, name: str, x: str) -> str:
        """``x`` normed where a norm stands behind a part of a layer."""
        return self.alone(name, x) if self.decoder.post_norms else x

    def by_head(self, name: str, x: str) -> str:
        """``x`` ``[batch, sequence, heads, head_dim]`` normed, and weighed by a row for each head.

        onnxruntime's norms have the same weights everywhere.
        """
        graph, norm = self.graph, self.decoder.norm
        operator = {"rms": "SimplifiedLayerNormalization", "layer": "LayerNormalization"}
        ones = graph.floats("head_norm.ones", np.ones(self.decoder.head_dim, np.float32))
        plain = graph.node(
            operator[norm.kind], [x, ones], f"{name}.plain", axis=-1, epsilon=norm.epsilon
        )
        return graph.node("Mul", [plain, self.linear.vector(f"{name}.weight")], name)

    def _weights(self, name: str) -> list[str]:
        norm = self.decoder.norm
        if not norm.weight:
            ones = np.ones(self.decoder.hidden_size, np.float32)
            return [self.graph.floats("norm.ones", ones)]
        weight = self.linear.tensors[f"{name}.weight"]
        if norm.offset:
            weight = derived(weight, _plus_one)
        names = [self.linear.stored_float(weight.with_role(f"{name}.weight"))]
        return [*names, self.linear.vector(f"{name}.bias")] if norm.biased else names


def _plus_one(weight: Array) -> Array:
    return weight + np.float32(1.0)
