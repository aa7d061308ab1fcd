"""GGUF: header, metadata and tensor table, parsed fast and checked; no weight is read.

The format is ggml's (``docs/gguf.md``): magic, version, counts, typed key-value pairs, tensor
table, then the data from the next multiple of ``general.alignment``. A model may be split over
files named ``...-00001-of-00003.gguf``, which are read as one.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from struct import Struct
from struct import error as StructError
from typing import Any

import numpy as np

from edgellm.errors import SourceError
from edgellm.quant.ggml_types import GGML_TYPES, GgmlType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_STRING_BYTES = 64 << 20
MAX_DIMENSIONS = 4
SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One row of the tensor table.

    ``shape`` is ``[out, in]`` as everywhere in edgellm (GGUF writes it the other way round);
    ``offset`` counts from the start of ``file``.
    """

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    nbytes: int
    file: Path

    @property
    def dtype(self) -> str:
        """The name of the storage type: ``q4_1``, ``f32``, ..."""
        return self.type.name


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A checked GGUF model: ``metadata`` by key, ``tensors`` by name in the order of the table.

    Arrays in ``metadata`` are lists. ``files`` are all parts of a split model, in order;
    ``data_offset`` is where the data of the first starts.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_offset: int
    files: tuple[Path, ...]


def read_gguf(path: Path) -> GgufFile:
    """What the GGUF at ``path`` holds, with all other parts of it when it is split.

    Raises ``SourceError`` naming what is wrong: not a GGUF, cut short, impossible counts, unknown
    types, overlapping tensors, a missing part.
    """
    first = _read_one(path)
    count = first.metadata.get("split.count", 1)
    return _join(path, first, count) if isinstance(count, int) and count > 1 else first


def read_gguf_model(path: Path) -> GgufFile:
    """``read_gguf`` of a model; raises ``SourceError`` for an adapter too, which is none."""
    stored = read_gguf(path)
    if stored.metadata.get("general.type") == "adapter":
        raise SourceError(
            f"{path} is a LoRA adapter, not a model: name its base, and it beside it "
            f"(BASE --adapter {path})"
        )
    return stored


