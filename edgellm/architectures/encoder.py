"""What an encoder (BERT and its kin) computes, said once and read by every exporter and runtime.

A family file (``bert.py``, ``roberta.py``, ``distilbert.py``) turns a ``config.json`` into an
``Encoder``. Every token sees every other one, norms follow the attention and the feed-forward, and
a head says what is read off the last layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from edgellm.architectures.config import HARMLESS_KEYS, NEUTRAL_VALUES, Config
from edgellm.architectures.family import TensorRow
from edgellm.errors import UnsupportedModel

Activation = Literal["gelu", "gelu_tanh", "relu", "silu", "tanh"]

Task = Literal["embeddings", "sequence_classification", "token_classification", "masked_lm"]

Scores = Literal["softmax", "sigmoid", "none"]

ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""transformers' names (ACT2FN) of the activations that the graph computes."""

TASKS: Final[Mapping[str, Task]] = {
    "Model": "embeddings",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForMaskedLM": "masked_lm",
}
"""How the names of transformers' classes end, behind the family's (``BertModel``)."""

PROBLEMS: Final[Mapping[str, Scores]] = {
    "regression": "none",
    "multi_label_classification": "sigmoid",
    "single_label_classification": "softmax",
}
"""What makes scores of logits, by ``problem_type`` (transformers' text-classification pipeline)."""

