"""What a model answers to windows of text, whoever computes it: a runtime, or the float network.

A runtime runs artifacts and GGUF files as ``run`` does; ONNX folders of other exporters are
computed by onnxruntime (``edgellm.plain_onnx``). The float network (``edgellm.forward``) computes
with the values that the weights stand for, layer by layer, and takes Hugging Face folders, Hub ids
and GGUF files, quantized ones too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgellm.artifact import GENAI_CONFIG, Artifact, open_artifact
from edgellm.errors import EdgeError, UnsupportedTarget
from edgellm.evaluation import Logits, session_logits
from edgellm.json_file import read_json
from edgellm.manifest import MANIFEST
from edgellm.plain_onnx import PlainOnnxAnswers, onnx_file
from edgellm.progress import Progress, ProgressEvent, unwatched

if TYPE_CHECKING:
    from edgellm.chat import ChatSession
    from edgellm.evaluation_text import Passage, TextTokenizer
    from edgellm.source import ModelSource

FLOAT = "float"
"""The runtime's name that stands for the float network."""

HIDDEN_BYTES = 256 << 20
"""Hidden states that are alive between layers: windows are computed in groups of so many, and each
group reads all weights once."""


class Answers(Protocol):
    """A model that is ready to be asked; ``runtime`` computes it.

    ``context_tokens``: the longest window that it takes. ``notes``: what the user should know.
    """

    name: str
    runtime: str
    context_tokens: int
    notes: tuple[str, ...]

    @property
    def tokenizer(self) -> TextTokenizer: ...

    @property
    def tokenizer_sha256(self) -> str:
        """Digest of what decides ids; empty for a tokenizer of llama.cpp's."""

    def logits(self, passages: Sequence[Passage]) -> Iterator[Logits]:
        """``[tokens - first, vocab]`` of one passage after another, from its ``first`` place on.

        Raises ``GenerationError`` when computing fails.
        """

    def close(self) -> None:
        """Give the memory back."""


class SessionAnswers:
    """The answers of a conversation's model, by its runtime."""

    def __init__(self, chat: ChatSession) -> None:
        self._chat = chat
        self.name = str(chat.artifact.path) if chat.artifact else ""
        self.runtime = chat.choice.runtime
        self.context_tokens = chat.context_tokens
        self.notes = chat.notes

    @property
    def tokenizer(self) -> TextTokenizer:
        tokenizer: Any = self._chat.tokenizer
        return tokenizer  # type: ignore[no-any-return]

    @property
    def tokenizer_sha256(self) -> str:
        return _tokenizer_sha256(self._chat.tokenizer)

    def logits(self, passages: Sequence[Passage]) -> Iterator[Logits]:
        windows = [passage.ids for passage in passages]
        firsts = [passage.first for passage in passages]
        return session_logits(self._chat.session, windows, firsts)

    def close(self) -> None:
        self._chat.close()


