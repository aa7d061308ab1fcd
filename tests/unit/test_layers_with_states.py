"""Families whose layers are not all attention: their configs as they were published."""

from __future__ import annotations

from typing import Any

import pytest

from edgellm.architectures import family_of
from edgellm.architectures.config import Config
from edgellm.architectures.couplings import couplings, left_out
from edgellm.architectures.decoder import Decoder, Feature, ShortConvolution, StateSpace
from edgellm.calibration.cost import ATTENTION_SLOWNESS, FLOPS_PER_SECOND, pass_cost
from edgellm.errors import UnsupportedModel, UnsupportedTarget
from edgellm.export.gguf_chooser import Chooser, mixture_named
from edgellm.export.gguf_graphs import check_expressible

LFM2: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "block_auto_adjust_ff_dim": True,
    "block_dim": 2048,
    "block_ff_dim": 12288,
    "block_ffn_dim_multiplier": 1.0,
    "block_mlp_init_scale": 1.0,
    "block_multiple_of": 256,
    "block_norm_eps": 1e-05,
    "block_out_init_scale": 1.0,
    "block_use_swiglu": True,
    "block_use_xavier_init": True,
    "conv_L_cache": 3,
    "conv_bias": False,
    "conv_dim": 2048,
    "conv_dim_out": 2048,
    "conv_use_xavier_init": True,
    "full_attn_idxs": [2, 5, 8, 10, 12, 14],
    "hidden_size": 2048,
    "max_position_embeddings": 128000,
    "model_type": "lfm2",
    "norm_eps": 1e-05,
    "num_attention_heads": 32,
    "num_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "use_pos_enc": True,
    "vocab_size": 65536,
}
"""LFM2-1.2B's."""

MAMBA: dict[str, Any] = {
    "architectures": ["MambaForCausalLM"],
    "conv_kernel": 4,
    "d_inner": 1536,
    "d_model": 768,
    "expand": 2,
    "fused_add_norm": True,
    "hidden_act": "silu",
    "hidden_size": 768,
    "intermediate_size": 1536,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba",
    "n_layer": 24,
    "num_hidden_layers": 24,
    "pad_vocab_size_multiple": 8,
    "rescale_prenorm_residual": False,
    "residual_in_fp32": True,
    "rms_norm": True,
    "ssm_cfg": {},
    "state_size": 16,
    "time_step_floor": 0.0001,
    "time_step_init_scheme": "random",
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "time_step_rank": 48,
    "time_step_scale": 1.0,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 50280,
}
"""mamba-130m-hf's."""

MAMBA2: dict[str, Any] = {
    "chunk_size": 256,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "layer_norm_epsilon": 1e-05,
    "model_type": "mamba2",
    "n_groups": 8,
    "norm_before_gate": True,
    "num_heads": 128,
    "num_hidden_layers": 64,
    "rms_norm": True,
    "state_size": 128,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, float("inf")],
    "time_step_rank": 256,
    "use_bias": False,
    "use_conv_bias": True,
    "vocab_size": 32768,
}
"""Mamba-Codestral-7B's."""


def described(config: dict[str, Any]) -> Decoder:
    return family_of(config).describe(Config(config))


def test_published_lfm2() -> None:
    decoder = described(LFM2)
    assert decoder.ffn_size == 8192
    assert decoder.head_dim == 64
    assert [at for at, layer in enumerate(decoder.layers) if layer.attends] == [2, 5, 8, 10, 12, 14]
    assert decoder.layers[0].convolution == ShortConvolution(3)
    assert decoder.tied_head


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"block_auto_adjust_ff_dim": False}, 12288),
        ({"block_ffn_dim_multiplier": 1.3}, 10752),
        ({"block_ffn_dim_multiplier": None, "block_ff_dim": 1000}, 666),
        ({"block_ff_dim": None, "intermediate_size": 6912}, 4608),
    ],
)
def test_the_width_of_the_feed_forward(changes: dict[str, Any], width: int) -> None:
    assert described(LFM2 | changes).ffn_size == width


def test_published_mamba() -> None:
    decoder = described(MAMBA)
    assert set(decoder.layers) == {decoder.layers[0]}
    assert decoder.layers[0].scan == StateSpace(1536, 16, 4, step_rank=48)
    assert decoder.layers[0].scan.made == 3072
    assert described(MAMBA | {"time_step_rank": "auto"}) == decoder
    assert decoder.features() == {
        Feature.STATE_SPACE,
        Feature.NO_FEED_FORWARD,
        Feature.RMS_NORM,
        Feature.TIED_HEAD,
    }


