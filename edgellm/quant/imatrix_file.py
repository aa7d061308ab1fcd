"""llama.cpp's importance matrices: files in GGUF, and in the older layout without a name (.dat).

Read and written as ``tools/imatrix`` and ``tools/quantize`` of llama.cpp do. A file holds, of the
inputs of each weight, the sum of squares by channel and how many tokens went into it; importance is
their quotient. Layers of experts hold one such row for each expert, one after another.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np

from edgellm.architectures.gguf_latent import source_role
from edgellm.errors import OutputError, SourceError, TensorError
from edgellm.tensors import Array

LEGACY_SUFFIX = ".dat"
ALIGNMENT = 32
F32, UINT32, STRING, ARRAY = 0, 4, 8, 9
"""A tensor's type, and types of values (ggml's docs/gguf.md)."""

DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
SUMS, COUNTS = ".in_sum2", ".counts"
LARGEST_NAME_BYTES = 1 << 12
LARGEST_VALUES = 1 << 28

HEAD = "output.weight"

ROUTERS = ".ffn_gate_inp"
"""In names of what is never rounded: routers of experts, and gates of shared ones."""


@dataclass(frozen=True)
class Imatrix:
    """``importance`` float32 ``[in]`` by tensor name, the mean square of each input channel.

    ``tokens`` by the same name, the most that any row of it saw; in the older layout these are
    chunks, whose size it does not say (``chunk_tokens`` 0). ``datasets`` name the texts.
    """

    importance: dict[str, Array]
    tokens: dict[str, int]
    chunks: int = 0
    chunk_tokens: int = 0
    datasets: tuple[str, ...] = ()


def read_imatrix(path: Path) -> Imatrix:
    """The importance matrix at ``path``, of either layout.

    An expert that no token reached counts all its channels alike, as llama.cpp has it. Raises
    ``SourceError`` for a file that is neither, or is cut short; ``TensorError`` naming a tensor
    that no token reached at all, or whose sums are negative or not finite.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"cannot read the importance matrix {path}: {error.strerror}") from error
    found = _read_gguf(path) if magic == b"GGUF" else _read_legacy(path)
    if not found.importance:
        raise SourceError(f"{path} holds no importance: make it again with llama-imatrix")
    return found


