"""The float network run over a calibration text, layer by layer, for what its products are given.

One layer's weights are in memory at a time, the hidden states of all tokens go from layer to layer
(``stream.TokenStream``), and of the inputs of the layer's products only sums are kept. Windows are
computed side by side, each on one thread, and what they add to the sums is added in the order of
the text: the result is the same to the last bit for any number of threads.

Statistics may be of what the layers give that are rounded already, in place of the float ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.architectures.experts import is_router
from edgellm.calibration.routing import RoutedSums
from edgellm.calibration.stream import BUDGET_BYTES, TokenStream
from edgellm.calibration.sums import CHUNK_TOKENS, InputSums
from edgellm.errors import GenerationError
from edgellm.export.decoder_graph import HEAD_INPUT, DecoderGraph
from edgellm.forward import (
    FLOATS,
    Sessions,
    WeightsAsInputs,
    Windows,
    check_windows,
    embedded,
    lengths_of,
    one_layer,
)
from edgellm.hardware import detect
from edgellm.parallel import in_parallel, one_blas_thread
from edgellm.quant.statistics import Statistics
from edgellm.source.model import ModelSource
from edgellm.tensors import Array

Share = Callable[[float], None]
"""Hears which part of a layer's tokens is done, from 0 to 1."""


TOKEN_POWER = 0.5
"""Tokens count by this power of a mean square (``token_weights``).

Those that all others attend to, the first of a text above all, have a thousand times the ordinary
mean square: what is wrong with their keys and values is wrong everywhere. KL to the original of
SmolLM2 off its grid in q4_0, 8,192 tokens of calibration, codes not refined, every product's tokens
counted by the stream after the layer: power -1 0.171, -0.5 0.133, 0 (plain GPTQ) 0.120, 0.1 0.110,
0.25 0.101, 0.5 0.097, 0.75 0.099; all tokens alike without the first 0.754.

What is wrong with other products of such a token matters little once the token is large, for the
next norm divides it away, and much where the token becomes so. 16,384 tokens of calibration and of
text, codes refined, KL +- 0.0009: all products by the stream 0.0886; those of attention's inputs
alone, the others' tokens alike 0.0864; the others' by how much the layer enlarges the token 0.0838.
Counted by what the end makes of an error (squared gradients of the loss at each product's output,
of answers drawn from the model, in torch, as long as all the rest): power 0.5 0.0841, 1 0.0917; of
the first tokens alone 0.0860.
"""

ATTENTION_INPUTS = (
    "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b",
)  # fmt: skip
"""Products that make queries, keys and values of a token."""

SMALLEST_SQUARE = np.float32(1e-12)
MOST_GROWTH = np.float32(1e6)


