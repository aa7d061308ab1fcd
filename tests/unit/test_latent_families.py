"""Configs of published models with latent attention: what is read, what GGUF is told, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest

from edgellm.architectures import config_from_gguf, family_of, gguf_keys
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature
from edgellm.architectures.latent import Latent
from edgellm.errors import UnsupportedModel, UnsupportedTarget
from edgellm.export.gguf_graphs import check_expressible, notes_of

LITE: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
"""DeepSeek-V2-Lite."""

THIRD: dict[str, Any] = LITE | {
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "rope_scaling": LITE["rope_scaling"] | {"mscale": 1.0, "mscale_all_dim": 1.0},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}

MINICPM3: dict[str, Any] = {
    "model_type": "minicpm3",
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 6400,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 62,
    "num_key_value_heads": 40,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 768,
    "kv_lora_rank": 256,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "type": "longrope",
        "long_factor": [1.0 + 0.1 * n for n in range(16)],
        "short_factor": [1.0 + 0.1 * n for n in range(16)],
        "original_max_position_embeddings": 32768,
    },
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    "vocab_size": 73448,
}


def described(config: dict[str, Any]) -> Decoder:
    return family_of(config).describe(Config(config))


def keys_of(config: dict[str, Any]) -> dict[str, Any]:
    return gguf_keys(described(config), family_of(config).gguf_layout)


def test_a_lite_model_is_read_whole() -> None:
    decoder = described(LITE)
    assert decoder.latent == Latent(512, 128, 64, 128, None, 1e-6)
    assert (decoder.head_dim, decoder.attended_size) == (192, 2048)
    assert (decoder.cache_heads, decoder.cache_dim) == (1, 576)
    growth = 0.1 * 0.707 * math.log(40) + 1
    assert decoder.softmax_scale == pytest.approx(192**-0.5 * growth**2)
    rope = decoder.layers[0].rope
    assert rope is not None
    assert rope.scaling is not None
    assert (rope.dimensions, rope.scaling.attention_factor) == (64, 1.0)
    experts = decoder.layers[1].experts
    assert decoder.layers[0].experts is None
    assert experts is not None
    assert (experts.count, experts.used, experts.shared_width) == (64, 6, 2816)


def test_gguf_is_told_of_absorbed_keys_and_of_both_factors_of_yarn() -> None:
    keys = keys_of(LITE)
    wanted = {
        "attention.head_count_kv": 1,
        "attention.key_length": 576,
        "attention.value_length": 512,
        "attention.key_length_mla": 192,
        "attention.value_length_mla": 128,
        "attention.kv_lora_rank": 512,
        "leading_dense_block_count": 1,
        "expert_shared_count": 2,
        "expert_gating_func": 1,
    }
    assert wanted.items() <= {key.removeprefix("deepseek2."): keys[key] for key in keys}.items()
    # As llama.cpp's converter has it, 0.1 times mscale_all_dim.
    assert keys["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.0707)
    assert "deepseek2.expert_group_count" not in keys


@pytest.mark.parametrize("config", [LITE, THIRD], ids=["V2-Lite", "V3"])
def test_a_file_means_the_same_model(config: dict[str, Any]) -> None:
    names = {"output.weight", "blk.60.exp_probs_b.bias"} if config is THIRD else {"output.weight"}
    metadata = {"general.architecture": "deepseek2", **keys_of(config)}
    read = config_from_gguf(metadata, names)
    assert read["model_type"] == config["model_type"]
    assert read["rope_parameters"]["mscale_all_dim"] == pytest.approx(
        config["rope_scaling"]["mscale_all_dim"], rel=1e-6
    )
    wanted, found = described(config), described(read)
    assert (found.latent, found.features()) == (wanted.latent, wanted.features())
    assert [layer.experts for layer in found.layers] == [layer.experts for layer in wanted.layers]


def test_the_third_groups_its_experts() -> None:
    experts = described(THIRD).layers[3].experts
    assert experts is not None
    router = experts.router
    assert (router.groups, router.groups_used, router.group_score) == (8, 4, "two best")
    assert (router.scores, router.bias, router.normalized, router.factor) == (
        "sigmoid", True, True, 2.5,
    )  # fmt: skip
    alone = described(THIRD | {"n_group": 1, "topk_group": 1}).layers[3].experts
    assert alone is not None
    assert alone.router.groups == 1


def test_minicpm_is_read_whole_and_llama_cpp_is_told_of_the_epsilon() -> None:
    decoder = described(MINICPM3)
    assert decoder.latent == Latent(256, 64, 32, 64, 768, 1e-6)
    assert decoder.tied_head
    assert decoder.residual_scale == pytest.approx(1.4 / math.sqrt(62))
    assert decoder.logit_scale == pytest.approx(0.1)
    layout = family_of(MINICPM3).gguf_layout
    check_expressible(decoder, layout)
    (note,) = notes_of(decoder, layout)
    assert "epsilon of 1e-05, where the model has 1e-06" in note


def test_multipliers_that_are_null_do_nothing() -> None:
    decoder = described(MINICPM3 | {"scale_depth": None, "dim_model_base": None})
    assert (decoder.residual_scale, decoder.logit_scale) == (1.0, 1.0)
    missing = {key: value for key, value in MINICPM3.items() if not key.startswith("scale")}
    decoder = described(missing)
    assert (decoder.embedding_scale, Feature.RESIDUAL_SCALE in decoder.features()) == (12.0, True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim"),
        ({"norm_topk_prob": True}, "norm_topk_prob"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"topk_method": "best"}, "topk_method"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"topk_method": "group_limited_greedy", "n_group": 5}, "n_group"),
        (
            {"topk_method": "group_limited_greedy", "n_group": 64, "topk_group": 2},
            "topk_group.*6 experts of a token",
        ),
    ],
)
def test_what_is_not_understood_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        described(LITE | change)


def test_a_rank_of_queries_must_be_stated() -> None:
    with pytest.raises(UnsupportedModel, match="q_lora_rank is missing"):
        described({key: value for key, value in LITE.items() if key != "q_lora_rank"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lora_rank": 1536}, "27 layers, which it takes for a Lite model"),
        ({"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}, "two best"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear rope scaling"),
    ],
)
def test_what_llamacpp_would_compute_otherwise_is_refused(
    change: dict[str, Any], message: str
) -> None:
    config = LITE | change
    with pytest.raises(UnsupportedTarget, match=message):
        check_expressible(described(config), family_of(config).gguf_layout)
