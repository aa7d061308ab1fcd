"""Families read from configs and from GGUF metadata: what is understood, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgellm.architectures import (
    FAMILIES,
    REFUSED,
    config_from_gguf,
    family_of,
    gguf_keys,
    rope_factors,
)
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Layer, Rope, RopeScaling
from edgellm.architectures.rope import inverse_frequencies
from edgellm.errors import SourceError, UnsupportedModel, UsageError

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 512}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32}
GEMMA3 = {key: value for key, value in LLAMA.items() if key != "hidden_act"} | {
    "model_type": "gemma3_text",
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 32,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 100,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
CONFIGS = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def describe(
    config: dict[str, Any], *, ignore: tuple[str, ...] = (), context: int | None = None
) -> Decoder:
    return family_of(config).describe(Config(config, ignore=ignore, context=context))


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


# --- the registry


def test_every_family_is_under_its_own_name() -> None:
    for name in FAMILIES:
        family = family_of({"model_type": name})
        assert family.model_type == name


@pytest.mark.parametrize("name", REFUSED)
def test_lookalikes_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedModel, match=name):
        family_of({"model_type": name})


def test_gemma_with_a_vision_part_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="vision"):
        family_of({"model_type": "gemma3", "text_config": GEMMA3})


@pytest.mark.parametrize(
    ("config", "message"),
    [({"model_type": "lama"}, "did you mean llama"), ({}, "missing"), ({"model_type": 3}, "3")],
)
def test_unknown_types_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        family_of(config)


# --- reading keys


@pytest.mark.parametrize("name", CONFIGS)
def test_every_missing_key_is_named(name: str) -> None:
    config = CONFIGS[name]
    optional = {"model_type", "num_key_value_heads", "rope_theta"} if name == "llama" else set()
    for key in config:
        if key in optional | {"model_type"}:
            continue
        with pytest.raises(UnsupportedModel, match=rf"\b{key}\b is missing|key {key} is missing"):
            describe(without(config, key))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("value", ["x", True, -1, [], {}, math.nan])
def test_every_wrong_value_is_named(name: str, value: object) -> None:
    for key in without(CONFIGS[name], "model_type", "activation_function"):
        with pytest.raises(UnsupportedModel, match=key):
            describe(CONFIGS[name] | {key: value})


def test_all_unknown_keys_are_listed_and_can_be_vouched_for() -> None:
    config = LLAMA | {"logit_scale": 2.0, "use_alibi": False, "unset": None}
    with pytest.raises(UnsupportedModel, match=r"logit_scale = 2.0, use_alibi = False"):
        describe(config)
    assert describe(config, ignore=("logit_scale", "use_alibi")) == describe(LLAMA)


def test_unknown_keys_of_a_section_are_named_with_their_path() -> None:
    config = LLAMA | {"rope_scaling": YARN | {"finetuned": True}}
    with pytest.raises(UnsupportedModel, match=r"rope_scaling\.finetuned"):
        describe(config)
    describe(config, ignore=("rope_scaling.finetuned",))


def test_a_key_that_is_needed_cannot_be_ignored() -> None:
    with pytest.raises(UsageError, match="hidden_size"):
        describe(LLAMA, ignore=("hidden_size",))


def test_neutral_keys_may_hold_nothing_else() -> None:
    describe(LLAMA | {"pretraining_tp": 1, "use_mrope": False})
    with pytest.raises(UnsupportedModel, match="pretraining_tp"):
        describe(LLAMA | {"pretraining_tp": 2})
    with pytest.raises(UnsupportedModel, match="use_mrope"):
        describe(LLAMA | {"use_mrope": True})
    assert describe(LLAMA | {"pretraining_tp": 2}, ignore=("pretraining_tp",)) == describe(LLAMA)


def test_a_quantized_checkpoint_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="quantized already"):
        describe(LLAMA | {"quantization_config": {"quant_method": "gptq"}})


def test_a_config_that_is_no_object_is_refused() -> None:
    with pytest.raises(SourceError, match="object"):
        Config([1, 2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads is 5"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_sizes_and_choices_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        describe(LLAMA | change)


# --- families


def test_llama_defaults_are_those_of_llama_1() -> None:
    decoder = describe(without(LLAMA, "num_key_value_heads", "rope_theta"))
    assert decoder.kv_heads == 4
    assert decoder.head_dim == 16
    assert decoder.layers == (Layer(None, Rope(10000.0, 16)),) * 3
    assert not decoder.tied_head
    assert not decoder.qkv_bias


def test_llama_biases() -> None:
    decoder = describe(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert decoder.features() >= {Feature.QKV_BIAS, Feature.OUTPUT_BIAS, Feature.MLP_BIAS}
    roles = {row.role for row in family_of(LLAMA).tensors(decoder)}
    assert {"blk.0.attn_q.bias", "blk.2.attn_output.bias", "blk.1.ffn_down.bias"} <= roles


def test_llama_has_no_windows() -> None:
    describe(LLAMA | {"layer_types": ["full_attention"] * 3})
    with pytest.raises(UnsupportedModel, match="layer_types"):
        describe(LLAMA | {"layer_types": ["sliding_attention"] * 3})


def test_mistral_window_is_stated_or_null() -> None:
    assert {layer.window for layer in describe(MISTRAL).layers} == {512}
    assert {layer.window for layer in describe(MISTRAL | {"sliding_window": None}).layers} == {None}


def test_qwen2_windows() -> None:
    def windows(**change: Any) -> tuple[int | None, ...]:
        return tuple(layer.window for layer in describe(QWEN2 | change).layers)

    on = {"use_sliding_window": True, "sliding_window": 8}
    assert windows(sliding_window=8, max_window_layers=1) == (None, None, None)
    assert windows(**on, max_window_layers=1) == (None, 8, 8)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(**on, layer_types=types) == (8, None, None)
    with pytest.raises(UnsupportedModel, match="use_sliding_window"):
        windows(layer_types=types)
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        windows(**on, layer_types=["chunked_attention"] * 3)
    with pytest.raises(UnsupportedModel, match="3 layers"):
        windows(**on, layer_types=types[:2])


def test_gemma3_old_and_new_style_agree() -> None:
    old = describe(GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    new = describe(
        without(GEMMA3, "rope_theta", "rope_local_base_freq", "sliding_window_pattern")
        | {
            "layer_types": ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        }
    )
    assert old == new
    assert [layer.window for layer in old.layers] == [512] * 5 + [None, 512]
    assert old.layers[0].rope == Rope(1e4, 32)
    assert old.layers[5].rope == Rope(1e6, 32, RopeScaling("linear", 8.0))
    assert old.embedding_scale == 8.0
    assert old.attention_scale is None
    assert old.tied_head
    assert old.norm.offset


def test_gemma3_attention_scale() -> None:
    assert describe(GEMMA3 | {"query_pre_attn_scalar": 24}).attention_scale == 24**-0.5


@pytest.mark.parametrize(
    "change",
    [
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
    ],
)
def test_gemma3_refuses_what_it_cannot_follow(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=next(iter(change))):
        describe(GEMMA3 | change)


def test_gpt2() -> None:
    decoder = describe(GPT2 | {"n_ctx": 128, "n_inner": None, "task_specific_params": {"a": 1}})
    assert decoder.ffn_size == 256
    assert decoder.tied_head
    assert decoder.learned_positions == decoder.context_length == 128
    assert describe(GPT2 | {"scale_attn_weights": False}).softmax_scale == 1.0
    for change in ({"scale_attn_by_inverse_layer_idx": True}, {"n_ctx": 64}, {"n_head": 5}):
        with pytest.raises(UnsupportedModel, match=next(iter(change))):
            describe(GPT2 | change)


@pytest.mark.parametrize("name", CONFIGS)
def test_tensor_rows_are_distinct_and_follow_the_tie(name: str) -> None:
    family = family_of(CONFIGS[name])
    for tied in (True, False):
        decoder = replace(describe(CONFIGS[name]), tied_head=tied)
        rows = list(family.tensors(decoder))
        assert len({row.role for row in rows}) == len({row.source for row in rows}) == len(rows)
        assert ("output.weight" in {row.role for row in rows}) is not tied
        assert all(all(size > 0 for size in row.shape) for row in rows)


# --- rope


@pytest.mark.parametrize("scaling", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
def test_both_styles_of_rope_agree(scaling: dict[str, Any]) -> None:
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    ancient = describe(LLAMA | {"rope_scaling": old})
    new = without(LLAMA, "rope_theta") | {"rope_parameters": scaling | {"rope_theta": 10000.0}}
    assert ancient == describe(new) == describe(LLAMA | {"rope_scaling": scaling})


def test_contradicting_ropes_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="rope_theta"):
        describe(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    with pytest.raises(UnsupportedModel, match="contradict"):
        describe(LLAMA | {"rope_parameters": {"rope_type": "default"}, "rope_scaling": YARN})
    with pytest.raises(UnsupportedModel, match="type"):
        describe(LLAMA | {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}})


@pytest.mark.parametrize("kind", ["longrope", "su", "mrope", "proportional", "brandnew"])
def test_unknown_rope_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"rope_type is '{kind}'"):
        describe(LLAMA | {"rope_scaling": {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear"},
        {"rope_type": "linear", "factor": 0},
        without(YARN, "factor"),
        YARN | {"beta_fast": 1.0, "beta_slow": 2.0},
        YARN | {"truncate": "yes"},
        without(LLAMA3, "low_freq_factor"),
        LLAMA3 | {"high_freq_factor": 1.0},
        {"rope_type": "factors", "factors": [1.0] * 7},
        {"rope_type": "factors", "factors": [0.0] * 8},
    ],
)
def test_broken_rope_scalings_are_refused(scaling: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="rope_scaling"):
        describe(LLAMA | {"rope_scaling": scaling})


def test_dynamic_rope_needs_a_context() -> None:
    config = LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(UnsupportedModel, match="--context"):
        describe(config)
    assert describe(config, context=2048) == describe(LLAMA)
    longer = Config(config, context=4096)
    decoder = family_of(config).describe(longer)
    rope = decoder.layers[0].rope
    assert rope is not None
    assert rope.theta == pytest.approx(10000.0 * 3.0 ** (16 / 14))
    assert decoder.context_length == 4096
    assert "4096" in longer.notes[0]


def test_frequencies_of_the_plain_and_the_listed_kind() -> None:
    plain, factor = inverse_frequencies(Rope(100.0, 4))
    np.testing.assert_allclose(plain, [1.0, 0.1])
    assert factor == 1.0
    scaling = RopeScaling("factors", factors=(2.0, 4.0), attention_factor=1.5)
    listed, factor = inverse_frequencies(Rope(100.0, 4, scaling))
    np.testing.assert_allclose(listed, [0.5, 0.025])
    assert factor == 1.5


# --- GGUF


def round_trip(config: dict[str, Any]) -> tuple[Decoder, Decoder]:
    """What a config means, and what the GGUF keys written for it mean."""
    family = family_of(config)
    decoder = describe(config)
    keys = {
        "general.architecture": family.gguf_layout.arch,
        **gguf_keys(decoder, family.gguf_layout),
    }
    stored = {
        key: float(np.float32(value)) if isinstance(value, float) else value
        for key, value in keys.items()
    }
    names = {row.role for row in family.tensors(decoder)}
    return decoder, describe(
        config_from_gguf(stored, names, rope_factors(decoder, family.gguf_layout))
    )


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        LLAMA | {"head_dim": 32, "rope_scaling": {"rope_type": "linear", "factor": 2.5}},
        LLAMA | {"rope_scaling": YARN},
        LLAMA | {"rope_scaling": YARN | {"attention_factor": 1.3}},
        QWEN2,
        QWEN2 | {"tie_word_embeddings": True, "rope_scaling": YARN},
        QWEN3,
        GEMMA3,
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        GEMMA3 | {"sliding_window_pattern": 2, "tie_word_embeddings": False},
        GEMMA3 | {"num_hidden_layers": 62, "query_pre_attn_scalar": 16},
        GEMMA3 | {"layer_types": ["full_attention"] * 7},
        GPT2,
        GPT2 | {"n_inner": 100, "tie_word_embeddings": False},
    ],
)
def test_gguf_keys_are_read_back_as_the_same_model(config: dict[str, Any]) -> None:
    before, after = round_trip(config)
    assert after == before


@pytest.mark.parametrize(
    "scaling", [LLAMA3, YARN | {"beta_fast": 16.0, "truncate": False, "attention_factor": 1.2}]
)
def test_ropes_that_gguf_keeps_as_factors_keep_their_frequencies(scaling: dict[str, Any]) -> None:
    before, after = round_trip(LLAMA | {"rope_scaling": scaling})
    assert Feature.ROPE_FACTORS in after.features()
    old, new = before.layers[0].rope, after.layers[0].rope
    assert old is not None
    assert new is not None
    np.testing.assert_allclose(inverse_frequencies(new)[0], inverse_frequencies(old)[0], rtol=1e-12)
    assert inverse_frequencies(new)[1] == pytest.approx(inverse_frequencies(old)[1], rel=1e-7)
    assert replace(after, layers=before.layers) == before


def test_only_the_llama_graph_has_factors() -> None:
    decoder = describe(QWEN2 | {"rope_scaling": YARN | {"truncate": False}})
    assert rope_factors(decoder, family_of(QWEN2).gguf_layout) is None


def test_gguf_says_nothing_of_windows_where_the_graph_has_none() -> None:
    keys = gguf_keys(describe(MISTRAL), family_of(MISTRAL).gguf_layout)
    assert not [key for key in keys if "window" in key]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.expert_count": 8}, "expert_used_count is missing"),
        ({"llama.logit_scale": 0.5}, "llama.*logit_scale"),
        ({"llama.attention.sliding_window": 64}, "sliding_window"),
        ({"llama.rope.scaling.type": "longrope"}, "longrope"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.value_length": 8}, "value_length"),
        ({"llama.feed_forward_length": [96, 96, 96]}, "feed_forward_length"),
        ({"general.architecture": "mamba"}, "mamba"),
    ],
)
def test_gguf_that_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    keys = {
        "general.architecture": "llama",
        **gguf_keys(describe(LLAMA), family_of(LLAMA).gguf_layout),
    }
    with pytest.raises(UnsupportedModel, match=message):
        config_from_gguf(keys | change, ["output.weight"])


def test_gguf_with_half_of_the_biases_is_refused() -> None:
    keys = {
        "general.architecture": "llama",
        **gguf_keys(describe(LLAMA), family_of(LLAMA).gguf_layout),
    }
    names = [f"blk.0.attn_{part}.bias" for part in "qkv"]
    with pytest.raises(UnsupportedModel, match="biases"):
        config_from_gguf(keys, names)


def test_gguf_vocabulary_falls_back_on_the_tokenizer() -> None:
    keys = {
        "general.architecture": "llama",
        **gguf_keys(describe(LLAMA), family_of(LLAMA).gguf_layout),
    }
    del keys["llama.vocab_size"]
    tokens = {"tokenizer.ggml.tokens": ["a"] * 100}
    assert config_from_gguf(keys | tokens, [])["vocab_size"] == 100
    with pytest.raises(UnsupportedModel, match="vocab_size"):
        config_from_gguf(keys, [])


# --- configs as published


PHI3 = {
    "model_type": "phi3",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "sliding_window": None,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 15 + [2.0],
        "long_factor": [4.0] * 16,
    },
}


def test_code_of_the_models_own_is_never_run_and_that_is_said() -> None:
    config = Config(PHI3)
    family_of(PHI3).describe(config)
    # Who reads the folder says it, with the files.
    assert not any("auto_map" in note or "Python" in note for note in config.notes)
    with pytest.raises(UnsupportedModel, match="auto_map names, is never run but with --trust"):
        family_of({"model_type": "brandnew", "auto_map": {"AutoModel": "modeling.Model"}})


@pytest.mark.parametrize(
    ("asked", "factor", "reach"), [(None, 2.0, 4096), (4096, 2.0, 4096), (8192, 4.0, 8192)]
)
def test_longrope_is_fixed_for_the_context(asked: int | None, factor: float, reach: int) -> None:
    """transformers: sqrt(1 + ln(131072 / 4096) / ln(4096)) for both lists."""
    config = Config(PHI3, context=asked)
    decoder = family_of(PHI3).describe(config)
    rope = decoder.layers[0].rope
    assert rope is not None
    assert rope.scaling is not None
    assert rope.scaling.factors[-1] == factor
    assert rope.scaling.attention_factor == pytest.approx((1 + np.log(32) / np.log(4096)) ** 0.5)
    assert decoder.context_length == reach
    assert any("longrope was fixed" in note for note in config.notes)


def test_longrope_without_its_lists_is_refused() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0] * 16}
    with pytest.raises(UnsupportedModel, match="short_factor or long_factor"):
        describe(PHI3 | {"rope_scaling": scaling})
