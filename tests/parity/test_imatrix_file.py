"""Importance matrices as llama.cpp's tools write and read them."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import gguf
import libgguf
import numpy as np
import pytest

from edgellm.errors import OutputError, SourceError, TensorError
from edgellm.quant.imatrix_file import Imatrix, read_imatrix, unmatched, write_imatrix
from edgellm.tensors import Array

TOKENS, CHUNK_TOKENS = 1000, 128
NAMES = ("blk.0.ffn_down.weight", "blk.0.attn_q.weight", "output.weight")


def some_importance() -> dict[str, Array]:
    random = np.random.default_rng(3)
    return {
        name: np.exp(3 * random.standard_normal(64 * (1 + place))).astype(np.float32)
        for place, name in enumerate(NAMES)
    }


def legacy(path: Path, entries: list[tuple[str, int, Array]], rest: bytes = b"") -> Path:
    """A ``.dat`` as ``save_imatrix_legacy`` writes it, byte by byte."""
    content = struct.pack("<i", len(entries))
    for name, chunks, sums in entries:
        content += struct.pack("<i", len(name)) + name.encode()
        content += struct.pack("<ii", chunks, len(sums)) + sums.astype("<f4").tobytes()
    path.write_bytes(content + rest)
    return path


def in_gguf(path: Path, tensors: dict[str, Array], *, kind: str = "imatrix") -> Path:
    """A GGUF as ``save_imatrix`` writes it, by gguf's own writer."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_string("general.type", kind)
    writer.add_array("imatrix.datasets", ["one.txt", "two.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in tensors.items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("suffix", ["gguf", "dat", "imatrix"])
def test_what_is_written_is_read_alike_by_llamacpps_readers(suffix: str, tmp_path: Path) -> None:
    path, given = tmp_path / f"some.{suffix}", some_importance()
    write_imatrix(
        path, given, tokens=TOKENS, chunk_tokens=CHUNK_TOKENS, datasets=["a.txt", "b.txt"]
    )
    ours, theirs = read_imatrix(path), libgguf.load_imatrix(path)
    assert sorted(theirs) == sorted(given) == list(ours.importance)
    for name, values in given.items():
        np.testing.assert_array_equal(ours.importance[name], theirs[name])
        np.testing.assert_allclose(theirs[name], values, rtol=2e-7)
    assert ours.chunks == 8
    old = suffix == "dat"
    assert ours.datasets == (("b.txt",) if old else ("a.txt", "b.txt"))
    assert ours.chunk_tokens == (0 if old else CHUNK_TOKENS)
    assert set(ours.tokens.values()) == {8 if old else TOKENS}


def test_ggml_itself_opens_what_is_written(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    path = tmp_path / "some.gguf"
    write_imatrix(path, some_importance(), tokens=TOKENS, chunk_tokens=CHUNK_TOKENS)

    class Params(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))

    folder = Path(llama_cpp.__file__).parent / "lib"
    ggml = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
    ggml.gguf_init_from_file.restype = ctypes.c_void_p
    ggml.gguf_init_from_file.argtypes = [ctypes.c_char_p, Params]
    opened = ggml.gguf_init_from_file(str(path).encode(), Params(True, None))
    assert opened
    context = ctypes.c_void_p(opened)
    ggml.gguf_get_tensor_name.restype = ctypes.c_char_p
    ggml.gguf_find_key.restype = ggml.gguf_get_n_tensors.restype = ctypes.c_int64
    count = ggml.gguf_get_n_tensors(context)
    names = [ggml.gguf_get_tensor_name(context, ctypes.c_int64(n)) for n in range(count)]
    assert names[:2] == [b"blk.0.attn_q.weight.in_sum2", b"blk.0.attn_q.weight.counts"]
    for key, value in ((b"imatrix.chunk_count", 8), (b"imatrix.chunk_size", CHUNK_TOKENS)):
        place = ctypes.c_int64(ggml.gguf_find_key(context, key))
        assert ggml.gguf_get_val_u32(context, place) == value
    ggml.gguf_free(context)


def test_a_file_of_llama_imatrix(tmp_path: Path) -> None:
    sums = np.arange(12, dtype=np.float32).reshape(3, 4)
    path = in_gguf(
        tmp_path / "some.gguf",
        {
            "blk.0.ffn_up_exps.weight.in_sum2": sums,
            "blk.0.ffn_up_exps.weight.counts": np.asarray([[2.0], [0.0], [4.0]]),
            "blk.0.attn_q.weight.in_sum2": sums[:1],
            "blk.0.attn_q.weight.in_sum": sums[:1],
            "blk.0.attn_q.weight.counts": np.full((1, 1), 3.0),
        },
    )
    found, theirs = read_imatrix(path), libgguf.load_imatrix(path)
    for name, values in theirs.items():
        np.testing.assert_array_equal(found.importance[name], values)
    assert found.importance["blk.0.ffn_up_exps.weight"].tolist()[4:8] == [1.0] * 4
    assert found.tokens == {"blk.0.ffn_up_exps.weight": 4, "blk.0.attn_q.weight": 3}
    assert (found.chunks, found.chunk_tokens, found.datasets) == (7, 512, ("one.txt", "two.txt"))


def test_older_files(tmp_path: Path) -> None:
    sums = np.asarray([2.0, 4.0, 6.0], np.float32)
    rest = struct.pack("<ii", 5, 5) + b"a.txt"
    path = legacy(tmp_path / "a.dat", [("blk.0.attn_q.weight", 2, sums), ("x", 0, sums)], rest)
    found, theirs = read_imatrix(path), libgguf.load_imatrix(path)
    assert found.importance["blk.0.attn_q.weight"].tolist() == [1.0, 2.0, 3.0]
    for name, values in theirs.items():
        np.testing.assert_array_equal(found.importance[name], values)
    assert (found.chunks, found.datasets) == (5, ("a.txt",))
    bare = read_imatrix(legacy(tmp_path / "b.dat", [("x", 1, sums)]))
    assert (bare.chunks, bare.datasets) == (0, ())


@pytest.mark.parametrize("cut", [0, 3, 6, 20, 31, 38, 45])
def test_older_files_that_are_cut_short(cut: int, tmp_path: Path) -> None:
    path = legacy(tmp_path / "a.dat", [("blk.0.attn_q.weight", 2, np.ones(3, np.float32))])
    path.write_bytes(path.read_bytes()[:cut] if cut != 45 else b"PK\x03\x04" * 12)
    with pytest.raises(SourceError, match=r"a.dat.*no importance matrix"):
        read_imatrix(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(np.nan, "got nan"), (np.inf, "got inf"), (-1.0, "got -1")],
)
def test_importance_that_cannot_be_is_refused_by_name(
    wrong: float, message: str, tmp_path: Path
) -> None:
    sums = np.asarray([1.0, wrong, 1.0], np.float32)
    tensors = {"blk.7.attn_q.weight.in_sum2": sums[None], "blk.7.attn_q.weight.counts": [[1.0]]}
    given = {name: np.asarray(values) for name, values in tensors.items()}
    for path in (
        in_gguf(tmp_path / "a.gguf", given),
        legacy(tmp_path / "a.dat", [("blk.7.attn_q.weight", 1, sums)]),
    ):
        with pytest.raises(TensorError, match=rf"blk.7.attn_q.weight must.*{message}"):
            read_imatrix(path)
    with pytest.raises(TensorError, match=message):
        write_imatrix(tmp_path / "b.gguf", {"x": sums}, tokens=1, chunk_tokens=1)
    assert not (tmp_path / "b.gguf").exists()


def test_files_that_hold_something_else(tmp_path: Path) -> None:
    one = np.ones((1, 4), np.float32)
    cases = {
        "without importance": {"blk.0.attn_q.weight": one},
        "counts is missing": {"a.in_sum2": one},
        "3 counts for 4 sums": {"a.in_sum2": one, "a.counts": np.ones((3, 1))},
        "no token reached a": {"a.in_sum2": one, "a.counts": np.zeros((1, 1))},
    }
    for number, (message, tensors) in enumerate(cases.items()):
        path = in_gguf(tmp_path / f"{number}.gguf", tensors)
        with pytest.raises(SourceError, match=message):
            read_imatrix(path)
    with pytest.raises(SourceError, match="without importance"):
        read_imatrix(in_gguf(tmp_path / "m.gguf", {"a.in_sum2": one}, kind="model"))
    with pytest.raises(SourceError, match="cannot read"):
        read_imatrix(tmp_path / "none.dat")
    with pytest.raises(OutputError, match="cannot write"):
        write_imatrix(tmp_path / "no" / "a.dat", {"a": one[0]}, tokens=1, chunk_tokens=1)


def test_another_models_importance_is_refused() -> None:
    found = Imatrix(
        {"blk.0.attn_q.weight": np.ones(4, np.float32), "output.weight": np.ones(4)}, {}
    )
    widths = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 4}
    assert unmatched(found, widths) == ["blk.0.attn_k.weight"]
    with pytest.raises(TensorError, match=r"4 channels for blk.0.attn_q.weight, which has 8"):
        unmatched(found, {**widths, "blk.0.attn_q.weight": 8})
    with pytest.raises(TensorError, match=r"1 tensors.*blk.0.attn_q.weight.*another model"):
        unmatched(found, {"blk.0.attn_k.weight": 4})
