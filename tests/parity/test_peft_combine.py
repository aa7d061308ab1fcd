"""Combined adapters against PEFT's own ``add_weighted_adapter``, in float32, for every method."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.errors import AdapterError
from edgellm.lora.binding import Combination
from edgellm.lora.combine.check import settled
from edgellm.lora.combine.combined import combined
from edgellm.lora.combine.dare import Masked
from edgellm.lora.combine.methods import METHODS
from edgellm.lora.combine.pruning import LargestKept
from edgellm.lora.edit import LowRank, Target
from edgellm.lora.merging import merged_source
from edgellm.lora.reading.open import open_adapter
from edgellm.source import open_source
from edgellm.tensors import constant

peft = pytest.importorskip("peft", reason="peft is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")
import peft_adapters  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402

FACTORS = 1e-6
"""Float32 sums of a few products of a rank of a few: about ten roundings."""

TRUNCATED = 5e-5
"""PEFT takes a float32 SVD, which errs by some roundings of the largest singular value; where the
last one kept and the first one dropped are near each other, that turns the vectors the more."""

Figure = Callable[[str, str, float], None]

BOUNDS = {method: FACTORS if not row.truncate else TRUNCATED for method, row in METHODS.items()}
"""Largest difference of the change of a weight, as a share of its largest value."""

ATTENTION = ["q_proj", "v_proj"]
WEIGHTS = (0.7, 1.0, 0.4)


@dataclass(frozen=True)
class Case:
    """Three adapters on a base: PEFT's model, and the configs it was given."""

    model: Any
    configs: tuple[dict[str, Any], ...]

    @property
    def names(self) -> list[str]:
        return [f"a{number}" for number in range(len(self.configs))]

    def layers(self, adapters: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """The layers that any of ``adapters`` changes, by module name, in PEFT's order."""
        for name, layer in self.model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer) and set(adapters) & (
                {*layer.lora_A} | {*layer.lora_embedding_A}
            ):
                yield name, layer


