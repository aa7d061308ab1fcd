"""Conversion, whole: same bytes whatever the threads, bounded memory, nothing half-done."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from edgellm import slabs
from edgellm.artifact import Artifact, open_artifact, verify
from edgellm.conversion import carry_out, convert
from edgellm.errors import (
    OutputError,
    RuntimeMissing,
    TensorError,
    UnknownGrid,
    UsageError,
    VerificationError,
)
from edgellm.manifest import Parity
from edgellm.plan import make_plan
from edgellm.recipe import Recipe
from edgellm.tokenization import Tokenizer

TinyModel = Callable[[str], Path]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of an artifact but its manifest, which also holds the time."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def converted(source: Path, out: Path, **choices: str) -> Artifact:
    return convert(Recipe(source=str(source), **choices), out, check=False)


@pytest.mark.parametrize(
    ("container", "quant"),
    [("gguf", "rtn:q4_k_m"), ("gguf", "f16"), ("onnx", "rtn:int4-g32"), ("onnx", "f32")],
)
def test_the_same_bytes_whatever_the_threads_and_slabs(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    container: str,
    quant: str,
) -> None:
    recipe = Recipe(source=str(tiny_model("llama-256")), format=container, quant=quant)
    one = convert(recipe, tmp_path / "one", threads=1, check=False)
    monkeypatch.setattr(slabs, "SLAB_BYTES", 20_000)
    three = convert(recipe, tmp_path / "three", threads=3, check=False)
    assert contents(one.path) == contents(three.path)
    assert one.manifest is not None
    assert three.manifest is not None
    assert one.manifest.sha256 == three.manifest.sha256
    verify(three)


def test_the_plan_says_every_byte_that_is_written(tiny_model: TinyModel, tmp_path: Path) -> None:
    plan = make_plan(Recipe(source=str(tiny_model("llama")), format="gguf", quant="rtn:q4_0"))
    artifact = carry_out(plan, tmp_path / "out", check=False)
    assert sum(map(len, contents(artifact.path).values())) == plan.output_bytes
    tensors = sum(tensor.nbytes for tensor in plan.layout.tensors)
    assert plan.bits_per_weight == pytest.approx(8 * tensors / plan.layout.weights)


def test_grids_that_are_searched_for_are_planned_with_more_time(tiny_model: TinyModel) -> None:
    def planned(quant: str) -> float:
        recipe = Recipe(source=str(tiny_model("llama-256")), format="gguf", quant=f"rtn:{quant}")
        return make_plan(recipe, threads=1).seconds

    start = 0.5
    assert planned("q4_k_m") - start > 3 * (planned("q4_0") - start)
    assert planned("iq4_nl") - start > 2 * (planned("q4_k_m") - start)


def test_a_weight_that_is_not_a_number_is_named_and_nothing_is_left(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = shutil.copytree(tiny_model("llama"), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].copy()
    weights[name][3, 5] = np.nan
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for container, quant in (("gguf", "rtn:q4_0"), ("onnx", "rtn:int4-g32")):
        with pytest.raises(TensorError, match=rf"{name} holds nan at row 3, column 5"):
            converted(source, tmp_path / "out", format=container, quant=quant)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("quant", ["f16", "rtn:q4_0", "rtn:q4_k_m"])
def test_a_weight_that_its_grid_cannot_reach_is_named_and_nothing_is_left(
    tiny_model: TinyModel, tmp_path: Path, quant: str
) -> None:
    source = shutil.copytree(tiny_model("llama-256"), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name] * np.float32(1e7)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TensorError, match=rf"tensor {name}: .*does not fit"):
        converted(source, tmp_path / "out", format="gguf", quant=quant)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_full_disk_is_known_before_any_work(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OutputError, match="free"):
        converted(tiny_model("llama"), tmp_path / "out", format="gguf", quant="rtn:q4_0")
    assert not list(tmp_path.iterdir())


def test_source_and_output_may_not_overlap(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model("llama"), tmp_path / "source")
    for out in (source / "inside", tmp_path):
        with pytest.raises((UsageError, OutputError)):
            convert(
                Recipe(source=str(source), format="gguf", quant="q8_0"),
                out,
                force=True,
                check=False,
            )
    assert sorted(path.name for path in source.iterdir()) == sorted(
        path.name for path in tiny_model("llama").iterdir()
    )


def test_an_artifact_whose_tokenizer_differs_is_not_kept(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def differing(source: Tokenizer, main_file: Path, container: str, limits: object) -> Parity:
        return Parity(equal=False, cases=2, mismatches=("'\\n1': [1] and [2]",))

    monkeypatch.setattr("edgellm.conversion_checks.artifact_parity", differing)
    with pytest.raises(VerificationError, match="splits text differently"):
        converted(tiny_model("llama"), tmp_path / "out", format="gguf", quant="rtn:q4_0")
    assert not list(tmp_path.iterdir())


def test_what_llamacpp_is_known_to_split_differently_is_recorded(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    artifact = converted(tiny_model("qwen2"), tmp_path / "out", format="gguf", quant="q8_0")
    assert artifact.manifest is not None
    parity = artifact.manifest.artifact.tokenizer_parity
    assert not parity.equal
    assert parity.known
    assert not parity.mismatches
    assert any("NFC" in note for note in artifact.manifest.artifact.notes)


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_an_artifact_that_gives_no_numbers_is_not_kept(
    tiny_model: TinyModel, tmp_path: Path, container: str
) -> None:
    pytest.importorskip({"gguf": "llama_cpp", "onnx": "onnxruntime"}[container])
    source = shutil.copytree(tiny_model("llama"), tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    for name in ("lm_head.weight", "model.norm.weight"):
        weights[name] = weights[name] * np.float32(1e30)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    recipe = Recipe(source=str(source), format=container, quant="f32")
    with pytest.raises(VerificationError, match="does not run, and is not kept"):
        convert(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_the_check_fits_into_a_short_context(
    tiny_model: TinyModel, tmp_path: Path, container: str
) -> None:
    pytest.importorskip({"gguf": "llama_cpp", "onnx": "onnxruntime"}[container])
    recipe = Recipe(source=str(tiny_model("mistral")), format=container, quant="f32", context=6)
    artifact = convert(recipe, tmp_path / "out")
    assert artifact.manifest is not None
    assert artifact.manifest.measured["check"]["token_ids"]


def test_a_check_without_a_runtime_is_skipped_and_says_so(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*given: object, **options: object) -> None:
        raise RuntimeMissing("no runtime here: pip install one")

    monkeypatch.setattr("edgellm.chat.open", missing)
    recipe = Recipe(source=str(tiny_model("llama")), format="gguf", quant="q8_0")
    artifact = convert(recipe, tmp_path / "out")
    assert artifact.manifest is not None
    assert artifact.manifest.measured["check"] == {"skipped": "no runtime here: pip install one"}


def test_an_artifact_replaces_its_elder_only_when_forced(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    elder = converted(tiny_model("llama"), tmp_path / "out", format="gguf", quant="rtn:q4_0")
    with pytest.raises(OutputError, match="--force"):
        converted(tiny_model("llama"), tmp_path / "out", format="gguf", quant="q8_0")
    recipe = Recipe(source=str(tiny_model("llama")), format="gguf", quant="q8_0")
    younger = convert(recipe, tmp_path / "out", force=True, check=False)
    assert younger.manifest != elder.manifest
    verify(open_artifact(tmp_path / "out"))


def test_the_container_follows_a_grid_that_only_it_has(tiny_model: TinyModel) -> None:
    assert (
        make_plan(Recipe(source=str(tiny_model("llama")), quant="rtn:q4_0")).recipe.format == "gguf"
    )
    plan = make_plan(Recipe(source=str(tiny_model("llama")), quant="rtn:int4-g32"))
    assert plan.recipe.format == "onnx"
    with pytest.raises(UnknownGrid, match="q4_k_m"):
        make_plan(Recipe(source=str(tiny_model("llama")), quant="q4_km"))


LARGE = """
import sys
from pathlib import Path
from edgellm.conversion import carry_out
from edgellm.hardware import peak_memory_bytes
from edgellm.plan import make_plan
from edgellm.recipe import Recipe
container, quant = sys.argv[3:]
plan = make_plan(Recipe(source=sys.argv[1], format=container, quant=quant), threads=2)
carry_out(plan, Path(sys.argv[2]), check=False)
print(plan.peak_memory_bytes, peak_memory_bytes())
"""


@pytest.fixture(scope="module")
def large_model(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 400 MB in f16, its layers alike, with the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(tiny_model("llama-256"), folder)
    config = json.loads((folder / "config.json").read_text())
    hidden, ffn, layers = 2048, 8192, 3
    config |= {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return random.standard_normal((rows, columns), np.float32).astype(np.float16)

    square, wide, tall = matrix(hidden, hidden), matrix(ffn, hidden), matrix(hidden, ffn)
    norm = np.ones(hidden, np.float16)
    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    weights["model.norm.weight"] = norm
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for part in "qkvo":
            weights[f"{prefix}.self_attn.{part}_proj.weight"] = square
        weights[f"{prefix}.mlp.gate_proj.weight"] = wide
        weights[f"{prefix}.mlp.up_proj.weight"] = wide
        weights[f"{prefix}.mlp.down_proj.weight"] = tall
        weights[f"{prefix}.input_layernorm.weight"] = norm
        weights[f"{prefix}.post_attention_layernorm.weight"] = norm
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("container", "quant"),
    [
        ("gguf", "q8_0"),
        ("gguf", "rtn:q4_0"),
        ("gguf", "f16"),
        ("onnx", "rtn:int4-g32"),
        ("onnx", "f32"),
    ],
)
def test_memory_stays_within_what_the_plan_says(
    large_model: Path, tmp_path: Path, container: str, quant: str
) -> None:
    command = [
        sys.executable,
        "-c",
        LARGE,
        str(large_model),
        str(tmp_path / "out"),
        container,
        quant,
    ]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    planned, measured = map(int, answer.stdout.split())
    assert measured <= planned
    assert planned <= 300e6  # the weights alone are 400 MB


def test_grids_that_want_importance_say_so(tiny_model: TinyModel) -> None:
    source = str(tiny_model("llama-256"))
    noted = make_plan(Recipe(source=source, format="gguf", quant="rtn:iq3_s")).layout.notes
    assert any("q3_k_m" in note for note in noted)
    assert not make_plan(Recipe(source=source, format="gguf", quant="rtn:q3_k_m")).layout.notes
