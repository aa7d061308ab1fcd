"""Rows solved together: gradients against transformers', rounding against what it is to lessen."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tiny_models
import torch
from gguf_adapters import MODULES
from torch.nn import functional
from transformers import AutoModelForCausalLM

from edgellm import conversion, forward
from edgellm.calibration import running
from edgellm.calibration.folding import Folding
from edgellm.conversion import carry_out, couple_rows, quantize_tensors
from edgellm.errors import TensorError
from edgellm.evaluation import compare
from edgellm.export.writer import StagedFolder
from edgellm.plan import Plan, make_plan
from edgellm.quant import coupled, gptq
from edgellm.quant.dequantize import dequantize
from edgellm.quant.grid import GRIDS
from edgellm.quant.statistics import Statistics
from edgellm.recipe import make_recipe
from edgellm.slabs import stored_rows
from edgellm.source import open_source
from edgellm.tensors import Array
from edgellm.tune import coupling
from edgellm.tune.coupling import RowCoupling
from edgellm.tune.gradients import output_hessians
from edgellm.tune.stored import StoredModel, parts_of

TinyModel = Callable[[str], Path]

WINDOWS = [tiny_models.some_token_ids(48, seed=seed) for seed in range(3)]


def gradients_by_transformers(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Clipped and multiplied in plain words, of the same draws."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    draw = torch.Generator().manual_seed(seed)
    sums: dict[str, torch.Tensor] = {}

    def keep(role: str, module: torch.nn.Module) -> None:
        def count(_: object, __: object, gradients: tuple[torch.Tensor, ...]) -> None:
            lengths = gradients[0][0].norm(dim=-1)
            limit = lengths.median()
            for gradient, length in zip(gradients[0][0], lengths, strict=True):
                clipped = gradient if length <= limit else gradient * limit / length
                sums[role] = sums.get(role, 0) + torch.outer(clipped, clipped)

        module.register_full_backward_hook(count)

    for index, layer in enumerate(model.model.layers):
        for name, role in MODULES.items():
            keep(f"blk.{index}.{role}.weight", layer.get_submodule(name))
    for window in WINDOWS:
        logits = model(torch.tensor([window])).logits[0]
        drawn = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=draw)[:, 0]
        functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {role: total / sum(map(len, WINDOWS)) for role, total in sums.items()}


def test_gradients_are_those_of_transformers(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    done: list[int] = []
    found = output_hessians(open_source(str(folder)), WINDOWS, 5, done.append)
    wanted = gradients_by_transformers(folder, 5)
    assert done == [1, 2, 3]
    assert found.keys() == wanted.keys()
    for role, hessian in wanted.items():
        # The deepest matrices are a millionth of the largest: compared by their own size.
        size = float(hessian.abs().max())
        np.testing.assert_allclose(found[role] / size, hessian.numpy() / size, atol=2e-4)


def with_few_directions(folder: Path, out: Path) -> Path:
    """The model with an embedding, its head as well, of rank 8: most of a state is not answered by.

    In trained models few directions count as well; in those with weights at random all do.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shutil.copytree(folder, out)
    table = model.get_input_embeddings().weight.data
    u, s, v = torch.linalg.svd(table, full_matrices=False)
    table.copy_(u[:, :8] * (s[:8] * (s.norm() / s[:8].norm())) @ v[:8])
    model.save_pretrained(out)
    return out


def tuned_plan(tiny_model: TinyModel, folder: Path, quant: str = "gptq:q4_0") -> Plan:
    """On tokens at random in the stead of a text, as those that answers are compared on."""
    (file := folder / "text.txt").write_text("The quick brown fox jumps over 12 lazy dogs. " * 400)
    choice = {"source": str(tiny_model("llama")), "format": "gguf", "quant": quant}
    choice |= {"calibration": str(file), "calibration_tokens": 8192, "tune": 2, "embed": "f32"}
    plan = make_plan(make_recipe(choice), threads=1)
    assert plan.calibration is not None
    assert plan.tuning is not None
    windows = tuple(tuple(tiny_models.some_token_ids(64, seed=seed)) for seed in range(200, 400))
    text = msgspec.structs.replace(plan.tuning.text, windows=windows, tokens=64 * len(windows))
    return replace(
        plan,
        calibration=replace(plan.calibration, text=text),
        tuning=replace(plan.tuning, text=text),
    )


