"""The safetensors reader: slabs equal the stored values, and damage is told apart and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from edgellm.errors import SourceError, TensorError
from edgellm.source.safetensors_file import read_safetensors

VALUES = np.linspace(-3, 3, 24, dtype=np.float32).reshape(4, 6)


def damaged(path: Path, header: Any, data: bytes = b"\0" * 16) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(begin: Any, end: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "uint16"])
def test_rows_and_columns_equal_what_was_stored(
    dtype: str, tmp_path: Path, to_safetensors: Callable[..., bytes]
) -> None:
    expected = VALUES
    stored: Any = VALUES.astype(dtype) if dtype != "uint16" else None
    if stored is None:
        stored = (VALUES.view(np.uint32) >> 16).astype(np.uint16)
        expected = (stored.astype(np.uint32) << 16).view(np.float32)
    elif dtype == "float16":
        expected = stored.astype(np.float32)
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors({"first": np.zeros(3, np.float32), "x": stored}))
    ref = read_safetensors(path).ref("x")
    assert ref.shape == (4, 6)
    assert (
        ref.dtype == {"float32": "f32", "float16": "f16", "float64": "f64", "uint16": "bf16"}[dtype]
    )
    np.testing.assert_array_equal(ref.load(), expected)
    np.testing.assert_array_equal(ref.load(1, 3), expected[1:3])
    for left, right in ((2, 5), (0, 6), (1, 2), (5, 6), (3, 3)):  # few are read row by row
        np.testing.assert_array_equal(ref.load_columns(left, right), expected[:, left:right])
    rows = ref.load(2, 4)
    assert rows.dtype == np.float32
    assert rows.flags.c_contiguous
    assert rows.flags.writeable


def test_a_vector_is_one_row(tmp_path: Path, to_safetensors: Callable[..., bytes]) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors({"norm": VALUES[0]}))
    ref = read_safetensors(path).ref("norm")
    assert (ref.rows, ref.columns) == (1, 6)
    np.testing.assert_array_equal(ref.load(), VALUES[:1])


def test_a_double_beyond_float32_becomes_inf_to_be_found_later(
    tmp_path: Path, to_safetensors: Callable[..., bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors({"x": np.array([[1e300, 1.0]])}))
    assert np.isinf(read_safetensors(path).ref("x").load()[0, 0])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, "a and b overlap"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "overlap"),
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, "4 bytes between a and b belong to no"),
        ({"a": entry(4, 16, [3])}, "4 bytes between the header and a"),
        ({"a": entry(0, 8, [2])}, "8 bytes after the last tensor"),
        ({"a": entry(-8, 8)}, "impossible offsets"),
        ({"a": entry(16, 0)}, "impossible offsets"),
        ({"a": entry(0, 1 << 70, [1 << 68])}, "cut short"),
        ({"a": entry(0, 32, [8])}, "cut short"),
        ({"a": entry(0, 16, [5])}, "takes 20 bytes"),
        ({"a": entry(0, 16, [-4])}, "impossible shape"),
        ({"a": entry(0, 16, [True, 4])}, "impossible shape"),
        ({"a": entry(0, 16, [4.0])}, "impossible shape"),
        ({"a": entry(0, 16, 4)}, "impossible shape"),
        ({"a": entry(0.0, 16)}, "impossible offsets"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "impossible offsets"),
        ({"a": entry(0, 16, dtype="F13")}, "unknown dtype 'F13'"),
        ({"a": entry(0, 16, dtype=["F32"])}, "unknown dtype"),
        ({"a": 3}, "described by a int"),
        ({"__metadata__": 3}, "__metadata__"),
        ([], "not an object"),
        (b"{" + b'"a": ' + b"[" * 100_000, "unreadable"),
        (b'{"a": 1, "a": 2}', "twice"),
        (b"\xff\xfe\x00", "unreadable"),
        (b"not json", "unreadable"),
    ],
)
def test_a_damaged_header_is_named(header: Any, message: str, tmp_path: Path) -> None:
    path = damaged(tmp_path / "bad.safetensors", header)
    with pytest.raises(SourceError, match=message) as caught:
        read_safetensors(path)
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (b"\0" * 7, "7 bytes"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "at most 100000000"),
        ((5000).to_bytes(8, "little") + b"{}", "cut short"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=message):
        read_safetensors(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot open"):
        read_safetensors(tmp_path / "none.safetensors")


def test_a_file_cut_after_its_header_was_read(
    tmp_path: Path, to_safetensors: Callable[..., bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors({"x": VALUES}))
    ref = read_safetensors(path).ref("x")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 8)
    np.testing.assert_array_equal(ref.load(0, 2), VALUES[:2])
    with pytest.raises(SourceError, match="cut short or changed"):
        ref.load(2, 4)


def test_whole_numbers_are_listed_but_not_loaded(
    tmp_path: Path, to_safetensors: Callable[..., bytes]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_safetensors({"x": np.zeros((2, 2), np.int32)}))
    ref = read_safetensors(path).ref("x")
    assert ref.dtype == "i32"
    with pytest.raises(TensorError, match="I32"):
        ref.load()


def test_reading_a_large_file_leaves_memory_as_it_was(tmp_path: Path) -> None:
    """Mapped pages would count; the file is read by positions instead."""
    rows, columns = 2048, 32768  # 128 MB as bf16, of holes that take no disk
    nbytes = 2 * rows * columns
    path = damaged(tmp_path / "x.safetensors", {"x": entry(0, nbytes, [rows, columns], "BF16")})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 16 + nbytes)
    ref = read_safetensors(path).ref("x")
    process = psutil.Process()
    ref.load(0, 16)
    before = most = process.memory_info().rss
    for start in range(0, rows, 16):
        slab = ref.load(start, start + 16)
        most = max(most, process.memory_info().rss)
    assert not slab.any()
    assert most - before < 24 << 20
