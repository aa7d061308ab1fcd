"""Which cells a profile has: every combination that can be, and the reason of those that cannot."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from edgellm.artifact import Artifact
from edgellm.errors import UsageError
from edgellm.hardware import detect
from edgellm.profiling.matrix import Asked, matrix
from edgellm.runtimes.session import Capabilities

ONNX = Artifact(path=Path("a/small"), main=Path("a/small/model.onnx"), container="onnx")
GGUF = Artifact(path=Path("a/small.gguf"), main=Path("a/small.gguf"), container="gguf")
RUNTIMES = (
    Capabilities(
        "llama", True, "here", "1.0", containers=frozenset({"gguf"}), devices=("cpu",),
        kv_dtypes=("f16", "q8_0"), speed_rank=1,
    ),
    Capabilities(
        "ort", True, "here", "2.0", containers=frozenset({"onnx"}), devices=("cpu", "cuda"),
        kv_dtypes=("f32",), speed_rank=2,
    ),
    Capabilities(
        "own", True, "here", "3.0", containers=frozenset({"onnx"}), devices=("cpu",),
        speed_rank=3, sets_threads=False,
    ),
)  # fmt: skip


def test_every_combination_is_a_cell_and_its_name_says_what_varies() -> None:
    asked = Asked(threads=(1, 2), prompt_tokens=(8, 16), depth_tokens=(0,))
    found = matrix([GGUF], asked, detect(), RUNTIMES)
    assert found.names == (
        "small.gguf, 1 thread, 8 in",
        "small.gguf, 1 thread, 16 in",
        "small.gguf, 2 threads, 8 in",
        "small.gguf, 2 threads, 16 in",
    )
    assert {(cell.runtime, cell.device, cell.runtime_version) for cell in found.cells} == {
        ("llama", "cpu", "1.0")
    }


def test_more_threads_than_cpus_are_measured_and_said() -> None:
    cpus = os.cpu_count() or 1
    found = matrix([GGUF], Asked(threads=(cpus, cpus + 1)), detect(), RUNTIMES)
    assert [cell.threads for cell in found.cells] == [cpus, cpus + 1]
    (note,) = found.notes
    assert note.startswith(f"{cpus + 1} threads are more than the {cpus} CPU")


def test_all_runtimes_are_those_that_open_it() -> None:
    found = matrix([GGUF, ONNX], Asked(runtimes=("all",)), detect(), RUNTIMES)
    assert found.names == ("small.gguf, llama", "small, ort", "small, own")


def test_a_runtime_that_does_not_open_an_artifact_is_said_beside_one_that_does() -> None:
    found = matrix([GGUF, ONNX], Asked(runtimes=("llama", "ort")), detect(), RUNTIMES)
    assert [cell.runtime for cell in found.cells] == ["llama", "ort"]
    assert found.notes == ("small.gguf: ort does not open gguf", "small: llama does not open onnx")
    alone = matrix([GGUF], Asked(runtimes=("ort",)), detect(), RUNTIMES)
    assert "ort: runs onnx, not gguf" in alone.cells[0].refusal


def test_what_cannot_be_is_a_cell_with_its_reason() -> None:
    missing = dataclasses.replace(RUNTIMES[0], available=False, reason="llama is not installed")
    found = matrix([GGUF, ONNX], Asked(), detect(), (missing, *RUNTIMES[1:]))
    assert "llama is not installed" in found.cells[0].refusal
    assert found.cells[1].refusal == ""
    found = matrix([ONNX], Asked(kv_caches=("f32", "q8_0")), detect(), RUNTIMES)
    assert [bool(cell.refusal) for cell in found.cells] == [False, True]
    assert "keeps keys and values in f32, not q8_0" in found.cells[1].refusal


def test_threads_that_a_runtime_does_not_heed_are_said_and_make_one_cell() -> None:
    found = matrix([ONNX], Asked(runtimes=("own",), threads=(1, 2)), detect(), RUNTIMES)
    assert [cell.threads for cell in found.cells] == [None]
    assert found.notes == ("own chooses its threads itself: --threads not heeded",)


def test_artifacts_of_one_name_are_told_apart_by_their_folder() -> None:
    other = Artifact(path=Path("b/small"), main=Path("b/small/model.onnx"), container="onnx")
    assert matrix([ONNX, other], Asked(), detect(), RUNTIMES).names == ("a/small", "b/small")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Asked(runtimes=("lama",)), "no runtime named 'lama': choose llama, ort, own, or all"),
        (Asked(devices=("gpu",)), "--device 'gpu' is none: choose auto, cpu, cuda"),
        (Asked(kv_caches=("q3",)), "--kv-cache 'q3' is none: choose f32"),
        (Asked(prompt_tokens=(8, 0)), "--prompt-tokens 0: choose 1 or more"),
        (Asked(depth_tokens=(-1,)), "--depth -1: choose 0 or more"),
        (Asked(threads=(0,)), "--threads 0: choose 1 or more"),
    ],
)
def test_what_no_cell_can_have_is_refused(asked: Asked, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        matrix([GGUF], asked, detect(), RUNTIMES)


def test_every_cell_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    paths = [Path("a/x/small"), Path("b/x/small")]
    alike = [onnx_at(path) for path in paths]
    found = matrix(alike, Asked(), detect(), RUNTIMES)
    assert found.names == ("x/small (1)", "x/small (2)")
    monkeypatch.chdir(tmp_path)
    assert matrix([onnx_at(Path())], Asked(), detect(), RUNTIMES).names == (tmp_path.name,)


def onnx_at(path: Path) -> Artifact:
    return Artifact(path=path, main=path / "model.onnx", container="onnx")
