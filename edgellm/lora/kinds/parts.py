"""What kinds of adapter share: checks of their parts and layers, and factors scaled by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from edgellm.errors import AdapterError
from edgellm.lora.edit import Target
from edgellm.tensors import Array, TensorRef


def exactly(target: Target, parts: Mapping[str, TensorRef], *names: str) -> tuple[TensorRef, ...]:
    """The parts ``names`` in order; ``AdapterError`` for one that is missing, or one too many."""
    missing = [name for name in names if name not in parts]
    others = [name for name in parts if name not in names]
    if missing or others:
        raise AdapterError(
            f"{target.name}: the adapter holds {', '.join(parts) or 'nothing'} for it, and "
            f"{' + '.join(names)} is needed: it is damaged or was cut; save it again, or fetch it "
            "again"
        )
    return tuple(parts[name] for name in names)


def shaped(target: Target, part: str, ref: TensorRef, *allowed: tuple[int, ...]) -> TensorRef:
    """``ref`` itself, if its shape is one of ``allowed``, else ``AdapterError``."""
    if ref.shape not in allowed:
        raise AdapterError(
            f"{target.name} {list(target.shape)}: {part} has shape {list(ref.shape)} and needs "
            f"{' or '.join(str(list(shape)) for shape in allowed)}: the adapter was trained on "
            "another model, or config and weights belong to different adapters; name its own base"
        )
    return ref


def linear(target: Target, kind: str, *, conv1d: bool = False) -> tuple[int, int]:
    """Outputs and inputs of ``target``; ``AdapterError`` where it is no linear layer.

    ``conv1d``: whether PEFT has this ``kind`` for a layer that is stored ``[in, out]``, too. What
    PEFT cannot train, no file of its can mean.
    """
    if target.kind in ("embedding", "positions") or len(target.shape) != 2:
        raise AdapterError(
            f"{target.name} {list(target.shape)} is no linear layer, and PEFT has {kind} for "
            "linear layers only: the adapter belongs to another model, or was put together by hand"
        )
    if target.transposed and not conv1d:
        raise AdapterError(
            f"{target.name} is a Conv1D, stored [in, out], and PEFT has no {kind} for it: the "
            "adapter belongs to another model, or was put together by hand"
        )
    return target.shape[0], target.shape[1]


def rows_scaled(matrix: TensorRef, vector: TensorRef, shape: tuple[int, int]) -> TensorRef:
    """The first corner, of ``shape``, of ``matrix``; its rows times the values of ``vector``."""

    def load_rows(start: int, stop: int) -> Array:
        rows = matrix.load_rows(start, stop)[:, : shape[1]]
        return rows * vector.load().reshape(-1)[start:stop, None]

    return replace(matrix, shape=shape, load_rows=load_rows, column_loader=None)