class CalibrationPass:
    """Statistics of one layer after another, and of the head, on ``windows`` of token ids.

    ``layers``: inputs are what ``float`` layers before give, or ``quantized`` ones, which
    ``follow`` is told after each layer.

    ``spool`` is a folder for hidden states that take more than ``budget_bytes``; None keeps them in
    memory whatever they take. ``importance_only`` leaves Hessians out: ``Statistics.hessian`` is
    their diagonal. ``weighs``: whether tokens count by ``token_weights``; where Hessians are
    wanted, unless said otherwise. ``threads`` None for the physical cores.

    Raises ``UsageError`` for windows that the model cannot be given, ``SourceError`` and
    ``TensorError`` as loading weights does, ``OutputError`` where the spool fails, and
    ``GenerationError`` when onnxruntime fails or a layer's values are not finite.
    """

    def __init__(
        self,
        source: ModelSource,
        windows: Windows,
        *,
        threads: int | None = None,
        spool: Path | None = None,
        budget_bytes: int = BUDGET_BYTES,
        importance_only: bool = False,
        weighs: bool | None = None,
        layers: str = "float",
    ) -> None:
        check_windows(source, windows)
        self.source = source
        self.windows = windows
        self.threads = threads or detect().physical_cores.value
        self.importance_only = importance_only
        self.weighs = not importance_only if weighs is None else weighs
        self.next_layer = 0
        self._longest = max(len(window) for window in windows)
        self._chunks = chunks_of(windows)
        self._sessions = Sessions(threads=1)
        tokens, hidden = sum(map(len, windows)), source.decoder.hidden_size
        self.follows = layers == "quantized"
        spooled = spool if 4 * tokens * hidden > budget_bytes else None
        self.stream = TokenStream(tokens, hidden, spooled)
        self._followed = 0

    @property
    def tokens(self) -> int:
        return self.stream.shape[0]

    def begin(self) -> None:
        """Look the text up in the embedding: what the first layer is given."""
        for chunk in self._chunks:
            window_rows = [embedded(self.source, self.windows[place]) for place in chunk.windows]
            self.stream.write(chunk.start, np.concatenate(window_rows))
        self.stream.turn()
        self.next_layer = self._followed = 0

    def resume(self, layer: int, file: Path) -> None:
        """Go on before ``layer``, whose hidden states ``save`` brought to ``file``."""
        self.stream.restore(file)
        self.next_layer = self._followed = layer

    def save(self, folder: Path) -> Path:
        """Keep what the next layer is given in ``folder``, on the disk when this returns."""
        file = self.stream.file or folder / f"stream-before-{self.next_layer}"
        self.stream.save(file)
        return file

    def layer(self, index: int, watch: Share = lambda share: None) -> dict[str, Statistics]:
        """Statistics of the inputs of layer ``index``'s products, by role of the weight.

        Weights that share an input share one object. Layers are asked for in order.
        """
        roles = self._run_layer(index, watch, taps=True)
        return {role: found for found, names in roles for role in names}

    def pass_by(self, index: int, watch: Share = lambda share: None) -> None:
        """Compute layer ``index`` without statistics: those that a resumed run has no need of."""
        if self.follows:  # follow computes it
            self._check_turn(index)
            self.next_layer = index + 1
        else:
            self._run_layer(index, watch, taps=False)

    def follow(self, index: int, rounded: ModelSource, watch: Share = lambda share: None) -> None:
        """Compute layer ``index``, the last one, with the weights that it has in ``rounded``."""
        assert self.follows
        assert self._followed == index == self.next_layer - 1
        graph = WeightsAsInputs()
        one_layer(graph, rounded, index, self._longest).build_layer(0)
        session, weights = self._sessions.of(graph), graph.load_weights()

        def work(chunk: Chunk) -> int:
            before = self.stream.read(chunk.start, chunk.stop)
            after = self._computed(session, weights, chunk, before, {"stream_out": before.shape[1]})
            self.stream.write(chunk.start, after["stream_out"])
            return len(before)

        with one_blas_thread():
            self._watched(work, watch)
        self.stream.turn()
        self._followed = index + 1

    def head(self, watch: Share = lambda share: None) -> Statistics:
        """Statistics of the inputs of the head: the stream after the last layer, normed."""
        self._check_turn(len(self.source.decoder.layers))
        graph = WeightsAsInputs()
        tensors = self.source.tensors
        decoder = self.source.decoder
        DecoderGraph(graph, decoder, tensors, FLOATS, self._longest).build_output_norm()
        sums = {HEAD_INPUT: self._sums(decoder.hidden_size)}
        self._run(graph, sums, watch, into_stream="")
        return _finite(sums[HEAD_INPUT].result(), "the head's input")

    def _run_layer(
        self, index: int, watch: Share, *, taps: bool
    ) -> list[tuple[Statistics, list[str]]]:
        self._check_turn(index)
        graph = WeightsAsInputs()
        layer = one_layer(graph, self.source, index, self._longest)
        layer.build_layer(0, taps=taps)
        sums = {
            name: self._sums(layer.tensors[weights[0]].columns)
            for name, weights in layer.inputs.items()
            if taps
        }
        routed = None
        if layer.routed is not None:
            widths = {
                name: layer.tensors[roles[0][0]].columns
                for name, roles in layer.routed.inputs.items()
            }
            routed = RoutedSums(layer.routed, widths, self._sums)
        attended = {name for name in sums if feeds_attention(layer.inputs[name])}
        self._run(graph, sums, watch, into_stream="stream_out", attended=attended, routed=routed)
        self.next_layer = index + 1
        results: list[tuple[Statistics, Sequence[str]]] = [
            (total.result(), layer.inputs[name]) for name, total in sums.items()
        ]
        if routed is not None:
            (whole,) = (found for found, roles in results if is_router(roles[0]))
            results += routed.results(whole)
        found = []
        for statistics, names in results:
            # The graph knows every layer as its first.
            roles = [f"blk.{index}.{role.removeprefix('blk.0.')}" for role in names]
            found.append((_finite(statistics, f"the input of {', '.join(roles)}"), roles))
        return found

    def _run(
        self,
        graph: WeightsAsInputs,
        sums: Mapping[str, InputSums],
        watch: Share,
        *,
        into_stream: str,
        attended: Collection[str] = (),
        routed: RoutedSums | None = None,
    ) -> None:
        """Run ``graph`` over all tokens; its output ``into_stream`` becomes the next stream.

        That of quantized layers is left to ``follow``. ``attended``: which of ``sums`` are of
        attention's inputs. ``routed``: sums of what its experts are given.
        """
        advances = into_stream and not self.follows
        session, weights = self._sessions.of(graph), graph.load_weights()
        widths = {name: total.columns for name, total in sums.items()}

        def work(chunk: Chunk) -> int:
            before = self.stream.read(chunk.start, chunk.stop)
            outputs = {into_stream: before.shape[1], **widths} if into_stream else widths
            sent: list[dict[str, Any]] | None = None if routed is None else []
            values = self._computed(session, weights, chunk, before, outputs, routed, sent)
            weighed: tuple[Array, Array] | None = None
            if into_stream:
                after = values.pop(into_stream)
                if advances:
                    self.stream.write(chunk.start, after)
                weighed = token_weights(before, after) if self.weighs else None
            for name, total in sums.items():
                counts = weighed[0 if name in attended else 1] if weighed else None
                total.add(chunk.number, values.pop(name), counts)
            if routed is not None and sent is not None:
                by_token = None if weighed is None else weighed[1]
                routed.add(chunk.number, sent, self._by_window(chunk, by_token))
            return len(before)

        def stop() -> None:
            for total in sums.values():
                total.stop()
            if routed is not None:
                routed.stop()

        with one_blas_thread():
            self._watched(work, watch, on_end=stop)
        if advances:
            self.stream.turn()

    def _computed(
        self,
        session: Any,
        weights: Mapping[str, Array],
        chunk: Chunk,
        before: Array,
        widths: Mapping[str, int],
        routed: RoutedSums | None = None,
        sent: list[dict[str, Any]] | None = None,
    ) -> dict[str, Array]:
        """The outputs ``widths`` names, ``[tokens, width]``, of windows that are given ``before``.

        ``weights`` are the graph's; every other input is made here. What is ``routed`` goes to
        ``sent``, window by window.
        """
        tokens = len(before)
        values = {name: np.empty((tokens, width), np.float32) for name, width in widths.items()}
        wants_lengths = any(each.name == "seqlens_k" for each in session.get_inputs())
        first = 0
        for place in chunk.windows:
            last = first + len(self.windows[place])
            inputs: dict[str, Any] = {"stream": before[np.newaxis, first:last], **weights}
            if wants_lengths:
                inputs |= lengths_of(last - first)
            outputs = {name: rows[np.newaxis, first:last] for name, rows in values.items()}
            if routed is not None and sent is not None:
                sent.append(routed.outputs(last - first))
                outputs |= sent[-1]
            self._sessions.run_into(session, inputs, outputs)
            first = last
        return values

    def _watched(
        self,
        work: Callable[[Chunk], int],
        watch: Share,
        *,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        """``work`` through all chunks; it returns how many tokens are done."""
        done = 0
        for tokens in in_parallel(work, self._chunks, self.threads, on_end=on_end):
            done += tokens
            watch(done / self.tokens)

    def _by_window(self, chunk: Chunk, values: Array | None) -> list[Array | None]:
        """``values`` ``[tokens]`` of a chunk cut into its windows."""
        if values is None:
            return [None] * len(chunk.windows)
        ends = np.cumsum([len(self.windows[place]) for place in chunk.windows])
        return list(np.split(values, ends[:-1]))

    def _sums(self, columns: int) -> InputSums:
        return InputSums(columns, diagonal_only=self.importance_only)

    def _check_turn(self, index: int) -> None:
        if index != self.next_layer:
            raise AssertionError(f"layer {index} was asked for when {self.next_layer} is next")
        if self.follows and index != self._followed:
            raise AssertionError(f"layer {index} was asked for before {index - 1} was followed")


class Chunk:
    """Windows that one thread computes, and the rows of the stream that are theirs."""

    def __init__(self, number: int, start: int) -> None:
        self.number = number
        self.start = self.stop = start
        self.windows: list[int] = []


def chunks_of(windows: Windows) -> list[Chunk]:
    """Neighbouring windows, together at least ``CHUNK_TOKENS`` but for the last."""
    chunks: list[Chunk] = []
    for place, window in enumerate(windows):
        if not chunks or chunks[-1].stop - chunks[-1].start >= CHUNK_TOKENS:
            chunks.append(Chunk(len(chunks), chunks[-1].stop if chunks else 0))
        chunks[-1].windows.append(place)
        chunks[-1].stop += len(window)
    return chunks


def feeds_attention(roles: Iterable[str]) -> bool:
    """Whether an input is attention's, where ``roles`` are the weights that it is given to."""
    return any(role.split(".")[-2] in ATTENTION_INPUTS for role in roles)


def token_weights(before: Array, after: Array) -> tuple[Array, Array]:
    """How much each token counts in the Hessians of a layer, given the stream on its two sides.

    ``[tokens]`` each, for attention's inputs by the mean square after the layer, and for all other
    inputs by how many times that before it (``MOST_GROWTH`` at the most, for a token whose
    embedding is all but zero). ``TOKEN_POWER`` tells why.
    """
    first, last = mean_squares(before), mean_squares(after)
    with np.errstate(over="ignore", invalid="ignore"):  # the pass looks, and explains
        growth = np.minimum(last / first, MOST_GROWTH)
    power = np.float32(TOKEN_POWER)
    return last**power, growth**power


def mean_squares(stream: Array) -> Array:
    """Of each token ``[tokens]`` of ``stream`` ``[tokens, hidden]``, above zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", stream, stream) / np.float32(stream.shape[1])
    found: Array = np.maximum(squares, SMALLEST_SQUARE)
    return found


def _finite(found: Statistics, what: str) -> Statistics:
    if not np.isfinite(found.importance).all():
        raise GenerationError(
            f"{what} is not finite on the calibration text: the model overflows in float32 before "
            "it is rounded, so it is damaged; get an intact copy of it"
        )
    return found
