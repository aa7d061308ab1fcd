"""The GGUF file as a whole: its head, its metadata, and the real model there and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import edgellm
from edgellm.architectures.gguf_rows import pairs_order
from edgellm.demo_model import INSTALL, find_demo_model
from edgellm.errors import UnknownGrid, UnsupportedTarget
from edgellm.export.gguf_head import ALIGNMENT, StoredTensor, gguf_head
from edgellm.export.to_gguf import CONTAINER, general_keys, lay_out
from edgellm.recipe import Recipe
from edgellm.source import ModelSource, open_source

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

import llamacpp_logits
from gguf_files import write_gguf
from llamacpp_quantizer import quantize_with_llamacpp

TinyModel = Callable[[str], Path]

TEXT = (
    "The capital of France is Paris, and the capital of Italy is Rome. Water boils at 100 degrees "
    "Celsius. Once upon a time there was a little girl who lived in a village near the forest."
)

METADATA = {
    "general.architecture": "llama",
    "a.flag": True,
    "a.number": 7,
    "a.fraction": 0.1,
    "a.text": "ß",
    "a.texts": ["x", "日本"],
    "a.numbers": [1, 2],
    "a.fractions": [0.5, -1.5],
    "a.flags": [True, False],
    "left out": "",
    "left out too": [],
}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = find_demo_model()
    if path is None:
        pytest.skip(f"the demo model is not installed: {INSTALL}")
    return path


def contents(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, bytes]]]:
    """Metadata, and type and bytes of each tensor, by the gguf package's reader."""
    reader = gguf.GGUFReader(path)
    metadata = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    return metadata, {t.name: (int(t.tensor_type), t.data.tobytes()) for t in reader.tensors}


def test_the_head_is_what_the_gguf_package_writes_to_a_file(tmp_path: Path) -> None:
    values = {"b.weight": np.ones((3, 5), np.float32), "a.weight": np.arange(3, dtype=np.float32)}
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    writer.add_bool("a.flag", True)
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.fraction", 0.1)
    writer.add_string("a.text", "ß")
    writer.add_array("a.texts", ["x", "日本"])
    writer.add_array("a.numbers", [1, 2])
    writer.add_array("a.fractions", [0.5, -1.5])
    writer.add_array("a.flags", [True, False])
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    theirs = (tmp_path / "theirs.gguf").read_bytes()

    entries = [StoredTensor(name, v.shape, 0, v.nbytes) for name, v in values.items()]
    head = gguf_head(METADATA, entries)
    assert head.total_bytes == len(theirs)
    ours = bytearray(head.total_bytes)
    ours[: len(head.content)] = head.content
    for array, offset in zip(values.values(), head.offsets, strict=True):
        assert offset % ALIGNMENT == 0
        ours[offset : offset + array.nbytes] = array.tobytes()
    assert bytes(ours) == theirs


def test_a_value_that_gguf_has_no_type_for_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match=r"a\.key"):
        gguf_head({"general.architecture": "llama", "a.key": {}}, [])
    with pytest.raises(UnsupportedTarget, match=r"a\.key is 1e\+39, beyond the float32"):
        gguf_head({"general.architecture": "llama", "a.key": 1e39}, [])


def test_rows_of_a_head_are_paired() -> None:
    assert pairs_order(2, 4).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize("name", ["llama", "llama-biased", "gemma3", "gpt2", "qwen3"])
def test_read_back_every_tensor_is_the_sources(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model(name), path)
    before, after = open_source(str(tiny_model(name))), open_source(str(path))
    assert before.tensors.keys() == after.tensors.keys()
    for role, ref in before.tensors.items():
        # Gemma's norms lose a bit where one is added and taken away again.
        close = 1e-6 if name == "gemma3" and "norm" in role else 0
        np.testing.assert_allclose(after.tensors[role].load(), ref.load(), rtol=0, atol=close)


def test_every_mixture_is_laid_out_alike_twice(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("llama")))
    assert CONTAINER.default_grid in CONTAINER.grids
    for quant in CONTAINER.grids:
        first = lay_out(source, Recipe(source="", quant=quant))
        second = lay_out(open_source(str(source.path)), Recipe(source="", quant=quant))
        assert first.files == second.files
        places = [(t.name, t.arrays, t.grid, t.note) for t in first.tensors]
        assert places == [(t.name, t.arrays, t.grid, t.note) for t in second.tensors]


