"""Which type each tensor of a GGUF file takes: the rules, read off by hand for small models."""

from __future__ import annotations

import pytest

from edgellm.architectures.decoder import Decoder, Layer, Norm
from edgellm.errors import UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.gguf_chooser import Choice, chooser, fallback, is_70b, quantizable
from edgellm.export.gguf_mixture import MIXTURES
from edgellm.quant.grid import GRIDS
from edgellm.recipe import Recipe


def decoder(*, layers: int = 16, heads: int = 8, kv_heads: int = 2, tied: bool = False) -> Decoder:
    return Decoder(
        family="llama",
        vocab_size=64,
        hidden_size=256,
        ffn_size=512,
        context_length=128,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=32,
        layers=(Layer(),) * layers,
        norm=Norm("rms", 1e-5),
        activation="silu",
        tied_head=tied,
    )


def choose(
    quant: str,
    role: str,
    columns: int = 256,
    *,
    model: Decoder | None = None,
    arch: str = "llama",
    embed: str | None = None,
    head: str | None = None,
) -> Choice:
    recipe = Recipe(source="", quant=quant, embed=embed, head=head)
    return chooser(recipe, model or decoder(), arch).choose(role, (8, columns))


def layers_with(grid: str, quant: str, stem: str, **kw: Decoder) -> list[int]:
    return [
        layer for layer in range(16) if choose(quant, f"blk.{layer}.{stem}", **kw).grid.name == grid
    ]


