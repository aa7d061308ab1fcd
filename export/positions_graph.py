"""What counts positions in the decoder graph: lengths, places, and what is read off by them.

Places of a step's tokens are rows of a learned table, turn queries and keys (rope), and say how far
apart tokens are (ALiBi) and which come after the one that asks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from edgellm.architectures.decoder import Decoder, Rope
from edgellm.export.linear_graph import LinearGraph
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.export.rope_table import rope_tables


@dataclass
class PositionsGraph:
    """Writes what counts positions of ``decoder`` into ``graph``, each of it once.

    ``linear`` stores the tables; those of ropes have ``context_length`` rows.
    """

    graph: GraphBuilder
    decoder: Decoder
    linear: LinearGraph
    context_length: int
    _counted: str = ""
    _biased: str = ""
    _ropes: dict[Rope, tuple[str, str]] = field(default_factory=dict)

    def count(self) -> None:
        """``seqlens_k``: cached tokens less one, by sequence; ``total_length``: of the longest."""
        graph = self.graph
        graph.node(
            "ReduceSum", ["attention_mask", graph.integers(1)], "positions.tokens", keepdims=0
        )
        graph.node("Sub", ["positions.tokens", graph.integers(1)], "positions.last")
        graph.node("Cast", ["positions.last"], "seqlens_k", to=TensorProto.INT32)
        graph.node("Shape", ["attention_mask"], "positions.total", start=1, end=2)
        graph.node("Cast", ["positions.total"], "total_length", to=TensorProto.INT32)

    def learned(self) -> str:
        """Rows of the position table for the step's tokens, which end at ``total``."""
        graph = self.graph
        table = self.linear.vector("position_embd.weight")
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

    def places(self, x: str) -> str:
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

    def seen(self, x: str) -> tuple[str, str]:
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
            rows = graph.node("Unsqueeze", [self.places(x), graph.integers(2, 3)], f"{seen}_rows")
            before = graph.node("LessOrEqual", [keys, rows], f"{seen}_before")
            nothing, never = (
                graph.floats(f"{seen}_{name}", np.asarray(value, np.float32))
                for name, value in (("zero", 0.0), ("never", -np.inf))
            )
            graph.node("Where", [before, nothing, never], seen)
        return seen, total

    def alibi(self, x: str) -> str:
        """What is added to the scores, ``[batch, heads, sequence, total]``, alike in every layer.

        Zero for a token itself, which is where rounding must not be felt; what it gives to tokens
        that come after is masked.
        """
        graph, name = self.graph, "alibi"
        if not self._biased:
            self._biased = name
            places = self.places(x)
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

    def rope(self, rope: Rope) -> tuple[str, str]:
        """Cosines and sines of ``rope`` as values, the same for all layers that have it."""
        if rope not in self._ropes:
            name = f"rope.{len(self._ropes)}"
            tables = rope_tables(name, rope, self.context_length)
            self._ropes[rope] = (
                self.linear.stored_float(tables[0]),
                self.linear.stored_float(tables[1]),
            )
        return self._ropes[rope]
