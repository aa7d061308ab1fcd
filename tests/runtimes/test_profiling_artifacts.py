"""What a token reads of an artifact, against the formats' own libraries."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgellm.artifact import Artifact, open_artifact
from edgellm.conversion import convert
from edgellm.manifest import MANIFEST, Manifest
from edgellm.profiling.artifacts import artifact_facts
from edgellm.profiling.document import ArtifactFacts
from edgellm.recipe import Recipe

MODELS = ("llama", "qwen2", "gemma3", "gpt2")
"""A head of its own, a tied one, windows, and learned positions with Conv1D."""

QUANTS = {
    "gguf": ("f32", "rtn:q4_0"),
    "onnx": ("f32", "rtn:int4-g32"),
    "hf": ("f32", "rtn:int4-g32"),
    "mlx": ("f32", "rtn:int4-g32-min"),
}
CELLS = [
    (model, container, quant)
    for model in MODELS
    for container, quants in QUANTS.items()
    for quant in quants
    # transformers' layouts of int4 are for Linear layers.
    if (model, container, quant) != ("gpt2", "hf", "rtn:int4-g32")
]


@pytest.fixture(scope="module")
def made(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], Artifact]:
    done: dict[tuple[str, str, str], Artifact] = {}

    def make(model: str, container: str, quant: str) -> Artifact:
        if (model, container, quant) not in done:
            recipe = Recipe(source=str(tiny_model(model)), format=container, quant=quant)
            out = tmp_path_factory.mktemp("facts") / f"{model}-{container}"
            done[model, container, quant] = convert(recipe, out, check=False)
        return done[model, container, quant]

    return make


def of_gguf(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    import gguf

    (file,) = folder.glob("*.gguf")
    return {
        tensor.name: (tuple(int(side) for side in reversed(tensor.shape)), int(tensor.n_bytes))
        for tensor in gguf.GGUFReader(file).tensors
    }


def of_onnx(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Codes, scales and zeros of one matrix together, bytes that two share once."""
    import onnx

    (file,) = folder.glob("*.onnx")
    graph = onnx.load(file).graph
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            numbers = {attribute.name: attribute.i for attribute in node.attribute}
            name = node.input[1].removesuffix(".blocks")
            nbytes = sum(arrays.pop(part).nbytes for part in node.input[1:4] if part)
            found[name] = ((numbers["N"], numbers["K"]), nbytes)
            arrays.pop(name, None)  # the same bytes, to be gathered from
    for name, array in arrays.items():
        scales = arrays.get(f"{name}.scales")
        if array.ndim > 1 and not name.startswith("rope.") and not name.endswith(".scales"):
            found[name] = (array.shape, array.nbytes + (0 if scales is None else scales.nbytes))
    return found


