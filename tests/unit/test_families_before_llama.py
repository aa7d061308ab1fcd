"""Families that are not built like Llama: published configs are understood, others refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from edgellm.architectures import alibi, config_from_gguf, family_of, gguf_keys
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder, Feature, Rope
from edgellm.architectures.gguf_rows import name_in_file
from edgellm.architectures.rope_scaling import AskedScaling, rescaled_config
from edgellm.architectures.row_order import (
    FusedHeads,
    PairedRope,
    as_checkpoint_has,
    as_network_takes,
)
from edgellm.errors import UnsupportedModel, UnsupportedTarget
from edgellm.export.gguf_graphs import check_expressible, notes_of
from edgellm.tensors import constant

PYTHIA: dict[str, Any] = {
    "model_type": "gpt_neox",
    "hidden_act": "gelu",
    "hidden_size": 512,
    "intermediate_size": 2048,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "use_parallel_residual": True,
    "vocab_size": 50304,
}
FALCON_7B: dict[str, Any] = {
    "model_type": "falcon",
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    "bias": False,
    "hidden_size": 4544,
    "layer_norm_epsilon": 1e-5,
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 71,
    "num_hidden_layers": 32,
    "parallel_attn": True,
    "vocab_size": 65024,
}
FALCON_40B = FALCON_7B | {
    "hidden_size": 8192,
    "new_decoder_architecture": True,
    "num_attention_heads": 128,
    "num_kv_heads": 8,
    "num_hidden_layers": 60,
}
FALCON_11B = FALCON_40B | {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_ln_in_parallel_attn": 1,
    "ff_factor": 4,
    "ffn_hidden_size": 16384,
    "rope_theta": 500042.0,
}
FALCON_RW = FALCON_7B | {
    "alibi": True,
    "bias": True,
    "hidden_size": 2048,
    "multi_query": False,
    "num_attention_heads": 32,
    "parallel_attn": False,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "prefix": "</s>",
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
BLOOM: dict[str, Any] = {
    "model_type": "bloom",
    "apply_residual_connection_post_layernorm": False,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "layer_norm_epsilon": 1e-5,
    "masked_softmax_fusion": True,
    "n_embed": 1024,
    "n_inner": None,
    "n_layer": 24,
    "num_attention_heads": 16,
    "offset_alibi": 100,
    "pretraining_tp": 2,
    "seq_length": 2048,
    "skip_bias_add": True,
    "skip_bias_add_qkv": False,
    "vocab_size": 250880,
}
MPT: dict[str, Any] = {
    "model_type": "mpt",
    "attn_config": {
        "alibi": True,
        "alibi_bias_max": 8,
        "attn_impl": "torch",
        "attn_pdrop": 0,
        "attn_type": "multihead_attention",
        "attn_uses_sequence_id": False,
        "clip_qkv": None,
        "prefix_lm": False,
        "qk_ln": False,
        "softmax_scale": None,
    },
    "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "d_model": 4096,
    "emb_pdrop": 0,
    "embedding_fraction": 1.0,
    "expansion_ratio": 4,
    "init_config": {"name": "kaiming_normal_", "init_nonlinearity": "relu"},
    "init_device": "cpu",
    "learned_pos_emb": True,
    "logit_scale": None,
    "max_seq_len": 2048,
    "n_heads": 32,
    "n_layers": 32,
    "no_bias": True,
    "norm_type": "low_precision_layernorm",
    "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "verbose": 0,
    "vocab_size": 50432,
}
GPTJ: dict[str, Any] = {
    "model_type": "gptj",
    "activation_function": "gelu_new",
    "gradient_checkpointing": False,
    "layer_norm_epsilon": 1e-5,
    "n_embd": 4096,
    "n_head": 16,
    "n_inner": None,
    "n_layer": 28,
    "n_positions": 2048,
    "rotary": True,
    "rotary_dim": 64,
    "scale_attn_weights": True,
    "tie_word_embeddings": False,
    "vocab_size": 50400,
}


def describe(config: dict[str, Any]) -> Decoder:
    return family_of(config).describe(Config(config))


def test_pythia() -> None:
    decoder = describe(PYTHIA)
    assert decoder.layers[0].rope == Rope(10000.0, 16)
    assert decoder.parallel
    assert not decoder.shared_norm
    modern = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.25}
    later = {key: value for key, value in PYTHIA.items() if not key.startswith("rotary")}
    assert describe(later | {"rope_parameters": modern}) == decoder


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn"])
def test_a_rope_that_is_asked_for_turns_what_the_models_own_does(kind: str) -> None:
    modern = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}
    for config in (PYTHIA | {"rotary_pct": 0.5}, PYTHIA | {"rope_parameters": modern}):
        asked, trained = rescaled_config(config, describe(config), AskedScaling(kind, 2.0), "it")
        decoder = describe(asked)
        assert decoder.layers[0].rope is not None
        assert decoder.layers[0].rope.dimensions == 32
        assert decoder.context_length == 2 * trained == 4096
    with pytest.raises(UnsupportedTarget, match="no rotary positions"):
        rescaled_config(BLOOM, describe(BLOOM), AskedScaling(kind, 2.0), "it")


def test_falcon() -> None:
    small, large, rw = (describe(each) for each in (FALCON_7B, FALCON_40B, FALCON_RW))
    assert (small.kv_heads, large.kv_heads, rw.kv_heads) == (1, 8, 32)
    assert (small.shared_norm, large.shared_norm, rw.shared_norm) == (True, False, False)
    assert (small.parallel, large.parallel, rw.parallel) == (True, True, False)
    assert describe(FALCON_11B).shared_norm
    assert small.ffn_size == 4 * 4544
    assert rw.layers[0].rope is None
    old = {key: value for key, value in FALCON_7B.items() if not key.startswith("num_")}
    named = {"n_layer": 32, "n_head": 71, "n_embed": 4544}
    del old["hidden_size"]
    assert describe(old | named) == small


def test_opt_bloom_mpt_and_gptj() -> None:
    opt, bloom, mpt, gptj = (describe(each) for each in (OPT, BLOOM, MPT, GPTJ))
    assert (opt.learned_positions, opt.skipped_positions, opt.activation) == (2048, 2, "relu")
    assert bloom.features() >= {Feature.ALIBI, Feature.EMBEDDING_NORM, Feature.TIED_HEAD}
    assert mpt.alibi == alibi.slopes(32)
    assert Feature.UNBIASED_LAYER_NORM in mpt.features()
    assert gptj.layers[0].rope == Rope(10000.0, 64)
    assert gptj.features() >= {Feature.HEAD_BIAS, Feature.SHARED_NORM, Feature.ROPE_PARTIAL}


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (PYTHIA, {"num_attention_heads": 7}),
        (FALCON_7B, {"num_ln_in_parallel_attn": 2}),
        (FALCON_7B, {"apply_residual_connection_post_layernorm": True}),
        (FALCON_40B, {"parallel_attn": False}),
        (FALCON_40B, {"num_kv_heads": 5}),
        (FALCON_11B, {"ff_factor": 3}),
        (OPT, {"do_layer_norm_before": False}),
        (OPT, {"word_embed_proj_dim": 512}),
        (OPT, {"_remove_final_layer_norm": True}),
        (BLOOM, {"apply_residual_connection_post_layernorm": True}),
        (BLOOM, {"n_inner": 512}),
        (MPT, {"expansion_ratio": 3}),
        (MPT, {"no_bias": False}),
        (MPT, {"logit_scale": 0.5}),
        (MPT, {"attn_config": {"alibi": False}}),
        (MPT, {"attn_config": {"alibi_bias_max": 16}}),
        (MPT, {"attn_config": {"attn_type": "multiquery_attention"}}),
        (MPT, {"attn_config": {"qk_ln": True}}),
        (MPT, {"attn_config": {"new": 1}}),
        (GPTJ, {"rotary_dim": 15}),
        (GPTJ, {"rotary_dim": None}),
        (GPTJ, {"rotary": False}),
    ],
)
def test_what_is_not_followed_is_refused_by_key(
    config: dict[str, Any], change: dict[str, Any]
) -> None:
    ((key, value),) = change.items()
    with pytest.raises(UnsupportedModel, match=next(iter(value)) if key == "attn_config" else key):
        describe(config | change)


def test_slopes_are_those_of_the_paper_and_of_two_series_between_powers_of_two() -> None:
    np.testing.assert_allclose(alibi.slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi.slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    assert len(alibi.slopes(112)) == 112


# --- GGUF


@pytest.mark.parametrize("config", [PYTHIA, FALCON_7B, FALCON_40B, FALCON_11B, BLOOM, MPT])
def test_gguf_keys_are_read_back_as_the_same_model(config: dict[str, Any]) -> None:
    """Save the activation, of which llama.cpp has one form."""
    family, decoder = family_of(config), describe(config)
    check_expressible(decoder, family.gguf_layout)
    told = list(notes_of(decoder, family.gguf_layout))
    assert len(told) == (decoder.activation == "gelu")
    names = [name_in_file(row.role, decoder, family.gguf_layout) for row in family.tensors(decoder)]
    keys = gguf_keys(decoder, family.gguf_layout)
    again = config_from_gguf({"general.architecture": family.gguf_layout.arch, **keys}, names)
    assert replace(describe(again), activation=decoder.activation) == decoder


@pytest.mark.parametrize("config", [OPT, GPTJ])
def test_families_without_a_graph_in_llamacpp_say_so(config: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedTarget, match=f"no graph for {config['model_type']} models"):
        _ = family_of(config).gguf_layout


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (PYTHIA, {"attention_bias": False}, "without biases on q, k and v"),
        (PYTHIA, {"tie_word_embeddings": True}, "tied to the embedding"),
        (PYTHIA, {"hidden_act": "relu"}, "the activation relu"),
        (FALCON_7B, {"bias": True}, "biases in the feed-forward"),
        (FALCON_7B, {"parallel_attn": False}, "without attention and feed-forward side by side"),
        (FALCON_RW, {}, "ALiBi"),
        (MPT, {"attn_config": {"softmax_scale": 0.1}}, "an attention scale other than"),
    ],
)
def test_what_llamacpps_graph_lacks_is_named(
    config: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UnsupportedTarget, match=said):
        check_expressible(describe(config | change), family_of(config).gguf_layout)


@pytest.mark.parametrize("model", [BLOOM, MPT])
def test_other_slopes_are_refused(model: dict[str, Any]) -> None:
    steep = replace(describe(model), alibi=(0.5,) * describe(model).heads)
    with pytest.raises(UnsupportedTarget, match="slopes of its own"):
        check_expressible(steep, family_of(model).gguf_layout)


# --- orders of rows


@pytest.mark.parametrize(
    ("order", "stored"),
    [
        (FusedHeads(2, 1, 1), ["q0", "k0", "v0", "q1", "k1", "v1"]),
        (FusedHeads(2, 2, 1), ["q0", "q1", "k0", "v0", "q2", "q3", "k1", "v1"]),
        (FusedHeads(1, 3, 1), ["q0", "q1", "q2", "k0", "v0"]),
        (PairedRope(2, 5, 4), ["x0", "y0", "x1", "y1", "z", "X0", "Y0", "X1", "Y1", "Z"]),
    ],
)
def test_rows_are_taken_from_where_the_checkpoint_has_them(
    order: FusedHeads | PairedRope, stored: list[str]
) -> None:
    taken = [stored[place] for place in order.places()]
    if isinstance(order, FusedHeads):
        assert taken == sorted(stored, key=lambda name: ("qkv".index(name[0]), name[1:]))
    else:
        assert taken == ["x0", "x1", "y0", "y1", "z", "X0", "X1", "Y0", "Y1", "Z"]


def test_rows_go_back_to_where_they_came_from() -> None:
    row = next(row for row in family_of(PYTHIA).tensors(describe(PYTHIA)) if row.order)
    ref = constant("x", np.arange(3 * 512 * 2).reshape(-1, 2))
    there = as_network_takes(ref, row)
    assert not np.array_equal(there.load(), ref.load())
    np.testing.assert_array_equal(as_checkpoint_has(there, row).load(), ref.load())
