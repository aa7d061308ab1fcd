"""Text out of tokens one at a time, never cutting a character in two."""

from __future__ import annotations

from collections.abc import Callable

_BROKEN = "\ufffd"
# Of a UTF-8 character: five tokens that still end in a broken one do not all wait for more.
_MOST_BYTES = 4


class TextStream:
    """Turns token ids into text as they come: the pieces joined equal the decoding of all ids.

    ``decode`` turns ids into text at once, writing U+FFFD for broken UTF-8. Text that ends in
    U+FFFD is held back until the tokens that complete it arrive. Only ids since the last piece of
    text are decoded again, so a long answer costs no more per token than a short one. (Where a
    SentencePiece model writes bytes that are no UTF-8, decoding at once also breaks whole
    characters next to them; the stream has shown those by then.)
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown_ids = 0
        self._shown_text = ""

    def step(self, token_id: int) -> str | None:
        """The text that ``token_id`` completes, or None when it completes none."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        if not text.endswith(_BROKEN):
            return self._show(text)
        if len(self._ids) - self._shown_ids <= _MOST_BYTES:
            return None
        # Only the end can still become a character; what stands before it is broken for good.
        end = min(len(text) - len(text.rstrip(_BROKEN)), _MOST_BYTES - 1)
        certain = text[: len(text) - end]
        new = certain[len(self._shown_text) :]
        self._shown_text = certain
        return new or None

    def finish(self) -> str | None:
        """What was held back: characters that never became whole, as U+FFFD."""
        return self._show(self._decode(self._ids))

    def _show(self, text: str) -> str | None:
        new = text[len(self._shown_text) :]
        if not new:
            # Tokens without text (special ones) move nothing: the tokens before them still say
            # whether the next one starts a text.
            return None
        # The tokens just shown stay as context: a decoder may treat the first token apart.
        self._ids = self._ids[self._shown_ids :]
        self._shown_ids = len(self._ids)
        self._shown_text = self._decode(self._ids)
        return new
