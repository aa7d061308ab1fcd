"""RoBERTa and XLM-RoBERTa: BERT whose positions begin behind the padding's, with other heads."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.bert import read_bert
from edgellm.architectures.config import Config
from edgellm.architectures.encoder import (
    ACTIVATIONS,
    BERT_NAMES,
    Encoder,
    EncoderFamily,
    Task,
    body,
    masked_lm,
    product,
    read_head,
)
from edgellm.architectures.family import TensorRow


def read(config: Config, task: Task, pooler: bool) -> Encoder:
    """The head for masked tokens takes GELU, whatever ``hidden_act`` says."""
    head = read_head(config, task, first="tanh", pooler=pooler, masked="gelu")
    padding = config.integer("pad_token_id", minimum=0)
    return read_bert(
        config, "roberta", head, config.choice("hidden_act", ACTIVATIONS), padding_id=padding
    )


def tensors(encoder: Encoder) -> Iterator[TensorRow]:
    """Every tensor, under the names of a checkpoint with a head."""
    hidden, head = encoder.hidden_size, encoder.head
    yield from body(encoder, "roberta.", BERT_NAMES)
    if head.task == "masked_lm":
        yield from masked_lm(
            encoder, "lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias"
        )
    elif head.task == "embeddings" and head.dense is not None:
        yield from product("roberta.pooler.dense", "cls", hidden, hidden)
    elif head.task == "sequence_classification":
        yield from product("classifier.dense", "cls", hidden, hidden)
        yield from product("classifier.out_proj", "cls.output", len(head.labels), hidden, "head")
    elif head.task == "token_classification":
        yield from product("classifier", "cls.output", len(head.labels), hidden, "head")


def _family(model_type: str, class_prefix: str) -> EncoderFamily:
    return EncoderFamily(
        model_type=model_type,
        class_prefix=class_prefix,
        read=read,
        tensors=tensors,
        base_prefix="roberta.",
        head_prefixes=("lm_head.", "classifier.", "qa_outputs.", "roberta.pooler."),
    )


FAMILY = _family("roberta", "Roberta")
XLM = _family("xlm-roberta", "XLMRoberta")
