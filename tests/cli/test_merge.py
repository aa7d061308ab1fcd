"""``edgellm merge``: what it writes, shows, refuses, and what other commands make of the result."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import edgellm

from .conftest import Command


@pytest.fixture(scope="module")
def adapter(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on two modules of each layer of the tiny Llama, as PEFT saves one."""
    draw = np.random.default_rng(1)
    base = safetensors.numpy.load_file(model / "model.safetensors")
    tensors = {}
    for name, weight in base.items():
        if name.endswith(("q_proj.weight", "up_proj.weight")):
            out, into = weight.shape
            prefix = f"base_model.model.{name.removesuffix('.weight')}"
            for factor, shape in {"lora_A": (4, into), "lora_B": (out, 4)}.items():
                values = 0.1 * draw.standard_normal(shape)
                tensors[f"{prefix}.{factor}.weight"] = values.astype(np.float32)
    folder = tmp_path_factory.mktemp("adapters") / "style"
    folder.mkdir()
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "up_proj"],
        "base_model_name_or_path": "someone/llama",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_is_written_and_said(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = command("merge", model, "--adapter", f"{adapter}=0.5", "--out", out)
    assert done.code == 0, done.err
    assert done.out.startswith(f"{out}: ")
    assert "6 of 30 tensors merged" in done.out
    assert "full-precision" in done.err
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
        "manifest.json",
    }
    card = (out / "README.md").read_text()
    assert 'base_model: "llama"' in card
    assert "style (lora), weight 0.5" in card


