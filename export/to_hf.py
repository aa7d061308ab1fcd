"""The ``hf`` container: a folder that transformers, gptqmodel and vLLM load.

``config.json`` with its ``quantization_config``, safetensors in one file or shards, the tokenizer.
Linear layers are quantized; embedding, head, norms and biases are floats, as every reader of these
layouts expects.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.architectures.family import TensorRow
from edgellm.architectures.row_order import as_checkpoint_has
from edgellm.errors import UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.checkpoint_shards import Part, Weight, index_of, json_file, shards_of
from edgellm.export.hf_folder import CARD, CONFIG, quantized_card
from edgellm.export.hf_layouts import LAYOUTS, OUTLIER_THRESHOLD, Storage, default_layout
from edgellm.export.layout import Container, Layout
from edgellm.export.packing_hf import STATE_DTYPES
from edgellm.lora.checkpoint_weights import HEADS
from edgellm.quant.grid import GRIDS, Grid
from edgellm.registry import suggestion
from edgellm.source.checkpoint import INDEX
from edgellm.source.matching import head_row, listed
from edgellm.tensors import rows_of, stacked, transposed

if TYPE_CHECKING:
    from edgellm.recipe import Recipe
    from edgellm.source import ModelSource

FLOATS = ("f16", "bf16", "f32")

GRID_NAMES = (
    "int4-g32-sym", "int4-g64-sym", "int4-g128-sym", "int4-g32", "int4-g64", "int4-g128",
    "int8", "int8-g64", "int8-g128", "int8-dynamic", "nf4", "nf4-dq", *FLOATS,
)  # fmt: skip

DEFAULT_GRID = "int4-g64-sym"
"""Groups of 128 are more common in published GPTQ checkpoints, but leave part of a row over in many
small models; every kernel takes 64 too, for an eighth of a bit."""

REFUSED = {
    "q4_0": "the same values are int4-g32-sym",
    "q8_0": "the same values are int8",
    **dict.fromkeys(
        ("int4-g32-min", "int4-g64-min", "int4-g128-min"),
        "its layouts have whole zeros, as the same grids without -min",
    ),
}

NOTES = {
    ("compressed-tensors", "int8-dynamic"): "int8-dynamic quantizes activations too, each token by "
    "its own scale: where a few channels are much larger than the others, answers are lost without "
    "smoothquant: before it",
    ("bitsandbytes", "int8-dynamic"): "bitsandbytes quantizes activations too, each token by its "
    f"own scale, but channels that reach {OUTLIER_THRESHOLD:g} stay floats",
    (
        "bitsandbytes",
        "nf4-dq",
    ): "scales of nf4-dq are rounded together, so each weight is held in memory whole",
}

HOLDS_STATE_SPACES = "bitsandbytes"
"""The only library whose quantized modules still have a ``weight``, which transformers' Mamba takes
from them by name."""

ZEROS_NOTE = (
    "transformers (5.23) loads zeros of compressed-tensors only with "
    "quantization_config=CompressedTensorsConfig(dequantize=True), whoever wrote them; vLLM takes "
    "them as they are"
)


def lay_out(source: ModelSource, recipe: Recipe) -> Layout:
    """Every byte of the folder that converting ``source`` will write; reads no weight.

    Raises ``UnknownGrid``, ``UnsupportedTarget`` for what a layout cannot hold, and ``UsageError``
    for options that contradict each other.
    """
    _check_options(recipe)
    grid = _grid(recipe.grid or DEFAULT_GRID)
    name, storage = _storage(recipe.layout, grid)
    dtype = _dtype(recipe, source, grid, name, storage)
    if storage is not None:
        scales: Any = storage.scale_dtype or dtype
        grid = dataclasses.replace(grid, scale_dtype=scales)
    if storage is not None and any(layer.experts for layer in source.decoder.layers):
        raise UnsupportedTarget(
            f"--layout {name}: transformers computes with the experts of a layer as one tensor, "
            "which no reader of quantized layers knows: choose --quant bf16 or f16, or --format "
            "gguf or onnx"
        )
    if storage is not None and name != HOLDS_STATE_SPACES and _has_scans(source):
        raise UnsupportedTarget(
            f"--layout {name}: transformers' state-space layers read the weight of their products "
            f"themselves, and a product in codes has none: choose --layout {HOLDS_STATE_SPACES}, "
            "--quant bf16 or f16, or --format gguf or onnx"
        )
    head = head_row(source.family, source.decoder).source.removesuffix(".weight")
    # What it is called in the checkpoint, and in transformers' model, which may differ (GPT-NeoX).
    ignored = list(dict.fromkeys((head, HEADS[0], *_small_modules(source))))
    whole = [row for row in _rows(source) if row.apart and not row.pieces]
    weights = [_weight(source, row, grid, dtype, storage) for row in whole]
    weights += _pieces(source, dtype)
    weights += _stacks(source, dtype)
    _check_shapes(weights, grid, name, storage)
    shards = list(shards_of(weights, {}))
    config: dict[str, Any] = {
        **source.config,
        "architectures": [source.family.architecture],
        "dtype": STATE_DTYPES[dtype],
    }
    config.pop("torch_dtype", None)
    notes = []
    if storage is not None:
        config["quantization_config"] = storage.config(grid, dtype, ignored)
        notes.append(f"stored as {name}: transformers loads it with {storage.readers}")
        if name == "compressed-tensors" and grid.kind == "affine" and not grid.symmetric:
            notes.append(ZEROS_NOTE)
        if (name, grid.name) in NOTES:
            notes.append(NOTES[name, grid.name])
    files = {shard.name: shard.head for shard in shards}
    if len(shards) > 1:
        files[INDEX] = index_of(shards)
    files[CONFIG] = json_file(config)
    if source.generation:
        files["generation_config.json"] = json_file(source.generation)
    files[CARD] = quantized_card(source.name, source.licence, grid.name, name)
    return Layout(
        container=CONTAINER.name,
        main_file=shards[0].name,
        files={**files, **source.tokenizer.files()},
        data_files={shard.name: shard.nbytes for shard in shards},
        tensors=tuple(tensor for shard in shards for tensor in shard.tensors),
        context_length=source.decoder.context_length,
        notes=tuple(notes),
    )


def _check_options(recipe: Recipe) -> None:
    if recipe.tensor_grids:
        raise UnsupportedTarget(
            f"--tensor-grid {next(iter(recipe.tensor_grids))}: all weights of a Hugging Face "
            "folder stand on one grid; leave it out, or choose --format gguf or onnx"
        )
    if recipe.kv_cache is not None:
        raise UnsupportedTarget(
            f"--kv-cache {recipe.kv_cache}: a Hugging Face folder does not say how keys and values "
            "are cached; leave it out, or choose --format onnx"
        )
    if recipe.compute is not None:
        raise UnsupportedTarget(
            f"--compute {recipe.compute}: a Hugging Face folder does not say what it is computed "
            "in; leave it out, or choose --format onnx"
        )
    if recipe.context is not None:
        raise UnsupportedTarget(
            f"--context {recipe.context}: the context stands in the model's own config, where "
            "positions depend on it, and is kept as it is; leave it out, and cap it where it is "
            "run (vLLM's --max-model-len)"
        )


def _grid(name: str) -> Grid:
    if name in GRID_NAMES:
        return GRIDS[name]
    if name in GRIDS:
        reason = REFUSED.get(name, "no layout of transformers has blocks like ggml's")
        holder = "mlx" if GRIDS[name].ggml_type is None else "gguf"
        raise UnsupportedTarget(
            f"--quant {name}: a Hugging Face folder cannot hold it ({reason}); choose --format "
            f"{holder}, or one of {', '.join(GRID_NAMES)}"
        )
    choice = suggestion(name, GRID_NAMES)
    raise UnknownGrid(f"--quant {name}: no grid of that name for Hugging Face folders; {choice}")


def _storage(asked: str | None, grid: Grid) -> tuple[str, Storage | None]:
    """The name of the layout and how it holds ``grid``; empty and None for plain floats."""
    if asked is not None and asked not in LAYOUTS:
        raise UsageError(f"--layout {asked}: no such layout; {suggestion(asked, LAYOUTS)}")
    holders = [name for name, held in LAYOUTS.items() if grid.name in held]
    if asked is not None and asked not in holders:
        others = f"{', '.join(LAYOUTS[asked])} for it"
        choice = f"--layout {' or '.join(holders)}, or {others}" if holders else others
        raise UnsupportedTarget(f"--layout {asked} cannot hold {grid.name}: choose {choice}")
    name = asked or default_layout(grid.name)
    return ("", None) if name is None else (name, LAYOUTS[name][grid.name])


def _dtype(
    recipe: Recipe, source: ModelSource, grid: Grid, layout: str, storage: Storage | None
) -> str:
    """What floats are stored in: embedding, head, norms and biases alike."""
    allowed = (grid.name,) if storage is None else storage.dtypes
    for option, asked in (("--embed", recipe.embed), ("--head", recipe.head)):
        if asked is not None and asked not in allowed:
            where = f"as {layout}" if layout else f"in {grid.name}"
            raise UnsupportedTarget(
                f"{option} {asked}: in a folder {where} the tensors that are not quantized are "
                f"{' or '.join(allowed)}; choose {'one of these' if allowed[1:] else 'that'}, or "
                "another --layout or --format"
            )
    if recipe.embed and recipe.head and recipe.embed != recipe.head:
        raise UsageError(
            f"--embed {recipe.embed} and --head {recipe.head}: a Hugging Face folder has one dtype "
            "for all that is not quantized; give one of them"
        )
    return recipe.embed or recipe.head or allowed[0]


def _has_scans(source: ModelSource) -> bool:
    return any(layer.scan is not None for layer in source.decoder.layers)


def _small_modules(source: ModelSource) -> list[str]:
    """Modules that are ``Linear`` in transformers and floats in the folder."""
    rows = (row for row in _rows(source) if row.kind == "small")
    return [row.source.removesuffix(".weight") for row in rows if row.source.endswith(".weight")]


def _rows(source: ModelSource) -> Iterator[TensorRow]:
    for row in source.family.tensors(source.decoder):
        if row.role in source.tensors:
            yield row


def _weight(
    source: ModelSource, row: TensorRow, grid: Grid, dtype: str, storage: Storage | None
) -> Weight:
    ref = as_checkpoint_has(source.tensors[row.role], row)
    if storage is not None and row.kind == "linear":
        parts = tuple(storage.parts(ref.rows, ref.columns, grid, dtype))
        return Weight(
            row=row,
            ref=ref,
            grid=grid,
            packer=storage.packer.format(dtype=dtype),
            parts=parts,
            module=row.source.removesuffix(".weight"),
            in_one_piece=storage.in_one_piece,
        )
    if row.transposed:
        ref = transposed(ref)
    part = Part("", dtype.upper(), ref.shape, "data")
    return Weight(row, ref, GRIDS[dtype], "float", (part,), row.source, in_one_piece=False)


def _pieces(source: ModelSource, dtype: str) -> Iterator[Weight]:
    """The tensors of checkpoints that hold a row each of one of ours, as vectors."""
    for row in _rows(source):
        for number, name in enumerate(row.pieces):
            ref = rows_of(source.tensors[row.role], number, 1, name)
            ref = dataclasses.replace(ref, shape=(ref.columns,))
            part = Part("", dtype.upper(), ref.shape, "data")
            stem = row.role.removesuffix(".weight")
            piece = dataclasses.replace(row, source=name, role=f"{stem}.{number}.weight")
            yield Weight(piece, ref, GRIDS[dtype], "float", (part,), name, in_one_piece=False)


def _stacks(source: ModelSource, dtype: str) -> Iterator[Weight]:
    """The tensors of checkpoints that hold several of ours, one below the other."""
    stacks: dict[str, list[TensorRow]] = {}
    for row in _rows(source):
        if not row.apart:
            stacks.setdefault(row.elsewhere[0].name, []).append(row)
    for name, rows in stacks.items():
        rows.sort(key=lambda row: row.elsewhere[0].first)
        ref = stacked([source.tensors[row.role] for row in rows], name)
        part = Part("", dtype.upper(), rows[0].elsewhere[0].shape, "data")
        whole = dataclasses.replace(rows[0], source=name)
        yield Weight(whole, ref, GRIDS[dtype], "float", (part,), name, in_one_piece=False)


def _check_shapes(
    weights: Sequence[Weight], grid: Grid, layout: str, storage: Storage | None
) -> None:
    """Refuse weights that a layout has no room for, with their names and what fits."""
    quantized = [weight for weight in weights if weight.packer != "float"]
    if storage is None or not quantized:
        return
    if not storage.conv1d and quantized[0].row.transposed:
        others = ", ".join(
            f"--layout {name}"
            for name, held in LAYOUTS.items()
            if grid.name in held and held[grid.name].conv1d
        )
        raise UnsupportedTarget(
            f"--layout {layout} is for Linear layers, and transformers builds this model of "
            f"Conv1D: choose {others or 'a grid that gptq or bitsandbytes holds'}, or --format onnx"
        )
    multiple = storage.rows_multiple
    misfits = [weight.row.source for weight in quantized if weight.ref.rows % multiple]
    if misfits:
        raise UnsupportedTarget(
            f"--layout {layout} packs {multiple} outputs together, which do not divide those of "
            f"{listed(misfits)}: choose --layout compressed-tensors or bitsandbytes"
        )
    _check_groups(quantized, grid)


def _check_groups(quantized: Sequence[Weight], grid: Grid) -> None:
    misfits = [weight for weight in quantized if weight.ref.columns % (grid.block or 1)]
    if not misfits:
        return
    widths = {weight.ref.columns for weight in quantized}
    fitting = [
        name
        for name in GRID_NAMES
        if all(width % (GRIDS[name].block or 1) == 0 for width in widths)
    ]
    raise UnsupportedTarget(
        f"{grid.name} has groups of {grid.block} values, which do not divide the rows of "
        f"{len(misfits)} tensors: "
        f"{listed([f'{weight.row.source} ({weight.ref.columns})' for weight in misfits])}. "
        f"Choose {', '.join(fitting)}"
    )


CONTAINER = Container(
    name="hf",
    grids=GRID_NAMES,
    default_grid=DEFAULT_GRID,
    lay_out=lay_out,
    default_layout=default_layout,
)
