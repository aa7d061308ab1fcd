"""A mixture of experts in ONNX: one operator for all, or vectors brought to each and back.

On grids of 4 or 8 bits with scales by block, onnxruntime's ``QMoE`` computes a layer's experts, by
the products that ``MatMulNBits`` has. It answers alike to 1e-6, and saves what the plain operators
take for each expert whether it has tokens or not: of 128 experts of 2048 x 768, eight for a token,
1.3 ms a layer in place of 2 to 8 on two threads of an AMD EPYC, and for 256 tokens 370 for 650.

Everywhere else, and where calibration looks at what each expert is given, it is plain operators.
The router's product, its scores and ``TopK`` say which experts each token passes. One sort brings
the assignments into the order of the experts, one ``Gather`` lays the tokens' vectors in it, and
``Split`` hands every expert those that are its own, which may be none: a product of no rows
computes nothing, so that a step reads the weights of the chosen experts alone. Their answers lie
one after another again; a ``Gather`` puts them back, and a product with the router's weights sums
those of each token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
from onnx import TensorProto

from edgellm.architectures.decoder import Experts
from edgellm.architectures.experts import ROUTER, ROUTER_BIAS, SHARED_GATE, expert_role
from edgellm.export.layout import OutputTensor
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.onnx_operators import experts_product, operators_of
from edgellm.quant.grid import Grid
from edgellm.tensors import TensorRef

Linear = Callable[[str, list[str], str], str]
"""``linear(name, parts, x)``: the product of ``x`` with weights of the layer, by part of a role."""

Stored = Callable[[str], str]
"""``stored(role)``: a tensor of floats as a value of the graph."""

CHOSEN_SCORE = -1e30
"""What the scores of experts outside of the best groups are taken for: no sigmoid comes near."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Values of a layer's graph that calibration needs to tell the experts' inputs apart.

    ``order`` ``[tokens * used]`` holds assignments (token times used plus which of its choices)
    in the order of the experts, ``counts`` ``[experts]`` how many each has. ``inputs``: values
    ``[tokens * used, in]`` in that order, and for each the roles of every expert's weights.
    """

    experts: Experts
    order: str
    counts: str
    inputs: Mapping[str, tuple[tuple[str, ...], ...]]


def for_one_operator(
    graph: GraphBuilder,
    experts: Experts,
    index: int,
    tensors: Mapping[str, TensorRef],
    grid_of: Callable[[str], Grid],
) -> tuple[OutputTensor, OutputTensor] | None:
    """Gate and up in turns, and down, of all experts of layer ``index``, placed in the data file.

    None where their grids are not one that ``QMoE`` has on a CPU.
    """
    roles = [
        [expert_role(index, part, n) for n in range(experts.count) for part in parts]
        for parts in (("gate", "up"), ("down",))
    ]
    every = {grid_of(role) for role in chain(*roles)}
    grid = next(iter(every))
    if len(every) > 1 or grid.kind != "affine" or graph.element != TensorProto.FLOAT:
        return None
    packer = operators_of(grid).packer
    gate_up, down = (
        graph.store(
            f"blk.{index}.ffn_{name}_exps.weight",
            [tensors[role] for role in each],
            grid,
            packer,
            experts=experts.count,
            in_turns=name == "gate_up",
        )
        for name, each in zip(("gate_up", "down"), roles, strict=True)
    )
    return gate_up, down


@dataclass(frozen=True)
class ExpertsGraph:
    """Writes the mixture ``experts`` of layer ``index`` into ``graph``.

    ``linear`` and ``stored`` are the decoder graph's, ``gated(name, gate, up)`` its activation.
    ``fused``: gate and up in turns, and down, of all experts, where ``QMoE`` computes them.
    """

    graph: GraphBuilder
    experts: Experts
    hidden: int
    index: int
    linear: Linear
    stored: Stored
    gated: Callable[[str, str, str], str]
    fused: tuple[OutputTensor, OutputTensor] | None = None

    @property
    def name(self) -> str:
        return f"blk.{self.index}.ffn"

    def build(self, x: str, *, taps: bool = False) -> tuple[str, Routed | None]:
        """The answers ``[batch, sequence, hidden]`` to ``x``, and with ``taps`` what to look at."""
        graph, name = self.graph, self.name
        flat = graph.node("Reshape", [x, graph.integers(-1, self.hidden)], f"{name}.tokens")
        scores, ranked = self._scores(flat)
        routed = None
        if self.fused is not None:
            mixed = self._fused(flat, scores, ranked, self.fused)
        else:
            weights, chosen = self._route(scores, ranked)
            mixed, routed = self._mixed(flat, weights, chosen, taps)
        shape = graph.node("Shape", [x], f"{name}.shape")
        mixed = graph.node("Reshape", [mixed, shape], f"{name}.mixture")
        if self.experts.shared_width:
            mixed = graph.node("Add", [mixed, self._shared(x)], f"{name}.with_shared")
        return mixed, routed

    def _fused(
        self, flat: str, scores: str, ranked: str, tensors: tuple[OutputTensor, OutputTensor]
    ) -> str:
        router = self.experts.router
        mixed = experts_product(
            self.graph, flat, ranked, scores, tensors, f"{self.name}.experts",
            used=self.experts.used, normalized=router.normalized,
        )  # fmt: skip
        if router.factor == 1.0:
            return mixed
        factor = self.graph.floats(f"{self.name}.factor", np.asarray(router.factor, np.float32))
        return self.graph.node("Mul", [mixed, factor], f"{self.name}.scaled")

    def _scores(self, flat: str) -> tuple[str, str]:
        """Scores ``[tokens, experts]``, and those that the choice goes by."""
        graph, name, router = self.graph, f"{self.name}.router", self.experts.router
        weight = self.stored(f"blk.{self.index}.{ROUTER}")
        logits = graph.node("FusedMatMul", [flat, weight], name, contrib=True, transB=1)
        if graph.element != TensorProto.FLOAT:
            # Scores in halves would choose other experts where two are close.
            logits = graph.node("Cast", [logits], f"{name}.wide", to=TensorProto.FLOAT)
        operator = {"softmax": "Softmax", "sigmoid": "Sigmoid"}[router.scores]
        scores = graph.node(operator, [logits], f"{name}.scores")
        return scores, self._ranked(scores)

    def _route(self, scores: str, ranked: str) -> tuple[str, str]:
        """Weights and numbers ``[tokens, used]`` of the experts that each token passes."""
        graph, name, router = self.graph, f"{self.name}.router", self.experts.router
        used = graph.integers(self.experts.used)
        outputs = [f"{name}.best", f"{name}.chosen"]
        weights = graph.node("TopK", [ranked, used], f"{name}.top", outputs=outputs, axis=-1)
        chosen = outputs[1]
        if ranked != scores:
            weights = graph.node("GatherElements", [scores, chosen], f"{name}.unranked", axis=-1)
        if router.normalized:
            total = graph.node(
                "ReduceSum", [weights, graph.integers(-1)], f"{name}.total", keepdims=1
            )
            weights = graph.node("Div", [weights, total], f"{name}.shares")
        if router.factor != 1.0:
            factor = graph.constant(f"{name}.factor", np.asarray(router.factor, np.float32))
            weights = graph.node("Mul", [weights, factor], f"{name}.scaled")
        if graph.element != TensorProto.FLOAT:
            weights = graph.node("Cast", [weights], f"{name}.weights", to=graph.element)
        return weights, chosen

    def _ranked(self, scores: str) -> str:
        """The scores that the choice goes by: with the bias, of the best groups."""
        graph, name, router = self.graph, f"{self.name}.router", self.experts.router
        if router.bias:
            bias = self.stored(f"blk.{self.index}.{ROUTER_BIAS}")
            if graph.element != TensorProto.FLOAT:
                bias = graph.node("Cast", [bias], f"{name}.bias", to=TensorProto.FLOAT)
            scores = graph.node("Add", [scores, bias], f"{name}.biased")
        if router.groups == 1:
            return scores
        by_group = graph.integers(-1, router.groups, self.experts.count // router.groups)
        grouped = graph.node("Reshape", [scores, by_group], f"{name}.groups")
        tops = {"best": 1, "two best": 2}[router.group_score]
        outputs = [f"{name}.group_best", f"{name}.group_places"]
        best = graph.node(
            "TopK", [grouped, graph.integers(tops)], f"{name}.group_top", outputs=outputs, axis=-1
        )
        worth = graph.node(
            "ReduceSum", [best, graph.integers(-1)], f"{name}.group_worth", keepdims=0
        )
        outputs = [f"{name}.groups_worth", f"{name}.groups_chosen"]
        graph.node(
            "TopK", [worth, graph.integers(router.groups_used)], f"{name}.groups_top",
            outputs=outputs, axis=-1,
        )  # fmt: skip
        depth = graph.constant(f"{name}.depth", np.asarray(router.groups, np.int64))
        marks = graph.constant(f"{name}.marks", np.asarray([0, 1], np.float32))
        hot = graph.node("OneHot", [outputs[1], depth, marks], f"{name}.groups_hot", axis=-1)
        kept = graph.node("ReduceSum", [hot, graph.integers(1)], f"{name}.groups_kept", keepdims=0)
        kept = graph.node("Unsqueeze", [kept, graph.integers(-1)], f"{name}.group_masks")
        kept = graph.node("Cast", [kept], f"{name}.group_mask", to=TensorProto.BOOL)
        low = graph.constant(f"{name}.low", np.asarray(CHOSEN_SCORE, np.float32))
        masked = graph.node("Where", [kept, grouped, low], f"{name}.groups_masked")
        return graph.node(
            "Reshape", [masked, graph.integers(-1, self.experts.count)], f"{name}.ranked"
        )

    def _mixed(self, flat: str, weights: str, chosen: str, taps: bool) -> tuple[str, Routed | None]:
        """The weighed sums ``[tokens, hidden]`` of the chosen experts' answers."""
        graph, name, experts = self.graph, self.name, self.experts
        assigned = graph.node("Reshape", [chosen, graph.integers(-1)], f"{name}.assigned")
        total = graph.node("Shape", [assigned], f"{name}.total")
        # Of equal values the earlier comes first (ONNX's TopK), so that this is a stable sort.
        outputs = [f"{name}.sorted", f"{name}.order"]
        graph.node("TopK", [assigned, total], f"{name}.sort", outputs=outputs, axis=0, largest=0)
        order = outputs[1]
        counts = self._counts(assigned, total)
        used = graph.constant(f"int64_used_{experts.used}", np.asarray(experts.used, np.int64))
        tokens = graph.node("Div", [order, used], f"{name}.sources")
        vectors = graph.node("Gather", [flat, tokens], f"{name}.vectors")
        pieces = [f"{name}.{expert}.in" for expert in range(experts.count)]
        graph.node("Split", [vectors, counts], f"{name}.split", outputs=pieces, axis=0)
        inner = [self._inner(expert, piece) for expert, piece in enumerate(pieces)]
        answers = [
            self.linear(f"{name}_down_exps.{expert}", [f"ffn_down_exps.{expert}"], each)
            for expert, each in enumerate(inner)
        ]
        together = graph.node("Concat", answers, f"{name}.answers", axis=0)
        back = graph.node("Gather", [together, self._inverse(order, total)], f"{name}.in_place")
        by_token = graph.integers(-1, experts.used, self.hidden)
        back = graph.node("Reshape", [back, by_token], f"{name}.by_token")
        row = graph.node("Unsqueeze", [weights, graph.integers(1)], f"{name}.weight_rows")
        mixed = graph.node("MatMul", [row, back], f"{name}.weighed")
        mixed = graph.node("Squeeze", [mixed, graph.integers(1)], f"{name}.mixed")
        if not taps:
            return mixed, None
        down = graph.node("Concat", inner, f"{name}.inner", axis=0)
        return mixed, Routed(experts, order, counts, {
            vectors: tuple(self._roles("gate", "up", expert=e) for e in range(experts.count)),
            down: tuple(self._roles("down", expert=e) for e in range(experts.count)),
        })  # fmt: skip

    def _counts(self, assigned: str, total: str) -> str:
        """How many assignments each expert has."""
        graph, name = self.graph, self.name
        count = self.experts.count
        zeros = graph.constant(f"int64_zeros_{count}", np.zeros(count, np.int64))
        one = graph.constant("int64_at_1", np.asarray(1, np.int64))
        ones = graph.node("Expand", [one, total], f"{name}.ones")
        return graph.node(
            "ScatterElements", [zeros, assigned, ones], f"{name}.counts", axis=0, reduction="add"
        )

    def _inverse(self, order: str, total: str) -> str:
        """For each assignment, its place in ``order``."""
        graph, name = self.graph, self.name
        zero, one = (graph.constant(f"int64_at_{n}", np.asarray(n, np.int64)) for n in (0, 1))
        scalar = graph.constant("int64_axes", np.asarray([0], np.int64))
        end = graph.node("Squeeze", [total, scalar], f"{name}.end")
        places = graph.node("Range", [zero, end, one], f"{name}.places")
        return graph.node("ScatterElements", [order, order, places], f"{name}.inverse", axis=0)

    def _inner(self, expert: int, x: str) -> str:
        """What the expert's last product is given."""
        gate = self.linear(f"{self.name}_gate_exps.{expert}", [f"ffn_gate_exps.{expert}"], x)
        up = self.linear(f"{self.name}_up_exps.{expert}", [f"ffn_up_exps.{expert}"], x)
        return self.gated(f"{self.name}.{expert}", gate, up)

    def _shared(self, x: str) -> str:
        graph, name = self.graph, f"{self.name}.shared"
        gate = self.linear(f"{self.name}_gate_shexp", ["ffn_gate_shexp"], x)
        up = self.linear(f"{self.name}_up_shexp", ["ffn_up_shexp"], x)
        answer = self.linear(
            f"{self.name}_down_shexp", ["ffn_down_shexp"], self.gated(name, gate, up)
        )
        if not self.experts.shared_gate:
            return answer
        weight = self.stored(f"blk.{self.index}.{SHARED_GATE}")
        logit = graph.node("FusedMatMul", [x, weight], f"{name}.logit", contrib=True, transB=1)
        share = graph.node("Sigmoid", [logit], f"{name}.share")
        return graph.node("Mul", [answer, share], f"{name}.shared_answer")

    def _roles(self, *parts: str, expert: int) -> tuple[str, ...]:
        return tuple(f"blk.{self.index}.ffn_{part}_exps.{expert}.weight" for part in parts)
