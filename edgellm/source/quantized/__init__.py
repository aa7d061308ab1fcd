"""Checkpoints whose weights are quantized: read as the values that the training stack computes.

Each reader is ``read(raw, settings, where) -> {name: TensorRef}``: the tensors of the checkpoint by
the names of the full-precision model, ``[out, in]`` where they were quantized, computed by slabs
when they are loaded. ``dtype`` of a quantized tensor says how it is stored (``nf4-dq``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edgellm import registry
from edgellm.architectures.family import TensorRow
from edgellm.errors import SourceError, UnsupportedModel
from edgellm.quant.floats import READABLE
from edgellm.source.safetensors_file import RawTensor
from edgellm.tensors import TensorRef, transposed

Read = Callable[[Mapping[str, RawTensor], Mapping[str, Any], str], dict[str, TensorRef]]

MLX = "mlx"
"""Our word for what mlx-lm writes, which names no method."""

READERS = {
    "bitsandbytes": "edgellm.source.quantized.bnb:read",
    "gptq": "edgellm.source.quantized.gptq:read",
    "awq": "edgellm.source.quantized.awq:read",
    "compressed-tensors": "edgellm.source.quantized.compressed:read",
    MLX: "edgellm.source.quantized.mlx:read",
}
"""transformers' ``quant_method``, or ``MLX``, to the function that reads it."""

ORIGINAL = "convert the model in bf16, f16 or f32 that it was made from"

UNREAD = {
    "fp8": "load it with transformers' FineGrainedFP8Config(dequantize=True) and save it",
    "mxfp4": "load it with transformers' Mxfp4Config(dequantize=True) and save it",
    "fbgemm_fp8": "",
    "hqq": "",
    "eetq": "",
    "quanto": "",
    "torchao": "",
    "aqlm": "",
    "vptq": "",
    "higgs": "",
    "spqr": "",
    "bitnet": "",
    "auto-round": "",
    "quark": "",
    "fp_quant": "",
}
"""Methods that are known and not read, with what to do besides fetching the original."""


def method_of(settings: Any) -> str:
    """``quant_method`` of a ``quantization_config``, as transformers infers it where it is absent.

    Old bitsandbytes configs have only ``load_in_4bit`` or ``load_in_8bit``, mlx-lm's only bits and
    ``group_size``.
    """
    if not isinstance(settings, dict):
        return str(settings)
    if "quant_method" in settings:
        return str(settings["quant_method"]).lower()
    if {"group_size", "bits"} <= settings.keys():
        return MLX
    flags = ("load_in_4bit", "load_in_8bit")
    return "bitsandbytes" if any(settings.get(flag) for flag in flags) else "an unnamed method"


def dequantized(raw: Mapping[str, RawTensor], settings: Any, where: str) -> dict[str, TensorRef]:
    """The tensors of a checkpoint that ``settings`` (its ``quantization_config``) describe.

    Raises ``UnsupportedModel`` for a method or format that is not read, ``SourceError`` for parts
    that are missing or do not fit together.
    """
    method = method_of(settings)
    if method not in READERS:
        also = UNREAD.get(method)
        raise UnsupportedModel(
            f"{where} is quantized already ({method}), which edgellm does not read (it reads "
            f"{', '.join(READERS)}): {ORIGINAL}" + (f", or {also}" if also else "")
        )
    read: Read = registry.attribute(READERS[method])
    return read(raw, settings, where)


def note_on(tensors: Mapping[str, TensorRef], where: str) -> str:
    """What to tell of a quantized source; raises ``SourceError`` where none of it is quantized."""
    types = stored_as(tensors)
    if not types:
        raise SourceError(
            f"{where}: the config says that the model is quantized and no tensor is: config and "
            "weights belong to different models; fetch both again, or take quantization_config out "
            "of config.json"
        )
    return f"the weights are stored as {' and '.join(types)}: quantized already"


def stored_as(tensors: Mapping[str, TensorRef]) -> tuple[str, ...]:
    """The types other than floats that ``tensors`` are stored in, most used first."""
    counts: dict[str, int] = {}
    for ref in tensors.values():
        if ref.dtype not in READABLE:
            counts[ref.dtype] = counts.get(ref.dtype, 0) + ref.size
    return tuple(sorted(counts, key=lambda dtype: -counts[dtype]))


def as_checkpoint_turns(
    stored: Mapping[str, TensorRef], rows: Iterable[TensorRow]
) -> dict[str, TensorRef]:
    """``stored`` with quantized Conv1D weights as ``[in, out]``, as full-precision ones are stored.

    Every method quantizes them as ``[out, in]``.
    """
    turned = {row.source for row in rows if row.transposed}
    return {
        name: transposed(ref) if name in turned and ref.dtype not in READABLE else ref
        for name, ref in stored.items()
    }