def layer(rows: int, columns: int, seed: int = 0) -> tuple[Array, Statistics, Array]:
    """A weight, what is known of its inputs, and gradients of outputs that go together."""
    draw = np.random.default_rng(seed)
    weight = draw.normal(size=(rows, columns)).astype(np.float32)
    x = draw.normal(size=(2000, 24)) @ draw.normal(size=(24, columns))
    x = (x + draw.normal(size=x.shape)).astype(np.float32)
    g = draw.normal(size=(2000, 16)) @ draw.normal(size=(16, rows))
    g = (g + 0.5 * draw.normal(size=g.shape)).astype(np.float32)
    statistics = Statistics(x.T @ x / len(x), np.abs(x).max(axis=0), len(x))
    return weight, statistics, g.T @ g / len(g)


def cost(weight: Array, rounded: Array, statistics: Statistics, outputs: Array) -> float:
    error = (rounded - weight).astype(np.float64)
    return float(np.trace(outputs @ error @ statistics.hessian @ error.T))


SCALAR = ["q4_0", "q4_1", "q5_0", "q3_k", "q4_k", "iq4_xs", "int4-g32", "int4-g64-sym", "nf4"]


@pytest.mark.parametrize("name", SCALAR)
def test_coupled_rows_cost_less(name: str) -> None:
    """On every kind of grid, of rows that are no multiple of a block of them."""
    weight, statistics, outputs = layer(200, 256)
    grid = GRIDS[name]
    assert coupled.couples(grid)
    apart = dequantize(gptq.solve(weight, grid, statistics))
    together = dequantize(coupled.solve(weight, grid, statistics, output_hessian=outputs))
    assert cost(weight, together, statistics, outputs) < 0.6 * cost(
        weight, apart, statistics, outputs
    )


def test_rows_that_nothing_couples_are_solved_as_by_gptq() -> None:
    weight, statistics, _ = layer(130, 64)
    outputs = np.diag(np.linspace(1, 2, len(weight))).astype(np.float32)
    outputs[7, 7] = 0  # an output that moves nothing
    found = coupled.solve(weight, GRIDS["q4_0"], statistics, output_hessian=outputs)
    wanted = gptq.solve(weight, GRIDS["q4_0"], statistics)
    np.testing.assert_array_equal(dequantize(found), dequantize(wanted))


def carried_out(plan: Plan, out: Path) -> bytes:
    """The weights of the artifact that ``plan`` leads to."""
    artifact = carry_out(plan, out, check=False)
    assert plan.layout.main_file is not None
    return (artifact.path / plan.layout.main_file).read_bytes()


