"""Families of encoders by their ``model_type``; each file is imported on use.

A new family is a file and a row in ``ENCODERS``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgellm.registry import attribute

if TYPE_CHECKING:
    from edgellm.architectures.encoder import EncoderFamily
    from edgellm.architectures.seq2seq import Seq2SeqFamily

ENCODERS = {
    "bert": "edgellm.architectures.bert:FAMILY",
    "roberta": "edgellm.architectures.roberta:FAMILY",
    "xlm-roberta": "edgellm.architectures.roberta:XLM",
    "distilbert": "edgellm.architectures.distilbert:FAMILY",
}

SEQ2SEQ = {
    "t5": "edgellm.architectures.t5:FAMILY",
    "mt5": "edgellm.architectures.t5:MT5",
    "bart": "edgellm.architectures.bart:FAMILY",
    "mbart": "edgellm.architectures.mbart:FAMILY",
    "marian": "edgellm.architectures.marian:FAMILY",
}

_SEQ2SEQ = (
    f"it is an encoder with a decoder (seq2seq), of which edgellm converts {', '.join(SEQ2SEQ)}"
)
_RELATIVE = "its attention adds relative positions, which edgellm's encoder graph does not compute"

REFUSED_ENCODERS = {
    **dict.fromkeys(
        ("umt5", "longt5", "pegasus", "m2m_100", "led"),
        _SEQ2SEQ,
    ),
    "mpnet": _RELATIVE,
    "deberta": _RELATIVE,
    "deberta-v2": _RELATIVE,
    "albert": "its layers share one set of weights, behind an embedding of another width",
    "electra": "its embedding may have another width than its layers",
    "modernbert": "its positions are rotary and its layers look at windows",
    "nomic_bert": "its positions are rotary and its feed-forward is gated",
    "xlnet": _RELATIVE,
    "longformer": "its attention looks at windows",
    "big_bird": "its attention looks at blocks",
}
"""Types that look like an encoder of ours, and why they are not."""


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether ``config["model_type"]`` names an encoder that edgellm converts."""
    return config.get("model_type") in ENCODERS


def is_seq2seq(config: Mapping[str, Any]) -> bool:
    """Whether ``config["model_type"]`` names an encoder with a decoder that edgellm converts."""
    return config.get("model_type") in SEQ2SEQ


def seq2seq_family_of(config: Mapping[str, Any]) -> Seq2SeqFamily:
    """The family of an encoder with a decoder; ``KeyError`` for anything else."""
    family: Seq2SeqFamily = attribute(SEQ2SEQ[config["model_type"]])
    return family


def encoder_family_of(config: Mapping[str, Any]) -> EncoderFamily:
    """The family of an encoder; ``KeyError`` for anything else."""
    family: EncoderFamily = attribute(ENCODERS[config["model_type"]])
    return family
