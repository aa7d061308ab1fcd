"""A text cut into passages: as llama-perplexity cuts it, or document by document."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgellm.errors import UsageError
from edgellm.evaluation_text import Passage, begin_ids, corpus_named, cut, scored_text
from edgellm.tokenization import Tokenizer

BOS = 256


@pytest.fixture
def tokenizer(write_model: Callable[..., Path], tensors: dict[str, np.ndarray]) -> Tokenizer:
    """A token a byte, and no begin token."""
    return Tokenizer.from_hf_folder(write_model(tensors))


@pytest.fixture
def beginning(tokenizer: Tokenizer) -> Tokenizer:
    """The same, which puts a begin token before a text."""
    ids = {**tokenizer.settings.special_ids, "bos": BOS}
    tokenizer.settings = replace(tokenizer.settings, prefix_ids=(BOS,), special_ids=ids)
    return tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Callable[[str], str]:
    def write(content: str, name: str = "text.txt") -> str:
        (tmp_path / name).write_bytes(content.encode())
        return str(tmp_path / name)

    return write


def letters(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


def test_halves_are_llama_perplexitys(beginning: Tokenizer, text: Callable[[str], str]) -> None:
    """``tokens = [bos, *text]`` in chunks of n_ctx, each begun with bos; scored from the middle."""
    content = "".join(chr(97 + place % 26) for place in range(35))
    pieces = cut(corpus_named(text(content)), beginning, window_tokens=8)
    tokens = [BOS, *beginning.encode(content)]
    wanted = [[BOS, *tokens[start + 1 : start + 8]] for start in (0, 8, 16, 24)]
    assert [list(passage.ids) for passage in pieces.passages] == wanted
    assert pieces.score == "half"
    assert {(passage.first, passage.scored) for passage in pieces.passages} == {(4, 3)}
    assert pieces.tokens == 12
    assert scored_text(beginning, pieces.passages) == (0, 12)


def test_halves_without_a_begin_token(tokenizer: Tokenizer, text: Callable[[str], str]) -> None:
    pieces = cut(corpus_named(text("abcdefghijklmnopq")), tokenizer, window_tokens=8)
    assert [letters(tokenizer, passage.ids) for passage in pieces.passages] == [
        "abcdefgh",
        "ijklmnop",
    ]


def test_all_scores_every_token_behind_another(
    beginning: Tokenizer, tokenizer: Tokenizer, text: Callable[[str], str]
) -> None:
    content = "It is one text, é, and all of it counts."
    pieces = cut(corpus_named(text(content)), beginning, window_tokens=8, score="all")
    assert all(passage.ids[0] == BOS for passage in pieces.passages)
    assert pieces.tokens == len(content.encode())
    words, nbytes = scored_text(beginning, pieces.passages)
    assert (words, nbytes) == (len(content.split()), len(content.encode()))


def test_words_and_characters_count_where_they_begin_and_end(tokenizer: Tokenizer) -> None:
    """A word that the window before began is not counted again; é ends in its second byte."""
    encode = tokenizer.encode
    whole = encode("one twoé three")
    middle = Passage(tuple(whole[:9]), 7)  # its one scored token is the second byte of é
    assert scored_text(tokenizer, [middle]) == (0, 2)
    rest = Passage(tuple(whole[9:]), 0)  # the space is not scored
    assert scored_text(tokenizer, [middle, rest]) == (1, 2 + len("three"))
    within = Passage(tuple(whole[10:]), 1)
    assert scored_text(tokenizer, [within]) == (0, len("ree"))


def test_documents_are_cut_apart(tokenizer: Tokenizer, text: Callable[[str], str]) -> None:
    lines = [json.dumps({"text": "abcdefghij"}), json.dumps({"text": "xyz"})]
    pieces = cut(corpus_named(text("\n".join(lines), "text.jsonl")), tokenizer, window_tokens=6)
    assert pieces.score == "all"
    found = [letters(tokenizer, passage.ids) for passage in pieces.passages]
    assert found == ["abcdef", "ghij", "xyz"]
    assert pieces.tokens == 5 + 3 + 2


def test_no_more_tokens_than_asked(tokenizer: Tokenizer, text: Callable[[str], str]) -> None:
    corpus = corpus_named(text("x" * 100))
    for score, wanted in (("half", [7, 7, 3]), ("all", [15, 2])):
        pieces = cut(corpus, tokenizer, window_tokens=16, score=score, tokens=17)
        assert [passage.scored for passage in pieces.passages] == wanted
    whole = cut(corpus, tokenizer, window_tokens=16)
    assert [passage.scored for passage in whole.passages] == [7] * 6


def test_a_short_text_is_one_shorter_window(
    tokenizer: Tokenizer, text: Callable[[str], str]
) -> None:
    corpus = corpus_named(text("abc"))
    assert cut(corpus, tokenizer).passages == (Passage(tuple(tokenizer.encode("abc")), 0),)
    with pytest.raises(UsageError, match=r"3 tokens, and a window of 512 .* --score all"):
        cut(corpus, tokenizer, score="half")


def test_digests_tell_what_was_scored(tokenizer: Tokenizer, text: Callable[[str], str]) -> None:
    import hashlib

    corpus = corpus_named(text("abcdefgh" * 4))
    assert corpus.sha256 == hashlib.sha256(b"abcdefgh" * 4).hexdigest()
    digests = {
        cut(corpus, tokenizer, window_tokens=window, score=score).sha256()
        for window in (8, 16)
        for score in ("half", "all")
    }
    assert len(digests) == 4
    again = cut(corpus, tokenizer, window_tokens=8, score="half").sha256()
    assert again in digests


def test_built_in_text_has_words(tokenizer: Tokenizer) -> None:
    pieces = cut(corpus_named("builtin"), tokenizer, window_tokens=256, tokens=1024)
    words, nbytes = scored_text(tokenizer, pieces.passages)
    assert pieces.tokens == 1024
    assert 0.9 * 1024 < nbytes <= 1024  # a token a byte; white space at the ends of decoding
    assert 100 < words < 300


def test_begin_token_only_where_it_is_added(tokenizer: Tokenizer) -> None:
    assert begin_ids(tokenizer) == ()


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        ("", {}, "less than two tokens"),
        ("a", {}, "less than two tokens"),
        ("abc", {"window_tokens": 3}, "at least 4 tokens"),
        ("abc", {"tokens": 0}, "at least 1 token"),
        ("abc", {"score": "most"}, "half, all"),
    ],
)
def test_refusals(
    content: str,
    options: dict[str, object],
    says: str,
    tokenizer: Tokenizer,
    text: Callable[[str], str],
) -> None:
    with pytest.raises(UsageError, match=says):
        cut(corpus_named(text(content)), tokenizer, **options)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        corpus_named(str(tmp_path / "nowhere.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8"):
        corpus_named(str(tmp_path / "latin.txt"))
