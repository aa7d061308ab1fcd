"""Measuring for real, on tiny models: what a process says, and what becomes of failed ones."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import edgellm
from edgellm.artifact import Artifact
from edgellm.errors import GenerationError
from edgellm.hardware import Gpu
from edgellm.profiling import document, energy, measuring, process
from edgellm.profiling.exchange import Job
from edgellm.profiling.matrix import Asked, Wanted
from edgellm.profiling.measuring import Effort, Running, Step, profile
from edgellm.profiling.process import CellFailed, CellProcess
from edgellm.profiling.prompts import prompt_of
from edgellm.profiling.worker import LoadedCell
from edgellm.tokenization.artifact import artifact_tokenizer

FEW = Asked(prompt_tokens=(20,), new_tokens=(6,), depth_tokens=(0, 30))
QUICK = Effort(rounds=2, warmup_rounds=1)


def job(artifact: Artifact, runtime: str = "onnxruntime", **changes: object) -> Job:
    asked = {"prompt_tokens": 20, "new_tokens": 6, "depth_tokens": 0} | changes
    return Job(
        path=str(artifact.path), runtime=runtime, device="cpu", threads=1, kv_cache=None, **asked
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("container", ["onnx", "gguf"])
def test_a_cells_answer_is_that_of_a_plain_session(
    container: str, artifact: Callable[..., Artifact]
) -> None:
    """The tokens of a cell behind a depth are those that the model says to all of the text."""
    if container == "gguf":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    made = artifact("llama", container)
    runtime = {"onnx": "onnxruntime", "gguf": "llamacpp"}[container]
    asked = Asked(threads=(1,), kv_caches=("f32",), prompt_tokens=(20,), new_tokens=(6,),
                  depth_tokens=(30,))  # fmt: skip
    found = profile([str(made.path)], asked, QUICK)
    (cell,) = found.cells
    assert cell.failure == ""
    assert (cell.settings.runtime, cell.settings.device) == (runtime, "cpu")
    prompt = prompt_of(artifact_tokenizer(made.main, made.container), 20, 30)
    with edgellm.open(made.path, threads=1, kv_dtype="f32", context_tokens=56) as chat:
        logits = chat.session.prefill((*prompt.depth_ids, *prompt.ids))[-1]
        tokens = [int(logits.argmax())]
        while len(tokens) < 6:
            tokens.append(int(chat.session.decode(tokens[-1]).argmax()))
        assert cell.memory is not None
        assert cell.memory.kv_bytes == chat.session.kv_bytes()
    assert cell.text_sha256 == hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()


def test_figures_agree_with_each_other(artifact: Callable[..., Artifact]) -> None:
    found = profile([str(artifact("llama", "onnx").path)], FEW, QUICK)
    assert [cell.settings.depth_tokens for cell in found.cells] == [0, 30]
    for cell in found.cells:
        assert (cell.rounds, cell.warmup_rounds, cell.failure) == (2, 1, "")
        latencies = cell.inter_token_latency_s
        assert latencies is not None
        assert len(latencies.samples) == 2 * 5
        for place in range(2):
            of_round = latencies.samples[5 * place :][:5]
            assert cell.decode_tokens_per_s is not None
            assert cell.decode_tokens_per_s.samples[place] == pytest.approx(5 / sum(of_round))
            assert cell.time_to_first_token_s is not None
            assert cell.end_to_end_s is not None
            first = cell.time_to_first_token_s.samples[place]
            assert cell.end_to_end_s.samples[place] == pytest.approx(first + sum(of_round))
            assert cell.prefill_tokens_per_s is not None
            assert cell.tokenization_s is not None
            prefill_s = 20 / cell.prefill_tokens_per_s.samples[place]
            assert prefill_s + cell.tokenization_s.samples[place] < first
        assert cell.load_s is not None
        assert len(cell.load_s.samples) == 1
        assert cell.memory is not None
        assert 0 < cell.memory.steady_bytes <= cell.memory.peak_bytes
    assert {ratio.quantity for ratio in found.ratios} == set()
    assert found.method.stayed_loaded
    assert found.limits[0].bandwidth_bytes_per_s > 1e9


def test_cells_take_turns(artifact: Callable[..., Artifact]) -> None:
    seen: list[tuple[int, str]] = []

    def watch(step: Step) -> None:
        seen.append((step.round, step.cell))

    profile([str(artifact("llama", "onnx").path)], FEW, QUICK, watch=watch)
    names = [name for _, name in seen[:2]]
    assert len(set(names)) == 2
    assert seen == [(number, name) for number in (0, 1, 2) for name in names]


def test_processes_that_stay_loaded_are_started_again_in_the_other_order(
    artifact: Callable[..., Artifact],
) -> None:
    seen: list[tuple[int, str, str]] = []

    def watch(step: Step) -> None:
        seen.append((step.round, step.cell, step.stage))

    found = profile([str(artifact("llama", "onnx").path)], FEW, Effort(rounds=5), watch=watch)
    names = [cell.name for cell in found.cells]
    expected = [(number, name, "measure") for number in (1, 2, 3) for name in names]
    expected += [(4, name, "load") for name in reversed(names)]
    expected += [(5, name, "measure") for name in reversed(names)]
    assert seen[2:] == expected
    assert (found.method.starts, found.method.stayed_loaded) == (2, True)
    for cell in found.cells:
        assert cell.load_s is not None
        assert (cell.rounds, len(cell.load_s.samples)) == (5, 2)


def test_processes_that_do_not_fit_together_are_started_anew_each_round(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_memory_bytes", lambda: 1)
    found = profile([str(artifact("llama", "onnx").path)], FEW, QUICK)
    assert not found.method.stayed_loaded
    for cell in found.cells:
        assert cell.load_s is not None
        assert (cell.rounds, len(cell.load_s.samples)) == (2, 2)


def test_a_cell_that_cannot_be_is_a_row_and_the_others_go_on(
    artifact: Callable[..., Artifact],
) -> None:
    asked = Asked(prompt_tokens=(20, 5000), new_tokens=(1,))
    found = profile([str(artifact("llama", "onnx").path)], asked, QUICK)
    good, bad = found.cells
    assert good.rounds == 2
    assert good.decode_tokens_per_s is None, "one token has no speed"
    assert good.inter_token_latency_s is None
    assert bad.rounds == 0
    assert "a context of 5001 tokens is not possible" in bad.failure


def test_a_prompt_of_one_token_is_measured(artifact: Callable[..., Artifact]) -> None:
    asked = Asked(prompt_tokens=(1,), new_tokens=(3,))
    (cell,) = profile([str(artifact("llama", "onnx").path)], asked, QUICK).cells
    assert (cell.failure, cell.rounds) == ("", 2)


def test_a_killed_process_is_said_to_be(artifact: Callable[..., Artifact]) -> None:
    cell = CellProcess(job(artifact("llama", "onnx")), timeout_s=60)
    assert cell.round().latencies_s
    os.kill(cell.pid, signal.SIGKILL)
    with pytest.raises(CellFailed, match="it was killed, as Linux does where memory runs out"):
        cell.round()
    cell.close()


def test_a_crash_is_said_with_its_signal(artifact: Callable[..., Artifact]) -> None:
    cell = CellProcess(job(artifact("llama", "onnx")), timeout_s=60)
    os.kill(cell.pid, signal.SIGSEGV)
    with pytest.raises(CellFailed, match=r"it crashed \(SIGSEGV\)"):
        cell.round()


def test_a_process_that_hangs_is_given_up(artifact: Callable[..., Artifact]) -> None:
    cell = CellProcess(job(artifact("llama", "onnx")), timeout_s=60)
    cell._worker._timeout_s = 0.5
    os.kill(cell.pid, signal.SIGSTOP)
    with pytest.raises(CellFailed, match=r"no answer within 0.5 s: .* --timeout"):
        cell.round()
    assert cell._worker.process.returncode == -signal.SIGKILL


def test_what_a_backend_prints_does_not_disturb(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import runpy, sys; print('noise', flush=True); sys.argv = ['worker']; " \
           "runpy.run_module('edgellm.profiling.worker', run_name='__main__')"  # fmt: skip
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))
    with pytest.raises(CellFailed, match="it said what cannot be understood: noise"):
        CellProcess(job(artifact("llama", "onnx")), timeout_s=60)
    inside = code.replace("print('noise', flush=True); ", "").replace(
        "import runpy, sys;",
        "import runpy, sys, os, edgellm.runtimes.ort as o; f = o.OnnxRuntime.open; "
        "o.OnnxRuntime.open = lambda *a: (os.write(1, b'noise\\n'), f(*a))[1];",
    )
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", inside))
    cell = CellProcess(job(artifact("llama", "onnx")), timeout_s=60)
    assert cell.round().latencies_s
    cell.close()


def test_ctrl_c_keeps_what_was_measured(artifact: Callable[..., Artifact]) -> None:
    begun = threading.Event()

    def watch(step: Step) -> None:
        if step.round == 2 and not begun.is_set():
            begun.set()
            raise KeyboardInterrupt

    found = profile(
        [str(artifact("llama", "onnx").path)], FEW, Effort(rounds=50, warmup_rounds=0), watch=watch
    )
    assert found.interrupted
    assert [cell.rounds for cell in found.cells] == [1, 1]


def test_a_budget_ends_the_rounds(artifact: Callable[..., Artifact]) -> None:
    begun = time.perf_counter()
    effort = Effort(warmup_rounds=0, budget_s=0.01)
    found = profile([str(artifact("llama", "onnx").path)], FEW, effort)
    assert [cell.rounds for cell in found.cells] == [1, 1], "each is measured once at least"
    assert time.perf_counter() - begun < 300


def test_ctrl_c_while_it_loads_leaves_no_process(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    def interrupted(worker: process._Worker) -> bytes:
        started.append(worker.process)
        raise KeyboardInterrupt

    monkeypatch.setattr(process._Worker, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        CellProcess(job(artifact("llama", "onnx")), timeout_s=60)
    with pytest.raises(KeyboardInterrupt):
        process.operators_of(job(artifact("llama", "onnx"), operators=True), 60)
    assert [each.returncode for each in started] == [-signal.SIGKILL] * 2


def test_modules_are_not_taken_from_the_folder_that_one_is_in(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')")
    made = job(artifact("llama", "onnx"))
    monkeypatch.chdir(tmp_path)
    cell = CellProcess(made, timeout_s=60)
    assert cell.round().latencies_s
    cell.close()


def test_a_process_that_says_no_more_and_does_not_end_is_given_up(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import os, time; os.close(1); time.sleep(100)"
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(process, "ENDING_S", 0.2)
    with pytest.raises(CellFailed, match="it said no more, and did not end"):
        CellProcess(job(artifact("llama", "onnx")), timeout_s=60)


def test_a_signal_without_a_name_is_said_by_its_number() -> None:
    assert process._how(-40) == "it crashed (signal 40)"


def test_failures_tell_no_folders(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = artifact("llama", "onnx")
    code = f"raise ValueError('cannot read {made.main.resolve()} by /opt/of/somebody.py')"
    monkeypatch.setattr(process, "COMMAND", (sys.executable, "-c", code))
    found = profile([str(made.path)], FEW, QUICK)
    name = f"{made.path.name}/{made.main.name}"
    said = f"it ended early, with 1: ValueError: cannot read {name} by somebody.py"
    assert {cell.failure for cell in found.cells} == {said}
    assert str(made.path.resolve().parent).encode() not in document.to_json(found)


def test_a_cell_that_ctrl_c_came_before_says_so(artifact: Callable[..., Artifact]) -> None:
    def watch(step: Step) -> None:
        if step.done_cells == 1:
            raise KeyboardInterrupt

    found = profile(
        [str(artifact("llama", "onnx").path)], FEW, Effort(warmup_rounds=0), watch=watch
    )
    assert [cell.failure for cell in found.cells] == ["", "stopped before it was measured"]
    assert [cell.rounds for cell in found.cells] == [1, 0]


def test_processes_that_are_started_anew_have_all_warm_ups(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_memory_bytes", lambda: 1)
    asked = []
    measured = CellProcess.round

    def count(cell: CellProcess) -> object:
        asked.append(cell)
        return measured(cell)

    monkeypatch.setattr(CellProcess, "round", count)
    one = Asked(prompt_tokens=(4,), new_tokens=(2,))
    found = profile([str(artifact("llama", "onnx").path)], one, Effort(rounds=2, warmup_rounds=3))
    assert found.method.warmup_rounds == 3
    assert len(asked) == 2 * (3 + 1)


def test_the_machine_is_asked_before_its_limits_are_measured(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring them keeps all CPUs busy, which is no load that was there before."""
    seen = []
    limits, asked = measuring.measure_limits, measuring.gauge
    monkeypatch.setattr(
        measuring, "measure_limits", lambda counts: (seen.append("limits"), limits(counts))[1]
    )
    monkeypatch.setattr(measuring, "gauge", lambda: (seen.append("gauge"), asked())[1])
    one = Asked(prompt_tokens=(4,), new_tokens=(2,))
    profile([str(artifact("llama", "onnx").path)], one, Effort(rounds=1, warmup_rounds=0))
    assert seen[0] == "gauge"
    assert "limits" in seen


