"""Families of models by their ``model_type``; each file is imported on use.

A new family is a file and a row in ``FAMILIES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.architectures.encoders import ENCODERS, REFUSED_ENCODERS, SEQ2SEQ
from edgellm.architectures.family import Family
from edgellm.architectures.gguf_metadata import config_from_gguf, gguf_keys, rope_factors
from edgellm.errors import UnsupportedModel
from edgellm.registry import attribute, suggestion

__all__ = ["FAMILIES", "REFUSED", "config_from_gguf", "family_of", "gguf_keys", "rope_factors"]

FAMILIES = {
    "llama": "edgellm.architectures.llama:FAMILY",
    "mistral": "edgellm.architectures.mistral:FAMILY",
    "qwen2": "edgellm.architectures.qwen2:FAMILY",
    "qwen3": "edgellm.architectures.qwen3:FAMILY",
    "gemma3_text": "edgellm.architectures.gemma3:FAMILY",
    "gpt2": "edgellm.architectures.gpt2:FAMILY",
}

# Types that look like one of ours, and why they are not.
REFUSED = {
    "gemma3": (
        "it is the vision-language model, of which edgellm does not convert the vision part: take "
        "a text checkpoint (gemma3_text, such as gemma-3-1b), or save the text part by itself"
    ),
    "mixtral": "its feed-forward is a mixture of experts",
    "qwen2_moe": "its feed-forward is a mixture of experts",
    "qwen3_moe": "its feed-forward is a mixture of experts",
    "qwen2_vl": "it is a vision-language model with positions of its own (mrope)",
    "qwen2_5_vl": "it is a vision-language model with positions of its own (mrope)",
    "qwen3_vl": "it is a vision-language model with positions of its own (mrope)",
    "mllama": "it is a vision-language model with cross-attention",
    "llama4": "it is a vision-language model with a mixture of experts",
    "gemma": "it is the first Gemma, whose norms and scales differ from Gemma 3's",
    "gemma2": "it is Gemma 2, whose soft caps edgellm does not compute",
    **REFUSED_ENCODERS,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that ``config["model_type"]`` names.

    Raises ``UnsupportedModel`` for any other, with the reason where one is known.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise UnsupportedModel(
            f"config.json: the key model_type is {'missing' if kind is None else repr(kind)}; "
            f"edgellm converts {', '.join((*FAMILIES, *ENCODERS, *SEQ2SEQ))}"
        )
    if kind in FAMILIES:
        family: Family = attribute(FAMILIES[kind])
        return family
    if kind in ENCODERS or kind in SEQ2SEQ:
        what = "an encoder" if kind in ENCODERS else "an encoder with a decoder"
        raise UnsupportedModel(
            f"model_type {kind!r} is {what}, which `edgellm convert` writes as ONNX and "
            f"`edgellm run` runs; this is for language models: {', '.join(FAMILIES)}"
        )
    if kind in REFUSED:
        raise UnsupportedModel(f"model_type {kind!r} is not converted: {REFUSED[kind]}")
    near = suggestion(kind, (*FAMILIES, *ENCODERS, *SEQ2SEQ))
    raise UnsupportedModel(f"model_type {kind!r} is not one that edgellm converts: {near}")
