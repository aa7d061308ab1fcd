"""mBART: BART with norms before everything, and one more behind the last layer of each side."""

from __future__ import annotations

from dataclasses import replace

from edgellm.architectures.bart import COPIES, SHARED, described, tensors
from edgellm.architectures.config import Config
from edgellm.architectures.seq2seq import Seq2Seq, Seq2SeqFamily


def read(config: Config) -> Seq2Seq:
    """As transformers' class, whatever old configs say of norms; other values are refused.

    Without ``decoder_start_token_id`` an answer begins with ``bos_token_id``, as in transformers'
    ``generate``.
    """
    for key in ("normalize_embedding", "normalize_before", "add_final_layer_norm"):
        config.neutral(key, True)
    begin = config.integer("bos_token_id", 0, minimum=0)
    start = config.integer("decoder_start_token_id", begin, minimum=0)
    return replace(described(config, "mbart", start), pre_norm=True)


FAMILY = Seq2SeqFamily(
    model_type="mbart",
    architecture="MBartForConditionalGeneration",
    read=read,
    tensors=tensors,
    shared=SHARED,
    copies=COPIES,
    ignored_tensors=(".version",),
)
