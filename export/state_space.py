"""State-space layers of the decoder graph, Mamba 1 and 2, by onnxruntime's linear attention.

With every token a state h becomes ``exp(dt A) h + dt B x`` and gives ``C h``: that is
``LinearAttention`` with dt A as its decay, C as its query, B as its key and dt x as its value.
Mamba 2 has one decay a head. Of Mamba 1 every channel is a head of one value, whose decay differs
between the numbers of its state, which takes most of the time of a prompt (107 ms for 128 tokens of
mamba-130m's layer, of which its products take 13; Mamba 2's of that size takes 15).

``past.N.recurrent`` and ``present.N.recurrent`` ``[batch, heads, state, head_dim]``, as
onnxruntime-genai names them; the convolution's state is as ``short_convolution`` has it. Where a
prompt of a batch is padded at its end, steps of zero leave its state as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edgellm.architectures.decoder import StateSpace
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.short_convolution import convolved, own_tokens

Stored = Callable[[str], str]
"""The value of a tensor of the layer, by its role without ``blk.N.``."""

Product = Callable[[str, str], str]
"""A part of the layer, such as ``ssm_x``, by which a value is multiplied."""


class StateSpaceLayer:
    """Writes layer ``index`` into ``graph``; ``scanned`` gives what its output product is given."""

    def __init__(
        self,
        graph: GraphBuilder,
        index: int,
        settings: StateSpace,
        stored: Stored,
        product: Product,
        *,
        epsilon: float,
        cached: bool,
    ) -> None:
        self.graph, self.index, self.settings = graph, index, settings
        self.name = f"blk.{index}.ssm"
        self._stored, self._product = stored, product
        self._epsilon, self._cached = epsilon, cached

    def scanned(self, x: str) -> str:
        """``[batch, sequence, inner]`` of the normed stream ``[batch, sequence, hidden]``."""
        parts = self._product("ssm_in", x)
        return self._mamba_2(parts) if self.settings.heads else self._mamba_1(parts)

    def _mamba_1(self, parts: str) -> str:
        graph, name, settings = self.graph, self.name, self.settings
        inner, state = settings.inner, settings.state
        given, gate = self._split(parts, "parts", (("given", inner), ("gate", inner)))
        x = self._convolved(given, inner)
        sizes = (("rank", settings.step_rank), ("keys", state), ("queries", state))
        rank, keys, queries = self._split(self._product("ssm_x", x), "made", sizes)
        steps = self._steps(self._product("ssm_dt", rank))
        decay = graph.node("Mul", [self._last_axis(steps, "wide"), self._decay()], f"{name}.decays")
        by_channel = graph.integers(0, 0, inner * state)
        scanned = self._linear_attention(
            self._spread(queries, (1, state), (inner, state)),
            self._spread(keys, (1, state), (inner, state)),
            graph.node("Mul", [steps, x], f"{name}.values"),
            graph.node("Reshape", [decay, by_channel], f"{name}.decay"),
            heads=inner,
            width=1,
        )
        skipped = graph.node("Mul", [x, self._stored("ssm_d")], f"{name}.skipped")
        y = graph.node("Add", [scanned, skipped], f"{name}.y")
        return graph.node("Mul", [y, self._silu(gate, "gate_act")], f"{name}.gated")

    def _mamba_2(self, parts: str) -> str:
        graph, name, settings = self.graph, self.name, self.settings
        inner, heads, width = settings.inner, settings.heads, settings.inner // settings.heads
        shared = settings.groups * settings.state
        sizes = (("gate", inner), ("given", settings.convolved), ("steps_in", heads))
        gate, given, steps = self._split(parts, "parts", sizes)
        sizes = (("x", inner), ("keys", shared), ("queries", shared))
        x, keys, queries = self._split(self._convolved(given, settings.convolved), "made", sizes)
        biased = graph.node("Add", [steps, self._stored("ssm_dt.bias")], f"{name}.steps_biased")
        steps = self._steps(biased)
        by_head = graph.node("Reshape", [x, graph.integers(0, 0, heads, width)], f"{name}.by_head")
        flat = graph.integers(0, 0, inner)
        values = graph.node("Mul", [by_head, self._last_axis(steps, "wide")], f"{name}.stepped")
        shape = (settings.groups, 1, settings.state)
        wanted = (settings.groups, heads // settings.groups, settings.state)
        scanned = self._linear_attention(
            self._spread(queries, shape, wanted),
            self._spread(keys, shape, wanted),
            graph.node("Reshape", [values, flat], f"{name}.values"),
            graph.node("Mul", [steps, self._decay()], f"{name}.decay"),
            heads=heads,
            width=width,
        )
        ones = graph.integers(1)
        share = graph.node("Unsqueeze", [self._stored("ssm_d"), ones], f"{name}.share")
        skipped = graph.node("Mul", [by_head, share], f"{name}.skipped")
        skipped = graph.node("Reshape", [skipped, flat], f"{name}.skipped_flat")
        y = graph.node("Add", [scanned, skipped], f"{name}.y")
        gated = graph.node("Mul", [y, self._silu(gate, "gate_act")], f"{name}.gated")
        return self._normed(gated)

    # --- parts -----------------------------------------------------------------------------------

    def _split(self, value: str, label: str, parts: tuple[tuple[str, int], ...]) -> tuple[str, ...]:
        names = [f"{self.name}.{part}" for part, _ in parts]
        sizes = self.graph.integers(*(size for _, size in parts))
        self.graph.node("Split", [value, sizes], f"{self.name}.{label}", outputs=names, axis=-1)
        return tuple(names)

    def _convolved(self, given: str, channels: int) -> str:
        settings = self.settings
        bias = self._stored("ssm_conv1d.bias") if settings.convolution_bias else None
        mixed = convolved(
            self.graph, self.index, self.name, given, self._stored("ssm_conv1d.weight"), bias,
            settings.width, channels, cached=self._cached,
        )  # fmt: skip
        return self._silu(mixed, "convolved_act")

    def _silu(self, value: str, label: str) -> str:
        # x * sigmoid(alpha * x): SiLU in one operator.
        name = f"{self.name}.{label}"
        return self.graph.node("QuickGelu", [value], name, contrib=True, alpha=1.0)

    def _steps(self, value: str) -> str:
        """How far each token moves the state; zero for what only fills a prompt up."""
        steps = self.graph.node("Softplus", [value], f"{self.name}.softplus")
        if not self._cached:  # windows of calibration, one by one
            return steps
        return self.graph.node("Mul", [steps, _counts(self.graph)], f"{self.name}.steps")

    def _decay(self) -> str:
        """-exp of what is stored, which never changes."""
        raised = self.graph.node("Exp", [self._stored("ssm_a")], f"{self.name}.a_exp")
        return self.graph.node("Neg", [raised], f"{self.name}.a")

    def _last_axis(self, value: str, label: str) -> str:
        graph = self.graph
        return graph.node("Unsqueeze", [value, graph.integers(-1)], f"{self.name}.{label}")

    def _spread(self, value: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> str:
        """The last axis of ``value`` as ``shape``, repeated to ``wanted``, in one axis again."""
        graph = self.graph
        parted = graph.node("Reshape", [value, graph.integers(0, 0, *shape)], f"{value}.parted")
        grown = graph.integers(*(1,) * 2, *wanted)
        whole = graph.node("Expand", [parted, grown], f"{value}.spread")
        size = int(np.prod(wanted))
        return graph.node("Reshape", [whole, graph.integers(0, 0, size)], f"{value}.flat")

    def _linear_attention(
        self, queries: str, keys: str, values: str, decay: str, *, heads: int, width: int
    ) -> str:
        graph, state = self.graph, ""
        outputs = [f"{self.name}.scanned", f"{self.name}.state"]
        shape: list[int | str] = ["batch_size", heads, self.settings.state, width]
        if self._cached:
            state = graph.input(f"past.{self.index}.recurrent", graph.element, shape)
            outputs[1] = f"present.{self.index}.recurrent"
            graph.output(outputs[1], graph.element, shape)
        return graph.node(
            "LinearAttention", [queries, keys, values, state, decay], outputs[0], outputs=outputs,
            contrib=True, update_rule="gated", scale=1.0, q_num_heads=heads, kv_num_heads=heads,
        )  # fmt: skip

    def _normed(self, value: str) -> str:
        """Mamba 2's norm of each group by itself, with weights for all."""
        graph, name, settings = self.graph, self.name, self.settings
        width = settings.inner // settings.groups
        by_group = graph.integers(0, 0, settings.groups, width)
        parted = graph.node("Reshape", [value, by_group], f"{name}.groups")
        ones = graph.floats(f"ones_{width}", np.ones(width, np.float32))
        normed = graph.node(
            "SimplifiedLayerNormalization", [parted, ones], f"{name}.normed", axis=-1,
            epsilon=self._epsilon,
        )  # fmt: skip
        flat = graph.node("Reshape", [normed, graph.integers(0, 0, settings.inner)], f"{name}.flat")
        return graph.node("Mul", [flat, self._stored("ssm_norm.weight")], f"{name}.weighed")


def _counts(graph: GraphBuilder) -> str:
    """1 for tokens that are of their sequence, 0 for what fills it up, ``[batch, sequence, 1]``."""
    name = "step.counts"
    if not graph.has(name):
        own = graph.node("Unsqueeze", [own_tokens(graph), graph.integers(1)], "step.own_column")
        zero, one = (graph.constant(f"int64_at_{n}", np.asarray(n, np.int64)) for n in (0, 1))
        scalar = graph.constant("int64_axes", np.asarray([0], np.int64))
        count = graph.node("Squeeze", ["step.length", scalar], "step.count")
        places = graph.node("Range", [zero, count, one], "step.places")
        inside = graph.node("Less", [places, own], "step.inside")
        column = graph.node("Unsqueeze", [inside, graph.integers(2)], "step.inside_column")
        graph.node("Cast", [column], name, to=graph.element)
    return name
