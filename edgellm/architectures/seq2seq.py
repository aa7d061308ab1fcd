"""What an encoder with a decoder (T5, BART, Marian) computes, said once and read by the exporter.

A family file (``t5.py``, ``bart.py``) turns a ``config.json`` into a ``Seq2Seq``. The encoder reads
the text whole; the decoder writes the answer, and each of its layers looks at the answer so far and
then at what the encoder made of the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from edgellm.architectures.config import HARMLESS_KEYS, NEUTRAL_VALUES, Config
from edgellm.architectures.decoder import Norm
from edgellm.architectures.encoder import Activation
from edgellm.architectures.family import TensorRow

_HARMLESS = """
    dropout_rate dropout activation_dropout classifier_dropout initializer_factor init_std
    encoder_layerdrop decoder_layerdrop classif_dropout output_past n_positions
    gradient_checkpointing _num_labels num_hidden_layers extra_pos_embeddings
    force_bos_token_to_be_generated save_step eos_token_ids
    student_encoder_layers student_decoder_layers
"""
SEQ2SEQ_HARMLESS: Final = HARMLESS_KEYS | frozenset(_HARMLESS.split())
"""Also what only training reads, and what old configs hold that no class of transformers reads."""

SEQ2SEQ_NEUTRAL: Final = {
    **{name: values for name, values in NEUTRAL_VALUES.items() if name != "is_encoder_decoder"},
    "is_encoder_decoder": (True,),
    "is_decoder": (False,),
    "add_final_layer_norm": (False,),
    "add_bias_logits": (False,),
    "normalize_before": (False,),
    "static_position_embeddings": (False,),
}


@dataclass(frozen=True, slots=True)
class Stack:
    """The layers of one side: how many, and their sizes."""

    layers: int
    heads: int
    ffn_size: int


@dataclass(frozen=True, slots=True)
class Relative:
    """T5's positions: a bias by head for each bucket of distances.

    Distances from ``longest`` on share a bucket; the encoder has half of the ``buckets`` for tokens
    on either side.
    """

    buckets: int
    longest: int


@dataclass(frozen=True, slots=True)
class Seq2Seq:
    """An encoder with a decoder, whole.

    ``norm`` comes before attention and feed-forward with ``pre_norm`` (and once more behind the
    last layer), otherwise after. Positions are ``relative``, or rows of a table of each side, of
    which the first ``skipped_positions`` are left out; ``positions`` is how many it has, None
    where there is none. ``answer_vocab_size``: rows of the decoder's own embedding, None where both
    sides share one. ``embedding_norm``: of each side's embedding. ``attention_scale`` multiplies
    query times key, ``embedding_scale`` the embedding's rows, ``head_scale`` what the head
    multiplies. ``head_bias``: added to the logits.
    """

    family: str
    vocab_size: int
    hidden_size: int
    head_dim: int
    encoder: Stack
    decoder: Stack
    norm: Norm
    pre_norm: bool
    activation: Activation
    gated_ffn: bool
    biased: bool
    attention_scale: float
    start_token_id: int
    relative: Relative | None = None
    positions: int | None = None
    skipped_positions: int = 0
    answer_vocab_size: int | None = None
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    head_scale: float = 1.0
    head_bias: bool = False
    tied_head: bool = True

    @property
    def head_rows(self) -> int:
        """Tokens that an answer may be made of."""
        return self.answer_vocab_size or self.vocab_size

    @property
    def answer_embedding(self) -> str:
        """The role of the embedding that the decoder reads and a tied head multiplies."""
        return EMBEDDING if self.answer_vocab_size is None else ANSWER_EMBEDDING

    @property
    def context_length(self) -> int:
        """Tokens of the longest text, and of the longest answer; T5 knows no limit, and was trained
        on ``RELATIVE_CONTEXT``."""
        if self.positions is None:
            return RELATIVE_CONTEXT
        return self.positions - self.skipped_positions


EMBEDDING, ANSWER_EMBEDDING = "token_embd.weight", "dec.token_embd.weight"
"""Roles of the embedding, and of the decoder's where it has one of its own."""

RELATIVE_CONTEXT = 512
"""Tokens of a text that T5 was trained on (arXiv 1910.10683, section 3.1.2)."""


@dataclass(frozen=True, slots=True)
class Seq2SeqFamily:
    """One row of the registry. ``architecture`` is transformers' class, the only one that is read.

    ``shared`` names the embedding, ``copies`` what checkpoints may hold of it once more.
    ``ignored_tensors``: ends of names of tensors that nothing reads. ``positions`` computes a table
    of positions by its rows and columns, for families that do not store it.
    """

    model_type: str
    architecture: str
    read: Callable[[Config], Seq2Seq]
    tensors: Callable[[Seq2Seq], Iterator[TensorRow]]
    shared: str
    copies: tuple[str, ...]
    ignored_tensors: tuple[str, ...] = ()
    positions: Callable[[int, int], npt.NDArray[np.float32]] | None = None

    def describe(self, config: Config) -> Seq2Seq:
        """The network that ``config`` stands for; raises ``UnsupportedModel`` for what is not
        understood, and for every key that nothing has read and that could change the maths."""
        model = self.read(config)
        config.refuse_unread()
        return model