RERANKERS: Final[Mapping[str, Scores]] = {
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
"""What sentence-transformers' CrossEncoder makes scores with, as it writes it into the config."""

_HARMLESS = """
    hidden_dropout_prob attention_probs_dropout_prob classifier_dropout
    dropout qa_dropout seq_classif_dropout sinusoidal_pos_embds tie_weights_ output_past
    directionality pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers
    pooler_size_per_head pooler_type
"""
ENCODER_HARMLESS: Final = HARMLESS_KEYS | frozenset(_HARMLESS.split())
"""Also what only training reads, and what BERT's first configs hold that transformers never reads:
a pooler of another kind, and how positions were drawn, which are stored."""

ENCODER_NEUTRAL: Final = {
    **NEUTRAL_VALUES,
    "is_decoder": (False,),
    "position_embedding_type": ("absolute",),
}


@dataclass(frozen=True, slots=True)
class Head:
    """What is read off the last layer.

    ``embeddings``: the layer itself, and with ``dense`` transformers' ``pooler_output``.
    ``sequence_classification``: of the first token through ``dense`` (with its activation, ``tanh``
    or ``relu``) and a product of ``len(labels)`` rows. ``token_classification``: such a product of
    every token. ``masked_lm``: every token through ``dense``, a norm, and the vocabulary's rows
    with a bias. ``scores``: what makes scores of logits.
    """

    task: Task
    dense: Activation | None = None
    labels: tuple[str, ...] = ()
    scores: Scores = "none"
    tied: bool = False


@dataclass(frozen=True, slots=True)
class Encoder:
    """An encoder, whole: shapes, positions, token types, feed-forward, head.

    ``positions``: rows of the table of positions. With ``padding_id`` they are counted over the
    tokens that are not it, from ``padding_id + 1`` on, and padding stands at ``padding_id`` itself
    (RoBERTa's, which fairseq left behind); without, they are 0, 1, 2, ... ``token_types``: rows of
    the table of such, 0 where there is none; with one row there is nothing to choose.
    """

    family: str
    vocab_size: int
    hidden_size: int
    ffn_size: int
    layers: int
    heads: int
    positions: int
    token_types: int
    epsilon: float
    activation: Activation
    head: Head
    padding_id: int | None = None

    @property
    def head_dim(self) -> int:
        """Values of a head."""
        return self.hidden_size // self.heads

    @property
    def context_length(self) -> int:
        """Tokens of the longest text, the special ones among them."""
        return self.positions - (0 if self.padding_id is None else self.padding_id + 1)


@dataclass(frozen=True, slots=True)
class EncoderFamily:
    """One row of the registry of encoders.

    ``class_prefix``: how transformers' classes begin (``Bert``). ``base_prefix`` comes before the
    names of a checkpoint that was saved with a head. ``head_prefixes``: how names of heads' tensors
    begin, which transformers leaves out where its class has another head. ``read`` is told the task
    that the checkpoint's class has, and whether its pooler is there and wanted.
    """

    model_type: str
    class_prefix: str
    read: Callable[[Config, Task, bool], Encoder]
    tensors: Callable[[Encoder], Iterator[TensorRow]]
    base_prefix: str
    head_prefixes: tuple[str, ...]
    ignored_tensors: tuple[str, ...] = (".position_ids",)

    def describe(self, config: Config, task: Task, *, pooler: bool) -> Encoder:
        """The network that ``config`` stands for, with the head of ``task``.

        Raises ``UnsupportedModel`` for a missing key, a value that is not understood, and every
        key that nothing has read and that could change the maths.
        """
        encoder = self.read(config, task, pooler)
        config.refuse_unread()
        if encoder.context_length < 1:
            raise config.refusal(
                "max_position_embeddings", encoder.positions, "more than pad_token_id + 1"
            )
        return encoder

    def task_of(self, architecture: str, where: str) -> Task:
        """The task of transformers' class ``architecture``.

        Raises ``UnsupportedModel`` for a head that edgellm does not compute.
        """
        task = TASKS.get(architecture.removeprefix(self.class_prefix))
        if task is None or not architecture.startswith(self.class_prefix):
            known = ", ".join(f"{self.class_prefix}{ending}" for ending in TASKS)
            raise UnsupportedModel(
                f"{where}: the architecture is {architecture!r}, and of {self.model_type} edgellm "
                f"converts {known}: its head computes something else"
            )
        return task


def read_labels(config: Config) -> tuple[tuple[str, ...], Scores]:
    """The names of the classes in order, and what makes scores of their logits.

    transformers leaves the names out where they are its own, ``LABEL_0`` and ``LABEL_1``.
    """
    labels: tuple[str, ...] = ("LABEL_0", "LABEL_1")
    if config.has("id2label"):
        named = config.mapping("id2label")
        if sorted(named) != sorted(str(index) for index in range(len(named))) or not named:
            raise config.refusal("id2label", named, "a name for each of 0, 1, 2, ...")
        labels = tuple(str(named[str(index)]) for index in range(len(named)))
    elif config.has("num_labels"):
        labels = tuple(f"LABEL_{index}" for index in range(config.integer("num_labels")))
    usual = "single_label_classification" if len(labels) > 1 else "multi_label_classification"
    scores: Scores = config.choice("problem_type", PROBLEMS, usual)
    return labels, _reranked(config, scores)


def _reranked(config: Config, scores: Scores) -> Scores:
    """``scores``, or what a CrossEncoder puts in their place."""
    if config.has("sbert_ce_default_activation_function"):
        scores = config.choice("sbert_ce_default_activation_function", RERANKERS)
    if config.has("sentence_transformers"):
        inner = config.section("sentence_transformers")
        inner.skip("version")
        if inner.has("activation_fn"):
            scores = inner.choice("activation_fn", RERANKERS)
    return scores


def read_head(
    config: Config, task: Task, *, first: Activation | None, pooler: bool, masked: Activation
) -> Head:
    """The head of ``task``; ``first``: of the dense layer that reads the first token."""
    if task == "masked_lm":
        return Head(task, dense=masked, tied=config.flag("tie_word_embeddings", True))
    config.skip("tie_word_embeddings")
    if task == "embeddings":
        return Head(task, dense=first if pooler else None)
    labels, scores = read_labels(config)
    return Head(
        task,
        dense=first if task == "sequence_classification" else None,
        labels=labels,
        scores=scores,
    )


@dataclass(frozen=True, slots=True)
class Names:
    """What a family calls its tensors, behind its prefix; ``{}`` stands for the layer's number."""

    types: str
    layer: str
    query: str
    key: str
    value: str
    attention_output: str
    attention_norm: str
    up: str
    down: str
    output_norm: str


BERT_NAMES: Final = Names(
    types="embeddings.token_type_embeddings",
    layer="encoder.layer.{}",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_output="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    up="intermediate.dense",
    down="output.dense",
    output_norm="output.LayerNorm",
)


def product(source: str, role: str, out: int, into: int, kind: str = "linear") -> list[TensorRow]:
    """A product with a bias."""
    weight = TensorRow(
        f"{source}.weight", f"{role}.weight", (out, into), "head" if kind == "head" else "linear"
    )
    return [weight, TensorRow(f"{source}.bias", f"{role}.bias", (out,), "bias")]


def norm(source: str, role: str, size: int) -> list[TensorRow]:
    """A layer norm, with its bias."""
    return [
        TensorRow(f"{source}.weight", f"{role}.weight", (size,), "norm"),
        TensorRow(f"{source}.bias", f"{role}.bias", (size,), "bias"),
    ]


def body(encoder: Encoder, prefix: str, names: Names) -> Iterator[TensorRow]:
    """Every tensor but the head's, in the order of the computation."""
    hidden, ffn = encoder.hidden_size, encoder.ffn_size
    tables = f"{prefix}embeddings"
    yield TensorRow(
        f"{tables}.word_embeddings.weight",
        "token_embd.weight",
        (encoder.vocab_size, hidden),
        "embedding",
    )
    yield TensorRow(
        f"{tables}.position_embeddings.weight",
        "position_embd.weight",
        (encoder.positions, hidden),
        "positions",
    )
    if encoder.token_types:
        yield TensorRow(
            f"{prefix}{names.types}.weight",
            "token_types.weight",
            (encoder.token_types, hidden),
            "positions",
        )
    yield from norm(f"{tables}.LayerNorm", "token_embd_norm", hidden)
    for index in range(encoder.layers):
        source, role = prefix + names.layer.format(index), f"blk.{index}"
        yield from product(f"{source}.{names.query}", f"{role}.attn_q", hidden, hidden)
        yield from product(f"{source}.{names.key}", f"{role}.attn_k", hidden, hidden)
        yield from product(f"{source}.{names.value}", f"{role}.attn_v", hidden, hidden)
        yield from product(
            f"{source}.{names.attention_output}", f"{role}.attn_output", hidden, hidden
        )
        yield from norm(f"{source}.{names.attention_norm}", f"{role}.attn_output_norm", hidden)
        yield from product(f"{source}.{names.up}", f"{role}.ffn_up", ffn, hidden)
        yield from product(f"{source}.{names.down}", f"{role}.ffn_down", hidden, ffn)
        yield from norm(f"{source}.{names.output_norm}", f"{role}.layer_output_norm", hidden)


def masked_lm(
    encoder: Encoder, dense: str, normed: str, decoder: str, bias: str
) -> Iterator[TensorRow]:
    """The head that gives back what was masked; its weight is the embedding where it is tied."""
    hidden, vocab = encoder.hidden_size, encoder.vocab_size
    yield from product(dense, "cls", hidden, hidden)
    yield from norm(normed, "cls.norm", hidden)
    if not encoder.head.tied:
        yield TensorRow(f"{decoder}.weight", "output.weight", (vocab, hidden), "head")
    yield TensorRow(bias, "output.bias", (vocab,), "bias")
