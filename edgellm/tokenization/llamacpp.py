"""llama.cpp's own tokenizer: judge of GGUF files, and reader of those that we cannot rebuild."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edgellm.errors import SourceError
from edgellm.tokenization import chat
from edgellm.tokenization.stream import TextStream
from edgellm.tokenization.vocabulary import PREFIX, read_vocabulary

_BUFFER_BYTES = 4096


class LlamaCppTokenizer:
    """The tokenizer of a GGUF file as llama.cpp runs it, loaded without the weights.

    Raises ``RuntimeMissing`` without llama-cpp-python, ``SourceError`` when llama.cpp refuses the
    file. Special tokens, ends and templates come from the library, not from us.
    """

    def __init__(self, path: str | Path) -> None:
        # Loads the library with its log turned away from stderr.
        from edgellm.runtimes.llamacpp_library import load_library

        library = load_library()
        self.path = Path(path)
        if not self.path.is_file():
            raise SourceError(f"there is no file {self.path}")
        # What llama.cpp does not check but dies of, with the whole process, is checked here first.
        from edgellm.source.gguf_file import read_gguf

        metadata = read_gguf(self.path).metadata
        read_vocabulary(metadata)
        model = metadata.get(PREFIX + "model")
        prefixes = metadata.get(PREFIX + "add_space_prefix", model == "llama")
        squeezes = metadata.get(PREFIX + "remove_extra_whitespaces", False)
        self._strips_space = bool(
            (model == "llama" and prefixes)
            or (model == "t5" and (prefixes or squeezes))
            or model == "bert"
        )
        options = library.llama_model_default_params()
        options.vocab_only = True
        model = library.llama_model_load_from_file(os.fsencode(self.path), options)
        if not model:
            raise SourceError(f"llama.cpp cannot read the tokenizer of {self.path}")
        self._free = weakref.finalize(self, library.llama_model_free, model)
        self._library = library
        self._model = model
        self._vocab = library.llama_model_get_vocab(model)
        self.vocab_size = int(library.llama_vocab_n_tokens(self._vocab))
        self.add_bos = bool(library.llama_vocab_get_add_bos(self._vocab))
        self.bos_token_id = self._id(library.llama_vocab_bos)
        own_end = self._id(library.llama_vocab_eos)
        ends = [token for token in range(self.vocab_size) if self._ends(token)]
        self.eos_token_ids = tuple(dict.fromkeys([*([] if own_end is None else [own_end]), *ends]))

    def _id(self, function: Any) -> int | None:
        token_id = int(function(self._vocab))
        return token_id if token_id >= 0 else None

    def _ends(self, token_id: int) -> bool:
        return bool(self._library.llama_vocab_is_eog(self._vocab, token_id))

    def close(self) -> None:
        """Give the memory back; nothing may be called after."""
        self._free()

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The token ids of ``text``, as ``Tokenizer.encode``."""
        data = text.encode()
        room = len(data) + 16  # no token is shorter than a byte, save begin, end and a space before
        while True:
            ids = (ctypes.c_int32 * room)()
            count = self._library.llama_tokenize(
                self._vocab, data, len(data), ids, room, add_special, parse_special
            )
            if count >= 0:
                return list(ids[:count])
            room = -count

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ``ids``; broken UTF-8 becomes U+FFFD.

        Put together from pieces, less the space that a SentencePiece model puts before a text:
        llama.cpp's whole-text function also takes spaces before punctuation away.
        """
        text = b"".join(
            self._piece(token_id, skip_special) for token_id in ids if token_id < self.vocab_size
        )
        whole = text.decode("utf-8", "replace")
        return whole.removeprefix(" ") if self._strips_space else whole

    def _piece(self, token_id: int, skip_special: bool) -> bytes:
        size = _BUFFER_BYTES
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = self._library.llama_token_to_piece(
                self._vocab, token_id, buffer, size, 0, not skip_special
            )
            if count >= 0:
                return buffer.raw[:count]
            size = -count

    def decode_stream(self, skip_special: bool = True) -> TextStream:
        """A stream whose ``step(id)`` gives text as soon as it is whole."""
        return TextStream(lambda ids: self.decode(ids, skip_special))

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the file's chat template, or None."""
        text = self._library.llama_model_chat_template(self._model, None)
        return text.decode() if text else None

    @property
    def special_texts(self) -> tuple[str, ...]:
        """The texts of control tokens, by id."""
        return tuple(
            self._library.llama_vocab_get_text(self._vocab, token_id).decode("utf-8", "replace")
            for token_id in range(self.vocab_size)
            if self._library.llama_vocab_is_control(self._vocab, token_id)
        )

    @property
    def special_tokens(self) -> dict[str, str]:
        """The texts of the begin and end tokens, by the names that templates use."""
        end = self.eos_token_ids[0] if self.eos_token_ids else None
        return {
            name: self._library.llama_vocab_get_text(self._vocab, token_id).decode()
            for name, token_id in (("bos_token", self.bos_token_id), ("eos_token", end))
            if token_id is not None
        }

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for ``messages``, as ``Tokenizer.render_chat``."""
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
            **variables,
        )
