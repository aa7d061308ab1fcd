"""The tokenizer of a model, wherever it came from: text to ids, ids to text, chats to prompts."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from edgellm.errors import SourceError, UnsupportedTokenizer, UsageError
from edgellm.tokenization import chat
from edgellm.tokenization.stream import TextStream

if TYPE_CHECKING:
    from edgellm.tokenization.parity import Limit

# GGUF's order of special tokens; the key in tokenizer_config.json is the name + "_token".
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_PROBE = "a"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a tokenizer has beside its vocabulary and rules.

    ``special_ids``: by name (``bos``, ``eos``, ``unk``, ...). ``eos_token_ids``: every token that
    ends an answer, the tokenizer's own first. ``prefix_ids`` and ``suffix_ids``: what
    ``add_special`` puts around a text. ``chat_templates`` by name; ``default`` is the one used.
    """

    special_ids: Mapping[str, int] = field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EncodedText:
    """A text, or a pair of them, as a model that sees all of it at once takes it.

    ``types``: 0 or, in the second text of a pair of most models, 1. ``spans``: where a token stands
    in its text, in characters; both ends are 0 for the model's own tokens, which ``special`` names.
    ``truncated``: the end did not fit.
    """

    ids: tuple[int, ...]
    types: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    special: tuple[bool, ...]
    truncated: bool


class Tokenizer:
    """A ``tokenizers.Tokenizer`` with the settings of its model.

    ``source_files``: the files of the folder that it was read from, handed on byte by byte.
    ``source_metadata``: the ``tokenizer.*`` keys of the GGUF file that it was read from, handed on
    as they are. Give exactly one of them.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        settings: Settings,
        *,
        source_files: Mapping[str, bytes] | None = None,
        source_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        # A tokenizer.json may carry the padding and truncation of its training.
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.settings = settings
        self._source_files = source_files
        self._source_metadata = source_metadata
        # ``encode_special_tokens`` is state of the backend, so one thread at a time.
        self._lock = threading.Lock()

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face folder, from its ``tokenizer.json`` or older files.

        Raises ``UnsupportedTokenizer`` when older files do not say enough, and ``SourceError`` when
        there is none or a damaged one.
        """
        from edgellm.tokenization.from_hf import read

        return read(Path(path))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer of a GGUF file, from the ``tokenizer.*`` keys of its metadata.

        Gives the ids that llama.cpp gives (for ``t5`` and ``bert`` models save for what
        ``gguf_limits`` names). Raises ``UnsupportedTokenizer`` for a tokenizer model or
        pre-tokenizer that cannot be rebuilt, ``SourceError`` for damaged metadata.
        """
        from edgellm.tokenization.from_gguf import read

        return read(metadata)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def answer_vocab_size(self) -> int:
        """One more than the highest id of an answer; few models have other ids for texts."""
        return self.vocab_size

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The tokens that are cut out of a text before anything else splits it, by id."""
        added = self.backend.get_added_tokens_decoder()
        return tuple(token.content for _, token in sorted(added.items()))

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text, whether or not ``encode`` adds it."""
        return self.settings.special_ids.get("bos")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends an answer, the tokenizer's own first."""
        return self.settings.eos_token_ids

    @property
    def add_bos(self) -> bool:
        """Whether ``encode(add_special=True)`` begins with ``bos_token_id``."""
        return self.bos_token_id is not None and self.bos_token_id in self.settings.prefix_ids

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the template that ``render_chat`` uses, or None."""
        return self.settings.chat_templates.get("default")

    @property
    def special_tokens(self) -> dict[str, str]:
        """Special tokens' texts by the names that templates use: ``bos_token``, ..."""
        texts = {
            f"{name}_token": self.backend.id_to_token(token_id)
            for name, token_id in self.settings.special_ids.items()
        }
        return {name: text for name, text in texts.items() if text is not None}

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The token ids of ``text``.

        ``add_special``: with the model's begin and end tokens. ``parse_special``: special tokens
        written in the text become those tokens; otherwise they are plain characters (text from an
        untrusted place).
        """
        with self._lock:
            self.backend.encode_special_tokens = not parse_special
            try:
                ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
            except BaseException as error:
                raise_if_damaged(error, "a text cannot be split by this tokenizer")
                raise
        if not add_special:
            return ids
        return [*self.settings.prefix_ids, *ids, *self.settings.suffix_ids]

    def encode_whole(self, text: str, second: str | None = None, *, max_tokens: int) -> EncodedText:
        """``text``, or it and a ``second``, with the model's own tokens, in ``max_tokens`` of them.

        Of a pair the longer one is cut, as transformers does. Special tokens written in a text are
        those tokens. Raises ``UsageError`` where not even one token of a text would fit.
        """
        with self._lock:
            self.backend.encode_special_tokens = False
            own = self.backend.num_special_tokens_to_add(second is not None)
            texts = 1 if second is None else 2
            if max_tokens < own + texts:
                raise UsageError(
                    f"{max_tokens} tokens are too few: {own} of them are the model's own, so a "
                    f"text needs at least {own + texts}"
                )
            self.backend.enable_truncation(max_tokens)
            try:
                found = self.backend.encode(text, second)
            finally:
                self.backend.no_truncation()
        return EncodedText(
            ids=tuple(found.ids),
            types=tuple(found.type_ids),
            spans=tuple(found.offsets),
            special=tuple(bool(mark) for mark in found.special_tokens_mask),
            truncated=bool(found.overflowing),
        )

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; broken UTF-8 becomes U+FFFD, ids without a token become nothing."""
        try:
            text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special)
        except BaseException as error:
            raise_if_damaged(error, "ids cannot be decoded by this tokenizer")
            raise
        return text

    def decode_stream(self, skip_special: bool = True) -> TextStream:
        """A stream whose ``step(id)`` gives text as soon as it is whole."""
        return TextStream(lambda ids: self.decode(ids, skip_special))

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages``, by the model's chat template: see ``chat.render``.

        Encode it with ``add_special=False``: the template writes the begin token itself.
        """
        template = self.chat_template
        if variables.get("tools") and "tool_use" in self.settings.chat_templates:
            template = self.settings.chat_templates["tool_use"]
        return chat.render(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            **variables,
        )

    def files(self) -> dict[str, bytes]:
        """The files of a Hugging Face folder that say the same, by name."""
        if self._source_files is not None:
            return dict(self._source_files)
        from edgellm.tokenization.to_hf import files

        return files(self)

    def gguf_metadata(self, rows: int | None = None) -> dict[str, Any]:
        """Every ``tokenizer.*`` key of a GGUF file, in writing order.

        Plain values: ``int`` is uint32, lists of ``int`` int32, of ``float`` float32. ``rows``: of
        the embedding; a smaller vocabulary is filled up with unused tokens. Raises
        ``UnsupportedTokenizer`` for what llama.cpp cannot do, or for more tokens than ``rows``.
        """
        from edgellm.tokenization import to_gguf

        if self._source_metadata is not None:
            return to_gguf.fill_up(dict(self._source_metadata), rows)
        return to_gguf.metadata(self, rows)

    def sha256(self) -> str:
        """Digest of everything that decides ids and the end of an answer; templates apart."""
        if self._source_files is not None:
            rules = self._source_files["tokenizer.json"]
        else:
            keys = {
                key: value
                for key, value in (self._source_metadata or {}).items()
                if "chat_template" not in key
            }
            rules = _canonical(keys)
        settings = self.settings
        around = _canonical(
            [
                sorted(settings.special_ids.items()),
                settings.eos_token_ids,
                settings.prefix_ids,
                settings.suffix_ids,
            ]
        )
        return hashlib.sha256(rules + b"\0" + around).hexdigest()

    def chat_template_sha256(self) -> str:
        """Digest of the chat template's text; empty when there is none."""
        template = self.chat_template
        return hashlib.sha256(template.encode()).hexdigest() if template else ""

    def gguf_limits(self) -> tuple[Limit, ...]:
        """What llama.cpp does differently with this tokenizer in a GGUF file.

        The parity check shows what that comes to; any other difference in ids is an error.
        """
        from edgellm.tokenization import to_gguf

        # What was rebuilt from a GGUF file has its ids, save for kinds that only come near them.
        kept = self._source_metadata
        if kept is not None and kept.get("tokenizer.ggml.model") not in ("t5", "bert"):
            return ()
        return to_gguf.limits(self)


