"""DistilBERT: BERT with half of the layers, without token types and without a pooler."""

from __future__ import annotations

from collections.abc import Iterator

from edgellm.architectures.config import MOST_LAYERS, Config
from edgellm.architectures.encoder import (
    ACTIVATIONS,
    Activation,
    Encoder,
    EncoderFamily,
    Names,
    Task,
    body,
    masked_lm,
    product,
    read_head,
)
from edgellm.architectures.family import TensorRow

EPSILON = 1e-12
"""Written into transformers' class; no key holds it."""

NAMES = Names(
    types="",
    layer="transformer.layer.{}",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    output_norm="output_layer_norm",
)


def read(config: Config, task: Task, pooler: bool) -> Encoder:
    """Classes are read off the first token through a dense layer with ReLU; no pooler exists."""
    hidden, heads = config.integer("dim"), config.integer("n_heads")
    if hidden % heads:
        raise config.refusal("n_heads", heads, f"a divisor of dim = {hidden}")
    activation: Activation = config.choice("activation", ACTIVATIONS)
    return Encoder(
        family="distilbert",
        vocab_size=config.integer("vocab_size"),
        hidden_size=hidden,
        ffn_size=config.integer("hidden_dim"),
        layers=config.integer("n_layers", maximum=MOST_LAYERS),
        heads=heads,
        positions=config.integer("max_position_embeddings"),
        token_types=0,
        epsilon=EPSILON,
        activation=activation,
        head=read_head(config, task, first="relu", pooler=False, masked=activation),
    )


def tensors(encoder: Encoder) -> Iterator[TensorRow]:
    """Every tensor, under the names of a checkpoint with a head."""
    hidden, head = encoder.hidden_size, encoder.head
    yield from body(encoder, "distilbert.", NAMES)
    if head.task == "masked_lm":
        yield from masked_lm(
            encoder,
            "vocab_transform",
            "vocab_layer_norm",
            "vocab_projector",
            "vocab_projector.bias",
        )
    elif head.dense is not None:
        yield from product("pre_classifier", "cls", hidden, hidden)
    if head.labels:
        yield from product("classifier", "cls.output", len(head.labels), hidden, "head")


FAMILY = EncoderFamily(
    model_type="distilbert",
    class_prefix="DistilBert",
    read=read,
    tensors=tensors,
    base_prefix="distilbert.",
    head_prefixes=("vocab_", "pre_classifier.", "classifier.", "qa_outputs."),
)
