"""Marian's tokenizer: SentencePiece cuts a text, and a vocabulary of its own gives the ids.

The pieces of ``source.spm`` are looked up in ``vocab.json``, whose ids the model knows; a piece
that is not there is the unknown token, and what the pieces do not hold is looked up as it stands.
No ``tokenizer.json`` can say that, so the files themselves are what is read again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models

from edgellm.errors import SourceError, UsageError
from edgellm.json_file import read_json
from edgellm.tokenization import pieces_file
from edgellm.tokenization.added_tokens import token_text
from edgellm.tokenization.pieces import SPACE, Pieces, backend_of
from edgellm.tokenization.tokenizer import EncodedText, Settings, Tokenizer
from edgellm.tokenization.vocabulary import TokenType, Vocabulary

PIECES, VOCAB, ANSWER_VOCAB = "source.spm", "vocab.json", "target_vocab.json"
FILES = (PIECES, "target.spm", VOCAB, ANSWER_VOCAB)
"""What travels with a model; transformers' class wants the answer's pieces too."""

SPECIAL = {"unk": "<unk>", "eos": "</s>", "pad": "<pad>"}
"""Special tokens where no config names them."""


class MarianTokenizer(Tokenizer):
    """``reading`` cuts a text into pieces, ``vocabulary`` gives their ids; ``backend`` writes.

    Gives the ids of transformers' ``MarianTokenizer``. A language's code (``>>deu<<``) that the
    vocabulary has is that token wherever it stands, there only where a text begins with it.
    """

    def __init__(
        self,
        reading: tokenizers.Tokenizer,
        vocabulary: Mapping[str, int],
        backend: tokenizers.Tokenizer,
        settings: Settings,
        *,
        source_files: Mapping[str, bytes],
    ) -> None:
        super().__init__(backend, settings, source_files=source_files)
        self._reading = reading
        self._vocabulary = vocabulary
        self._unknown = settings.special_ids["unk"]

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id of a text."""
        return max(self._vocabulary.values()) + 1

    @property
    def answer_vocab_size(self) -> int:
        """One more than the highest id of an answer."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The token ids of ``text``; see ``Tokenizer.encode``."""
        ids = list(self._cut(text, parse_special)[0])
        return [*ids, *self.settings.suffix_ids] if add_special else ids

    def encode_whole(self, text: str, second: str | None = None, *, max_tokens: int) -> EncodedText:
        """``text`` with the end token, in ``max_tokens``; see ``Tokenizer.encode_whole``.

        Raises ``UsageError`` for a ``second`` text too, which these models do not take.
        """
        end = self.settings.suffix_ids
        if second is not None:
            raise UsageError("this model takes one text, not a pair: leave the second out")
        if max_tokens < len(end) + 1:
            raise UsageError(f"{max_tokens} tokens are too few: a text needs {len(end) + 1}")
        ids, spans = self._cut(text, True)
        room = max_tokens - len(end)
        own = (False,) * len(ids[:room])
        return EncodedText(
            ids=(*ids[:room], *end),
            types=(0,) * (len(own) + len(end)),
            spans=(*spans[:room], *((0, 0) for _ in end)),
            special=(*own, *(True for _ in end)),
            truncated=len(ids) > room,
        )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``, without spaces at its ends; see ``Tokenizer.decode``."""
        return super().decode(ids, skip_special).strip()

    def sha256(self) -> str:
        """Digest of everything that decides ids and the end of an answer."""
        rules = hashlib.sha256()
        for name, data in sorted(self.files().items()):
            if name in FILES:
                rules.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
        rules.update(repr((self.settings.eos_token_ids, self.settings.suffix_ids)).encode())
        return rules.hexdigest()

    def _cut(self, text: str, parse: bool) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        with self._lock:
            self._reading.encode_special_tokens = not parse
            found = self._reading.encode(text, add_special_tokens=False)
        ids = tuple(self._vocabulary.get(token, self._unknown) for token in found.tokens)
        return ids, found.offsets


def read(
    folder: Path,
    config: Mapping[str, Any],
    eos_token_ids: tuple[int, ...],
    companions: Mapping[str, bytes],
) -> Tokenizer:
    """The tokenizer of a ``folder`` that holds ``source.spm``.

    ``config`` is its tokenizer's; ``eos_token_ids`` end an answer beside its own, ``companions``
    are the files that travel with it. Raises ``SourceError`` for what is missing or damaged, and
    ``UnsupportedTokenizer`` for pieces of a kind that ``tokenizers`` has not.
    """
    missing = [name for name in FILES[:3] if not (folder / name).is_file()]
    apart = config.get("separate_vocabs") is True
    if apart and not (folder / ANSWER_VOCAB).is_file():
        missing.append(ANSWER_VOCAB)
    if missing:
        raise SourceError(
            f"{folder} holds Marian's tokenizer ({PIECES}) without {', '.join(missing)}: fetch the "
            "model's tokenizer files again"
        )
    files = {name: _bytes(folder / name) for name in FILES if (folder / name).is_file()}
    found = pieces_file.parse(files[PIECES], str(folder / PIECES))
    vocabulary = _vocabulary(folder / VOCAB)
    answers = _vocabulary(folder / ANSWER_VOCAB) if apart else vocabulary
    names = {
        name: token_text(config.get(f"{name}_token")) or text for name, text in SPECIAL.items()
    }
    for name, text in names.items():
        if text not in vocabulary:
            raise SourceError(
                f"{folder / VOCAB} has no {text!r}, which is its {name} token: it belongs to "
                "another model, or is cut short; fetch it again"
            )
    special = [AddedToken(text, normalized=False) for text in names.values()]
    codes = [text for text in vocabulary if text.startswith(">>") and text.endswith("<<")]
    reading = backend_of(_without_control(found.pieces))
    reading.add_special_tokens(special)
    reading.add_tokens([AddedToken(text, normalized=False) for text in codes])
    settings = Settings(
        special_ids={name: vocabulary[text] for name, text in names.items()},
        eos_token_ids=tuple(dict.fromkeys((vocabulary[names["eos"]], *eos_token_ids))),
        suffix_ids=(vocabulary[names["eos"]],),
    )
    return MarianTokenizer(
        reading,
        vocabulary,
        _writing(answers, names),
        settings,
        source_files={**companions, **files},
    )


def _without_control(pieces: Pieces) -> Pieces:
    """``pieces`` without the tokens that SentencePiece never finds in a text.

    They would be found here, and their ids are of no use: the vocabulary has its own.
    """
    old = pieces.vocabulary
    kept = [
        index
        for index, kind in enumerate(old.types)
        if kind not in (TokenType.CONTROL, TokenType.UNUSED)
    ]
    types = [old.types[index] for index in kept]
    vocabulary = Vocabulary(
        tokens=[old.tokens[index] for index in kept],
        types=types,
        stored_types=types,
        scores=[old.scores[index] for index in kept],
    )
    unknown = None if pieces.unk_id is None else kept.index(pieces.unk_id)
    return replace(pieces, vocabulary=vocabulary, unk_id=unknown)


def _writing(vocabulary: Mapping[str, int], names: Mapping[str, str]) -> tokenizers.Tokenizer:
    """Ids to text: pieces side by side, their marks spaces."""
    backend = tokenizers.Tokenizer(models.WordLevel(dict(vocabulary), unk_token=names["unk"]))
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    known = [text for text in names.values() if text in vocabulary]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in known])
    return backend


def _vocabulary(path: Path) -> dict[str, int]:
    found = read_json(path)
    if not found or not all(
        isinstance(index, int) and not isinstance(index, bool) and index >= 0
        for index in found.values()
    ):
        raise SourceError(f"{path} is not an object of ids by token: fetch it again")
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror or error}") from error
