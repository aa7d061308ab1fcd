"""Tokenizer, template, ends of an answer and suggested sampling through every container."""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES
from tiny_tokenizers import PUBLISHED, byte_level

from edgellm.conversion import convert
from edgellm.errors import SourceError, VerificationError
from edgellm.generation_defaults import sampling_keys
from edgellm.plan import make_plan
from edgellm.recipe import Recipe
from edgellm.source import open_source
from edgellm.tokenization import Tokenizer, artifact_tokenizer

TinyModel = Callable[[str], Path]
MESSAGES = [{"role": "user", "content": "Hello?"}]
SUGGESTED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}


@pytest.fixture
def source(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """A tiny model with a chat template, three ends of an answer and suggestions for sampling."""
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    backend = byte_level(vocab_size=rows - 2)
    backend.add_special_tokens(["<|eot_id|>", "<|turn|>"])
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATES["phi"]})
    )
    ends = [backend.token_to_id(text) for text in ("</s>", "<|eot_id|>", "<|turn|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, **SUGGESTED}))
    return folder


def read_back(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    model = open_source(str(path))
    return model.tokenizer, model.generation


@pytest.mark.parametrize(
    ("container", "quant"), [("gguf", "f16"), ("onnx", "f32"), ("hf", "f16"), ("mlx", "f16")]
)
def test_what_a_model_says_of_itself_is_carried(
    source: Path, tmp_path: Path, container: str, quant: str
) -> None:
    expected, _ = read_back(source)
    artifact = convert(
        Recipe(source=str(source), format=container, quant=quant), tmp_path / "out", check=False
    )
    if container == "onnx":
        found = Tokenizer.from_hf_folder(artifact.path)
        generation = json.loads((artifact.path / "generation_config.json").read_text())
    else:
        found, generation = read_back(artifact.main if container == "gguf" else artifact.path)
    assert set(found.eos_token_ids) == set(expected.eos_token_ids)
    assert len(expected.eos_token_ids) == 3
    assert set(generation["eos_token_id"]) == set(expected.eos_token_ids)
    assert {name: generation[name] for name in SUGGESTED} == SUGGESTED
    assert found.render_chat(MESSAGES) == expected.render_chat(MESSAGES)


def test_from_gguf_to_a_folder_that_transformers_reads(source: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    expected, _ = read_back(source)
    first = convert(
        Recipe(source=str(source), format="gguf", quant="f16"), tmp_path / "gguf", check=False
    )
    second = convert(
        Recipe(source=str(first.main), format="hf", quant="f16"), tmp_path / "hf", check=False
    )
    generation = transformers.GenerationConfig.from_pretrained(second.path)
    assert set(generation.eos_token_id) == set(expected.eos_token_ids)
    assert {name: getattr(generation, name) for name in SUGGESTED} == SUGGESTED
    theirs = transformers.AutoTokenizer.from_pretrained(second.path)
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == expected.render_chat(MESSAGES)
    assert theirs.encode(text) == expected.encode(text, add_special=True)


@pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)
def test_llamacpp_finds_the_suggestions(source: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    artifact = convert(
        Recipe(source=str(source), format="gguf", quant="f16"), tmp_path / "out", check=False
    )
    model = Llama(str(artifact.main), vocab_only=True, verbose=False)
    found = {
        key.removeprefix("general.sampling."): float(value)
        for key, value in model.metadata.items()
        if key.startswith("general.sampling.")
    }
    model.close()
    assert found == {"temp": pytest.approx(0.6), "top_k": 20, "top_p": pytest.approx(0.95)}


@pytest.mark.parametrize(("container", "quant"), [("gguf", "f16"), ("onnx", "f32"), ("hf", "f16")])
def test_a_model_whose_tokenizer_is_an_older_file(
    tiny_model: TinyModel, tmp_path: Path, container: str, quant: str
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    for path in folder.glob("*token*"):
        path.unlink()
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = [*(bytes([byte]) for byte in range(256)), b"ab", b"abab", b" a", b" ab"]
    content = {
        "config": {
            "pattern": r"\s?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+",
            "default_vocab_size": len(tokens) + 4,
            "default_num_special_tokens": 4,
        },
        "vocab": [
            {"rank": rank, "token_bytes": base64.b64encode(token).decode()}
            for rank, token in enumerate(tokens)
        ],
    }
    if container == "gguf":
        # One that llama.cpp has a name for.
        content["config"]["pattern"] = PUBLISHED["llama-bpe"][0]
    assert len(tokens) + 4 <= rows
    (folder / "tekken.json").write_text(json.dumps(content))
    expected = open_source(str(folder)).tokenizer
    artifact = convert(
        Recipe(source=str(folder), format=container, quant=quant), tmp_path / "out", check=False
    )
    found = artifact_tokenizer(artifact.main, artifact.container)
    text = " ababab, 2024</s>é"
    assert found.encode(text, add_special=True) == expected.encode(text, add_special=True)
    assert found.encode(" ab") == [4 + 259]
    assert not (artifact.path / "tekken.json").exists()
    assert expected.chat_template
    assert found.chat_template == expected.chat_template


@pytest.mark.parametrize(("container", "quant"), [("gguf", "f16"), ("hf", "f16"), ("mlx", "f16")])
def test_lost_suggestions_are_no_conversion(
    source: Path,
    tmp_path: Path,
    container: str,
    quant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A writer that forgets them, or rounds them, is found out."""
    colder = {"do_sample": True, "temperature": 0.5, "top_k": 20, "top_p": 0.95}
    if container == "gguf":
        keys = sampling_keys(colder)
        monkeypatch.setattr("edgellm.export.to_gguf.sampling_keys", lambda generation: keys)
    else:
        write = f"edgellm.export.to_{container}.json_file"
        written = json.dumps(colder).encode()
        monkeypatch.setattr(write, lambda content: written if "top_k" in content else b"{}")
    recipe = Recipe(source=str(source), format=container, quant=quant)
    with pytest.raises(VerificationError, match=r"temperature 0\.6.*has temperature 0\.5"):
        convert(recipe, tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_suggestions_of_nothing_are_carried(source: Path, tmp_path: Path) -> None:
    """0 switches a limit off, and is no missing value."""
    path = source / "generation_config.json"
    off = {"do_sample": True, "top_k": 0, "temperature": 0.0}
    path.write_text(json.dumps(off))
    artifact = convert(
        Recipe(source=str(source), format="onnx", quant="f32"), tmp_path / "out", check=False
    )
    search = json.loads((artifact.path / "genai_config.json").read_text())["search"]
    assert {name: search[name] for name in off} == off


def test_bad_suggestions_are_refused_before_any_work(source: Path, tmp_path: Path) -> None:
    path = source / "generation_config.json"
    path.write_text(json.dumps({"do_sample": True, "temperature": "warm"}))
    with pytest.raises(SourceError, match=r"temperature is .warm."):
        make_plan(Recipe(source=str(source), format="hf", quant="f16"))