def of_safetensors(folder: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Parts of one module together; of packed ones the shape is that of the floats."""
    from safetensors.numpy import load_file

    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in folder.glob("*.safetensors"):
        for name, array in load_file(file).items():
            module, _, part = name.rpartition(".")
            if part != "bias":
                shape, nbytes = found.get(module, ((), 0))
                found[module] = (array.shape if array.ndim > len(shape) else shape,
                                 nbytes + array.nbytes)  # fmt: skip
    return found


INDEPENDENT = {"gguf": of_gguf, "onnx": of_onnx, "hf": of_safetensors, "mlx": of_safetensors}

EMBEDDINGS = ("token_embd", "embed_tokens", "wte")
POSITIONS = ("position_embd", "wpe")
HEADS = ("output", "lm_head")


def named(name: str, names: tuple[str, ...]) -> bool:
    return name.removesuffix(".weight").rpartition(".")[2] in names and "blk" not in name


@pytest.mark.parametrize(("model", "container", "quant"), CELLS)
def test_bytes_are_those_that_the_library_of_the_format_sees(
    model: str, container: str, quant: str, made: Callable[..., Artifact]
) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    artifact = made(model, container, quant)
    facts = artifact_facts(artifact)
    stored = {
        name: (shape, nbytes)
        for name, (shape, nbytes) in INDEPENDENT[container](artifact.path).items()
        if len(shape) > 1 and min(shape) > 1
    }
    tied = not any(named(name, HEADS) for name in stored)
    assert tied == (model != "llama")
    read = 0.0
    for name, (shape, nbytes) in stored.items():
        a_row = named(name, POSITIONS) or (named(name, EMBEDDINGS) and not tied)
        read += nbytes / shape[0] if a_row else nbytes
    assert facts.weight_bytes == sum(nbytes for _, nbytes in stored.values())
    assert facts.bytes_per_token == round(read)
    assert facts.size_bytes == sum(
        file.stat().st_size
        for file in artifact.path.iterdir()
        if file.name not in (MANIFEST, "README.md")
    )
    assert facts.quant == quant
    assert facts.sha256 == artifact.manifest.sha256  # type: ignore[union-attr]


@pytest.mark.parametrize(("model", "container", "quant"), CELLS)
def test_weights_are_those_of_the_source(
    model: str,
    container: str,
    quant: str,
    made: Callable[..., Artifact],
    tiny_model: Callable[[str], Path],
) -> None:
    import transformers

    source = transformers.AutoModelForCausalLM.from_pretrained(tiny_model(model))
    names = {name: value for name, value in source.named_parameters() if value.ndim > 1}
    facts = artifact_facts(made(model, container, quant))
    assert facts.weights == sum(value.numel() for value in names.values())
    embeddings = ("embed_tokens", "lm_head", "wte", "wpe")
    assert facts.prompt_weights == sum(
        value.numel() for name, value in names.items() if name.split(".")[-2] not in embeddings
    )
    config = source.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert facts.kv_values == 2 * config.num_hidden_layers * heads * width
    assert (facts.kv_windows != ()) == (model == "gemma3")
    plain = artifact_facts(open_artifact(tiny_model(model)))
    assert facts.model_sha256 == plain.sha256
    assert plain.container == "hf"
    assert plain.quant == "f32"
    assert (plain.weights, plain.prompt_weights) == (facts.weights, facts.prompt_weights)
    assert plain.kv_values == facts.kv_values


PLAIN = {"gguf": "gguf", "onnx": "genai", "hf": "hf", "mlx": "hf"}


def without_manifest(artifact: Artifact, folder: Path) -> Artifact:
    """The same files as somebody else would have them."""
    shutil.copytree(artifact.path, folder)
    (folder / MANIFEST).unlink()
    return open_artifact(folder / artifact.main.name if artifact.container == "gguf" else folder)


@pytest.mark.parametrize(("model", "container", "quant"), CELLS)
def test_files_without_a_manifest_say_the_same(
    model: str, container: str, quant: str, made: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = made(model, container, quant)
    facts = artifact_facts(artifact)
    plain = without_manifest(artifact, tmp_path / "copy")
    found = artifact_facts(plain)
    assert found.container == PLAIN[container]
    same = ("weights", "weight_bytes", "bytes_per_token", "prompt_weights", "kv_values")
    assert {name: getattr(found, name) for name in same} == {
        name: getattr(facts, name) for name in same
    }
    assert found.model_sha256 == ""
    assert found.kld_mean is None
    wanted = quant.rpartition(":")[2]
    if container in ("gguf", "onnx") or quant == "f32":
        wanted = {"f32": "float"}.get(wanted, wanted) if container == "onnx" else wanted
        assert found.quant == wanted
    else:
        assert found.quant  # as the reader of quantized checkpoints names it
    if container == "gguf":
        assert found.size_bytes == plain.main.stat().st_size
    else:
        files = (file for file in plain.path.iterdir() if file.name != "README.md")
        assert found.size_bytes == sum(file.stat().st_size for file in files)


def test_what_was_measured_of_the_answers(made: Callable[..., Artifact]) -> None:
    artifact = made("llama", "gguf", "f32")
    assert artifact.manifest is not None
    measured = Manifest.of(artifact.manifest.artifact, {"quality": {"kld_mean": 0.25}})
    skipped = Manifest.of(artifact.manifest.artifact, {"quality": {"skipped": "too large"}})

    def found(manifest: Manifest) -> ArtifactFacts:
        return artifact_facts(
            Artifact(path=artifact.path, main=artifact.main, container="gguf", manifest=manifest)
        )

    assert found(measured).kld_mean == 0.25
    assert found(skipped).kld_mean is None
    assert artifact_facts(artifact).kld_mean is None


def test_a_head_that_is_tied_and_stored_counts_once(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    shutil.copytree(tiny_model("qwen2"), tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("*.safetensors")
    tensors: dict[str, Any] = load_file(file)
    before = artifact_facts(open_artifact(tmp_path / "copy"))
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, file)
    after = artifact_facts(open_artifact(tmp_path / "copy"))
    assert after.weights == before.weights
    assert after.bytes_per_token == before.bytes_per_token
    assert after.sha256 != before.sha256
    assert math.isclose(after.size_bytes - before.size_bytes, 517 * 192 * 4, abs_tol=200)
