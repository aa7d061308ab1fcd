"""Folders that hold an encoder with a decoder (T5, BART and their kin), as transformers has it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.encoders import seq2seq_family_of
from edgellm.architectures.seq2seq import (
    SEQ2SEQ_HARMLESS,
    SEQ2SEQ_NEUTRAL,
    Seq2Seq,
    Seq2SeqFamily,
)
from edgellm.errors import UnsupportedModel
from edgellm.json_file import read_json
from edgellm.source.checkpoint import licence_of, read_checkpoint, refuse_other_dtypes
from edgellm.source.encoder_model import Seq2SeqSource
from edgellm.source.matching import check_vocabulary, equal, match
from edgellm.tensors import TensorRef, constant
from edgellm.tokenization import Tokenizer

UNHEEDED: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "min_length": (None, 0),
    "length_penalty": (None, 1.0),
    "repetition_penalty": (None, 1.0),
    "do_sample": (None, False),
}
"""What a generation config may ask for that nothing here does unasked, and when it asks nothing."""


def open_seq2seq_folder(path: Path, *, ignore_config_keys: Collection[str] = ()) -> Seq2SeqSource:
    """The model in ``path``; headers and the tokenizer are read, weights are not.

    Weights are read only where copies of the embedding are stored too, to compare them. Raises
    ``SourceError`` for what is missing or damaged, ``UnsupportedModel`` for what is not understood.
    """
    config = read_json(path / "config.json")
    family = seq2seq_family_of(config)
    where = str(path / "config.json")
    named = config.get("architectures")
    if named not in (None, [family.architecture]):
        raise UnsupportedModel(
            f"{where}: the architecture is {named!r}, and of {family.model_type} edgellm converts "
            f"{family.architecture}: its head computes something else"
        )
    checkpoint = read_checkpoint(path)
    refuse_other_dtypes(path, checkpoint.tensors)
    reader = Config(
        config,
        ignore=ignore_config_keys,
        where=where,
        harmless=SEQ2SEQ_HARMLESS,
        neutral=SEQ2SEQ_NEUTRAL,
    )
    model = family.describe(reader)
    stored, model, notes = _settle_tables(dict(checkpoint.tensors), family, model, where)
    tensors = match(
        family.tensors(model),
        stored,
        by="source",
        where=str(path),
        ignored=lambda name: name.endswith(family.ignored_tensors),
    )
    tokenizer = Tokenizer.from_hf_folder(path)
    notes += check_vocabulary(str(path), tokenizer.vocab_size, model.vocab_size)
    if model.answer_vocab_size is not None:
        check_vocabulary(str(path), tokenizer.answer_vocab_size, model.answer_vocab_size)
    file = path / "generation_config.json"
    generation = read_json(file) if file.is_file() else config
    notes += _unheeded(generation)
    return Seq2SeqSource(
        name=path.resolve().name,
        path=path,
        config=config,
        family=family,
        model=model,
        max_tokens=model.context_length,
        tensors=tensors,
        tokenizer=tokenizer,
        weight_files=checkpoint.files,
        generation=generation,
        licence=licence_of(path / "README.md"),
        notes=(*reader.notes, *notes),
    )


def _settle_tables(
    stored: dict[str, TensorRef], family: Seq2SeqFamily, model: Seq2Seq, where: str
) -> tuple[dict[str, TensorRef], Seq2Seq, tuple[str, ...]]:
    """One embedding for both sides, under the name that the family has for it, or one for each; a
    head of its own where one is stored that differs; tables of positions that can be computed.

    Raises ``UnsupportedModel`` where the sides should share an embedding and theirs differ.
    """
    shares = model.answer_vocab_size is None
    present = [name for name in family.copies if shares and name in stored]
    if family.shared not in stored and present:
        stored[family.shared] = stored[present[0]]
    for name in present:
        copy = stored.pop(name)
        if not equal(copy, stored[family.shared]):
            raise UnsupportedModel(
                f"{where}: {name} and {family.shared} differ, and this config has one embedding "
                "for both sides"
            )
    rows = {row.role: row.source for row in family.tensors(replace(model, tied_head=False))}
    if model.head_bias and rows["output.bias"] not in stored:
        # transformers makes it zero then, and does not save it in some versions.
        zero = constant(rows["output.bias"], [[0.0] * model.head_rows])
        stored[rows["output.bias"]] = zero
    if family.positions is not None and model.positions is not None:
        table = family.positions(model.positions, model.hidden_size)
        for side in ("enc", "dec"):
            name = rows[f"{side}.position_embd.weight"]
            stored.setdefault(name, constant(name, table))
    head, tied_to = rows["output.weight"], rows[model.answer_embedding]
    if not model.tied_head or head not in stored:
        return stored, model, ()
    if tied_to not in stored:  # of two names for one table, some tools keep the head's
        stored[tied_to] = stored.pop(head)
        return stored, model, ()
    if equal(stored[head], stored[tied_to]):
        del stored[head]
        return stored, model, ()
    return stored, replace(model, tied_head=False), ()


def _unheeded(generation: Mapping[str, Any]) -> tuple[str, ...]:
    asked = [
        f"{name} = {generation[name]!r}"
        for name, nothing in UNHEEDED.items()
        if name in generation and generation[name] not in nothing
    ]
    if not asked:
        return ()
    return (
        f"the generation config asks for {', '.join(asked)}, which edgellm run does not do: it "
        "takes the likeliest token each time, or draws as its options say",
    )
