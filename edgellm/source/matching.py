"""Stored tensors put where the family's description wants them; what is left over is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from edgellm.architectures.decoder import Decoder
from edgellm.architectures.family import Family, TensorRow
from edgellm.architectures.row_order import as_network_takes
from edgellm.errors import SourceError, TensorError
from edgellm.tensors import SLAB_BYTES, TensorRef, rows_within, transposed

LISTED_NAMES = 8

EXPERT_NUMBER = re.compile(r"(?:\.experts|_exps)\.(\d+)\.")
"""In the name of a tensor of one expert, which one."""


def match(
    rows: Iterable[TensorRow],
    stored: Mapping[str, TensorRef],
    *,
    by: Literal["source", "role"],
    where: str,
    ignored: Callable[[str], bool],
) -> dict[str, TensorRef]:
    """Tensors by role, in the order of ``rows``; nothing is loaded.

    ``by`` says which of a row's names the source uses: a checkpoint's, whose Conv1D matrices are
    turned round and whose rows are put in the network's order here, or GGUF's. ``where`` names the
    source in messages. Raises ``TensorError`` listing every tensor that is missing, not wanted
    (unless ``ignored``), or of a shape that the config does not give it.
    """
    expected = {getattr(row, by): row for row in rows}
    missing = [name for name in expected if name not in stored]
    extra = [name for name in stored if name not in expected and not ignored(name)]
    complaints = []
    if missing:
        complaints.append(f"{len(missing)} tensors are missing: {listed(missing)}")
    if extra:
        complaints.append(
            f"{len(extra)} tensors have no place in the network that the config describes, so it "
            f"would compute something else than it was trained to: {listed(extra)}"
        )
    if complaints:
        raise TensorError(
            f"{where}: {'; '.join(complaints)}. The config and the weights belong to different "
            "models, or the download is incomplete: fetch the model again"
        )
    result = {}
    for name, row in expected.items():
        ref = stored[name]
        if row.transposed and by == "source" and len(ref.shape) == 2:
            ref = transposed(ref)
        if ref.shape != row.shape:
            raise TensorError(_wrong_shape(where, row, ref))
        if by == "source":
            ref = as_network_takes(ref, row)
        result[row.role] = ref.with_role(row.role)
    return result


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are; those of experts in runs (``0-7``)."""
    runs = in_runs(names)
    shown = list(runs)[:LISTED_NAMES]
    rest = len(names) - sum(runs[name] for name in shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def in_runs(names: Iterable[str]) -> dict[str, int]:
    """``names`` with those that differ in the number of an expert alone as one; how many each is.

    ``experts.0-7.w1.weight`` for eight names, ``experts.0,2-3.w1.weight`` for three.
    """
    numbers: dict[str, list[int]] = {}
    for name in names:
        numbered = EXPERT_NUMBER.search(name)
        if numbered is None:
            numbers[name] = []
            continue
        template = f"{name[: numbered.start(1)]}{{}}{name[numbered.end(1) :]}"
        numbers.setdefault(template, []).append(int(numbered[1]))
    return {
        name.replace("{}", _ranges(sorted(found))) if found else name: len(found) or 1
        for name, found in numbers.items()
    }


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}-{high}" if high > low else str(low) for low, high in runs)


def head_row(family: Family, decoder: Decoder) -> TensorRow:
    """The row of the output head, also where the decoder ties it."""
    untied = replace(decoder, tied_head=False)
    return next(row for row in family.tensors(untied) if row.kind == "head")


def embedding_row(family: Family, decoder: Decoder) -> TensorRow:
    """The row of the token embedding."""
    return next(row for row in family.tensors(decoder) if row.kind == "embedding")


def equal(left: TensorRef, right: TensorRef) -> bool:
    """Whether both hold the same values; reads slab by slab until they differ."""
    if left.shape != right.shape:
        return False
    step = rows_within(SLAB_BYTES, left.columns)
    return all(
        np.array_equal(
            left.load(start, min(start + step, left.rows)),
            right.load(start, min(start + step, left.rows)),
        )
        for start in range(0, left.rows, step)
    )


def check_vocabulary(where: str, tokens: int, rows: int) -> tuple[str, ...]:
    """A note where the embedding has more rows than there are tokens.

    Raises ``SourceError`` where it has fewer: the tokens beyond would read past its end.
    """
    if tokens > rows:
        raise SourceError(
            f"{where}: the tokenizer has token ids up to {tokens - 1} and the embedding {rows} "
            "rows: tokenizer and weights belong to different models, or the embedding was not "
            "resized when tokens were added"
        )
    if tokens < rows:
        return (
            f"the embedding has {rows} rows for {tokens} tokens: the last {rows - tokens} are "
            "padding",
        )
    return ()


def _wrong_shape(where: str, row: TensorRow, ref: TensorRef) -> str:
    message = (
        f"{where}: tensor {ref.name} has shape {list(ref.shape)} as [out, in] and the config gives "
        f"it {list(row.shape)}"
    )
    if row.kind in ("embedding", "head") and ref.shape[1:] == row.shape[1:]:
        return message + (
            ": the vocabulary of the weights and vocab_size differ; correct vocab_size if tokens "
            "were added, or fetch the model again"
        )
    return message + ": the config belongs to another model, or was edited; fetch the model again"
