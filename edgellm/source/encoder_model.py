"""EncoderSource: an encoder that was described and checked, none of its weights read yet."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.source.model import digest_of
from edgellm.tensors import TensorRef

if TYPE_CHECKING:
    from edgellm.architectures.encoder import Encoder, EncoderFamily
    from edgellm.source.sentence_pipeline import SentencePipeline
    from edgellm.tokenization import Tokenizer


@dataclass(frozen=True)
class EncoderSource:
    """What goes into the conversion of an encoder.

    ``tensors`` by role, ``[out, in]``. ``pipeline``: how token vectors become one, None where the
    head does not give vectors. ``max_tokens``: of a text, its special tokens among them; what is
    longer is cut. ``files``: those of sentence-transformers, handed on byte by byte. The rest is as
    in ``ModelSource``.
    """

    name: str
    path: Path
    config: dict[str, Any]
    family: EncoderFamily
    encoder: Encoder
    pipeline: SentencePipeline | None
    max_tokens: int
    tensors: dict[str, TensorRef]
    tokenizer: Tokenizer
    weight_files: tuple[Path, ...]
    files: dict[str, bytes] = field(default_factory=dict)
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
