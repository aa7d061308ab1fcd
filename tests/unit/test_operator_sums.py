"""Operators by name, and what is summed and drawn of them, from events made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from edgellm.artifact import Artifact
from edgellm.errors import GenerationError, OutputError, UnsupportedTarget
from edgellm.profiling import operators
from edgellm.profiling.chrome_trace import chrome_trace
from edgellm.profiling.operators import OUTSIDE, by_kind, by_layer, measure_operators
from edgellm.runtimes import fake
from edgellm.runtimes.fake import FakeRuntime
from edgellm.runtimes.llamacpp_operators import layers_of_nodes
from edgellm.runtimes.operators import OperatorEvent, TracedStep, layer_of_node
from edgellm.runtimes.ort_trace import OrtTrace, read_profile
from edgellm.runtimes.session import RunOptions


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blk.3.attn_qkv", 3),
        ("blk.12.ffn_down", 12),
        ("/model/layers.7/attn/q_proj/MatMul_Q4", 7),
        ("model.layers.0.self_attn.o_proj", 0),
        ("/transformer/h.11/mlp/c_fc/MatMul", 11),
        ("decoder/block_4/add", 4),
        ("/model/layers.30/final_norm_layernorm/SkipLayerNorm", None),
        ("token_embd", None),
        ("logits", None),
        ("positions.total", None),
        ("/lm_head/MatMul", None),
        ("/model/players.4/x", None),
        ("graph.3.x", None),
        ("", None),
    ],
)
def test_an_onnx_nodes_name_tells_its_layer(name: str, layer: int | None) -> None:
    assert layer_of_node(name) == layer


def test_a_ggml_nodes_layer_is_its_own_or_that_of_both_its_neighbours() -> None:
    names = {
        "embd": None,
        "inp_scaled": None,
        "norm-0": 0,
        "Kcur-0 (view)": 0,
        "cache_k_l0 (view) (permuted)": 0,
        "node_21": 0,
        "attn_out-0": 0,
        "node_29": 0,
        "norm": 0,
        "l_out-0": 0,
        "node_31": None,  # between two layers
        "attn_norm-1": 1,
        "ffn_moe_topk-1 (copy of x-7)": 1,
        "l_out-1": 1,
        "norm ": None,
        "result_norm": None,
        "result_output": None,
    }
    assert dict(zip(names, layers_of_nodes(list(names)), strict=True)) == names


def test_nameless_ggml_graphs_have_no_layers() -> None:
    assert layers_of_nodes([]) == []
    assert layers_of_nodes(["node_1", "node_2"]) == [None, None]


def step(start_s: float, *rows: tuple[str, int | None, float], tokens: int = 1) -> TracedStep:
    """One whose operators follow one another, a millisecond between them."""
    events, begins = [], start_s + 0.001
    for kind, layer, seconds in rows:
        events.append(OperatorEvent(f"{kind} of {layer}", kind, layer, begins, seconds))
        begins += seconds + 0.001
    return TracedStep(tokens, start_s, begins - start_s, tuple(events))


STEPS = [
    step(2.0, ("Gather", None, 0.5), ("MatMul", 0, 3.0), ("MatMul", 1, 4.0), ("MatMul", None, 1.0)),
    step(20.0, ("Gather", None, 0.5), ("MatMul", 0, 5.0), ("Add", 1, 0.5), ("MatMul", None, 1.5)),
]


def test_kinds_are_summed_over_the_steps_the_dearest_first() -> None:
    rows = by_kind(STEPS)
    assert [(row.name, row.seconds, row.calls) for row in rows] == [
        ("MatMul", 7.25, 2.5),
        ("Gather", 0.5, 1.0),
        ("Add", 0.25, 0.5),
    ]
    assert [row.share for row in rows] == pytest.approx([7.25 / 8, 0.5 / 8, 0.25 / 8])


def test_layers_stand_in_their_order_and_the_rest_comes_last() -> None:
    many = [step(0.0, *((("MatMul", layer, 1.0)) for layer in (None, 10, 2, 9, 0)))]
    assert [row.name for row in by_layer(many)] == [
        "layer 0", "layer 2", "layer 9", "layer 10", OUTSIDE,
    ]  # fmt: skip
    rows = by_layer(STEPS)
    assert [(row.name, row.seconds, row.calls) for row in rows] == [
        ("layer 0", 4.0, 1.0),
        ("layer 1", 2.25, 1.0),
        (OUTSIDE, 1.75, 2.0),
    ]
    assert sum(row.share for row in rows) == pytest.approx(1.0)


def test_nothing_seen_is_no_rows() -> None:
    assert by_kind([]) == by_layer([]) == by_kind([step(0.0)]) == ()
    assert by_kind([step(0.0, ("Shape", None, 0.0))])[0].share == 0.0


def test_the_trace_nests_operators_in_layers_in_steps() -> None:
    prompt = step(1.0, ("MatMul", 0, 0.25), ("Add", 0, 0.25), ("MatMul", None, 0.25), tokens=5)
    content = json.loads(chrome_trace([prompt, *STEPS], decoded=2))
    drawn = [event for event in content["traceEvents"] if event["ph"] == "X"]
    prompts = [event for event in drawn if event["tid"] == 1]
    assert [(event["cat"], event["name"]) for event in prompts] == [
        ("step", "5 tokens"),
        ("layer", "layer 0"),
        ("operator", "MatMul"),
        ("operator", "Add"),
        ("operator", "MatMul"),
    ]
    assert prompts[0]["ts"] == 0
    assert prompts[1]["ts"] == 1000.0
    assert prompts[1]["dur"] == 501_000.0
    assert prompts[2]["args"] == {"name": "MatMul of 0", "layer": 0}
    assert prompts[4]["args"] == {"name": "MatMul of None"}
    titles = [event["name"] for event in drawn if event["tid"] == 2 and event["cat"] == "step"]
    assert titles == ["token 1", "token 2"]
    sections = {
        event["tid"]: event["args"]["name"]
        for event in content["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert sections == {1: "prompt", 2: "decoding"}


def test_no_steps_are_an_empty_trace() -> None:
    found = json.loads(chrome_trace([], decoded=0))
    assert all(event["ph"] == "M" for event in found["traceEvents"])


# --- onnxruntime's profile -----------------------------------------------------------------------


def node(name: str, kind: str, ts: int, dur: int, suffix: str = "_kernel_time") -> dict[str, Any]:
    return {
        "cat": "Node", "name": name + suffix, "ts": ts, "dur": dur, "args": {"op_name": kind},
    }  # fmt: skip


def run(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


PROFILE = [
    {"cat": "Session", "name": "session_initialization", "ts": 1, "dur": 90, "args": {}},
    node("blk.0.attn", "GroupQueryAttention", 101, 10),
    node("blk.0.attn", "GroupQueryAttention", 111, 0, "_fence_after"),
    # A branch comes after what it computed, in whose time that lies.
    node("inner/layers.9/a", "Mul", 112, 3),
    node("inner/layers.9/b", "Add", 116, 2),
    node("/model/layers.1/choice", "If", 111, 9),
    node("logits", "MatMul", 120, 0),
    run(100, 21),
    node("blk.0.attn", "GroupQueryAttention", 130, 5),
    run(130, 7),
]


def test_a_profile_is_read_run_by_run_and_nothing_counts_twice() -> None:
    first, second = read_profile(json.dumps(PROFILE).encode())
    assert [(event.name, event.kind, event.layer) for event in first.events] == [
        ("blk.0.attn", "GroupQueryAttention", 0),
        ("/model/layers.1/choice", "If", 1),
        ("logits", "MatMul", None),
    ]
    assert [event.seconds for event in first.events] == pytest.approx([1e-5, 9e-6, 0.0])
    assert first.seconds == pytest.approx(21e-6)
    assert (second.start_s, len(second.events)) == (pytest.approx(130e-6), 1)


def test_a_last_operator_that_seems_to_end_after_its_run_is_still_its_own() -> None:
    late = [run(10, 5), node("a", "Add", 11, 3), node("b", "Mul", 15, 2), run(30, 5)]
    first, second = read_profile(json.dumps(late).encode())
    assert [event.kind for event in first.events] == ["Add", "Mul"]
    assert first.seconds == pytest.approx(7e-6)
    assert second.events == ()


def written(content: bytes, runs: int = 0) -> OrtTrace:
    trace = OrtTrace("cpu", ("cpu",))
    for _ in range(runs):
        trace.ran(3)
    Path(f"{trace.prefix}_2026.json").write_bytes(content)
    return trace


def test_what_was_run_is_told_with_its_tokens() -> None:
    steps = written(json.dumps(PROFILE).encode(), runs=2).steps()
    assert [step.tokens for step in steps] == [3, 3]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[", "cannot be understood"),
        (b'[{"cat": "Node"}]', "cannot be understood"),
        (b"[]", "has 0 runs of the graph, and there were 2"),
    ],
)
def test_a_profile_that_lacks_something_is_an_error(content: bytes, said: str) -> None:
    trace = written(content, runs=2)
    with pytest.raises(GenerationError, match=said):
        trace.steps()
    assert not Path(trace.prefix).parent.exists()


def test_what_computes_beside_the_cpu_is_not_traced() -> None:
    with pytest.raises(UnsupportedTarget, match=r"hands an operator to cuda.*--device cpu"):
        OrtTrace("cuda", ("cpu", "coreml"))


# --- measuring -----------------------------------------------------------------------------------

PLAIN = Artifact(path=Path("model.gguf"), main=Path("model.gguf"), container="gguf")


def test_a_token_is_broken_down(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    found = measure_operators(FakeRuntime(), PLAIN, RunOptions(), [1, 2, 3], tokens=4, trace=file)
    assert (found.source, found.tokens, found.reason) == ("made up", 4, "")
    assert [(row.name, row.calls) for row in found.by_kind] == [
        ("Product", 3.0),
        ("Attention", 2.0),
    ]
    assert [row.share for row in found.by_kind] == pytest.approx([2.5 / 3, 0.5 / 3])
    assert [row.name for row in found.by_layer] == ["layer 0", "layer 1", OUTSIDE]
    assert found.token_s
    assert found.watched_token_s
    assert found.overhead == pytest.approx(found.watched_token_s / found.token_s - 1)
    assert found.trace == str(file)
    names = [event["name"] for event in json.loads(file.read_bytes())["traceEvents"]]
    assert "3 tokens" in names
    assert f"token {4 + operators.SETTLING_TOKENS}" in names


def test_tokens_that_were_disturbed_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert operators.quicker_half([5.0, 1.0, 9.0, 2.0]) == [1, 3]
    assert operators.quicker_half([5.0, 1.0, 9.0]) == [0, 1]
    assert operators.quicker_half([5.0]) == [0]

    def of_token(tokens: int, start_s: float, end_s: float) -> TracedStep:
        return step(start_s, (f"kind {next(made)}", None, 1.0), tokens=tokens)

    made = iter(range(99))
    clock = iter([0.0, 0.1] * 6 + [0.0, 0.1] * 2 + [0.0, 8.0, 0.0, 2.0, 0.0, 9.0, 0.0, 4.0])
    monkeypatch.setattr(fake, "_made_up", of_token)
    monkeypatch.setattr(operators, "perf_counter", lambda: next(clock))
    found = measure_operators(FakeRuntime(), PLAIN, RunOptions(), [1, 2, 3], tokens=4)
    # 0 is the prompt, 1 and 2 settle; of 3 to 6 the second and the last were quicker.
    assert [row.name for row in found.by_kind] == ["kind 4", "kind 6"]
    assert (found.token_s, found.watched_token_s) == (pytest.approx(0.1), pytest.approx(3.0))
    assert found.overhead == pytest.approx(29.0)
    assert found.tokens == 4


def test_only_the_last_tokens_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_many(tokens: int, start_s: float, end_s: float) -> TracedStep:
        return step(start_s, ("Prompt" if tokens > 1 else "Token", None, 1.0), tokens=tokens)

    monkeypatch.setattr(fake, "_made_up", of_many)
    found = measure_operators(FakeRuntime(), PLAIN, RunOptions(), [1, 2, 3], tokens=2)
    assert [(row.name, row.seconds) for row in found.by_kind] == [("Token", 1.0)]


def test_a_trace_without_the_tokens_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "_made_up", lambda tokens, *_: step(0.0, tokens=tokens + 1))
    with pytest.raises(GenerationError, match=r"given 2 tokens one by one.*\[2, 2\]"):
        measure_operators(FakeRuntime(), PLAIN, RunOptions(), [1], tokens=2)


def test_a_runtime_that_cannot_says_why(tmp_path: Path) -> None:
    class Silent(FakeRuntime):
        def capabilities(self, hardware: Any) -> Any:
            found = super().capabilities(hardware)
            return type(found)("silent", True, found.reason)

    class OnAGpu(FakeRuntime):
        def open(self, artifact: Artifact, options: RunOptions) -> Any:
            if options.trace:
                OrtTrace("cuda", ("cpu",))
            return super().open(artifact, options)

    for runtime, said in ((Silent(), "silent does not tell"), (OnAGpu(), "hands an operator")):
        file = tmp_path / "trace.json"
        found = measure_operators(runtime, PLAIN, RunOptions(), [1, 2], trace=file)
        assert said in found.reason
        assert found.by_kind == ()
        assert found.trace == ""
        assert not file.exists()


def test_a_trace_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write the trace"):
        measure_operators(
            FakeRuntime(), PLAIN, RunOptions(), [1], tokens=1, trace=tmp_path / "no" / "trace.json"
        )
