"""Folders that hold an encoder: a Hugging Face folder, or one of sentence-transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm.architectures.config import Config
from edgellm.architectures.encoder import (
    ENCODER_HARMLESS,
    ENCODER_NEUTRAL,
    Encoder,
    EncoderFamily,
    Task,
)
from edgellm.architectures.encoders import encoder_family_of, is_encoder
from edgellm.architectures.family import TensorRow
from edgellm.errors import SourceError, UnsupportedModel
from edgellm.json_file import read_json
from edgellm.source.checkpoint import licence_of, read_checkpoint, refuse_other_dtypes
from edgellm.source.encoder_model import EncoderSource
from edgellm.source.matching import check_vocabulary, equal, listed, match
from edgellm.source.safetensors_file import read_safetensors
from edgellm.source.sentence_pipeline import (
    Dense,
    PipelineFolder,
    SentencePipeline,
    read_pipeline,
)
from edgellm.tensors import TensorRef
from edgellm.tokenization import Tokenizer

OLD_ENDINGS = {".gamma": ".weight", ".beta": ".bias"}
"""What norms' tensors were called in TensorFlow, and still are in the first checkpoints."""

MEAN_NOTE = (
    "nothing here says how token vectors become one (no modules.json): embeddings are their mean, "
    "not normalized, as sentence-transformers does then"
)


def holds_encoder(folder: Path) -> bool:
    """Whether ``folder`` holds an encoder that edgellm converts; reads its config alone."""
    pipeline = read_pipeline(folder)
    config = (pipeline.model if pipeline else folder) / "config.json"
    return config.is_file() and is_encoder(read_json(config))


def open_encoder_folder(folder: Path, *, ignore_config_keys: Collection[str] = ()) -> EncoderSource:
    """The encoder in ``folder``; headers and the tokenizer are read, weights are not.

    Weights are read only where a head that should be tied is stored too, to compare the two.
    Raises ``SourceError`` for what is missing or damaged, ``UnsupportedModel`` for what is not
    understood.
    """
    outer = read_pipeline(folder)
    path = outer.model if outer else folder
    config = read_json(path / "config.json")
    family = encoder_family_of(config)
    where = str(path / "config.json")
    checkpoint = read_checkpoint(path)
    refuse_other_dtypes(path, checkpoint.tensors)
    stored = _canonical(checkpoint.tensors, family)
    task, architecture = _task(config, family, stored, outer, where)
    pooler = outer is None and f"{family.base_prefix}pooler.dense.weight" in stored
    reader = Config(
        config,
        ignore=ignore_config_keys,
        where=where,
        harmless=ENCODER_HARMLESS,
        neutral=ENCODER_NEUTRAL,
    )
    encoder = family.describe(reader, task, pooler=pooler)
    stored, encoder, notes = _settle_head(stored, family, encoder)
    rows = list(family.tensors(encoder))
    wanted = {row.source for row in rows}
    heads = [
        name for name in stored if name not in wanted and name.startswith(family.head_prefixes)
    ]
    tensors = match(
        rows,
        stored,
        by="source",
        where=str(path),
        ignored=lambda name: name in heads or name.endswith(family.ignored_tensors),
    )
    if heads:
        notes += (f"left out, for {architecture} does not use it: {listed(heads)}",)
    tokenizer = Tokenizer.from_hf_folder(path)
    notes += check_vocabulary(str(path), tokenizer.vocab_size, encoder.vocab_size)
    pipeline = None
    if task == "embeddings":
        pipeline = outer.pipeline if outer else SentencePipeline()
        notes += () if outer else (MEAN_NOTE,)
    dense = pipeline.dense if pipeline else ()
    for number, each in enumerate(dense):
        tensors |= _dense_tensors(each, f"dense.{number}")
    _check_widths(dense, encoder.hidden_size * len(pipeline.pooling if pipeline else ()))
    return EncoderSource(
        name=folder.resolve().name,
        path=folder,
        config=config,
        family=family,
        encoder=encoder,
        pipeline=pipeline,
        max_tokens=_max_tokens(encoder, path, outer),
        tells_types=encoder.token_types > 1 and _tells_types(path),
        tensors=tensors,
        tokenizer=tokenizer,
        weight_files=(*checkpoint.files, *(each.file for each in dense)),
        files=outer.files if outer else {},
        licence=licence_of(folder / "README.md"),
        notes=(*reader.notes, *notes),
    )


