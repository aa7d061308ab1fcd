"""Marian (the OPUS-MT models): BART with sinusoids for positions and plain embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from edgellm.architectures.bart import COPIES, SHARED, described, tensors
from edgellm.architectures.config import Config
from edgellm.architectures.seq2seq import Seq2Seq, Seq2SeqFamily

START = 58100
"""What begins an answer where the config does not say (transformers' ``MarianConfig``)."""

SLOWEST = 10000.0
"""Of the sinusoids' periods, by 2 pi (arXiv 1706.03762, section 3.5)."""


def read(config: Config) -> Seq2Seq:
    """As transformers' class, whatever old configs say of norms; other values are refused."""
    config.neutral("normalize_embedding", False)
    config.neutral("static_position_embeddings", True)
    model = described(config, "marian", config.integer("decoder_start_token_id", START, minimum=0))
    rows = config.integer("decoder_vocab_size", model.vocab_size)
    shared = config.flag("share_encoder_decoder_embeddings", True)
    return replace(
        model,
        positions=config.integer("max_position_embeddings"),
        skipped_positions=0,
        embedding_norm=False,
        answer_vocab_size=None if shared else rows,
    )


def sinusoids(positions: int, size: int) -> npt.NDArray[np.float32]:
    """The table of positions ``[positions, size]``: sines, and behind them cosines.

    As transformers' ``MarianSinusoidalPositionalEmbedding.create_weight``.
    """
    half = (size + 1) // 2
    columns = np.arange(size)
    periods = np.power(SLOWEST, 2 * (columns // 2) / size)
    angles = np.arange(positions)[:, None] / periods
    table = np.empty((positions, size), np.float32)
    table[:, :half] = np.sin(angles[:, 0::2])
    table[:, half:] = np.cos(angles[:, 1::2])
    return table


FAMILY = Seq2SeqFamily(
    model_type="marian",
    architecture="MarianMTModel",
    read=read,
    tensors=tensors,
    shared=SHARED,
    copies=COPIES,
    ignored_tensors=(".version",),
    positions=sinusoids,
)
