"""Each family's pre-tokenizer keeps its ids in llama.cpp, under a name found by what it does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import NamedTuple

import pytest
from tiny_tokenizers import (
    byte_level,
    changed,
    falcon,
    published_pre_tokenizer,
    random_texts,
    write_folder,
    write_vocabulary,
)
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from edgellm.errors import UnsupportedTokenizer
from edgellm.tokenization import AWKWARD_TEXTS, LlamaCppTokenizer, Tokenizer, artifact_parity
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS, build

pytest.importorskip("gguf", reason="gguf is not installed")
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


class Family(NamedTuple):
    """How a family's tokenizer.json splits text, and the ``name`` that llama.cpp has for that.

    ``near``: how many of the families' limits llama.cpp has. ``borders``: the vocabulary was
    trained with these splits, and llama.cpp's coarser ones rely on it.
    """

    name: str
    pre_tokenizer: str | pre_tokenizers.PreTokenizer
    ignore_merges: bool = False
    nfc: bool = False
    near: int = 0
    borders: bool = False


FAMILIES = {
    "llama-3, smollm3, lfm2, falcon3": Family("llama-bpe", "llama-bpe", ignore_merges=True),
    "phi-4, granite-4": Family("dbrx", "cl100k"),
    "olmo-2": Family("dbrx", "dolma2"),
    "qwen2, qwen3": Family("qwen2", "qwen2", nfc=True),
    "stablelm-2": Family("qwen2", "qwen2"),
    "qwen3.5": Family("qwen35", "qwen35", nfc=True),
    "gpt-2, gpt-j, opt, phi-2": Family("gpt-2", "gpt-2"),
    "gpt-neox, olmo, stablelm, mpt": Family("gpt-2", "gpt-2", nfc=True),
    "starcoder2, granite-3, smollm2": Family("smollm", "smollm"),
    "command-r": Family("smollm", "smollm", nfc=True),
    "falcon": Family("falcon", falcon(), borders=True),
    "bloom": Family("bloom", "bloom"),
    "deepseek-llm, deepseek-v2": Family(
        "deepseek-llm", build(PRE_TOKENIZERS["deepseek-llm"].trained_splits), near=1, borders=True
    ),
    "deepseek-coder": Family(
        "deepseek-coder", build(PRE_TOKENIZERS["deepseek-coder"].trained_splits), near=1
    ),
    "deepseek-v3": Family("deepseek-v3", "deepseek-v3"),
    "mistral's tekken": Family("tekken", "tekken", ignore_merges=True, near=1),
    "phi-4-mini, gpt-oss": Family("gpt-4o", "gpt-4o", near=1),
    "youtu": Family(
        "youtu", build(PRE_TOKENIZERS["youtu"].trained_splits), ignore_merges=True, near=1
    ),
}


def tokenizer_of(path: Path, family: Family) -> Tokenizer:
    splits = family.pre_tokenizer
    if isinstance(splits, str):
        splits = published_pre_tokenizer(splits)
    backend = byte_level(splits, borders=family.borders)
    backend = changed(backend, model={"ignore_merges": family.ignore_merges})
    if family.nfc:
        backend = changed(backend, normalizer={"type": "NFC"})
    return Tokenizer.from_hf_folder(write_folder(path / "folder", backend))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_ids_are_llamacpps(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    source = tokenizer_of(tmp_path, family)
    keys = source.gguf_metadata()
    assert keys["tokenizer.ggml.pre"] == family.name
    limits = source.gguf_limits()
    assert len(limits) == family.near + family.nfc, limits
    path = write_vocabulary(tmp_path / "x.gguf", keys)
    verdict = artifact_parity(source, path, "gguf", limits)
    assert not verdict.mismatches
    assert limits or verdict.equal
    # The limits say all that differs, and no text outside them does.
    judge = LlamaCppTokenizer(path)
    for text in random_texts(400, 21):
        if not any(limit.concerns(text) for limit in limits):
            assert judge.encode(text) == source.encode(text), text
    for text in AWKWARD_TEXTS:
        ids = source.encode(text, parse_special=False)
        assert judge.decode(ids, skip_special=False) == source.decode(ids, skip_special=False)
    judge.close()


def test_coarser_splits_do_only_where_the_vocabulary_makes_no_difference(tmp_path: Path) -> None:
    free = byte_level(falcon())
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, free))
    with pytest.raises(UnsupportedTokenizer, match=r"no pre-tokenizer that llama\.cpp knows"):
        source.gguf_metadata()


@pytest.mark.parametrize(
    "splits",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.UnicodeScripts(),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ],
)
def test_what_no_name_stands_for_is_refused_with_its_rules(
    tmp_path: Path, splits: pre_tokenizers.PreTokenizer
) -> None:
    backend: Backend = byte_level(splits)
    kind = json.loads(backend.to_str())["pre_tokenizer"]["type"]
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, backend))
    with pytest.raises(UnsupportedTokenizer, match=rf"{kind}.*Choose --format onnx"):
        source.gguf_metadata()
