"""Broken models on the command line: a clear error, an exit code, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.manifest import read_manifest

from .conftest import Command

pytest.importorskip("safetensors", reason="safetensors is not installed")

from safetensors.numpy import load_file, save_file

Change = Callable[[Path], None]

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
UP = "model.layers.1.mlp.up_proj.weight"
SHARD = "model-00001-of-00001.safetensors"


def weights(change: Callable[[dict[str, np.ndarray]], None]) -> Change:
    """Change the tensors of the model's only file."""

    def apply(folder: Path) -> None:
        tensors = dict(load_file(folder / "model.safetensors"))
        change(tensors)
        contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def header(change: Callable[[dict[str, Any]], None]) -> Change:
    """Change the header of the model's only file, the data behind it as it was."""

    def apply(folder: Path) -> None:
        content = (folder / "model.safetensors").read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        entries = json.loads(content[8 : 8 + size])
        change(entries)
        text = json.dumps(entries).encode()
        (folder / "model.safetensors").write_bytes(
            struct.pack("<Q", len(text)) + text + content[8 + size :]
        )

    return apply


def config(**changes: Any) -> Change:
    """Set keys of config.json; ``None`` takes a key out."""

    def apply(folder: Path) -> None:
        fields = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in fields.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return apply


def index(**places: str) -> Change:
    """An index over one shard, with other places for some tensors (``__`` for a dot)."""

    def apply(folder: Path) -> None:
        names = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").rename(folder / SHARD)
        changed = {name.replace("__", "."): place for name, place in places.items()}
        weight_map = dict.fromkeys(names, SHARD) | changed
        content = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(content)

    return apply


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def value(name: str, number: float) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name].flat[5] = number

    return change


def as_type(kind: type) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[UP] = tensors[UP].astype(kind)

    return change


def first_rows(count: int) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in (EMBEDDING, HEAD):
            tensors[name] = tensors[name][:count]

    return change


def offsets(start: int, end: int) -> Callable[[dict[str, Any]], None]:
    def change(entries: dict[str, Any]) -> None:
        entries[UP]["data_offsets"] = [start, end]

    return change


def overlap(entries: dict[str, Any]) -> None:
    first, second = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    entries[second]["data_offsets"] = entries[first]["data_offsets"]


BAD: dict[str, tuple[Change, int, str]] = {
    "no shard": (lambda folder: (folder / "model.safetensors").unlink(), 3, "holds no weights"),
    "missing shard": (index(model__norm__weight="model-2.safetensors"), 3, "model-2.safetensors"),
    "truncated shard": (cut_short, 3, "cut short"),
    "ghost in the index": (index(model__ghost__weight=SHARD), 3, "model.ghost.weight"),
    "overlap": (header(overlap), 3, "model.safetensors"),
    "negative offset": (header(offsets(-8, 61432)), 3, "impossible offsets"),
    "huge offset": (header(offsets(0, 1 << 62)), 3, UP),
    "nan": (weights(value(UP, np.nan)), 3, f"{UP} holds nan"),
    "inf": (weights(value(EMBEDDING, np.inf)), 3, f"{EMBEDDING} holds inf"),
    "nan in a norm": (weights(value("model.norm.weight", np.nan)), 3, "model.norm.weight holds"),
    "dtype": (weights(as_type(np.int32)), 3, "i32"),
    "key missing": (config(hidden_size=None), 4, "hidden_size"),
    "key unknown": (config(attention_twist=2), 4, "--ignore-config-key"),
    "architecture": (config(model_type="falcon9"), 4, "falcon9"),
    "rope type": (
        config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), 4, "spiral",
    ),
    "rope by length": (
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        4,
        "--context",
    ),
    "config of more rows": (config(vocab_size=600), 3, "vocab_size"),
    "tokenizer of more rows": (
        both(weights(first_rows(400)), config(vocab_size=400)), 3, "embedding 400 rows",
    ),
    "tokenizer missing": (lambda folder: (folder / "tokenizer.json").unlink(), 3, "tokenizer.json"),
    "path traversal": (index(model__norm__weight="../evil.safetensors"), 3, "unsafe"),
    "absolute path": (index(model__norm__weight="/evil.safetensors"), 3, "unsafe"),
    "pickle": (pickle_only, 3, "safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("container", ["gguf", "onnx"])
@pytest.mark.parametrize("name", BAD)
def test_bad_models(
    name: str, container: str, command: Command, model: Path, tmp_path: Path
) -> None:
    change, code, says = BAD[name]
    source = Path(shutil.copytree(model, tmp_path / "source"))
    change(source)
    (tmp_path / "made").mkdir()
    done = command("convert", source, "-o", tmp_path / "made" / "out", "--format", container)
    assert done.code == code, done.err
    assert done.out == ""
    last = done.err.splitlines()[-1]
    assert last.startswith("error: ")
    assert says in last
    assert not list((tmp_path / "made").iterdir())
    assert {path.name for path in tmp_path.iterdir()} <= {"source", "made", "cache"}


def test_rope_that_depends_on_the_length_is_baked_for_a_stated_one(
    command: Command, model: Path, tmp_path: Path
) -> None:
    change, _, _ = BAD["rope by length"]
    source = Path(shutil.copytree(model, tmp_path / "source"))
    change(source)
    for container in ("gguf", "onnx"):
        asked = ("-o", tmp_path / container, "--format", container, "--context", 512, "--no-check")
        assert command("convert", source, *asked).code == 0
        assert read_manifest(tmp_path / container).artifact.model.context_length == 512


def test_more_embedding_rows_than_tokens_are_noted(
    command: Command, model: Path, tmp_path: Path
) -> None:
    asked = ("-o", tmp_path / "out", "--format", "onnx", "--no-check")
    assert "the last 5 are padding" in command("convert", model, *asked).err


GGUF_DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "cut short": (lambda content: content[: len(content) // 2], "cut short"),
    "magic": (lambda content: b"GGUG" + content[4:], "not a GGUF file"),
    "tensor count": (
        lambda content: content[:8] + struct.pack("<Q", 1 << 60) + content[16:], "has room for",
    ),
    "key count": (
        lambda content: content[:16] + struct.pack("<Q", 1 << 60) + content[24:], "has room for",
    ),
    "empty": (lambda content: b"", "GGUF"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF_DAMAGE)
def test_bad_gguf_files(name: str, command: Command, gguf_artifact: Path, tmp_path: Path) -> None:
    damage, says = GGUF_DAMAGE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(damage((gguf_artifact / "model.gguf").read_bytes()))
    for line in (("convert", path, "-o", tmp_path / "out"), ("run", path, "hi")):
        done = command(*line)
        assert done.code == 3, done.err
        assert says in done.err.splitlines()[-1]
        assert done.out == ""
    assert not (tmp_path / "out").exists()


def test_an_artifact_and_a_path_that_is_not_there_are_no_sources(
    command: Command, onnx_artifact: Path, tmp_path: Path
) -> None:
    done = command("convert", onnx_artifact, "-o", tmp_path / "out")
    assert done.code == 3
    assert "edgellm inspect" in done.err
    done = command("convert", "./absent", "-o", tmp_path / "out")
    assert done.code == 3
    assert "check the path" in done.err
