"""Unigram and WordPiece tokenizers, and every shape of SentencePiece BPE, against llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import (
    changed,
    random_texts,
    sentencepiece,
    sentencepiece_file,
    slow_folder,
    word_list,
    write_folder,
    write_vocabulary,
)

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization import AWKWARD_TEXTS, LlamaCppTokenizer, Tokenizer, artifact_parity

pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
T5 = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
BERT = {"tokenizer_class": "BertTokenizer"}


def assert_llamacpps_ids(
    path: Path, source: Tokenizer, *, texts: int = 400, least: int = 250
) -> dict[str, Any]:
    """The ids of ``source`` are llama.cpp's save for what its limits concern; the GGUF's keys."""
    keys = source.gguf_metadata(rows=source.vocab_size + 2)
    file = write_vocabulary(path / "x.gguf", keys)
    limits = source.gguf_limits()
    verdict = artifact_parity(source, file, "gguf", limits)
    assert not verdict.mismatches
    judge, again = LlamaCppTokenizer(file), Tokenizer.from_gguf(keys)
    plain = 0
    for text in (*AWKWARD_TEXTS, *random_texts(texts, 31, ("</s>", "[SEP]", "<extra>"))):
        if any(limit.concerns(text) for limit in limits):
            continue
        plain += 1
        for special in (True, False):
            ids = judge.encode(text, add_special=special)
            assert source.encode(text, add_special=special) == ids, text
            assert again.encode(text, add_special=special) == ids, text
    judge.close()
    assert plain > least
    return keys


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("rules", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize(("prefix", "squeeze"), [(True, True), (True, False), (False, False)])
def test_unigram_pieces_in_llamacpp(
    tmp_path: Path, rules: str, prefix: bool, squeeze: bool, byte_fallback: bool
) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file(
        "unigram",
        byte_fallback=byte_fallback,
        normalization_rule_name=rules,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeeze,
        control_symbols=["<extra>"],
        bos_id=-1,
        pad_id=0,
        eos_id=1,
        unk_id=2,
    )
    folder = slow_folder(tmp_path / "source", spiece__model=data, tokenizer_config__json=T5)
    # Special tokens in text, marks behind letters: those the limits name.
    keys = assert_llamacpps_ids(tmp_path, Tokenizer.from_hf_folder(folder), least=150)
    assert keys["tokenizer.ggml.model"] == "t5"
    assert ("tokenizer.ggml.precompiled_charsmap" in keys) == (rules == "nmt_nfkc")
    assert keys["tokenizer.ggml.add_eos_token"]
    assert not keys["tokenizer.ggml.add_bos_token"]


def test_a_unigram_that_squeezes_without_a_space_before_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file("unigram", add_dummy_prefix=False)
    folder = slow_folder(tmp_path, spiece__model=data, tokenizer_config__json=T5)
    with pytest.raises(UnsupportedTokenizer, match=r"more to the text.*Choose --format onnx"):
        Tokenizer.from_hf_folder(folder).gguf_metadata()


@pytest.mark.parametrize("options", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_word_lists_in_llamacpp(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = slow_folder(
        tmp_path / "source", vocab__txt=word_list(), tokenizer_config__json={**BERT, **options}
    )
    keys = assert_llamacpps_ids(tmp_path, Tokenizer.from_hf_folder(folder))
    assert keys["tokenizer.ggml.model"] == "bert"
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.cls_token_id"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenize_chinese_chars": False}, "splits words as BERT does"),
        ({"add_bos_token": False}, r"\[CLS\] before"),
    ],
)
def test_word_lists_with_other_rules_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    folder = slow_folder(
        tmp_path, vocab__txt=word_list(), tokenizer_config__json={**BERT, **options}
    )
    with pytest.raises(UnsupportedTokenizer, match=message):
        Tokenizer.from_hf_folder(folder).gguf_metadata()


# How published tokenizer.json files write spaces as ▁.
PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
BEFORE_SPACES = {
    "type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False,
}  # fmt: skip
SPELLINGS = {
    "llama-2, phi-3, yi": {"normalizer": {"type": "Sequence", "normalizers": [PREPEND, REPLACE]}},
    "mistral-7b v0.3, llama of transformers 5": {"normalizer": None, "pre_tokenizer": METASPACE},
    "gemma": {"normalizer": REPLACE, "pre_tokenizer": BEFORE_SPACES},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings_of_the_space_in_llamacpp(tmp_path: Path, name: str) -> None:
    backend = changed(sentencepiece(space_prefix=name != "gemma"), **SPELLINGS[name])
    source = Tokenizer.from_hf_folder(write_folder(tmp_path / "source", backend))
    keys = assert_llamacpps_ids(tmp_path, source)
    assert keys["tokenizer.ggml.add_space_prefix"] == (name != "gemma")
    assert len(source.gguf_limits()) == name.startswith("mistral")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_file_in_llamacpp(tmp_path: Path, legacy: bool) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file(
        "bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, control_symbols=["<extra>"],
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    folder = slow_folder(tmp_path / "source", tokenizer__model=data, tokenizer_config__json=config)
    source = Tokenizer.from_hf_folder(folder)
    assert_llamacpps_ids(tmp_path, source)
    assert any("a space before" in limit.sentence for limit in source.gguf_limits()) != legacy
