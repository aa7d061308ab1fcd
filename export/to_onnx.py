"""The ONNX container: a folder that onnxruntime and onnxruntime-genai run.

``model.onnx`` is the graph, ``model.onnx.data`` the weights; beside them ``genai_config.json``,
``config.json`` and the tokenizer's files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from onnx import TensorProto

import edgellm
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.latent import VALUES_ARE_KEYS
from edgellm.artifact import GENAI_CONFIG
from edgellm.errors import UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.context import capped_context
from edgellm.export.decoder_graph import EXPRESSIBLE, DecoderGraph
from edgellm.export.genai_config import genai_config
from edgellm.export.gguf_mixture import EMBEDDING, HEAD, MIXTURES
from edgellm.export.latent_attention import BY_HEAD
from edgellm.export.layout import Container, Layout, OutputTensor
from edgellm.export.linear_graph import Grids
from edgellm.export.onnx_graph import DATA_FILE, GraphBuilder
from edgellm.export.onnx_operators import operators_of
from edgellm.export.tensor_grids import grids_by_role
from edgellm.quant.grid import GRIDS, Grid
from edgellm.registry import suggestion

if TYPE_CHECKING:
    from edgellm.recipe import Recipe
    from edgellm.source import ModelSource

MODEL_FILE = "model.onnx"

GRID_NAMES = (
    "int4-g32", "int4-g64", "int4-g128", "int4-g32-sym", "int4-g64-sym", "int4-g128-sym",
    "int8", "int8-g64", "int8-g128", "int8-dynamic", "nf4", "f16", "f32",
)  # fmt: skip

DEFAULT_GRID = "int4-g32"

TABLE_GRIDS = {"f32": "f32", "f16": "f16"}
"""The grid of embedding and head where they are not named, by that of the body; else int8.

