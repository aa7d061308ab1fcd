"""Survival on cases whose answer is known: all kept, all erased, a change that noise drowns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from edgellm.errors import VerificationError
from edgellm.evaluation import Divergence
from edgellm.lora.check import projection, survival
from edgellm.lora.check.projection import low_rank_factors, orthonormal, projected_cosine
from edgellm.lora.check.survival import Survival
from edgellm.lora.edit import LowRank
from edgellm.lora.kinds.dora import DoraRows
from edgellm.lora.kinds.hira import HadamardOfWeight
from edgellm.tensors import TensorRef, constant

OUT, INTO, RANK = 512, 384, 8


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


A, B = normal(1, RANK, INTO), normal(2, OUT, RANK)
EDIT = LowRank(constant("a", A), constant("b", B), 0.01)
BEFORE = normal(3, OUT, INTO)
AFTER = BEFORE + 0.01 * B @ A


def cosine(rounded: Callable[[np.ndarray], np.ndarray]) -> float | None:
    return projected_cosine(constant("w", BEFORE), constant("w", AFTER), [EDIT], rounded)


def test_what_is_not_rounded_is_all_there() -> None:
    assert cosine(lambda rows: rows) == pytest.approx(1.0, abs=1e-6)


def test_what_is_rounded_away_is_gone() -> None:
    assert cosine(np.zeros_like) == 0.0
    assert cosine(lambda rows: np.rint(rows / 1e3) * 1e3) == 0.0


def test_a_change_turned_round_is_minus_one() -> None:
    assert cosine(lambda rows: -rows) == pytest.approx(-1.0, abs=1e-6)


class Noise:
    """Adds fresh noise on each call, as rounding with a coarse grid nearly does."""

    def __init__(self, size: float) -> None:
        self.size, self.draw, self.seen = size, np.random.default_rng(4), []

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        noisy = rows + self.size * self.draw.normal(0, 1, rows.shape).astype(np.float32)
        self.seen.append((rows, noisy))
        return noisy


def test_noise_that_drowns_the_plain_cosine_leaves_the_projected_one() -> None:
    delta = AFTER - BEFORE
    size = float(np.linalg.norm(delta)) / 40
    noise = Noise(size)
    found = cosine(noise)
    kept = [np.concatenate([noise.seen[n][1] for n in range(side, len(noise.seen), 2)])
            for side in (0, 1)]  # fmt: skip
    left = kept[0] - kept[1]
    plain = np.sum(left * delta) / np.linalg.norm(left) / np.linalg.norm(delta)
    assert plain < 0.1
    # Of the noise, RANK * RANK directions out of OUT * INTO are left.
    wanted = 40 / np.hypot(40, np.sqrt(2) * RANK)
    assert found == pytest.approx(wanted, abs=0.02)
    assert found > 0.95


def test_the_projection_is_that_of_the_definition() -> None:
    """P_U X P_V written out with projectors of numpy's QR."""
    rounded: Callable[[np.ndarray], np.ndarray] = lambda rows: np.rint(rows * 2) / 2  # noqa: E731
    u, v = np.linalg.qr(B.astype(np.float64))[0], np.linalg.qr(A.T.astype(np.float64))[0]
    true, kept = (
        u @ (u.T @ side.astype(np.float64) @ v) @ v.T
        for side in (AFTER - BEFORE, rounded(AFTER) - rounded(BEFORE))
    )
    wanted = np.sum(true * kept) / np.linalg.norm(true) / np.linalg.norm(kept)
    assert cosine(rounded) == pytest.approx(wanted, rel=1e-5)


def test_large_tensors_are_sampled_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "SAMPLE_BYTES", 4 * 32 * 4 * INTO)
    tiles = list(projection._sampled(OUT, INTO))
    assert tiles == [(0, 32), (128, 160), (256, 288), (384, 416)]
    assert list(projection._sampled(40, INTO)) == [(0, 32), (32, 40)]
    rows: list[int] = []

    def count(some: np.ndarray) -> np.ndarray:
        rows.append(len(some))
        return some

    assert cosine(count) == pytest.approx(1.0, abs=1e-6)
    assert sum(rows) == 2 * 128


