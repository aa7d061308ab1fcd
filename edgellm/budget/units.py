"""What a budget is spent on: the tensors that are given a grid, and the bytes that each takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from edgellm.architectures.family import SMALL_PRODUCT
from edgellm.architectures.gguf_latent import source_role
from edgellm.calibration.blocks import EMBEDDING, HEAD, LAYER_ROLE
from edgellm.errors import UnsupportedTarget
from edgellm.export.gguf_mixture import FLOATS, NEED_IMPORTANCE
from edgellm.export.latent_attention import BY_HEAD
from edgellm.export.layout import Container, Layout, OutputTensor
from edgellm.export.onnx_operators import operators_of
from edgellm.export.tensor_grids import grids_by_role
from edgellm.quant import SOLVERS
from edgellm.quant.grid import GRIDS
from edgellm.recipe import Recipe
from edgellm.source.model import ModelSource

BLOCKS_OF_256 = (
    "f16", "q8_0", "q6_k", "q5_k", "q4_k", "iq4_xs", "q3_k", "iq3_xxs", "q2_k", "iq2_s",
)  # fmt: skip
BLOCKS_OF_32 = ("f16", "q8_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0")
GROUPS = {
    "onnx": ("f16", "int8", "int4-g32", "int4-g64", "int4-g128"),
    "mlx": ("int8", "int8-g64", "int4-g32-min", "int4-g64-min", "int4-g128-min"),
}
"""Candidates; those that are slower to round to, or always worse at their size, are left out."""

STAYING = (*FLOATS, f"{SMALL_PRODUCT}.weight")
"""Ends of the roles of matrices that no grid is chosen for: norms, convolutions, and one that ONNX
keeps in floats."""


@dataclass(frozen=True)
class Unit:
    """A stored tensor whose ``roles`` take one grid together; ``sizes``: bytes by grid.

    ``layer``: None for a table. A tied table serves as embedding and head.
    """

    name: str
    roles: tuple[str, ...]
    layer: int | None
    sizes: Mapping[str, int]


def units_of(recipe: Recipe, source: ModelSource, container: Container) -> list[Unit]:
    """The tensors that nobody named a grid for, each with what it takes on every candidate.

    Bytes are those of the container's own layouts. Raises ``UnsupportedTarget`` for a container
    that has one grid for all tensors, and what laying out raises.
    """
    if container.name not in ("gguf", *GROUPS):
        raise UnsupportedTarget(
            "--fit and --bits choose a grid for each tensor, and edgellm writes one for all to "
            f"{container.name}: choose --format gguf, {' or '.join(GROUPS)}"
        )
    if any(layer.experts for layer in source.decoder.layers):
        raise UnsupportedTarget(
            "--fit and --bits measure what each tensor's rounding costs, which is not known of "
            f"experts that few tokens pass ({source.decoder.family} models are mixtures of them): "
            "choose --quant, with --tensor-grid for what should have more bits"
        )
    base = container.lay_out(source, recipe)
    tied = source.decoder.tied_head
    free = [tensor for tensor in stored(base) if not _fixed(tensor, base, recipe, tied=tied)]
    candidates = {
        tensor.name: candidates_of(tensor, recipe, container.name, source) for tensor in free
    }
    sizes: dict[str, dict[str, int]] = {tensor.name: {} for tensor in free}
    for grid in dict.fromkeys(grid for each in candidates.values() for grid in each):
        taking = [tensor for tensor in free if grid in candidates[tensor.name]]
        table = {part.role: grid for tensor in taking for part in tensor.parts}
        laid = container.lay_out(source, with_grids(recipe, table))
        nbytes = {tensor.name: tensor.nbytes for tensor in stored(laid)}
        for tensor in taking:
            sizes[tensor.name][grid] = nbytes[tensor.name]
    return [
        Unit(tensor.name, tuple(part.role for part in tensor.parts), _layer(tensor), each)
        for tensor in free
        if (each := sizes[tensor.name])
    ]


def with_grids(recipe: Recipe, table: Mapping[str, str]) -> Recipe:
    """``recipe`` with the grids of ``table``; what the user named stays."""
    return msgspec.structs.replace(recipe, tensor_grids={**table, **recipe.tensor_grids})


def stored(layout: Layout) -> list[OutputTensor]:
    """The matrices that may stand on any grid: weights of products, embedding and head."""
    found = []
    for tensor in layout.model_tensors:
        role = tensor.parts[0].role
        product = LAYER_ROLE.match(role) and role.endswith(".weight") and len(tensor.shape) == 2
        in_floats = layout.container == "onnx" and role.endswith(BY_HEAD)
        stays = role.endswith(STAYING) or in_floats
        chosen = product and source_role(role) == role and not stays
        if chosen or role in (EMBEDDING, HEAD):
            found.append(tensor)
    return found


def candidates_of(
    tensor: OutputTensor, recipe: Recipe, container: str, source: ModelSource
) -> list[str]:
    """The grids that ``tensor`` can stand on, by the blocks that divide its rows."""
    columns, role = tensor.columns, tensor.parts[0].role
    blocks: tuple[str, ...] = BLOCKS_OF_32 if columns % 256 else BLOCKS_OF_256
    names = [
        name for name in GROUPS.get(container, blocks) if columns % (GRIDS[name].block or 1) == 0
    ]
    if container == "onnx":
        is_table = role == EMBEDDING
        return [name for name in names if not is_table or operators_of(GRIDS[name]).gather]
    if container in GROUPS:
        return names
    weighed = SOLVERS[recipe.solver].needs != "nothing" and role != EMBEDDING
    return [name for name in names if weighed or name not in NEED_IMPORTANCE]


def _fixed(tensor: OutputTensor, layout: Layout, recipe: Recipe, *, tied: bool) -> bool:
    """Whether the user has named the grid of ``tensor``."""
    roles = [part.role for each in stored(layout) for part in each.parts]
    named = grids_by_role(recipe.tensor_grids, {*roles, HEAD})
    role = tensor.parts[0].role
    tables = {EMBEDDING: recipe.embed or (tied and recipe.head), HEAD: recipe.head}
    return any(part.role in named for part in tensor.parts) or bool(tables.get(role))


def _layer(tensor: OutputTensor) -> int | None:
    found = LAYER_ROLE.match(tensor.parts[0].role)
    return int(found[1]) if found else None