def test_the_document_says_what_went_in(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = command("merge", model, "--adapter", adapter, "--out", out, "--json")
    assert done.err == ""
    made = done.json()["manifest"]["artifact"]
    assert made["container"] == "hf"
    [entry] = made["merge"]["adapters"]
    assert (entry["name"], entry["rank"], entry["alpha"]) == ("style", 4, 8.0)
    assert (entry["weight"], entry["changed_tensors"]) == (1.0, 6)
    assert made["merge"]["base"] == "full"
    assert len([tensor for tensor in made["tensors"] if tensor.get("note")]) == 6


def test_a_dry_run_reads_no_weight_and_writes_nothing(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = command("merge", model, "--adapter", adapter, "--out", out, "--dry-run")
    assert done.code == 0
    assert not out.exists()
    assert "6 of 30 tensors" in done.out
    facts = command("merge", model, "--adapter", adapter, "--dry-run", "--json").json()
    assert len(facts["changed"]) == 6
    assert facts["output_bytes"] > 1e6


def test_other_commands_know_the_result(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    merged, small = tmp_path / "merged", tmp_path / "small"
    edgellm.merge(model, merged, [adapter])
    assert command("verify", merged).code == 0
    shown = command("inspect", merged)
    assert "style" in shown.out
    ran = command("run", merged, "hello", "--max-tokens", "2", "--json")
    assert ran.json()["runtime"] == "torch"
    choices = ("--format", "gguf", "--quant", "f32", "--no-check")
    command("convert", merged, "-o", small, *choices)
    done = command("convert", model, "--adapter", adapter, "-o", tmp_path / "direct", *choices)
    assert done.code == 0, done.err
    ours, direct = (edgellm.open_artifact(tmp_path / name).manifest for name in ("small", "direct"))
    assert ours is not None
    assert direct is not None
    assert [entry.name for entry in ours.artifact.merged_before] == ["style"]
    digests = [
        {tensor.name: tensor.sha256 for tensor in manifest.artifact.tensors}
        for manifest in (ours, direct)
    ]
    assert digests[0] == digests[1]


def test_a_damaged_result_is_found(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    edgellm.merge(model, merged, [adapter])
    weights = merged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    done = command("verify", merged)
    assert done.code == 1
    assert "model.safetensors differs" in done.out + done.err


def test_what_is_refused(command: Command, model: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    other = shutil.copytree(adapter, tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(other / "adapter_model.safetensors")
    renamed = {name.replace(".layers.2.", ".layers.7."): value for name, value in tensors.items()}
    safetensors.numpy.save_file(renamed, other / "adapter_model.safetensors")
    idle = shutil.copytree(adapter, tmp_path / "idle")
    zeros = {n: v * 0 if "lora_B" in n else v for n, v in tensors.items()}
    safetensors.numpy.save_file(zeros, idle / "adapter_model.safetensors")
    repeating = shutil.copytree(adapter, tmp_path / "repeating")
    config["layer_replication"] = [[0, 3], [1, 3]]
    (repeating / "adapter_config.json").write_text(json.dumps(config))
    rounded = shutil.copytree(model, tmp_path / "rounded")
    config = json.loads((rounded / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (rounded / "config.json").write_text(json.dumps(config))
    way_out = f"edgellm convert {{}} --adapter {adapter} --out DIR"
    lines = {
        ("merge", model, "--out", out): (2, "--adapter"),
        ("merge", model, "--adapter", adapter): (2, "--out"),
        ("merge", model, "--adapter", adapter, "-o", model, "--force"): (7, "manifest.json"),
        ("merge", model, "--adapter", adapter, "-o", model / "in"): (2, "overlap"),
        ("merge", model, "--adapter", adapter, "-o", out, "--dtype", "q4_0"): (2, "bf16"),
        ("merge", model, "--adapter", adapter, "-o", out, "--combine", "sum"): (2, "cat"),
        ("merge", model, "--adapter", other, "-o", out): (3, "layers.7."),
        ("merge", model, "--adapter", idle, "-o", out): (3, "--allow-untrained"),
        ("merge", model, "--adapter", repeating, "-o", out): (3, "edgellm convert"),
        ("merge", adapter, "--adapter", adapter, "-o", out): (3, "an adapter"),
        ("merge", gguf, "--adapter", adapter, "-o", out): (4, f"`{way_out.format(gguf)}`"),
        ("merge", rounded, "--adapter", adapter, "-o", out): (4, f"`{way_out.format(rounded)}`"),
        ("merge", model, "--adapter", adapter, "-o", adapter / "in"): (2, "overlap"),
        ("merge", tmp_path / "no", "--adapter", adapter, "-o", out): (3, "no folder"),
    }
    for line, (code, word) in lines.items():
        done = command(*line)
        assert (done.code, word in done.err) == (code, True), (line, done)
        assert not out.exists()
    assert not list(tmp_path.glob(".*partial"))


def test_an_unknown_config_key_can_be_vouched_for(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    newer = shutil.copytree(adapter, tmp_path / "style")
    config = json.loads((newer / "adapter_config.json").read_text())
    (newer / "adapter_config.json").write_text(json.dumps({**config, "of_next_year": True}))
    out, plain = tmp_path / "out", tmp_path / "plain"
    done = command("merge", model, "--adapter", newer, "-o", out)
    assert (done.code, "--ignore-config-key" in done.err) == (3, True), done.err
    done = command(
        "merge", model, "--adapter", newer, "-o", out, "--ignore-config-key", "of_next_year"
    )
    assert done.code == 0, done.err
    edgellm.merge(model, plain, [adapter])
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (plain / weights).read_bytes()


def test_an_untrained_adapter_can_be_allowed(
    command: Command, model: Path, adapter: Path, tmp_path: Path
) -> None:
    idle = shutil.copytree(adapter, tmp_path / "idle")
    tensors = safetensors.numpy.load_file(idle / "adapter_model.safetensors")
    zeros = {n: v * 0 if "lora_B" in n else v for n, v in tensors.items()}
    safetensors.numpy.save_file(zeros, idle / "adapter_model.safetensors")
    out = tmp_path / "out"
    done = command("merge", model, "--adapter", idle, "-o", out, "--allow-untrained")
    assert done.code == 0, done.err
    assert "untrained" in done.err
    weights = "model.safetensors"
    assert (out / weights).read_bytes() == (model / weights).read_bytes()
