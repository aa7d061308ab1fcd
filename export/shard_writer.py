"""The tensors of merged shards, computed, written and hashed piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgellm.errors import AdapterError, TensorError
from edgellm.export.ordered_digest import OrderedDigest
from edgellm.export.to_safetensors import OutputTensor, Piece, Shard, stored_rows
from edgellm.export.writer import StagedFolder
from edgellm.lora.named_weights import ChangedWeight
from edgellm.quant.floats import ENCODERS, decode
from edgellm.source.safetensors_file import ITEM_BYTES
from edgellm.source.weight_file import Bytes
from edgellm.tensors import Array, check_finite, rows_within

CHUNK_BYTES = 512 << 10
"""Float32 bytes that are changed and rounded at once: about what a core's own cache holds."""


@dataclass(frozen=True, slots=True)
class Done:
    """A piece that was written: values that adapters changed, and those that rounding took back."""

    piece: Piece
    changed: int = 0
    vanished: int = 0


class ShardWriter:
    """Computes pieces, writes them into ``staged``, and hashes what was read and what was written.

    Pieces may be worked on by several threads, if they are begun in order.
    """

    def __init__(self, shards: Sequence[Shard], staged: StagedFolder) -> None:
        self.shards = shards
        self._staged = staged
        self.base_digests = [OrderedDigest() for _ in shards]
        self.file_digests = [OrderedDigest() for _ in shards]

    def stop(self) -> None:
        """Let no thread wait for a piece that will never come."""
        for digest in (*self.base_digests, *self.file_digests):
            digest.stop()

    def work(self, piece: Piece) -> Done:
        """``piece``, done.

        Raises ``TensorError`` or ``AdapterError`` naming a tensor whose merged values do not fit
        its dtype.
        """
        shard = self.shards[piece.shard]
        raw = None
        if piece.source is not None:
            start, nbytes = piece.source
            raw = shard.base.file.read(start, nbytes)
            self.base_digests[piece.shard].add(piece.source[0], raw)
        if piece.target is None:
            return Done(piece)
        offset, _ = piece.target
        changed = vanished = 0
        if piece.tensor is None:
            content: Bytes = np.frombuffer(shard.header, np.uint8)
        else:
            tensor = shard.tensors[piece.tensor]
            content, changed, vanished = _content(tensor, piece, raw)
        self._staged.write_at(shard.name, offset, content)
        self._staged.start_writeback(shard.name, offset, len(content))
        self.file_digests[piece.shard].add(offset, content)
        return Done(piece, changed, vanished)


def _content(tensor: OutputTensor, piece: Piece, raw: Bytes | None) -> tuple[Bytes, int, int]:
    """The bytes of ``piece``; how many of its values were changed, and how many of them vanished.

    A value vanishes when it was changed and comes out as it was: the change is smaller than half a
    step of the dtype. Counted where the dtype stays the base's, in the first chunk of the piece: a
    sample of one row in sixteen, or more, which costs a tenth of the time less than all.
    """
    if tensor.is_copied:
        assert raw is not None
        return raw, 0, 0
    count, columns = piece.stop - piece.start, stored_rows(tensor)[1]
    stored = None if raw is None else raw.reshape(count, -1)
    content = np.empty((count, columns * ITEM_BYTES[tensor.dtype]), np.uint8)
    step = count if tensor.in_one_piece else rows_within(CHUNK_BYTES, columns)
    changed = vanished = 0
    for first in range(0, count, step):
        here = slice(first, min(first + step, count))
        start, stop = piece.start + here.start, piece.start + here.stop
        before = _rows_before(tensor, start, stop, None if stored is None else stored[here])
        if tensor.change is None or tensor.change.edit is None:
            content[here] = _encoded(tensor, before, start)
            continue
        rows = _rows_after(tensor.change, before, start, stop)
        content[here] = _encoded(tensor, rows, start)
        if first == 0 and stored is not None and _keeps_dtype(tensor):
            changed, vanished = _counted(before, rows, stored[here], content[here], tensor.dtype)
    return content.reshape(-1), changed, vanished


def _keeps_dtype(tensor: OutputTensor) -> bool:
    return tensor.before is not None and tensor.dtype == tensor.before.dtype


def _counted(
    before: Array, after: Array, stored: Bytes, written: Bytes, dtype: str
) -> tuple[int, int]:
    """How many values differ, and how many of these are the same bytes all the same."""
    moved = before != after
    item = f"u{ITEM_BYTES[dtype]}"
    kept = moved & (written.view(item) == stored.view(item))
    return int(np.count_nonzero(moved)), int(np.count_nonzero(kept))


def _rows_before(tensor: OutputTensor, start: int, stop: int, stored: Bytes | None) -> Array:
    """Rows ``start:stop`` as the file has them, float32, before any edit; not to be changed."""
    if stored is not None:
        assert tensor.before is not None
        return decode(stored, tensor.before.dtype.lower())
    assert tensor.change is not None
    if tensor.in_one_piece:
        return np.ascontiguousarray(tensor.change.start.load().T)
    return tensor.change.start.load_rows(start, stop)


def _rows_after(change: ChangedWeight, before: Array, start: int, stop: int) -> Array:
    if not change.target.transposed:
        return change.apply(before.copy(), start, stop)
    rows = before.T.copy()
    step = rows_within(CHUNK_BYTES, rows.shape[1])
    for first in range(0, len(rows), step):
        last = min(first + step, len(rows))
        rows[first:last] = change.apply(rows[first:last], first, last)
    return np.ascontiguousarray(rows.T)


def _encoded(tensor: OutputTensor, rows: Array, first_row: int) -> Bytes:
    """``rows`` rounded once to the tensor's dtype, to nearest, ties to even."""
    try:
        if tensor.dtype == "F32":
            check_finite(rows, tensor.name, first_row=first_row)
        return ENCODERS[tensor.dtype.lower()](np.ascontiguousarray(rows))
    except TensorError as error:
        if tensor.change is None:
            raise TensorError(f"tensor {tensor.name}: {error}") from error
        raise AdapterError(
            f"merged weight {tensor.name} does not fit {tensor.dtype}: {error}. The adapter is "
            "damaged or its weight too large, or --dtype must reach further (bf16, f32)"
        ) from error
