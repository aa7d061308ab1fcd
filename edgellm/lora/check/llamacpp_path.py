"""What llama.cpp's own way (its converter for adapters, then ``--lora``) makes of an adapter.

Read from its ``convert_lora_to_gguf.py`` and ``llama_adapter_lora_weight::get_scale``: one alpha
for the whole file, each product scaled by alpha over the rank of its own factors.
"""

from __future__ import annotations

import math
from typing import Any

from edgellm.lora.adapter import Adapter

PAIRS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
NORMS = ("_layernorm", ".norm")
AS_PRODUCTS = ("adalora", "loha", "vblora", "vera")
"""Kinds beside LoRA whose change is one product, which ``export.gguf_adapter`` writes."""

TABLES = ("embed_tokens.weight", "lm_head.weight")


def llamacpp_faults(adapter: Adapter) -> tuple[str, ...]:
    """What would go wrong with ``adapter`` there, a sentence each; nothing for a plain LoRA."""
    config = adapter.config
    if adapter.naming == "gguf":
        return ()
    if adapter.kind != "lora":
        return (_not_converted(adapter.kind),)
    return tuple(
        fault
        for fault in (_rslora(config), _alphas(config), *_parts(adapter), *_replaced(adapter))
        if fault
    )


def _not_converted(kind: str) -> str:
    """What its converter does with ``kind``, and whether edgellm can write it for llama.cpp."""
    there = f"its converter of adapters takes LoRA alone, not {kind}"
    if kind in AS_PRODUCTS:
        return f"{there}: convert --keep-adapters writes it as a product that llama.cpp applies"
    return f"{there}: merge it"


def _rslora(config: dict[str, Any]) -> str:
    if not config.get("use_rslora"):
        return ""
    rank = int(config["r"])
    return (
        f"rsLoRA is ignored: changes are scaled by alpha / r instead of alpha / sqrt(r), which "
        f"makes them {math.sqrt(rank):.3g} times too weak at rank {rank}"
    )


def _alphas(config: dict[str, Any]) -> str:
    if not config.get("alpha_pattern"):
        return ""
    return (
        f"alpha_pattern is ignored: every weight gets lora_alpha = {config['lora_alpha']:g}, also "
        f"where one of its {len(config['alpha_pattern'])} patterns says another"
    )


def _parts(adapter: Adapter) -> list[str]:
    others = {part for parts in adapter.parts.values() for part in parts if part not in PAIRS}
    names = {
        "lora_magnitude_vector": "DoRA's magnitudes stop the converter",
        "lora_bias": "biases of lora_B stop the converter",
        "trainable_tokens_delta": "trained token rows stop the converter",
    }
    return [names.get(other, f"{other} stops the converter") for other in sorted(others)]


def _replaced(adapter: Adapter) -> list[str]:
    norms = [name for name in adapter.replaced if any(norm in name for norm in NORMS)]
    others = [name for name in adapter.replaced if name not in norms]
    tables = [name for name in others if name.endswith(TABLES)]
    faults = []
    if tables:
        faults.append(f"whole tables ({', '.join(tables)}) stop the converter")
    if rest := [name for name in others if name not in tables]:
        faults.append(f"{len(rest)} whole tensors ({rest[0]}, ...) stop the converter")
    if norms:
        faults.append(f"{len(norms)} trained norms are dropped in silence when it is loaded")
    if "lm_head.weight" in adapter.parts:
        faults.append("a change of lm_head stops the converter where the head is tied")
    return faults
