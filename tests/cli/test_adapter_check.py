"""``edgellm adapter-check``: what is right, what is wrong, and the exit code that tells which."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import peft
import peft_adapters
from safetensors.numpy import load_file, save_file

import edgellm

from .conftest import Command

TinyModel = Callable[[str], Path]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel) -> Path:
    return tiny_model("llama-256")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"])
    folder = tmp_path_factory.mktemp("adapters") / "pirate"
    return peft_adapters.make_adapter(base, config, folder).folder


@pytest.fixture(scope="module")
def artifact(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "int4"
    edgellm.convert(
        base,
        out,
        format="onnx",
        quant="rtn:int4-g32",
        adapters=[adapter],
        min_survival=0,
        check=False,
    )
    return out


def test_a_healthy_adapter(base: Path, adapter: Path, command: Command) -> None:
    done = command("adapter-check", base, adapter)
    assert done.code == 0
    assert re.search(r"^trained on +\S*llama-256 \(same\)$", done.out, re.MULTILINE)
    row = re.search(r"^attn_q +(\d+) +(\d+) +(\S+) +(\S+)%", done.out, re.MULTILINE)
    assert row is not None
    assert row.groups()[:3] == ("2", "4", "0.5")
    assert "nothing is wrong\n" in done.out
    assert "cosine" not in done.out


def test_json_holds_every_weight(base: Path, adapter: Path, command: Command) -> None:
    done = command("adapter-check", base, f"{adapter}=0.5", "--json")
    assert (done.code, done.err) == (0, "")
    found = done.json()
    (facts,) = found["report"]["adapters"]
    assert facts["weight"] == 0.5
    assert [target["scale"] for target in facts["targets"]] == [0.25] * 4
    names = {target["name"].split(".", 3)[-1] for target in facts["targets"]}
    assert names == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    assert all(target["change"]["relative"] > 0 for target in facts["targets"])
    assert found["faults"] == []


def test_all_weights_in_the_table(base: Path, adapter: Path, command: Command) -> None:
    done = command("adapter-check", base, adapter, "--all")
    assert "model.layers.1.mlp.down_proj.weight" in done.out


def test_several_adapters_also_together(
    base: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    other = edited(adapter, tmp_path, lambda name, value: value * 2)
    done = command("adapter-check", base, adapter, other)
    assert done.code == 0
    assert re.search(r"^together \(cat\): changes are [\d.]+% of the weights", done.out, re.M)


def edited(adapter: Path, folder: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """A copy of ``adapter`` below ``folder`` with ``change`` made to each tensor."""
    copy = Path(shutil.copytree(adapter, folder / "edited"))
    tensors = load_file(copy / WEIGHTS)
    save_file({name: change(name, value) for name, value in tensors.items()}, copy / WEIGHTS)
    return copy


def test_an_untrained_adapter_is_wrong(
    base: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    zero = edited(adapter, tmp_path, lambda name, value: value * ("lora_B" not in name))
    done = command("adapter-check", base, zero)
    assert done.code == 3
    assert done.out.count("edited is untrained: all of its 4 changes are zero") == 1
    assert "attn_q" in done.out
    allowed = command("adapter-check", base, zero, "--allow-untrained")
    assert allowed.code == 0
    assert "  ! edited is untrained" in allowed.out
    assert command("convert", base, "--adapter", zero, "--dry-run").code == 3


def test_one_untrained_weight_is_a_note(
    base: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    def change(name: str, value: np.ndarray) -> np.ndarray:
        return value * (".layers.1.mlp.down_proj.lora_B" not in name)

    done = command("adapter-check", base, edited(adapter, tmp_path, change))
    assert done.code == 0
    assert "1 of 4 changes are zero: model.layers.1.mlp.down_proj.weight" in done.out


def test_values_beyond_f16_are_wrong(base: Path, adapter: Path, command: Command) -> None:
    done = command("adapter-check", base, f"{adapter}=900000")
    assert done.code == 3
    assert "beyond f16's 65504" in done.out
    assert "the change is larger than the weight itself" in done.out


def test_another_base_by_shape_and_by_name(
    base: Path, adapter: Path, tmp_path: Path, tiny_model: TinyModel, command: Command
) -> None:
    done = command("adapter-check", tiny_model("llama"), adapter, "--json")
    assert done.code == 3
    assert "trained on another model" in done.json()["error"]["message"]
    renamed = shutil.copytree(base, tmp_path / "other-model")
    done = command("adapter-check", renamed, adapter)
    assert done.code == 0
    assert re.search(r"  ! pirate says that it was trained on \S*llama-256, and the base", done.out)
    assert "nothing is wrong beside the warnings" in done.out


def test_an_adapter_that_was_merged_before(
    base: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    merged = tmp_path / "merged"
    assert command("merge", base, "--adapter", adapter, "--out", merged).code == 0
    done = command("adapter-check", merged, adapter)
    assert done.code == 0
    assert "  ! WARNING: pirate has been merged into" in done.out


def test_what_is_left_in_an_artifact(
    base: Path, adapter: Path, artifact: Path, command: Command
) -> None:
    arguments = ("adapter-check", base, adapter, "--artifact", artifact)
    done = command(*arguments, "--min-survival", 0)
    assert done.code == 0
    share = re.search(r"^survival +([\d.-]+)%$", done.out, re.MULTILINE)
    assert share is not None
    assert re.search(r"^attn_q .* [01]\.\d{4}$", done.out, re.MULTILINE)
    assert "1024 tokens (builtin), with onnxruntime" in done.out
    found = command(*arguments, "--min-survival", 1, "--json")
    assert found.code == 8
    assert found.json()["survival"]["survival"] == pytest.approx(float(share[1]) / 100, abs=1e-3)
    assert "of the fine-tune is left after rounding" in found.json()["faults"][0]


def test_on_a_text_of_ones_own(
    base: Path, adapter: Path, artifact: Path, tmp_path: Path, command: Command
) -> None:
    text = tmp_path / "logbook.txt"
    text.write_text("Fair wind, four knots. " * 20)
    arguments = ("adapter-check", base, adapter, "--artifact", artifact, "--min-survival", 0)
    done = command(*arguments, "--check-text", text)
    assert done.code == 0
    assert "(logbook.txt)" in done.out
    text.write_text("")
    assert command(*arguments, "--check-text", text).code == 2
    assert command(*arguments, "--check-text", tmp_path / "none").code == 2


def test_an_artifact_of_something_else(
    base: Path, adapter: Path, artifact: Path, onnx_artifact: Path, command: Command
) -> None:
    done = command("adapter-check", base, f"{adapter}=0.5", "--artifact", artifact)
    assert done.code == 3
    assert "come to other merged weights" in done.err
    done = command("adapter-check", base, adapter, "--artifact", onnx_artifact)
    assert done.code == 3
    assert "no adapter that it was merged into it" in done.err


def test_a_conversion_that_loses_the_fine_tune_leaves_nothing(
    base: Path, adapter: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    arguments = ("convert", base, "--adapter", f"{adapter}=0.1", "--format", "onnx", "--out", out)
    done = command(*arguments, "--quant", "rtn:int4-g128-sym")
    assert done.code == 8
    assert "of the fine-tune is left after rounding and 25% is asked for" in done.err
    assert not out.exists()
    kept = command(*arguments, "--quant", "rtn:int4-g128-sym", "--min-survival", 0)
    assert kept.code == 0
    assert "survival: " in kept.err
