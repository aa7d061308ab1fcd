"""The protocol between edgellm and a backend: token ids in, logits out, a KV cache in between.

Nothing here knows about text. What a backend cannot do is data in ``Capabilities``, never an
``isinstance``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.hardware import Hardware
    from edgellm.runtimes.operators import TracedStep

Logits = npt.NDArray[np.float32]
Device = Literal["auto", "cpu", "cuda", "metal", "vulkan", "directml", "coreml"]
KvDtype = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How an artifact is opened.

    ``context_tokens``: room in the KV cache, None for min(model's, 4096). ``threads``: None for the
    physical cores. ``kv_dtype``: None for the backend's default. ``gpu_layers``: how many of the
    last layers a GPU computes, where a runtime can split them; None for as many as fit.
    ``rope_scaling``: ``KIND:FACTOR``, where a runtime can be told (``rope_scaling.parse_scaling``).
    ``trace``: note what every operator takes; the session is then a ``TracedSession``, and slower.
    """

    device: Device = "auto"
    context_tokens: int | None = None
    threads: int | None = None
    kv_dtype: KvDtype | None = None
    gpu_layers: int | None = None
    rope_scaling: str | None = None
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a runtime can do on this machine, and why not where it can't.

    ``available``: it can open something here now. ``reason``: in one line, why or why not.
    ``devices`` are those that it has here, ``possible_devices`` all that it has with the right
    package on the right machine.
    ``install``: the command that brings it. ``speed_rank``: lower is preferred where several can.
    ``automatic``: may be picked without being named. ``applies_adapters``: its sessions are
    ``AdaptingSession``, which apply LoRA adapters beside the model. ``sets_threads``: heeds the
    number of threads that it is given. ``splits_layers``: can leave some layers to the CPU.
    ``quick``: a text of some thousand tokens takes seconds with a small model, so that answers may
    be compared on it unasked. ``restores``: puts a saved cache back; where not, ``restore``
    computes its tokens anew. ``halves_only``: devices that compute no graph in
    f32. ``scales_rope``: heeds ``RunOptions.rope_scaling``.
    ``traces_operators``: heeds ``RunOptions.trace``; ``tracing``: whose clock tells it, or why
    nothing does, in words.
    """

    runtime: str
    available: bool
    reason: str
    version: str = ""
    install: str = ""
    containers: frozenset[str] = frozenset()
    devices: tuple[str, ...] = ()
    possible_devices: tuple[str, ...] = ("cpu",)
    kv_dtypes: tuple[str, ...] = ()
    speed_rank: int = 0
    automatic: bool = True
    applies_adapters: bool = False
    sets_threads: bool = True
    splits_layers: bool = False
    quick: bool = True
    restores: bool = True
    halves_only: frozenset[str] = frozenset()
    scales_rope: bool = False
    traces_operators: bool = False
    tracing: str = ""

    def computing(self, compute: str | None) -> tuple[str, ...]:
        """The devices that compute a graph in ``compute`` (``Artifact.compute``)."""
        barred = self.halves_only if compute == "f32" else frozenset[str]()
        return tuple(device for device in self.devices if device not in barred)


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A GGUF adapter that is applied beside a model, and how strongly."""

    path: Path
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class KvState:
    """A copy of a session's cache: ``tokens`` that it holds and the backend's own arrays.

    ``data`` lies in the computer's memory wherever the session computes; what numpy has no type for
    (bf16) stands there as whole numbers. ``adapters`` are those that were applied when its keys and
    values were computed.
    """

    runtime: str
    tokens: tuple[int, ...]
    data: tuple[npt.NDArray[Any], ...] = field(repr=False)
    adapters: tuple[AdapterFile, ...] = ()


class Session(Protocol):
    """One sequence with its KV cache. Not safe for use by two threads at once.

    ``kv_dtype``: what keys and values are kept in, one of the runtime's ``kv_dtypes``.
    Every method raises ``GenerationError`` with the backend's message translated.
    """

    runtime: str
    device: str
    context_tokens: int
    vocab_size: int
    kv_dtype: str

    @property
    def tokens(self) -> Sequence[int]:
        """The token ids whose keys and values the cache holds, oldest first."""

    def prefill(self, token_ids: Sequence[int], *, all_logits: bool = False) -> Logits:
        """Append ``token_ids``; logits ``[1, vocab]`` of the last, or ``[len, vocab]`` of all.

        Raises ``GenerationError`` when they do not fit; the cache is then as it was.
        """

    def decode(self, token_id: int) -> Logits:
        """Append one token; logits ``[vocab]`` for the next, valid until the next call."""

    def trim(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""

    def save(self) -> KvState:
        """A copy of the cache that ``restore`` takes back."""

    def restore(self, state: KvState) -> None:
        """Put back a saved cache; the next logits equal those of an uninterrupted run."""

    def kv_bytes(self) -> int:
        """Bytes that the KV cache occupies now."""

    def close(self) -> None:
        """Give all memory back; further calls raise ``GenerationError``."""


class AdaptingSession(Session, Protocol):
    """A session of a runtime whose ``Capabilities.applies_adapters`` is true."""

    @property
    def adapters(self) -> Sequence[AdapterFile]:
        """The adapters that are applied, in the order in which they were given."""

    def set_adapters(self, adapters: Sequence[AdapterFile]) -> None:
        """Apply these adapters and no others from the next token on; their products are summed.

        Where that changes anything the cache is emptied, because its keys and values were computed
        with other weights. A file that was applied before is not read again. Raises
        ``AdapterError`` for one that does not belong to the model; then nothing has changed.
        """


class TracedSession(Session, Protocol):
    """A session that was opened with ``RunOptions.trace``."""

    def finish_trace(self) -> Sequence[TracedStep]:
        """Every step that it computed, oldest first; the session is closed, as some tell it then.

        A ``decode`` is one step, the tokens of a ``prefill`` are one or more.
        """


class Runtime(Protocol):
    """A backend: found on this machine or not, and able to open some containers."""

    name: str

    def capabilities(self, hardware: Hardware) -> Capabilities:
        """What it can do here; never raises, never imports the backend when that is slow."""

    def open(self, artifact: Artifact, options: RunOptions) -> Session:
        """A session on ``artifact``.

        Raises ``UsageError``, ``RuntimeMissing``, ``UnsupportedTarget`` or ``GenerationError``.
        """
