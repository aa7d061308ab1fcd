from pathlib import Path

import msgspec
import pytest

from edgellm.errors import OutputError, UnknownGrid, UsageError
from edgellm.recipe import (
    Recipe,
    check_calibration,
    load_recipe,
    make_recipe,
    save_recipe,
    split_quant,
)


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
        ('source = "m"\nbit = 4\n', "bit"),
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
    assert split_quant("RTN:Q4_K_M") == ((), "rtn", "q4_k_m")
    assert split_quant("int4-g32") == ((), None, "int4-g32")
    assert split_quant("gptq") == ((), "gptq", "")
    assert split_quant("awq:q4_0") == (("awq",), None, "q4_0")
    assert split_quant("awq+gptq:q4_0") == (("awq",), "gptq", "q4_0")
    with pytest.raises(UnknownGrid, match="no solver named 'magic'"):
        make_recipe({"source": "m", "quant": "magic:q4_0"})


@pytest.mark.parametrize("text", ["gptq+awq:q4_0", "awq+awq:q4_0", "rtn+gptq:q4_0"])
def test_a_transform_comes_before_the_one_solver(text: str) -> None:
    with pytest.raises(UnknownGrid, match=r"awq\+gptq:q4_0"):
        split_quant(text)


def test_names_are_the_same_in_any_case() -> None:
    loud = make_recipe({"source": "A", "format": "ONNX", "quant": "INT8", "head": "F16"})
    assert loud == make_recipe({"source": "A", "format": "onnx", "quant": "int8", "head": "f16"})


def test_the_digest_follows_the_choices_and_not_the_place() -> None:
    here, there = Recipe(source="/a/m", quant="q4_0"), Recipe(source="/b/m", quant="q4_0")
    assert here.sha256() == there.sha256()
    assert here.sha256() != Recipe(source="/a/m", quant="q4_1").sha256()


