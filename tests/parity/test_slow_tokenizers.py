"""Tokenizers built from older files, against the libraries that those files belong to."""

from __future__ import annotations

import base64
import functools
import itertools
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TEXT
from tiny_tokenizers import (
    CONTROL,
    PUBLISHED,
    byte_level,
    random_texts,
    sentencepiece_file,
    slow_folder,
    word_list,
)
from tokenizers import Tokenizer as Backend

from edgellm.errors import SourceError
from edgellm.tokenization import AWKWARD_TEXTS, Tokenizer
from edgellm.tokenization.pieces import backend_of
from edgellm.tokenization.pieces_file import parse
from edgellm.tokenization.ranks import LETTERS, merges_by_rank
from edgellm.tokenization.tokenizer import Settings

regex = pytest.importorskip("regex", reason="regex is not installed")
TEXTS = (*AWKWARD_TEXTS, *random_texts(400, 3))
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
BYTES = {letter: byte for byte, letter in LETTERS.items()}


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, parse_special=False)


# SentencePiece


@pytest.mark.parametrize("byte_fallback", [True, False])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("squeeze", [True, False])
def test_bpe_pieces_have_sentencepieces_ids(
    tmp_path: Path, byte_fallback: bool, prefix: bool, squeeze: bool
) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file(
        "bpe",
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=squeeze,
        normalization_rule_name="identity",
        control_symbols=["<|im_start|>"],
    )
    theirs = library.SentencePieceProcessor(model_proto=data)
    folder = slow_folder(tmp_path, tokenizer__model=data, tokenizer_config__json=LLAMA)
    ours = Tokenizer.from_hf_folder(folder)
    assert ours.vocab_size == theirs.vocab_size()
    assert (ours.bos_token_id, ours.eos_token_ids) == (theirs.bos_id(), (theirs.eos_id(),))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert ids_of(ours, text) == ids, text
        assert ours.encode(text, add_special=True, parse_special=False) == [1, *ids]
        if byte_fallback and "\N{LOWER ONE EIGHTH BLOCK}" not in text:
            assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode("<|im_start|>")[-1] == theirs.piece_to_id("<|im_start|>")


