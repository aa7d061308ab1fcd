from pathlib import Path

import pytest

from edgellm.errors import OutputError, UnknownGrid, UsageError
from edgellm.recipe import Recipe, load_recipe, make_recipe, save_recipe, split_quant


def test_a_saved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe(
        source="org/name",
        format="gguf",
        quant="rtn:q4_k_m",
        embed="q8_0",
        kv_cache="int8",
        ignore_config_keys=("x",),
    )
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml", {}) == recipe


def test_a_recipe_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"absent/recipe\.toml.*--save-recipe"):
        save_recipe(Recipe(source="m"), tmp_path / "absent" / "recipe.toml")


def test_options_win_over_the_file_and_absent_options_do_not(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text('source = "org/name"\nquant = "q8_0"\nhead = "q6_k"\n')
    recipe = load_recipe(tmp_path / "recipe.toml", {"quant": "q4_0", "head": None})
    assert (recipe.quant, recipe.head) == ("q4_0", "q6_k")


def test_a_source_beside_the_file_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "recipe.toml").write_text('source = "model"\n')
    assert load_recipe(tmp_path / "recipe.toml", {}).source == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("source = 1\n", "source"),
        ('source = "m"\nbits = 4\n', "bits"),
        ('source = "m\n', "not TOML"),
        ('source = "m"\ncontext = 0\n', "context"),
        ('quant = "q4_0"\n', "source"),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_its_fault(
    tmp_path: Path, content: str, named: str
) -> None:
    (tmp_path / "recipe.toml").write_text(content)
    with pytest.raises(UsageError, match=named):
        load_recipe(tmp_path / "recipe.toml", {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.toml"):
        load_recipe(tmp_path / "absent.toml", {})


def test_the_solver_is_split_from_the_grid() -> None:
    assert split_quant("RTN:Q4_K_M") == ("rtn", "q4_k_m")
    assert split_quant("int4-g32") == ("rtn", "int4-g32")
    with pytest.raises(UnknownGrid, match="no solver named 'magic'"):
        make_recipe({"source": "m", "quant": "magic:q4_0"})


def test_names_are_the_same_in_any_case() -> None:
    loud = make_recipe({"source": "A", "format": "ONNX", "quant": "INT8", "head": "F16"})
    assert loud == make_recipe({"source": "A", "format": "onnx", "quant": "int8", "head": "f16"})


def test_the_digest_follows_the_choices_and_not_the_place() -> None:
    here, there = Recipe(source="/a/m", quant="q4_0"), Recipe(source="/b/m", quant="q4_0")
    assert here.sha256() == there.sha256()
    assert here.sha256() != Recipe(source="/a/m", quant="q4_1").sha256()
