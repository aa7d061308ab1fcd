"""Divergence and perplexity from logits, against torch in float64 and against what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgellm import evaluation
from edgellm.evaluation import Comparison, compare


def logits(seed: int, tokens: int, vocab: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (tokens, vocab)).astype(np.float32)


WINDOWS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]


def test_figures_equal_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    ours = [logits(seed, len(window)) for seed, window in enumerate(WINDOWS)]
    theirs = [one + logits(seed + 10, len(one)) / 3 for seed, one in enumerate(ours)]
    found = compare(iter(ours), iter(theirs), WINDOWS)
    p, q = (torch.log_softmax(torch.tensor(np.concatenate(x)).double(), -1) for x in (ours, theirs))
    per_token = functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found.tokens == 11
    assert found.kl == pytest.approx(per_token.mean().item(), rel=1e-12)
    assert found.kl_error == pytest.approx(per_token.std().item() / 11**0.5, rel=1e-12)
    assert found.top1_agreement == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    for sets, perplexity in ((ours, found.reference_perplexity), (theirs, found.perplexity)):
        loss = sum(
            functional.cross_entropy(
                torch.tensor(one[:-1]).double(), torch.tensor(window[1:]), reduction="sum"
            ).item()
            for one, window in zip(sets, WINDOWS, strict=True)
            if len(window) > 1
        )
        assert perplexity == pytest.approx(math.exp(loss / 8), rel=1e-12)


def test_kl_of_two_coins() -> None:
    even, biased = np.log([[0.5, 0.5]]), np.log([[0.75, 0.25]])
    wanted = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    found = compare([even.astype(np.float32)], [biased.astype(np.float32)], [[0]])
    assert found.kl == pytest.approx(wanted, rel=1e-6)
    back = compare([biased.astype(np.float32)], [even.astype(np.float32)], [[0]])
    assert back.kl != pytest.approx(wanted, rel=1e-2)
    assert found.perplexity is None


def test_chunks_do_not_change_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = logits(1, 7), logits(2, 7)
    whole = compare([ours], [theirs], WINDOWS[:1])
    monkeypatch.setattr(evaluation, "CHUNK_VALUES", 3 * 50)
    parts = compare([ours], [theirs], WINDOWS[:1])
    assert parts.kl == pytest.approx(whole.kl, rel=1e-13)
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-13)
    assert parts.top1_agreement == whole.top1_agreement


def test_a_shift_of_all_logits_changes_nothing_and_large_ones_do_not_overflow() -> None:
    ours = logits(1, 7)
    same = compare([ours], [ours + np.float32(1000)], WINDOWS[:1])
    assert same.kl == pytest.approx(0, abs=1e-4)
    assert same.top1_agreement == 1.0
    huge = np.array([[1e30, 0.0], [1e30, 0.0]], np.float32)
    certain = compare([huge], [huge], [[1, 0]])
    assert (certain.kl, certain.perplexity, certain.kl_error) == (0.0, 1.0, 0.0)


def test_added_tokens_are_left_out() -> None:
    ours, theirs = logits(1, 3), logits(2, 3)
    more = np.concatenate([theirs, np.full((3, 4), 50, np.float32)], axis=1)
    comparison = Comparison()
    comparison.add(ours, more, WINDOWS[2])
    assert comparison.result() == compare([ours], [theirs], WINDOWS[2:])


def test_a_window_without_logits_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        compare([logits(1, 7)], [logits(2, 7)], WINDOWS)


class Counting:
    """A session that answers by what it holds: the logits of a position are its place."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def trim(self, length: int) -> None:
        del self.tokens[length:]

    def prefill(self, token_ids: list[int], *, all_logits: bool = False) -> np.ndarray:
        assert all_logits
        start = len(self.tokens)
        self.tokens += token_ids
        return np.arange(start, len(self.tokens), dtype=np.float32)[:, None]


def test_every_window_of_a_session_begins_at_nothing() -> None:
    session = Counting()
    session.tokens = [7, 7]
    found = list(evaluation.session_logits(session, WINDOWS))  # type: ignore[arg-type]
    assert [one[:, 0].tolist() for one in found] == [list(range(n)) for n in (7, 1, 3)]
    assert session.tokens == []