def test_a_model_of_coupled_rows_answers_closer(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Before a step is taken: on text that neither calibration nor gradients saw."""
    folder = with_few_directions(tiny_model("llama-256"), tmp_path / "few")
    plan = tuned_plan(lambda _: folder, tmp_path)
    apart = replace(plan, tuning=None)
    test = [tiny_models.some_token_ids(48, seed=100 + seed) for seed in range(6)]
    found = {}
    for name, each in (("apart", apart), ("together", plan)):
        with StagedFolder(tmp_path / name, resume_key=name) as staged:
            for file, nbytes in plan.layout.data_files.items():
                staged.create_data_file(file, nbytes)
                staged.write_at(file, 0, plan.layout.files.get(file, b""))
            quantize_tensors(each, staged, coupling=couple_rows(each, staged))
            rounded = open_source(str(staged.path / str(plan.layout.main_file)), quantized=True)
            reference, answers = (
                forward.window_logits(source, test, threads=1) for source in (plan.source, rounded)
            )
            found[name] = compare(reference, answers, test).kl
    print(found)
    assert found["together"] < 0.97 * found["apart"]


def test_a_killed_run_goes_on_with_the_same_gradients_or_none(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are taken again where a block is left to solve, to the same bytes."""
    plan = tuned_plan(tiny_model, tmp_path)
    wanted = carried_out(plan, tmp_path / "whole")
    taken: list[int] = []

    def counted(*arguments: Any) -> dict[str, Array]:
        taken.append(1)
        return output_hessians(*arguments)

    monkeypatch.setattr(coupling, "output_hessians", counted)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    for place, blocks in ((running._Run, 2), (conversion, 0)):
        left = [blocks]
        name = "_finish" if blocks else "tune_tensors"
        real = getattr(place, name)

        def dies(*arguments: Any, real: Any = real, left: list[int] = left) -> Any:
            left[0] -= 1
            return killed() if left[0] < 0 else real(*arguments)

        out = tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(place, name, dies)
            with pytest.raises(KeyboardInterrupt):
                carry_out(plan, out, check=False)
        taken.clear()
        assert carried_out(plan, out) == wanted
        assert len(taken) == bool(blocks)


def test_gradients_that_overflow_are_named() -> None:
    weight, statistics, outputs = layer(70, 64)
    outputs[3, 5] = np.inf
    with pytest.raises(TensorError, match="gradients of the outputs are not finite"):
        coupled.solve(weight, GRIDS["q4_0"], statistics, output_hessian=outputs)


FORMATS = {"gguf": "q4_0", "onnx": "int4-g32", "hf": "int4-g32-sym", "mlx": "int4-g32-min"}
FAMILIES = [
    "llama", "llama-biased", "gemma3", "phi3", "gptj", "bloom", "gpt_neox", "falcon-grouped",
    "cohere", "gpt2", "lfm2", "starcoder2", "mpt", "minicpm3",
]  # fmt: skip

MLX_FAMILIES = ("llama", "llama-biased", "gemma3", "gpt2")
UNKNOWN = [
    ("gptj", "gguf"),
    *((family, "mlx") for family in FAMILIES if family not in MLX_FAMILIES),
]


@pytest.mark.parametrize(
    ("family", "format"),
    [pair for pair in product(FAMILIES, FORMATS) if pair not in UNKNOWN],
)
def test_hessians_follow_the_rows_of_the_file(
    family: str, format: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """In every container's order. The products of rows stand in for Hessians: those of the rows
    that are stored must come out of those of the network's."""
    choice = {"source": str(tiny_model(family)), "format": format}
    plan = make_plan(make_recipe(choice | {"quant": f"rtn:{FORMATS[format]}"}))
    products = {
        role: ref.load() @ ref.load().T
        for role, ref in plan.source.tensors.items()
        if role.startswith("blk.") and role.endswith(".weight") and len(ref.shape) == 2
    }
    roles = set()
    with StagedFolder(tmp_path / "out") as staged:
        rows = RowCoupling(products, StoredModel(plan.layout, plan.source, staged.path))
        for tensor in plan.layout.model_tensors:
            parts = list(parts_of(tensor))
            if not tensor.role.startswith("blk.0.") or not coupled.couples(tensor.grid):
                assert tensor.role.startswith("blk.") or rows.of(tensor, 0, tensor.rows) is None
                continue
            roles |= {role for role, _ in parts}
            stored = stored_rows(tensor, 0, tensor.rows)
            found = rows.of(tensor, 0, tensor.rows)
            assert found is not None
            for _, places in parts:
                wanted = stored[places] @ stored[places].T
                np.testing.assert_allclose(found[places][:, places], wanted, rtol=1e-4, atol=1e-4)
            part = rows.of(tensor, 8, 24)
            np.testing.assert_array_equal(part, found[8:24, 8:24])
    hessians = output_hessians(plan.source, WINDOWS[:1], 0, lambda _: None)
    assert len(roles) >= 2
    assert roles <= hessians.keys()


SCALED = ("llama", "gemma3", "phi3", "gpt_neox", "minicpm3")


@pytest.mark.parametrize(
    ("family", "format"), [pair for pair in product(SCALED, FORMATS) if pair not in UNKNOWN]
)
def test_hessians_follow_what_a_transform_divides_rows_by(
    family: str, format: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    """An error in a row that is stored a third as large counts for nine times as much."""
    choice = {"source": str(tiny_model(family)), "format": format}
    plain = make_plan(make_recipe(choice | {"quant": f"rtn:{FORMATS[format]}"}))
    plan = make_plan(make_recipe(choice | {"quant": f"awq+gptq:{FORMATS[format]}"}))
    assert plan.calibration is not None
    folding = plan.calibration.folding
    assert isinstance(folding, Folding)
    absorbing = {absorber.role for each in folding.coupled for absorber in each.absorbers}
    draw = np.random.default_rng(3)
    for unit in range(folding.units):  # what weights divide is drawn, what norms do is one
        of_unit = [each for each in folding.coupled if each.layer == unit]
        by_weights = [each for each in of_unit if each.name.endswith(("attn_v", "ffn_up"))]
        factors = {each.name: np.ones(each.channels, np.float32) for each in of_unit}
        drawn = {each.name: np.exp(draw.normal(size=each.channels)) for each in by_weights}
        folding.restore(unit, factors | drawn)
    hessians = {
        role: ref.load() @ ref.load().T
        for role, ref in plan.source.tensors.items()
        if role.startswith("blk.") and role.endswith(".weight") and len(ref.shape) == 2
    }
    with StagedFolder(tmp_path / "out") as staged:
        rows = RowCoupling(hessians, StoredModel(plan.layout, plan.source, staged.path), folding)
        changed = 0
        for tensor, before in zip(
            plan.layout.model_tensors, plain.layout.model_tensors, strict=True
        ):
            if not tensor.role.startswith("blk.0.") or not coupled.couples(tensor.grid):
                continue
            whole = stored_rows(before, 0, before.rows)
            scaled = stored_rows(tensor, 0, tensor.rows)
            divisors = np.ones(len(whole))
            for role, places in parts_of(tensor):
                if role in absorbing:
                    sizes = [np.linalg.norm(each[places], axis=1) for each in (whole, scaled)]
                    divisors[places] = sizes[0] / sizes[1]
                    changed += 1
            wanted = whole * divisors[:, None]
            found = rows.of(tensor, 0, tensor.rows)
            assert found is not None
            for _, places in parts_of(tensor):
                np.testing.assert_allclose(
                    found[places][:, places],
                    wanted[places] @ wanted[places].T,
                    rtol=1e-3,
                    atol=1e-3,
                )
    assert changed


def test_a_conversion_couples_rows_as_its_transform_leaves_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = tuned_plan(tiny_model, tmp_path, "awq+gptq:q4_0")
    assert plan.calibration is not None
    assert plan.tuning is not None
    folding = plan.calibration.folding
    assert isinstance(folding, Folding)
    draw = np.random.default_rng(4)
    for unit in range(folding.units):
        of_unit = [each for each in folding.coupled if each.layer == unit]
        drawn = {each.name: np.exp(draw.normal(size=each.channels)) for each in of_unit}
        folding.restore(unit, {name: factors.astype(np.float32) for name, factors in drawn.items()})
    with StagedFolder(tmp_path / "out", resume_key="any") as staged:
        coupling = couple_rows(plan, staged)
        assert coupling is not None
        (tensor,) = (
            each for each in plan.layout.model_tensors if each.role == "blk.1.ffn_up.weight"
        )
        found = coupling.of(tensor, 0, tensor.rows)
    windows, seed = plan.tuning.gradient_windows(), plan.tuning.settings.seed
    hessian = output_hessians(plan.source, windows, seed, lambda _: None)[tensor.role]
    factors = folding.factors(1)["ffn_up"]
    np.testing.assert_allclose(found, hessian * np.outer(factors, factors), rtol=1e-5)