def write_imatrix(
    path: Path,
    importance: Mapping[str, Array],
    *,
    tokens: int,
    chunk_tokens: int,
    datasets: Iterable[str] = (),
    counts: Mapping[str, Array] | None = None,
) -> None:
    """Write ``importance``, by tensor name, for llama.cpp: the older layout for a ``.dat``.

    ``tokens`` went into each, or ``counts`` ``[experts]`` into the parts of a stack of experts, one
    after another; of a part with 0, the importance is not looked at. What is read back may differ
    in the last bit: sums are stored. The older layout keeps one dataset. Raises ``OutputError``
    when the file cannot be written.
    """
    if not importance or tokens < 1 or chunk_tokens < 1:
        raise ValueError("an importance matrix needs entries, tokens and the length of a chunk")
    chunks = -(-tokens // chunk_tokens)
    names, rows = list(datasets), dict(sorted(importance.items()))
    for name, values in rows.items():
        _check(path, name, values)
    content = (
        _legacy_content(rows, chunks, names)
        if path.suffix == LEGACY_SUFFIX
        else _gguf_content(rows, counts or {}, tokens, chunks, chunk_tokens, names)
    )
    try:
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(f"cannot write the importance matrix {path}: {error.strerror}") from error


def unmatched(imatrix: Imatrix, widths: Mapping[str, int]) -> list[str]:
    """Those of ``widths`` (columns by tensor name) that ``imatrix`` says nothing about.

    Raises ``TensorError`` for importance of another width, and where a tensor of it is not in the
    model: then it is another model's. That of a head is left alone where the head is the embedding.
    """
    strangers = [
        name
        for name in imatrix.importance
        if source_role(name) not in widths and name != HEAD and ROUTERS not in name
    ]
    if strangers:
        raise TensorError(
            f"the importance matrix has {len(strangers)} tensors that this model has not "
            f"({', '.join(strangers[:3])}...): it was made for another model"
        )
    for name, values in imatrix.importance.items():
        if name in widths and len(values) != widths[name]:
            raise TensorError(
                f"the importance matrix has {len(values)} channels for {name}, which has "
                f"{widths[name]}: it was made for another model"
            )
    return [name for name in widths if name not in imatrix.importance]


def _read_gguf(path: Path) -> Imatrix:
    from edgellm.source.gguf_file import read_gguf  # what a .dat does not need

    stored = read_gguf(path)
    if stored.metadata.get("general.type", "imatrix") != "imatrix" or not any(
        name.endswith(SUMS) for name in stored.tensors
    ):
        raise SourceError(
            f"{path} is a GGUF file without importance ({SUMS} of tensors): give one that "
            "llama-imatrix or --save-imatrix wrote"
        )
    content = np.memmap(path, np.uint8, "r")

    def floats(name: str) -> Array:
        tensor = stored.tensors.get(name)
        if tensor is None or tensor.dtype != "f32":
            raise SourceError(f"{path}: {name} is missing or not float32: make it again")
        raw = content[tensor.offset : tensor.offset + tensor.nbytes]
        return raw.view("<f4").astype(np.float32)

    importance, tokens = {}, {}
    for key in stored.tensors:
        if not key.endswith(SUMS):
            continue
        name = key.removesuffix(SUMS)
        sums, counts = floats(key), np.rint(floats(name + COUNTS))
        if not len(counts) or len(sums) % len(counts):
            raise SourceError(f"{path}: {len(counts)} counts for {len(sums)} sums of {name}")
        importance[name] = _means(path, name, sums, counts)
        tokens[name] = int(counts.max())
    datasets = stored.metadata.get(DATASETS, [])
    return Imatrix(
        importance,
        tokens,
        int(stored.metadata.get(CHUNK_COUNT, 0)),
        int(stored.metadata.get(CHUNK_SIZE, 0)),
        tuple(str(name) for name in datasets) if isinstance(datasets, list) else (),
    )


def _means(path: Path, name: str, sums: Array, counts: Array) -> Array:
    """``sums / counts``, ones for rows without a count; checked."""
    if not np.isfinite(counts).all() or counts.max() < 1 or counts.min() < 0:
        raise TensorError(
            f"{path}: no token reached {name}, so nothing is known of its importance: collect it "
            "on more text, or leave this tensor out"
        )
    rows = sums.reshape(len(counts), -1)
    some = counts > 0
    means = np.ones_like(rows)
    means[some] = rows[some] / counts[some, None]
    _check(path, name, means)
    return means.reshape(-1)


def _check(path: Path, name: str, values: Array) -> None:
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        wrong = values[~(np.isfinite(values) & (values >= 0))][0]
        raise TensorError(
            f"{path}: importance of {name} must be finite and 0 or more, got {wrong:g}: collect it "
            "again"
        )


def _read_legacy(path: Path) -> Imatrix:
    """Entry by entry: name, chunks, sums scaled to chunks; then all chunks and the dataset."""
    reader = _Reader(path, path.read_bytes())
    importance, tokens = {}, {}
    for _ in range(reader.number("the count of entries", LARGEST_VALUES)):
        name = reader.text("a tensor's name")
        if name in importance:
            raise SourceError(f"{path}: {name} stands there twice: the file is damaged")
        chunks = reader.number(f"the chunks of {name}", LARGEST_VALUES, least=0)
        sums = reader.floats(reader.number(f"the channels of {name}", LARGEST_VALUES))
        # Files of the first versions had sums of one chunk and no count.
        counts = np.asarray([max(chunks, 1)], np.float32)
        importance[name] = _means(path, name, sums, counts)
        tokens[name] = chunks
    if not reader.left:  # nor the rest
        return Imatrix(importance, tokens)
    all_chunks = reader.number("the count of chunks", LARGEST_VALUES, least=0)
    dataset = reader.text("the dataset", least=0) if reader.left else ""
    return Imatrix(importance, tokens, all_chunks, 0, (dataset,) if dataset else ())


class _Reader:
    """A position that moves through the bytes of a file; every step is checked."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        self.content = content
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.content) - self.position

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise SourceError(
                f"{self.path} is cut short, or no importance matrix of llama.cpp: fetch it again"
            )
        self.position += count
        return self.content[self.position - count : self.position]

    def number(self, what: str, largest: int, *, least: int = 1) -> int:
        value = int.from_bytes(self.take(4), "little", signed=True)
        if not least <= value <= largest:
            raise SourceError(
                f"{self.path} is no importance matrix of llama.cpp: {what} is said to be {value}"
            )
        return value

    def text(self, what: str, *, least: int = 1) -> str:
        count = self.number(f"the length of {what}", LARGEST_NAME_BYTES, least=least)
        try:
            return self.take(count).decode()
        except UnicodeDecodeError as error:
            raise SourceError(
                f"{self.path} is no importance matrix of llama.cpp: {what} is no text"
            ) from error

    def floats(self, count: int) -> Array:
        return np.frombuffer(self.take(4 * count), "<f4").astype(np.float32)


def _legacy_content(rows: Mapping[str, Array], chunks: int, datasets: list[str]) -> bytes:
    out = BytesIO()
    out.write(struct.pack("<i", len(rows)))
    for name, values in rows.items():
        text = name.encode()
        out.write(struct.pack("<i", len(text)) + text + struct.pack("<ii", chunks, values.size))
        out.write((values * np.float32(chunks)).astype("<f4").tobytes())
    dataset = (datasets[-1] if datasets else "").encode()
    out.write(struct.pack("<ii", chunks, len(dataset)) + dataset)
    return out.getvalue()


def _gguf_content(
    rows: Mapping[str, Array],
    counts: Mapping[str, Array],
    tokens: int,
    chunks: int,
    chunk_tokens: int,
    datasets: list[str],
) -> bytes:
    """Without ``general.architecture``, which ``GGUFWriter`` would demand."""
    tensors: dict[str, Array] = {}
    for name, values in rows.items():
        seen = counts.get(name, np.full(1, tokens, np.float32)).reshape(-1, 1)
        tensors[name + SUMS] = values.reshape(len(seen), -1) * seen
        tensors[name + COUNTS] = seen
    names = struct.pack("<IQ", STRING, len(datasets)) + b"".join(map(_string, datasets))
    pairs = (
        ("general.type", STRING, _string("imatrix")),
        (DATASETS, ARRAY, names),
        (CHUNK_COUNT, UINT32, struct.pack("<I", chunks)),
        (CHUNK_SIZE, UINT32, struct.pack("<I", chunk_tokens)),
    )
    out = BytesIO()
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)))
    for key, kind, value in pairs:
        out.write(_string(key) + struct.pack("<I", kind) + value)
    offset = 0
    for name, values in tensors.items():
        sizes = struct.pack("<QQ", *reversed(values.shape))
        out.write(_string(name) + struct.pack("<I", 2) + sizes + struct.pack("<IQ", F32, offset))
        offset += _padded(values.nbytes)
    out.write(bytes(_padded(out.tell()) - out.tell()))
    for values in tensors.values():
        out.write(values.astype("<f4").tobytes())
        out.write(bytes(_padded(out.tell()) - out.tell()))
    return out.getvalue()


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
