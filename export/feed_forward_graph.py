"""Feed-forward of the decoder graph: two or three products around an activation, or experts.

Gate and up are two products: as one they need a copy to part them, which no second thread helps
with and which costs a tenth of the prefill on two threads, and a token gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgellm.architectures.decoder import Decoder, Experts
from edgellm.architectures.experts import ROUTER, SHARED_GATE
from edgellm.export.experts_graph import ExpertsGraph, Routed, for_one_operator
from edgellm.export.linear_graph import LinearGraph
from edgellm.export.onnx_graph import GraphBuilder


@dataclass(frozen=True)
class FeedForwardGraph:
    """Writes the feed-forward of ``decoder``'s layers into ``graph``, by products of ``linear``."""

    graph: GraphBuilder
    decoder: Decoder
    linear: LinearGraph

    def build(self, index: int, x: str, *, taps: bool) -> tuple[str, Routed | None]:
        """The answer of layer ``index`` to ``x``, and with ``taps`` what its experts are given."""
        experts = self.decoder.layers[index].experts
        if experts is None:
            return self._feed_forward(index, x), None
        return self._mixture(index, x, experts, taps=taps)

    def _feed_forward(self, index: int, x: str) -> str:
        graph, decoder = self.graph, self.decoder
        name = f"blk.{index}.ffn"
        if not decoder.gated_mlp:
            hidden = self.linear.of_layer(f"{name}_up", ["ffn_up"], x, index)
            active = self._activate(f"{name}_act", hidden)
        else:
            if decoder.fused_gate_up:
                both = self.linear.of_layer(f"{name}_gate_up", ["ffn_up"], x, index)
                halves = graph.integers(decoder.ffn_size, decoder.ffn_size)
                gate, up = f"{name}_gate", f"{name}_up"
                graph.node("Split", [both, halves], f"{name}_split", outputs=[gate, up], axis=-1)
            else:
                gate = self.linear.of_layer(f"{name}_gate", ["ffn_gate"], x, index)
                up = self.linear.of_layer(f"{name}_up", ["ffn_up"], x, index)
            active = self._gated(name, gate, up)
        return self.linear.of_layer(f"{name}_down", ["ffn_down"], active, index)

    def _mixture(
        self, index: int, x: str, experts: Experts, *, taps: bool
    ) -> tuple[str, Routed | None]:
        """The answers of a layer's experts."""
        gates = (ROUTER, SHARED_GATE)[: 1 + experts.shared_gate]
        self.linear.inputs[x] = [f"blk.{index}.{role}" for role in gates]
        fused = None
        if self.decoder.activation == "silu" and not taps:
            grids = self.linear.grids
            fused = for_one_operator(
                self.graph, experts, index, self.linear.tensors,
                lambda role: grids.by_role.get(role, grids.body),
            )  # fmt: skip
        mixture = ExpertsGraph(
            self.graph,
            experts,
            self.decoder.hidden_size,
            index,
            lambda name, roles, x: self.linear.of_layer(name, roles, x, index),
            self.linear.vector,
            self._gated,
            fused,
        )
        return mixture.build(x, taps=taps)

    def _gated(self, name: str, gate: str, up: str) -> str:
        gate = self._activate(f"{name}_act", gate)
        return self.graph.node("Mul", [gate, up], f"{name}_gated")

    def _activate(self, name: str, x: str) -> str:
        activation = self.decoder.activation
        if activation == "relu":
            return self.graph.node("Relu", [x], name)
        operator = {"silu": "QuickGelu", "gelu_tanh": "FastGelu", "gelu": "Gelu"}
        # QuickGelu is x * sigmoid(alpha * x): SiLU in one operator.
        attributes: dict[str, Any] = {"alpha": 1.0} if activation == "silu" else {}
        return self.graph.node(operator[activation], [x], name, contrib=True, **attributes)
