"""Tokenizers written as GGUF keys and read back; what llama.cpp cannot do is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tiny_tokenizers import (
    byte_level,
    changed,
    published_pre_tokenizer,
    random_texts,
    sentencepiece,
    write_folder,
)
from tokenizers import models, normalizers, pre_tokenizers, processors

from edgellm.errors import SourceError, UnsupportedTokenizer
from edgellm.tokenization import Tokenizer, check_parity
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS

Folder = Callable[..., Path]
BOS, EOS, IM_START = 0, 1, 2


@pytest.fixture(scope="module")
def bytes_backend() -> tokenizers.Tokenizer:
    return byte_level()


@pytest.fixture(scope="module")
def pieces_backend() -> tokenizers.Tokenizer:
    return sentencepiece()


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def write(backend: tokenizers.Tokenizer, *args: Any, **files: Any) -> Path:
        return write_folder(tmp_path / "model", backend, *args, **files)

    return write


def read_back(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_gguf(tokenizer.gguf_metadata())


def with_rules(folder: Folder, backend: tokenizers.Tokenizer, **parts: Any) -> Tokenizer:
    return Tokenizer.from_hf_folder(folder(changed(backend, **parts)))


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"])
def test_a_pre_tokenizer_is_known_by_what_it_does(
    folder: Folder, bytes_backend: tokenizers.Tokenizer, name: str
) -> None:
    backend = changed(bytes_backend, model={"ignore_merges": PRE_TOKENIZERS[name].ignore_merges})
    backend.pre_tokenizer = published_pre_tokenizer(name)
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    keys = tokenizer.gguf_metadata()
    assert keys["tokenizer.ggml.pre"] == name
    assert not tokenizer.gguf_limits()
    again = Tokenizer.from_gguf(keys)
    assert check_parity(tokenizer, again).equal
    texts = random_texts(200, 3)
    assert [again.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_a_pre_tokenizer_that_llamacpp_only_comes_near_is_said(
    folder: Folder, bytes_backend: tokenizers.Tokenizer, name: str
) -> None:
    backend = changed(bytes_backend, model={"ignore_merges": PRE_TOKENIZERS[name].ignore_merges})
    backend.pre_tokenizer = published_pre_tokenizer(name)
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    assert tokenizer.gguf_metadata()["tokenizer.ggml.pre"] == name
    limits = tokenizer.gguf_limits()
    assert any("only comes near" in limit.sentence for limit in limits)
    verdict = check_parity(tokenizer, read_back(tokenizer), limits=limits)
    assert not verdict.equal
    assert not verdict.mismatches
    assert any("e\u0301" in line or "हिन्दी" in line for line in verdict.known)


def test_merges_ignored_or_not_must_agree_unless_it_changes_nothing(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    backend = changed(bytes_backend, model={"ignore_merges": True})
    backend.pre_tokenizer = published_pre_tokenizer("qwen2")
    # Every token can be reached by merges, so qwen2's ignore_merges=False gives the same ids.
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    assert tokenizer.gguf_metadata()["tokenizer.ggml.pre"] == "qwen2"
    vocab = {**backend.get_vocab(with_added_tokens=False), "ĠunreachableĠ": 9000}
    backend = changed(backend, model={"vocab": vocab})
    with pytest.raises(UnsupportedTokenizer, match="out of reach"):
        Tokenizer.from_hf_folder(folder(backend)).gguf_metadata()


def test_an_unknown_pre_tokenizer_is_an_error(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    for unknown in (
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ):
        backend = changed(bytes_backend)
        backend.pre_tokenizer = unknown
        with pytest.raises(UnsupportedTokenizer, match=r"no pre-tokenizer that llama\.cpp knows"):
            Tokenizer.from_hf_folder(folder(backend)).gguf_metadata()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "normalizes text first.*Lowercase"),
        ({"normalizer": {"type": "NFKC"}}, "normalizes text first.*NFKC"),
        ({"model": {"dropout": 0.1}}, "dropout"),
        ({"model": {"end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither works on bytes"),
    ],
)
def test_rules_that_llamacpp_does_not_have_are_refused(
    folder: Folder, bytes_backend: tokenizers.Tokenizer, parts: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedTokenizer, match=message):
        with_rules(folder, bytes_backend, **parts).gguf_metadata()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0), "more to the text"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "as BERT does"),
        (models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"), "model is WordLevel"),
    ],
)
def test_other_models_are_refused_by_name(
    folder: Folder, model: models.Model, message: str
) -> None:
    tokenizer = Tokenizer.from_hf_folder(folder(tokenizers.Tokenizer(model), {}))
    with pytest.raises(UnsupportedTokenizer, match=message):
        tokenizer.gguf_metadata()


def test_composed_accents_are_a_stated_limit(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    tokenizer = with_rules(folder, bytes_backend, normalizer={"type": "NFC"})
    limits = tokenizer.gguf_limits()
    assert any("NFC" in limit.sentence for limit in limits)
    verdict = check_parity(tokenizer, read_back(tokenizer), limits=limits)
    assert not verdict.equal
    assert not verdict.mismatches
    assert any("cafe\u0301" in line for line in verdict.known)
    assert len(verdict.known) <= 3


def test_more_than_one_token_before_a_text_is_refused(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    backend = changed(bytes_backend)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> <|im_start|> $A",
        special_tokens=[("<s>", BOS), ("<|im_start|>", IM_START)],
    )
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    assert tokenizer.encode("a", add_special=True)[:2] == [BOS, IM_START]
    with pytest.raises(UnsupportedTokenizer, match="before a text"):
        tokenizer.gguf_metadata()


def test_types_of_tokens(folder: Folder, pieces_backend: tokenizers.Tokenizer) -> None:
    keys = Tokenizer.from_hf_folder(folder(pieces_backend)).gguf_metadata()
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert {types["<s>"], types["<|im_start|>"], types["<unk>"]} == {3}
    assert types["<0x0A>"] == 6
    assert types["own  token"] == 4
    assert types["a"] == 1


def test_spare_rows_of_the_embedding_are_filled_up(
    folder: Folder, pieces_backend: tokenizers.Tokenizer
) -> None:
    tokenizer = Tokenizer.from_hf_folder(folder(pieces_backend))
    size = tokenizer.vocab_size
    keys = tokenizer.gguf_metadata(rows=size + 2)
    assert keys["tokenizer.ggml.tokens"][size:] == [f"[PAD{size}]", f"[PAD{size + 1}]"]
    assert keys["tokenizer.ggml.token_type"][size:] == [5, 5]
    assert len(keys["tokenizer.ggml.scores"]) == size + 2
    again = Tokenizer.from_gguf(keys)
    assert again.vocab_size == size + 2
    assert check_parity(tokenizer, again).equal
    # A GGUF source is filled up as well, and refused as well.
    assert len(again.gguf_metadata(rows=size + 5)["tokenizer.ggml.tokens"]) == size + 5
    with pytest.raises(UnsupportedTokenizer, match=f"{size + 2} tokens and the embedding {size}"):
        again.gguf_metadata(rows=size)


def test_holes_in_the_vocabulary_become_unused_tokens(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    vocab = {**bytes_backend.get_vocab(with_added_tokens=False), "zz": 5000}
    keys = with_rules(folder, bytes_backend, model={"vocab": vocab}).gguf_metadata()
    assert keys["tokenizer.ggml.tokens"][4998:] == ["[PAD4998]", "[PAD4999]", "zz"]
    assert keys["tokenizer.ggml.token_type"][4998:] == [5, 5, 1]


def test_added_tokens_that_swallow_spaces_are_a_stated_limit(
    folder: Folder, bytes_backend: tokenizers.Tokenizer
) -> None:
    added = json.loads(bytes_backend.to_str())["added_tokens"]
    added[IM_START]["rstrip"] = True
    tokenizer = with_rules(folder, bytes_backend, added_tokens=added)
    limits = tokenizer.gguf_limits()
    assert any("keeps the spaces around <|im_start|>" in limit.sentence for limit in limits)
    verdict = check_parity(tokenizer, read_back(tokenizer), limits=limits)
    assert verdict.known
    assert not verdict.mismatches


# SentencePiece


@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_keeps_ids_and_scores(folder: Folder, space_prefix: bool) -> None:
    tokenizer = Tokenizer.from_hf_folder(folder(sentencepiece(space_prefix=space_prefix)))
    keys = tokenizer.gguf_metadata()
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is space_prefix
    scores = keys["tokenizer.ggml.scores"]
    first = 3 + 256
    # SentencePiece's own numbering: less one for each piece after the bytes.
    assert scores[first : first + 500] == [float(-index) for index in range(500)]
    again = Tokenizer.from_gguf(keys)
    assert check_parity(tokenizer, again).equal
    for text in random_texts(200, 5, ("<s>", "own  token", "▁")):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_a_space_before_the_first_word_only_is_a_stated_limit(
    folder: Folder, pieces_backend: tokenizers.Tokenizer
) -> None:
    backend = changed(pieces_backend, normalizer=None)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = Tokenizer.from_hf_folder(folder(backend))
    limits = tokenizer.gguf_limits()
    assert any("puts a space before" in limit.sentence for limit in limits)
    verdict = check_parity(tokenizer, read_back(tokenizer), limits=limits)
    assert verdict.known
    assert not verdict.mismatches


def test_sentencepiece_that_changes_letters_is_refused(
    folder: Folder, pieces_backend: tokenizers.Tokenizer
) -> None:
    backend = changed(pieces_backend)
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), backend.normalizer])
    with pytest.raises(UnsupportedTokenizer, match="more to the text than"):
        Tokenizer.from_hf_folder(folder(backend)).gguf_metadata()


def test_equal_scores_cannot_be_rebuilt(
    folder: Folder, pieces_backend: tokenizers.Tokenizer
) -> None:
    keys = Tokenizer.from_hf_folder(folder(pieces_backend)).gguf_metadata()
    keys["tokenizer.ggml.scores"] = [-1000.0] * len(keys["tokenizer.ggml.tokens"])
    with pytest.raises(UnsupportedTokenizer, match=r"merges is lost.*--runtime llamacpp"):
        Tokenizer.from_gguf(keys)


# From GGUF


@pytest.fixture
def keys(folder: Folder, bytes_backend: tokenizers.Tokenizer) -> dict[str, Any]:
    return Tokenizer.from_hf_folder(folder(bytes_backend)).gguf_metadata()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, SourceError, "holds no tokenizer"),
        ({"model": "rwkv"}, UnsupportedTokenizer, "'rwkv'.*--runtime llamacpp"),
        ({"pre": "llama-bpf"}, UnsupportedTokenizer, "'llama-bpf'"),
        ({"tokens": None}, SourceError, "no tokenizer.ggml.tokens"),
        ({"tokens": ["a", "b", "a"]}, SourceError, "'a' twice"),
        ({"tokens": ["a", 1]}, SourceError, "not a list of texts"),
        ({"token_type": [1, 1]}, SourceError, "token_type has 2 entries"),
        ({"merges": ["ab"]}, SourceError, "'ab', which is no pair"),
        ({"merges": ["qqq zzz"]}, SourceError, "do not fit"),
    ],
)
def test_damaged_or_unknown_metadata(
    keys: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    changes = {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    broken = {key: value for key, value in (keys | changes).items() if value is not None}
    with pytest.raises(error, match=message):
        Tokenizer.from_gguf(broken)


def test_gguf_keys_are_handed_on_as_they_are(keys: dict[str, Any]) -> None:
    keys["tokenizer.ggml.fim_pre_token_id"] = 7
    tokenizer = Tokenizer.from_gguf({**keys, "general.name": "not the tokenizer's"})
    assert tokenizer.gguf_metadata() == keys


def test_every_end_that_a_gguf_file_names(keys: dict[str, Any]) -> None:
    tokens = keys["tokenizer.ggml.tokens"]
    tokens += ["<|im_end|>", "<|end|>"]
    keys["tokenizer.ggml.token_type"] += [3, 1]  # the other is an ordinary token
    keys["tokenizer.ggml.eot_token_id"] = IM_START
    assert Tokenizer.from_gguf(keys).eos_token_ids == (EOS, IM_START, len(tokens) - 2)


def test_a_folder_made_of_a_gguf_tokenizer_says_the_same(
    folder: Folder, bytes_backend: tokenizers.Tokenizer, tmp_path: Path
) -> None:
    backend = changed(bytes_backend)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "T"}
    first = read_back(Tokenizer.from_hf_folder(folder(backend, config)))
    assert first.encode("a", add_special=True)[0] == BOS
    for name, content in first.files().items():
        (tmp_path / name).write_bytes(content)
    second = Tokenizer.from_hf_folder(tmp_path)
    assert check_parity(first, second).equal
    assert second.settings == first.settings
    assert second.gguf_metadata() == first.gguf_metadata()