def test_a_space_behind_each_special_token_or_only_once(tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file("bpe", byte_fallback=True, normalization_rule_name="identity")
    theirs = library.SentencePieceProcessor(model_proto=data)
    space, a = theirs.piece_to_id("▁a"), theirs.piece_to_id("a")
    for legacy, second in ((None, space), (True, space), (False, a)):
        config = LLAMA if legacy is None else {**LLAMA, "legacy": legacy}
        folder = slow_folder(tmp_path, tokenizer__model=data, tokenizer_config__json=config)
        assert Tokenizer.from_hf_folder(folder).encode("a</s>a") == [space, 2, second]


def likelihood(theirs: Any, ids: list[int]) -> float:
    return sum(theirs.get_score(token_id) for token_id in ids)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("rules", ["identity", "nmt_nfkc"])
def test_unigram_pieces_have_sentencepieces_ids(prefix: bool, rules: str) -> None:
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file(
        "unigram", add_dummy_prefix=prefix, normalization_rule_name=rules, byte_fallback=True
    )
    theirs = library.SentencePieceProcessor(model_proto=data)
    ours = backend_of(parse(data, "x").pieces)
    same = 0
    for text in TEXTS:
        # The tokenizers library looks marks up together with their letters, control tokens in text.
        marked = any(unicodedata.category(letter).startswith("M") for letter in text)
        if "</s>" in text or (rules == "nmt_nfkc" and marked):
            continue
        ids, expected = ours.encode(text, add_special_tokens=False).ids, theirs.encode(text)
        # Of equally likely cuts either may be taken.
        if ids != expected:
            assert likelihood(theirs, ids) == pytest.approx(likelihood(theirs, expected), abs=1e-3)
            continue
        same += 1
    assert same > 300


def test_a_damaged_table_of_characters_is_an_error_of_ours() -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file("unigram", normalization_rule_name="nmt_nfkc")
    table = parse(data, "x").pieces.charsmap
    start = data.index(table)
    choose = random.Random(1)
    said = set()
    for turn in range(200):
        damaged = bytearray(data)
        # Now the size that it begins with, now all over.
        for _ in range(100 if turn % 2 else 1):
            end = len(table) if turn % 2 else 8
            damaged[start + choose.randrange(end)] = choose.randrange(256)
        try:
            backend = backend_of(parse(bytes(damaged), "x").pieces)
            Tokenizer(backend, Settings()).encode("ab ﬁ ① c\n xé中 \u0301")
        except SourceError as error:
            said.add(str(error).partition(":")[0])
    # Found while it is read, or where the library trips over it.
    assert said == {"x", "a text cannot be split by this tokenizer"}


def test_encoders_end_their_texts(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file("unigram", bos_id=-1, pad_id=0, eos_id=1, unk_id=2)
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 3}
    folder = slow_folder(tmp_path, spiece__model=data, tokenizer_config__json=config)
    ours = Tokenizer.from_hf_folder(folder)
    size = len(parse(data, "x").pieces.vocabulary.tokens)
    assert ours.encode("a", add_special=True) == [*ours.encode("a"), 1]
    assert (ours.bos_token_id, ours.special_tokens["pad_token"]) == (None, "<pad>")
    assert ours.encode("<extra_id_0>") == [size + 2]
    assert ours.encode("<extra_id_2>") == [size]


# transformers


def transformers_tokenizer(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_as_transformers(folder: Path, texts: tuple[str, ...] = TEXTS) -> Tokenizer:
    theirs, ours = transformers_tokenizer(folder), Tokenizer.from_hf_folder(folder)
    for text in texts:
        for special in (True, False):
            expected = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special=special) == expected, text
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids[0] == theirs.eos_token_id
    return ours


@functools.cache
def gpt2_files() -> tuple[dict[str, Any], bytes, Backend]:
    backend = byte_level()
    model = json.loads(backend.to_str())["model"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in model["merges"]), ""]
    return model["vocab"], "\n".join(lines).encode(), backend


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("gpt2", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>"}),
        ("opt", {"tokenizer_class": "GPT2Tokenizer", "bos_token": "</s>", "add_bos_token": True}),
        ("qwen2", {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}),
        ("qwen3", {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|im_start|>"}),
    ],
)
def test_vocabulary_and_merges_as_transformers_reads_them(
    tmp_path: Path, model_type: str, config: dict[str, Any]
) -> None:
    vocab, merges, _ = gpt2_files()
    config = {"eos_token": "</s>", "unk_token": "</s>", "pad_token": "</s>", **config}
    folder = slow_folder(
        tmp_path,
        vocab__json=vocab,
        merges__txt=merges,
        tokenizer_config__json=config,
        config__json={"model_type": model_type},
    )
    # A "<s>" that no config names is plain text to both, a special one only where it is named.
    assert_as_transformers(folder)


@pytest.mark.parametrize("options", [{}, {"do_lower_case": False}, {"strip_accents": False}])
def test_word_lists_as_transformers_reads_them(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = slow_folder(
        tmp_path,
        vocab__txt=word_list(),
        tokenizer_config__json={"tokenizer_class": "BertTokenizer", **options},
    )
    theirs, ours = transformers_tokenizer(folder), Tokenizer.from_hf_folder(folder)
    for text in (*TEXTS, "[MASK] of [SEP]"):
        assert ours.encode(text, add_special=True) == theirs.encode(text), text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_pieces_as_transformers_reads_them(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file(
        "bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, control_symbols=["<|im_start|>"],
    )  # fmt: skip
    config = {
        **LLAMA, "legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "add_bos_token": True,
    }  # fmt: skip
    folder = slow_folder(
        tmp_path,
        tokenizer__model=data,
        tokenizer_config__json=config,
        config__json={"model_type": "llama"},
    )
    assert_as_transformers(folder)


def test_tokens_that_were_added_later(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file("bpe", byte_fallback=True, normalization_rule_name="identity")
    size = len(parse(data, "x").pieces.vocabulary.tokens)
    folder = slow_folder(
        tmp_path,
        tokenizer__model=data,
        tokenizer_config__json=LLAMA,
        added_tokens__json={"<|end|>": size + 1, "<|user|>": size},
        special_tokens_map__json={"additional_special_tokens": ["<|end|>"]},
    )
    ours = Tokenizer.from_hf_folder(folder)
    assert ours.encode("<|user|><|end|>") == [size, size + 1]
    assert ours.decode([size, size + 1]) == "<|user|>"
    # A folder written from it says the same to transformers.
    again = slow_folder(
        tmp_path / "written",
        **{name.replace(".", "__"): data for name, data in ours.files().items()},
    )
    theirs = transformers_tokenizer(again)
    for text in (*TEXTS[:60], "a<|user|>b <|end|> c"):
        assert ours.encode(text, add_special=True) == theirs.encode(text), text


@pytest.mark.parametrize(
    ("kind", "before", "behind"),
    [
        ("XLMRobertaTokenizer", ["<s>"], ["</s>"]),
        ("MBartTokenizer", [], ["</s>", "en_XX"]),
        ("MBart50Tokenizer", ["en_XX"], ["</s>"]),
    ],
)
def test_fairseqs_ids_are_sentencepieces_moved(
    tmp_path: Path, kind: str, before: list[str], behind: list[str]
) -> None:
    """The pieces of the checkpoints' own SentencePiece model, by transformers' table of ids.

    transformers 5 cuts texts of these classes at white space and leaves the model's table of
    characters out; the models were trained with both.
    """
    library = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file("unigram", normalization_rule_name="nmt_nfkc")
    theirs = library.SentencePieceProcessor(model_proto=data)
    folder = slow_folder(
        tmp_path,
        sentencepiece__bpe__model=data,
        tokenizer_config__json={"tokenizer_class": kind},
    )
    ours, reference = Tokenizer.from_hf_folder(folder), transformers_tokenizer(folder)
    vocab = reference.get_vocab()
    assert ours.backend.get_vocab() == vocab
    assert ours.vocab_size == len(reference)
    same = 0
    for text in TEXTS:
        marked = any(unicodedata.category(letter).startswith("M") for letter in text)
        if marked or any(mark in text for mark in ("</s>", "<mask>")):
            continue
        pieces = theirs.encode(text)
        expected = [vocab["<unk>"] if each == theirs.unk_id() else each + 1 for each in pieces]
        ids = ours.encode(text, parse_special=False)
        if ids != expected:
            assert likelihood(theirs, [each - 1 for each in ids]) == pytest.approx(
                likelihood(theirs, pieces), abs=1e-3
            )
            continue
        same += 1
        whole = [*(vocab[each] for each in before), *ids, *(vocab[each] for each in behind)]
        assert ours.encode(text, add_special=True, parse_special=False) == whole
    assert same > 250
    for text in ("word Word a b", "a <mask> word", "Word</s> a"):
        assert ours.encode(text, add_special=True) == reference.encode(text), text


def test_the_configs_language_stands_beside_a_text(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    folder = slow_folder(
        tmp_path,
        sentencepiece__bpe__model=sentencepiece_file("unigram"),
        tokenizer_config__json={"tokenizer_class": "MBart50Tokenizer", "src_lang": "de_DE"},
    )
    ours, theirs = Tokenizer.from_hf_folder(folder), transformers_tokenizer(folder)
    assert ours.encode("a word", add_special=True) == theirs.encode("a word")
    # Over what a tokenizer.json says, in transformers too.
    theirs.save_pretrained(tmp_path / "fast")
    config = json.loads((tmp_path / "fast" / "tokenizer_config.json").read_text())
    config["src_lang"] = "fr_XX"
    (tmp_path / "fast" / "tokenizer_config.json").write_text(json.dumps(config))
    ours, theirs = (
        Tokenizer.from_hf_folder(tmp_path / "fast"),
        transformers_tokenizer(tmp_path / "fast"),
    )
    assert ours.encode("a word", add_special=True) == theirs.encode("a word")
    assert ours.encode("", add_special=True)[0] == ours.backend.token_to_id("fr_XX")


@pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")  # never called
@pytest.mark.parametrize("kind", ["marian", "marian-apart"])
def test_marians_ids_are_transformers(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    import tiny_encoders

    tiny_encoders.save_marian(kind, 301, tmp_path)
    ours = Tokenizer.from_hf_folder(tmp_path)
    theirs = transformers.MarianTokenizer.from_pretrained(tmp_path)
    assert ours.eos_token_ids == (theirs.eos_token_id,)
    assert ours.vocab_size == max(theirs.encoder.values()) + 1
    unknown, same = 0, 0
    texts = (
        *TEXTS,
        *TEXT.splitlines(),
        *TEXT.upper().splitlines(),
        ">>deu<< A tokenizer",
        "a</s>b",
    )
    for text in texts:
        # The tokenizers library looks marks up together with their letters.
        if any(unicodedata.category(letter).startswith("M") for letter in text):
            continue
        expected = theirs.encode(text)
        ids = ours.encode(text, add_special=True)
        if ids != expected:
            # Of equally likely cuts either may be taken.
            spm = theirs.spm_source
            cuts = (spm.encode(text, out_type=str), ours._reading.encode(text).tokens)
            first, second = (likelihood(spm, spm.piece_to_id(each)) for each in cuts)
            assert first == pytest.approx(second, abs=1e-3), text
            continue
        same += 1
        unknown += theirs.unk_token_id in ids
        if kind == "marian":  # else these are no ids of an answer
            assert ours.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
        cut = ours.encode_whole(text, max_tokens=7)
        assert list(cut.ids) == theirs.encode(text, truncation=True, max_length=7)
        assert cut.truncated == (len(expected) > 7)
    assert unknown
    assert same > 300


# Ranks


def joined_by_rank(text: str, pattern: str, rank_of: dict[bytes, int]) -> list[int]:
    """What tiktoken does, by its definition: the pair of lowest rank first, from the left."""
    ids = []
    for piece in regex.findall(pattern, text):
        data = piece.encode()
        if data in rank_of:
            ids.append(rank_of[data])
            continue
        parts = [data[at : at + 1] for at in range(len(data))]
        while len(parts) > 1:
            pairs = [left + right for left, right in itertools.pairwise(parts)]
            best = min(pairs, key=lambda pair: rank_of.get(pair, 1 << 30))
            if best not in rank_of:
                break
            at = pairs.index(best)
            parts[at : at + 2] = [best]
        ids += [rank_of[part] for part in parts]
    return ids


@functools.cache
def ranked() -> list[bytes]:
    """Byte strings by rank: single bytes, then merges, then some that no merge reaches."""
    vocab, _, _ = gpt2_files()
    tokens = [text for text in vocab if text not in CONTROL]
    found = [bytes(BYTES[letter] for letter in text) for text in tokens]
    singles = sorted(token for token in found if len(token) == 1)
    longer = [token for token in found if len(token) > 1]
    return [*singles, *longer, b"Donaudampf", "再見再見".encode()]


def test_merges_come_back_from_their_ranks() -> None:
    vocab, merges, _ = gpt2_files()
    lines = merges.decode().splitlines()[1:]
    # Where two merges give one token, the first is the one that is used.
    first: dict[str, str] = {}
    for line in lines:
        first.setdefault(line.replace(" ", ""), line)
    found = merges_by_rank(ranked())
    texts = [" ".join("".join(LETTERS[byte] for byte in part) for part in merge) for merge in found]
    assert texts == list(first.values())
    assert len(vocab) == len(texts) + 256 + len(CONTROL)


def tiktoken_file() -> bytes:
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranked()))
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize("name", ["qwen.tiktoken", "tokenizer.model"])
def test_tiktoken_files_have_the_ids_of_their_ranks(tmp_path: Path, name: str) -> None:
    kind = {"qwen.tiktoken": "qwen2", "tokenizer.model": "llama-bpe"}[name]
    size = len(ranked())
    extra = {str(size + 5): {"content": "<|begin|>", "special": True}}
    extra |= {str(size + index): {"content": f"<|{index}|>", "special": True} for index in range(5)}
    config: dict[str, Any] = {"tokenizer_class": "QWenTokenizer"}
    if kind == "llama-bpe":
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "added_tokens_decoder": extra,
            "bos_token": "<|begin|>",
            "eos_token": "<|1|>",
        }
    files: dict[str, Any] = {name.replace(".", "__"): tiktoken_file()}
    files["config__json"] = {"model_type": "llama" if kind == "llama-bpe" else "qwen"}
    ours = Tokenizer.from_hf_folder(slow_folder(tmp_path, tokenizer_config__json=config, **files))
    rank_of = {token: rank for rank, token in enumerate(ranked())}
    for text in TEXTS:
        read = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
        expected = joined_by_rank(read, PUBLISHED[kind][0], rank_of)
        assert ours.encode(text, parse_special=False) == expected, text
        assert ours.decode(expected) == read
    if kind == "qwen2":
        assert ours.encode("<|endoftext|><|im_start|><|extra_204|>") == [size, size + 1, size + 207]
        assert ours.eos_token_ids == (size,)
    else:
        assert ours.encode("a", add_special=True)[0] == size + 5


@pytest.mark.parametrize("listed", [True, False])
def test_tekken_files_have_the_ids_of_their_ranks(tmp_path: Path, listed: bool) -> None:
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in enumerate(ranked())
    ]
    left_out = 7
    content: dict[str, Any] = {
        "config": {
            "pattern": PUBLISHED["tekken"][0],
            "default_vocab_size": len(vocab) - left_out + 30,
            "default_num_special_tokens": 30,
        },
        "vocab": vocab,
    }
    if listed:
        names = ("<unk>", "<s>", "</s>", "[THINK]")
        content["special_tokens"] = [
            {"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(names)
        ]
    ours = Tokenizer.from_hf_folder(slow_folder(tmp_path, tekken__json=content))
    rank_of = {token: rank for rank, token in enumerate(ranked()[:-left_out])}
    for text in TEXTS:
        expected = [30 + rank for rank in joined_by_rank(text, PUBLISHED["tekken"][0], rank_of)]
        assert ours.encode(text, parse_special=False) == expected, text
        assert ours.encode(text, add_special=True, parse_special=False) == [1, *expected]
    assert ours.encode("[THINK]" if listed else "[INST]") == [3]
    assert ours.encode("<SPECIAL_29>") == [29]
    assert (ours.vocab_size, ours.eos_token_ids) == (len(vocab) - left_out + 30, (2,))