def adapted(base: Path, *configs: dict[str, Any]) -> Case:
    """PEFT's model with an adapter of each of ``configs``, all of seeded random values."""
    made = [peft.LoraConfig(**config) for config in configs]
    model = peft_adapters.trained(base, made[0], seed=1, adapter_name="a0")
    for number, config in enumerate(made[1:], start=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.add_adapter(f"a{number}", config)
        model.set_adapter(f"a{number}")
        peft_adapters.move(model, seed=number + 1)
    return Case(model, configs)


def edit_of(layer: Any, adapter: str) -> LowRank | None:
    """The change of one layer by one adapter, from PEFT's own tensors."""
    if adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    elif adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_B[adapter].T, layer.lora_embedding_A[adapter].T
    else:
        return None
    return LowRank(
        constant("a", a.detach().numpy()), constant("b", b.detach().numpy()), layer.scaling[adapter]
    )


def target_of(name: str, layer: Any) -> Target:
    embedding = isinstance(layer, peft.tuners.lora.layer.Embedding)
    shape = tuple(layer.get_base_layer().weight.shape)
    turned = bool(getattr(layer, "fan_in_fan_out", False))
    kind = "embedding" if embedding else "linear"
    return Target(f"{name}.weight", shape[::-1] if turned else shape, kind, turned)


def peft_deltas(
    case: Case, adapters: Sequence[str], weights: Sequence[float], combination: Combination
) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """The change of each weight ``[out, in]`` as PEFT combines it, and the masks that it drew."""
    drawn = []
    true_bernoulli = torch.bernoulli

    def bernoulli(*args: Any, **kwargs: Any) -> Any:
        mask = true_bernoulli(*args, **kwargs)
        drawn.append(mask.numpy() != 0)
        return mask

    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(torch, "bernoulli", bernoulli)
        case.model.add_weighted_adapter(
            list(adapters),
            list(weights),
            "sum",
            combination_type=combination.method,
            svd_rank=combination.rank,
            density=combination.density,
            majority_sign_method=combination.sign,
        )
    deltas = {}
    for name, layer in case.layers(["sum"]):
        delta = layer.get_delta_weight("sum").detach().numpy()
        deltas[name] = delta.T if target_of(name, layer).transposed else delta
    return deltas, drawn


class PeftMasks:
    """The masks that PEFT drew, found by what they are for."""

    def __init__(
        self, case: Case, adapters: Sequence[str], whole: bool, drawn: list[np.ndarray]
    ) -> None:
        self.masks = {}
        left = iter(drawn)
        for name, layer in case.layers(["sum"]):
            target = target_of(name, layer)
            present = [n for n, adapter in enumerate(adapters) if edit_of(layer, adapter)]
            for factor in ("delta",) if whole else ("a", "b"):
                for number in present:
                    mask = next(left)
                    key = factor
                    if target.kind == "embedding" and not whole:
                        key, mask = {"a": "b", "b": "a"}[factor], mask.T
                    if target.transposed and whole:
                        mask = mask.T
                    self.masks[number, target.name, key] = mask
        assert next(left, None) is None

    def keep(self, masked: Masked, start: int, stop: int, density: float) -> np.ndarray:
        mask = self.masks[masked.adapter, masked.target, masked.factor]
        assert mask.shape[1] == masked.columns
        return mask[start:stop]


def compare(
    case: Case, adapters: Sequence[str], weights: Sequence[float], combination: Combination
) -> float:
    """The largest difference from PEFT, as a share of the largest value of its weight's change."""
    expected, drawn = peft_deltas(case, adapters, weights, combination)
    try:
        method = METHODS[combination.method]
        masks = PeftMasks(case, adapters, method.of == "deltas", drawn) if drawn else None
        assert bool(drawn) == (method.prune == "random" and len(adapters) > 1)
        combination = settled(combination, [case.configs[case.names.index(n)] for n in adapters])
        worst = 0.0
        for name, layer in case.layers(["sum"]):
            edits = [edit_of(layer, adapter) for adapter in adapters]
            target = target_of(name, layer)
            edit = combined(edits, weights, combination, target, masks=masks)
            got = by_slabs(edit, target.shape[0])
            assert got.shape == expected[name].shape
            difference = np.abs(got - expected[name]).max()
            worst = max(worst, float(difference / np.abs(expected[name]).max()))
        assert len(expected) > 2
        return worst
    finally:
        case.model.delete_adapter("sum")


def by_slabs(edit: LowRank, rows: int) -> np.ndarray:
    """The whole change, asked for from the end in slabs of odd sizes."""
    cuts = [0, *range(7, rows, 41), rows]
    pairs = list(pairwise(cuts))
    slabs = {start: edit.delta(start, stop) for start, stop in reversed(pairs)}
    return np.concatenate([slabs[start] for start, _ in pairs])


@pytest.fixture(scope="module")
def alike(tiny_model: Callable[[str], Path]) -> Case:
    """Three adapters of one rank and different scales, each with weights of its own."""
    return adapted(
        tiny_model("llama"),
        {"r": 4, "lora_alpha": 8, "target_modules": [*ATTENTION, "down_proj", "embed_tokens"]},
        {"r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        {
            "r": 4,
            "lora_alpha": 16,
            "alpha_pattern": {"q_proj": 3},
            "target_modules": ["q_proj", "o_proj", "embed_tokens"],
        },
    )


@pytest.fixture(scope="module")
def unlike(tiny_model: Callable[[str], Path]) -> Case:
    """Three adapters of different ranks, one of them with ranks by layer."""
    return adapted(
        tiny_model("llama"),
        {"r": 3, "lora_alpha": 8, "target_modules": [*ATTENTION, "down_proj", "embed_tokens"]},
        {"r": 5, "use_rslora": True, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        {
            "r": 2,
            "rank_pattern": {"q_proj": 7, "o_proj": 1},
            "target_modules": ["q_proj", "o_proj", "embed_tokens"],
        },
    )


@pytest.fixture(scope="module")
def turned(tiny_model: Callable[[str], Path]) -> Case:
    """Two adapters of GPT-2, whose layers are stored ``[in, out]``."""
    config = {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    return adapted(tiny_model("gpt2"), {**config, "lora_alpha": 6}, config)


def combination(method: str, **settings: Any) -> Combination:
    density = {} if METHODS[method].prune is None else {"density": 0.3}
    return Combination(method, **(density | settings))


@pytest.mark.parametrize("method", METHODS)
def test_each_method_equals_peft(alike: Case, method: str, figure: Figure) -> None:
    furthest = compare(alike, alike.names, WEIGHTS, combination(method))
    assert furthest < BOUNDS[method]
    figure("methods", method, furthest)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.elect])
def test_signs_elected_by_number_equal_peft(alike: Case, method: str) -> None:
    how = combination(method, sign="frequency")
    assert compare(alike, alike.names, WEIGHTS, how) < BOUNDS[method]


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.of == "deltas"])
def test_adapters_of_different_ranks_equal_peft(unlike: Case, method: str) -> None:
    """Here PEFT's default rank is 7, of a pattern that concerns one layer alone."""
    assert compare(unlike, unlike.names, WEIGHTS, combination(method)) < BOUNDS[method]


@pytest.mark.parametrize(
    ("method", "rank"), [("svd", 2), ("svd", 9), ("svd", 40), ("ties_svd", 2), ("ties_svd", 60)]
)
def test_a_rank_of_the_result_equals_peft(alike: Case, method: str, rank: int) -> None:
    """2 cuts, 9 cuts where three adapters meet, 40 is more than all of them have."""
    how = combination(method, rank=rank)
    assert compare(alike, alike.names, WEIGHTS, how) < BOUNDS[method]