class FloatAnswers:
    """The answers of a source in float32, its layers computed one after the other."""

    runtime = FLOAT

    def __init__(
        self, source: ModelSource, *, threads: int | None = None, progress: Progress = unwatched
    ) -> None:
        self._source = source
        self._threads = threads
        self._progress = progress
        self.name = source.name
        self.context_tokens = source.decoder.context_length
        self.notes = source.notes

    @property
    def tokenizer(self) -> TextTokenizer:
        tokenizer: Any = self._source.tokenizer
        return tokenizer  # type: ignore[no-any-return]

    @property
    def tokenizer_sha256(self) -> str:
        return self._source.tokenizer.sha256()

    def logits(self, passages: Sequence[Passage]) -> Iterator[Logits]:
        from edgellm.forward import hidden_states, logits_of

        for group in _groups(passages, HIDDEN_BYTES // (4 * self._source.decoder.hidden_size)):
            windows = [passage.ids for passage in group]
            hidden = hidden_states(
                self._source, windows, threads=self._threads, progress=self._layer_done
            )
            for passage, states in zip(group, hidden, strict=True):
                yield logits_of(self._source, states[passage.first :])

    def _layer_done(self, event: ProgressEvent) -> None:
        self._progress(replace(event, stage="reference"))

    def close(self) -> None:
        """Nothing is held between windows."""


def open_answers(
    path: str,
    *,
    runtime: str | None = None,
    context_tokens: int | None = None,
    threads: int | None = None,
    ignore_config_keys: Collection[str] = (),
    progress: Progress = unwatched,
) -> Answers:
    """The model at ``path``: an artifact, a GGUF file, an ONNX or Hugging Face folder or a Hub id.

    What a runtime runs is run by the one that ``run`` would pick, or by ``runtime``; ``float`` is
    the float network, which everything else is computed with. ``context_tokens``: what a runtime
    makes room for. Raises whatever opening raises.
    """
    artifact = None if runtime == FLOAT else runnable(path, runtime)
    if artifact is not None and runtime is None and not runs_quickly(artifact.container):
        artifact = None
    if artifact is None:
        folder = Path(path)
        plain = onnx_file(folder)
        has_weights = any(folder.glob("*.safetensors"))  # as repositories with both have
        if plain is not None and runtime != FLOAT and (runtime or not has_weights):
            return PlainOnnxAnswers(folder, plain, threads)
        if runtime not in (None, FLOAT):
            raise UnsupportedTarget(
                f"{path} is no artifact or GGUF file, so no runtime runs it: leave the runtime "
                f"{runtime!r} out (its weights are computed in float), or convert it first"
            )
        return _open_float(path, threads, ignore_config_keys, progress)
    from edgellm.chat import open as open_model  # a backend takes long to import

    return SessionAnswers(
        open_model(
            artifact.path,
            runtime=runtime,
            context_tokens=context_tokens,
            threads=threads,
            ignore_config_keys=ignore_config_keys,
        )
    )


def runnable(path: str, runtime: str | None = None) -> Artifact | None:
    """The artifact or GGUF file at ``path``, or None for a model that no runtime opens.

    A folder without a manifest is one for ``runtime`` where that is named. Else a Hugging Face one
    is for the float network, which needs no torch and holds one layer at a time, and an ONNX one is
    computed at once. Raises ``SourceError``
    (``VerificationError``) for a damaged manifest.
    """
    place = Path(path)
    foreign = not place.exists() or (place.is_dir() and not (place / MANIFEST).exists())
    if foreign and not (runtime and _opens_folders(runtime)):
        return None
    artifact = open_artifact(place)
    return None if artifact.container == "hf" and runtime is None else artifact


def _opens_folders(runtime: str) -> bool:
    from edgellm.hardware import detect
    from edgellm.runtimes import runtime_named

    return bool({"hf", "genai"} & runtime_named(runtime).capabilities(detect()).containers)


def runs_quickly(container: str) -> bool:
    """Whether the runtime that runs ``container`` here, if any, is one for texts."""
    from edgellm.hardware import detect, pick
    from edgellm.runtimes import capabilities_on

    hardware = detect()
    found = capabilities_on(hardware)
    try:
        chosen = pick(container, hardware, found).runtime
    except EdgeError:
        return True
    return any(one.quick for one in found if one.runtime == chosen)


def context_length(path: str, runtime: str | None = None) -> int | None:
    """The context length of what a runtime runs, in tokens; None for another model's."""
    artifact = None if runtime == FLOAT else runnable(path, runtime)
    if artifact is None:
        return None
    if artifact.manifest is not None:
        return artifact.manifest.artifact.model.context_length
    if artifact.container == "hf":
        stated: int | None = read_json(artifact.path / "config.json").get("max_position_embeddings")
        return stated
    if artifact.container == "genai":
        said: int | None = read_json(artifact.path / GENAI_CONFIG)["model"].get("context_length")
        return said
    from edgellm.source.gguf_file import read_gguf_model

    metadata = read_gguf_model(artifact.main).metadata
    found: int | None = metadata.get(f"{metadata['general.architecture']}.context_length")
    return found


def _open_float(
    path: str, threads: int | None, ignore_config_keys: Collection[str], progress: Progress
) -> FloatAnswers:
    from edgellm.source import open_source

    place = Path(path)
    if place.is_dir() and (place / MANIFEST).exists():
        artifact = open_artifact(place)
        if artifact.container == "gguf":
            path = str(artifact.main)
        elif artifact.container not in ("hf", "mlx"):
            raise UnsupportedTarget(
                f"{path} is {artifact.container}, whose weights the float network does not read: "
                "leave --runtime float out"
            )
    source = open_source(
        path, ignore_config_keys=ignore_config_keys, quantized=True, progress=progress
    )
    return FloatAnswers(source, threads=threads, progress=progress)


def _groups(passages: Sequence[Passage], tokens: int) -> Iterator[list[Passage]]:
    """``passages`` in their order, as many together as have at most ``tokens``; at least one."""
    group: list[Passage] = []
    used = 0
    for passage in passages:
        if group and used + len(passage.ids) > tokens:
            yield group
            group, used = [], 0
        group.append(passage)
        used += len(passage.ids)
    if group:
        yield group


def _tokenizer_sha256(tokenizer: Any) -> str:
    """As manifests have it; llama.cpp's own says nothing of its rules."""
    return tokenizer.sha256() if hasattr(tokenizer, "sha256") else ""
