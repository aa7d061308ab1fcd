"""Safetensors: a validated header, and tensors loaded by slabs of rows or columns.

The format: 8 bytes of little-endian header length, a JSON object of ``name -> {dtype, shape,
data_offsets}``, then the data. The library of that name reads rows only through a mapping of the
file, so the reading is done here. The rules are the reference's own (``safetensors`` README,
"Format"): offsets in bounds, no overlap, no holes, nothing after the last tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from edgellm.errors import SourceError, TensorError
from edgellm.quant import floats
from edgellm.source.weight_file import Bytes, WeightFile
from edgellm.tensors import COLUMN_CHUNK_BYTES, Array, TensorRef

MAX_HEADER_BYTES = 100_000_000
"""The reference implementation's own limit."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C64": 8,
}  # fmt: skip
FEW_COLUMNS = 4
"""Below one column in so many, a read per row is quicker than reading rows whole."""

READABLE = tuple(dtype.upper() for dtype in floats.READABLE)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One entry of a header; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as bytes, for those whose values take more than one tensor to know."""

    file: WeightFile
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def dtype(self) -> str:
        """As the header spells it (``I32``)."""
        return self.stored.dtype

    def ref(self) -> TensorRef:
        """The tensor as one of floats, its role still its name; other dtypes raise on load."""
        return _reference(self.file, self.stored)

    def matrix(self) -> TensorRef:
        """The same with all dimensions but the last as rows."""
        *outer, columns = self.shape
        flat = replace(self.stored, shape=(math.prod(outer), columns))
        return _reference(self.file, flat)

    def read(self, start: int = 0, stop: int | None = None) -> Bytes:
        """Bytes ``start:stop`` of it, all by default. Raises ``SourceError`` as reading does."""
        stop = self.stored.nbytes if stop is None else stop
        return self.file.read(self.stored.offset + start, stop - start)

    def read_columns(self, start: int, stop: int) -> Bytes:
        """Columns ``start:stop`` of every row of a matrix, uint8 ``[rows, (stop - start) * item]``.

        One read for each row, or for all where every column is wanted.
        """
        rows, columns = self.shape
        item_bytes = ITEM_BYTES[self.dtype]
        if (start, stop) == (0, columns):
            return self.read().reshape(rows, columns * item_bytes)
        result = np.empty((rows, (stop - start) * item_bytes), np.uint8)
        for row in range(rows):
            place = self.stored.offset + (row * columns + start) * item_bytes
            self.file.read_into(result[row].data, place)
        return result


@dataclass(frozen=True, slots=True)
class SafetensorsFile:
    """A validated header: ``tensors`` by name in the order of their data, and ``metadata``."""

    file: WeightFile
    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]

    @property
    def path(self) -> Path:
        return self.file.path

    def ref(self, name: str) -> TensorRef:
        """Tensor ``name``, its role still its name; dtypes other than floats raise on load."""
        return self.raw(name).ref()

    def raw(self, name: str) -> RawTensor:
        """The bytes of tensor ``name``."""
        return RawTensor(self.file, self.tensors[name])


def read_safetensors(path: Path) -> SafetensorsFile:
    """The header of ``path``, every entry checked; no weight is read.

    Raises ``SourceError`` naming the file and the entry that is wrong.
    """
    file = WeightFile(path)
    if file.size_bytes < 8:
        raise SourceError(
            f"{path} has {file.size_bytes} bytes, too few for a safetensors file: fetch it again"
        )
    header_bytes = int.from_bytes(file.read(0, 8).tobytes(), "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise SourceError(
            f"{path} claims a header of {header_bytes} bytes and at most {MAX_HEADER_BYTES} are "
            "allowed: it is not a safetensors file, or damaged"
        )
    data_start = 8 + header_bytes
    if data_start > file.size_bytes:
        raise SourceError(
            f"{path} is cut short: its header ends at byte {data_start} and the file at "
            f"{file.size_bytes}; fetch it again"
        )
    entries = _parse(path, file.read(8, header_bytes).tobytes())
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise SourceError(f"{path}: __metadata__ is not an object: the file is damaged")
    tensors = sorted(
        (_stored(path, name, entry, data_start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset, tensor.nbytes),
    )
    _check_coverage(path, tensors, data_start, file.size_bytes)
    return SafetensorsFile(file, metadata, {tensor.name: tensor for tensor in tensors})


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{path} has an unreadable safetensors header ({error}): fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise SourceError(f"{path}: the safetensors header is not an object: the file is damaged")
    return header


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands there twice")
    return result


def _stored(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    """The entry as a ``StoredTensor``, once its types and its size agree."""
    where = f"{path}: tensor {name}"
    if not isinstance(entry, dict):
        raise SourceError(
            f"{where} is described by a {type(entry).__name__}, not by an object: the file is "
            "damaged"
        )
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise SourceError(
            f"{where} has the unknown dtype {dtype!r}: known are {', '.join(ITEM_BYTES)}"
        )
    if not _naturals(shape):
        raise SourceError(f"{where} has the impossible shape {shape!r}: the file is damaged")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise SourceError(f"{where} has the impossible offsets {offsets!r}: the file is damaged")
    begin, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != expected:
        raise SourceError(
            f"{where} ({dtype} {shape}) takes {expected} bytes and its offsets {offsets} hold "
            f"{end - begin}: the file is damaged"
        )
    return StoredTensor(name, dtype, tuple(shape), data_start + begin, end - begin)


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_coverage(path: Path, tensors: list[StoredTensor], data_start: int, size: int) -> None:
    """The data must be covered from its first byte to the last, each byte once."""
    end, previous = data_start, "the header"
    for tensor in tensors:
        if tensor.offset < end:
            raise SourceError(
                f"{path}: tensors {previous} and {tensor.name} overlap: the file is damaged"
            )
        if tensor.offset > end:
            raise SourceError(
                f"{path}: {tensor.offset - end} bytes between {previous} and {tensor.name} belong "
                "to no tensor: the file is damaged"
            )
        end, previous = tensor.offset + tensor.nbytes, tensor.name
    if end > size:
        raise SourceError(
            f"{path} is cut short: its tensors end at byte {end} and the file at {size}; fetch it "
            "again"
        )
    if end < size:
        raise SourceError(
            f"{path} has {size - end} bytes after the last tensor: the file is damaged"
        )


def _reference(file: WeightFile, stored: StoredTensor) -> TensorRef:
    shape = stored.shape
    rows = shape[0] if len(shape) > 1 else 1
    columns = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)
    item_bytes = ITEM_BYTES[stored.dtype]
    row_bytes = columns * item_bytes

    def load_rows(start: int, stop: int) -> Array:
        raw = file.read(stored.offset + start * row_bytes, (stop - start) * row_bytes)
        return _to_float32(raw, stored).reshape(stop - start, columns)

    def load_columns(start: int, stop: int) -> Array:
        if (stop - start) * FEW_COLUMNS < columns:
            return load_few_columns(start, stop)
        result = np.empty((rows, stop - start), dtype=np.float32)
        step = max(1, COLUMN_CHUNK_BYTES // max(1, row_bytes))
        for first in range(0, rows, step):
            count = min(step, rows - first)
            raw = file.read(stored.offset + first * row_bytes, count * row_bytes)
            cut = raw.reshape(count, row_bytes)[:, start * item_bytes : stop * item_bytes]
            values = _to_float32(np.ascontiguousarray(cut).reshape(-1), stored)
            result[first : first + count] = values.reshape(count, stop - start)
        return result

    def load_few_columns(start: int, stop: int) -> Array:
        piece_bytes = (stop - start) * item_bytes
        raw = np.empty((rows, piece_bytes), dtype=np.uint8)
        for row in range(rows):
            file.read_into(raw[row].data, stored.offset + row * row_bytes + start * item_bytes)
        return _to_float32(raw.reshape(-1), stored).reshape(rows, stop - start)

    dtype = stored.dtype.lower()
    return TensorRef(stored.name, stored.name, shape, dtype, stored.nbytes, load_rows, load_columns)


def _to_float32(raw: Bytes, stored: StoredTensor) -> Array:
    """Values of uint8 ``[n * item]`` as float32 ``[n]``."""
    if stored.dtype in READABLE:
        return floats.decode(raw, stored.dtype.lower())
    raise TensorError(
        f"tensor {stored.name} is stored as {stored.dtype}, of which edgellm cannot make weights "
        f"(readable: {', '.join(READABLE)}): the checkpoint is quantized already; convert the "
        "original that it was made from"
    )
