"""``convert --device`` from the command line: chosen, said, recorded, refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from edgellm.manifest import read_manifest
from edgellm.quant import devices

from .conftest import Command, TinyModel


@pytest.fixture
def options(tiny_model: TinyModel) -> tuple[object, ...]:
    given = ("--format", "gguf", "--quant", "gptq:q4_0", "--calibration-tokens", 1024)
    return (tiny_model("llama"), *given)


@pytest.fixture
def torch_cpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that every torch has, as another row of the table: its tensors on the CPU."""
    pytest.importorskip("torch", reason="torch is not installed")
    row = devices.TorchDevice("cpu", lambda torch: "", lambda torch: "some processor")
    monkeypatch.setitem(devices.TORCH_DEVICES, "torch-cpu", row)
    return "torch-cpu"


def test_what_another_device_solved_is_planned_recorded_and_as_good(
    command: Command, options: tuple[object, ...], torch_cpu: str, tmp_path: Path
) -> None:
    import torch

    planned = command("convert", *options, "--device", torch_cpu, "--dry-run", "--json").json()
    assert f"device {torch_cpu}: some processor, by torch" in " ".join(planned["reasons"])
    made = {}
    for device in ("cpu", torch_cpu):
        done = command(
            "convert", *options, "--device", device, "--no-check", "--out", tmp_path / device
        )
        assert done.code == 0, done.err
        assert command("verify", tmp_path / device).code == 0
        made[device] = read_manifest(tmp_path / device)
    entry = made[torch_cpu].artifact.calibration
    assert entry is not None
    assert entry.device == torch_cpu
    assert made[torch_cpu].artifact.recipe["device"] == torch_cpu
    assert made[torch_cpu].artifact.tool_versions["torch"] == torch.__version__
    figures = {name: made[name].measured["calibration"] for name in made}
    assert figures[torch_cpu]["device"] == "some processor"
    for name, error in figures["cpu"]["output_error_by_tensor"].items():
        assert figures[torch_cpu]["output_error_by_tensor"][name] == pytest.approx(error, rel=1e-3)


def test_the_cpu_is_the_same_named_or_not(
    command: Command, options: tuple[object, ...], tmp_path: Path
) -> None:
    quick = ("convert", *options, "--no-check", "--json", "--out")
    plain = command(*quick, tmp_path / "plain").json()["manifest"]
    named = command(*quick, tmp_path / "named", "--device", "CPU").json()["manifest"]
    assert plain["sha256"] == named["sha256"]
    assert "device" not in plain["artifact"]["calibration"]
    assert "torch" not in plain["artifact"]["tool_versions"]


def test_a_device_that_cannot_be_had_is_refused_before_work(
    command: Command,
    options: tuple[object, ...],
    torch_cpu: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def refused(*given: object) -> tuple[int, str]:
        done = command("convert", *given, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return done.code, done.err

    code, says = refused(*options, "--device", "tpu")
    assert (code, "choose auto, cpu, cuda, metal" in says) == (2, True)
    code, says = refused(*options[:3], "--quant", "rtn:q4_0", "--device", torch_cpu)
    assert (code, "choose --quant gptq:q4_0, or leave --device out" in says) == (2, True)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "torch" else find_spec(name, *rest),
    )
    code, says = refused(*options, "--device", "cuda")
    assert (code, "pip install 'edgellm[calibrate]'" in says) == (6, True)


def test_auto_says_why_the_cpu_solves(
    command: Command, options: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = devices.TorchDevice("cuda", lambda torch: "it is elsewhere", lambda torch: "")
    monkeypatch.setattr(devices, "TORCH_DEVICES", {"cuda": nowhere})
    pytest.importorskip("torch", reason="torch is not installed")
    plan = command("convert", *options, "--device", "auto", "--dry-run", "--json").json()
    assert "device cpu: no GPU that torch can use (cuda: it is elsewhere)" in plan["reasons"]
    assert plan["recipe"]["device"] == "cpu"
