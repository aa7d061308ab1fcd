"""``edgellm convert --adapter``: what it says and records, the lineage, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import edgellm
from edgellm.manifest import read_manifest

from .conftest import Command, TinyModel

RANK = 4
SHAPES = {"q_proj": (192, 96), "v_proj": (64, 96)}
"""Of the tiny llama's layers, ``[out, in]``."""


def write_adapter(
    folder: Path, *, seed: int = 0, spread: float = 0.3, layers: int = 3, **config: Any
) -> Path:
    """A LoRA adapter as PEFT saves it, for the tiny llama's q and v."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for module, (out, into) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            a = random.standard_normal((RANK, into), np.float32)
            b = random.standard_normal((out, RANK), np.float32)
            tensors[f"{prefix}.lora_A.weight"] = spread * a
            tensors[f"{prefix}.lora_B.weight"] = spread * b
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "/home/somebody/models/llama",
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": sorted(SHAPES),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora")


def digest(folder: Path) -> str:
    """Over the digests of both files, in the order of their names."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    digests = [hashlib.sha256((folder / name).read_bytes()).digest() for name in names]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def left(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith((".out", "out"))]


def test_the_manifest_and_inspect_say_what_was_merged(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    other, out = write_adapter(tmp_path / "other", seed=1), tmp_path / "out"
    asked = ("--adapter", lora, "--adapter", f"{other}=0.5", "--format", "onnx", "-q", "int8")
    done = command("convert", model, *asked, "-o", out)
    assert done.code == 0, done.err
    assert "of the fine-tune is left after rounding" in done.err
    manifest = read_manifest(out)
    merge = manifest.artifact.merge
    assert merge is not None
    assert [(each.name, each.sha256, each.weight) for each in merge.adapters] == [
        ("lora", digest(lora), 1.0),
        ("other", digest(other), 0.5),
    ]
    first = merge.adapters[0]
    assert (first.kind, first.rank, first.alpha, first.changed_tensors) == ("lora", RANK, 6.0, 6)
    assert first.base_name == "llama"  # and not where it lay
    assert (merge.method, merge.base) == ("cat", "full")
    assert manifest.artifact.recipe["adapters"] == [1.0, 0.5]
    assert len(manifest.measured["merge"]["relative_change_by_tensor"]) == 6
    assert 0 < manifest.measured["merge"]["relative_change"] < 3
    assert 0.8 < manifest.measured["survival"]["survival"] <= 1
    shown = command("inspect", out)
    for fact in (digest(lora), digest(other), "rank 4, alpha 6, weight 0.5", merge.merged_sha256):
        assert fact in shown.out
    assert command("inspect", out, "--json").json()["manifest"]["artifact"]["merge"]["adapters"]


def test_the_plan_shows_adapters_without_reading_a_weight(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(model, tmp_path / "model"))
    weights = source / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:  # every weight gone, the header there
        header = int.from_bytes(file.read(8), "little")
        file.truncate(8 + header)
        file.truncate(size)
    asked = ("convert", source, "--adapter", f"{lora}=2", "--format", "gguf", "--dry-run")
    shown = command(*asked)
    assert shown.code == 0, shown.err
    assert digest(lora) in shown.out
    assert "6 of 30 weights" in shown.out
    facts = command(*asked, "--json").json()["merge"]
    assert facts["adapters"][0]["weight"] == 2
    assert facts["combination"]["method"] == "cat"
    assert "blk.2.attn_v.weight" in facts["changed"]


def test_an_adapter_that_is_in_the_base_already_is_warned_of(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    to_gguf = ("--format", "gguf", "-q", "f32", "--no-check")
    assert command("convert", model, "--adapter", lora, *to_gguf, "-o", out).code == 0
    merged = out / "model.gguf"
    other = write_adapter(tmp_path / "other", seed=1)
    once = command("convert", merged, "--adapter", other, *to_gguf, "-o", again)
    assert once.code == 0
    assert "WARNING" not in once.err
    assert "/home/somebody" not in (again / "manifest.json").read_text()
    made = read_manifest(again).artifact
    assert [each.sha256 for each in made.merged_before] == [digest(lora)]
    assert (
        f"merged before  lora: lora adapter, rank 4, alpha 6, weight 1, sha256 {digest(lora)}"
        in (command("inspect", again).out)
    )
    twice = command("convert", merged, "--adapter", lora, *to_gguf, "-o", again, "--force")
    assert twice.code == 0
    assert "WARNING: lora has been merged into" in twice.err
    assert any(note.startswith("WARNING: lora") for note in read_manifest(again).artifact.notes)
    keys = command("inspect", again / "model.gguf", "--json").json()["metadata"]
    assert keys["general.base_model.count"] == 3
    assert keys["general.base_model.2.description"].endswith(digest(lora))
    thrice = command("convert", again / "model.gguf", *to_gguf, "-o", tmp_path / "plain", "--json")
    before = thrice.json()["manifest"]["artifact"]["merged_before"]
    assert [each["sha256"] for each in before] == [digest(lora), digest(lora)]


def test_a_saved_recipe_merges_the_same(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    saved, out = tmp_path / "recipe.toml", tmp_path / "out"
    other = write_adapter(tmp_path / "other", seed=1)
    options = ("--combine", "ties", "--density", 0.5, "--format", "gguf", "-q", "q8_0")
    adapters = ("--adapter", lora, "--adapter", f"{other}=0.5", "--no-check", "--json")
    first = command("convert", model, *adapters, *options, "-o", out, "--save-recipe", saved)
    assert first.code == 0, first.out
    again = command("convert", "--recipe", saved, "-o", tmp_path / "again", "--no-check", "--json")
    ours, theirs = (done.json()["manifest"] for done in (first, again))
    assert ours["sha256"] == theirs["sha256"]
    assert ours["artifact"]["merge"]["method"] == "ties"
    assert ours["artifact"]["merge"]["density"] == 0.5


def test_the_library_takes_adapters_as_the_command_does(
    command: Command, model: Path, lora: Path, tmp_path: Path
) -> None:
    asked = ("--adapter", f"{lora}=0.5", "--format", "gguf", "-q", "q8_0", "--no-check")
    assert command("convert", model, *asked, "-o", tmp_path / "out").code == 0
    made = edgellm.convert(
        model, tmp_path / "made", adapters=[f"{lora}=0.5"], format="gguf", quant="q8_0", check=False
    )
    assert made.manifest is not None
    assert made.manifest.sha256 == read_manifest(tmp_path / "out").sha256


def test_the_output_may_not_be_an_adapter(command: Command, model: Path, lora: Path) -> None:
    before = sorted(lora.iterdir())
    done = command("convert", model, "--adapter", lora, "-o", lora / "inside")
    assert done.code == 2
    assert "overlap" in done.err
    assert sorted(lora.iterdir()) == before


def test_too_little_survival_keeps_nothing(command: Command, model: Path, tmp_path: Path) -> None:
    faint = write_adapter(tmp_path / "faint", spread=0.06)
    asked = ("convert", model, "--adapter", faint, "--format", "gguf", "-q", "rtn:q4_0")
    refused = command(*asked, "--min-survival", 0.99, "-o", tmp_path / "out")
    assert refused.code == 8
    assert "of the fine-tune is left after rounding and 99% is asked for" in refused.err
    assert not left(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("A tokenizer splits a text into tokens.")
    least = ("--min-survival", 0, "--check-text", text)
    assert command(*asked, *least, "-o", tmp_path / "out").code == 0
    assert read_manifest(tmp_path / "out").measured["survival"]["text"] == "text.txt"


def test_an_untrained_adapter_is_refused_unless_allowed(
    command: Command, model: Path, tmp_path: Path
) -> None:
    empty = write_adapter(tmp_path / "empty", spread=0.0)
    asked = ("convert", model, "--adapter", empty, "--format", "gguf", "--dry-run")
    refused = command(*asked)
    assert refused.code == 3
    assert "--allow-untrained" in refused.err
    assert command(*asked, "--allow-untrained").code == 0


def test_what_belongs_elsewhere_is_refused_before_any_work(
    command: Command, model: Path, lora: Path, tiny_model: TinyModel, tmp_path: Path
) -> None:
    deep = write_adapter(tmp_path / "deep", layers=5)
    cases = [
        ((model, "--adapter", deep), 3, "model.layers.3.self_attn.q_proj"),
        ((tiny_model("llama-256"), "--adapter", lora), 3, "[192, 96]"),
        ((tiny_model("gpt2"), "--adapter", lora), 3, "another model"),
        ((model, "--adapter", tmp_path / "nowhere"), 3, "nowhere"),
        ((model, "--adapter", model), 3, "is a model, not an adapter"),
        ((lora,), 4, "edgellm convert BASE --adapter"),
        ((model, "--adapter", lora, "--adapter", lora), 3, "the same adapter"),
        ((model, "--adapter", f"{lora}=0"), 2, "other than 0"),
        ((model, "--combine", "ties"), 2, "combine is about adapters"),
        ((model, "--seed", "0", "--quant", "rtn:int4-g32"), 2, "seed"),
        ((model, "--adapter", lora, "--combine", "tise"), 2, "ties"),
        ((model, "--adapter", lora, "--combine", "ties"), 2, "needs a density"),
        ((model, "--adapter", lora, "--density", "0.5"), 2, "prunes nothing"),
        ((model, "--adapter", lora, "--min-survival", "2"), 2, "from 0 to 1"),
        ((model, "--adapter", lora, "--check-text", "none.txt"), 2, "none.txt"),
    ]
    for arguments, code, says in cases:
        done = command("convert", *arguments, "--format", "onnx", "-o", tmp_path / "out")
        assert done.code == code, (arguments, done.err)
        assert says in done.err, (arguments, done.err)
        assert not left(tmp_path)
