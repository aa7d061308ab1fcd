"""Rank and scale of the LyCORIS kinds (LoHa, LoKr): always ``alpha / r``, by module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.edit import Target
from edgellm.lora.reading.patterns import setting


def rank_and_scale(target: Target, config: Mapping[str, Any]) -> tuple[int, float]:
    """The rank that ``adapter_config.json`` gives ``target``, and ``alpha / r``.

    ``LoHaModel._create_and_replace`` and ``update_layer`` of peft 0.21.2. Factors that are stored
    whole (LoKr) are scaled by it, too, though they have no rank to see. Raises ``AdapterError``
    for a rank that is not positive.
    """
    module = target.name.removesuffix(".weight")
    rank = setting(config.get("rank_pattern"), module, config.get("r"))
    alpha = setting(config.get("alpha_pattern"), module, config.get("alpha"))
    if not isinstance(rank, int) or rank <= 0 or not isinstance(alpha, (int, float)):
        raise AdapterError(
            f"{module}: adapter_config.json gives it rank {rank!r} (r, rank_pattern) and alpha "
            f"{alpha!r} (alpha, alpha_pattern), and a rank above 0 and a number are needed: it is "
            "damaged; fetch it again"
        )
    return rank, alpha / rank
