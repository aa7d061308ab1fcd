"""onnxruntime running an encoder with a decoder: a text is read once, its answer step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import detect
from edgellm.runtimes import limits
from edgellm.runtimes.ort import OnnxRuntime, errors_of, open_graph, session_options
from edgellm.runtimes.ort_package import PROVIDERS
from edgellm.runtimes.session import Device, Logits

LOGITS = "logits"

FLOAT_BYTES = 4


class OnnxSeq2Seq:
    """The two graphs of ``export.seq2seq_graph`` on ``device``, with one text and its answer.

    Keys and values stay onnxruntime's own from step to step. Use it in one thread at a time. Raises
    ``GenerationError`` with onnxruntime's own words when it cannot load a graph.
    """

    def __init__(self, encoder: Path, decoder: Path, *, threads: int, device: str = "cpu") -> None:
        import onnxruntime

        self.device = device
        self._value = onnxruntime.OrtValue
        self._errors = errors_of(onnxruntime)
        providers = list(dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"])))
        self._sessions: list[Any] = []
        for path in (encoder, decoder):
            try:
                settings = session_options(onnxruntime, threads)
                self._sessions.append(open_graph(onnxruntime, path, settings, providers))
            except self._errors as error:
                said = limits.explained(error, device)
                raise GenerationError(
                    f"onnxruntime could not load {path}: {said}. Check the artifact with "
                    "`edgellm verify`"
                ) from error
        self._crossed = [each.name for each in self._sessions[0].get_outputs()]
        presents = [each.name for each in self._sessions[1].get_outputs()]
        presents.remove(LOGITS)
        self._outputs = [LOGITS, *presents]
        self._given: dict[str, Any] = {}

    def read(self, token_ids: Sequence[int]) -> None:
        """Take a text; the answer begins anew. Raises ``GenerationError`` where it cannot be."""
        ids = np.asarray([token_ids], np.int64)
        mask = np.ones_like(ids)
        found = self._run(0, {"input_ids": ids, "attention_mask": mask}, self._crossed, len(ids[0]))
        self._given = dict(zip(self._crossed, found, strict=True))
        self._given["encoder_attention_mask"] = self._value.ortvalue_from_numpy(mask)
        for each in self._sessions[1].get_inputs():
            if each.name.startswith("past."):
                empty = np.empty((1, each.shape[1], 0, each.shape[3]), np.float32)
                self._given[each.name] = self._value.ortvalue_from_numpy(empty)

    def step(self, token_ids: Sequence[int]) -> Logits:
        """Append tokens to the answer; logits ``[tokens, vocab]`` for what follows each.

        Raises ``GenerationError`` where no text was taken, or they cannot be computed.
        """
        if not self._given:
            raise GenerationError("there is no text to answer: read one first")
        ids = {"input_ids": np.asarray([token_ids], np.int64)}
        logits, *presents = self._run(1, ids, self._outputs, len(token_ids), self._given)
        names = (name.replace("present.", "past.") for name in self._outputs[1:])
        self._given.update(zip(names, presents, strict=True))
        found: Logits = logits.numpy()[0]
        return found

    def kv_bytes(self) -> int:
        """What keys and values take, of the text and of the answer so far."""
        kept = (value for name, value in self._given.items() if name != "encoder_attention_mask")
        return sum(FLOAT_BYTES * math.prod(value.shape()) for value in kept)

    def close(self) -> None:
        """Give all memory back; further calls raise ``GenerationError``."""
        self._sessions, self._given = [], {}

    def _run(
        self,
        side: int,
        arrays: dict[str, Any],
        outputs: Sequence[str],
        tokens: int,
        values: dict[str, Any] | None = None,
    ) -> list[Any]:
        if not self._sessions:
            raise limits.closed()
        given = {name: self._value.ortvalue_from_numpy(array) for name, array in arrays.items()}
        try:
            found: list[Any] = self._sessions[side].run_with_ort_values(
                list(outputs), {**(values or {}), **given}
            )
        except self._errors as error:
            raise GenerationError(
                f"onnxruntime could not compute {tokens} tokens: "
                f"{limits.explained(error, self.device)}"
            ) from error
        return found


def open_graphs_of(
    artifact: Artifact, *, device: Device = "auto", threads: int | None = None
) -> OnnxSeq2Seq:
    """The graphs of an ``artifact`` that has an encoder and a decoder.

    Raises ``RuntimeMissing`` without onnxruntime, and ``UnsupportedTarget`` for a device that it
    has not or another artifact.
    """
    if artifact.container != "onnx" or artifact.seq2seq is None:
        raise UnsupportedTarget(f"{artifact.path} is no encoder with a decoder that edgellm made")
    hardware = detect()
    chosen = limits.chosen_device(OnnxRuntime().capabilities(hardware), device)
    encoder = artifact.path / artifact.seq2seq.encoder_file
    threads = threads or hardware.physical_cores.value
    return OnnxSeq2Seq(encoder, artifact.main, threads=threads, device=chosen)
