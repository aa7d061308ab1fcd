"""Grids that a recipe names for single tensors: which tensors its names and patterns reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.export.linear_graph import Grids
from edgellm.export.tensor_grids import grids_by_role
from edgellm.quant.grid import GRIDS
from edgellm.recipe import Recipe, load_recipe, make_recipe, save_recipe

ROLES = [f"blk.{layer}.{stem}.weight" for layer in (0, 1, 10) for stem in ("attn_v", "ffn_down")]


def test_a_pattern_reaches_what_the_shell_would_match() -> None:
    assert grids_by_role({"blk.?.attn_v.weight": "q6_k"}, ROLES) == {
        "blk.0.attn_v.weight": "q6_k",
        "blk.1.attn_v.weight": "q6_k",
    }


@pytest.mark.parametrize("turned", [False, True])
def test_a_name_goes_before_a_pattern_wherever_it_stands(turned: bool) -> None:
    entries = [("blk.*.attn_v.weight", "q6_k"), ("blk.10.attn_v.weight", "q4_k")]
    found = grids_by_role(dict(entries[::-1] if turned else entries), ROLES)
    assert found["blk.10.attn_v.weight"] == "q4_k"
    assert found["blk.0.attn_v.weight"] == "q6_k"


def test_patterns_that_disagree_are_refused_unless_the_tensor_is_named() -> None:
    both = {"blk.0.*": "q6_k", "blk.*.attn_v.weight": "q4_k"}
    with pytest.raises(UsageError, match=r"makes blk\.0\.attn_v\.weight q6_k"):
        grids_by_role(both, ROLES)
    found = grids_by_role({**both, "blk.0.attn_v.weight": "q5_k"}, ROLES)
    assert found["blk.0.attn_v.weight"] == "q5_k"
    assert found["blk.0.ffn_down.weight"] == "q6_k"


@pytest.mark.parametrize("name", ["blk.0.attn_w.weight", "blk.2.*", "attn_v"])
def test_what_matches_nothing_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="matches no weight"):
        grids_by_role({name: "q6_k"}, ROLES)


def test_a_stacked_product_has_one_grid() -> None:
    grids = Grids(GRIDS["int4-g32"], GRIDS["int8"], GRIDS["int8"], {"a": GRIDS["int8"]})
    assert grids.of(["b", "c"]) is GRIDS["int4-g32"]
    assert grids.of(["a"]) is GRIDS["int8"]
    with pytest.raises(UnsupportedTarget, match="a int8, b int4-g32"):
        grids.of(["a", "b"])


def test_a_recipe_keeps_its_table_on_disk_and_in_its_digest(tmp_path: Path) -> None:
    plain = make_recipe({"source": "x", "quant": "q4_0"})
    recipe = make_recipe({"source": "x", "quant": "q4_0", "tensor_grids": {"a.b ": " Q6_K"}})
    save_recipe(recipe, tmp_path / "r.toml")
    assert load_recipe(tmp_path / "r.toml", {}) == recipe
    assert recipe.tensor_grids == {"a.b": "q6_k"}
    assert recipe.sha256() != plain.sha256()
    assert plain.sha256() == Recipe(source="y", quant="q4_0").sha256()
    save_recipe(plain, tmp_path / "plain.toml")
    assert "tensor_grids" not in (tmp_path / "plain.toml").read_text()
