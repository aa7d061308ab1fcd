"""Documents of ``--json``: the same words for the same facts in every command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Command

CHOICES = ("--format", "onnx", "--quant", "rtn:int4-g32")

OTHER_WORDS = {
    "_s": ("seconds", "_sec", "_secs", "_ms", "duration", "elapsed"),
    "_bytes": ("size", "_mb", "_gb", "_kb", "_size_bytes"),
    "per_s": ("per_second", "_tps", "per_sec"),
    "runtime": ("backend", "engine"),
    "reason": ("why", "message"),
}
"""What a field's name ends in, and the words that it must not end in instead."""

FROM_THE_MODEL = ("vocab_size", "hidden_size")
"""The model makers' own names."""


@pytest.fixture
def documents(
    command: Command, model: Path, onnx_artifact: Path, tmp_path: Path
) -> dict[str, dict[str, Any]]:
    """What every command prints about one model and its artifact."""
    made = tmp_path / "made"
    lines = {
        "plan": ("convert", model, *CHOICES, "--dry-run"),
        "convert": ("convert", model, "-o", made, *CHOICES),
        "inspect": ("inspect", onnx_artifact),
        "verify": ("verify", onnx_artifact),
        "run": ("run", onnx_artifact, "hello", "--max-tokens", 4),
        "doctor": ("doctor",),
        "eval": ("eval", onnx_artifact, "--reference", model, "--tokens", 50),
    }
    return {name: command(*line, "--json").json() for name, line in lines.items()}


def fields(document: Any) -> Iterator[tuple[str, Any]]:
    """Every field, at any depth, with its value; what a file says of itself is left out."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name not in ("metadata", "tool_versions", "grid_bytes"):
                yield name, value
                yield from fields(value)
    elif isinstance(document, list):
        for value in document:
            yield from fields(value)


def test_words(documents: dict[str, dict[str, Any]]) -> None:
    names = {name for document in documents.values() for name, _ in fields(document)}
    assert len(names) > 80
    for name in names - set(FROM_THE_MODEL):
        for word, others in OTHER_WORDS.items():
            assert not name.endswith(others), f"{name}: say {word}"


def test_one_field_has_one_kind_of_value(documents: dict[str, dict[str, Any]]) -> None:
    kinds: dict[str, set[type]] = {}
    for document in documents.values():
        for name, value in fields(document):
            if value is not None:
                kind = float if type(value) is int else type(value)
                kinds.setdefault(name, set()).add(kind)
    # A fact of the hardware is an object of value and reason, and the values are of many kinds.
    mixed = {name for name, found in kinds.items() if len(found) > 1} - {"value"}
    assert not mixed


def test_commands_agree(documents: dict[str, dict[str, Any]]) -> None:
    plan, made = documents["plan"], documents["convert"]["manifest"]
    inspected, artifact = documents["inspect"], made["artifact"]
    written = sum(file["nbytes"] for file in artifact["files"])
    assert plan["output_bytes"] == inspected["output_bytes"] == written
    assert plan["bits_per_weight"] == pytest.approx(inspected["bits_per_weight"])
    assert plan["container"] == artifact["container"] == inspected["metadata"]["container"]
    assert plan["context_length"] == artifact["model"]["context_length"]
    for name in ("name", "grid", "nbytes", "role"):
        assert [tensor[name] for tensor in plan["tensors"]] == [
            tensor[name] for tensor in artifact["tensors"]
        ]
    for name in ("convert_s", "peak_memory_bytes", "threads"):
        assert name in plan
        assert name in made["measured"]
    assert documents["verify"]["sha256"] == made["sha256"] == inspected["manifest"]["sha256"]
    assert documents["verify"]["files"] == artifact["files"]
    runtimes = {runtime["runtime"] for runtime in documents["doctor"]["runtimes"]}
    assert {documents["run"]["runtime"], made["measured"]["check"]["runtime"]} <= runtimes
    picked = {pick["container"]: pick["choice"] for pick in documents["doctor"]["picks"]}
    assert {name: picked["onnx"][name] for name in ("runtime", "device", "reason")} == {
        name: documents["run"][name] for name in ("runtime", "device", "reason")
    }
