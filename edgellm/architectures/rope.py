"""Rotary positions: the frequencies of each kind, and how a config states them.

Two styles of config are read: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters``
(transformers 5), which holds both.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Rope, RopeScaling
from edgellm.errors import UnsupportedModel

Frequencies = npt.NDArray[np.float64]
# A rope, and the context length that it was read for.
StatedRope = tuple[Rope, int]

REFUSED_TYPES = {
    "longrope": "it lacks short_factor or long_factor",
    "su": "it lacks short_factor or long_factor",
    "proportional": "no supported family uses it",
    "axial": "it encodes positions in an image",
    "mrope": "it encodes positions in images and video",
}


def inverse_frequencies(rope: Rope) -> tuple[Frequencies, float]:
    """Angle per token of each pair, float64 ``[dimensions / 2]``, and the factor of cos and sin.

    Equal to transformers' ``ROPE_INIT_FUNCTIONS``, which computes in float32.
    """
    exponents = np.arange(0, rope.dimensions, 2, dtype=np.float64) / rope.dimensions
    base: Frequencies = np.power(rope.theta, -exponents)
    scaling = rope.scaling
    if scaling is None:
        return base, 1.0
    return _SCALED[scaling.kind](base, rope, scaling), scaling.attention_factor


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's factor of cos and sin: 0.1 ln(s) + 1, arXiv 2309.00071 section 3.4, equation 22."""
    return 1.0 if factor <= 1.0 else 0.1 * scale * math.log(factor) + 1.0


def _linear(base: Frequencies, rope: Rope, scaling: RopeScaling) -> Frequencies:
    return base / scaling.factor


def _listed(base: Frequencies, rope: Rope, scaling: RopeScaling) -> Frequencies:
    factors: Frequencies = np.asarray(scaling.factors, dtype=np.float64)
    return base / factors


def _llama3(base: Frequencies, rope: Rope, scaling: RopeScaling) -> Frequencies:
    """Long waves are stretched, short ones kept, those between blended (Llama 3.1's code)."""
    turns = scaling.original_context * base / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept: Frequencies = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return kept * base + (1 - kept) * base / scaling.factor


def _yarn(base: Frequencies, rope: Rope, scaling: RopeScaling) -> Frequencies:
    """YaRN's NTK by parts, arXiv 2309.00071 section 3.2, with the reference code's rounding."""
    low = _pair_with_turns(scaling.beta_fast, rope, scaling)
    high = _pair_with_turns(scaling.beta_slow, rope, scaling)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dimensions - 1)
    if low == high:
        high += 0.001  # as the reference code does, to divide
    pairs = np.arange(base.size, dtype=np.float64)
    stretched: Frequencies = np.clip((pairs - low) / (high - low), 0.0, 1.0)
    return (1 - stretched) * base + stretched * base / scaling.factor


def _pair_with_turns(turns: float, rope: Rope, scaling: RopeScaling) -> float:
    """Index of the pair that makes that many turns within the trained context."""
    waves = scaling.original_context / (turns * 2 * math.pi)
    return rope.dimensions * math.log(waves) / (2 * math.log(rope.theta))


def read_rope(
    config: Config,
    head_dim: int,
    context: int,
    theta: float | None = None,
    *,
    turned: float | None = None,
) -> StatedRope:
    """The rope that a config states for all its layers, in either style, and its context length.

    ``context`` is ``max_position_embeddings``. ``theta``: what the family's config class takes
    where the config names none; None where it must. ``turned``: likewise the share of a head's
    values that are turned; None where the family turns all of them.
    Raises ``UnsupportedModel`` for a kind that is not understood, and where two places of the
    config contradict each other.
    """
    if turned is None:
        config.neutral("partial_rotary_factor", 1)
    share = config.number("partial_rotary_factor", turned or 1.0, above=0)
    trained = config.integer("original_max_position_embeddings", 0, minimum=0) or context
    stated = config.number("rope_theta", above=1.0) if config.has("rope_theta") else None
    ropes = [
        rope_of_section(
            config.section(key), head_dim, context, stated, trained, theta, turned and share
        )
        for key in ("rope_parameters", "rope_scaling")
        if config.has(key)
    ]
    config.skip("rope_theta", "rope_parameters", "rope_scaling")
    if len(set(ropes)) > 1:
        raise UnsupportedModel(
            f"{config.where}: rope_parameters and rope_scaling contradict each other "
            f"({ropes[0][0]} and {ropes[1][0]}): take one of them out"
        )
    if ropes:
        return ropes[0]
    return Rope(_theta(config, stated, theta), _dimensions(config, head_dim, share)), context


