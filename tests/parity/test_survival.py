"""Survival of a PEFT adapter, against torch: transformers' logits of base, merged and rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("peft", reason="peft is not installed")

import peft
import peft_adapters
import tiny_models
import torch

from edgellm.artifact import Artifact
from edgellm.conversion import carry_out
from edgellm.lora.binding import Combination
from edgellm.lora.check import doctor, survival
from edgellm.lora.merging import merged_source
from edgellm.lora.reading.open import open_adapter
from edgellm.plan import Plan, make_plan
from edgellm.quant.rtn import solve
from edgellm.recipe import Recipe
from edgellm.source import open_source

TinyModel = Callable[[str], Path]

TARGETS = ["q_proj", "v_proj", "o_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """A base, an adapter of PEFT's and the model that PEFT merges it into."""

    base: Path
    adapter: peft_adapters.PeftAdapter

    def plan(self, quant: str, container: str = "onnx") -> Plan:
        return make_plan(
            Recipe(
                source=str(self.base),
                format=container,
                quant=quant,
                adapters=(str(self.adapter.folder),),
            )
        )


@pytest.fixture(scope="module")
def case(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Case:
    base = tiny_model("llama-256")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS, rank_pattern={"v_proj": 2}, use_rslora=True
    )
    folder = tmp_path_factory.mktemp("adapter")
    return Case(base, peft_adapters.make_adapter(base, config, folder, noise=0.1))


def torch_logits(case: Case, state: dict[str, np.ndarray], window: list[int]) -> torch.Tensor:
    model = tiny_models.load(case.base)
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    with torch.no_grad():
        logits: torch.Tensor = model(torch.tensor([window]), use_cache=False).logits[0].double()
    return logits


def torch_kl(reference: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    p, q = (torch.log_softmax(torch.cat(side), -1) for side in (reference, other))
    return float(torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True))


def rounded_state(case: Case, plan: Plan) -> dict[str, np.ndarray]:
    """PEFT's merged state with each linear weight on the plan's grid, by our own rounding."""
    grids = {ref.name: tensor.grid for tensor in plan.layout.tensors for ref in tensor.parts}
    state = dict(case.adapter.merged)
    for name, weight in state.items():
        if weight.ndim == 2:
            grid = grids[name]
            state[name] = survival._values(solve(weight, grid)).reshape(weight.shape)
    return state


def test_both_divergences_equal_torch(case: Case, tmp_path: Path) -> None:
    """By answers of transformers with the very weights that base, merge and artifact stand for."""
    plan = case.plan("int4-g32")
    windows = [tiny_models.some_token_ids(n, seed=n) for n in (60, 9, 31)]
    state = rounded_state(case, plan)
    base, merged, rounded = (
        [torch_logits(case, weights, window) for window in windows]
        for weights in (case.adapter.base, case.adapter.merged, state)
    )
    unknown = survival.Survival(survival=None, reason="", text="random")
    found = survival.divergences(
        plan.source, (one.float().numpy() for one in rounded), windows, unknown
    )
    assert found.from_base is not None
    assert found.from_quantized is not None
    from_base, from_quantized = torch_kl(merged, base), torch_kl(merged, rounded)
    assert from_base > 0.01
    assert found.from_base.kl == pytest.approx(from_base, rel=1e-4)
    assert found.from_quantized.kl == pytest.approx(from_quantized, rel=1e-4)
    assert found.survival == pytest.approx(1 - from_quantized / from_base, abs=1e-3)
    assert found.from_base.tokens == 100


@pytest.mark.parametrize(("container", "quant"), [("onnx", "rtn:int4-g32"), ("gguf", "rtn:q4_0")])
def test_an_artifact_through_its_runtime(
    container: str, quant: str, case: Case, tmp_path: Path
) -> None:
    """The runtime rounds activations too, so it comes near to the weights' figure only."""
    if container == "gguf":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    plan = case.plan(quant, container)
    artifact = carry_out(plan, tmp_path / "out", check=False)
    text = str(tmp_path / "text.txt")
    Path(text).write_text(tiny_models.TEXT)
    found = survival.measure(plan.source, plan.layout, artifact, text=text)
    assert found.from_quantized is not None
    windows = survival._windows(plan.source, plan.layout.context_length, text).windows
    merged, rounded = (
        [torch_logits(case, weights, window) for window in windows]
        for weights in (case.adapter.merged, rounded_state(case, plan))
    )
    assert found.from_quantized.kl == pytest.approx(torch_kl(merged, rounded), rel=0.1)
    assert found.runtime == {"onnx": "onnxruntime", "gguf": "llamacpp"}[container]
    assert {weight.name for weight in found.weights} == {
        name for name in case.adapter.base if name.split(".")[-2] in TARGETS
    }


