"""Rope scaling that is asked for, beyond what a model's config states: ``KIND:FACTOR``.

A model reaches a context of its trained one times the factor, as if its config had said so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgellm.architectures.decoder import Decoder, Rope, RopeScaling
from edgellm.errors import UnsupportedTarget, UsageError

KINDS = ("linear", "ntk", "yarn", "llama3")
LARGEST_FACTOR = 1024.0

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""As in Llama 3.1's own config."""


@dataclass(frozen=True, slots=True)
class AskedScaling:
    """``linear``: arXiv 2306.15595. ``ntk``: the base is raised, so that the longest wave is
    stretched by ``factor`` and the shortest stays. ``yarn``: arXiv 2309.00071. ``llama3``: NTK by
    parts, as Llama 3.1 has it."""

    kind: str
    factor: float

    def __str__(self) -> str:
        return f"{self.kind}:{self.factor:g}"

    def context(self, trained: int) -> int:
        """The tokens that a model of ``trained`` ones reaches."""
        return int(trained * self.factor)

    def warning(self, trained: int) -> str:
        """What whoever uses it must know."""
        return (
            f"rope scaling {self} as asked: {self.context(trained)} tokens of context, where the "
            f"model was trained for {trained}; it may answer worse, also within those"
        )


def parse_scaling(text: str) -> AskedScaling:
    """``yarn:4`` taken apart; raises ``UsageError`` for anything else than a kind and a factor."""
    kind, _, number = text.strip().lower().partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind == "dynamic":
        raise UsageError(
            f"--rope-scaling {text}: frequencies that change while the text grows would make keys "
            f"that are cached already wrong; choose ntk:{number or 'FACTOR'}, which dynamic "
            "becomes where the context is full"
        )
    if kind not in KINDS or not 1 < factor <= LARGEST_FACTOR:
        raise UsageError(
            f"--rope-scaling {text}: expected KIND:FACTOR, a kind of {', '.join(KINDS)} and a "
            f"factor above 1, at most {LARGEST_FACTOR:g}, such as yarn:4"
        )
    return AskedScaling(kind, factor)


def trained_context(stated: int, scaling: RopeScaling | None, where: str) -> int:
    """The context that the model was trained for, where its config states ``stated`` tokens.

    Raises ``UnsupportedTarget`` where it is scaled already and does not say from where.
    """
    if scaling is None:
        return stated
    if not scaling.original_context:
        raise UnsupportedTarget(
            f"{where} has {scaling.kind} rope scaling already, and does not say for how many "
            "tokens the model was trained before: leave --rope-scaling out"
        )
    return scaling.original_context


def raised_theta(theta: float, dimensions: int, factor: float) -> float:
    """The base of ``ntk``: the longest wave is ``factor`` times as long, the shortest as it was."""
    return float(theta * factor ** (dimensions / (dimensions - 2)))


def rescaled_config(
    config: Mapping[str, Any], decoder: Decoder, asked: AskedScaling, where: str
) -> tuple[dict[str, Any], int]:
    """``config``, which describes ``decoder``, with another rope; and the trained context.

    Layers with a window of their own rope keep it. Raises ``UnsupportedTarget`` for a model without
    rotary positions, and one that is scaled already in a way that cannot be taken back.
    """
    rope = main_rope(decoder)
    if rope is None:
        raise UnsupportedTarget(
            f"{where} has no rotary positions, so its context cannot be stretched: leave "
            "--rope-scaling out"
        )
    trained = trained_context(decoder.context_length, rope.scaling, where)
    section: dict[str, Any] = {"rope_type": asked.kind, "factor": asked.factor}
    theta = rope.theta
    if asked.kind == "ntk":
        section = {"rope_type": "default"}
        theta = raised_theta(theta, rope.dimensions, asked.factor)
    if asked.kind in ("yarn", "llama3"):
        section["original_max_position_embeddings"] = trained
    if asked.kind == "llama3":
        section |= LLAMA3
    changed = {**config, "max_position_embeddings": asked.context(trained)}
    changed.pop("original_max_position_embeddings", None)
    ropes = changed.get("rope_parameters")
    if not isinstance(ropes, Mapping):
        changed["rope_theta"] = theta
        changed["rope_scaling"] = None if asked.kind == "ntk" else section
        return changed, trained
    for older in ("rope_scaling", "rope_theta"):
        changed.pop(older, None)
    section["rope_theta"] = theta
    if "partial_rotary_factor" in ropes:
        section["partial_rotary_factor"] = ropes["partial_rotary_factor"]
    nested = "full_attention" in ropes
    changed["rope_parameters"] = {**ropes, "full_attention": section} if nested else section
    return changed, trained


def main_rope(decoder: Decoder) -> Rope | None:
    """The rope of the layers without a window, or of all where every layer has one."""
    ropes = [layer.rope for layer in decoder.attending if layer.window is None]
    return next(iter((*ropes, *(layer.rope for layer in decoder.attending))), None)
