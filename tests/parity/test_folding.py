"""A source whose coupled tensors are scaled computes what the original does, on every family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_models

from edgellm import forward
from edgellm.architectures.couplings import Coupling, couplings, left_out
from edgellm.calibration.folding import Folding, folded_source, folded_statistics
from edgellm.errors import TensorError
from edgellm.quant.grid import GRIDS
from edgellm.quant.scaling import Scaling, Weight
from edgellm.quant.statistics import Statistics
from edgellm.source import open_source
from edgellm.source.model import ModelSource

TinyModel = Callable[[str], Path]


def random_factors(
    weights: Sequence[Weight],
    statistics: Statistics,
    coupling: Coupling,
    *,
    corrected: bool = False,
) -> Scaling:
    """Factors from 1/4 to 4, another set for every coupling."""
    seed = [coupling.layer, *coupling.name.encode()]
    draw = np.random.default_rng(seed).uniform(-2, 2, coupling.channels)
    return Scaling(np.exp2(draw).astype(np.float32))


def some_statistics(columns: int, seed: int = 0) -> Statistics:
    x = np.random.default_rng(seed).standard_normal((50, columns)).astype(np.float32)
    return Statistics(x.T @ x / np.float32(50), np.abs(x).max(axis=0), 50)


def filled(source: ModelSource) -> tuple[ModelSource, Folding]:
    folded, folding = folded_source(source, random_factors)
    for unit in range(folding.units):
        roles = [role for each in folding.coupled if each.layer == unit for role in each.consumers]
        statistics = {role: some_statistics(source.tensors[role].columns) for role in roles}
        folding.fill_layer(unit, statistics, dict.fromkeys(roles, GRIDS["int4-g32"]))
    return folded, folding


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS))
def test_answers_stay_those_of_the_source(name: str, tiny_model: TinyModel) -> None:
    """Every coupled tensor is changed much; the logits, of spread 3 to 5, move by rounding."""
    source = open_source(str(tiny_model(name)))
    folded, folding = filled(source)
    window = tiny_models.some_token_ids(40)
    (wanted,) = forward.window_logits(source, [window], threads=1)
    (got,) = forward.window_logits(folded, [window], threads=1)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-4)
    changed = {
        role
        for role, ref in source.tensors.items()
        if not np.array_equal(ref.load(), folded.tensors[role].load())
    }
    assert changed == {role for role in source.tensors if folding.unit_of(role) is not None}


@pytest.mark.parametrize("name", sorted(tiny_models.MODELS))
def test_every_linear_is_coupled_or_left_out_with_a_reason(
    name: str, tiny_model: TinyModel
) -> None:
    source = open_source(str(tiny_model(name)))
    consumers = [role for each in couplings(source.decoder) for role in each.consumers]
    assert len(consumers) == len(set(consumers))
    linears = {
        row.role for row in source.family.tensors(source.decoder) if row.kind in ("linear", "head")
    }
    parts = {role.split(".")[-2] for role in linears - set(consumers)}
    if source.decoder.tied_head:
        parts.add("output")
    assert parts == set(left_out(source.decoder))
    for each in couplings(source.decoder):
        assert {source.tensors[role].columns for role in each.consumers} == {each.columns}


def test_rows_loaded_in_slabs_are_those_of_the_whole(tiny_model: TinyModel) -> None:
    """GPT-2's values are the last third of one product, whose columns are scaled as well."""
    folded, _ = filled(open_source(str(tiny_model("gpt2"))))
    ref = folded.tensors["blk.1.attn_qkv.weight"]
    slabs = [ref.load(start, min(start + 50, ref.rows)) for start in range(0, ref.rows, 50)]
    np.testing.assert_array_equal(np.concatenate(slabs), ref.load())
    np.testing.assert_array_equal(ref.load_columns(3, 9), ref.load()[:, 3:9])


def test_heads_of_a_group_share_the_factors_of_their_values(tiny_model: TinyModel) -> None:
    (coupling,) = (
        each
        for each in couplings(open_source(str(tiny_model("llama"))).decoder)
        if each.key == "1.attn_v"
    )
    assert (coupling.kv_heads, coupling.group, coupling.width) == (2, 3, 32)
    spread = coupling.spread(np.arange(64, dtype=np.float32)).reshape(6, 32)
    np.testing.assert_array_equal(spread[0], spread[2])
    np.testing.assert_array_equal(spread[3], np.arange(32, 64))
    by_channel = coupling.by_channel(spread.reshape(-1))
    np.testing.assert_array_equal(by_channel, [np.arange(64)] * 3)


def test_statistics_are_those_of_the_scaled_inputs() -> None:
    draw = np.random.default_rng(3)
    x = draw.standard_normal((64, 20)).astype(np.float32)
    factors = np.exp2(draw.uniform(-3, 3, 20)).astype(np.float32)
    given = Statistics(x.T @ x / np.float32(64), np.abs(x).max(axis=0), 64)
    scaled = x / factors
    found = folded_statistics(given, factors)
    np.testing.assert_allclose(found.hessian, scaled.T @ scaled / 64, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.largest, np.abs(scaled).max(axis=0), rtol=1e-6)
    assert found.tokens == 64
    diagonal = Statistics(given.importance, given.largest, 64)
    np.testing.assert_allclose(
        folded_statistics(diagonal, factors).importance, found.importance, rtol=1e-6
    )


def test_a_tensor_loaded_before_its_factors_are_known_raises(tiny_model: TinyModel) -> None:
    folded, folding = folded_source(open_source(str(tiny_model("llama"))), random_factors)
    assert folding.unit_of("token_embd.weight") is None
    assert folding.unit_of("blk.2.ffn_norm.weight") == 2
    folded.tensors["token_embd.weight"].load(0, 1)
    for role in ("blk.2.ffn_norm.weight", "blk.2.attn_v.weight", "output_norm.weight"):
        with pytest.raises(AssertionError, match=r"call fill_layer\((2|3), ...\) first"):
            folded.tensors[role].load(0, 1)


def test_recorded_factors_restore_the_tensors(tiny_model: TinyModel) -> None:
    source = open_source(str(tiny_model("qwen2")))
    folded, folding = filled(source)
    again, restored = folded_source(source, random_factors)
    for unit in range(folding.units):
        restored.restore(unit, folding.factors(unit))
    for role, ref in folded.tensors.items():
        np.testing.assert_array_equal(again.tensors[role].load(), ref.load())


def test_factors_that_are_not_finite_are_refused_by_name(tiny_model: TinyModel) -> None:
    def broken(
        weights: Sequence[Weight],
        statistics: Statistics,
        coupling: Coupling,
        *,
        corrected: bool = False,
    ) -> Scaling:
        return Scaling(np.full(coupling.channels, np.nan, np.float32))

    source = open_source(str(tiny_model("llama")))
    _, folding = folded_source(source, broken)
    role = "blk.0.ffn_down.weight"
    with pytest.raises(TensorError, match=r"blk\.0\.ffn_down\.weight are not all positive"):
        folding.fill_layer(0, {role: some_statistics(160)}, {role: GRIDS["int4-g32"]})