def _canonical(stored: Mapping[str, TensorRef], family: EncoderFamily) -> dict[str, TensorRef]:
    """Tensors by the names of a checkpoint with a head, whichever it is and however old."""
    renamed = {}
    for name, ref in stored.items():
        for old, new in OLD_ENDINGS.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        renamed[name] = ref
    if any(name.startswith(family.base_prefix) for name in renamed):
        return renamed
    return {
        name if name.startswith(family.head_prefixes) else family.base_prefix + name: ref
        for name, ref in renamed.items()
    }


def _task(
    config: Mapping[str, Any],
    family: EncoderFamily,
    stored: Mapping[str, TensorRef],
    outer: PipelineFolder | None,
    where: str,
) -> tuple[Task, str]:
    """What the checkpoint is for, and the class of transformers' that says so."""
    base = f"{family.class_prefix}Model"
    if outer is not None:
        return "embeddings", base
    listed_classes = config.get("architectures")
    if isinstance(listed_classes, list) and len(listed_classes) == 1:
        architecture = str(listed_classes[0])
        return family.task_of(architecture, where), architecture
    heads = [name for name in stored if name.startswith(family.head_prefixes)]
    heads = [name for name in heads if not name.startswith(f"{family.base_prefix}pooler.")]
    if heads:
        raise UnsupportedModel(
            f"{where}: architectures is {listed_classes!r}, so nothing says what the head is for "
            f"({listed(heads)}): add the class that transformers loads it with, such as "
            f'["{family.class_prefix}ForSequenceClassification"]'
        )
    return "embeddings", base


def _settle_head(
    stored: dict[str, TensorRef], family: EncoderFamily, encoder: Encoder
) -> tuple[dict[str, TensorRef], Encoder, tuple[str, ...]]:
    """One table where the config ties head and embedding; its bias under the head's own name.

    Two tables that differ are kept apart, as transformers does (``PreTrainedModel.tie_weights``).
    """
    head = encoder.head
    if head.task != "masked_lm":
        return stored, encoder, ()
    untied = replace(encoder, head=replace(head, tied=False))
    rows = {row.role: row.source for row in family.tensors(untied)}
    weight, bias = rows["output.weight"], rows["output.bias"]
    twin = weight.removesuffix(".weight") + ".bias"
    stored = dict(stored)
    if twin != bias and twin in stored:
        # The table has a bias of its own, which is the head's only where the table is tied.
        own = stored.pop(twin)
        if bias not in stored or not head.tied:
            stored[bias] = own
    table = rows["token_embd.weight"]
    if not head.tied or weight not in stored or table not in stored:
        return stored, encoder, ()
    if equal(stored[table], stored[weight]):
        del stored[weight]
        return stored, encoder, ()
    note = (
        f"the config ties the output head to the embedding, but {weight} and {table} differ: both "
        "were kept, as transformers does"
    )
    return stored, untied, (note,)


def _dense_tensors(dense: Dense, role: str) -> dict[str, TensorRef]:
    """The tensors of a product behind the pooling, under ``role``."""
    stored = read_safetensors(dense.file)
    rows = [TensorRow("linear.weight", f"{role}.weight", (dense.out, dense.into), "linear")]
    if dense.biased:
        rows.append(TensorRow("linear.bias", f"{role}.bias", (dense.out,), "bias"))
    refs = {name: stored.raw(name).ref() for name in stored.tensors}
    where = str(dense.file.parent)
    return match(rows, refs, by="source", where=where, ignored=lambda name: False)


def _check_widths(dense: Sequence[Dense], width: int) -> None:
    """Raise ``SourceError`` where a product does not take what comes before it."""
    for each in dense:
        if each.into != width:
            raise SourceError(
                f"{each.file.parent} takes vectors of {each.into} values, and those before it have "
                f"{width}: the folders belong to different models; fetch them again"
            )
        width = each.out


def _max_tokens(encoder: Encoder, path: Path, outer: PipelineFolder | None) -> int:
    """Tokens that a text is cut to: sentence-transformers' own, the tokenizer's, the table's."""
    longest = encoder.context_length
    if outer is not None and outer.max_tokens is not None:
        return min(longest, outer.max_tokens)
    settings = path / "tokenizer_config.json"
    said = read_json(settings).get("model_max_length") if settings.is_file() else None
    if isinstance(said, int | float) and not isinstance(said, bool) and 1 <= said < longest:
        return int(said)
    return longest


def _tells_types(path: Path) -> bool:
    """Whether transformers gives a model the token types that the tokenizer knows.

    Classes named after BERT do; the general one does not, in version 5, where its config names no
    such input.
    """
    settings = path / "tokenizer_config.json"
    said = read_json(settings) if settings.is_file() else {}
    inputs = said.get("model_input_names")
    if isinstance(inputs, list):
        return "token_type_ids" in inputs
    return said.get("tokenizer_class") != "TokenizersBackend"
