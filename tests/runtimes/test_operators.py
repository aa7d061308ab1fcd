"""What every runtime that tells of its operators promises: ``TracedSession``, on tiny models."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, UnsupportedTarget
from edgellm.hardware import detect
from edgellm.profiling.operators import OUTSIDE, measure_operators
from edgellm.runtimes import fake, runtime_named
from edgellm.runtimes.operators import TracedStep
from edgellm.runtimes.session import RunOptions, Session

IDS = [int(token) for token in np.random.default_rng(7).integers(0, 500, 30)]
PROMPT = 20
TRACING = ("fake", "onnxruntime", "onnxruntime-genai", "llamacpp", "torch")


@dataclass
class Traced:
    """What a traced session computed of ``IDS``: the prompt at once, the rest one by one."""

    session: Any
    logits: list[np.ndarray[Any, Any]] = field(default_factory=list)
    wall_s: float = 0.0
    steps: list[TracedStep] = field(default_factory=list)

    @property
    def decoded(self) -> list[TracedStep]:
        return self.steps[PROMPT - len(IDS) :]


@pytest.fixture
def traces(case: Any) -> None:
    """Skips the runtimes that cannot."""
    found = runtime_named(case[0].runtime).capabilities(detect())
    assert found.traces_operators == (found.runtime in TRACING)
    assert found.tracing
    if not found.traces_operators:
        pytest.skip(found.tracing)


def answered(session: Session) -> list[np.ndarray[Any, Any]]:
    """Logits after the prompt and after each token behind it."""
    first = session.prefill(IDS[:PROMPT])[-1].copy()
    return [first, *(session.decode(token).copy() for token in IDS[PROMPT:])]


@pytest.fixture
def traced(traces: None, open_session: Callable[..., Session]) -> Traced:
    session: Any = open_session(trace=True)
    started = time.perf_counter()
    logits = answered(session)
    wall_s = time.perf_counter() - started
    return Traced(session, logits, wall_s, list(session.finish_trace()))


def test_answers_are_the_same_as_of_a_plain_session(
    traced: Traced, open_session: Callable[..., Session], bound: float
) -> None:
    for got, wanted in zip(traced.logits, answered(open_session()), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=0, atol=bound)


def test_every_step_is_there_with_its_tokens(traced: Traced) -> None:
    assert [step.tokens for step in traced.decoded] == [1] * (len(IDS) - PROMPT)
    before = traced.steps[: -len(traced.decoded)]
    assert sum(step.tokens for step in before) == PROMPT


def test_operators_follow_one_another_within_their_step(traced: Traced) -> None:
    # onnxruntime counts whole microseconds, and what floats cannot hold exactly is rounded.
    slack = 1e-9
    for one, next_one in itertools.pairwise(traced.steps):
        assert one.start_s + one.seconds <= next_one.start_s + slack
    for step in traced.steps:
        assert step.events
        times = [(event.start_s, event.start_s + event.seconds) for event in step.events]
        assert step.start_s <= times[0][0] + slack
        assert times[-1][1] <= step.start_s + step.seconds + slack
        assert all(one[1] <= other[0] + slack for one, other in itertools.pairwise(times))
    assert 0 < sum(step.seconds for step in traced.steps) <= traced.wall_s


def test_every_layer_is_found(traced: Traced, case: Any, artifact: Callable[..., Artifact]) -> None:
    chosen, model = case
    made = artifact(model, chosen.container).manifest
    assert made is not None
    layers = fake.LAYERS if chosen.runtime == "fake" else made.artifact.model.layer_count
    for step in traced.decoded:
        assert {event.layer for event in step.events} == {None, *range(layers)}
        in_order = [event.layer for event in step.events if event.layer is not None]
        # The states of later layers wait for nothing, and may be turned before.
        assert model == "lfm2" or in_order == sorted(in_order)


def test_operators_are_those_of_the_network(traced: Traced, case: Any) -> None:
    chosen, model = case
    layers = {"llama": 3, "gemma3": 4, "lfm2": 2}[model]
    # Beside those with attention, three layers whose short convolutions have two products.
    others = {"lfm2": 3 * (2 + 3)}.get(model, 0) + 1
    wanted = {
        # One product makes queries, keys and values, unless queries and keys are normed apart.
        "onnxruntime": {
            "MatMul": (5 if model == "llama" else 7) * layers + others,
            "GroupQueryAttention": layers,
        },
        # Without flash attention, as where the cache is f32, it takes two products and a softmax.
        "llamacpp": {"MUL_MAT": 9 * layers + others, "SOFT_MAX": layers}
        if chosen.kv_dtype == "f32"
        else {"MUL_MAT": 7 * layers + others, "FLASH_ATTN_EXT": layers},
        "torch": {"linear": 7 * layers + 1, "scaled_dot_product_attention": layers},
        "fake": {"Product": fake.LAYERS + 1, "Attention": fake.LAYERS},
    }[chosen.runtime.removesuffix("-genai")]
    for step in traced.decoded:
        # onnxruntime fuses products with what is around them, and calls those by another name.
        kinds = Counter(event.kind.replace("FusedMatMul", "MatMul") for event in step.events)
        assert {kind: kinds[kind] for kind in wanted} == wanted
        assert not {"VIEW", "RESHAPE", "PERMUTE", "NONE"} & set(kinds)


def test_the_products_of_a_layer_are_where_they_belong(traced: Traced, case: Any) -> None:
    kinds = ("MatMul", "FusedMatMul", "MUL_MAT", "linear", "Product")
    for step in traced.decoded:
        found = Counter(event.layer for event in step.events if event.kind in kinds)
        outside = found.pop(None)
        assert outside == 1  # the head
        assert len(set(found.values())) == (2 if case[1] == "lfm2" else 1)


def test_a_finished_session_is_closed(traced: Traced) -> None:
    for use in (traced.session.finish_trace, lambda: traced.session.decode(1)):
        with pytest.raises(GenerationError, match="closed"):
            use()


def test_a_plain_session_keeps_no_trace(traces: None, open_session: Callable[..., Session]) -> None:
    session: Any = open_session()
    session.prefill(IDS[:3])
    with pytest.raises(GenerationError, match=r"RunOptions\(trace=True\)"):
        session.finish_trace()
    session.decode(1)


@pytest.mark.parametrize("finished", [True, False])
def test_nothing_is_left_on_the_disk(
    traces: None,
    open_session: Callable[..., Session],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: bool,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    session: Any = open_session(trace=True)
    session.prefill(IDS[:3])
    session.finish_trace() if finished else session.close()
    assert list(tmp_path.iterdir()) == []


def test_a_token_is_broken_down(
    traces: None, case: Any, artifact: Callable[..., Artifact], tmp_path: Path
) -> None:
    chosen, model = case
    if chosen.kv_dtype != "f32":
        pytest.skip("once for each model is enough")
    file = tmp_path / "trace.json"
    found = measure_operators(
        runtime_named(chosen.runtime),
        artifact(model, chosen.container),
        RunOptions(threads=1),
        IDS[:PROMPT],
        tokens=4,
        trace=file,
    )
    assert found.tokens == 4
    assert found.watched_token_s
    for rows in (found.by_kind, found.by_layer):
        assert sum(row.share for row in rows) == pytest.approx(1.0)
    seconds = [row.seconds for row in found.by_kind]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) == pytest.approx(sum(row.seconds for row in found.by_layer))
    assert found.by_layer[-1].name == OUTSIDE
    assert_nested(json.loads(file.read_bytes())["traceEvents"])


def assert_nested(events: list[dict[str, Any]]) -> None:
    """Complete events by their start, each within the one that is open then, as Perfetto wants."""
    drawn = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in drawn} == {"step", "layer", "operator"}
    for thread in (1, 2):
        ends_ns: list[int] = []
        last_ns = 0
        for event in (event for event in drawn if event["tid"] == thread):
            start_ns = round(event["ts"] * 1000)
            end_ns = start_ns + round(event["dur"] * 1000)
            assert last_ns <= start_ns <= end_ns
            last_ns = start_ns
            while ends_ns and ends_ns[-1] <= start_ns:
                ends_ns.pop()
            assert bool(ends_ns) == (event["cat"] != "step")
            assert not ends_ns or end_ns <= ends_ns[-1]
            ends_ns.append(end_ns)


def test_mlx_refuses_and_says_why(artifact: Callable[..., Artifact]) -> None:
    pytest.importorskip("mlx_lm", reason="mlx_lm is not installed")
    runtime, model = runtime_named("mlx"), artifact("llama", "mlx")
    with pytest.raises(UnsupportedTarget, match="tells nobody what an operator took"):
        runtime.open(model, RunOptions(trace=True))
    found = measure_operators(runtime, model, RunOptions(), IDS[:3], tokens=1)
    assert "tells nobody" in found.reason
    assert found.by_kind == ()


def test_ctrl_c_while_llama_cpp_asks_is_heard(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    session: Any = runtime_named("llamacpp").open(
        artifact("llama", "gguf"), RunOptions(threads=1, context_tokens=96, trace=True)
    )
    wanted = session.prefill(IDS[:5]).copy()
    kind = session._watch._kind
    asked = itertools.count()

    def interrupted(tensor: int) -> bytes:
        if next(asked) == 7:
            raise KeyboardInterrupt
        return bytes(kind(tensor))

    monkeypatch.setattr(session._watch, "_kind", interrupted)
    session.trim(0)
    with pytest.raises(KeyboardInterrupt):
        session.prefill(IDS[:5])
    assert list(session.tokens) == []
    np.testing.assert_array_equal(session.prefill(IDS[:5]), wanted)
    assert [step.tokens for step in session.finish_trace()] == [5, 5]


def test_a_llama_cpp_that_tells_nodes_not_apart_is_refused(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
    from edgellm.runtimes import llamacpp_operators

    class Bare:
        _lib = object()

    monkeypatch.setattr(llamacpp_operators, "library_folder", lambda: tmp_path)
    with pytest.raises(UnsupportedTarget, match="does not export ggml_get_name"):
        llamacpp_operators.OperatorWatch(Bare())
