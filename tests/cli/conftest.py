"""Driving the command line in this process, and small artifacts to drive it on."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import edgellm
from edgellm.cli import main

TinyModel = Callable[[str], Path]


class Done(NamedTuple):
    """A finished command line."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """stdout as the one document that it must be."""
        return json.loads(self.out)


class Terminal(io.StringIO):
    """stdin that says it is a terminal, and is empty."""

    def isatty(self) -> bool:
        return True


Command = Callable[..., Done]


@pytest.fixture
def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """``command("run", path, stdin="hello")``: stdin is an idle terminal unless given."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: object, stdin: str | None = None) -> Done:
        monkeypatch.setattr("sys.stdin", Terminal() if stdin is None else io.StringIO(stdin))
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def model(tiny_model: TinyModel) -> Path:
    """A tiny Llama as a Hugging Face folder."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def onnx_artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "onnx"
    edgellm.convert(model, out, format="onnx", quant="rtn:int4-g32", check=False)
    return out


@pytest.fixture(scope="session")
def gguf_artifact(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "gguf"
    edgellm.convert(model, out, format="gguf", quant="q8_0", check=False)
    return out
