"""Manifest: the only thing that ``convert`` hands to ``run``, and the proof of what was done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

SCHEMA_VERSION = 1


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the artifact, by path relative to its folder."""

    path: str
    nbytes: int
    sha256: str


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as stored. ``sha256`` is over its arrays' bytes in the order of ``arrays``."""

    name: str
    role: str
    shape: tuple[int, ...]
    grid: str
    nbytes: int
    sha256: str
    arrays: tuple[tuple[str, int, int], ...]
    note: str = ""


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """The model that went in. ``sha256`` is over its weight files' digests in name order."""

    name: str
    kind: str
    revision: str = ""
    sha256: str = ""
    licence: str = ""
    url: str = ""


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime needs to know to run the artifact without the source's config."""

    family: str
    vocab_size: int
    hidden_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_dim: int
    context_length: int
    windows: tuple[int | None, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    features: tuple[str, ...] = ()


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Whether source and output split the built-in text of awkward cases into the same ids."""

    equal: bool
    cases: int
    method: str
    mismatches: tuple[str, ...] = ()


class Digested(msgspec.Struct, frozen=True, kw_only=True):
    """The part that says what the artifact *is*: no paths, times or measured figures in it."""

    schema_version: int
    container: str
    main_file: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    base: Base
    model: ModelFacts
    recipe: dict[str, Any]
    recipe_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    tokenizer_parity: Parity
    notes: tuple[str, ...]
    tool_versions: dict[str, str]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``artifact`` and its digest, and beside it ``measured``: time, host, peak memory, check."""

    artifact: Digested
    sha256: str
    measured: dict[str, Any] = {}


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be run: a folder with a manifest, or a plain file from elsewhere.

    ``manifest`` is None for a plain file, which is then unverified. ``main`` is the file that the
    runtime opens.
    """

    path: Path
    main: Path
    container: str
    manifest: Manifest | None = None
