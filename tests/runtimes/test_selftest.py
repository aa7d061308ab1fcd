"""``edgellm.selftest`` finds a runtime that breaks its promises, each by the check for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.runtimes import ort_package
from edgellm.runtimes.fake import FakeSession
from edgellm.selftest import CHECKS, Outcome, selftest

FLOATS = "the float network's logits"


def outcomes() -> dict[str, Outcome]:
    return {each.check: each for each in selftest("fake", "cpu").outcomes}


def test_a_runtime_without_a_model_fails_against_the_float_network_alone() -> None:
    found = outcomes()
    assert found.keys() == {*CHECKS, FLOATS}
    assert [check for check, each in found.items() if not each.passed] == [FLOATS]
    assert found[FLOATS].reason


def forgets_nothing(session: Any, original: Any, *arguments: Any) -> Any:
    session._tokens = session._tokens[: arguments[0]]


def restores_a_token_less(session: Any, original: Any, state: Any) -> None:
    original(session, state)
    session._tokens, session._states = session._tokens[:-1], session._states[:-1]


def computes_other_logits(session: Any, original: Any, token: int) -> Any:
    return original(session, token) + 1


def is_never_closed(session: Any, original: Any) -> None:
    pass


def is_never_full(session: Any, original: Any, token_ids: Any, **options: Any) -> Any:
    session.context_tokens = 10_000
    return original(session, token_ids, **options)


@pytest.mark.parametrize(
    ("method", "broken", "found_by"),
    [
        ("decode", computes_other_logits, {"token by token", "logits of all positions"}),
        ("trim", forgets_nothing, {"forgetting"}),
        ("restore", restores_a_token_less, {"save and restore"}),
        ("close", is_never_closed, {"closing"}),
        ("prefill", is_never_full, {"a full context"}),
    ],
)
def test_a_broken_promise_is_found(
    method: str,
    broken: Callable[..., Any],
    found_by: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(FakeSession, method)
    monkeypatch.setattr(
        FakeSession, method, lambda self, *args, **kwargs: broken(self, original, *args, **kwargs)
    )
    failed = {check for check, each in outcomes().items() if not each.passed}
    assert found_by <= failed


def test_what_cannot_be_tried_is_said() -> None:
    with pytest.raises(UsageError, match="abacus"):
        selftest("abacus")
    with pytest.raises(UnsupportedTarget, match="nothing to try on metal"):
        selftest("fake", "metal")


def test_what_a_backend_raises_is_a_row_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(self: FakeSession, token: int) -> None:
        raise ZeroDivisionError("a kernel's own words\nand more")

    monkeypatch.setattr(FakeSession, "decode", crash)
    found = outcomes()
    assert not found["token by token"].passed
    assert found["token by token"].reason == "a kernel's own words"
    assert found["a prompt in pieces"].passed


@pytest.mark.parametrize("runtime", ["onnxruntime", "onnxruntime-genai"])
def test_a_device_that_takes_halves_alone_is_tried_with_them(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, on the CPU, which computes in halves too."""
    pytest.importorskip(runtime.replace("-", "_"), reason=f"{runtime} is not installed")
    monkeypatch.setattr(ort_package, "HALVES_ON", frozenset({"cpu"}))
    found = selftest(runtime, "cpu").outcomes
    assert [each.check for each in found if not each.passed] == []
    differences = {each.check: each.difference for each in found}
    assert differences[FLOATS] is not None
    assert differences[FLOATS] > 1e-4, "in halves indeed"
