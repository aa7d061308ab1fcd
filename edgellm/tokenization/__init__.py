"""Text to token ids and back, chat templates, and the proof that a conversion kept both.

Needs ``tokenizers`` and, for chat templates only, ``jinja2``; neither torch nor transformers.
"""

from __future__ import annotations

from edgellm.tokenization.artifact import artifact_parity, artifact_tokenizer
from edgellm.tokenization.llamacpp import LlamaCppTokenizer
from edgellm.tokenization.parity import AWKWARD_TEXTS, Limit, check_parity
from edgellm.tokenization.stream import TextStream
from edgellm.tokenization.tokenizer import Tokenizer

__all__ = [
    "AWKWARD_TEXTS",
    "Limit",
    "LlamaCppTokenizer",
    "TextStream",
    "Tokenizer",
    "artifact_parity",
    "artifact_tokenizer",
    "check_parity",
]