@pytest.mark.parametrize("method", ["cat", "linear", "svd", "dare_linear", "ties_svd"])
def test_layers_stored_turned_round_equal_peft(turned: Case, method: str) -> None:
    assert compare(turned, turned.names, (0.7, 0.2), combination(method)) < BOUNDS[method]


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.elect])
def test_negative_weights_equal_peft(alike: Case, method: str) -> None:
    """An embedding is among the layers: there the sign goes into the other factor."""
    assert compare(alike, alike.names, (1.0, -0.5, 2.0), combination(method)) < BOUNDS[method]


@pytest.mark.parametrize("method", ["cat", "ties", "dare_linear", "svd", "ties_svd"])
def test_one_adapter_is_merged_as_it_is_like_in_peft(alike: Case, method: str) -> None:
    assert compare(alike, ["a1"], (-0.5,), combination(method)) < FACTORS


@pytest.mark.parametrize("method", ["cat", "ties", "svd", "ties_svd"])
def test_a_model_merged_from_saved_adapters_equals_peft(
    alike: Case, tiny_model: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    """From the files on disk to the weights: every tensor, changed or not."""
    alike.model.save_pretrained(tmp_path, save_embedding_layers=False)
    specs = [
        f"{tmp_path / name}={weight}" for name, weight in zip(alike.names, WEIGHTS, strict=True)
    ]
    expected, _ = peft_deltas(alike, alike.names, WEIGHTS, combination(method))
    alike.model.delete_adapter("sum")
    source = open_source(str(tiny_model("llama")))
    merged = merged_source(source, [open_adapter(spec) for spec in specs], combination(method))
    assert merged.merge is not None
    assert len(merged.merge.changed) == len(expected)
    for role, tensor in source.tensors.items():
        delta = merged.tensors[role].load() - tensor.load()
        change = expected.get(tensor.name.removesuffix(".weight"), np.zeros(1))
        assert np.abs(delta - change).max() <= BOUNDS[method] * max(1, np.abs(change).max())


def test_linear_is_not_the_sum_of_the_adapters_and_cat_is(alike: Case) -> None:
    """Why cat is the default."""
    layer = next(
        layer for name, layer in alike.layers(["a0"]) if name.endswith("0.self_attn.q_proj")
    )
    exact = sum(
        weight * layer.get_delta_weight(name).detach().numpy().astype(np.float64)
        for name, weight in zip(alike.names, WEIGHTS, strict=True)
    )
    edits = [edit_of(layer, name) for name in alike.names]
    target = target_of("q_proj", layer)
    error = {}
    for method in ("cat", "linear", "svd"):
        delta = combined(edits, WEIGHTS, combination(method), target).delta(0, target.shape[0])
        error[method] = np.linalg.norm(delta - exact) / np.linalg.norm(exact)
    assert error["cat"] < 1e-6
    assert 0.1 < error["svd"] < 0.9  # rank 4 of 12
    assert error["linear"] > 0.9


def test_peft_scales_once_more_where_the_first_adapter_is_rslora_and_we_do_not(
    tiny_model: Callable[[str], Path],
) -> None:
    """The new adapter inherits ``use_rslora``: alpha / sqrt(r) of alpha = r is not 1."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}
    case = adapted(tiny_model("llama"), {**config, "use_rslora": True}, config)
    theirs, _ = peft_deltas(case, case.names, (1.0, 1.0), Combination())
    for name, layer in case.layers(["sum"]):
        target = target_of(name, layer)
        edits = [edit_of(layer, adapter) for adapter in case.names]
        ours = combined(edits, (1.0, 1.0), Combination(), target).delta(0, target.shape[0])
        exact = sum(layer.get_delta_weight(adapter).detach().numpy() for adapter in case.names)
        np.testing.assert_allclose(ours, exact, atol=1e-6 * np.abs(exact).max())
        np.testing.assert_allclose(theirs[name], ours * 8**0.5, rtol=1e-4, atol=1e-5)


def test_what_peft_refuses_is_refused(unlike: Case) -> None:
    with pytest.raises(ValueError, match="same r value"):
        peft_deltas(unlike, unlike.names, WEIGHTS, combination("ties"))
    layer = next(layer for name, layer in unlike.layers(["a0"]) if name.endswith("q_proj"))
    edits = [edit_of(layer, name) for name in unlike.names]
    with pytest.raises(AdapterError, match="ties needs adapters of one rank, got 3, 5, 7"):
        combined(edits, WEIGHTS, combination("ties"), target_of("q_proj", layer))


def test_as_many_are_kept_where_many_are_equal() -> None:
    """Which of equals at the edge is kept is torch's whim; how many are is not."""
    values = torch.round(torch.randn(97, 33, generator=torch.Generator().manual_seed(2)) * 3)
    theirs = peft.utils.merge_utils.magnitude_based_pruning(values, 0.4)
    ref = constant("values", values.numpy())
    ours = values.numpy().copy()
    LargestKept(ref, int(0.4 * ref.size)).prune(ours, 0)
    assert np.count_nonzero(ours) == np.count_nonzero(theirs.numpy())
    np.testing.assert_array_equal(
        np.sort(np.abs(ours), None), np.sort(np.abs(theirs.numpy()), None)
    )