def test_more_bits_for_the_ends_and_every_third_layer_between() -> None:
    assert layers_with("q6_k", "q4_k_m", "ffn_down.weight") == [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers_with("q6_k", "q5_k_m", "attn_v.weight") == [0, 1, 4, 7, 10, 13, 14, 15]


def test_more_bits_for_the_first_layers() -> None:
    assert layers_with("q5_k", "q4_k_s", "attn_v.weight") == [0, 1, 2, 3]
    assert layers_with("q5_k", "q4_k_s", "ffn_down.weight") == [0, 1]
    assert layers_with("q5_k", "q3_k_m", "ffn_down.weight") == [0]
    assert layers_with("q4_k", "q3_k_m", "ffn_down.weight") == list(range(1, 16))


def test_values_that_four_heads_share_get_more_bits() -> None:
    alone = decoder(kv_heads=4)
    assert choose("q2_k", "blk.3.attn_v.weight").grid.name == "q4_k"
    assert choose("q2_k", "blk.3.attn_v.weight", model=alone).grid.name == "q3_k"
    assert choose("iq4_xs", "blk.3.attn_v.weight").grid.name == "q5_k"
    assert choose("iq4_xs", "blk.3.attn_v.weight", model=alone).grid.name == "iq4_xs"


def test_a_model_of_80_layers_counts_as_70b() -> None:
    large = decoder(layers=80)
    assert choose("q4_k_m", "blk.13.attn_v.weight", model=large).grid.name == "q5_k"
    assert choose("q4_k_m", "blk.13.attn_v.weight", model=large, arch="qwen3").grid.name == "q4_k"
    assert not is_70b("llama", decoder(layers=80, kv_heads=8))
    assert is_70b("qwen2", decoder(layers=80, kv_heads=8))


def test_head_and_tied_embedding_take_the_same_type() -> None:
    tied = decoder(tied=True)
    assert choose("q4_0", "output.weight").grid.name == "q6_k"
    assert choose("q4_0", "token_embd.weight").grid.name == "q4_0"
    assert choose("q4_0", "token_embd.weight", model=tied).grid.name == "q6_k"
    assert choose("q8_0", "token_embd.weight", model=tied).grid.name == "q8_0"


def test_rows_that_blocks_do_not_divide_fall_back_and_say_so() -> None:
    choice = choose("q4_k_m", "blk.5.ffn_up.weight", 576)
    assert choice.grid.name == "q5_0"
    assert choice.note == "q4_k's blocks of 256 do not divide 576"
    assert choose("q4_k_m", "blk.5.ffn_up.weight", 40).grid.name == "f16"
    assert choose("q8_0", "blk.5.ffn_up.weight", 40).grid.name == "f16"
    assert choose("q4_0", "output.weight", 576).note == "q6_k's blocks of 256 do not divide 576"
    assert choose("q4_k_m", "blk.5.ffn_up.weight").note == ""


def test_every_type_of_every_mixture_has_a_fallback() -> None:
    for name, mixture in MIXTURES.items():
        columns = (mixture.value, mixture.key, mixture.query, mixture.attention_output)
        columns += (mixture.gate_and_up, mixture.down, mixture.embedding, mixture.head)
        for grid in {mixture.grid, *(grid for rules in columns for grid, _ in rules)}:
            assert fallback(GRIDS[grid], 32).block <= 32, (name, grid)


@pytest.mark.parametrize(
    ("role", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (8, 8), True),
        ("token_embd.weight", (8, 8), True),
        ("position_embd.weight", (8, 8), False),
        ("blk.0.attn_norm.weight", (8,), False),
        ("blk.0.attn_norm.weight", (8, 8), False),
        ("blk.0.attn_q.bias", (8,), False),
        ("rope_freqs.weight", (8,), False),
    ],
)
def test_norms_vectors_and_positions_stay_floats(
    role: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert quantizable(role, shape) == expected
    if not expected:
        picked = chooser(Recipe(source="", quant="q4_0"), decoder(), "llama").choose(role, shape)
        assert picked.grid.name == "f32"


def test_embedding_and_head_may_be_chosen_apart() -> None:
    assert choose("q4_k_m", "token_embd.weight", embed="q8_0").grid.name == "q8_0"
    assert choose("q4_k_m", "output.weight", embed="q8_0").grid.name == "q6_k"
    assert choose("q4_k_m", "output.weight", head="F16").grid.name == "f16"
    tied = decoder(tied=True)
    assert choose("f16", "token_embd.weight", model=tied, head="q8_0").grid.name == "q8_0"
    assert choose("q4_0", "token_embd.weight", model=tied, embed="q5_0").grid.name == "q5_0"


def test_one_tensor_cannot_have_two_types() -> None:
    with pytest.raises(UsageError, match="both q8_0 and q6_k"):
        choose("q4_0", "output.weight", model=decoder(tied=True), embed="q8_0", head="q6_k")


def test_a_chosen_type_whose_blocks_do_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(UnsupportedTarget, match=r"q6_k has blocks of 256.*rows of 576.*q8_0"):
        choose("q4_0", "output.weight", 576, head="q6_k")


def test_types_that_need_importance_are_refused_unless_they_fall_back() -> None:
    with pytest.raises(UnsupportedTarget, match="importance"):
        choose("iq3_xs", "blk.0.attn_q.weight")
    assert choose("iq3_xs", "blk.0.attn_q.weight", 576).grid.name == "iq4_nl"
    assert choose("iq3_xs", "blk.0.ffn_down.weight").grid.name == "iq3_s"
    for name in ("iq2_xxs", "iq1_s", "q2_k_s"):
        with pytest.raises(UnsupportedTarget, match=f"importance.*imatrix:{name} or gptq:{name}"):
            choose(name, "blk.0.attn_q.weight")
        assert choose(f"imatrix:{name}", "blk.0.attn_q.weight").note == ""
    assert choose("imatrix:q2_k_s", "blk.0.attn_q.weight").grid.name == "q2_k"


def test_types_change_where_the_solver_weighs_by_importance() -> None:
    assert layers_with("q4_1", "q4_0", "ffn_down.weight") == []
    for solver in ("imatrix", "gptq"):
        assert layers_with("q4_1", f"{solver}:q4_0", "ffn_down.weight") == [0, 1]
        assert layers_with("q5_k", f"{solver}:iq4_xs", "ffn_down.weight") == []
    assert layers_with("q4_1", "rtn:q4_0", "ffn_down.weight") == []


def test_gptq_says_which_types_it_leaves_to_imatrix() -> None:
    note = choose("gptq:iq2_xs", "blk.3.attn_q.weight").note
    assert note == "a code of iq2_xs stands for several values: rounded by imatrix, not gptq"
    assert choose("gptq:q4_0", "blk.3.attn_q.weight").note == ""
    assert choose("awq+gptq:iq3_s", "blk.3.attn_q.weight").note.startswith("a code of iq3_s")


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_xs"])
def test_an_embedding_has_no_importance(name: str) -> None:
    with pytest.raises(UnsupportedTarget, match=f"token_embd.weight cannot be {name}.*none"):
        choose("imatrix:q4_0", "token_embd.weight", embed=name)
    with pytest.raises(UnsupportedTarget, match=f"output.weight cannot be {name}.*none"):
        choose("q4_0", "output.weight", head=name)
    assert choose("imatrix:q4_0", "output.weight", head=name).grid.name == name


@pytest.mark.parametrize(
    ("quant", "instead"),
    [
        ("int4-g32", "q4_1 or q4_k_m"),
        ("int4-g64-sym", "q4_0"),
        ("int8", "q8_0"),
        ("int8-dynamic", "q8_0"),
        ("nf4", "iq4_nl"),
    ],
)
def test_grids_of_other_containers_are_refused_with_what_to_choose(
    quant: str, instead: str
) -> None:
    with pytest.raises(UnsupportedTarget, match=f"choose {instead}, or --format onnx"):
        choose(quant, "output.weight")
    with pytest.raises(UnsupportedTarget, match=f"--embed {quant}.*{instead}"):
        choose("q4_0", "output.weight", embed=quant)


def test_unknown_names_bring_the_nearest() -> None:
    with pytest.raises(UnknownGrid, match="q4_k_m"):
        choose("q4km", "output.weight")
    with pytest.raises(UnknownGrid, match="q8_0"):
        choose("q4_0", "output.weight", head="q8")
    assert choose("Q4_K_M", "output.weight").grid.name == "q6_k"


def test_names_meant_for_another_container_bring_its_nearest() -> None:
    with pytest.raises(UnknownGrid, match="int4-g32"):
        choose("int4", "output.weight")


def test_the_type_of_a_single_tensor_names_the_mixtures_of_it() -> None:
    with pytest.raises(UnknownGrid, match=r"single tensors.*choose q4_k_m or q4_k_s"):
        choose("q4_k", "output.weight")
