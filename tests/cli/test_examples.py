"""What stands in ``examples/`` runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .conftest import Command

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quickstart(model: Path, tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, sys.path))
    shown = run(EXAMPLES / "quickstart.py", model, tmp_path / "out", PYTHONPATH=path)
    assert "tokens/s on onnxruntime" in shown
    assert (tmp_path / "out" / "manifest.json").exists()


def test_recipe(command: Command, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    text = (EXAMPLES / "recipe.toml").read_text()
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert hub_id in text
    shutil.copytree(model, tmp_path / "model")
    recipe.write_text(text.replace(hub_id, "model").replace("4096", "128"))
    done = command("convert", "--recipe", recipe, "-o", tmp_path / "small", "--no-check", "--json")
    assert done.code == 0, done.out
    made = done.json()["manifest"]["artifact"]
    assert made["container"] == "gguf"
    assert made["model"]["context_length"] == 128
    assert {tensor["grid"] for tensor in made["tensors"]} == {"f32", "q4_0", "q8_0"}


def test_custom_runtime(onnx_artifact: Path, tmp_path: Path) -> None:
    """Installed as a package of its own, it is found by its entry point."""
    source = shutil.copytree(EXAMPLES / "custom_runtime", tmp_path / "source")
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check")
    run("-m", "pip", "install", *options, "--target", site, source)
    trace = tmp_path / "trace.jsonl"
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    doctor = json.loads(run("-m", "edgellm", "doctor", "--json", PYTHONPATH=path))
    assert "tracing" in [runtime["runtime"] for runtime in doctor["runtimes"]]
    assert doctor["picks"][1]["choice"]["runtime"] == "onnxruntime"
    asked = ("run", onnx_artifact, "hello", "--max-tokens", "4", "--runtime", "tracing", "--json")
    answer = json.loads(run("-m", "edgellm", *asked, PYTHONPATH=path, EDGELLM_TRACE=str(trace)))
    assert answer["runtime"] == "tracing"
    calls = [json.loads(line) for line in trace.read_text().splitlines()]
    assert [call["call"] for call in calls] == ["prefill", "decode", "decode", "decode"]
    assert calls[0]["tokens"] == answer["prompt_tokens"]
