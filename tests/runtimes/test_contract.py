"""What every runtime promises: ``edgellm.runtimes.session.Session``, on every runtime alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from edgellm.errors import GenerationError, UnsupportedTarget, UsageError
from edgellm.hardware import detect
from edgellm.runtimes import RUNTIMES, llamacpp, ort, runtime_named, stepped
from edgellm.runtimes.session import KvState, Session
from edgellm.selftest import CHECKS

STEPS = {
    "fake": "_compute",
    "onnxruntime": "_run",
    "llamacpp": "_evaluate",
    "mlx": "_compute",
    "torch": "_compute",
    "onnxruntime-genai": "_compute",
}
"""What each session computes a step of a prompt with."""

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 500, 70)]


def fresh(session: Session, ids: list[int]) -> npt.NDArray[np.float32]:
    """Logits after ``ids``, computed at once from an empty cache."""
    session.trim(0)
    return session.prefill(ids)[-1].copy()


def assert_close(
    got: npt.NDArray[np.float32], wanted: npt.NDArray[np.float32], bound: float
) -> None:
    assert got.shape == wanted.shape
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("check", CHECKS)
def test_what_everyone_can_try_on_their_machine(
    check: str, open_session: Callable[..., Session], bound: float
) -> None:
    assert CHECKS[check](open_session) <= bound


def test_logits_depend_on_every_token(session: Session) -> None:
    # Within reach of the smallest window, so that no model may overlook it.
    whole = fresh(session, IDS[:20])
    changed = fresh(session, [*IDS[:15], IDS[15] ^ 1, *IDS[16:20]])
    assert np.abs(whole - changed).max() > 1e-2


def test_shapes_and_tokens(session: Session) -> None:
    assert session.prefill(IDS[:5]).shape == (1, session.vocab_size)
    assert session.decode(IDS[5]).shape == (session.vocab_size,)
    assert session.prefill(IDS[6:9], all_logits=True).shape == (3, session.vocab_size)
    assert list(session.tokens) == IDS[:9]
    assert session.context_tokens == 96


def test_the_last_position_is_the_default_again_after_all_logits(
    session: Session, bound: float
) -> None:
    rows = session.prefill(IDS[:4], all_logits=True).copy()
    session.trim(0)
    assert_close(session.prefill(IDS[:4])[-1], rows[-1], bound)


@pytest.mark.parametrize("kept", [0, 1, 12, 39, 40])
def test_trimming_equals_starting_over(session: Session, bound: float, kept: int) -> None:
    other = [token ^ 1 for token in IDS[kept:60]]
    wanted = fresh(session, [*IDS[:kept], *other])
    session.trim(0)
    session.prefill(IDS[:40])
    session.trim(kept)
    assert list(session.tokens) == IDS[:kept]
    assert_close(session.prefill(other)[-1], wanted, bound)


def test_a_saved_cache_is_not_touched_by_what_follows(session: Session, bound: float) -> None:
    session.prefill(IDS[:30])
    state = session.save()
    wanted = session.decode(IDS[30]).copy()
    for _ in range(2):
        session.restore(state)
        session.trim(10)
        session.prefill(IDS[40:55])
    session.restore(state)
    assert_close(session.decode(IDS[30]), wanted, bound)


def test_empty_cache_is_saved_and_restored(session: Session, bound: float) -> None:
    wanted = fresh(session, IDS[:9])
    session.trim(0)
    state = session.save()
    session.prefill(IDS[20:30])
    session.restore(state)
    assert list(session.tokens) == []
    assert_close(session.prefill(IDS[:9])[-1], wanted, bound)


def test_foreign_cache_is_refused(session: Session) -> None:
    session.prefill(IDS[:3])
    with pytest.raises(GenerationError, match="saved by abacus"):
        session.restore(KvState("abacus", (1, 2), b""))
    assert list(session.tokens) == IDS[:3]


@pytest.mark.parametrize("all_logits", [False, True])
def test_full_context_is_an_error_that_changes_nothing(
    open_session: Callable[..., Session], bound: float, all_logits: bool
) -> None:
    session = open_session(context_tokens=40)
    wanted = fresh(session, IDS[:36])
    session.trim(0)
    session.prefill(IDS[:35])
    with pytest.raises(GenerationError, match="holds 35 of 40 tokens and 6 more do not fit"):
        session.prefill(IDS[35:41], all_logits=all_logits)
    assert list(session.tokens) == IDS[:35]
    assert_close(session.decode(IDS[35]), wanted, bound)


def test_every_place_of_the_context_can_be_used(open_session: Callable[..., Session]) -> None:
    session = open_session(context_tokens=40)
    session.prefill(IDS[:39])
    assert np.isfinite(session.decode(IDS[39])).all()
    with pytest.raises(GenerationError, match="the context is full"):
        session.decode(1)
    assert len(session.tokens) == 40


@pytest.mark.parametrize("ids", [[], [-1], [1, 100_000]])
def test_impossible_tokens_are_refused(session: Session, ids: list[int]) -> None:
    session.prefill(IDS[:3])
    with pytest.raises(GenerationError):
        session.prefill(ids)
    assert list(session.tokens) == IDS[:3]


@pytest.mark.parametrize("length", [-1, 4])
def test_impossible_trims_are_refused(session: Session, length: int) -> None:
    session.prefill(IDS[:3])
    with pytest.raises(GenerationError, match="the cache holds 3"):
        session.trim(length)


def test_context_beyond_the_models_is_refused(open_session: Callable[..., Session]) -> None:
    with pytest.raises(UsageError, match="choose another --context"):
        open_session(context_tokens=100_000)


def test_cache_size_follows_the_context(
    open_session: Callable[..., Session], case: tuple[object, str]
) -> None:
    _, model = case
    small, large = open_session(context_tokens=32), open_session(context_tokens=256)
    for session in (small, large):
        session.prefill(IDS[:3])
    assert 0 < small.kv_bytes() <= large.kv_bytes()
    if model != "lfm2":  # whose states are as large in any context
        assert large.kv_bytes() % 256 == 0


def test_closed_session_gives_usable_errors(session: Session) -> None:
    session.prefill(IDS[:3])
    state = session.save()
    session.close()
    session.close()
    for use in (
        lambda: session.prefill([1]),
        lambda: session.decode(1),
        lambda: session.trim(0),
        lambda: session.restore(state),
        session.save,
        session.kv_bytes,
    ):
        with pytest.raises(GenerationError, match="closed"):
            use()


def test_closing_gives_memory_back(open_session: Callable[..., Session]) -> None:
    process = psutil.Process()

    def use() -> int:
        session = open_session(context_tokens=256)
        session.prefill(IDS, all_logits=True)
        session.close()
        return int(process.memory_info().rss)

    settled = [use() for _ in range(5)][-1]
    # A session of these models takes 2 MB and more; allocators may keep what a few have used.
    assert [use() for _ in range(20)][-1] - settled < 20 << 20


@pytest.mark.parametrize("all_logits", [False, True])
def test_interrupted_prefill_leaves_the_cache_as_it_was(
    open_session: Callable[..., Session],
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
    all_logits: bool,
) -> None:
    # Ctrl-C is heard between two steps of a long prompt; here a step is 16 tokens.
    monkeypatch.setattr(ort, "STEP_TOKENS", 16)
    monkeypatch.setattr(llamacpp, "BATCH_TOKENS", 16)
    monkeypatch.setattr(stepped, "STEP_TOKENS", 16)
    session = open_session()
    wanted = fresh(session, [*IDS[:10], 3])
    session.trim(10)
    step = STEPS[session.runtime]
    compute = getattr(session, step)
    calls = 0

    def interrupt(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        found = compute(*args, **kwargs)
        if calls == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(session, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(IDS[10:70], all_logits=all_logits)
    monkeypatch.undo()
    assert list(session.tokens) == IDS[:10]
    assert_close(session.decode(3), wanted, bound)


def test_capabilities_say_what_and_why() -> None:
    hardware = detect()
    for name in RUNTIMES:
        found = runtime_named(name).capabilities(hardware)
        assert found.runtime == name
        assert found.reason
        assert found.containers
        if found.available:
            assert "cpu" in found.devices


def test_unknown_device_is_refused(open_session: Callable[..., Session]) -> None:
    with pytest.raises(UnsupportedTarget, match="--device"):
        open_session(device="metal")
