"""Ctrl-C ends a command with 130 and leaves nothing half-written."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Command
from .test_chat import SLOWLY


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_convert(
    command: Command, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgellm.conversion.quantize_tensors", interrupt)
    (tmp_path / "made").mkdir()
    done = command("convert", model, "--out", tmp_path / "made" / "small")
    assert done.code == 130
    assert done.out == ""
    assert list((tmp_path / "made").iterdir()) == []


def test_loading(command: Command, onnx_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm.chat.open", interrupt)
    assert command("run", onnx_artifact, "hello").code == 130


def test_answering(onnx_artifact: Path) -> None:
    arguments = ("run", onnx_artifact, "hello", "--runtime", "fake", "--context", "200")
    with subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        start = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert start
    assert rest.endswith("\n")
    assert "Traceback" not in err
    assert "tokens/s" in err  # what there was of the answer is accounted for
