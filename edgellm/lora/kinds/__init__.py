"""The kinds of adapter, one file each: how its parts change a weight, beside the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from edgellm import registry
from edgellm.lora.edit import Edit, Target
from edgellm.tensors import TensorRef

Bind = Callable[[Target, Mapping[str, TensorRef], Mapping[str, Any]], Edit]
"""Parts and ``adapter_config.json`` bound to a weight; raises ``AdapterError`` where they do not
fit. A weight's own settings (``rank_pattern``, ``alpha_pattern``) are looked up by its name."""

KINDS = {
    "lora": "edgellm.lora.kinds.lora:bind",
    "loha": "edgellm.lora.kinds.loha:bind",
    "lokr": "edgellm.lora.kinds.lokr:bind",
    "ia3": "edgellm.lora.kinds.ia3:bind",
    "vera": "edgellm.lora.kinds.vera:bind",
    "oft": "edgellm.lora.kinds.oft:bind",
    "boft": "edgellm.lora.kinds.boft:bind",
    "adalora": "edgellm.lora.kinds.adalora:bind",
    "c3a": "edgellm.lora.kinds.c3a:bind",
    "hira": "edgellm.lora.kinds.hira:bind",
    "hra": "edgellm.lora.kinds.hra:bind",
    "miss": "edgellm.lora.kinds.miss:bind",
    "vblora": "edgellm.lora.kinds.vblora:bind",
    "ln_tuning": "edgellm.lora.kinds.ln_tuning:bind",
    "trainable_tokens": "edgellm.lora.kinds.trainable_tokens:bind",
}
"""PEFT's ``peft_type``, in lower case, to the function that binds its parts."""


def bind_of(kind: str) -> Bind:
    """The function of ``kind``, imported now."""
    function: Bind = registry.attribute(KINDS[kind])
    return function
