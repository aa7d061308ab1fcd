"""The ``mlx`` container: a folder that mlx-lm loads, on Apple Silicon and elsewhere.

A Hugging Face folder whose config says how modules are quantized (``quantization``): linear layers,
embedding and head in MLX's affine groups, norms and biases as floats. Scales have the dtype of the
rest, for MLX computes in the dtype of what it is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from edgellm.architectures.family import TensorRow
from edgellm.architectures.row_order import as_checkpoint_has
from edgellm.errors import UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.checkpoint_shards import (
    Part,
    Weight,
    index_of,
    json_file,
    shards_of,
)
from edgellm.export.gguf_mixture import EMBEDDING, HEAD, MIXTURES
from edgellm.export.hf_folder import CARD, CONFIG, quantized_card
from edgellm.export.layout import Container, Layout
from edgellm.export.mlx_models import SAID_OTHERWISE, check_expressible, context_of, notes_of
from edgellm.export.packing_hf import STATE_DTYPES
from edgellm.export.tensor_grids import grids_by_role
from edgellm.quant.grid import GRIDS, Grid
from edgellm.registry import suggestion
from edgellm.source.checkpoint import INDEX
from edgellm.source.matching import listed

if TYPE_CHECKING:
    from edgellm.recipe import Recipe
    from edgellm.source import ModelSource

FLOATS = ("bf16", "f16", "f32")

GRID_NAMES = (
    "int4-g64-min", "int4-g32-min", "int4-g128-min",
    "int4-g64-sym", "int4-g32-sym", "int4-g128-sym",
    "int8", "int8-g64", "int8-g128", *FLOATS,
)  # fmt: skip

DEFAULT_GRID = "int4-g64-min"
"""What mlx-lm itself makes where nobody says."""

TABLE_GRIDS = ("int8-g64", "int8", "f16")
"""Of embedding and head under a 4-bit grid: the first whose groups divide a row. Embeddings of 4
bits cost answers, and a tied one is the head as well."""

REFUSED = {
    "q4_0": "the same values are int4-g32-sym",
    "q8_0": "the same values are int8",
    "q4_1": "the same values are int4-g32-min",
    **dict.fromkeys(
        ("int4-g32", "int4-g64", "int4-g128"),
        "its groups have a bias where this one has a whole zero, whose product with the scale "
        "would be rounded: the same with -min has minima",
    ),
}


def lay_out(source: ModelSource, recipe: Recipe) -> Layout:
    """Every byte of the folder that converting ``source`` will write; reads no weight.

    Raises ``UnknownGrid``, ``UnsupportedTarget`` for what MLX cannot hold, and ``UsageError`` for
    options that contradict each other.
    """
    _check_options(recipe)
    graph = check_expressible(source.decoder)
    context, capped = context_of(source.decoder, graph)
    rows = [row for row in source.family.tensors(source.decoder) if row.role in source.tensors]
    dtype = _dtype(recipe, source)
    grids = _grids(recipe, source, rows, dtype)
    weights = [_weight(source, row, grids.get(row.role), dtype) for row in rows]
    shards = list(shards_of(weights, {"format": "mlx"}))
    config: dict[str, Any] = {
        **{key: value for key, value in source.config.items() if key not in SAID_OTHERWISE},
        **graph.settings(source.decoder),
        "architectures": [source.family.architecture],
        "dtype": STATE_DTYPES[dtype],
    }
    body = _grid(recipe.grid or DEFAULT_GRID, "--quant")
    if grids:
        config["quantization"] = config["quantization_config"] = _quantization(weights, body)
    files = {shard.name: shard.head for shard in shards}
    if len(shards) > 1:
        files[INDEX] = index_of(shards)
    files[CONFIG] = json_file(config)
    if source.generation:
        files["generation_config.json"] = json_file(source.generation)
    files[CARD] = quantized_card(source.name, source.licence, body.name, "mlx")
    return Layout(
        container=CONTAINER.name,
        main_file=shards[0].name,
        files={**files, **source.tokenizer.files()},
        data_files={shard.name: shard.nbytes for shard in shards},
        tensors=tuple(tensor for shard in shards for tensor in shard.tensors),
        context_length=context,
        notes=(*capped, *notes_of(source.decoder), *_notes(recipe, source, dtype)),
    )


def _notes(recipe: Recipe, source: ModelSource, dtype: str) -> Iterator[str]:
    if recipe.grid in FLOATS:
        return
    stored = _stored_dtype(source)
    because = "as the source's weights are" if stored == dtype else f"for the source's {stored}"
    yield f"what is not quantized, and scales, in {dtype}, {because}"


def _check_options(recipe: Recipe) -> None:
    for option, asked, why in (
        ("--layout", recipe.layout, "MLX has one layout"),
        ("--kv-cache", recipe.kv_cache, "an MLX folder does not say how keys are cached"),
        ("--compute", recipe.compute, "MLX computes in the type of an MLX folder's floats"),
        ("--context", recipe.context, "the context stands in the model's own config"),
    ):
        if asked is not None:
            raise UnsupportedTarget(f"{option} {asked}: {why}; leave it out")


def _dtype(recipe: Recipe, source: ModelSource) -> str:
    return recipe.grid if recipe.grid in FLOATS else usual_dtype(source)


def usual_dtype(source: ModelSource) -> Literal["bf16", "f16"]:
    """What floats and scales are where nobody says: as those of the source, f16 in place of f32."""
    return "bf16" if _stored_dtype(source) == "bf16" else "f16"


def _stored_dtype(source: ModelSource) -> str:
    """The type of the embedding or, where that is quantized, of the norms."""
    stored = (source.tensors[role].dtype for role in (EMBEDDING, "output_norm.weight"))
    return next((dtype for dtype in stored if dtype in FLOATS), source.tensors[EMBEDDING].dtype)


def _grids(
    recipe: Recipe, source: ModelSource, rows: Sequence[TensorRow], dtype: str
) -> dict[str, Grid]:
    """The grids of weights that are quantized, by role.

    Raises as ``lay_out`` does.
    """
    body = _grid(recipe.grid or DEFAULT_GRID, "--quant")
    matrices = {row.role: row for row in rows if row.kind in ("linear", "embedding", "head")}
    asked = _asked(recipe, matrices, tied=source.decoder.tied_head)
    chosen: dict[str, Grid] = {}
    scales: Any = dtype
    for role, row in matrices.items():
        if role in asked:
            grid = _grid(*asked[role])
        elif role in (EMBEDDING, HEAD) and body.bits < 8:
            grid = next(GRIDS[n] for n in TABLE_GRIDS if not row.shape[1] % GRIDS[n].block)
        else:
            grid = body
        if grid.kind != "float":
            chosen[role] = dataclasses.replace(grid, scale_dtype=scales)
        elif role in asked and grid.name != dtype:
            raise UnsupportedTarget(
                f"{role} in {grid.name}: MLX computes in one dtype, and this folder's is {dtype}; "
                f"choose {dtype}"
            )
    _check_groups([matrices[role] for role in chosen], chosen)
    return chosen


def _asked(
    recipe: Recipe, matrices: Mapping[str, TensorRow], *, tied: bool
) -> dict[str, tuple[str, str]]:
    """The names of grids that the user chose for tensors, by role, and the option of each."""
    named = grids_by_role(recipe.tensor_grids, matrices)
    asked = {role: (grid, f"--tensor-grid {role}:") for role, grid in named.items()}
    tables = [(EMBEDDING, recipe.embed, "--embed")]
    tables.append((EMBEDDING if tied else HEAD, recipe.head, "--head"))
    for role, grid, option in tables:
        if grid is None:
            continue
        other, its_option = asked.get(role, (grid, option))
        if other != grid and (role in recipe.tensor_grids or its_option == "--embed"):
            raise UsageError(
                f"{role} cannot be both {grid} ({option}) and {other} ({its_option.rstrip(':')})"
                f"{', for its rows are the head as well' if tied else ''}: leave one of them out"
            )
        asked[role] = grid, option
    return asked


def _grid(name: str, option: str) -> Grid:
    if name in GRID_NAMES:
        return GRIDS[name]
    if name in GRIDS or name in MIXTURES:
        reason = REFUSED.get(name, "its groups are integers with a scale and a bias alone")
        holder = "gguf" if name in MIXTURES or GRIDS[name].ggml_type is not None else "hf"
        raise UnsupportedTarget(
            f"{option} {name}: MLX cannot hold it ({reason}); choose --format {holder}, or one of "
            f"{', '.join(GRID_NAMES)}"
        )
    raise UnknownGrid(
        f"{option} {name}: no grid of that name for MLX; {suggestion(name, GRID_NAMES)}"
    )


def _check_groups(rows: Sequence[TensorRow], grids: Mapping[str, Grid]) -> None:
    misfits = [row for row in rows if row.shape[1] % grids[row.role].block]
    if not misfits:
        return
    widths = {row.shape[1] for row in rows}
    fitting = [name for name in GRID_NAMES if all(w % GRIDS[name].block == 0 for w in widths)]
    grid = grids[misfits[0].role]
    raise UnsupportedTarget(
        f"{grid.name} has groups of {grid.block} values, which do not divide the rows of "
        f"{len(misfits)} tensors: "
        f"{listed([f'{row.source} ({row.shape[1]})' for row in misfits])}. "
        f"Choose {', '.join(fitting)}"
    )


def _weight(source: ModelSource, row: TensorRow, grid: Grid | None, dtype: str) -> Weight:
    """mlx-lm's models lie below ``model.`` and have Conv1D's matrices as ``[out, in]``."""
    ref, prefix = as_checkpoint_has(source.tensors[row.role], row), source.family.base_prefix
    name = row.source
    if name.startswith(prefix):
        name = f"model.{name.removeprefix(prefix)}"
    parts: tuple[Part, ...] = (Part("", dtype.upper(), ref.shape, "data"),)
    if grid is None:
        return Weight(row, ref, GRIDS[dtype], "float", parts, name, in_one_piece=False)
    parts, module = tuple(_parts(ref.rows, ref.columns, grid)), name.removesuffix(".weight")
    return Weight(row, ref, grid, "mlx", parts, module, in_one_piece=False)


def _parts(rows: int, columns: int, grid: Grid) -> Iterator[Part]:
    by_group = (rows, columns // grid.block)
    yield Part(".weight", "U32", (rows, columns * int(grid.bits) // 32), "data")
    yield Part(".scales", grid.scale_dtype.upper(), by_group, "scales")
    yield Part(".biases", grid.scale_dtype.upper(), by_group, "biases")


def _quantization(weights: Sequence[Weight], body: Grid) -> dict[str, Any]:
    """What mlx-lm is told: the grid of all modules, and by name of those that stand on another."""
    usual = body if body.kind != "float" else next(w.grid for w in weights if w.packer == "mlx")
    others = {
        weight.module: _of(weight.grid)
        for weight in weights
        if weight.packer == "mlx" and _of(weight.grid) != _of(usual)
    }
    return {**_of(usual), **others}


def _of(grid: Grid) -> dict[str, Any]:
    return {"group_size": grid.block, "bits": int(grid.bits), "mode": "affine"}


CONTAINER = Container(
    name="mlx",
    grids=GRID_NAMES,
    default_grid=DEFAULT_GRID,
    lay_out=lay_out,
)
