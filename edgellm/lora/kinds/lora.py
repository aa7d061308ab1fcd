"""LoRA: ``W + scale * B @ A`` (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

How PEFT lays it out (``tuners/lora/layer.py``, peft 0.21.2): ``lora_A`` is ``[r, in]`` and
``lora_B`` ``[out, r]``, also for a Conv1D. An embedding ``[tokens, width]`` is treated as the
linear layer that it is the transpose of: ``lora_embedding_A`` is ``[r, tokens]`` and
``lora_embedding_B`` ``[width, r]``. ``target_parameters`` take a parameter as it is stored, so a
Conv1D's pair is turned round; stacked experts are in ``edgellm.lora.experts``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.edit import Additive, Edit, LowRank, Target
from edgellm.lora.kinds.dora import DoraColumns, DoraRows
from edgellm.lora.kinds.trainable_tokens import token_rows
from edgellm.lora.reading.scaling import rank_of, scale_of
from edgellm.tensors import Array, TensorRef, transposed

LINEAR = ("lora_A", "lora_B")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BIAS = "lora_bias"
MAGNITUDE = "lora_magnitude_vector"
TOKENS = "trainable_tokens_delta"


@dataclass(frozen=True)
class BiasDelta(Additive):
    """What ``lora_bias`` adds to a layer's bias: the bias of ``B``, scaled as the product is."""

    bias: TensorRef
    scale: float
    rank: int

    def delta(self, start: int, stop: int) -> Array:
        """The whole vector as one row ``[1, out]``, which is how a bias is loaded."""
        change = self.bias.load(start, stop)
        change *= self.scale
        return change


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Edit:
    """The change of ``target`` by ``parts``; raises ``AdapterError`` for shapes that do not fit."""
    if TOKENS in parts:
        _refuse_others(target, parts, (TOKENS,))
        indices = _token_indices(target.name, config["trainable_token_indices"])
        return token_rows(target, parts[TOKENS], indices)
    if BIAS in parts:
        return _bias(target, parts[BIAS], config)
    if EMBEDDING[0] in parts:
        _refuse_others(target, parts, (*EMBEDDING, MAGNITUDE))
        return _embedding(target, parts, config)
    _refuse_others(target, parts, (*LINEAR, MAGNITUDE))
    return _linear(target, parts, config)


def is_parameter(name: str, config: Mapping[str, Any]) -> bool:
    """Whether ``target_parameters`` means the weight ``name``: by its end, dot by dot."""
    return any(
        name == parameter or name.endswith(f".{parameter}")
        for parameter in config.get("target_parameters") or ()
    )


def _linear(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Edit:
    a, b = _pair(target, parts, LINEAR)
    as_parameter = is_parameter(target.name, config)
    module = target.name if as_parameter else target.name.removesuffix(".weight")
    scale = scale_of(config, module, a.shape[0])
    if as_parameter and target.transposed:
        a, b = transposed(b), transposed(a)
    _check(target, a, b)
    low_rank = LowRank(a, b, scale)
    if MAGNITUDE not in parts:
        return low_rank
    magnitude = _magnitude(target, parts[MAGNITUDE], target.shape[0])
    return DoraRows(low_rank, magnitude, target.name)


def _embedding(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Edit:
    a, b = _pair(target, parts, EMBEDDING)
    scale = scale_of(config, target.name.removesuffix(".weight"), a.shape[0])
    low_rank = LowRank(transposed(b), transposed(a), scale)
    _check(target, low_rank.a, low_rank.b)
    if MAGNITUDE not in parts:
        return low_rank
    magnitude = _magnitude(target, parts[MAGNITUDE], target.shape[1])
    return DoraColumns(low_rank, magnitude, target.name, target.base)


def _bias(target: Target, bias: TensorRef, config: Mapping[str, Any]) -> BiasDelta:
    if bias.shape != target.shape:
        raise AdapterError(
            f"{target.name}: lora_B.bias has shape {list(bias.shape)} and the base's bias "
            f"{list(target.shape)}: the adapter was trained on another model"
        )
    module = target.name.removesuffix(".bias")
    rank = rank_of(config, module)
    return BiasDelta(bias, scale_of(config, module, rank), rank)


def _pair(
    target: Target, parts: Mapping[str, TensorRef], names: tuple[str, str]
) -> tuple[TensorRef, TensorRef]:
    """``A [r, x]`` and ``B [y, r]``, both there and of one rank."""
    missing = [name for name in names if name not in parts]
    if missing:
        raise AdapterError(
            f"{target.name}: the adapter holds {', '.join(parts)} and no {missing[0]}, half of a "
            "pair: it is damaged; save it again, or fetch it again"
        )
    a, b = (parts[name] for name in names)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{target.name}: {names[0]} has shape {list(a.shape)} and {names[1]} {list(b.shape)}, "
            "and [r, in] and [out, r] of one rank are allowed: the adapter is damaged, or was "
            "saved from shards (ZeRO-3, FSDP) that were not gathered; save it again"
        )
    return a, b


def _check(target: Target, a: TensorRef, b: TensorRef) -> None:
    """``b @ a`` must have the shape of the target."""
    product = (b.shape[0], a.shape[1])
    if product != target.shape:
        raise AdapterError(
            f"{target.name}: the adapter's factors make a change of shape {list(product)} and the "
            f"weight has {list(target.shape)}: it was trained on another model; name its own base"
        )


def _magnitude(target: Target, magnitude: TensorRef, size: int) -> TensorRef:
    if magnitude.size != size:
        raise AdapterError(
            f"{target.name}: lora_magnitude_vector has {magnitude.size} values and {size} are "
            "needed: the adapter was trained on another model; name its own base"
        )
    return magnitude


def _token_indices(name: str, stated: Any) -> list[int]:
    """The rows that were trained: one list for the embedding, or one for each named module."""
    if not isinstance(stated, Mapping):
        return list(stated)
    module = name.removesuffix(".weight")
    for key, indices in stated.items():
        if module == key or module.endswith(f".{key}"):
            return list(indices)
    raise AdapterError(
        f"{name}: the adapter holds trained tokens for it and trainable_token_indices names "
        f"{', '.join(stated)}: config and weights belong to different adapters; fetch both again"
    )


def _refuse_others(
    target: Target, parts: Mapping[str, TensorRef], expected: tuple[str, ...]
) -> None:
    others = [name for name in parts if name not in expected]
    if others:
        raise AdapterError(
            f"{target.name}: the adapter holds {', '.join(parts)} for it, and {others[0]} does not "
            f"belong beside {expected[0]}: it is damaged; save it again"
        )