@pytest.fixture
def adapters(tmp_path: Path) -> Path:
    """A folder with two of them, one of an awkward name."""
    for name in ("style", "lr=3"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_adapters_beside_the_file_are_found_from_anywhere(adapters: Path) -> None:
    (adapters / "recipe.toml").write_text(
        'source = "org/name"\nadapters = ["style=0.5", "lr=3", "lr=3=-2", "org/lora=2"]\n'
    )
    recipe = load_recipe(adapters / "recipe.toml", {})
    assert recipe.adapters == (
        f"{adapters / 'style'}=0.5",
        str(adapters / "lr=3"),
        f"{adapters / 'lr=3'}=-2",
        "org/lora=2",
    )
    specs = recipe.adapter_specs()
    assert [(Path(spec.path).name, spec.weight) for spec in specs] == [
        ("style", 0.5),
        ("lr=3", 1.0),
        ("lr=3", -2.0),
        ("lora", 2.0),
    ]


def test_the_digest_follows_weights_and_not_the_places_of_adapters() -> None:
    plain = Recipe(source="m", quant="q4_0")
    merged = Recipe(source="m", quant="q4_0", adapters=("a", "b=0.5"))
    elsewhere = Recipe(source="n", quant="q4_0", adapters=("x/a", "y/b=0.5"), min_survival=0.9)
    assert merged.sha256() == elsewhere.sha256() != plain.sha256()
    assert merged.choices()["adapters"] == [1.0, 0.5]
    for other in (
        Recipe(source="m", quant="q4_0", adapters=("b=0.5", "a")),
        Recipe(source="m", quant="q4_0", adapters=("a", "b=0.5"), combine="svd"),
        Recipe(source="m", quant="q4_0", adapters=("a", "b=0.5"), merge_base="full"),
    ):
        assert other.sha256() != merged.sha256()
    assert "adapters" not in plain.choices()
    assert "combine" not in plain.choices()


def test_a_saved_recipe_keeps_its_adapters(tmp_path: Path) -> None:
    recipe = make_recipe(
        {
            "source": "org/name",
            "adapters": ["a/b=0.5", "c/d"],
            "combine": "DARE_Ties",
            "density": 0.5,
            "sign": "frequency",
            "seed": 7,
            "merge_base": "NF4",
            "min_survival": 0.25,
            "allow_untrained": True,
        }
    )
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(tmp_path / "recipe.toml", {}) == recipe
    combination = recipe.combination()
    assert (combination.method, combination.seed) == ("dare_ties", 7)
    assert (combination.density, combination.sign) == (0.5, "frequency")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"combine": "ties"}, "combine is about adapters"),
        ({"min_survival": 0.5}, "min_survival is about adapters"),
        ({"keep_adapters": True}, "keep_adapters is about adapters"),
        ({"adapters": ["a"], "seed": -1}, "seed must be 0 or more, got -1"),
        ({"adapters": ["a"], "min_survival": 1.5}, "min_survival is a share"),
        ({"adapters": ["a=x"]}, "must be a number other than 0, got 'x'"),
        ({"adapters": ["a", "b"], "combine": "ties"}, "needs a density"),
        ({"adapters": "a"}, "adapters"),
    ],
)
def test_what_is_wrong_with_adapters_is_named(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_recipe({"source": "m", **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"quant": "rtn:q4_0", "calibration": "a.txt"}, r"calibration is for solvers .* gptq:q4_0"),
        ({"quant": "rtn", "calibration_tokens": 4096}, "calibration_tokens is for"),
        (
            {"quant": "rtn:q4_0", "seed": 0},
            "seed is for solvers that see the model work, and rtn rounds",
        ),
        ({"quant": "gptq:q4_0", "calibration_tokens": 0}, "must be at least 1, got 0"),
        ({"quant": "gptq:q4_0", "calibration_tokens": "many"}, "calibration_tokens"),
        ({"quant": "rtn:q4_0", "calibrate_on": "float"}, "calibrate_on is for"),
        ({"calibrate_on": "rounded"}, "calibrate_on is float or quantized, got 'rounded'"),
        ({"seed": -1}, "seed must be 0 or more, got -1"),
    ],
)
def test_calibration_that_nothing_would_heed_is_named(fields: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_recipe({"source": "m", **fields})


@pytest.mark.parametrize("quant", ["gptq:q4_0", "imatrix:q4_k_m", "awq:q4_0", "awq+rtn:q4_0", None])
def test_calibration_is_for_solvers_and_transforms_that_need_it(quant: str | None) -> None:
    """Without a solver one is chosen later, which then says whether it needs any."""
    asked = {"source": "m", "quant": quant, "calibration": "a", "calibration_tokens": 9, "seed": 1}
    recipe = make_recipe(asked)
    assert (recipe.calibration, recipe.calibration_tokens, recipe.seed) == ("a", 9, 1)
    assert recipe.calibrates is (quant is not None)


def test_a_solver_that_was_chosen_later_is_checked_the_same() -> None:
    recipe = make_recipe({"source": "m", "calibration": "a.txt"})
    chosen = msgspec.structs.replace(recipe, quant="rtn:q4_0")
    with pytest.raises(UsageError, match="--quant gptq:q4_0"):
        check_calibration(chosen)
    check_calibration(msgspec.structs.replace(recipe, quant="gptq:q4_0"))


def test_the_seed_of_adapters_goes_with_any_solver() -> None:
    fields = {"source": "m", "quant": "rtn:q4_0", "adapters": ["a"], "combine": "dare_linear"}
    assert make_recipe({**fields, "density": 0.5, "seed": 3}).combination().seed == 3


def test_texts_beside_the_file_are_found_from_anywhere(tmp_path: Path) -> None:
    for name in ("chats.jsonl", "builtin"):
        (tmp_path / name).touch()
    file = tmp_path / "recipe.toml"
    file.write_text('source = "m"\ncalibration = "chats.jsonl"\nadapters = ["a"]\n'
                    'check_text = "builtin"\n')  # fmt: skip
    recipe = load_recipe(file, {})
    assert recipe.calibration == str(tmp_path / "chats.jsonl")
    assert recipe.check_text == "builtin"
    assert load_recipe(file, {"calibration": "builtin"}).calibration == "builtin"


def test_the_digest_follows_the_draw_and_not_the_place_of_the_text() -> None:
    asked = {"source": "m", "quant": "gptq:q4_0"}
    here, there = (make_recipe({**asked, "calibration": text}) for text in ("a.txt", "x/a.txt"))
    assert here.sha256() == there.sha256() == make_recipe(asked).sha256()
    more, other = (make_recipe({**asked, name: 9}) for name in ("calibration_tokens", "seed"))
    assert len({here.sha256(), more.sha256(), other.sha256()}) == 3
    assert not {"calibration", "calibration_tokens", "seed"} & make_recipe(asked).choices().keys()