def test_published_mamba_2() -> None:
    scan = described(MAMBA2).layers[0].scan
    assert scan == StateSpace(8192, 128, 4, heads=128, groups=8)
    assert (scan.convolved, scan.made) == (10240, 18560)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LFM2 | {"full_attn_idxs": []}, "no layer has attention"),
        (LFM2 | {"layer_types": ["conv"] * 15}, "for each of 16 layers"),
        (LFM2 | {"layer_types": ["mamba"] * 16}, "full_attention or conv"),
        (LFM2 | {"conv_L_cache": 1}, "conv_L_cache is 1"),
        (LFM2 | {"block_use_swiglu": False}, "block_use_swiglu is False"),
        (LFM2 | {"conv_dim": 1024}, "conv_dim is 1024"),
        (MAMBA | {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (MAMBA | {"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg"),
        (MAMBA | {"intermediate_size": 2048}, "intermediate_size is 2048"),
        (MAMBA2 | {"time_step_limit": [0.0, 0.1]}, "time_step_limit"),
        (MAMBA2 | {"num_heads": 100}, "num_heads is 100"),
        (MAMBA2 | {"n_groups": 3}, "n_groups is 3"),
    ],
)
def test_what_is_not_understood_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        described(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LFM2 | {"conv_bias": True}, "biases in short convolutions"),
        (LFM2 | {"head_dim": 128}, "32 heads of 128 in a model of width 2048"),
        (MAMBA | {"use_bias": True}, "biases in the products of state-space layers"),
        (MAMBA | {"use_conv_bias": False}, "convolutions without biases"),
        (MAMBA | {"expand": 3, "intermediate_size": 2304, "d_inner": 2304}, "other than twice"),
        (MAMBA2 | {"use_conv_bias": False}, "convolutions without biases"),
    ],
)
def test_what_llamacpps_graphs_lack_is_refused(config: dict[str, Any], message: str) -> None:
    layout = family_of(config).gguf_layout
    with pytest.raises(UnsupportedTarget, match=message):
        check_expressible(described(config), layout)


def test_couplings_are_those_that_hold() -> None:
    lfm2 = described(LFM2)
    names = [[each.name for each in couplings(lfm2) if each.layer == layer] for layer in (0, 2)]
    assert names == [
        ["attn_norm", "shortconv.in_proj", "ffn_norm", "ffn_up"],
        ["attn_norm", "attn_v", "ffn_norm", "ffn_up"],
    ]
    assert [each.name for each in couplings(described(MAMBA2))][:3] == [
        "attn_norm",
        "ssm_norm",
        "attn_norm",
    ]
    assert {each.name for each in couplings(described(MAMBA))} == {"attn_norm"}
    assert set(left_out(described(MAMBA))) == {"ssm_x", "ssm_out", "output"}


def test_mixtures_count_values_among_their_like() -> None:
    """LFM2's six values: the ends and every third of them get more bits."""
    chooser = Chooser("q4_k_m", mixture_named("q4_k_m"), described(LFM2), "lfm2")
    found = {
        layer: chooser.choose(f"blk.{layer}.attn_v.weight", (512, 2048)).grid.name
        for layer in (2, 5, 8, 10, 12, 14)
    }
    # Six have no first eighth: use_more_bits(i, 6) of llama.cpp.
    assert found == {2: "q4_k", 5: "q4_k", 8: "q6_k", 10: "q4_k", 12: "q4_k", 14: "q6_k"}
    assert chooser.choose("blk.0.shortconv.in_proj.weight", (6144, 2048)).grid.name == "q4_k"
    assert chooser.choose("blk.0.shortconv.conv.weight", (2048, 3)).grid.name == "f32"


def test_layers_without_attention_cost_no_attention() -> None:
    """A longer window makes those slower that attend, and nothing else."""
    decoder = described(LFM2)
    short, long = (
        pass_cost(decoder, 4096, window, 1, importance_only=True).seconds for window in (256, 512)
    )
    each = 4 * 256 * decoder.heads * decoder.head_dim * ATTENTION_SLOWNESS
    assert (long - short) * FLOPS_PER_SECOND == pytest.approx(6 * 4096 * each)
    recurrent = described(MAMBA)
    one, other = (
        pass_cost(recurrent, 4096, window, 1, importance_only=True).seconds for window in (256, 512)
    )
    assert one == other
