"""A conversation on disk: its messages, and the keys and values of what was said.

A safetensors file whose metadata bind it to the model, its tokenizer and chat template, the
adapters, the runtime and its version, and to the bytes of its own tensors.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgellm.artifact import GENAI_CONFIG
from edgellm.digests import combined_sha256, file_sha256
from edgellm.errors import OutputError, SourceError, UsageError, VerificationError
from edgellm.export.to_safetensors import header_bytes
from edgellm.runtimes.session import KvState
from edgellm.source.safetensors_file import SafetensorsFile, read_safetensors

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.chat import ChatSession

FORMAT = "edgellm session 1"
KEY = "edgellm"
"""Where the metadata hold what is ours."""

DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I8": np.dtype("i1"), "U8": np.dtype("u1"),
    "I16": np.dtype("<i2"), "U16": np.dtype("<u2"), "U32": np.dtype("<u4"), "U64": np.dtype("<u8"),
}  # fmt: skip
"""Types of a cache's arrays, as safetensors spells them."""

MEANINGS = {
    "model_sha256": "another model",
    "tokenizer_sha256": "a model with another tokenizer",
    "chat_template_sha256": "a model with another chat template",
    "runtime": "another runtime",
    "runtime_version": "another version of the runtime",
    "kv_dtype": "keys and values in another type",
    "adapters": "other adapters beside the model",
    "rope_scaling": "another rope scaling",
}
"""What it means that a session was saved with another value of a key of ``Bound``."""


class Bound(msgspec.Struct, frozen=True, kw_only=True):
    """What keys and values depend on: only in a session with the same are they worth anything."""

    model_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    runtime: str
    runtime_version: str
    kv_dtype: str
    adapters: tuple[tuple[str, float], ...] = ()
    rope_scaling: str | None = None


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata of a session file."""

    format: str
    bound: Bound
    data_sha256: str
    tokens: tuple[int, ...]
    system: str | None
    messages: list[dict[str, str]]
    said: str
    said_ids: tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """An array of the cache as a tensor of the file."""

    name: str
    values: npt.NDArray[Any]

    @property
    def dtype(self) -> str:
        return next(name for name, kind in DTYPES.items() if kind == self.values.dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


def save_session(chat: ChatSession, path: Path) -> int:
    """Write the conversation of ``chat`` to ``path``, whole or not at all; the bytes it takes.

    A file that is there is replaced. Raises ``OutputError`` where it cannot be written.
    """
    state = chat.session.save()
    arrays = [
        Stored(f"cache.{number:05}", np.ascontiguousarray(array))
        for number, array in enumerate(state.data)
    ]
    saved = Saved(
        format=FORMAT,
        bound=bound_of(chat),
        data_sha256=_sha256(array.values for array in arrays),
        tokens=state.tokens,
        system=chat.system,
        messages=chat.messages,
        said=chat.said,
        said_ids=chat.said_ids,
    )
    header = header_bytes(arrays, {KEY: msgspec.json.encode(saved).decode()})
    scratch = None
    try:
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(header)
            for array in arrays:
                file.write(array.values.data)
        Path(scratch).replace(path)
    except OSError as error:
        if scratch is not None:
            with suppress(OSError):
                Path(scratch).unlink()
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
    return len(header) + sum(array.nbytes for array in arrays)


def load_session(chat: ChatSession, path: Path) -> int:
    """Let ``chat`` go on with the conversation of ``path``; the tokens that are in its cache then.

    Raises ``SourceError`` for a file that is no session, ``VerificationError`` for one whose bytes
    were changed, ``UsageError`` for one of another model, tokenizer, template, runtime or adapters,
    or of another system message, and ``GenerationError`` where the context is too small for it.
    """
    file = read_safetensors(path)
    saved = _metadata(file, path)
    here = bound_of(chat)
    for key, meaning in MEANINGS.items():
        ours, theirs = getattr(here, key), getattr(saved.bound, key)
        if ours != theirs:
            raise UsageError(
                f"{path} was saved with {meaning} ({_short(theirs)}, and this is {_short(ours)}): "
                "its keys and values mean nothing here; open what it was saved with, or start anew"
            )
    if chat.system not in (None, saved.system):
        raise UsageError(
            f"{path} was saved with another system message: leave --system out, or start anew"
        )
    data = tuple(_array(file, name) for name in file.tensors)
    if _sha256(data) != saved.data_sha256:
        raise VerificationError(f"{path} is not what was saved: it is damaged; start anew")
    adapters = tuple(getattr(chat.session, "adapters", ()))
    chat.session.restore(KvState(saved.bound.runtime, saved.tokens, data, adapters))
    chat.resume(saved.messages, saved.system, saved.said, saved.said_ids)
    return len(saved.tokens)


def bound_of(chat: ChatSession) -> Bound:
    """What the keys and values of ``chat`` depend on."""
    from edgellm.hardware import detect
    from edgellm.runtimes import runtime_named

    applied = getattr(chat.session, "adapters", ())
    tokenizer: Any = chat.tokenizer
    template = chat.tokenizer.chat_template or ""
    return Bound(
        model_sha256=_model_sha256(chat.artifact),
        tokenizer_sha256=tokenizer.sha256() if hasattr(tokenizer, "sha256") else "",
        chat_template_sha256=hashlib.sha256(template.encode()).hexdigest(),
        runtime=chat.session.runtime,
        runtime_version=runtime_named(chat.session.runtime).capabilities(detect()).version,
        kv_dtype=chat.session.kv_dtype,
        rope_scaling=chat.rope_scaling,
        adapters=tuple((file_sha256(each.path), each.weight) for each in applied),
    )


def _model_sha256(artifact: Artifact | None) -> str:
    """An artifact's digest is its manifest's; of other files it is taken now, and takes a while."""
    if artifact is None:
        return ""
    if artifact.manifest is not None:
        return artifact.manifest.sha256
    files = [artifact.main]
    if artifact.container == "hf":
        files = [artifact.path / "config.json", *artifact.path.glob("*.safetensors")]
    elif artifact.container == "genai":
        weights = [*artifact.path.glob("*.onnx*"), *artifact.path.glob("*.data")]
        files = [artifact.path / GENAI_CONFIG, *dict.fromkeys(weights)]
    return combined_sha256({file.name: file_sha256(file) for file in files})


def _metadata(file: SafetensorsFile, path: Path) -> Saved:
    try:
        saved = msgspec.json.decode(file.metadata[KEY], type=Saved)
    except (KeyError, msgspec.DecodeError) as error:
        raise SourceError(
            f"{path} holds no session that edgellm saved: give a file that --save-session wrote"
        ) from error
    if saved.format != FORMAT:
        raise SourceError(
            f"{path} is {saved.format!r} and this edgellm reads {FORMAT!r}: use the edgellm that "
            "saved it, or start anew"
        )
    return saved


def _array(file: SafetensorsFile, name: str) -> npt.NDArray[Any]:
    raw = file.raw(name)
    if raw.dtype not in DTYPES:
        raise SourceError(f"{file.path}: {name} is {raw.dtype}: the file is damaged")
    return raw.read().view(DTYPES[raw.dtype]).reshape(raw.shape)


def _sha256(arrays: Any) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _short(value: str | tuple[tuple[str, float], ...]) -> str:
    if isinstance(value, str):
        return value[:12] or "none"
    return ", ".join(f"{digest[:12]}={weight:g}" for digest, weight in value) or "none"
