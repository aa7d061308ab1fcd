"""The float network, run layer by layer: memory follows one layer's weights, whatever the model.

Each layer is the decoder graph's own, as a small ONNX model in memory whose weights are inputs:
layers of equal settings share one onnxruntime session, and nothing is written to disk. The hidden
states of all tokens go from layer to layer; the head follows in slabs of its rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

import edgellm
from edgellm.errors import GenerationError, UsageError
from edgellm.export.decoder_graph import HEAD_INPUT, DecoderGraph
from edgellm.export.layout import StoredArray
from edgellm.export.linear_graph import FLOAT, Grids
from edgellm.export.onnx_graph import GraphBuilder
from edgellm.hardware import detect
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.source.model import ModelSource
from edgellm.tensors import SLAB_BYTES, Array, TensorRef, rows_within, stacked_rows

Windows = Sequence[Sequence[int]]
"""Token ids of texts that do not see each other, each from position 0 on."""

FLOATS = Grids(FLOAT, FLOAT, FLOAT)


class WeightsAsInputs(GraphBuilder):
    """A graph that holds no weight: what would be stored becomes an input of the same name."""

    def __init__(self) -> None:
        super().__init__(edgellm.__version__)
        self.weight_shapes: dict[str, tuple[int, ...]] = {}

    def stored(self, array: StoredArray, element: int, shape: Sequence[int], name: str = "") -> str:
        name = name or array.name
        if name not in self.weight_shapes:
            self.weight_shapes[name] = tuple(shape)
            self.input(name, element, shape)
        return name

    def load_weights(self) -> dict[str, Array]:
        """Every weight of the graph, by the name of its input.

        Raises ``TensorError`` for NaN and Inf, ``SourceError`` for bytes that cannot be read.
        """
        parts = {tensor.name: tensor.parts for tensor in self.tensors}
        return {
            name: _whole(parts[name]).reshape(shape) for name, shape in self.weight_shapes.items()
        }


class Sessions:
    """onnxruntime sessions by the bytes of their model, each opened once."""

    def __init__(self, threads: int | None = None) -> None:
        """``threads``: None for the physical cores."""
        import onnxruntime

        from edgellm.runtimes.ort import errors_of

        self._errors = errors_of(onnxruntime)
        self._onnxruntime = onnxruntime
        self._options = onnxruntime.SessionOptions()
        self._options.intra_op_num_threads = threads or detect().physical_cores.value
        self._options.inter_op_num_threads = 1
        self._options.log_severity_level = 4
        # A layer's products are long: waiting threads had better leave the cores to others.
        self._options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._opened: dict[bytes, Any] = {}

    def of(self, graph: GraphBuilder) -> Any:
        """The session that runs ``graph``; of an equal graph it is the same one."""
        model = graph.serialize({})
        if model not in self._opened:
            self._opened[model] = self._onnxruntime.InferenceSession(
                model, self._options, providers=["CPUExecutionProvider"]
            )
        return self._opened[model]

    def run(self, session: Any, inputs: Mapping[str, Any], output: str) -> Array:
        """The value ``output``; raises ``GenerationError`` with onnxruntime's own words."""
        try:
            result: Array = session.run([output], dict(inputs))[0]
        except self._errors as error:
            raise GenerationError(f"onnxruntime could not compute {output}: {error}") from error
        return result

    def run_into(
        self, session: Any, inputs: Mapping[str, Array | Any], outputs: Mapping[str, Array]
    ) -> None:
        """Compute ``outputs`` into their arrays, C-contiguous and of the right shapes.

        Raises ``GenerationError`` as ``run`` does.
        """
        binding = session.io_binding()
        for name, values in inputs.items():
            binding.bind_cpu_input(name, values)
        for name, values in outputs.items():
            assert values.flags.c_contiguous, name
            binding.bind_output(name, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
        try:
            session.run_with_iobinding(binding)
        except self._errors as error:
            names = ", ".join(outputs)
            raise GenerationError(f"onnxruntime could not compute {names}: {error}") from error


def lengths_of(tokens: int) -> dict[str, Any]:
    """What a layer's graph is told of one window of ``tokens`` tokens."""
    return {
        "seqlens_k": np.array([tokens - 1], np.int32),
        "total_length": np.array([tokens], np.int32),
    }


def hidden_states(
    source: ModelSource,
    windows: Windows,
    *,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> list[Array]:
    """What the head is given, normed, for each window: float32 ``[tokens, hidden]``.

    Raises ``UsageError`` for a window that is empty, longer than the model's context or holds ids
    that it does not have, ``SourceError`` and ``TensorError`` as loading does, and
    ``GenerationError`` when onnxruntime fails.
    """
    check_windows(source, windows)
    sessions = Sessions(threads)
    longest = max(len(window) for window in windows)
    streams = [embedded(source, window) for window in windows]
    layers = source.decoder.layers
    for index in range(len(layers)):
        graph = WeightsAsInputs()
        one_layer(graph, source, index, longest).build_layer(0)
        session, weights = sessions.of(graph), graph.load_weights()
        for place, stream in enumerate(streams):
            inputs = {"stream": stream[np.newaxis], **lengths_of(len(stream)), **weights}
            streams[place] = sessions.run(session, inputs, "stream_out")[0]
        progress(ProgressEvent("check", f"layer {index}", 0, 0, index + 1, len(layers)))
    graph = WeightsAsInputs()
    DecoderGraph(graph, source.decoder, source.tensors, FLOATS, longest).build_output_norm()
    session, weights = sessions.of(graph), graph.load_weights()
    return [
        sessions.run(session, {"stream": stream[np.newaxis], **weights}, HEAD_INPUT)[0]
        for stream in streams
    ]


def logits_of(source: ModelSource, hidden: Array) -> Array:
    """Logits ``[tokens, vocab]`` of what ``hidden_states`` gave; reads the head by slabs of rows.

    Raises ``TensorError`` and ``SourceError`` as loading does.
    """
    role = "token_embd.weight" if source.decoder.tied_head else "output.weight"
    head = source.tensors[role]
    logits = np.empty((len(hidden), head.rows), np.float32)
    for start, rows in _slabs([head]):
        part = logits[:, start : start + len(rows)]
        np.matmul(hidden, rows.T, out=part)
        part[:] = as_logits(source, part, start)
    return logits


def as_logits(source: ModelSource, products: Array, start: int) -> Array:
    """Logits of products ``[tokens, rows]`` of the head's rows from ``start`` on."""
    decoder = source.decoder
    if decoder.logit_scale != 1.0:
        products = products * np.float32(decoder.logit_scale)
    if decoder.head_bias:
        bias = source.tensors["output.bias"].load(0, 1).reshape(-1)
        products = products + bias[start : start + products.shape[1]]
    if decoder.logit_softcap is not None:
        cap = np.float32(decoder.logit_softcap)
        products = cap * np.tanh(products / cap)
    return products


def window_logits(
    source: ModelSource,
    windows: Windows,
    *,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> Iterator[Array]:
    """Logits ``[tokens, vocab]`` of one window after another; raises what ``hidden_states`` does.

    All layers are computed when the first is asked for; the logits of one window are alive at once.
    """
    for hidden in hidden_states(source, windows, threads=threads, progress=progress):
        yield logits_of(source, hidden)


def check_windows(source: ModelSource, windows: Windows) -> None:
    """Raise ``UsageError`` for windows that the model cannot be given; see ``hidden_states``."""
    decoder = source.decoder
    if not windows or not all(len(window) for window in windows):
        raise UsageError("there is no text to compute: a window has no tokens")
    longest = max(len(window) for window in windows)
    if longest > decoder.context_length:
        raise UsageError(
            f"a window of {longest} tokens is longer than the model's context of "
            f"{decoder.context_length}: cut the text into shorter ones"
        )
    highest = max(max(window) for window in windows)
    if highest >= decoder.vocab_size or min(min(window) for window in windows) < 0:
        raise UsageError(
            f"the text has token {highest}, the model has {decoder.vocab_size} tokens: it was "
            "split by the tokenizer of another model"
        )


def one_layer(graph: GraphBuilder, source: ModelSource, index: int, longest: int) -> DecoderGraph:
    """The decoder with layer ``index`` as its only one, so that equal layers give equal graphs."""
    prefix = f"blk.{index}."
    tensors: dict[str, TensorRef] = {
        f"blk.0.{role.removeprefix(prefix)}": ref
        for role, ref in source.tensors.items()
        if role.startswith(prefix)
    }
    decoder = replace(source.decoder, layers=(source.decoder.layers[index],))
    return DecoderGraph(graph, decoder, tensors, FLOATS, longest)


def embedded(source: ModelSource, window: Sequence[int]) -> Array:
    """What the first layer is given for ``window``, float32 ``[tokens, hidden]``.

    The rows of the embedding, scaled and normed, with the learned positions added.
    """
    decoder, table = source.decoder, source.tensors["token_embd.weight"]
    rows = {token: stacked_rows([table], token, token + 1)[0] for token in set(window)}
    stream = np.stack([rows[token] for token in window])
    if decoder.embedding_scale != 1.0:
        stream *= np.float32(decoder.embedding_scale)
    if decoder.embedding_norm:
        stream = _normed(source, stream)
    if decoder.learned_positions is not None:
        first = decoder.skipped_positions
        stream += source.tensors["position_embd.weight"].load(first, first + len(window))
    return stream


def _normed(source: ModelSource, stream: Array) -> Array:
    """``stream`` ``[tokens, hidden]`` behind the embedding's own norm."""
    norm, tensors = source.decoder.norm, source.tensors
    assert norm.biased, "BLOOM's, which is the only one"
    weight, bias = (
        tensors[f"token_embd_norm.{part}"].load().reshape(-1).astype(np.float64)
        for part in ("weight", "bias")
    )
    wide = stream.astype(np.float64)
    wide -= wide.mean(axis=-1, keepdims=True)
    spread = np.sqrt(np.square(wide).mean(axis=-1, keepdims=True) + norm.epsilon)
    normed: Array = (wide / spread * weight + bias).astype(np.float32)
    return normed


def _whole(parts: Sequence[TensorRef]) -> Array:
    """``parts`` laid one below the other; beside the result, a slab of rows is alive."""
    values = np.empty((sum(part.rows for part in parts), parts[0].columns), np.float32)
    for start, rows in _slabs(parts):
        values[start : start + len(rows)] = rows
    return values


def _slabs(parts: Sequence[TensorRef]) -> Iterator[tuple[int, Array]]:
    """The rows of ``parts`` slab by slab, each with the place where it begins."""
    step = rows_within(SLAB_BYTES, parts[0].columns)
    total = sum(part.rows for part in parts)
    for start in range(0, total, step):
        yield start, stacked_rows(parts, start, min(start + step, total))
