"""Grids chosen for a size: what is expected is what happens, and it beats other choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from edgellm.budget import fitting
from edgellm.budget.choosing import choose
from edgellm.budget.fitting import Fit, fit, taken
from edgellm.budget.units import units_of
from edgellm.calibration.texts import evaluation_windows
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.evaluation import Comparison
from edgellm.export import container_named
from edgellm.forward import window_logits
from edgellm.hardware import detect
from edgellm.plan import make_plan, resolve
from edgellm.quant import rtn
from edgellm.quant.grid import GRIDS
from edgellm.recipe import Recipe, make_recipe
from edgellm.slabs import values_of
from edgellm.source import ModelSource, open_source
from edgellm.tensors import derived

TinyModel = Callable[[str], Path]


def recipe_of(path: Path, container: str = "gguf", quant: str = "rtn", **fields: Any) -> Recipe:
    return make_recipe({"source": str(path), "format": container, "quant": quant, **fields})


def rounded(source: ModelSource, grids: Mapping[str, str]) -> ModelSource:
    """``source`` with the values that its weights have on ``grids``, by role."""
    tensors = dict(source.tensors)
    for role, name in grids.items():
        tensors[role] = derived(
            tensors[role], lambda rows, grid=GRIDS[name]: values_of(rtn.solve(rows, grid))
        )
    return replace(source, tensors=tensors)


def divergence(source: ModelSource, other: ModelSource) -> float:
    windows = evaluation_windows(source.tokenizer, tokens=256, window_tokens=128).windows
    found = Comparison()
    answers = (window_logits(source, windows), window_logits(other, windows))
    for window, reference, moved in zip(windows, *answers, strict=True):
        found.add(reference, moved, window)
    mean = found.figures(1, 1).kld_mean
    assert mean is not None
    return mean


def fitted(path: Path, source: ModelSource, **budget: Any) -> tuple[Recipe, Fit]:
    asked = recipe_of(path, calibration_tokens=1024, **budget)
    return fit(asked, resolve(asked)[0], source, container_named("gguf"), threads=1)


def check_choice(path: Path) -> None:
    """What is expected is what is computed; and the choice beats q4_0 and shuffled factors."""
    source = open_source(str(path))
    container = container_named("gguf")
    plain = container.lay_out(source, recipe_of(path, quant="rtn:q4_0"))
    size = taken(plain)
    recipe, found = fitted(path, source, fit=str(size))
    assert found.nbytes == taken(container.lay_out(source, recipe)) <= size
    ours = divergence(source, rounded(source, recipe.tensor_grids))
    mixture = {
        part.role: tensor.grid.name
        for tensor in plain.tensors
        for part in tensor.parts
        if tensor.grid.kind != "float"
    }
    assert ours < 0.9 * divergence(source, rounded(source, mixture))

    units = units_of(resolve(recipe_of(path))[0], source, container)
    factors = [max(found.measured.costs[unit.name].values()) for unit in units]
    shapes = [
        {grid: cost / factor for grid, cost in found.measured.costs[unit.name].items()}
        for unit, factor in zip(units, factors, strict=True)
    ]
    spent = sum(entry.nbytes for entry in found.entries)
    shuffled = []
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(units))
        options = [
            [(unit.sizes[grid], shape[grid] * factors[other]) for grid in unit.sizes]
            for unit, shape, other in zip(units, shapes, order, strict=True)
        ]
        places = choose(options, spent)
        grids = {
            role: list(unit.sizes)[place]
            for unit, place in zip(units, places, strict=True)
            for role in unit.roles
        }
        shuffled.append(divergence(source, rounded(source, grids)))
    assert ours < min(shuffled)

    for role in ("blk.0.attn_v.weight", "blk.1.ffn_down.weight", "blk.2.attn_output.weight"):
        expected = found.measured.costs[role]["q4_0"]
        computed = divergence(source, rounded(source, {role: "q4_0"}))
        assert 0.5 < expected / computed < 1.5, role


def test_the_choice_is_expected_right_and_beats_others(tiny_model: TinyModel) -> None:
    check_choice(tiny_model("llama"))


@pytest.mark.parametrize("container", ["gguf", "onnx"])
def test_a_plan_keeps_within_bits_and_its_recipe_repeats_it(
    container: str, tiny_model: TinyModel
) -> None:
    asked = recipe_of(tiny_model("qwen3"), container, bits=6.5, calibration_tokens=1024)
    plan = make_plan(asked, threads=1)
    assert plan.fitted is not None
    assert plan.fitted.seconds > 0
    assert plan.bits_per_weight <= 6.5
    assert plan.recipe.bits is None
    again = make_plan(plan.recipe, threads=1)
    assert again.fitted is None
    assert [tensor.grid for tensor in again.layout.tensors] == [
        tensor.grid for tensor in plan.layout.tensors
    ]


def test_measuring_that_memory_is_too_small_for_is_refused_before_it(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware = detect()
    little = replace(hardware, memory_bytes=replace(hardware.memory_bytes, value=1 << 20))
    monkeypatch.setattr(fitting, "detect", lambda: little)
    monkeypatch.setattr(fitting, "measure", lambda *_: pytest.fail("measured"))
    path = tiny_model("llama")
    with pytest.raises(UsageError, match=r"--bits 8 measures .* there are 0\.0 GB: name a grid"):
        fitted(path, open_source(str(path)), bits=8.0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fit": "1KB"}, r"the least is \d"),
        ({"bits": 1.0}, r"the least is \d\.\d+ bits"),
        ({"fit": "1MB", "bits": 4.0}, "two budgets"),
        ({"fit": "1MB", "quant": "rtn:q4_0"}, "names one"),
        ({"fit": "1MB", "container": "hf"}, "one for all"),
        ({"fit": "lots"}, "is no size"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(
    fields: dict[str, Any], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises((UnsupportedTarget, UsageError), match=message):
        make_plan(recipe_of(tiny_model("llama"), **fields), threads=1)
