"""Rank and scale of LoRA for one module: ``alpha / r``, rsLoRA's ``alpha / sqrt(r)``, patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.reading.patterns import setting


def rank_of(config: Mapping[str, Any], module: str) -> int:
    """The rank that ``adapter_config.json`` gives ``module``."""
    return int(setting(config.get("rank_pattern"), module, config["r"]))


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """What ``B @ A`` of ``module`` is multiplied by; ``rank`` is that of the stored factors.

    ``LoraLayer.update_layer`` of peft 0.21.2; rsLoRA is https://arxiv.org/abs/2312.03732. Raises
    ``AdapterError`` where the config gives another rank: the scale would be wrong.
    """
    stated = rank_of(config, module)
    if rank != stated:
        raise AdapterError(
            f"{module}: the factors have rank {rank} and adapter_config.json says {stated} (r, "
            "rank_pattern), so their scale is unknown: config and weights belong to different "
            "adapters; fetch both again"
        )
    alpha = float(setting(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
