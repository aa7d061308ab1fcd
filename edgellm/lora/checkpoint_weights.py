"""A checkpoint's weights as adapters see them, for families that edgellm knows and any other.

Of a known family its own rows say what a tensor is. Of another, names and shapes do: tables of
tokens by the names that transformers gives them, turned matrices (Conv1D) by what the adapter says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from edgellm.architectures import family_of
from edgellm.architectures.config import Config
from edgellm.architectures.family import Kind, TensorRow
from edgellm.errors import UnsupportedModel
from edgellm.lora.adapter import Adapter
from edgellm.lora.edit import Target
from edgellm.lora.named_weights import NamedWeight, NamedWeights
from edgellm.source.matching import equal
from edgellm.source.safetensors_file import SafetensorsFile, StoredTensor
from edgellm.tensors import transposed

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
"""What transformers' models call their table of tokens (``get_input_embeddings``)."""

HEADS = ("lm_head", "embed_out")
"""And their output head; the first is what a model that ties it has it called."""

TURNED_EMBEDDING = "lora_embedding_A"


def named_weights(
    where: str,
    config: Mapping[str, Any],
    files: Sequence[SafetensorsFile],
    adapters: Sequence[Adapter] = (),
) -> NamedWeights:
    """The weights of a folder with ``config.json`` and these safetensors files, by their names.

    ``where`` names it in messages. ``adapters`` are asked how their weights lie where the family
    is not known. Weights are read only where a head that should be tied is stored too.
    """
    rows = _family_rows(config, where)
    turned = set() if rows else _turned(adapters)
    weights = {
        name: _weight(file, entry, rows.get(name), turned)
        for file in files
        for name, entry in file.tensors.items()
    }
    return _with_tables(where, config, weights, rows)


def _weight(
    file: SafetensorsFile, entry: StoredTensor, row: TensorRow | None, turned: set[str]
) -> NamedWeight:
    name = entry.name
    ref = replace(file, tensors={name: _as_matrix(entry)}).ref(name)
    if row is None:
        kind: Kind = _kind(name, entry)
        turn = kind == "linear" and len(entry.shape) == 2 and _is_among(name, turned)
    else:
        kind, turn = row.kind, row.transposed
        ref = ref.with_role(row.role)
    if turn:
        ref = transposed(ref)
    # Of a stack of experts, the adapter must know how many there are.
    shape = ref.shape if turn else entry.shape
    return NamedWeight(Target(name, shape, kind, turn), ref)


def _with_tables(
    where: str,
    config: Mapping[str, Any],
    weights: dict[str, NamedWeight],
    rows: Mapping[str, TensorRow],
) -> NamedWeights:
    embedding = next((n for n, each in weights.items() if each.target.kind == "embedding"), None)
    head = next((n for n, each in weights.items() if each.target.kind == "head"), None)
    tied = head is None and embedding is not None
    if head is None:
        named = next((name for name, row in rows.items() if row.kind == "head"), None)
        head = named or f"{HEADS[0]}.weight"
    elif (
        embedding is not None
        and text_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
        and equal(weights[embedding].ref, weights[head].ref)
    ):
        tied = True
        del weights[head]
    return NamedWeights(
        where, weights, embedding, head, tied, model_type=str(config.get("model_type", ""))
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of ``config`` about the language model, where that is one part of several."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and "vocab_size" not in config else config


def _family_rows(config: Mapping[str, Any], where: str) -> dict[str, TensorRow]:
    """The family's rows by the checkpoint's names, a tied head's too; none for another family."""
    try:
        family = family_of(config)
        decoder = family.read(Config(dict(config), where=where))
    except UnsupportedModel:
        return {}
    rows = {row.source: row for row in family.tensors(replace(decoder, tied_head=False))}
    prefix = family.base_prefix
    return rows | {
        name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)
    }


def _turned(adapters: Sequence[Adapter]) -> set[str]:
    """Weights that an adapter says are stored ``[in, out]``."""
    return {
        key
        for adapter in adapters
        if adapter.config.get("fan_in_fan_out")
        for key, parts in adapter.parts.items()
        if TURNED_EMBEDDING not in parts
    }


def _is_among(name: str, keys: set[str]) -> bool:
    return name in keys or any(name.endswith(f".{key}") or key.endswith(f".{name}") for key in keys)


def _kind(name: str, entry: StoredTensor) -> Kind:
    module = name.removesuffix(".weight").rpartition(".")[2]
    if len(entry.shape) < 2:
        return "bias" if name.endswith("bias") else "norm"
    if module in EMBEDDINGS:
        return "embedding"
    return "head" if module in HEADS else "linear"


def _as_matrix(entry: StoredTensor) -> StoredTensor:
    """A stack of matrices as one, its rows below each other: they can be loaded apart then."""
    if len(entry.shape) != 3:
        return entry
    stack, rows, columns = entry.shape
    return replace(entry, shape=(stack * rows, columns))
