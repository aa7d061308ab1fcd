"""A cache in int8 holds what the cache in f32 holds, and moves the answers a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import onnx_files
import tiny_models

from edgellm.architectures.decoder import Rope
from edgellm.errors import UnsupportedTarget
from edgellm.export import container_named, kv_scales
from edgellm.export.kv_scales import CacheScales
from edgellm.recipe import Recipe
from edgellm.source import open_source

TinyModel = Callable[[str], Path]

LENGTH = 100

REFUSED = ("olmo2", "olmo3", "mamba")
"""How the names of models begin that have no such cache."""

HELD = sorted(name for name in tiny_models.MODELS if not name.startswith(REFUSED))

LARGEST_KL = 0.1
"""Nats. Found: up to 0.05, where attention is as sharp as in these models, whose logits spread 3 to
5; 0.006 for SmolLM2-135M."""

LARGEST_KL_OF_EXPERTS = 0.3
"""Found: up to 0.2, as a small change sends a token to another expert now and then."""


@pytest.mark.parametrize("name", HELD)
def test_cache_is_rounded_to_the_nearest_and_nothing_is_clipped(
    name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model(name)
    ids = tiny_models.some_token_ids(LENGTH)
    graphs = {}
    for kv_cache in ("f32", "int8"):
        onnx_files.write_onnx(folder, tmp_path / kv_cache, kv_cache=kv_cache)
        graphs[kv_cache] = onnx_files.Graph(tmp_path / kv_cache, LENGTH)
    wanted, got = (graph.step(ids, 0) for graph in graphs.values())
    source = open_source(str(folder))
    first = next(at for at, layer in enumerate(source.decoder.layers) if layer.attends)
    scales = CacheScales(source.decoder, source.tensors, first)
    # The first layer's keys and values are the same in both; what follows differs a little.
    for part, scale in (("key", scales.keys()), ("value", scales.values())):
        shape = 1, source.decoder.cache_heads, 1, source.decoder.cache_dim
        by_channel = scale.load().reshape(shape)
        codes, exact = (
            graphs[kv_cache].buffers[f"past_key_values.{first}.{part}"].numpy()
            for kv_cache in ("int8", "f32")
        )
        assert (np.abs(codes * by_channel - exact) <= 0.501 * by_channel).all()
        # Coarse scales would clip nothing either.
        # Values that the model clips itself may reach the last code, and go no further.
        last = 127 + (source.decoder.qkv_clip is not None)
        assert 30 < np.abs(codes.astype(np.int32)).max() < last
    experts = any(layer.experts for layer in source.decoder.layers)
    assert 0 < divergence(wanted, got) < (LARGEST_KL_OF_EXPERTS if experts else LARGEST_KL)


@pytest.mark.parametrize("steps", [(3,), (40, 17), (1, 60)])
def test_steps_fill_the_cache_as_one_prompt_does(
    steps: tuple[int, ...], tiny_model: TinyModel, tmp_path: Path
) -> None:
    onnx_files.write_onnx(tiny_model("llama"), tmp_path, kv_cache="int8")
    ids = tiny_models.some_token_ids(LENGTH)
    wanted, got = onnx_files.logits(tmp_path, ids), onnx_files.logits(tmp_path, ids, steps)
    # A value that lies between two codes may be rounded the other way.
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-2)


def test_weights_are_read_in_chunks_when_the_scales_are_loaded_and_not_before(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(tiny_model("gpt2")))
    whole = CacheScales(source.decoder, source.tensors, 0).keys().load()
    monkeypatch.setattr(kv_scales, "CHUNK_BYTES", 4 * 96 * 7)
    np.testing.assert_array_equal(
        CacheScales(source.decoder, source.tensors, 0).keys().load(), whole
    )
    lazy = CacheScales(source.decoder, {}, 0).keys()
    with pytest.raises(KeyError):
        lazy.load()


def test_channels_beyond_the_rope_keep_their_own_scale(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("llama")))
    scales = CacheScales(source.decoder, source.tensors, 0)
    reach = np.arange(1.0, source.decoder.kv_size + 1)
    turned = scales._turned(reach, Rope(theta=1e4, dimensions=8), np.maximum)
    np.testing.assert_array_equal(turned[:8], [5, 6, 7, 8] * 2)
    np.testing.assert_array_equal(turned[8:32], reach[8:32])


def test_other_types_and_other_containers_are_refused_with_a_way_out(
    tiny_model: TinyModel,
) -> None:
    source = open_source(str(tiny_model("llama")))
    for container, kv_cache, message in (
        ("onnx", "q8_0", "choose f32 or int8"),
        ("gguf", "int8", r"llama\.cpp is told when it runs.*--format onnx"),
    ):
        recipe = Recipe(source="m", format=container, kv_cache=kv_cache)
        with pytest.raises(UnsupportedTarget, match=message):
            container_named(container).lay_out(source, recipe)


def divergence(wanted: np.ndarray, got: np.ndarray) -> float:
    """Mean KL of ``got`` from ``wanted``, logits ``[positions, vocab]``, in nats."""
    one, other = (
        logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
        for logits in (wanted, got)
    )
    return float((np.exp(one) * (one - other)).sum(-1).mean())


def test_a_model_without_norms_before_its_keys_is_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedTarget, match=r"no norms before.*--kv-cache f32"):
        onnx_files.write_onnx(tiny_model("olmo2"), tmp_path, kv_cache="int8")