def test_the_figures_follow_the_bits(case: Case, tmp_path: Path) -> None:
    """Eight bits keep nearly all, f32 all, and fewer bits less."""
    found: dict[str, survival.Survival] = {}
    for quant in ("f32", "int8", "int4-g128"):
        plan = case.plan(f"rtn:{quant}")
        artifact = carry_out(plan, tmp_path / quant, check=False)
        found[quant] = measured(plan, artifact)
    by_answers = {quant: one.survival for quant, one in found.items()}
    assert by_answers["f32"] == pytest.approx(1.0, abs=1e-5)
    assert 0.9 < by_answers["int8"] < 1.0  # type: ignore[operator]
    assert by_answers["int4-g128"] < by_answers["int8"]  # type: ignore[operator]
    by_weights = {quant: one.median_cosine for quant, one in found.items()}
    assert by_weights["f32"] == pytest.approx(1.0, abs=1e-6)
    assert by_weights["int8"] > by_weights["int4-g128"] > 0.5  # type: ignore[operator]


def measured(plan: Plan, artifact: Artifact) -> survival.Survival:
    return survival.measure(plan.source, plan.layout, artifact)


def test_sizes_of_changes_equal_peft(case: Case) -> None:
    source = open_source(str(case.base))
    adapter = open_adapter(str(case.adapter.folder))
    report = doctor.check(merged_source(source, [adapter], Combination()))
    (facts,) = report.adapters
    assert not report.faults
    names = {name for name in case.adapter.base if name.split(".")[-2] in TARGETS}
    assert {target.name for target in facts.targets} == names
    squares = np.zeros(2)
    for target in facts.targets:
        before, after = (
            side[target.name].astype(np.float64)
            for side in (case.adapter.base, case.adapter.merged)
        )
        change = np.linalg.norm(after - before) / np.linalg.norm(before)
        assert target.change is not None
        assert target.change.relative == pytest.approx(change, rel=1e-5)
        rank = 2 if "v_proj" in target.name else 4
        assert (target.rank, target.scale) == (rank, pytest.approx(8 / rank**0.5))
        squares += np.square([np.linalg.norm(after - before), np.linalg.norm(before)])
    assert facts.relative == pytest.approx(np.sqrt(squares[0] / squares[1]), rel=1e-5)
    assert any("rsLoRA is ignored" in fault for fault in facts.llamacpp_faults)


def test_two_adapters_are_measured_apart_and_together(case: Case) -> None:
    """Half of an adapter and half of it again are the whole of it."""
    source = open_source(str(case.base))
    folder = case.adapter.folder
    halves = [open_adapter(f"{folder}=0.5"), open_adapter(f"{folder}=0.5")]
    merged = merged_source(source, halves, Combination())
    report = doctor.check(merged)
    one = merged_source(source, [open_adapter(str(folder))], Combination())
    (whole,) = doctor.check(one).adapters
    assert whole.relative is not None
    for facts in report.adapters:
        assert facts.relative == pytest.approx(whole.relative / 2, rel=1e-4)
    assert report.together_relative == pytest.approx(whole.relative, rel=1e-4)
    plan = case.plan("int4-g32")
    for part, all_of_it in zip(
        survival.weight_survivals(merged, plan.layout),
        survival.weight_survivals(plan.source, plan.layout),
        strict=True,
    ):
        assert part.cosine == pytest.approx(all_of_it.cosine, abs=1e-3)


def test_repeated_layers_are_compared_with_those_that_they_repeat(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    """PEFT's ``layer_replication``: four layers out of two, each with a change of its own."""
    base = tiny_model("llama-256")
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj"], layer_replication=[[0, 2], [0, 2]]
    )
    folder = peft_adapters.make_adapter(base, config, tmp_path / "stacked").folder
    adapter = open_adapter(str(folder))
    merged = merged_source(open_source(str(base)), [adapter], Combination())
    (facts,) = doctor.check(merged).adapters
    assert len(facts.targets) == 4
    for target in facts.targets:
        layer = int(target.role.split(".")[1])
        factors = adapter.parts[f"model.layers.{layer}.self_attn.q_proj.weight"]
        delta = factors["lora_B"].load() @ factors["lora_A"].load()
        assert target.change is not None
        assert target.change.change_norm == pytest.approx(np.linalg.norm(delta), rel=1e-4)