def rope_of_section(
    section: Config,
    head_dim: int,
    context: int,
    stated_theta: float | None,
    trained_context: int,
    default_theta: float | None = None,
    turned: float | None = None,
) -> StatedRope:
    """The rope of one ``rope_scaling`` or ``rope_parameters`` object, and its context length.

    ``turned`` is as ``read_rope`` takes it. ``stated_theta`` is the ``rope_theta`` beside it, if
    any; ``trained_context`` counts where the object names no
    ``original_max_position_embeddings``.
    """
    kind = section.text("rope_type", section.text("type", "default"))
    section.neutral("type", kind)
    if turned is None:
        section.neutral("partial_rotary_factor", 1)
    share = section.number("partial_rotary_factor", turned or 1.0, above=0)
    dimensions = _dimensions(section, head_dim, share)
    own_theta = section.number("rope_theta", above=1.0) if section.has("rope_theta") else None
    if own_theta is not None and stated_theta is not None and own_theta != stated_theta:
        raise section.refusal("rope_theta", own_theta, f"{stated_theta:g} as beside it")
    theta = own_theta or _theta(section, stated_theta, default_theta)
    trained = section.integer("original_max_position_embeddings", trained_context)
    lists = ("short_factor", "long_factor")
    if kind in ("longrope", "su") and all(section.has(key) for key in lists):
        return _read_longrope(section, Rope(theta, dimensions), trained, context)
    if kind not in _READERS:
        why = f" (not {kind}: {REFUSED_TYPES[kind]})" if kind in REFUSED_TYPES else ""
        raise section.refusal("rope_type", kind, ", ".join(_READERS) + why)
    return _READERS[kind](section, Rope(theta, dimensions), trained, context)


def _dimensions(section: Config, head_dim: int, share: float) -> int:
    """How many values of a head are turned, ``share`` of all."""
    dimensions = int(head_dim * share)
    if not 0 < dimensions <= head_dim or dimensions % 2:
        raise section.refusal(
            "partial_rotary_factor", share, f"a share of {head_dim} values that makes pairs"
        )
    return dimensions


def _theta(config: Config, stated: float | None, default: float | None) -> float:
    theta = default if stated is None else stated
    return config.number("rope_theta") if theta is None else theta


