"""What an error in one tensor does to the answers: the float network run beside itself, moved.

The sequences of a short text go through the layers once. Where a tensor is probed, a second copy of
them goes on through its rounded weights and from then on through the float ones, and its answers
are compared with the unmoved ones at the head. KL is quadratic in a small error (its first
derivative is zero where both answer alike), so one error of known size gives the factor for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from edgellm.export.decoder_graph import HEAD_INPUT, DecoderGraph
from edgellm.forward import FLOATS, Sessions, WeightsAsInputs, as_logits, embedded, one_layer
from edgellm.parallel import in_parallel
from edgellm.source.model import ModelSource
from edgellm.tensors import SLAB_BYTES, Array, rows_within

Rows = Mapping[str, Array]
"""Weights ``[out, in]`` that take the place of the source's, by role."""

HEAD_SLAB_BYTES = SLAB_BYTES
"""Of logits in float64, alive at once for each comparison."""


@dataclass
class Probes:
    """Sequences of equal length on their way through ``source``, and moved copies by name."""

    source: ModelSource
    windows: Sequence[Sequence[int]]
    threads: int
    streams: dict[str, Array] = field(default_factory=dict)
    """``[windows, tokens, hidden]`` by what was moved; ``""`` is the float network's."""

    def __post_init__(self) -> None:
        self._sessions = Sessions(threads=1)
        self._tokens = len(self.windows[0])
        self.streams[""] = np.stack([embedded(self.source, window) for window in self.windows])

    def move_embedding(self, name: str, rounded: Callable[[Array], Array]) -> None:
        """Begin a copy whose looked-up rows are ``rounded`` (positions and all: they are small)."""
        clean = self.streams[""]
        scale = np.float32(self.source.decoder.embedding_scale)
        table = self.source.tensors["token_embd.weight"]
        moved = clean.copy()
        for token in {token for window in self.windows for token in window}:
            row = table.load(token, token + 1)
            change = (rounded(row) - row)[0] * scale
            for place, window in enumerate(self.windows):
                moved[place, [at for at, other in enumerate(window) if other == token]] += change
        self.streams[name] = moved

    def layer(self, index: int, changes: Mapping[str, Rows]) -> None:
        """Take every copy through layer ``index``, and begin one for each of ``changes``."""
        graph = WeightsAsInputs()
        one_layer(graph, self.source, index, self._tokens).build_layer(0)
        session, weights = self._sessions.of(graph), graph.load_weights()
        before = self.streams[""]
        work = [(name, stream, weights) for name, stream in self.streams.items()]
        for name, rows in changes.items():
            work.append((name, before, {**weights, **replaced(graph, weights, rows)}))
        count = len(self.windows)
        lengths = {
            "seqlens_k": np.full(count, self._tokens - 1, np.int32),
            "total_length": np.array([self._tokens], np.int32),
        }

        def run(each: tuple[str, Array, Mapping[str, Array]]) -> tuple[str, Array]:
            name, stream, given = each
            inputs = {"stream": stream, **lengths, **given}
            return name, self._sessions.run(session, inputs, "stream_out")

        self.streams |= dict(in_parallel(run, work, self.threads))

    def divergences(self, head: Callable[[Array], Array] | None, name: str) -> dict[str, float]:
        """Mean KL(float || moved) in nats a token of every copy, and under ``name`` of the head.

        ``head`` rounds rows of the output head. Reads the head twice, by slabs of its rows.
        """
        graph = WeightsAsInputs()
        decoder, tensors = self.source.decoder, self.source.tensors
        DecoderGraph(graph, decoder, tensors, FLOATS, self._tokens).build_output_norm()
        session, weights = self._sessions.of(graph), graph.load_weights()
        hidden = {
            each: self._sessions.run(session, {"stream": stream, **weights}, HEAD_INPUT).reshape(
                -1, decoder.hidden_size
            )
            for each, stream in self.streams.items()
        }
        clean = hidden.pop("")
        weight = tensors["token_embd.weight" if decoder.tied_head else "output.weight"]
        step = min(
            rows_within(SLAB_BYTES, weight.columns), rows_within(HEAD_SLAB_BYTES, 2 * len(clean))
        )
        slabs = [(start, min(start + step, weight.rows)) for start in range(0, weight.rows, step)]
        total = LogSum(len(clean))
        for start, stop in slabs:
            total.add(as_logits(self.source, clean @ weight.load(start, stop).T, start))
        found = {each: Divergence(len(clean)) for each in hidden}
        if head is not None:
            found[name] = Divergence(len(clean))
        for start, stop in slabs:
            rows = weight.load(start, stop)
            reference = as_logits(self.source, clean @ rows.T, start)
            shares = np.exp(reference.astype(np.float64) - total.value()[:, np.newaxis])

            def compare(
                each: str,
                rows: Array = rows,
                reference: Array = reference,
                start: int = start,
                shares: npt.NDArray[np.float64] = shares,
            ) -> None:
                moved = clean @ head(rows).T if each == name and head else hidden[each] @ rows.T
                found[each].add(shares, reference, as_logits(self.source, moved, start))

            for _ in in_parallel(compare, found, self.threads):
                pass
        return {each: result.mean(total) for each, result in found.items()}


def replaced(graph: WeightsAsInputs, weights: Mapping[str, Array], rows: Rows) -> dict[str, Array]:
    """Those of a graph's ``weights`` that hold ``rows``, with these in place."""
    found: dict[str, Array] = {}
    for tensor in graph.tensors:
        first = 0
        for part in tensor.parts:
            if part.role in rows:
                whole = found.setdefault(tensor.name, weights[tensor.name].copy())
                whole[first : first + part.rows] = rows[part.role]
            first += part.rows
    return found


class LogSum:
    """The logarithm of a sum of exponentials, of ``count`` rows, in pieces."""

    def __init__(self, count: int) -> None:
        self._largest = np.full(count, -np.inf)
        self._sum = np.zeros(count)

    def add(self, values: Array) -> None:
        wide = values.astype(np.float64)
        largest = np.maximum(self._largest, wide.max(axis=1))
        self._sum *= np.exp(self._largest - largest)
        self._sum += np.exp(wide - largest[:, np.newaxis]).sum(axis=1)
        self._largest = largest

    def value(self) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = self._largest + np.log(self._sum)
        return total


class Divergence:
    """KL(p || q) of two sets of logits that come in pieces of the vocabulary."""

    def __init__(self, count: int) -> None:
        self._total = LogSum(count)
        self._difference = np.zeros(count)

    def add(self, shares: npt.NDArray[np.float64], reference: Array, moved: Array) -> None:
        """``shares``: the probabilities of the reference for the piece."""
        self._total.add(moved)
        self._difference += (shares * (reference.astype(np.float64) - moved)).sum(axis=1)

    def mean(self, reference: LogSum) -> float:
        """In nats a row: sum of p (log p - log q)."""
        return float((self._difference + self._total.value() - reference.value()).mean())
