"""Hugging Face folders: the base's own shards with some tensors changed, as they will lie on disk.

Shards, the order of tensors in them, names and dtypes are the base's. A shard of which no tensor
takes another size keeps its header byte for byte. Tensors that no adapter changes are copied, those
that one changes are computed by rows and rounded once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from edgellm.errors import TensorError
from edgellm.lora.named_weights import ChangedWeight
from edgellm.quant.floats import ENCODERS, READABLE
from edgellm.source.safetensors_file import ITEM_BYTES, SafetensorsFile, StoredTensor
from edgellm.tensors import SLAB_BYTES, rows_within

HEADER_ALIGNMENT = 8
"""The reference implementation pads headers with spaces, so that the data is aligned."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor as it will be stored, where, and what it is made of.

    ``before`` is the base's tensor of this name, None for a new one. ``change`` is None where the
    values stay. ``dtype`` is spelled as in the header (``BF16``), ``offset`` counts from the start
    of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    before: StoredTensor | None
    change: ChangedWeight | None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_copied(self) -> bool:
        """Whether the bytes are the base's own."""
        return self.change is None and self.before is not None and self.dtype == self.before.dtype

    @property
    def reads_base(self) -> bool:
        """Whether its values begin as those that the base stores under this name."""
        own = self.change is None or not self.change.replaced
        return self.before is not None and own

    @property
    def in_one_piece(self) -> bool:
        """Whether it is computed whole: a matrix whose stored rows are columns of the canonical."""
        return self.change is not None and self.change.target.transposed


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the output: its header's bytes, its tensors in the order of their data."""

    name: str
    header: bytes
    tensors: tuple[OutputTensor, ...]
    base: SafetensorsFile

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Piece:
    """A unit of work: bytes of one output tensor, bytes of the base, or the one out of the other.

    ``tensor`` counts in its shard; None for a header. ``start`` and ``stop`` are rows as they are
    stored. ``source`` is the range of the base's file that is read, ``target`` where the result
    goes; each None where there is none.
    """

    shard: int
    tensor: int | None
    start: int
    stop: int
    source: tuple[int, int] | None
    target: tuple[int, int] | None

    @property
    def nbytes(self) -> int:
        return self.target[1] if self.target else 0


def lay_out_shards(
    files: Sequence[SafetensorsFile],
    changed: Mapping[str, ChangedWeight],
    added: Mapping[str, ChangedWeight],
    dtype: str | None = None,
) -> tuple[Shard, ...]:
    """The shards that come out of those of the base, in their order.

    ``added`` are tensors that the base does not have; they go to the end of the last shard.
    ``dtype`` is what all floats are stored in, by default their own; a new tensor takes that of the
    base's first weight. Raises ``TensorError`` for a changed tensor in a type that is not written.
    """
    return tuple(
        _shard(
            file,
            [
                *((stored, stored.name) for stored in file.tensors.values()),
                *((None, name) for name in (added if file is files[-1] else ())),
            ],
            {**changed, **added},
            dtype,
        )
        for file in files
    )


def _shard(
    file: SafetensorsFile,
    entries: Sequence[tuple[StoredTensor | None, str]],
    changed: Mapping[str, ChangedWeight],
    dtype: str | None,
) -> Shard:
    tensors: list[OutputTensor] = []
    for before, name in entries:
        change = changed.get(name)
        tensors.append(
            OutputTensor(
                name=name,
                dtype=_stored_dtype(before, change, dtype),
                shape=_stored_shape(before, change),
                offset=0,
                before=before,
                change=change,
            )
        )
    same = all(
        tensor.before is not None
        and (tensor.dtype, tensor.shape) == (tensor.before.dtype, tensor.before.shape)
        for tensor in tensors
    )
    header = _header_of(file) if same else header_bytes(tensors, file.metadata)
    end = len(header)
    placed = []
    for tensor in tensors:
        placed.append(replace(tensor, offset=end))
        end += tensor.nbytes
    return Shard(file.path.name, header, tuple(placed), file)


def _stored_dtype(
    before: StoredTensor | None, change: ChangedWeight | None, wanted: str | None
) -> str:
    own = before.dtype if before else (change.start.dtype.upper() if change else "F32")
    if wanted is not None and own.lower() in READABLE:
        own = wanted.upper()
    if change is not None and own.lower() not in ENCODERS:
        name = before.name if before else change.target.name
        raise TensorError(
            f"tensor {name} is stored as {own}, and an adapter changes it: merged weights are "
            f"written as {', '.join(ENCODERS)}; choose one by --dtype, or merge into the model "
            "that this one was made from"
        )
    return own


def _stored_shape(before: StoredTensor | None, change: ChangedWeight | None) -> tuple[int, ...]:
    if change is None or (before is not None and not change.replaced):
        assert before is not None
        return before.shape
    shape = change.start.shape
    return shape[::-1] if change.target.transposed else shape


def _header_of(file: SafetensorsFile) -> bytes:
    header_bytes = int.from_bytes(file.file.read(0, 8).tobytes(), "little")
    return file.file.read(0, 8 + header_bytes).tobytes()


class Entry(Protocol):
    """What a header says of a tensor; ``dtype`` as it spells it (``BF16``)."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def header_bytes(tensors: Sequence[Entry], metadata: Mapping[str, str]) -> bytes:
    """The header of a file whose data are ``tensors``, one behind the other."""
    end = 0
    entries: dict[str, object] = {"__metadata__": dict(metadata) or {"format": "pt"}}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def pieces_of(shards: Sequence[Shard]) -> Iterator[Piece]:
    """The units of work, in the order of the files; the same for any number of threads."""
    for number, shard in enumerate(shards):
        before = len(_header_of(shard.base))
        yield Piece(number, None, 0, 0, (0, before), (0, len(shard.header)))
        for index, tensor in enumerate(shard.tensors):
            if tensor.before is not None and not tensor.reads_base:
                yield from _read_only(number, index, tensor.before)
            yield from _pieces_of_tensor(number, index, tensor)


def _read_only(shard: int, index: int, stored: StoredTensor) -> Iterator[Piece]:
    for start in range(0, stored.nbytes, SLAB_BYTES):
        count = min(SLAB_BYTES, stored.nbytes - start)
        yield Piece(shard, index, 0, 0, (stored.offset + start, count), None)


def _pieces_of_tensor(shard: int, index: int, tensor: OutputTensor) -> Iterator[Piece]:
    rows, columns = stored_rows(tensor)
    row_bytes = columns * ITEM_BYTES[tensor.dtype]
    step = rows if tensor.in_one_piece else rows_within(SLAB_BYTES, columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        source = None
        if tensor.reads_base:
            assert tensor.before is not None
            item_bytes = columns * ITEM_BYTES[tensor.before.dtype]
            source = (tensor.before.offset + start * item_bytes, (stop - start) * item_bytes)
        target = (tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        yield Piece(shard, index, start, stop, source, target)


def stored_rows(tensor: OutputTensor) -> tuple[int, int]:
    """Rows and columns of ``tensor`` as they lie in the file; the rows of a stack follow another.

    Of a vector, and of what has no values, one row.
    """
    size = math.prod(tensor.shape)
    if len(tensor.shape) < 2 or not size:
        return (1, size) if size else (0, 0)
    return size // tensor.shape[-1], tensor.shape[-1]