def _read_default(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    return rope, context


def _read_linear(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    scaling = RopeScaling("linear", section.number("factor", above=0))
    return replace(rope, scaling=scaling), context


def _read_llama3(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    low = section.number("low_freq_factor", above=0)
    high = section.number("high_freq_factor", above=low)
    factor = section.number("factor", above=0)
    scaling = RopeScaling("llama3", factor, trained, low, high)
    return replace(rope, scaling=scaling), context


def _read_yarn(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    factor = section.number("factor", above=0)
    section.skip("mscale", "mscale_all_dim")
    if section.has("attention_factor"):
        attention = section.number("attention_factor", above=0)
    else:
        # transformers counts zero as absent here, and either alone as neither.
        scale = section.number("mscale", 0.0)
        scale_all = section.number("mscale_all_dim", 0.0)
        attention = yarn_attention_factor(factor)
        if scale and scale_all:
            attention = yarn_attention_factor(factor, scale) / yarn_attention_factor(
                factor, scale_all
            )
    section.skip("attention_factor")
    fast = section.number("beta_fast", 32.0, above=0)
    slow = section.number("beta_slow", 1.0, above=0)
    if fast < slow:
        raise section.refusal("beta_fast", fast, f"no less than beta_slow = {slow:g}")
    scaling = RopeScaling(
        "yarn",
        factor,
        trained,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=attention,
        truncate=section.flag("truncate", True),
    )
    return replace(rope, scaling=scaling), context


def _read_dynamic(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    """Dynamic NTK: theta grows with the text, so it is fixed for the context that was asked for.

    The formula is transformers' ``_compute_dynamic_ntk_parameters``.
    """
    factor = section.number("factor", above=0)
    wanted = section.context
    if wanted is None:
        raise section.refusal(
            "rope_type",
            "dynamic",
            f"a kind that does not depend on the length of the text; name a context length to fix "
            f"it for (--context; it is exact up to {context} tokens)",
        )
    if wanted <= context:
        return rope, context
    section.note(
        f"dynamic rope was fixed for a context of {wanted} tokens; shorter texts see the "
        f"frequencies of that length, where transformers changes them as the text grows"
    )
    dim = rope.dimensions
    growth = factor * wanted / context - (factor - 1)
    theta = float(rope.theta * growth ** (dim / (dim - 2)))
    return replace(rope, theta=theta), wanted


def _read_factors(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    """Our own spelling for what a GGUF file says: the factors themselves."""
    listed = _listed_rope(section, "factors", section.numbers("factors"), rope)
    assert listed.scaling is not None
    attention = section.number("attention_factor", 1.0, above=0)
    return replace(listed, scaling=replace(listed.scaling, attention_factor=attention)), context


def _read_longrope(section: Config, rope: Rope, trained: int, context: int) -> StatedRope:
    """Phi's: one list of factors within the trained length, another for texts beyond it.

    transformers goes over from one to the other where a text passes that length; here it is
    decided once, by the context that was asked for. Cos and sin grow by
    ``sqrt(1 + ln(factor) / ln(trained))`` (transformers' ``_compute_longrope_parameters``). Equal
    lists are how mlx-lm's folders have the factors of a GGUF file.
    """
    short, long = section.numbers("short_factor"), section.numbers("long_factor")
    stretched = section.number("factor", context / trained, above=0)
    grown = 1.0 if stretched <= 1 else math.sqrt(1 + math.log(stretched) / math.log(trained))
    attention = section.number("attention_factor", grown, above=0)
    wanted = section.context or trained
    if short == long:
        key, reach = "long_factor", context
    elif wanted > trained:
        key, reach = "long_factor", min(wanted, context)
        section.note(
            f"longrope was fixed to its factors for more than {trained} tokens; shorter texts see "
            "these too, where transformers has others for them"
        )
    else:
        key, reach = "short_factor", min(trained, context)
        if context > trained:
            section.note(
                f"longrope was fixed to its factors for up to {trained} tokens, where the model "
                f"reaches {context}: name a longer context for the others (--context)"
            )
    listed = _listed_rope(section, key, short if key == "short_factor" else long, rope)
    assert listed.scaling is not None
    return replace(listed, scaling=replace(listed.scaling, attention_factor=attention)), reach


def _listed_rope(section: Config, key: str, factors: tuple[float, ...], rope: Rope) -> Rope:
    if len(factors) != rope.dimensions // 2 or min(factors) <= 0:
        raise section.refusal(key, factors, f"{rope.dimensions // 2} numbers above 0")
    return replace(rope, scaling=RopeScaling("factors", factors=factors))


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "factors": _listed}
_READERS = {
    "default": _read_default,
    "linear": _read_linear,
    "llama3": _read_llama3,
    "yarn": _read_yarn,
    "dynamic": _read_dynamic,
    "factors": _read_factors,
}
