"""``edgellm inspect`` on everything that it reads."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file

from edgellm.errors import SourceError
from edgellm.inspection import inspect, shortened
from edgellm.manifest import Manifest, Parity, read_manifest

from .conftest import Command


def test_artifact_shows_metadata_tensors_and_lineage(command: Command, gguf_artifact: Path) -> None:
    made = read_manifest(gguf_artifact).artifact
    done = command("inspect", gguf_artifact)
    assert done.code == 0
    assert done.err == ""
    for tensor in made.tensors:
        assert f"\n{tensor.name} " in done.out
    for fact in (made.base.sha256, "bits per weight", "quant=q8_0", "awkward cases"):
        assert fact in done.out


def test_known_differences_of_the_tokenizer_are_shown(
    gguf_artifact: Path, tmp_path: Path, command: Command
) -> None:
    folder = tmp_path / "artifact"
    shutil.copytree(gguf_artifact, folder)
    manifest = read_manifest(folder)
    parity = Parity(equal=False, cases=50, known=("'e\u0301': from token 0: [1] and [2]",))
    changed = msgspec.structs.replace(manifest.artifact, tokenizer_parity=parity)
    (folder / "manifest.json").write_bytes(Manifest.of(changed, {}).to_json())
    shown = command("inspect", folder).out
    assert "other ids than the source's ('e\u0301': from token 0: [1] and [2]) in 50" in shown


def test_bits_per_weight_count_every_weight_once(gguf_artifact: Path) -> None:
    found = inspect(gguf_artifact)
    weights = sum(math.prod(tensor.shape) for tensor in found.tensors)
    stored = sum(tensor.nbytes for tensor in found.tensors)
    assert found.bits_per_weight == pytest.approx(8 * stored / weights)
    assert 8.5 <= found.bits_per_weight < 10  # q8_0 is 8.5, norms are f32


def test_gguf_file_agrees_with_its_artifact(command: Command, gguf_artifact: Path) -> None:
    made = read_manifest(gguf_artifact).artifact
    found = command("inspect", gguf_artifact / made.main_file, "--json").json()
    assert found["kind"] == "gguf"
    assert found["metadata"]["general.architecture"] == "llama"
    stored = {tensor["name"]: (tensor["grid"], tensor["nbytes"]) for tensor in found["tensors"]}
    assert stored == {tensor.name: (tensor.grid, tensor.nbytes) for tensor in made.tensors}


def test_onnx_file_agrees_with_its_artifact(command: Command, onnx_artifact: Path) -> None:
    made = read_manifest(onnx_artifact).artifact
    found = command("inspect", onnx_artifact / made.main_file, "--json").json()
    assert found["kind"] == "onnx"
    assert found["metadata"]["operators"]["MatMulNBits"] > 0
    assert found["bits_per_weight"] is None
    weights = sum(tensor.nbytes for tensor in made.tensors)
    assert sum(found["grid_bytes"].values()) == pytest.approx(weights, rel=0.05)


def test_onnx_without_its_data_file(onnx_artifact: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.onnx"
    copy.write_bytes((onnx_artifact / "model.onnx").read_bytes())
    assert any("missing" in note for note in inspect(copy).notes)


def test_onnx_whose_data_lies_nowhere(onnx_artifact: Path, tmp_path: Path) -> None:
    model = onnx.load(onnx_artifact / "model.onnx", load_external_data=False)
    stored = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    path = tmp_path / "model.onnx"
    stored.external_data[0].value = "/no/such/file"
    onnx.save(model, path)
    assert "its data file /no/such/file is missing" in inspect(path).notes
    del stored.external_data[0]
    path.write_bytes(model.SerializeToString())
    with pytest.raises(SourceError, match=f"the place of tensor {stored.name} is"):
        inspect(str(path))


def test_model_folder(command: Command, model: Path) -> None:
    found = command("inspect", model, "--json").json()
    assert found["kind"] == "safetensors"
    assert found["metadata"]["model_type"] == "llama"
    assert found["bits_per_weight"] == 32
    assert found["output_bytes"] == sum(file.stat().st_size for file in model.glob("*.safetensors"))


def test_the_folder_of_an_adapter(command: Command, tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True, "eva_config": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    factor = np.ones((4, 8), np.float32)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: factor}, tmp_path / "adapter_model.safetensors")
    done = command("inspect", tmp_path)
    assert done.code == 0
    for fact in ("peft_type +LORA", "lora_alpha +8", "use_rslora +True", f"{name} +4 x 8 +f32"):
        assert re.search(f"^{fact}", done.out, re.MULTILINE), done.out
    assert "eva_config" not in done.out
    for line in (("run", tmp_path, "hi"), ("verify", tmp_path)):
        done = command(*line)
        assert done.code == 3
        assert f"{tmp_path} is an adapter, not a model" in done.err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.pt", b"PK\x03\x04", "pickle"),
        ("model.onnx", b"\xff\xff\xff not protobuf", "ONNX"),
        ("model.gguf", b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60), "model.gguf"),
        ("model.gguf", b"GGUF\x03", "model.gguf"),
        ("model.safetensors", struct.pack("<Q", 2**62), "model.safetensors"),
        ("notes.txt", b"hello", "notes.txt"),
    ],
)
def test_what_cannot_be_shown(
    name: str, content: bytes, says: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    done = command("inspect", tmp_path / name)
    assert done.code == 3
    assert says in done.err
    assert done.out == ""


def test_empty_folder(command: Command, tmp_path: Path) -> None:
    done = command("inspect", tmp_path)
    assert done.code == 3
    assert "manifest.json" in done.err


def test_long_metadata_is_shortened() -> None:
    assert shortened(list(range(100))) == "[0, 1, 2, ...] (100 values)"
    assert shortened("x" * 500) == "x" * 200 + "... (500 characters)"
    assert shortened(np.arange(3)) == [0, 1, 2]
