"""Families of models by their ``model_type``; each file is imported on use.

A new family is one file in ``families``, named after its ``model_type``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from edgellm.architectures import families
from edgellm.architectures.encoders import ENCODERS, REFUSED_ENCODERS, SEQ2SEQ
from edgellm.architectures.family import Family
from edgellm.architectures.gguf_metadata import facts_of, gguf_keys, rope_factors, vocab_size
from edgellm.errors import UnsupportedModel
from edgellm.registry import suggestion
from edgellm.remote.finding import AUTO_MAP

__all__ = [
    "FAMILIES", "REFUSED", "config_from_gguf", "family_of", "gguf_keys", "passed_over",
    "rope_factors",
]  # fmt: skip

FAMILIES = tuple(sorted(module.name for module in pkgutil.iter_modules(families.__path__)))
"""Every ``model_type`` that is converted."""

# Types that look like one of ours, and why they are not.
REFUSED = {
    "gemma3": "it is a vision-language model: --text-only converts its language model",
    "llava": "it is a vision-language model: --text-only converts its language model",
    "llava_next": "it is a vision-language model: --text-only converts its language model",
    "mistral3": "it is a vision-language model: --text-only converts its language model",
    "paligemma": "it is a vision-language model, which sees prompts in both directions",
    "whisper": "it is a model of speech",
    "qwen2_audio": "it is a model of speech and text",
    "phimoe": "its router masks scores that lie apart before it weighs them (sparse mixer)",
    "gpt_oss": "its feed-forward is a mixture of experts, and its attention has sinks",
    "dbrx": "its feed-forward is a mixture of experts",
    "rwkv": "it is a recurrent model, without attention",
    "jamba": "state-space layers stand between its attention layers",
    "bamba": "state-space layers stand between its attention layers",
    "falcon_h1": "state-space layers stand beside its attention",
    "zamba2": "state-space layers stand between its attention layers",
    "qwen2_vl": "it is a vision-language model with positions of its own (mrope)",
    "qwen2_5_vl": "it is a vision-language model with positions of its own (mrope)",
    "qwen3_vl": "it is a vision-language model with positions of its own (mrope)",
    "mllama": "it is a vision-language model with cross-attention",
    "llama4": "it is a vision-language model with a mixture of experts",
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
        return family_named(kind)
    if kind in ENCODERS or kind in SEQ2SEQ:
        what = "an encoder" if kind in ENCODERS else "an encoder with a decoder"
        raise UnsupportedModel(
            f"model_type {kind!r} is {what}, which `edgellm convert` writes as ONNX and "
            f"`edgellm run` runs; this is for language models: {', '.join(FAMILIES)}"
        )
    if kind in REFUSED:
        raise UnsupportedModel(f"model_type {kind!r} is not converted: {REFUSED[kind]}")
    code = ""
    if config.get(AUTO_MAP):
        code = (
            f" (Python of its own, which {AUTO_MAP} names, is never run but with "
            "--trust-remote-code, and then only to compare with: the network that is written is "
            "edgellm's own, which has none for this type)"
        )
    near = suggestion(kind, (*FAMILIES, *ENCODERS, *SEQ2SEQ))
    raise UnsupportedModel(f"model_type {kind!r} is not one that edgellm converts{code}: {near}")


def family_named(model_type: str) -> Family:
    """The family of ``FAMILIES`` with that name."""
    found: Family = importlib.import_module(f"{families.__name__}.{model_type}").FAMILY
    return found


def passed_over(arch: str) -> tuple[str, ...]:
    """Parts of a layer, and the head, that llama.cpp's graph of ``arch`` takes no adapters for."""
    layouts = (family_named(name).gguf for name in FAMILIES)
    return next(
        (layout.graph.without_adapters for layout in layouts if layout and layout.arch == arch), ()
    )


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str] = (),
    factors: Sequence[float] | None = None,
    *,
    ignore_config_keys: Collection[str] = (),
) -> dict[str, Any]:
    """A config in Hugging Face's words that means what llama.cpp computes from that file.

    ``tensor_names`` tell a tied head and biases; ``factors`` are the values of
    ``rope_freqs.weight``, if there is one. Raises ``UnsupportedModel`` for an architecture or a
    key of it that is not understood.
    """
    arch = str(metadata.get("general.architecture"))
    layouts = {name: family_named(name).gguf for name in FAMILIES}
    reading = {
        layout.arch: (name, layout.config)
        for name, layout in layouts.items()
        if layout is not None and layout.config is not None
    }
    if arch not in reading:
        raise UnsupportedModel(
            f"GGUF of the architecture {arch!r} is not converted; edgellm reads "
            f"{', '.join(sorted(reading))}"
        )
    name, read = reading[arch]
    facts = facts_of(arch, metadata, tensor_names, factors, ignore_config_keys)
    config = {
        "model_type": name,
        "vocab_size": vocab_size(facts.keys, metadata),
        "tie_word_embeddings": "output.weight" not in facts.names,
        **read(facts),
    }
    facts.keys.refuse_unread()
    return config
