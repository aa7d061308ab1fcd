"""``edgellm convert``: what it says, what it writes, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from edgellm.artifact import open_artifact, verify
from edgellm.manifest import read_manifest

from .conftest import Command


def nothing_left(folder: Path) -> bool:
    return not list(folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    return tmp_path / "made" / "small"


def test_converts_and_says_what_it_chose_and_why(command: Command, model: Path, out: Path) -> None:
    done = command("convert", model, "--out", out, "--no-check")
    assert done.code == 0
    verify(open_artifact(out))
    container = read_manifest(out).artifact.container
    assert f"format {container}: " in done.err
    assert "grid " in done.err
    assert "solver gptq: " in done.err
    assert re.search(r"calibrate +head: output error .*, memory \d+ MB, 5/5", done.err)
    assert str(out) in done.out
    assert len(done.out.splitlines()) == 1


def test_json_is_the_manifest_and_nothing_else_is_said(
    command: Command, model: Path, out: Path
) -> None:
    done = command(
        "convert", model, "-o", out, "-q", "int8", "--format", "onnx", "--no-check", "--json"
    )
    assert done.code == 0
    assert done.err == ""
    assert done.json()["path"] == str(out)
    assert done.json()["manifest"] == json.loads((out / "manifest.json").read_text())


def test_check_generates_with_what_was_made(command: Command, model: Path, out: Path) -> None:
    done = command("convert", model, "-o", out, "--format", "onnx", "--json")
    assert done.code == 0
    assert done.json()["manifest"]["measured"]["check"]["token_ids"]


def test_what_the_check_found_is_said(
    command: Command, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("convert", model, "-o", out, "--format", "onnx", "--force")
    done = command(*asked)
    assert 'it runs: "The capital of France is' in done.err
    assert "ask it:" in done.err

    def missing(artifact: object) -> dict[str, str]:
        return {"skipped": "nothing here runs it"}

    monkeypatch.setattr("edgellm.conversion.check_artifact", missing)
    done = command(*asked)
    assert done.code == 0
    assert "not tried: nothing here runs it" in done.err
    assert "ask it:" not in done.err


def test_dry_run_shows_every_tensor_and_writes_nothing(
    command: Command, model: Path, out: Path, onnx_artifact: Path
) -> None:
    asked = ("convert", model, "-o", out, "--format", "onnx", "-q", "rtn:int4-g32", "--dry-run")
    shown = command(*asked)
    assert shown.code == 0
    assert nothing_left(out.parent)
    plan = command(*asked, "--json").json()
    made = read_manifest(onnx_artifact).artifact
    assert [(tensor["name"], tensor["grid"], tensor["nbytes"]) for tensor in plan["tensors"]] == [
        (tensor.name, tensor.grid, tensor.nbytes) for tensor in made.tensors
    ]
    assert plan["output_bytes"] == sum(file.nbytes for file in made.files)
    for tensor in made.tensors:
        assert f"\n{tensor.name} " in f"\n{shown.out}"
    for fact in ("bits per weight", "peak memory", "disk needed", "time"):
        assert fact in shown.out


def test_dry_run_needs_no_out(command: Command, model: Path) -> None:
    assert command("convert", model, "--dry-run").code == 0


def test_a_saved_recipe_makes_the_same_bytes(
    command: Command, model: Path, out: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "recipe.toml"
    options = ("--format", "gguf", "--quant", "q5_0", "--embed", "q8_0", "--context", 64)
    first = command(
        "convert", model, "-o", out, *options, "--save-recipe", saved, "--no-check", "--json"
    )
    again = out.with_name("again")
    second = command(
        "convert", "--recipe", saved, "-o", again, "--threads", 1, "--no-check", "--json"
    )
    assert (first.code, second.code) == (0, 0)
    assert first.json()["manifest"]["sha256"] == second.json()["manifest"]["sha256"]


def test_options_win_over_the_recipe(command: Command, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'source = "{model}"\nformat = "gguf"\nquant = "q4_0"\n')
    plan = command("convert", "--recipe", recipe, "--quant", "q8_0", "--dry-run", "--json").json()
    assert plan["recipe"]["quant"] == "q8_0"
    assert plan["recipe"]["format"] == "gguf"


def test_existing_out_needs_force(command: Command, model: Path, out: Path) -> None:
    assert command("convert", model, "-o", out, "--format", "onnx", "--no-check").code == 0
    before = read_manifest(out).sha256
    refused = command("convert", model, "-o", out, "--format", "gguf", "--no-check")
    assert refused.code == 7
    assert "--force" in refused.err
    assert read_manifest(out).sha256 == before
    forced = command("convert", model, "-o", out, "--format", "gguf", "--no-check", "--force")
    assert forced.code == 0
    assert read_manifest(out).artifact.container == "gguf"


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--quant", "q4_k_n", "--format", "gguf"), 2, "q4_k_m"),
        (("--quant", "nf4", "--format", "gguf"), 5, "iq4_nl"),
        (("--quant", "q4_k_m", "--format", "onnx"), 5, "int4"),
        (("--quant", "magic:q4_0"), 2, "rtn"),
        (("--format", "goof"), 2, "gguf"),
        (("--threads", "0"), 2, "--threads"),
        (("--context", "0"), 2, "context"),
        (("--recipe", "nowhere.toml"), 2, "nowhere.toml"),
        (("--embed", "q9_0", "--format", "gguf"), 2, "q"),
    ],
)
def test_refusals_name_what_to_do(
    options: tuple[str, ...],
    code: int,
    says: str,
    command: Command,
    model: Path,
    out: Path,
) -> None:
    done = command("convert", model, "-o", out, *options)
    assert done.code == code, done.err
    assert says in done.err
    assert done.out == ""
    assert nothing_left(out.parent)
    as_json = command("convert", model, "-o", out, *options, "--json")
    assert as_json.code == code
    assert as_json.err == ""
    assert as_json.json()["error"]["exit_code"] == code
    assert says in as_json.json()["error"]["message"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("convert",), "SOURCE"),
        (("convert", "SOURCE_FOLDER"), "--out"),
        (("convert", "SOURCE_FOLDER", "--out"), "--out"),
        (("convert", "SOURCE_FOLDER", "--quantize", "q4_0"), "--quantize"),
    ],
)
def test_incomplete_command_lines(
    arguments: tuple[str, ...], says: str, command: Command, model: Path
) -> None:
    given = [str(model) if word == "SOURCE_FOLDER" else word for word in arguments]
    done = command(*given)
    assert done.code == 2
    assert says in done.err


def test_out_may_not_be_the_source(command: Command, model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    shutil.copytree(model, source)
    before = sorted(source.iterdir())
    for target in (source, source / "inside", tmp_path):
        done = command("convert", source, "-o", target, "--force", "--no-check")
        assert done.code in (2, 7), (target, done.err)
    assert sorted(source.iterdir()) == before


def test_pickles_are_refused(command: Command, model: Path, tmp_path: Path, out: Path) -> None:
    source = tmp_path / "pickled"
    shutil.copytree(model, source)
    for weights in source.glob("*.safetensors*"):
        weights.unlink()
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    done = command("convert", source, "-o", out)
    assert done.code == 3
    assert "safetensors" in done.err
    assert nothing_left(out.parent)


@pytest.mark.parametrize("source", ["nowhere", "./nowhere", "nobody/nothing"])
def test_sources_that_are_not_there(source: str, command: Command, out: Path) -> None:
    done = command("convert", source, "-o", out)
    assert done.code == 3
    assert source in done.err
    assert nothing_left(out.parent)


def test_out_that_cannot_be_made(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = command("convert", model, "-o", tmp_path / "file" / "small", "--no-check")
    assert done.code == 7
    assert "file" in done.err
