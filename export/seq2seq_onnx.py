"""An encoder with a decoder as an ONNX folder: two graphs, one file of weights, the tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import edgellm
from edgellm.export.context import capped_context
from edgellm.export.encoder_onnx import ENCODER_NOTES, check_names
from edgellm.export.gguf_mixture import EMBEDDING, HEAD
from edgellm.export.layout import Layout
from edgellm.export.onnx_graph import DATA_FILE, GraphBuilder
from edgellm.export.seq2seq_graph import Side, Storage, build_decoder, build_encoder
from edgellm.export.to_onnx import as_json, check_groups, grid_names, grids_of

if TYPE_CHECKING:
    from edgellm.recipe import Recipe
    from edgellm.source.encoder_model import Seq2SeqSource

DEFAULT_GRID = "int8"

ENCODER_FILE = "encoder_model.onnx"
DECODER_FILE = "decoder_model.onnx"
"""As optimum calls them; the decoder's is what the artifact opens with."""


def lay_out_seq2seq(source: Seq2SeqSource, recipe: Recipe) -> Layout:
    """Every byte that converting ``source`` to ONNX will write; reads no weight.

    Raises ``UnknownGrid`` for a grid that does not exist, ``UnsupportedTarget`` for one that ONNX
    or a tensor's rows cannot hold, and ``UsageError`` for a context beyond the model's.
    """
    model = source.model
    check_names(recipe)
    linear = [row.role for row in source.family.tensors(model) if row.kind == "linear"]
    grids = grids_of(recipe, model.tied_head, [EMBEDDING, *linear, HEAD], DEFAULT_GRID)
    context_length, notes = capped_context(source.max_tokens, recipe.context)
    storage = Storage()
    files: dict[str, bytes] = {}
    sides = (("enc", ENCODER_FILE, build_encoder), ("dec", DECODER_FILE, build_decoder))
    for short, file, build in sides:
        graph = GraphBuilder(
            edgellm.__version__, name=file.partition("_")[0], data_bytes=storage.data_bytes
        )
        build(Side(graph, model, source.tensors, grids, storage, short))
        storage.data_bytes = graph.data_bytes
        storage.tensors += graph.tensors
        files[file] = graph.serialize({"edgellm.family": model.family})
    check_groups(storage.tensors)
    told = dict.fromkeys(grid_names(grids))
    return Layout(
        container="onnx",
        main_file=DECODER_FILE,
        files={
            **files,
            "config.json": as_json(source.config),
            "generation_config.json": as_json(source.generation),
            **source.tokenizer.files(),
        },
        data_files={DATA_FILE: storage.data_bytes},
        tensors=tuple(storage.tensors),
        context_length=context_length,
        notes=(*(ENCODER_NOTES[name] for name in told if name in ENCODER_NOTES), *notes),
    )
