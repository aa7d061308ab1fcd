"""Checkpoints read by edgellm against safetensors and transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgellm.conversion import convert
from edgellm.recipe import Recipe
from edgellm.source import open_source
from edgellm.source.gguf_file import read_gguf
from edgellm.source.gguf_model import references
from edgellm.source.safetensors_file import read_safetensors
from edgellm.tensors import transposed

safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")

arrays = hnp.arrays(
    st.sampled_from([np.float32, np.float16, np.float64]),
    hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=9),
    elements={"allow_nan": True},
)


@settings(max_examples=100, deadline=None)
@given(
    tensors=st.dictionaries(st.text(min_size=1, max_size=12), arrays, min_size=1, max_size=5),
    data=st.data(),
)
def test_any_file_is_read_as_by_safetensors(
    tensors: dict[str, Any], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    safetensors.save_file(tensors, path, metadata={"made": "here"})
    expected = safetensors.load_file(path)
    found = read_safetensors(path)
    assert found.metadata == {"made": "here"}
    assert set(found.tensors) == set(expected)
    for name, array in sorted(expected.items()):  # its order changes from run to run
        ref = found.ref(name)
        assert ref.shape == array.shape
        with np.errstate(over="ignore"):
            matrix = array.astype(np.float32).reshape(ref.rows, ref.columns)
        start = data.draw(st.integers(0, ref.rows))
        stop = data.draw(st.integers(start, ref.rows))
        np.testing.assert_array_equal(ref.load(start, stop), matrix[start:stop])
        if array.ndim == 2 and array.size:
            left = data.draw(st.integers(0, ref.columns))
            right = data.draw(st.integers(left, ref.columns))
            np.testing.assert_array_equal(ref.load_columns(left, right), matrix[:, left:right])
            np.testing.assert_array_equal(transposed(ref).load(left, right), matrix.T[left:right])


def test_bfloat16_equals_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    save_file = pytest.importorskip("safetensors.torch").save_file
    # Every bfloat16 there is: zeros, subnormals, infinities and NaN with all their payloads.
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(256, 256)
    stored = bits.view(torch.bfloat16)
    save_file({"x": stored}, tmp_path / "x.safetensors")
    ours = read_safetensors(tmp_path / "x.safetensors").ref("x").load()
    np.testing.assert_array_equal(ours.view(np.uint32), stored.float().numpy().view(np.uint32))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_folder_from_transformers(name: str, tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model(name)
    source = open_source(str(folder))
    stored = safetensors.load_file(folder / "model.safetensors")
    assert (
        source.config["model_type"]
        == json.loads((folder / "config.json").read_text())["model_type"]
    )
    checked = 0
    for row in source.family.tensors(source.decoder):
        ref = source.tensors[row.role]
        expected = stored[row.source].astype(np.float32)
        expected = expected.T if row.transposed else expected
        np.testing.assert_array_equal(ref.load().reshape(ref.shape), expected)
        if row.transposed:
            np.testing.assert_array_equal(ref.load(3, 9), expected[3:9])
        checked += 1
    assert checked == len(source.tensors)


def test_masks_of_old_gpt2_checkpoints_are_ignored(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """As in the first published ones: no prefix on the names, and masks in every layer."""
    folder = tiny_model("gpt2")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = safetensors.load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): array for name, array in stored.items()}
    old["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.float32))
    old["h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    old["h.1.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
    safetensors.save_file(old, tmp_path / "model.safetensors")
    ours, theirs = open_source(str(tmp_path)), open_source(str(folder))
    assert list(ours.tensors) == list(theirs.tensors)
    role = "blk.0.attn_qkv.weight"
    np.testing.assert_array_equal(ours.tensors[role].load(), theirs.tensors[role].load())


@pytest.mark.parametrize("name", ["llama-biased", "gemma3", "gpt2"])
def test_a_model_comes_back_from_gguf_as_it_went_in(
    name: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rows of q and k paired and back (biases too), norms with their offset and without."""
    folder = tiny_model(name)
    artifact = convert(
        Recipe(source=str(folder), format="gguf", quant="f32"), tmp_path / "out", check=False
    )
    before, after = open_source(str(folder)), open_source(str(artifact.main))
    assert after.decoder == before.decoder
    assert set(after.tensors) == set(before.tensors)
    stored = references(read_gguf(artifact.main))
    moved = 0
    for role, ref in before.tensors.items():
        # Adding one to a norm and taking it off again rounds twice.
        np.testing.assert_allclose(after.tensors[role].load(), ref.load(), rtol=0, atol=2.4e-7)
        moved += not np.array_equal(stored[role].load(), ref.load())
    layers = len(before.decoder.layers)
    assert moved == {"llama-biased": 4 * layers, "gemma3": 6 * layers + 1, "gpt2": 0}[name]
