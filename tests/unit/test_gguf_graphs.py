"""What llama.cpp's graphs are known to fix in code, for models that no small one shows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edgellm.architectures import family_of
from edgellm.architectures.decoder import Decoder, Layer, Norm, Rope, RopeScaling
from edgellm.architectures.family import GgufLayout
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.export.gguf_graphs import check_expressible, context_of


def layout(arch: str) -> GgufLayout:
    return family_of({"model_type": {"gemma3": "gemma3_text"}.get(arch, arch)}).gguf_layout


LOCAL, GLOBAL = Layer(512, Rope(1e4, 128)), Layer(None, Rope(1e6, 128))

LLAMA = Decoder(
    family="llama",
    vocab_size=64,
    hidden_size=256,
    ffn_size=512,
    context_length=4096,
    heads=2,
    kv_heads=2,
    head_dim=128,
    layers=(GLOBAL,) * 2,
    norm=Norm("rms", 1e-5),
    activation="silu",
)
GEMMA = replace(
    LLAMA,
    hidden_size=5376,
    heads=32,
    kv_heads=16,
    layers=(LOCAL, GLOBAL) * 2,
    norm=Norm("rms", 1e-6, offset=True),
    activation="gelu_tanh",
    qk_norm=True,
    post_norms=True,
    embedding_scale=5376**0.5,
)


def test_models_of_each_graph_pass() -> None:
    check_expressible(LLAMA, layout("llama"))
    check_expressible(LLAMA, layout("qwen2"))
    check_expressible(GEMMA, layout("gemma3"))


def test_gemma_27b_is_known_by_its_layers_and_has_another_scale() -> None:
    large = replace(GEMMA, layers=(LOCAL, GLOBAL) * 31)
    check_expressible(replace(large, attention_scale=168**-0.5), layout("gemma3"))
    with pytest.raises(UnsupportedTarget, match="an attention scale of"):
        check_expressible(large, layout("gemma3"))
    with pytest.raises(UnsupportedTarget, match="an attention scale of"):
        check_expressible(replace(GEMMA, attention_scale=168**-0.5), layout("gemma3"))


YARN = RopeScaling("yarn", 4.0, 1024, beta_fast=16.0)


@pytest.mark.parametrize(
    ("decoder", "arch", "message"),
    [
        (replace(GEMMA, embedding_scale=1.5), "gemma3", "an embedding scale of 1.5"),
        (
            replace(GEMMA, layers=(LOCAL, GLOBAL, replace(LOCAL, window=64))),
            "gemma3",
            "local layers that differ",
        ),
        (
            replace(
                GEMMA,
                layers=(replace(LOCAL, rope=Rope(1e4, 128, RopeScaling("linear", 2.0))), GLOBAL),
            ),
            "gemma3",
            "rope scaling in local layers",
        ),
        (replace(LLAMA, head_dim=64), "qwen2", "2 heads of 64 in a model of width 256"),
        (
            replace(LLAMA, layers=(Layer(None, Rope(1e4, 32)),)),
            "llama",
            "rotary positions over a part of each head",
        ),
        (replace(LLAMA, layers=(Layer(None, Rope(1e4, 128, YARN)),)), "qwen3", "beta_fast"),
        (replace(LLAMA, activation="gelu"), "llama", "the activation gelu"),
        (replace(LLAMA, qk_norm=True), "llama", "norms on queries and keys"),
        (replace(LLAMA, attention_scale=1.0), "llama", "an attention scale other than"),
        (replace(LLAMA, output_bias=True), "qwen3", "a bias on the attention output"),
    ],
)
def test_differences_are_named(decoder: Decoder, arch: str, message: str) -> None:
    with pytest.raises(UnsupportedTarget, match=message):
        check_expressible(decoder, layout(arch))


def test_yarn_of_any_settings_is_baked_into_llamas_factors() -> None:
    check_expressible(replace(LLAMA, layers=(Layer(None, Rope(1e4, 128, YARN)),)), layout("llama"))


def test_the_context_is_capped_at_the_smallest_window_of_a_graph_without() -> None:
    windowed = replace(LLAMA, layers=(replace(LOCAL, window=1024), LOCAL, GLOBAL))
    context, notes = context_of(windowed, layout("llama"), None)
    assert context == 512
    assert len(notes) == 1
    assert context_of(windowed, layout("gemma3"), None) == (4096, ())
    assert context_of(windowed, layout("llama"), 100)[0] == 100
    assert context_of(replace(windowed, context_length=300), layout("llama"), None) == (300, ())
    with pytest.raises(UsageError, match="choose at most 4096"):
        context_of(windowed, layout("llama"), 5000)
