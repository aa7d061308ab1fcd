"""The language model within one that also sees, taken by itself.

Sound where the whole, given text alone, computes what its language model does: then nothing of the
rest is ever read. Where text is treated otherwise for the pictures' sake (attention in both
directions over a prompt, layers that only pictures reach), it is not, and stays refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgellm.architectures import FAMILIES
from edgellm.architectures.family import Family
from edgellm.errors import UnsupportedModel, UsageError
from edgellm.source.matching import listed
from edgellm.tensors import TensorRef

SOUND = {
    "gemma3": "gemma3_text",
    "llava": "",
    "llava_next": "",
    "mistral3": "",
}
"""By ``model_type`` that of the text part; empty where the config's own word for it counts."""

PREFIXES = ("model.language_model.", "language_model.model.")
"""Where the text part's tensors lie, as transformers 5 and 4 save them."""

HEADS = ("lm_head.weight", "language_model.lm_head.weight")

KEPT = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of the whole that count for the text part where it names none."""


def text_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The config of the language model within the one of ``config``.

    Raises ``UsageError`` for a model that is one already, and ``UnsupportedModel`` where the text
    part alone would not be the model.
    """
    kind = config.get("model_type")
    if kind in FAMILIES:
        raise UsageError(f"--text-only: {where} is a model of text ({kind}): leave the option out")
    if kind not in SOUND:
        raise UnsupportedModel(
            f"--text-only: of model_type {kind!r} it is not known that its text part alone answers "
            f"as the whole does; it is of {', '.join(SOUND)}"
        )
    inner = config.get("text_config")
    if not isinstance(inner, Mapping):
        raise UnsupportedModel(f"--text-only: {where} has no text_config: fetch the config again")
    whole = {key: config[key] for key in KEPT if key in config}
    named = {"model_type": SOUND[kind]} if SOUND[kind] else {}
    return {**whole, **inner, **named}


def text_tensors(
    stored: Mapping[str, TensorRef], family: Family
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """The text part's tensors by the family's names, and a note on what was left out."""
    found: dict[str, TensorRef] = {}
    left: list[str] = []
    for name, ref in stored.items():
        prefix = next((each for each in PREFIXES if name.startswith(each)), None)
        if prefix is not None:
            found[family.base_prefix + name.removeprefix(prefix)] = ref
        elif name in HEADS:
            found[HEADS[0]] = ref
        else:
            left.append(name)
    parts = sorted({".".join(name.split(".")[:2]) for name in left})
    note = f"the text part alone: {len(left)} tensors were left out, of {listed(parts)}"
    return found, (note,)
