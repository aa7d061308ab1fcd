"""Streaming text out of tokens: the pieces joined are the text, whatever the tokens cut in two."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level, random_texts, sentencepiece

from edgellm.tokenization import AWKWARD_TEXTS, TextStream, Tokenizer
from edgellm.tokenization.tokenizer import Settings

BYTES = Tokenizer(byte_level(vocab_size=259), Settings(), source_metadata={})
PIECES = Tokenizer(sentencepiece(vocab_size=600), Settings(), source_metadata={})
TOKENIZERS = pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["bytes", "pieces"])


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = tokenizer.decode_stream(skip_special)
    return [piece or "" for piece in (*map(stream.step, ids), stream.finish())]


@TOKENIZERS
@pytest.mark.parametrize("skip_special", [True, False])
def test_pieces_joined_are_the_text(tokenizer: Tokenizer, skip_special: bool) -> None:
    for text in [*AWKWARD_TEXTS, *random_texts(100, 7, ("<s>", "</s>"))]:
        ids = tokenizer.encode(text)
        pieces = streamed(tokenizer, ids, skip_special)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special)


@TOKENIZERS
def test_no_piece_holds_half_a_character(tokenizer: Tokenizer) -> None:
    text = "né 日本 🙂👨‍👩‍👧 é 𐎀𒀀 ൠ"  # the last ones are in no vocabulary
    ids = tokenizer.encode(text)
    assert len(ids) > len(text) + 4
    assert "\ufffd" not in "".join(streamed(tokenizer, ids))


def test_a_character_appears_with_its_last_byte() -> None:
    ids = BYTES.encode("a🙂b")
    assert len(ids) == 6
    assert streamed(BYTES, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_an_unfinished_character_is_shown_at_the_end_only() -> None:
    stream = BYTES.decode_stream()
    ids = BYTES.encode("a🙂")[:-1]
    assert [stream.step(token) for token in ids] == ["a", None, None, None]
    assert stream.finish() == "\ufffd"
    assert stream.finish() is None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(3, 258), max_size=30))
def test_any_bytes_stream_to_their_decoding(ids: list[int]) -> None:
    assert "".join(streamed(BYTES, ids)) == BYTES.decode(ids)


def test_broken_bytes_do_not_dam_the_stream_up() -> None:
    broken = BYTES.backend.token_to_id("ÿ")  # the byte 0xFF, which UTF-8 never has
    pieces = streamed(BYTES, [broken] * 40)
    assert "".join(pieces) == "\ufffd" * 40
    assert max(map(len, pieces)) <= 5


def test_a_long_answer_is_not_decoded_again_and_again() -> None:
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return BYTES.decode(ids)

    stream = TextStream(decode)
    for token in BYTES.encode("word " * 400):
        stream.step(token)
    assert max(lengths) <= 8
