"""Models whose layers keep a state: what goes back in a text answers as what never went on."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.drafting import Lookahead
from edgellm.errors import GenerationError, UnsupportedModel, UnsupportedTarget
from edgellm.generate import SINK_TOKENS, AnswerStream
from edgellm.prefix_cache import PrefixCache
from edgellm.runtimes import runtime_named
from edgellm.runtimes.checkpoints import EVERY_TOKENS, MOST_STATES, Checkpoints, steps_of
from edgellm.runtimes.session import RunOptions, Session

MODELS = ("lfm2", "mamba", "mamba2")
BOUND = 1e-3
CONTEXT = 256
IDS = [int(token) for token in np.random.default_rng(11).integers(4, 500, CONTEXT)]

CONTAINERS = {"onnxruntime": "onnx", "llamacpp": "gguf", "onnxruntime-genai": "onnx"}
MODULES = {
    "onnxruntime": "onnxruntime",
    "llamacpp": "llama_cpp",
    "onnxruntime-genai": "onnxruntime_genai",
}
CASES = [
    *((runtime, model) for runtime in ("onnxruntime", "llamacpp") for model in MODELS),
    ("onnxruntime-genai", "lfm2"),
]


@pytest.fixture(params=CASES, ids="-".join)
def open_session(
    request: pytest.FixtureRequest, artifact: Callable[..., Artifact]
) -> Iterator[Callable[[int], Session]]:
    """``open_session(context_tokens)``: a session of each runtime."""
    runtime, model = request.param
    if importlib.util.find_spec(MODULES[runtime]) is None:
        pytest.skip(f"{MODULES[runtime]} is not installed")
    opened = []

    def make(context_tokens: int) -> Session:
        options = RunOptions(context_tokens=context_tokens, threads=1, kv_dtype="f32")
        stored = artifact(model, CONTAINERS[runtime])
        opened.append(runtime_named(runtime).open(stored, options))
        return opened[-1]

    yield make
    for session in opened:
        session.close()


@pytest.fixture
def session(open_session: Callable[[int], Session]) -> Session:
    return open_session(CONTEXT)


@pytest.fixture(params=CASES[:-1], ids="-".join)
def open_chat(request: pytest.FixtureRequest, artifact: Callable[..., Artifact]) -> Any:
    runtime, model = request.param
    if importlib.util.find_spec(MODULES[runtime]) is None:
        pytest.skip(f"{MODULES[runtime]} is not installed")

    def make(**options: Any) -> Any:
        path = artifact(model, CONTAINERS[runtime]).path
        return edgellm.open(path, threads=1, kv_dtype="f32", **options)

    return make


def fresh(session: Session, ids: list[int]) -> np.ndarray:
    session.trim(0)
    return session.prefill(ids)[-1].copy()


def test_any_place_can_be_gone_back_to(session: Session) -> None:
    """Behind the prompt, between two states, to the first token, and on from there one by one."""
    places = (199, 130, 64, 63, 7, 1)
    other = IDS[200:210]
    wanted = {place: fresh(session, [*IDS[:place], *other]) for place in places}
    session.trim(0)
    session.prefill(IDS[:150])
    for token in IDS[150:200]:
        session.decode(token)
    for place in places:
        session.trim(place)
        assert list(session.tokens) == IDS[:place]
        got = session.prefill(other)[-1]
        np.testing.assert_allclose(got, wanted[place], rtol=0, atol=BOUND)
        session.trim(place)
        for token in other:
            got = session.decode(token)
        np.testing.assert_allclose(got, wanted[place], rtol=0, atol=BOUND)
        session.trim(place)


def test_all_logits_are_of_the_new_tokens_alone(session: Session) -> None:
    wanted = session.prefill(IDS[:60], all_logits=True).copy()
    session.trim(3)
    rows = session.prefill(IDS[3:9], all_logits=True)
    np.testing.assert_allclose(rows, wanted[3:9], rtol=0, atol=BOUND)
    session.trim(8)
    for start in range(8, 60, 13):
        rows = session.prefill(IDS[start : start + 13], all_logits=True)
        np.testing.assert_allclose(rows, wanted[start : start + 13], rtol=0, atol=BOUND)


def test_a_cache_that_is_saved_behind_a_cut_is_whole(session: Session) -> None:
    wanted = fresh(session, [*IDS[:70], 9])
    session.trim(0)
    session.prefill(IDS[:100])
    session.trim(70)
    state = session.save()
    session.prefill(IDS[120:140])
    session.restore(state)
    assert list(session.tokens) == IDS[:70]
    np.testing.assert_allclose(session.decode(9), wanted, rtol=0, atol=BOUND)
    session.restore(state)
    session.trim(66)
    for token in (*IDS[66:70], 9):
        got = session.decode(token)
    np.testing.assert_allclose(got, wanted, rtol=0, atol=BOUND)


class FailingGuesses:
    """Guesses one token right, and the others wrong."""

    def draft(self, tokens: Any, count: int) -> Any:
        place = len(tokens)
        return [IDS[place], *(token ^ 1 for token in IDS[place + 1 : place + count])]

    def close(self) -> None:
        pass


def test_guesses_that_fail_again_and_again_change_nothing(session: Session) -> None:
    wanted = session.prefill(IDS[:120], all_logits=True).copy()
    session.trim(0)
    session.prefill(IDS[:40])
    ahead = Lookahead(session, FailingGuesses())
    for place in range(40, 120):
        got = ahead.logits_after(IDS[: place + 1], 100)
        np.testing.assert_allclose(got, wanted[place], rtol=0, atol=BOUND)
    assert ahead.guessed > 2 * ahead.taken > 40


def test_prompts_that_begin_alike_are_restored_and_answered_alike(open_chat: Any) -> None:
    system = "You know this page by heart, and nothing else in the whole wide world. " * 2
    questions = ("who?", "and what else is there?")
    wanted = []
    for question in questions:
        with open_chat(system=system) as chat:
            wanted.append(chat.generate(question, max_tokens=8).token_ids)
    prefixes = PrefixCache()
    found = []
    for question in questions:
        with open_chat(system=system, prefix_cache=prefixes) as chat:
            found.append(chat.generate(question, max_tokens=8))
    assert [answer.token_ids for answer in found] == wanted
    assert found[1].prefilled_tokens < found[1].prompt_tokens - len(system) // 8
    assert prefixes.hits == 1


class Plain:
    """A tokenizer whose text nobody reads; no token ends an answer."""

    eos_token_ids = ()

    def decode_stream(self) -> Any:
        return self

    def step(self, token_id: int) -> str:
        return "."

    def finish(self) -> str:
        return ""


def test_a_full_context_goes_on(open_session: Callable[[int], Session]) -> None:
    """What is kept is computed anew, so that its states are of what is kept alone."""
    room, count = 64, 120
    stream = AnswerStream(
        open_session(room), Plain(), IDS[:10], max_tokens=count, context_policy="sinks"
    )
    found = stream.answer().token_ids
    session, held, wanted = open_session(room), IDS[:10], []
    while len(wanted) < count:
        token = int(fresh(session, held).argmax())
        wanted.append(token)
        held = [*held, token]
        if len(held) > room:
            held = [*held[:SINK_TOKENS], *held[-((room - SINK_TOKENS) // 2) :]]
    assert list(found) == wanted


def test_another_models_cache_is_refused(artifact: Callable[..., Artifact]) -> None:
    for runtime in ("onnxruntime", "llamacpp"):
        if importlib.util.find_spec(MODULES[runtime]) is None:
            continue
        options = RunOptions(context_tokens=64, threads=1, kv_dtype="f32")
        sessions = [
            runtime_named(runtime).open(artifact(model, CONTAINERS[runtime]), options)
            for model in ("lfm2", "llama")
        ]
        states = []
        for session in sessions:
            session.prefill(IDS[:9])
            states.append(session.save())
        for session, state in zip(sessions, reversed(states), strict=True):
            with pytest.raises(GenerationError, match="of another model"):
                session.restore(state)
            assert list(session.tokens) == IDS[:9]
            session.close()


@pytest.mark.parametrize(
    ("container", "refusal"),
    [("hf", "keeps more than keys and values"), ("mlx", "mlx-lm's .* is not understood")],
)
@pytest.mark.parametrize("model", MODELS)
def test_what_holds_no_states_says_so(
    model: str, container: str, refusal: str, artifact: Callable[..., Artifact]
) -> None:
    if importlib.util.find_spec({"hf": "transformers", "mlx": "mlx_lm"}[container]) is None:
        pytest.skip("its runtime is not installed")
    with pytest.raises((UnsupportedModel, UnsupportedTarget), match=refusal):
        edgellm.open(artifact(model, container).path, threads=1)


# --- the states that are kept


def test_states_that_are_kept_stand_closer_towards_the_end() -> None:
    kept = Checkpoints()
    for length in range(16, 16 * 1000, 16):
        kept.keep(length, np.full(3, length))
    lengths, states = kept.copies()
    assert len(lengths) == MOST_STATES
    assert (states[:, 0] == lengths).all()
    gaps = np.diff(lengths.astype(int))
    assert gaps[-8:].max() < gaps[:8].min()
    for length in (15999, 8000, 1000):
        place, state = kept.back_to(length)
        assert place <= length
        assert state is not None
        assert state[0] == place
    assert kept.back_to(3) == (0, None)
    assert kept.nbytes == 0


def test_few_large_states_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgellm.runtimes.checkpoints.BUDGET_BYTES", 100)
    kept = Checkpoints()
    for length in range(1, 9):
        kept.keep(length, np.zeros(90, np.uint8))
    assert kept.copies()[0].tolist() == [7, 8]
    assert kept.due(8 + EVERY_TOKENS)
    assert not kept.due(7 + EVERY_TOKENS)


def test_damaged_states_are_refused() -> None:
    kept = Checkpoints()
    with pytest.raises(GenerationError, match="damaged"):
        kept.take((np.array([5, 3], np.uint32), np.zeros((2, 4))))


@pytest.mark.parametrize(
    ("behind", "count", "wanted"),
    [
        (0, 20, [(0, 8), (8, 16), (16, 20)]),
        (16, 17, [(0, 8), (8, 16), (16, 17)]),
        (17, 20, [(0, 8), (8, 16), (16, 17), (17, 20)]),
        (0, 0, []),
    ],
)
def test_many_tokens_that_are_computed_anew_have_steps_of_their_own(
    behind: int, count: int, wanted: list[tuple[int, int]]
) -> None:
    assert [(step.start, step.stop) for step in steps_of(behind, count, 8)] == wanted