A head in 4 bits moves the answers as much as all of the layers do (SmolLM2 off its grid, KL to the
original: all int4-g32 0.42, with an int8 embedding and head 0.33; int4-g64 0.58 and 0.43), and
onnxruntime looks rows up from no grid but f32, f16, int8 and int4.
"""

NOTES = {
    "nf4": "nf4 runs through MatMulBnb4, which is many times slower on a CPU than int4-g64: "
    "choose it to compare, not to run",
    "int8-dynamic": "int8-dynamic quantizes activations on the fly, one scale a step: quick in "
    "prefill, but a few large activations can spoil every answer; smoothquant:int8-dynamic evens "
    "them out, llm_int8 takes them out (smoothquant+llm_int8:int8-dynamic), int8 leaves them as "
    "they are",
    "f16": "f16 is the size on disk; the graph computes in f32 and onnxruntime widens the weights "
    "when it opens the model (--compute f16 for GPUs)",
}

EASING = frozenset(("smoothquant", "llm_int8"))
"""What answers int8-dynamic's note. SmolLM2 off its grid, KL to the original on held-out text:
int8-dynamic 0.237, smoothquant:int8-dynamic 0.049, llm_int8:int8-dynamic 0.024; int8 0.006."""

ELEMENTS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16}
"""What the graph may compute in; f32 where nothing is named."""

F16_COMPUTE_NOTE = (
    "the graph computes in f16, for GPUs: onnxruntime's CUDA attention takes halves alone. On a "
    "CPU it runs too, slower than one in f32; scales are rounded to f16 when it is opened"
)

INT8_CACHE_NOTE = (
    "keys and values are cached in int8, with scales by channel taken from the weights: a quarter "
    "of the memory and quicker with a long past, slower in prefill, and a little less exact"
)

INT8_LATENTS_NOTE = (
    "latent vectors are cached in int8, with scales by channel taken from the weights: a quarter "
    "of the memory, a little less exact, and slower the longer the past, for the attention that "
    "reads them does so once for every head"
)

BY_HEAD_NOTE = (
    "attn_kv_b stays in f16: the latent vectors are cached, so it is multiplied head by head, and "
    "onnxruntime has no rounded product for that"
)


def lay_out(source: ModelSource, recipe: Recipe) -> Layout:
    """Every byte that converting ``source`` to ONNX will write; reads no weight.

    Raises ``UnknownGrid`` for a grid that does not exist, ``UnsupportedTarget`` for one that ONNX
    or a tensor's rows cannot hold and for features that the graph cannot compute, and
    ``UsageError`` for a context beyond the model's.
    """
    decoder = source.decoder
    _check_features(decoder)
    grids = choose_grids(recipe, decoder, roles_of(source))
    context_length, context_notes = capped_context(decoder.context_length, recipe.context)
    compute = _compute(recipe.compute, grids)
    int8_cache = _cache(recipe.kv_cache, compute) == "int8"
    if int8_cache and not decoder.attending:
        raise UnsupportedTarget(
            f"--kv-cache int8: {decoder.family} has no keys and values, and its states stay as the "
            "graph computes them: leave it out"
        )
    if int8_cache and not decoder.pre_norms:
        raise UnsupportedTarget(
            f"--kv-cache int8: how large keys and values can be is known by the norm before them, "
            f"and {decoder.family} has {Feature.NO_PRE_NORMS}: choose --kv-cache {compute}"
        )
    graph = GraphBuilder(edgellm.__version__, ELEMENTS[compute])
    DecoderGraph(graph, decoder, source.tensors, grids, context_length, int8_cache).build()
    check_groups(graph.tensors)
    generation = source.generation
    tokenizer = source.tokenizer
    files = {
        MODEL_FILE: graph.serialize(_metadata(decoder)),
        GENAI_CONFIG: genai_config(
            decoder,
            context_length=context_length,
            model_file=MODEL_FILE,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tuple(tokenizer.eos_token_ids),
            generation=generation,
        ),
        "config.json": as_json(source.config),
        **tokenizer.files(),
    }
    if generation:
        files["generation_config.json"] = as_json(generation)
    eased = ("int8-dynamic",) if EASING.intersection(recipe.transforms) else ()
    told = [name for name in dict.fromkeys(grid_names(grids)) if name in NOTES]
    if compute == "f16":
        told = [name for name in told if name != "f16"]
    notes = [NOTES[name] for name in told if name not in eased]
    if int8_cache:
        notes.append(INT8_CACHE_NOTE if decoder.latent is None else INT8_LATENTS_NOTE)
    if decoder.latent is not None and grids.body.kind != "float":
        notes.append(BY_HEAD_NOTE)
    if compute == "f16":
        notes.append(F16_COMPUTE_NOTE)
    notes += context_notes
    return Layout(
        container="onnx",
        main_file=MODEL_FILE,
        files=files,
        data_files={DATA_FILE: graph.data_bytes},
        tensors=tuple(graph.tensors),
        context_length=context_length,
        notes=tuple(notes),
    )


def _metadata(decoder: Decoder) -> dict[str, str]:
    about = {"edgellm.family": decoder.family}
    return about if decoder.latent is None else {**about, VALUES_ARE_KEYS: "1"}


def _compute(asked: str | None, grids: Grids) -> str:
    """What the graph computes in; raises ``UnsupportedTarget`` where it cannot."""
    if asked not in (None, *ELEMENTS):
        raise UnsupportedTarget(
            f"--compute {asked}: the ONNX graph computes in no such type; choose "
            f"{' or '.join(ELEMENTS)}"
        )
    if asked == "f16" and "int8-dynamic" in grid_names(grids):
        raise UnsupportedTarget(
            "--compute f16: onnxruntime's product for int8-dynamic takes f32 alone; choose int8, "
            "or --compute f32"
        )
    return asked or "f32"


def _cache(asked: str | None, compute: str) -> str:
    """The type of cached keys and values; raises ``UnsupportedTarget`` for one that is not."""
    choices = (compute, "int8")
    if asked not in (None, *choices):
        raise UnsupportedTarget(
            f"--kv-cache {asked}: onnxruntime's attention keeps no such cache where the graph "
            f"computes in {compute}; choose {' or '.join(choices)}"
        )
    return asked or compute


def roles_of(source: ModelSource) -> list[str]:
    """The weights that can stand on a grid: those of products, the embedding and the head."""
    linear = [
        row.role
        for row in source.family.tensors(source.decoder)
        if row.kind == "linear"
        and row.role.startswith("blk.")
        and row.role in source.tensors
        and not row.role.endswith(BY_HEAD)
    ]
    return [EMBEDDING, *linear, HEAD]


def choose_grids(recipe: Recipe, decoder: Decoder, roles: Collection[str] = ()) -> Grids:
    """The grids of linear layers, embedding and head: as asked, or what suits the body's.

    ``roles``: the tensors that ``recipe.tensor_grids`` may name. Raises ``UnknownGrid`` and
    ``UnsupportedTarget`` as ``lay_out`` does, and ``UsageError`` for two grids of one tensor and
    for names that match nothing.
    """
    return grids_of(recipe, decoder.tied_head, roles)


def grids_of(
    recipe: Recipe, tied_head: bool, roles: Collection[str], default: str = DEFAULT_GRID
) -> Grids:
    """``choose_grids`` of any network; ``default``: the body's grid where none is named."""
    body = _grid(recipe.grid or default, "--quant")
    named = grids_by_role(recipe.tensor_grids, roles)
    asked_head = _table(recipe.head, HEAD, "--head", recipe, named)
    asked_embed = _table(recipe.embed, EMBEDDING, "--embed", recipe, named)
    usual = TABLE_GRIDS.get(body.name, "int8")
    tied_to_head = asked_head if tied_head and _can_gather(asked_head) else None
    embed = _grid(asked_embed or tied_to_head or usual, "--embed")
    if not _can_gather(embed.name):
        raise UnsupportedTarget(
            f"--embed {embed.name}: onnxruntime cannot look rows up from {embed.name}; choose "
            f"{', '.join(filter(_can_gather, GRID_NAMES))}"
        )
    head = _grid(asked_head or (embed.name if tied_head else usual), "--head")
    by_role = {
        role: _grid(name, f"tensor_grids, {role}:")
        for role, name in named.items()
        if role not in (EMBEDDING, HEAD)
    }
    return Grids(body=body, embed=embed, head=head, by_role=by_role)


