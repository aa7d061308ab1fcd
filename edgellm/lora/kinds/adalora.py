"""AdaLoRA: ``W + scale * B diag(E) A``, whose rank was shared out while training.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512, section 3.1. The scale is ``lora_alpha`` over
the rank that training began with, plus 1e-5, whatever rank is left
(``SVDLinear.get_delta_weight`` and ``resize_modules_by_rank_pattern``, ``tuners/adalora``, peft
0.21.2); what ``rank_pattern`` masks out is not saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edgellm.errors import AdapterError
from edgellm.lora.edit import LowRank, Target
from edgellm.lora.kinds.parts import exactly, linear, rows_scaled, shaped
from edgellm.tensors import TensorRef

PARTS = ("lora_A", "lora_B", "lora_E")


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> LowRank:
    """The change of ``target`` as a low rank, E folded into A; it may be empty.

    Raises ``AdapterError`` for what does not fit.
    """
    out, into = linear(target, "AdaLoRA", conv1d=True)
    a, b, e = exactly(target, parts, *PARTS)
    rank = e.shape[0]
    shaped(target, "lora_E", e, (rank, 1))
    shaped(target, "lora_A", a, (rank, into))
    shaped(target, "lora_B", b, (out, rank))
    first_rank, alpha = config.get("init_r", 12), config.get("lora_alpha", 8)
    if rank > first_rank or not alpha > 0:
        raise AdapterError(
            f"{target.name}: the factors have rank {rank}, and adapter_config.json gives init_r "
            f"{first_rank} and lora_alpha {alpha}; a rank of at most init_r and an alpha above 0 "
            "are needed: config and weights belong to different adapters; fetch both again"
        )
    divisor = np.float32(first_rank) + np.float32(1e-5)
    return LowRank(rows_scaled(a, e, (rank, into)), b, float(alpha) / float(divisor))
