"""An encoder as an ONNX folder: graph, weights, tokenizer, and sentence-transformers' files.

``model.onnx`` is the graph (``encoder_graph``), ``model.onnx.data`` the weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import edgellm
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.export.context import capped_context
from edgellm.export.encoder_graph import EncoderGraph
from edgellm.export.gguf_mixture import EMBEDDING, HEAD, MIXTURES
from edgellm.export.layout import Layout
from edgellm.export.onnx_graph import DATA_FILE, GraphBuilder
from edgellm.export.to_onnx import (
    GRID_NAMES,
    MODEL_FILE,
    NOTES,
    as_json,
    check_groups,
    grid_names,
    grids_of,
)
from edgellm.quant.grid import GRIDS

if TYPE_CHECKING:
    from edgellm.recipe import Recipe
    from edgellm.source.encoder_model import EncoderSource

DEFAULT_GRID = "int8"
"""Of encoders, which are small: embeddings of all-MiniLM-L6-v2 have a cosine to the float ones of
0.9996 in int8, 0.992 in int8-dynamic and 0.969 in int4-g32 (the built-in texts)."""

ENCODER_NOTES = {
    **NOTES,
    "int8-dynamic": "int8-dynamic quantizes activations on the fly, one scale for all texts that "
    "are computed together, so that a text's figures depend a little on its neighbours; int8 has "
    "a scale for every 32 values of a token",
    "f16": "f16 is the size on disk; the graph computes in f32 and onnxruntime widens the weights "
    "when it opens the model",
}


def check_names(recipe: Recipe) -> None:
    """Raise ``UnsupportedTarget`` for grids of other containers, which encoders have not."""
    asked = {
        "--quant": recipe.grid,
        "--embed": recipe.embed,
        "--head": recipe.head,
        **{f"tensor_grids, {name}:": grid for name, grid in recipe.tensor_grids.items()},
    }
    for option, name in asked.items():
        if name and name not in GRID_NAMES and (name in GRIDS or name in MIXTURES):
            raise UnsupportedTarget(
                f"{option} {name}: the ONNX graph of an encoder cannot hold it; choose "
                f"{', '.join(GRID_NAMES)}"
            )


def lay_out_encoder(source: EncoderSource, recipe: Recipe) -> Layout:
    """Every byte that converting ``source`` to ONNX will write; reads no weight.

    Raises ``UnknownGrid`` for a grid that does not exist, ``UnsupportedTarget`` for one that ONNX
    or a tensor's rows cannot hold, and ``UsageError`` for a context beyond the model's and for the
    grid of a head that is not there.
    """
    encoder = source.encoder
    has_table = encoder.head.task == "masked_lm"
    if recipe.head is not None and not has_table:
        raise UsageError(
            f"--head {recipe.head}: {source.name} has no head over the vocabulary; its classes are "
            "few and stay in f32: leave it out"
        )
    linear = [row.role for row in source.family.tensors(encoder) if row.kind == "linear"]
    roles = [EMBEDDING, *linear, *([HEAD] if has_table else [])]
    check_names(recipe)
    grids = grids_of(recipe, encoder.head.tied or not has_table, roles, DEFAULT_GRID)
    context_length, notes = capped_context(source.max_tokens, recipe.context)
    graph = GraphBuilder(edgellm.__version__, name="encoder")
    EncoderGraph(graph, encoder, source.tensors, grids, source.pipeline).build()
    check_groups(graph.tensors)
    told = dict.fromkeys(grid_names(grids))
    return Layout(
        container="onnx",
        main_file=MODEL_FILE,
        files={
            MODEL_FILE: graph.serialize({"edgellm.family": encoder.family}),
            "config.json": as_json(source.config),
            **source.tokenizer.files(),
            **source.files,
        },
        data_files={DATA_FILE: graph.data_bytes},
        tensors=tuple(graph.tensors),
        context_length=context_length,
        notes=(*(ENCODER_NOTES[name] for name in told if name in ENCODER_NOTES), *notes),
    )
