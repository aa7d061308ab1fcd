"""Adapters merged into a model: each changed tensor is computed slab by slab when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgellm.architectures.family import TensorRow
from edgellm.architectures.row_order import as_checkpoint_has, as_network_takes
from edgellm.errors import AdapterError, TensorError
from edgellm.lora.adapter import Adapter
from edgellm.lora.binding import Binding, Combination
from edgellm.lora.edit import Target
from edgellm.lora.named_weights import (
    ChangedWeight,
    NamedWeight,
    NamedWeights,
    edits_of,
    merge_by_name,
)
from edgellm.lora.reading.gguf_adapter import in_checkpoint_terms
from edgellm.lora.record import MergeRecord
from edgellm.lora.replication import replicated
from edgellm.lora.vocabulary import settled_tokenizer
from edgellm.source.matching import embedding_row, head_row
from edgellm.source.model import ModelSource
from edgellm.tensors import COLUMN_CHUNK_BYTES, Array, TensorRef, check_finite, rows_within


@dataclass(frozen=True)
class Merge:
    """What was merged into a ``ModelSource``, and what that does to each weight.

    ``base`` is the model before. ``bindings`` are by role, in the order of the ``adapters``.
    ``changed`` are the roles of the tensors that differ from the base's. ``record`` fills while
    they are loaded. ``into`` says which base it is (``full``, ``dequantized nf4``), ``reason`` why.
    """

    base: ModelSource
    adapters: tuple[Adapter, ...]
    combination: Combination
    bindings: tuple[Mapping[str, Binding], ...]
    changed: tuple[str, ...]
    record: MergeRecord
    into: str = ""
    reason: str = ""


def merged_source(
    source: ModelSource, adapters: Sequence[Adapter], combination: Combination
) -> ModelSource:
    """``source`` as if the adapters had been trained into it; ``merge`` of it says what changed.

    No weight is read, save where two tables must be compared. Names, roles and dtypes are the
    base's; the vocabulary, the tokenizer, the number of layers and the tie of the head are what
    the adapters make of them. Raises ``AdapterError`` for whatever does not match the base.
    """
    given = [_in_checkpoint_terms(adapter, source) for adapter in adapters]
    base = replicated(source, given)
    merged = merge_by_name(_by_name(base), given, combination)
    roles = {row.source: row.role for row in _rows(base)}
    changed = {roles[name]: weight for name, weight in merged.changed.items()}
    embedding = changed.get(embedding_row(base.family, base.decoder).role)
    vocab_size = embedding.start.shape[0] if embedding else base.decoder.vocab_size
    decoder = replace(base.decoder, vocab_size=vocab_size, tied_head=merged.tied)
    record = MergeRecord()
    tensors = {
        row.role: _tensor(row, base, changed.get(row.role), record)
        for row in base.family.tensors(decoder)
    }
    tokenizer, notes = settled_tokenizer(base, given, vocab_size)
    return replace(
        base,
        config={**base.config, "vocab_size": vocab_size, "tie_word_embeddings": merged.tied},
        decoder=decoder,
        tensors=tensors,
        tokenizer=tokenizer,
        notes=(
            *(note for note in base.notes if note not in notes.outdated),
            *notes.new,
            *merged.notes,
            *(note for adapter in given for note in adapter.notes),
        ),
        merge=Merge(
            base=source,
            adapters=tuple(adapters),
            combination=combination,
            bindings=tuple(
                {roles[name]: binding for name, binding in found.items()}
                for found in merged.bindings
            ),
            changed=tuple(role for role in tensors if role in changed),
            record=record,
        ),
    )


def bindings(source: ModelSource, adapter: Adapter) -> Mapping[str, Binding]:
    """The changes of ``adapter`` by role. Raises ``AdapterError`` for keys that match nothing."""
    adapter = _in_checkpoint_terms(adapter, source)
    base = replicated(source, [adapter])
    roles = {row.source: row.role for row in _rows(base)}
    return {roles[name]: edit for name, edit in edits_of(_by_name(base), adapter).items()}


def _in_checkpoint_terms(adapter: Adapter, source: ModelSource) -> Adapter:
    return in_checkpoint_terms(adapter, source) if adapter.naming == "gguf" else adapter


def _rows(source: ModelSource) -> list[TensorRow]:
    """Every tensor that an adapter may name, a tied head among them."""
    rows = list(source.family.tensors(source.decoder))
    return [*rows, head_row(source.family, source.decoder)] if source.decoder.tied_head else rows


def _by_name(source: ModelSource) -> NamedWeights:
    weights = {
        row.source: NamedWeight(
            Target(row.source, row.shape, row.kind, row.transposed),
            as_checkpoint_has(source.tensors[row.role], row),
        )
        for row in source.family.tensors(source.decoder)
    }
    return NamedWeights(
        where=source.name,
        weights=weights,
        embedding=embedding_row(source.family, source.decoder).source,
        head=head_row(source.family, source.decoder).source,
        tied=source.decoder.tied_head,
    )


def _tensor(
    row: TensorRow, base: ModelSource, changed: ChangedWeight | None, record: MergeRecord
) -> TensorRef:
    """The tensor of ``row`` after the merge, its changes recorded as it is loaded."""
    before = base.tensors.get(row.role)
    if before is None:  # a head that was tied
        table = base.tensors[embedding_row(base.family, base.decoder).role]
        before = replace(table, name=row.source, role=row.role)
    shape = changed.start.shape if changed else before.shape
    if shape != row.shape:
        raise AdapterError(
            f"{row.source} would have shape {list(shape)} where {list(row.shape)} is needed: the "
            "adapter was trained with another vocabulary and holds only one of embedding and head; "
            "save it again with save_embedding_layers=True"
        )
    if changed is None:
        return before
    # Adapters know the rows as the checkpoint has them.
    merged = _recorded(as_checkpoint_has(before, row), changed, record)
    return as_network_takes(merged, row)


def _recorded(before: TensorRef, changed: ChangedWeight, record: MergeRecord) -> TensorRef:
    start_ref, name, role = changed.start, before.name, before.role

    def rows_before(start: int, stop: int) -> Array:
        """The base's rows, zero where the vocabulary was smaller."""
        rows: Array = np.zeros((stop - start, before.columns), dtype=np.float32)
        if start < before.rows:
            rows[: before.rows - start] = before.load_rows(start, min(stop, before.rows))
        return rows

    def load_rows(start: int, stop: int) -> Array:
        values = start_ref.load_rows(start, stop)
        base = values if start_ref.load_rows is before.load_rows else rows_before(start, stop)
        step = rows_within(COLUMN_CHUNK_BYTES, start_ref.columns)
        for first in range(0, stop - start, step):
            rows = values[first : first + step]
            own = base[first : first + step].copy()
            with np.errstate(over="ignore", invalid="ignore"):  # looked for below, and explained
                after = changed.apply(rows, start + first, start + first + len(rows))
            if after is not rows:
                rows[...] = after
            _check_finite(rows, own, name, start + first)
            record.note(role, start + first, own, rows)
        return values

    nbytes = before.nbytes * start_ref.size // before.size
    result = replace(
        before, shape=start_ref.shape, nbytes=nbytes, load_rows=load_rows, column_loader=None
    )
    record.watch(role, result.rows, lambda: _load_all(result))
    return result


def _load_all(ref: TensorRef) -> None:
    step = rows_within(COLUMN_CHUNK_BYTES, ref.columns)
    for start in range(0, ref.rows, step):
        ref.load(start, min(start + step, ref.rows))


def _check_finite(rows: Array, before: Array, name: str, first: int) -> None:
    """Raise ``AdapterError`` where a merge made NaN or Inf of what was finite."""
    try:
        check_finite(rows, name, first_row=first)
    except TensorError as error:
        check_finite(before, name, first_row=first)
        raise AdapterError(
            f"merging makes {name} overflow ({error}), and before it was finite: the adapter is "
            "damaged, or its scale or weight is far too large"
        ) from error
