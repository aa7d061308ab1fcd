"""The language model within a vision-language model answers text as the whole does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models
import torch
import transformers

import edgellm
from edgellm import forward
from edgellm.errors import UnsupportedModel, UsageError
from edgellm.source import open_source

TinyModel = Callable[[str], Path]

VISION: dict[str, dict[str, Any]] = {
    "siglip_vision_model": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    },
    "pixtral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 16,
    },
}

WHOLE = {
    "gemma3": ("Gemma3Config", "gemma3", "siglip_vision_model", {"mm_tokens_per_image": 4}),
    "mistral3": ("Mistral3Config", "mistral-no-window", "pixtral", {}),
    "llava": ("LlavaConfig", "llama-biased", "siglip_vision_model", {}),
}
"""By model_type: the config's class, the tiny model of its text part, and what it sees with."""


@pytest.fixture(scope="module", params=WHOLE)
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """A vision-language model with random weights: its folder, and itself."""
    name, text, sees, more = WHOLE[request.param]
    tiny = tiny_models.MODELS[text]
    inner = getattr(transformers, tiny.config_class)(vocab_size=tiny.vocab_size, **tiny.settings)
    vision = transformers.AutoConfig.for_model(sees, **VISION[sees])
    config = getattr(transformers, name)(
        text_config=inner.to_dict(),
        vision_config=vision.to_dict(),
        tie_word_embeddings=bool(inner.tie_word_embeddings),
        **more,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    tiny_models.randomize(model, seed=7)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tiny_models.save_tokenizer(tiny.split, tiny.vocab_size, folder)
    return folder, model


def test_it_answers_text_as_the_whole_does(whole: tuple[Path, Any]) -> None:
    folder, model = whole
    source = open_source(str(folder), text_only=True)
    assert "tensors were left out" in source.notes[0]
    ids = tiny_models.some_token_ids(60)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    (found,) = forward.window_logits(source, [ids])
    assert wanted.std() > 0.5
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4)


def test_it_is_a_folder_of_its_own_afterwards(whole: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = whole
    edgellm.convert(folder, tmp_path / "out", format="hf", quant="f32", text_only=True, check=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [open_source(str(tmp_path / "out")).family.architecture]
    ids = tiny_models.some_token_ids(20)
    with torch.no_grad():
        wanted = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    found = tiny_models.reference_logits(tmp_path / "out", ids)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def test_without_being_asked_it_is_refused_with_what_could_be_done(
    whole: tuple[Path, Any],
) -> None:
    with pytest.raises(UnsupportedModel, match="--text-only"):
        open_source(str(whole[0]))


def test_where_there_is_no_such_part(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a model of text"):
        open_source(str(tiny_model("llama")), text_only=True)
    folder = tiny_models.copy_of(tiny_model("llama"), tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    with pytest.raises(UnsupportedModel, match="not known that its text part alone"):
        open_source(str(folder), text_only=True)
