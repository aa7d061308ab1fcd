"""``genai_config.json``: what onnxruntime-genai reads to run the folder that ``to_onnx`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from edgellm.architectures.decoder import Decoder
from edgellm.errors import SourceError

OWN_TYPES = frozenset(
    (
        "gemma", "gemma2", "gemma3_text", "granite", "lfm2", "llama", "mistral", "olmo", "phi",
        "phi3", "qwen2", "qwen3", "smollm3",
    )
)  # fmt: skip
"""Families that genai knows by their own name; it refuses types that it does not know."""

MODEL_TYPE = "llama"
"""What it runs the others as: every decoder of ours has the inputs of its ``llama``. Its ``gpt2``
wants one combined cache tensor a layer."""


def genai_config(
    decoder: Decoder,
    *,
    context_length: int,
    model_file: str,
    bos_token_id: int | None,
    eos_token_ids: tuple[int, ...],
    generation: Mapping[str, Any],
) -> bytes:
    """The file's bytes. Sampling defaults come from the model's own ``generation`` config.

    Raises ``SourceError`` where that holds something else than a number.
    """
    states = _states(decoder)
    first_eos = eos_token_ids[0] if eos_token_ids else 0
    eos: int | list[int] = list(eos_token_ids) if len(eos_token_ids) > 1 else first_eos
    pad = generation.get("pad_token_id")
    config = {
        "model": {
            "bos_token_id": first_eos if bos_token_id is None else bos_token_id,
            "context_length": context_length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": model_file,
                "head_size": decoder.cache_dim,
                "hidden_size": decoder.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                    **states.inputs,
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                    **states.outputs,
                },
                **states.settings,
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": len(decoder.layers),
                "num_key_value_heads": decoder.cache_heads,
            },
            "eos_token_id": eos,
            "pad_token_id": pad if isinstance(pad, int) else first_eos,
            "type": decoder.family if decoder.family in OWN_TYPES else MODEL_TYPE,
            "vocab_size": decoder.vocab_size,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "max_length": context_length,
            "min_length": 0,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": _number(generation, "repetition_penalty", 1.0),
            "temperature": _number(generation, "temperature", 1.0),
            "top_k": int(_number(generation, "top_k", 50)),
            "top_p": _number(generation, "top_p", 1.0),
        },
    }
    return json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"


class States(NamedTuple):
    """What genai is told of layers that keep a state instead of keys and values."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    settings: Mapping[str, Any]


def _states(decoder: Decoder) -> States:
    """As genai's own builder says it (``LFM2Model`` there)."""
    if not decoder.attending:  # which genai does not run
        return States({}, {}, {"layer_types": ["linear_attention"] * len(decoder.layers)})
    widths = [layer.convolution.width for layer in decoder.layers if layer.convolution]
    if not widths:
        return States({}, {}, {})
    types = ["conv" if layer.convolution else "full_attention" for layer in decoder.layers]
    return States(
        {"past_conv_names": "past.%d.conv"},
        {"present_conv_names": "present.%d.conv"},
        {"layer_types": types, "conv_cache_size": max(widths) - 1},
    )


def _number(generation: Mapping[str, Any], key: str, default: float) -> float:
    value = generation.get(key)
    value = default if value is None else value
    if not isinstance(value, int | float):
        raise SourceError(
            f"generation_config.json: {key} is {value!r}, expected a number: correct the file, or "
            "fetch it again"
        )
    return float(value)
