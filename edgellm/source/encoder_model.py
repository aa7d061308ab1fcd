"""Encoders, alone or with a decoder, described and checked, none of their weights read yet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.source.model import digest_of
from edgellm.tensors import TensorRef

if TYPE_CHECKING:
    from edgellm.architectures.encoder import Encoder, EncoderFamily
    from edgellm.architectures.seq2seq import Seq2Seq, Seq2SeqFamily
    from edgellm.source.sentence_pipeline import SentencePipeline
    from edgellm.tokenization import Tokenizer


@dataclass(frozen=True, kw_only=True)
class FolderSource:
    """What goes into a conversion, from a folder.

    ``tensors`` by role, ``[out, in]``. ``max_tokens``: of a text, its special tokens among them;
    what is longer is cut. The rest is as in ``ModelSource``.
    """

    name: str
    path: Path
    config: dict[str, Any]
    max_tokens: int
    tensors: dict[str, TensorRef]
    tokenizer: Tokenizer
    weight_files: tuple[Path, ...]
    revision: str = ""
    licence: str = ""
    url: str = ""
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 of the weight files, computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.weight_files)


@dataclass(frozen=True, kw_only=True)
class EncoderSource(FolderSource):
    """An encoder.

    ``pipeline``: how token vectors become one, None where the head does not give vectors.
    ``tells_types``: its tokenizer tells the second text of a pair from the first.
    ``files``: those of sentence-transformers, handed on byte by byte.
    """

    family: EncoderFamily
    encoder: Encoder
    pipeline: SentencePipeline | None
    tells_types: bool = True
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Seq2SeqSource(FolderSource):
    """An encoder with a decoder; ``generation`` is generation_config.json, or what the config says
    of it."""

    family: Seq2SeqFamily
    model: Seq2Seq
    generation: Mapping[str, Any] = field(default_factory=dict)