def test_arrays_fill_the_file_without_overlap(tiny_model: TinyModel) -> None:
    layout = lay_out(
        open_source(str(tiny_model("llama"))), Recipe(source="", quant="q5_1", embed="q8_0")
    )
    end = len(layout.files["model.gguf"])
    for tensor in layout.tensors:
        (array,) = tensor.arrays
        assert array.offset == -(-end // ALIGNMENT) * ALIGNMENT
        assert array.rows == tensor.rows
        end = array.offset + array.nbytes
    assert layout.data_files["model.gguf"] == -(-end // ALIGNMENT) * ALIGNMENT


def test_fallbacks_are_noted(tiny_model: TinyModel) -> None:
    layout = lay_out(open_source(str(tiny_model("llama"))), Recipe(source="", quant="q4_k_m"))
    notes = {t.name: (t.grid.name, t.note) for t in layout.tensors}
    assert notes["blk.0.attn_q.weight"] == ("q5_0", "q4_k's blocks of 256 do not divide 96")
    assert notes["blk.0.attn_norm.weight"] == ("f32", "")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"quant": "nf4"}, UnsupportedTarget, "iq4_nl"),
        ({"quant": "q4_k_x"}, UnknownGrid, "q4_k_m"),
        ({"quant": "q4_0", "head": "q6_k"}, UnsupportedTarget, "rows of 96 of output.weight"),
        ({"quant": "q4_0", "embed": "int4-g32"}, UnsupportedTarget, "--embed int4-g32"),
    ],
)
def test_what_gguf_cannot_hold_is_refused_before_work(
    fields: dict[str, str], error: type[Exception], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(error, match=message):
        lay_out(open_source(str(tiny_model("llama"))), Recipe(source="", **fields))


def general(source: ModelSource) -> dict[str, object]:
    return {key: value for key, value in general_keys(source).items() if value != ""}


def test_a_checkpoint_is_named_as_the_base(tiny_model: TinyModel) -> None:
    source = replace(
        open_source(str(tiny_model("llama"))),
        name="org/model",
        licence="mit",
        revision="abc",
        url="https://example.org/org/model",
    )
    assert general(source) == {
        "general.type": "model",
        "general.name": "org/model",
        "general.organization": "org",
        "general.size_label": general(source)["general.size_label"],
        "general.license": "mit",
        "general.base_model.count": 1,
        "general.base_model.0.name": "org/model",
        "general.base_model.0.organization": "org",
        "general.base_model.0.version": "abc",
        "general.base_model.0.repo_url": "https://example.org/org/model",
        "general.quantized_by": f"edgellm {edgellm.__version__}",
    }


def test_a_gguf_keeps_what_it_says_of_itself(tiny_model: TinyModel) -> None:
    source = replace(
        open_source(str(tiny_model("llama"))),
        provenance={
            "general.organization": "org",
            "general.languages": ["en"],
            "general.file_type": 7,
            "general.base_model.count": 1,
            "general.base_model.0.name": "parent",
        },
    )
    kept = general(source)
    assert kept["general.organization"] == "org"
    assert kept["general.languages"] == ["en"]
    assert "general.file_type" not in kept
    assert kept["general.base_model.0.name"] == "parent"


def test_smollm2_there_and_back_is_the_same(smollm2: Path, tmp_path: Path) -> None:
    """Its weights lie on a Q4_1 grid: rows unpaired, paired again and rounded again come out equal,
    and its metadata is only added to."""
    write_gguf(smollm2, tmp_path / "again.gguf", "q4_1")
    before, tensors = contents(smollm2)
    after, tensors_again = contents(tmp_path / "again.gguf")
    assert tensors_again == tensors
    added = {key for key in after.keys() - before.keys() if not key.startswith("general.base_")}
    assert added == {
        "general.quantized_by",
        "llama.attention.key_length",
        "llama.attention.value_length",
    }
    assert before.keys() <= after.keys()
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_smollm2_equals_what_llamacpps_quantizer_makes_of_our_floats(
    smollm2: Path, tmp_path: Path
) -> None:
    write_gguf(smollm2, tmp_path / "f32.gguf", "f32")
    write_gguf(smollm2, tmp_path / "ours.gguf", "q4_k_m")
    assert quantize_with_llamacpp(tmp_path / "f32.gguf", tmp_path / "theirs.gguf", "q4_k_m")
    ours, theirs = contents(tmp_path / "ours.gguf"), contents(tmp_path / "theirs.gguf")
    assert ours[0] == theirs[0]
    assert ours[1] == theirs[1]


def test_smollm2_answers_alike_from_floats(smollm2: Path, tmp_path: Path) -> None:
    """The same weights as Q4_1, F32 and F16. What is left is how llama.cpp multiplies: it rounds
    activations to 8 bits beside Q4_1 (measured KL 0.003) and to halves beside F16 (3e-6)."""
    ids = open_source(str(smollm2)).tokenizer.encode(TEXT)
    found = {"q4_1": log_softmax(llamacpp_logits.logits(smollm2, ids))}
    for quant in ("f32", "f16"):
        write_gguf(smollm2, tmp_path / "floats.gguf", quant)
        found[quant] = log_softmax(llamacpp_logits.logits(tmp_path / "floats.gguf", ids))
    assert divergence(found["f32"], found["q4_1"]) < 0.02
    assert divergence(found["f32"], found["f16"]) < 1e-4
    assert (found["f32"].argmax(1) == found["f16"].argmax(1)).all()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def divergence(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence from ``reference``, in nats a token."""
    return float((np.exp(reference) * (reference - other)).sum(axis=1).mean())