def _read_one(path: Path) -> GgufFile:
    try:
        with path.open("rb") as file:
            if file.seek(0, 2) < 24:
                raise SourceError(f"{path} is too short for a GGUF file: fetch it again")
            # Mapped for parsing only: a few megabytes are touched, and given back at once.
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Parser(path, data).parse()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def _join(path: Path, part: GgufFile, count: int) -> GgufFile:
    """All ``count`` parts of the split model of which ``part`` is one."""
    named = SPLIT_NAME.fullmatch(path.name)
    if not named or int(named["count"]) != count:
        raise SourceError(
            f"{path} is one of {count} parts of a split GGUF, whose name must end in "
            f"-00001-of-{count:05}.gguf for the others to be found: give it its name back"
        )
    paths = [
        path.with_name(f"{named['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)
    ]
    missing = [other.name for other in paths if not other.exists()]
    if missing:
        raise SourceError(
            f"{path} is one of {count} parts and {len(missing)} are missing "
            f"({', '.join(missing[:4])}): put all of them into one folder"
        )
    parts = [part if other == path else _read_one(other) for other in paths]
    for number, (other, found) in enumerate(zip(paths, parts, strict=True)):
        if found.metadata.get("split.no") != number or found.metadata.get("split.count") != count:
            raise SourceError(
                f"{other} is not part {number + 1} of {count} as its name says: fetch it again"
            )
    tensors = _by_name(path, [tensor for found in parts for tensor in found.tensors.values()])
    promised = parts[0].metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise SourceError(
            f"{path}: its parts hold {len(tensors)} tensors and promise {promised}: fetch them "
            "again"
        )
    return replace(parts[0], path=path, tensors=tensors, files=tuple(paths))


def _by_name(path: Path, tensors: list[GgufTensor]) -> dict[str, GgufTensor]:
    named: dict[str, GgufTensor] = {}
    for tensor in tensors:
        if tensor.name in named:
            raise SourceError(
                f"{path}: tensor {tensor.name} stands there twice: the file is damaged"
            )
        named[tensor.name] = tensor
    return named


class _Parser:
    """A position that moves through a mapped file; every step is checked against its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.position = 0

    def parse(self) -> GgufFile:
        magic = self.data[:4]
        if magic != MAGIC:
            raise SourceError(
                f"{self.path} is not a GGUF file: it starts with {magic!r}, not {MAGIC!r}"
            )
        self.position = 4
        version = self.number("<I")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            raise SourceError(
                f"{self.path} is a big-endian GGUF, which runs on no machine that edgellm supports"
                if big_endian
                else f"{self.path} is GGUF version {version}; versions {VERSIONS} can be read: "
                "make it anew with a present llama.cpp"
            )
        tensor_count, pair_count = self.number("<Q"), self.number("<Q")
        # The least that a tensor (name length, dimensions, type, offset) and a pair (key length,
        # type, value) take: a count beyond that cannot be honest.
        self.check_count(tensor_count, 24, "tensors")
        self.check_count(pair_count, 13, "metadata keys")
        metadata = self.metadata(pair_count)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1):
            raise SourceError(
                f"{self.path}: general.alignment is {alignment!r}, not a power of two from 8 on"
            )
        table = [self.tensor() for _ in range(tensor_count)]
        data_offset = -(-self.position // alignment) * alignment
        tensors = [replace(tensor, offset=data_offset + tensor.offset) for tensor in table]
        self.check_tensors(tensors, alignment)
        named = _by_name(self.path, tensors)
        return GgufFile(self.path, version, metadata, named, data_offset, (self.path,))

    def metadata(self, pair_count: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        for _ in range(pair_count):
            key = self.string("a metadata key")
            if key in pairs:
                raise SourceError(
                    f"{self.path}: metadata key {key} stands there twice: the file is damaged"
                )
            kind = self.number("<I")
            pairs[key] = self.array(key) if kind == ARRAY else self.value(kind, key)
        return pairs

    def value(self, kind: int, key: str) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind == BOOL:
            return self.number("<b") != 0
        if kind not in NUMBERS:
            raise SourceError(
                f"{self.path}: {key} has the unknown value type {kind}: the file is damaged"
            )
        return self.number(NUMBERS[kind])

    def array(self, key: str) -> list[Any]:
        kind, count = self.number("<I"), self.number("<Q")
        if kind == STRING:
            return self.strings(count, key)
        dtype = np.dtype("<i1" if kind == BOOL else NUMBERS.get(kind, "V0"))
        if not dtype.itemsize:
            raise SourceError(
                f"{self.path}: {key} is an array of the unknown type {kind}: the file is damaged"
            )
        self.check_count(count, dtype.itemsize, f"values of {key}")
        values = np.frombuffer(self.take(count * dtype.itemsize, key), dtype)
        result: list[Any] = (values != 0).tolist() if kind == BOOL else values.tolist()
        return result

    def strings(self, count: int, key: str) -> list[str]:
        """``count`` strings; written out flat, as vocabularies have 50,000 to 500,000 of them."""
        self.check_count(count, 8, f"strings of {key}")
        data, size, position = self.data, self.size, self.position
        unpack: Callable[[Any, int], tuple[int]] = LENGTH.unpack_from
        result: list[str] = []
        append = result.append
        try:
            for _ in range(count):
                start = position + 8
                position = start + unpack(data, position)[0]
                if position > size:
                    raise self.cut_short(key)
                append(data[start:position].decode())
        except StructError as error:
            raise self.cut_short(key) from error
        except UnicodeDecodeError as error:
            raise self.not_utf8(key) from error
        self.position = position
        return result

    def string(self, what: str) -> str:
        length = self.number("<Q")
        if length > MAX_STRING_BYTES:
            raise SourceError(
                f"{self.path}: {what} claims {length} bytes of text and at most "
                f"{MAX_STRING_BYTES} are allowed: the file is damaged"
            )
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.not_utf8(what) from error

    def tensor(self) -> GgufTensor:
        """A row of the table; ``offset`` still counts from the start of the data."""
        name = self.string("a tensor name")
        dimensions = self.number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise SourceError(
                f"{self.path}: tensor {name} has {dimensions} dimensions, allowed are 1 to 4"
            )
        shape = tuple(self.number("<Q") for _ in range(dimensions))[::-1]
        number, offset = self.number("<I"), self.number("<Q")
        kind = GGML_TYPES.get(number)
        if kind is None:
            raise SourceError(
                f"{self.path}: tensor {name} has the unknown type {number}: the file is damaged, "
                "or newer than this edgellm"
            )
        if 0 in shape or shape[-1] % kind.block:
            raise SourceError(
                f"{self.path}: tensor {name} has shape {list(shape)}, impossible in {kind.name} "
                f"(blocks of {kind.block}): the file is damaged"
            )
        nbytes = math.prod(shape) // kind.block * kind.block_bytes
        return GgufTensor(name, shape, kind, offset, nbytes, self.path)

    def check_tensors(self, tensors: list[GgufTensor], alignment: int) -> None:
        end, previous = 0, ""
        for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
            if tensor.offset % alignment:
                raise SourceError(
                    f"{self.path}: tensor {tensor.name} is not aligned to {alignment} bytes"
                )
            if tensor.offset < end:
                raise SourceError(
                    f"{self.path}: tensors {previous} and {tensor.name} overlap: the file is "
                    "damaged"
                )
            end, previous = tensor.offset + tensor.nbytes, tensor.name
            if end > self.size:
                raise SourceError(
                    f"{self.path} is cut short: tensor {tensor.name} ends at byte {end} and the "
                    f"file at {self.size}; fetch it again"
                )

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        room = (self.size - self.position) // least_bytes
        if count > room:
            raise SourceError(
                f"{self.path} claims {count} {what} and has room for {room} at most: it is cut "
                "short or damaged; fetch it again"
            )

    def take(self, nbytes: int, what: str) -> bytes:
        start, self.position = self.position, self.position + nbytes
        if self.position > self.size:
            raise self.cut_short(what)
        return self.data[start : self.position]

    def number(self, layout: str) -> Any:
        form = FORMS[layout]
        return form.unpack(self.take(form.size, "its header"))[0]

    def cut_short(self, what: str) -> SourceError:
        return SourceError(
            f"{self.path} is cut short: it ends at byte {self.size} in the middle of {what}; "
            "fetch it again"
        )

    def not_utf8(self, what: str) -> SourceError:
        return SourceError(f"{self.path}: {what} is not UTF-8 text: the file is damaged")


BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
FORMS = {layout: Struct(layout) for layout in NUMBERS.values()}
LENGTH = FORMS["<Q"]