def raise_if_damaged(error: BaseException, what: str) -> None:
    """Raise ``SourceError`` for what the ``tokenizers`` library raises about damaged rules.

    That is a bare ``Exception``, and where it did not expect the damage, a panic of its own that is
    not even one.
    """
    if type(error) is Exception or type(error).__name__ == "PanicException":
        raise SourceError(
            f"{what}: the tokenizers library says {error}. Its files are damaged: fetch them again"
        ) from error


def surroundings(backend: tokenizers.Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor of ``backend`` puts before and after a text.

    Raises ``UnsupportedTokenizer`` when it does something else to the ids.
    """
    try:
        bare = backend.encode(_PROBE, add_special_tokens=False).ids
        whole = backend.encode(_PROBE, add_special_tokens=True).ids
    except BaseException as error:
        raise_if_damaged(error, "a text cannot be split by this tokenizer")
        raise
    found = enclosed(bare, whole)
    if found is not None:
        return found
    raise UnsupportedTokenizer(
        "the tokenizer's post-processor changes the ids of a text instead of putting special "
        "tokens before and after it: edgellm cannot say what it does"
    )


def enclosed(
    bare: Sequence[int], whole: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What stands before and behind the ids ``bare`` in ``whole``; None where they are not."""
    for start in range(len(whole) - len(bare) + 1):
        if list(whole[start : start + len(bare)]) == list(bare):
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    return None


def add_surroundings(
    backend: tokenizers.Tokenizer, before: Sequence[int], after: Sequence[int]
) -> None:
    """Have ``backend`` put the tokens ``before`` and ``after`` around a text, as a post-processor.

    For readers of its tokenizer.json; ``surroundings`` reads it back.
    """
    ids = (*before, *after)
    if not ids:
        return
    names = {token_id: backend.id_to_token(token_id) for token_id in ids}
    first = [names[token_id] for token_id in before]
    last = [names[token_id] for token_id in after]
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=[*first, "$A", *last],
        pair=[*first, "$A", *last, *(f"{name}:1" for name in first), "$B:1"],
        special_tokens=[(name, token_id) for token_id, name in names.items()],
    )


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
