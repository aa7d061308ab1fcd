"""BERT, and what was distilled or trained in its shape (MiniLM, bge, e5, gte)."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.encoder import (
    ACTIVATIONS,
    BERT_NAMES,
    Activation,
    Encoder,
    EncoderFamily,
    Head,
    Task,
    body,
    masked_lm,
    product,
    read_head,
)
from edgellm.architectures.family import TensorRow


def read_bert(
    config: Config, family: str, head: Head, activation: Activation, padding_id: int | None = None
) -> Encoder:
    """The encoder under the keys that BERT and RoBERTa share."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if hidden % heads:
        raise config.refusal("num_attention_heads", heads, f"a divisor of hidden_size = {hidden}")
    return Encoder(
        family=family,
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("intermediate_size"),
        layers=config.integer("num_hidden_layers", maximum=MOST_LAYERS),
        heads=heads,
        positions=config.integer("max_position_embeddings"),
        token_types=config.integer("type_vocab_size"),
        epsilon=config.number("layer_norm_eps", above=0),
        activation=activation,
        head=head,
        padding_id=padding_id,
    )


def read(config: Config, task: Task, pooler: bool) -> Encoder:
    """The pooler, a dense layer over the first token, stands before the classes too."""
    activation: Activation = config.choice("hidden_act", ACTIVATIONS)
    head = read_head(config, task, first="tanh", pooler=pooler, masked=activation)
    return read_bert(config, "bert", head, activation)


def tensors(encoder: Encoder) -> Iterator[TensorRow]:
    """Every tensor, under the names of a checkpoint with a head."""
    hidden, head = encoder.hidden_size, encoder.head
    yield from body(encoder, "bert.", BERT_NAMES)
    if head.task == "masked_lm":
        cls = "cls.predictions"
        yield from masked_lm(
            encoder,
            f"{cls}.transform.dense",
            f"{cls}.transform.LayerNorm",
            f"{cls}.decoder",
            f"{cls}.bias",
        )
    elif head.dense is not None:
        yield from product("bert.pooler.dense", "cls", hidden, hidden)
    if head.labels:
        yield from product("classifier", "cls.output", len(head.labels), hidden, "head")


FAMILY = EncoderFamily(
    model_type="bert",
    class_prefix="Bert",
    read=read,
    tensors=tensors,
    base_prefix="bert.",
    head_prefixes=("cls.", "classifier.", "qa_outputs.", "bert.pooler."),
)
