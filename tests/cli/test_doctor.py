"""``edgellm doctor``: what it finds is what ``run`` and ``convert`` go by."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm import demo_model
from edgellm.hardware import detect
from edgellm.runtimes import best_container, runtime_names

from .conftest import Command


def test_shows_machine_runtimes_and_picks(command: Command) -> None:
    done = command("doctor")
    assert done.code == 0
    assert done.err == ""
    machine = detect()
    for fact in (machine.cpu.value, "bandwidth", "run onnx", "run gguf", *runtime_names()):
        assert fact in done.out


def test_json_says_why(command: Command) -> None:
    found = command("doctor", "--json").json()
    assert found["memory_bandwidth_bytes_per_s"] > 1e8
    assert (found["default_container"], found["default_container_reason"]) == best_container()
    assert {runtime["runtime"] for runtime in found["runtimes"]} == set(runtime_names())
    assert all(runtime["reason"] for runtime in found["runtimes"])
    assert {pick["container"] for pick in found["picks"]} == {"gguf", "hf", "mlx", "onnx"}
    assert all(pick["reason"] for pick in found["picks"])


def test_missing_runtime_comes_with_its_command(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found_spec = importlib.util.find_spec

    def without_llamacpp(name: str, package: str | None = None) -> object:
        return None if name == "llama_cpp" else found_spec(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without_llamacpp)
    shown = command("doctor")
    assert 'pip install "edgellm[llamacpp]"' in shown.out
    picks = {pick["container"]: pick for pick in command("doctor", "--json").json()["picks"]}
    assert picks["gguf"]["choice"] is None
    assert "edgellm[llamacpp]" in picks["gguf"]["reason"]
    assert picks["onnx"]["choice"]["runtime"] == "onnxruntime"


def test_demo_without_its_model_says_the_command(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(demo_model, "PACKAGE", "no_such_package")
    done = command("demo", "--out", tmp_path / "demo")
    assert done.code == 3
    assert demo_model.INSTALL in done.err
    assert not (tmp_path / "demo").exists()
    assert demo_model.INSTALL in command("doctor").out
