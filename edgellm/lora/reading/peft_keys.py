"""Names of an adapter's tensors: which weight each means, and which part of its change it is.

PEFT saves ``base_model.model.`` + the module's name in the base + ``.lora_A.weight`` and leaves the
adapter's own name out; what trainers save by themselves still has it (``lora_A.default.weight``),
and the wrappers of ``torch.compile``, FSDP and DistributedDataParallel with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from edgellm.errors import AdapterError

TOKENS = "trainable_tokens_delta"
LORA_BIAS = "lora_bias"
"""What the bias of ``lora_B`` is called here: a part of the base's bias, not of its weight."""

PARTS: Mapping[str, tuple[str, ...]] = {
    "lora": (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
        TOKENS,
    ),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "lokr": (
        "lokr_w1",
        "lokr_w1_a",
        "lokr_w1_b",
        "lokr_w2",
        "lokr_w2_a",
        "lokr_w2_b",
        "lokr_t2",
    ),
    "ia3": ("ia3_l",),
    "vera": ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B"),
    "oft": ("oft_R", "oft_r", "oft_embedding_R"),
    "boft": ("boft_R", "boft_s"),
    "adalora": ("lora_A", "lora_B", "lora_E"),
    "c3a": ("c3a_kernel",),
    "hira": ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    "hra": ("hra_u",),
    "miss": ("miss_block",),
    "vblora": ("vblora_logits_A", "vblora_logits_B", "vblora_vector_bank"),
    "ln_tuning": (),
    "trainable_tokens": (TOKENS,),
}
"""For each row of ``KINDS``, the tensors that a module of it may have."""

SHARED = ("vera_A", "vera_B", "vblora_vector_bank")
"""Parts that are stored once and serve every module."""

PASSED_OVER = ("lora_velora_embed",)
"""What only training needs: VeLoRA's projection shapes its gradients."""

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PREFIX = ["base_model", "model"]
DEFAULT = "default"
"""The name that PEFT gives an adapter unless told otherwise."""

WHOLE_HOLDERS = ("modules_to_save", "ln_tuning_layers")
"""Where PEFT keeps modules that are trained whole: ``NAME.modules_to_save.ADAPTER.weight``."""


@dataclass(frozen=True, slots=True)
class Place:
    """What one tensor of an adapter is.

    ``part`` of the change of weight ``name``; the whole of it where ``part`` is empty. A part that
    serves all weights has no ``name``.
    """

    name: str
    part: str


def places(
    keys: Iterable[str], kind: str, config: Mapping[str, Any], where: str
) -> dict[str, Place]:
    """What each of ``keys`` is, those left out that change nothing.

    Raises ``AdapterError`` for a key that is not understood, and for two that mean the same.
    """
    whole = config.get("modules_to_save") or ()
    found: dict[str, Place] = {}
    first: dict[Place, str] = {}
    for key in keys:
        place = place_of(key, kind, whole, where)
        if place is None:
            continue
        twin = first.setdefault(place, key)
        trained = [each for each in (twin, key) if WHOLE_HOLDERS[0] in each.split(".")]
        if twin != key and len(trained) == 1:
            # Of a resized vocabulary PEFT saves the untrained layer too, beside its trained copy.
            found.pop(twin, None)
            first[place], found[trained[0]] = trained[0], place
            continue
        if twin != key:
            raise AdapterError(
                f"{where}: {twin} and {key} are the same {place.part or 'tensor'} of {place.name}: "
                "the file holds two adapters, or was put together by hand; save one alone"
            )
        found[key] = place
    return found


def place_of(key: str, kind: str, whole: Collection[str], where: str) -> Place | None:
    """What ``key`` is; None for a tensor that changes nothing.

    ``whole``: names of modules that were trained whole. Raises ``AdapterError`` for a key that is
    not understood.
    """
    segments = _bare(key)
    if "original_module" in segments or any(name in segments for name in PASSED_OVER):
        return None
    index = next((i for i, segment in enumerate(segments) if segment in PARTS[kind]), None)
    if index is None:
        return _whole_place(key, segments, kind, whole, where)
    module, part, rest = segments[:index], segments[index], segments[index + 1 :]
    leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
    if len(rest) > 1 or (leaf == "bias" and part != "lora_B"):
        raise _unknown(key, kind, where)
    if leaf == "bias":
        part = LORA_BIAS
    if part in SHARED:
        return Place("", part)
    # Only nested target_parameters need to know how deep they are; see edgellm.lora.experts.
    nested = part in ("lora_A", "lora_B")
    names = [name for name in module if nested or name != "base_layer"]
    if part == TOKENS and names[-1:] == ["token_adapter"]:
        names.pop()
    if not names:
        raise _unknown(key, kind, where)
    return Place(".".join([*names, leaf]), part)


def _bare(key: str) -> list[str]:
    """The segments of ``key`` without what PEFT and other wrappers put before and between."""
    segments = [segment for segment in key.split(".") if segment not in WRAPPERS]
    while segments[:1] == ["module"]:
        segments = segments[1:]
    while segments[:2] == PREFIX:
        segments = segments[2:]
    return segments


def _whole_place(
    key: str, segments: list[str], kind: str, whole: Collection[str], where: str
) -> Place:
    """A tensor that takes the place of the base's: trained whole, a bias, or saved beside."""
    for holder in WHOLE_HOLDERS:
        if holder in segments:
            index = segments.index(holder)
            rest = segments[index + 1 :]
            segments = segments[:index] + (rest[1:] if rest[:1] == [DEFAULT] else rest)
    names = [name for name in segments if name not in ("base_layer", "token_adapter")]
    module, leaf = ".".join(names[:-1]), names[-1] if names else ""
    saved = any(f".{name}." in f".{module}." for name in whole)
    if not module or (leaf not in ("weight", "bias") and not saved):
        raise _unknown(key, kind, where)
    return Place(f"{module}.{leaf}", "")


def _unknown(key: str, kind: str, where: str) -> AdapterError:
    parts = ", ".join(PARTS[kind]) or "whole tensors"
    return AdapterError(
        f"{where}: the tensor {key} is no part of an adapter of the kind {kind.upper()} (known are "
        f"{parts}) and no whole weight or bias: what it does is unknown, so the adapter is not "
        "merged without it; save it again with a current version of PEFT"
    )
