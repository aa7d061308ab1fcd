"""Checkpoints in safetensors whose weights may be stored in several tensors each, cut into files.

What the ``hf`` and ``mlx`` containers have in common: which tensor lies where, and the index.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgellm.architectures.family import TensorRow
from edgellm.export.hf_folder import index_file
from edgellm.export.layout import OutputTensor, StoredArray
from edgellm.export.to_safetensors import header_bytes
from edgellm.quant.grid import Grid
from edgellm.source.checkpoint import SINGLE
from edgellm.source.safetensors_file import ITEM_BYTES
from edgellm.tensors import TensorRef

SHARD_BYTES = 5 * 10**9
"""The most that a file takes where another can be begun (huggingface_hub's default)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a module in the checkpoint, named ``module + suffix``.

    ``dtype`` as safetensors spells it. ``component`` is that of the packer, with ``rows_each`` and
    ``lines`` as in ``StoredArray``; one that is the same whatever the weights has its ``content``
    here instead.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    component: str = ""
    rows_each: int = 1
    lines: int = 1
    content: bytes = b""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of the model and the tensors of the checkpoint that it is stored as."""

    row: TensorRow
    ref: TensorRef
    grid: Grid
    packer: str
    parts: tuple[Part, ...]
    module: str
    in_one_piece: bool

    @property
    def nbytes(self) -> int:
        return sum(_part_bytes(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a file: ``part`` of ``weight``."""

    weight: Weight
    part: Part

    @property
    def name(self) -> str:
        return self.weight.module + self.part.suffix

    @property
    def dtype(self) -> str:
        return self.part.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.part.shape

    @property
    def nbytes(self) -> int:
        return _part_bytes(self.part)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: ``head`` is its header and all that does not depend on the weights."""

    name: str
    head: bytes
    nbytes: int
    tensors: tuple[OutputTensor, ...]
    entries: tuple[Entry, ...]


def shards_of(weights: Sequence[Weight], metadata: Mapping[str, str]) -> Iterator[Shard]:
    """The files, each weight whole in one of them, in the order of the model."""
    groups: list[list[Weight]] = [[]]
    room = SHARD_BYTES
    for weight in weights:
        if groups[-1] and weight.nbytes > room:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(weight)
        room -= weight.nbytes
    for number, group in enumerate(groups, start=1):
        name = SINGLE
        if len(groups) > 1:
            name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        yield _shard(name, group, metadata)


def _shard(name: str, weights: Sequence[Weight], metadata: Mapping[str, str]) -> Shard:
    entries = [Entry(weight, part) for weight in weights for part in weight.parts]
    # What does not depend on the weights is written with the header. Within both, the widest types
    # come first, so that each tensor is aligned to its own (as safetensors' reference does).
    entries.sort(key=lambda entry: (not entry.part.content, -ITEM_BYTES[entry.dtype]))
    header = header_bytes(entries, metadata)
    content = b"".join(entry.part.content for entry in entries)
    end = len(header)
    arrays: dict[str, list[StoredArray]] = {}
    for entry in entries:
        if entry.part.component:
            arrays.setdefault(entry.weight.row.role, []).append(_array(entry, name, end))
        end += entry.nbytes
    tensors = tuple(
        OutputTensor(
            name=weight.row.source,
            role=weight.row.role,
            parts=(weight.ref,),
            grid=weight.grid,
            packer=weight.packer,
            arrays=tuple(arrays[weight.row.role]),
            in_one_piece=weight.in_one_piece,
        )
        for weight in weights
    )
    return Shard(name, header + content, end, tensors, tuple(entries))


def _array(entry: Entry, file: str, offset: int) -> StoredArray:
    part = entry.part
    rows = -(-entry.weight.ref.rows // part.rows_each)
    return StoredArray(
        name=entry.name,
        component=part.component,
        file=file,
        offset=offset,
        row_bytes=entry.nbytes // rows,
        rows=rows,
        rows_each=part.rows_each,
        lines=part.lines,
    )


def _part_bytes(part: Part) -> int:
    return math.prod(part.shape) * ITEM_BYTES[part.dtype]


def index_of(shards: Sequence[Shard]) -> bytes:
    """The index of several files."""
    weight_map = {entry.name: shard.name for shard in shards for entry in shard.entries}
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    return index_file(total, weight_map)


def json_file(fields: object) -> bytes:
    """A JSON document as files of the folder hold it."""
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
