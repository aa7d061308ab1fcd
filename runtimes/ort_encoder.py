"""onnxruntime running an encoder: a batch of token ids in, the graph's outputs back, no cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import detect
from edgellm.runtimes import limits
from edgellm.runtimes.ort import OnnxRuntime, errors_of, open_graph, session_options
from edgellm.runtimes.ort_package import PROVIDERS
from edgellm.runtimes.session import Device

Values = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]


class OnnxEncoder:
    """A graph of ``export.encoder_graph`` on ``device``; use it in one thread at a time.

    Raises ``GenerationError`` with onnxruntime's own words when it cannot load the graph.
    """

    def __init__(self, path: Path, *, threads: int, device: str = "cpu") -> None:
        import onnxruntime

        self.device = device
        self._errors = errors_of(onnxruntime)
        providers = list(dict.fromkeys((PROVIDERS[device], PROVIDERS["cpu"])))
        try:
            settings = session_options(onnxruntime, threads)
            self._session: Any = open_graph(onnxruntime, path, settings, providers)
        except self._errors as error:
            said = limits.explained(error, device)
            raise GenerationError(
                f"onnxruntime could not load {path}: {said}. Check the artifact with "
                "`edgellm verify`"
            ) from error
        self._inputs = {each.name for each in self._session.get_inputs()}

    def run(self, inputs: Mapping[str, Ids], outputs: Sequence[str]) -> list[Values]:
        """The named ``outputs`` for inputs ``[batch, sequence]``; what the graph lacks is left out.

        Raises ``GenerationError`` where onnxruntime cannot compute them.
        """
        if self._session is None:
            raise limits.closed()
        given = {name: values for name, values in inputs.items() if name in self._inputs}
        try:
            found: list[Values] = self._session.run(list(outputs), given)
        except self._errors as error:
            shape = "x".join(map(str, next(iter(given.values())).shape))
            raise GenerationError(
                f"onnxruntime could not compute a batch of {shape} tokens: "
                f"{limits.explained(error, self.device)}"
            ) from error
        return found

    def close(self) -> None:
        """Give all memory back; further calls raise ``GenerationError``."""
        self._session = None


def open_graph_of(
    artifact: Artifact, *, device: Device = "auto", threads: int | None = None
) -> OnnxEncoder:
    """The graph of an encoder's ``artifact``.

    Raises ``RuntimeMissing`` without onnxruntime, and ``UnsupportedTarget`` for a device that it
    has not or an artifact that is no encoder of ours.
    """
    if artifact.container != "onnx" or artifact.encoder is None:
        raise UnsupportedTarget(f"{artifact.path} is no encoder that edgellm made")
    hardware = detect()
    found = OnnxRuntime().capabilities(hardware)
    chosen = limits.chosen_device(found, device)
    return OnnxEncoder(
        artifact.main, threads=threads or hardware.physical_cores.value, device=chosen
    )
