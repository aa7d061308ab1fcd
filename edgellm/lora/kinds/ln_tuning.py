"""LN tuning: norms are trained whole (Zhao et al. 2023, https://arxiv.org/abs/2312.11420).

They take the place of the base's (``Adapter.replaced``), so there is nothing to bind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.errors import AdapterError
from edgellm.lora.edit import Edit, Target
from edgellm.tensors import TensorRef


def bind(target: Target, parts: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Edit:
    """Raises ``AdapterError``: this kind has no parts."""
    raise AdapterError(
        f"{target.name}: the adapter holds {', '.join(parts)} for it, and LN tuning has whole "
        "tensors alone: it is damaged; save it again"
    )
