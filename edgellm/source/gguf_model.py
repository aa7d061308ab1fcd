"""A GGUF file as a source of weights: blocks dequantized, llama.cpp's rearrangements undone."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from edgellm.architectures import config_from_gguf, family_of
from edgellm.architectures.config import Config
from edgellm.architectures.gguf_rows import as_checkpoint_stores, as_described, name_in_file
from edgellm.errors import TensorError
from edgellm.generation_defaults import generation_from_gguf
from edgellm.lora import lineage
from edgellm.quant import floats, ggml
from edgellm.source.gguf_file import GgufFile, GgufTensor, read_gguf_model
from edgellm.source.matching import check_vocabulary, match
from edgellm.source.model import ModelSource
from edgellm.source.weight_file import Bytes, WeightFile
from edgellm.tensors import Array, TensorRef
from edgellm.tokenization import Tokenizer

UNREADABLE = {
    **dict.fromkeys(("i8", "i16", "i32", "i64"), "whole numbers, which are no weights"),
    **dict.fromkeys(("q8_1", "q8_k"), "a type for activations while llama.cpp computes"),
    "q2_0": "a type that libgguf does not dequantize",
}

ROPE_FACTORS = "rope_freqs.weight"
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
    factors = refs[ROPE_FACTORS].load().reshape(-1).tolist() if ROPE_FACTORS in refs else None
    config = config_from_gguf(
        stored.metadata, refs.keys(), factors, ignore_config_keys=ignore_config_keys
    )
    family = family_of(config)
    reader = Config(config, ignore=ignore_config_keys, context=context, where=str(path))
    decoder = family.describe(reader)
    rows = tuple(family.tensors(decoder))
    layout = family.gguf_layout
    roles = {name_in_file(row.role, decoder, layout): row.role for row in rows}
    found = {roles.get(name, name): ref for name, ref in refs.items()}
    found |= {
        row.role: as_described(found[row.role], row, decoder, layout)
        for row in rows
        if row.role in found
    }
    matched = match(
        rows,
        found,
        by="role",
        where=str(path),
        # Its values are in the config by now.
        ignored=lambda name: name == ROPE_FACTORS or name.endswith(IGNORED),
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
    )


def references(stored: GgufFile) -> dict[str, TensorRef]:
    """Every tensor of the file by name, dequantized slab by slab on loading, as it is stored."""
    files = {path: WeightFile(path) for path in stored.files}
    return {name: _reference(files[tensor.file], tensor) for name, tensor in stored.tensors.items()}


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