def test_cells_of_a_gpu_stay_together_where_its_memory_holds_them(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "free_memory_bytes", lambda: 1 << 40)
    facts = document.ArtifactFacts(name="a", container="gguf", sha256="0", size_bytes=4 << 30)
    made = artifact("llama", "onnx")
    on = {
        device: Running("a", Wanted(made, "some", device, None, None, 8, 8, 0), facts)
        for device in ("cpu", "cuda", "metal")
    }
    small, large = (Gpu("G", "NVIDIA", size << 30) for size in (8, 16))
    assert measuring._all_fit([on["cuda"]], [Gpu("G", "NVIDIA")]), "it is alone"
    assert measuring._all_fit([on["cuda"], on["cpu"], on["metal"]], [small])
    assert not measuring._all_fit([on["cuda"], on["cuda"]], [small])
    assert measuring._all_fit([on["cuda"], on["cuda"]], [small, large])


def test_less_energy_than_a_counter_can_tell_is_no_figure(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steps:
        def __init__(self, name: str, step_j: float | None) -> None:
            self.name, self.step_j, self.said = name, step_j, 0.0

        def read_j(self) -> float:
            self.said += 10.0
            return self.said

    made = [Steps("battery", 36.0), Steps("RAPL package", 1e-4), Steps("powermetrics", None)]
    monkeypatch.setattr(energy, "counters", lambda: (made, ()))
    found = LoadedCell(job(artifact("llama", "onnx"))).round()
    assert found.energy == {"RAPL package": (10.0, 10.0), "powermetrics": (10.0, 10.0)}
    assert found.no_energy == (
        "battery: a round takes less than the 720 J that it can tell: ask for more tokens",
    )


def test_a_counter_that_stops_is_named(
    artifact: Callable[..., Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops:
        name, step_j, reads = "RAPL package", None, 0

        def read_j(self) -> float:
            self.reads += 1
            if self.reads == 2:  # in the middle of a round
                raise GenerationError("energy_uj cannot be read any more")
            return float(self.reads)

    monkeypatch.setattr(energy, "counters", lambda: ([Stops()], ()))
    cell = LoadedCell(job(artifact("llama", "onnx")))
    broken, whole = cell.round(), cell.round()
    assert broken.energy == {}
    assert broken.no_energy == ("energy_uj cannot be read any more",)
    assert whole.energy == {"RAPL package": (1.0, 1.0)}
    assert whole.no_energy == ()
