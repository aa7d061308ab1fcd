"""The GGUF reader: every kind of value, split files, and damage that is named."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.architectures.gguf_rows import halves_order
from edgellm.errors import SourceError, TensorError
from edgellm.quant.ggml_types import GGML_TYPES
from edgellm.source import open_source
from edgellm.source.gguf_file import read_gguf
from edgellm.source.gguf_model import references

UINT32, STRING, ARRAY = 4, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def row(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    """A tensor's row; ``dims`` in GGUF's order, the row length first."""
    return (
        text(name)
        + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        + struct.pack("<IQ", kind, offset)
    )


def gguf(
    pairs: list[bytes],
    rows: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    tensors, keys = counts or (len(rows), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(rows)
    return head + b"\0" * (-len(head) % 32) + data


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def write(content: bytes, name: str = "model.gguf") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


VALUES = np.arange(8, dtype=np.float32).reshape(2, 4)
GOOD = gguf(
    [
        pair("general.architecture", STRING, text("llama")),
        pair("tokenizer.ggml.tokens", ARRAY, array(STRING, 2, text("a") + text("日"))),
    ],
    [row("a", (4, 2), 0, 0), row("b", (4,), 0, 32)],
    VALUES.tobytes() + VALUES[0].tobytes(),
)


@pytest.mark.parametrize("version", [2, 3])
def test_every_kind_of_value_is_read(version: int, save: Callable[..., Path]) -> None:
    numbers = {
        "u8": (0, "<B", 200),
        "i8": (1, "<b", -5),
        "u16": (2, "<H", 60000),
        "i16": (3, "<h", -300),
        "u32": (4, "<I", 1 << 31),
        "i32": (5, "<i", -7),
        "f32": (6, "<f", 0.5),
        "u64": (10, "<Q", 1 << 63),
        "i64": (11, "<q", -(1 << 40)),
        "f64": (12, "<d", 0.1),
        "yes": (7, "<b", True),
    }
    pairs = [pair(key, kind, struct.pack(form, x)) for key, (kind, form, x) in numbers.items()]
    pairs += [
        pair(f"{key}s", ARRAY, array(kind, 2, struct.pack(form, x) * 2))
        for key, (kind, form, x) in numbers.items()
    ]
    pairs += [pair("text", STRING, text("naïve 🙂")), pair("none", ARRAY, array(STRING, 0, b""))]
    found = read_gguf(save(gguf(pairs, [], version=version)))
    assert found.version == version
    expected: dict[str, Any] = {key: x for key, (_, _, x) in numbers.items()}
    expected |= {f"{key}s": [x, x] for key, (_, _, x) in numbers.items()}
    assert found.metadata == expected | {"text": "naïve 🙂", "none": []}
    assert found.metadata["yes"] is True


def test_tensors_are_found_where_they_are(save: Callable[..., Path]) -> None:
    path = save(GOOD)
    found = read_gguf(path)
    assert found.metadata["tokenizer.ggml.tokens"] == ["a", "日"]
    assert list(found.tensors) == ["a", "b"]
    tensor = found.tensors["a"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((2, 4), "f32", 32)
    assert tensor.offset == found.data_offset == path.stat().st_size - 48
    refs = references(found)
    np.testing.assert_array_equal(refs["a"].load(1, 2), VALUES[1:])
    np.testing.assert_array_equal(refs["b"].load(), VALUES[:1])


def test_a_file_cut_anywhere_is_refused(save: Callable[..., Path]) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(SourceError):
            read_gguf(save(GOOD[:length]))
    read_gguf(save(GOOD))


def test_random_damage_never_escapes_as_another_error(save: Callable[..., Path]) -> None:
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        content = bytearray(GOOD)
        for _ in range(chance.randint(1, 3)):
            content[chance.randrange(len(GOOD) - 48)] = chance.choice((0, 1, 8, 9, 127, 255))
        try:
            read_gguf(save(bytes(content)))
        except SourceError:
            refused += 1
    assert refused > 250


HUGE = (1 << 63) + 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + GOOD[4:], "not a GGUF file"),
        (gguf([], [], version=1), "version 1"),
        (gguf([], [], version=4), "version 4"),
        (b"GGUF" + struct.pack(">I", 3) + GOOD[8:], "big-endian"),
        (gguf([], [], counts=(HUGE, 0)), "tensors and has room"),
        (gguf([], [], counts=(0, HUGE)), "metadata keys and has room"),
        (gguf([pair("x", ARRAY, array(STRING, HUGE, b""))], []), "strings of x and has room"),
        (gguf([pair("x", ARRAY, array(UINT32, HUGE, b""))], []), "values of x and has room"),
        (gguf([pair("x", ARRAY, array(ARRAY, 1, b"\0" * 12))], []), "array of the unknown type 9"),
        (gguf([pair("x", STRING, struct.pack("<Q", HUGE))], []), "x claims"),
        (gguf([pair("x", STRING, struct.pack("<Q", 5000))], []), "in the middle of x"),
        (
            gguf([pair("x", ARRAY, array(STRING, 1, struct.pack("<Q", 5000)))], []),
            "in the middle of x",
        ),
        (gguf([pair("x", 99, b"\0" * 16)], []), "unknown value type 99"),
        (gguf([pair("x", STRING, text(b"\xff"))], []), "x is not UTF-8"),
        (gguf([pair("x", ARRAY, array(STRING, 1, text(b"\xff")))], []), "x is not UTF-8"),
        (gguf([pair("x", 0, b"\1"), pair("x", 0, b"\1")], []), "key x stands there twice"),
        (
            gguf([pair("general.alignment", UINT32, struct.pack("<I", 0))], []),
            "general.alignment is 0",
        ),
        (
            gguf([pair("general.alignment", UINT32, struct.pack("<I", 33))], []),
            "general.alignment is 33",
        ),
        (gguf([], [row("a", (4,), 77, 0)], bytes(64)), "a has the unknown type 77"),
        (gguf([], [row("a", (4,) * 5, 0, 0)], bytes(64)), "5 dimensions"),
        (gguf([], [row("a", (0, 4), 0, 0)], bytes(64)), r"a has shape \[4, 0\]"),
        (gguf([], [row("a", (33,), 2, 0)], bytes(64)), "impossible in q4_0"),
        (gguf([], [row("a", (4,), 0, 7)], bytes(64)), "not aligned"),
        (gguf([], [row("a", (4,), 0, 64)], bytes(64)), "cut short: tensor a"),
        (gguf([], [row("a", (4,), 0, HUGE & ~31)], bytes(64)), "cut short: tensor a"),
        (gguf([], [row("a", (1 << 62, 1 << 62), 0, 0)], bytes(64)), "cut short: tensor a"),
        (
            gguf([], [row("a", (16,), 0, 0), row("b", (4,), 0, 32)], bytes(96)),
            "a and b overlap",
        ),
        (
            gguf([], [row("a", (4,), 0, 0), row("a", (4,), 0, 32)], bytes(96)),
            "tensor a stands there twice",
        ),
    ],
)
def test_damage_is_named(content: bytes, message: str, save: Callable[..., Path]) -> None:
    path = save(content)
    with pytest.raises(SourceError, match=message) as caught:
        read_gguf(path)
    assert "model.gguf" in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot read"):
        read_gguf(tmp_path / "none.gguf")


def test_a_file_that_is_no_model_is_refused_as_a_source(save: Callable[..., Path]) -> None:
    with pytest.raises(SourceError, match="not a GGUF file"):
        open_source(str(save(b"hello" * 10, "notes.txt")))


def part(number: int, count: int, tensors: int, name: str) -> bytes:
    pairs = [
        pair("split.no", 2, struct.pack("<H", number)),
        pair("split.count", 2, struct.pack("<H", count)),
        pair("split.tensors.count", 5, struct.pack("<i", tensors)),
    ]
    return gguf(pairs, [row(name, (4,), 0, 0)], VALUES[number].tobytes())


def test_a_split_model_is_read_whole_from_any_part(save: Callable[..., Path]) -> None:
    paths = [save(part(n, 2, 2, f"t{n}"), f"m-{n + 1:05}-of-00002.gguf") for n in range(2)]
    for path in paths:
        found = read_gguf(path)
        assert found.files == tuple(paths)
        assert list(found.tensors) == ["t0", "t1"]
        refs = references(found)
        np.testing.assert_array_equal(refs["t1"].load(), VALUES[1:])


def test_a_split_model_with_parts_amiss_is_refused(save: Callable[..., Path]) -> None:
    path = save(part(0, 2, 2, "t0"), "m-00001-of-00002.gguf")
    with pytest.raises(SourceError, match=r"1 are missing \(m-00002-of-00002.gguf\)"):
        read_gguf(path)
    save(part(0, 2, 2, "t1"), "m-00002-of-00002.gguf")
    with pytest.raises(SourceError, match="not part 2 of 2"):
        read_gguf(path)
    save(part(1, 2, 2, "t0"), "m-00002-of-00002.gguf")
    with pytest.raises(SourceError, match="t0 stands there twice"):
        read_gguf(path)
    save(part(1, 2, 3, "t1"), "m-00002-of-00002.gguf")
    save(part(0, 2, 3, "t0"), "m-00001-of-00002.gguf")
    with pytest.raises(SourceError, match="hold 2 tensors and promise 3"):
        read_gguf(path)
    with pytest.raises(SourceError, match="whose name must end in"):
        read_gguf(save(part(0, 2, 2, "t0"), "renamed.gguf"))


def test_whole_numbers_are_no_weights(save: Callable[..., Path]) -> None:
    ref = references(read_gguf(save(gguf([], [row("a", (4,), 26, 0)], bytes(32)))))["a"]
    with pytest.raises(TensorError, match="i32, whole numbers"):
        ref.load()


def test_the_order_of_halves_undoes_the_order_of_pairs() -> None:
    heads, head_dim = 3, 8
    rows = np.arange(heads * head_dim)
    # What llama.cpp's converter does to the rows of q and k.
    pairs = rows.reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)
    np.testing.assert_array_equal(pairs[halves_order(heads, head_dim)], rows)


def test_types_have_plausible_blocks() -> None:
    for number, kind in GGML_TYPES.items():
        assert kind.number == number
        assert 1 <= 8 * kind.block_bytes / kind.block <= 64
