"""Which codes of a quantized source an artifact keeps as they are, known before work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from edgellm.export.layout import Layout, OutputTensor
from edgellm.quant.floats import READABLE
from edgellm.quant.grid import GRIDS
from edgellm.quant.stored import StoredCodes, codes_of, why_not
from edgellm.recipe import DEQUANTIZED, OF_CALIBRATION, Recipe, split_quant
from edgellm.source.matching import listed

if TYPE_CHECKING:
    from edgellm.source import ModelSource

_INTEGERS = (
    "int4-g128-sym", "int4-g64-sym", "int4-g32-sym", "int4-g128", "int4-g64", "int4-g32",
    "nf4", "int8-g128", "int8-g64", "int8",
)  # fmt: skip

HOLDERS = {
    "gguf": ("q4_0", "q4_1", "q5_0", "q8_0"),
    "onnx": _INTEGERS,
    "hf": _INTEGERS,
    "mlx": (
        "int4-g128-sym", "int4-g128-min", "int4-g64-sym", "int4-g64-min", "int4-g32-sym",
        "int4-g32-min", "int8-g128", "int8-g64", "int8",
    ),
}  # fmt: skip
"""By container the grids that may hold a source's codes, smallest first."""


def holding_grid(asked: Recipe, container: str, source: ModelSource) -> tuple[str, str] | None:
    """The grid of ``container`` that keeps most of the codes of ``source``, and why it is taken.

    None where there are no codes, where no grid keeps any, and where what was ``asked`` for calls
    for other values or another grid.
    """
    quant = split_quant(asked.quant or "")
    merged = bool(asked.adapters) and not asked.keep_adapters
    calibrated = any(getattr(asked, name) is not None for name in OF_CALIBRATION)
    if quant != ((), None, "") or merged or calibrated or asked.merge_base == DEQUANTIZED:
        return None
    coded = [(ref, codes) for ref in source.tensors.values() if (codes := codes_of(ref))]
    if not coded:
        return None
    rows = source.family.tensors(source.decoder)
    linear = [row.role for row in rows if row.kind == "linear" and row.role in source.tensors]
    widths = {source.tensors[role].columns for role in linear}
    most, chosen = 0, ""
    for name in HOLDERS.get(container, ()):
        grid = replace(GRIDS[name], scale_dtype=_scales(container, source))
        if any(width % grid.block for width in widths):
            continue
        held = sum(ref.size for ref, codes in coded if not why_not(codes, grid))
        if held > most:
            most, chosen = held, name
    if not chosen:
        return None
    bits = " and ".join(str(bits) for bits in sorted({codes.bits for _, codes in coded}))
    return chosen, f"keeps the source's codes of {bits} bits as they are"


def _scales(container: str, source: ModelSource) -> Literal["f32", "f16", "bf16"]:
    """What ``container`` would store scales in; ggml's blocks have a type of their own."""
    if container == "mlx":
        from edgellm.export.to_mlx import usual_dtype

        return usual_dtype(source)
    return "f16" if container == "hf" else "f32"


def keep_codes(layout: Layout, recipe: Recipe, source: ModelSource) -> Layout:
    """``layout`` with what is kept as it is stored marked, and notes on that and on the rest.

    A solver has nothing to do where codes are kept. Itself for a GGUF file, whose blocks are always
    dequantized. ``source`` is the one before any transform, which leaves no codes.
    """
    if source.kind == "gguf":
        return layout
    quant = split_quant(recipe.quant or "")
    asked = ""
    if recipe.merge_base == DEQUANTIZED and source.merge is None:
        asked = f"--merge-base {DEQUANTIZED} asks for it"
    elif quant.transforms:
        asked = f"{quant.transforms[0]} scales weights before they are rounded"
    changed = source.merge.changed if source.merge else ()
    tensors: list[OutputTensor] = []
    kept: list[OutputTensor] = []
    again: dict[str, list[str]] = {}
    for tensor in layout.tensors:
        stored = [
            part for part in tensor.parts if part.dtype not in READABLE and part.role not in changed
        ]
        parts = tensor.parts
        if quant.transforms:
            parts = tuple(source.tensors.get(part.role, part) for part in parts)
        codes = [codes for part in parts if (codes := codes_of(part))]
        if stored and tensor.grid.kind != "float":
            why = _why_not(tensor, codes) or asked
            if why:
                again.setdefault(why, []).extend(part.name for part in stored)
            else:
                tensor = replace(tensor, keeps_codes=True)
                kept.append(tensor)
        tensors.append(tensor)
    notes = _notes(kept, again)
    return replace(layout, tensors=tuple(tensors), notes=(*layout.notes, *notes))


def _why_not(tensor: OutputTensor, codes: Sequence[StoredCodes]) -> str:
    if not codes:
        return "their codes do not lie along rows"
    if tensor.in_turns:
        return "gate and up of an expert are stored in turns"
    if len(codes) < len(tensor.parts):
        return "they are stacked with weights that have no codes, or that an adapter changes"
    return next((why for each in codes if (why := why_not(each, tensor.grid))), "")


def _notes(kept: Sequence[OutputTensor], again: dict[str, list[str]]) -> list[str]:
    notes = []
    if kept:
        count = sum(len(tensor.parts) for tensor in kept)
        grids = " and ".join(dict.fromkeys(tensor.grid.name for tensor in kept))
        weights = "weight" if count == 1 else "weights"
        notes.append(f"the codes of {count} stored {weights} are kept as they are, as {grids}")
    for why, names in again.items():
        some = "1 stored weight is" if len(names) == 1 else f"{len(names)} stored weights are"
        notes.append(f"{some} dequantized and rounded again ({listed(names)}): {why}")
    return notes