def test_spans_of_dependent_columns() -> None:
    columns = normal(5, 60, 3).astype(np.float64)
    both = np.concatenate([columns, columns @ np.ones((3, 1)), np.zeros((60, 1))], axis=1)
    basis = orthonormal(both * np.array([1, 1e-12, 1, 1e6, 1]))
    assert basis.shape == (60, 3)
    np.testing.assert_allclose(basis.T @ basis, np.eye(3), atol=1e-9)
    np.testing.assert_allclose(basis @ (basis.T @ columns), columns, atol=1e-9)


def test_a_change_of_nothing_has_no_direction() -> None:
    same = constant("w", BEFORE)
    nothing = LowRank(constant("a", A), constant("b", np.zeros_like(B)), 1.0)
    assert projected_cosine(same, same, [nothing], lambda rows: rows) is None


def test_factors_of_other_kinds() -> None:
    dora = DoraRows(EDIT, constant("m", np.ones(len(B))), "w")
    assert low_rank_factors([EDIT, dora]) == [EDIT, EDIT]
    # HiRA multiplies its product into the weight: the change does not lie in the factors.
    assert low_rank_factors([EDIT, HadamardOfWeight(EDIT)]) is None
    assert low_rank_factors([]) is None


def divergence(kl: float) -> Divergence:
    return Divergence(
        kl=kl, kl_error=0.0, top1_agreement=1.0,
        reference_perplexity=None, perplexity=None, tokens=9,
    )  # fmt: skip


UNKNOWN = Survival(survival=None, reason="", text="builtin")


@pytest.mark.parametrize(
    ("base", "quantized", "wanted"), [(0.5, 0.1, 0.8), (0.5, 0.5, 0.0), (0.5, 1.0, -1.0)]
)
def test_survival_by_answers(base: float, quantized: float, wanted: float) -> None:
    found = survival.with_survival(UNKNOWN, divergence(base), divergence(quantized))
    assert found.survival == pytest.approx(wanted)
    assert found.reason == ""


def test_a_text_that_does_not_show_the_fine_tune_says_so() -> None:
    found = survival.with_survival(UNKNOWN, divergence(1e-6), divergence(0.1))
    assert found.survival is None
    assert "--check-text FILE" in found.reason
    survival.require(found, 0.9)


def test_too_little_is_refused_with_what_to_choose() -> None:
    found = survival.with_survival(UNKNOWN, divergence(0.5), divergence(0.4))
    survival.require(found, 0.0)
    survival.require(found, 0.2 - 1e-9)
    with pytest.raises(VerificationError, match=r"20% of the fine-tune is left .* 50% is asked"):
        survival.require(found, 0.5)
    with pytest.raises(VerificationError, match=r"--keep-adapters.*--min-survival 0"):
        survival.require(found, 0.5)


def test_keeping_adapters_apart_is_named_where_it_helps() -> None:
    """Where the change itself came through, a base that is rounded alike drowns it just as well."""
    for cosine, helps in ((0.5, True), (0.99, False)):
        weight = survival.WeightSurvival(role="w", name="w", grid="q2_k", cosine=cosine)
        known = Survival(survival=None, reason="", text="builtin", weights=(weight,))
        found = survival.with_survival(known, divergence(0.5), divergence(0.6))
        with pytest.raises(VerificationError) as refused:
            survival.require(found, None)
        assert ("--keep-adapters" in str(refused.value)) is helps
        assert ("cosine 0.990" in str(refused.value)) is not helps


def test_only_small_models_are_measured_unasked() -> None:
    def model(parameters: int) -> object:
        ref = TensorRef("w", "w", (parameters,), "f16", 0, lambda start, stop: normal(0, 1))
        return type("Source", (), {"tensors": {"w": ref}})()

    assert survival.affordable(model(135_000_000))  # type: ignore[arg-type]
    assert not survival.affordable(model(7_000_000_000))  # type: ignore[arg-type]