def _table(
    option: str | None, role: str, flag: str, recipe: Recipe, named: Mapping[str, str]
) -> str | None:
    """The grid that was asked for a table, by its own option or by the name of its tensor."""
    if option is not None and role in recipe.tensor_grids and named[role] != option:
        raise UsageError(
            f"{role} cannot be both {option} ({flag}) and {named[role]} (tensor_grids): leave one "
            "of them out"
        )
    return option or named.get(role)


def _can_gather(name: str | None) -> bool:
    return name in GRID_NAMES and operators_of(GRIDS[name]).gather is not None


def _grid(name: str, option: str) -> Grid:
    if name in GRID_NAMES:
        return GRIDS[name]
    if name in GRIDS or name in MIXTURES:
        reason = REFUSED.get(name, "its blocks are ggml's own, which no ONNX operator reads")
        holder = HOLDERS.get(name, "gguf")
        raise UnsupportedTarget(
            f"{option} {name}: ONNX cannot hold it ({reason}); choose --format {holder}, or one of "
            f"{', '.join(GRID_NAMES)}"
        )
    choice = suggestion(name, GRID_NAMES)
    raise UnknownGrid(f"{option} {name}: no grid of that name for ONNX; {choice}")


WITH_MINIMA = ("int4-g32-min", "int4-g64-min", "int4-g128-min")

HOLDERS = {"nf4-dq": "hf", **dict.fromkeys(WITH_MINIMA, "mlx")}
"""Containers that hold what neither ONNX nor GGUF does."""

REFUSED = {
    "bf16": "onnxruntime has no bf16 product on a CPU: use f16 or f32",
    "q4_0": "the same values with an f32 scale are int4-g32-sym",
    "q8_0": "the same values with an f32 scale are int8",
    "nf4-dq": "MatMulBnb4 takes scales in f32: the same levels with such are nf4",
    **dict.fromkeys(("q4_1", *WITH_MINIMA), "its quick kernels take integer zeros: use int4-g32"),
}
"""Why grids that ONNX lacks are refused, where there is more to say than that they are ggml's."""


def _check_features(decoder: Decoder) -> None:
    missing = decoder.features() - EXPRESSIBLE
    if missing:
        raise UnsupportedTarget(
            f"the ONNX graph cannot compute {', '.join(sorted(missing))}, which {decoder.family} "
            "models have: choose --format gguf"
        )


def check_groups(tensors: list[OutputTensor]) -> None:
    """Raise ``UnsupportedTarget`` for a group that leaves part of a row over."""
    misfits = [
        tensor for tensor in tensors if tensor.grid.block and tensor.columns % tensor.grid.block
    ]
    if not misfits:
        return
    first = misfits[0]
    grid = first.grid
    columns = {tensor.columns for tensor in tensors if tensor.grid == grid}
    fitting = [
        name
        for name in GRID_NAMES
        if all(width % (GRIDS[name].block or 1) == 0 for width in columns)
    ]
    names = ", ".join(f"{tensor.name} ({tensor.columns})" for tensor in misfits[:SHOWN_MISFITS])
    more = ", ..." if len(misfits) > SHOWN_MISFITS else ""
    raise UnsupportedTarget(
        f"{grid.name} has groups of {grid.block} values, which do not divide the rows of "
        f"{len(misfits)} tensors: {names}{more}. Choose {', '.join(fitting)}"
    )


SHOWN_MISFITS = 4


def grid_names(grids: Grids) -> list[str]:
    """The names of all ``grids``, some of them more than once."""
    every = (grids.body, grids.embed, grids.head, *grids.by_role.values())
    return [grid.name for grid in every]


def as_json(fields: object) -> bytes:
    """``fields`` as the JSON of a file, keys sorted."""
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


CONTAINER = Container(
    name="onnx",
    grids=GRID_NAMES,
    default_grid=DEFAULT_GRID,
    lay_out=lay_out,
    packages=("onnx",),
)
