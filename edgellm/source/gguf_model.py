"""A GGUF file as a source of weights: blocks dequantized, llama.cpp's rearrangements undone."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from edgellm.architectures import config_from_gguf, family_of
from edgellm.architectures.config import Config
from edgellm.architectures.gguf_latent import joined
from edgellm.architectures.gguf_rows import as_checkpoint_stores, as_described, name_in_file
from edgellm.errors import TensorError, UnsupportedModel
from edgellm.generation_defaults import generation_from_gguf
from edgellm.lora import lineage
from edgellm.quant import floats, ggml
from edgellm.source.gguf_file import GgufFile, GgufTensor, read_gguf_model
from edgellm.source.matching import check_vocabulary, match
from edgellm.source.model import ModelSource
from edgellm.source.stacks import unstacked_gguf
from edgellm.source.weight_file import Bytes, WeightFile
from edgellm.tensors import Array, TensorRef
from edgellm.tokenization import Tokenizer

UNREADABLE = {
    **dict.fromkeys(("i8", "i16", "i32", "i64"), "whole numbers, which are no weights"),
    **dict.fromkeys(("q8_1", "q8_k"), "a type for activations while llama.cpp computes"),
    "q2_0": "a type that libgguf does not dequantize",
}

ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
IGNORED = (".attn_rot_embd.weight", ".rope_freqs.weight", ".rope.freqs")
"""Ends of names that old converters wrote: tables that llama.cpp computes anyway."""

URL_KEYS = ("general.source.url", "general.url", "general.base_model.0.repo_url")


def open_gguf(
    path: Path, *, ignore_config_keys: Collection[str] = (), context: int | None = None
) -> ModelSource:
    """The model in a GGUF file (or in all parts of a split one); no weights are read.

    ``context`` as in ``checkpoint.open_folder``. Raises ``SourceError`` for a damaged file,
    ``UnsupportedModel`` for an architecture or feature that is not understood.
    """
    stored = read_gguf_model(path)
    refs = references(stored)
    factors = _rope_factors(path, refs)
    config = config_from_gguf(
        stored.metadata, refs.keys(), factors, ignore_config_keys=ignore_config_keys
    )
    family = family_of(config)
    reader = Config(config, ignore=ignore_config_keys, context=context, where=str(path))
    decoder = family.describe(reader)
    rows = tuple(family.tensors(decoder))
    layout = family.gguf_layout
    roles = {name_in_file(row.role, decoder, layout): row.role for row in rows}
    if layout.absorbed:
        refs = joined(refs, decoder)
    matrices = references(stored, flat=True)
    named = {roles.get(name, name): ref for name, ref in refs.items()}
    named |= {
        row.role: as_described(named[row.role], row, decoder, layout)
        for row in rows
        if row.role in named
    }
    matched = match(
        rows,
        unstacked_gguf(named, rows, lambda ref: matrices[ref.name], str(path)),
        by="role",
        where=str(path),
        # Its values are in the config by now.
        ignored=lambda name: name in ROPE_FACTORS or name.endswith(IGNORED),
    )
    tensors = {
        row.role: as_checkpoint_stores(matched[row.role], row, decoder, layout) for row in rows
    }
    tokenizer = Tokenizer.from_gguf(stored.metadata)
    notes = check_vocabulary(str(path), tokenizer.vocab_size, decoder.vocab_size)
    general = {key: value for key, value in stored.metadata.items() if key.startswith("general.")}
    return ModelSource(
        name=str(general.get("general.name", path.stem)),
        kind="gguf",
        path=path,
        config={"architectures": [family.architecture], **config},
        family=family,
        decoder=decoder,
        tensors=tensors,
        tokenizer=tokenizer,
        weight_files=stored.files,
        generation=generation_from_gguf(general, tokenizer.eos_token_ids),
        licence=str(general.get("general.license", "")),
        url=str(next((general[key] for key in URL_KEYS if key in general), "")),
        provenance=general,
        notes=(*reader.notes, *notes),
        merged_before=lineage.from_gguf(stored.metadata),
        scaled_by=lineage.scaled_in_gguf(stored.metadata),
    )


def _rope_factors(path: Path, refs: Mapping[str, TensorRef]) -> Sequence[float] | None:
    """What all rotary frequencies are divided by, whatever the length of the text."""
    found = [refs[name].load().reshape(-1).tolist() for name in ROPE_FACTORS if name in refs]
    if any(factors != found[0] for factors in found):
        raise UnsupportedModel(
            f"{path} divides rotary frequencies by other factors in long texts than in short ones, "
            "and edgellm reads one set: convert the folder that it was made from"
        )
    return found[0] if found else None


def references(stored: GgufFile, *, flat: bool = False) -> dict[str, TensorRef]:
    """Every tensor of the file by name, dequantized slab by slab on loading, as it is stored.

    ``flat``: as a matrix, all dimensions but the last as rows.
    """
    files = {path: WeightFile(path) for path in stored.files}
    tensors = list(stored.tensors.values())
    if flat:
        tensors = [replace(tensor, shape=_flattened(tensor.shape)) for tensor in tensors]
    return {tensor.name: _reference(files[tensor.file], tensor) for tensor in tensors}


def _flattened(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (math.prod(shape[:-1]), shape[-1])


def _reference(file: WeightFile, tensor: GgufTensor) -> TensorRef:
    rows = tensor.shape[0] if len(tensor.shape) > 1 else 1
    row_bytes = tensor.nbytes // rows

    def load_rows(start: int, stop: int) -> Array:
        raw = file.read(tensor.offset + start * row_bytes, (stop - start) * row_bytes)
        return dequantize(raw.reshape(stop - start, row_bytes), tensor)

    return TensorRef(tensor.name, tensor.name, tensor.shape, tensor.dtype, tensor.nbytes, load_rows)


def dequantize(raw: Bytes, tensor: GgufTensor) -> Array:
    """Rows uint8 ``[rows, row_bytes]`` as float32 ``[rows, columns]``, by ggml's own code."""
    if tensor.dtype in floats.READABLE:
        return floats.decode(raw, tensor.dtype)
    if tensor.dtype in UNREADABLE:
        raise TensorError(
            f"tensor {tensor.name} is stored as {tensor.dtype}, {UNREADABLE[tensor.dtype]}: "
            "convert the model that the file was made from"
        )
    return ggml.dequantize(raw, tensor.type)
