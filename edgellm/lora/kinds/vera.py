"""VeRA: ``W + diag(lambda_b) B diag(lambda_d) A``, with one random pair A, B for all layers.

Kopiczko et al. 2023, https://arxiv.org/abs/2310.11454, equation 2. PEFT stores A and B as large as
the largest layer needs and cuts the others out of their beginnings (``Linear.get_delta_weight``,
``tuners/vera/layer.py``, peft 0.21.2). They are in the file with ``save_projection`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.edit import LowRank, Target
from edgellm.lora.kinds.parts import exactly, linear, rows_scaled, shaped
from edgellm.tensors import TensorRef

PROJECTIONS = ("vera_A", "vera_B")
LAMBDAS = ("vera_lambda_b", "vera_lambda_d")


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> LowRank:
    """The change of ``target`` as a low rank, the lambdas folded into A and B.

    ``parts`` holds the shared ``vera_A`` ``[r, widest in]`` and ``vera_B`` ``[widest out, r]``
    beside the layer's own lambdas. Raises ``AdapterError`` without them, and for what does not fit.
    """
    out, into = linear(target, "VeRA", conv1d=True)
    if not any(name in parts for name in PROJECTIONS):
        raise AdapterError(
            f"{target.name}: the adapter was saved without its random projections "
            "(save_projection=False), which would have to be drawn again by the very torch that it "
            f"was trained with (projection_prng_key {config.get('projection_prng_key')}): load it "
            "with PEFT there, set save_projection=True in its config, and save it again"
        )
    lambda_b, lambda_d, a, b = exactly(target, parts, *LAMBDAS, *PROJECTIONS)
    rank = a.shape[0]
    shaped(target, "vera_lambda_b", lambda_b, (out,))
    shaped(target, "vera_lambda_d", lambda_d, (rank,))
    if rank == 0 or rank != b.shape[1] or rank != config.get("r", rank):
        raise AdapterError(
            f"{target.name}: vera_A has shape {list(a.shape)} and vera_B {list(b.shape)}, and "
            f"adapter_config.json gives rank {config.get('r')}: config and weights belong to "
            "different adapters; fetch both again"
        )
    if a.shape[1] < into or b.shape[0] < out:
        raise AdapterError(
            f"{target.name} {list(target.shape)} is larger than the projections vera_A "
            f"{list(a.shape)} and vera_B {list(b.shape)}: the adapter was trained on another "
            "model; name its own base"
        )
    return LowRank(
        rows_scaled(a, lambda_d, (rank, into)), rows_scaled(b, lambda_b, (out, rank)), 1.0
    )
