"""Sampling against a straightforward reference: softmax over everything, filters one by one."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgellm.errors import GenerationError, UsageError
from edgellm.sampling import Sampler, SamplingOptions

RANDOM = np.random.default_rng(5)


def reference(logits: npt.NDArray[np.float32], options: SamplingOptions) -> dict[int, float]:
    """Probability by token, each filter on the renormalized rest of the one before."""
    exact = logits.astype(np.float64) / options.temperature
    weights = np.exp(exact - exact.max())
    probabilities = {token: float(weight) for token, weight in enumerate(weights / weights.sum())}
    falling = sorted(probabilities, key=lambda token: (-logits[token], token))
    if options.top_k:
        falling = falling[: options.top_k]
    total = sum(probabilities[token] for token in falling)
    kept, before = [], 0.0
    for token in falling:
        if options.top_p == 1 or before < options.top_p:
            kept.append(token)
        before += probabilities[token] / total
    best = probabilities[kept[0]]
    kept = [token for token in kept if probabilities[token] >= options.min_p * best]
    total = sum(probabilities[token] for token in kept)
    return {token: probabilities[token] / total for token in kept}


@settings(deadline=None, max_examples=150)
@given(
    size=st.integers(1, 900),
    seed=st.integers(0, 1000),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 40, 5000]),
    top_p=st.sampled_from([0.05, 0.5, 0.93, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
)
def test_candidates_equal_the_reference(
    size: int,
    seed: int,
    spread: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = (np.random.default_rng(seed).normal(size=size) * spread).astype(np.float32)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids, probabilities = Sampler(options).candidates(logits, ())
    wanted = reference(logits, options)
    assert set(ids.tolist()) == set(wanted)
    for token, probability in zip(ids.tolist(), probabilities, strict=True):
        assert probability == pytest.approx(wanted[token], rel=1e-9)


def test_flat_logits_need_more_candidates_than_the_first_guess() -> None:
    logits = np.zeros(5000, np.float32)
    ids, _ = Sampler(SamplingOptions(temperature=1, top_p=0.9)).candidates(logits, ())
    assert len(ids) == pytest.approx(4500, abs=1)


def test_equal_logits_are_taken_in_order_of_their_ids() -> None:
    logits = np.array([1, 3, 3, 2, 3], np.float32)
    ids, _ = Sampler(SamplingOptions(temperature=1, top_k=2)).candidates(logits, ())
    assert ids.tolist() == [1, 2]
    assert Sampler(SamplingOptions()).pick(logits, ()) == 1


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    sampler = Sampler(SamplingOptions(temperature=1, seed=3))
    count = 20_000
    drawn = Counter(sampler.pick(logits, ()) for _ in range(count))
    for token, probability in enumerate([0.5, 0.3, 0.15, 0.05]):
        # Five standard deviations of a binomial.
        bound = 5 * np.sqrt(count * probability * (1 - probability))
        assert abs(drawn[token] - count * probability) < bound


def test_same_seed_gives_same_tokens_and_a_fresh_one_is_told() -> None:
    rows = RANDOM.normal(size=(30, 500)).astype(np.float32)

    def draw(seed: int | None) -> tuple[list[int], int]:
        sampler = Sampler(SamplingOptions(temperature=1, seed=seed))
        return [sampler.pick(row, ()) for row in rows], sampler.seed

    tokens, seed = draw(None)
    assert draw(seed) == (tokens, seed)
    assert draw(seed + 1)[0] != tokens


def test_repeat_penalty_works_on_positive_and_negative_logits() -> None:
    logits = np.array([4.0, 3.0, -1.0, -2.0], np.float32)
    options = SamplingOptions(temperature=1, repeat_penalty=2.0)
    ids, probabilities = Sampler(options).candidates(logits, [0, 2, 0])
    weights = np.exp(np.array([2.0, 3.0, -2.0, -2.0]))
    np.testing.assert_allclose(probabilities[np.argsort(ids)], weights / weights.sum(), rtol=1e-6)
    np.testing.assert_array_equal(logits, [4, 3, -1, -2])  # the session's buffer is not touched


@pytest.mark.parametrize(("window", "best"), [(None, 1), (2, 1), (1, 0), (0, 0)])
def test_repeat_window_counts_from_the_end(window: int | None, best: int) -> None:
    options = SamplingOptions(repeat_penalty=2.0, repeat_window=window)
    assert Sampler(options).pick(np.array([4.0, 3.0, 0], np.float32), [0, 2]) == best


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_damaged_logits_are_an_error(bad: float, temperature: float) -> None:
    logits = np.full(10, -np.inf if bad == -np.inf else 1.0, np.float32)
    logits[7] = bad
    with pytest.raises(GenerationError, match="best next token"):
        Sampler(SamplingOptions(temperature=temperature)).pick(logits, ())


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[[2, 6]] = 0
    sampler = Sampler(SamplingOptions(temperature=1, seed=0))
    assert {sampler.pick(logits, ()) for _ in range(100)} == {2, 6}


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"repeat_penalty": 0.0},
        {"repeat_window": -1},
        {"seed": -1},
    ],
)
def test_values_out_of_range_are_named(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=f"{name} is .*: choose "):
        SamplingOptions(**wrong)  # type: ignore[arg-type]
