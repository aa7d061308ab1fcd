"""``edgellm profile``, ``compare`` and ``schema``: what they show, write and refuse."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import edgellm.report
from edgellm.cli.profile_command import _command, _dearest, _noise
from edgellm.cli.profile_view import _where, watched
from edgellm.errors import OutputError
from edgellm.profiling.measuring import Step

from ..unit import profile_documents as documents
from .conftest import Command

FAKE = ("--runtime", "fake", "--prompt-tokens", "12", "--new-tokens", "4", "--repeat", "2")


def test_a_profile_is_a_table_and_its_files(
    command: Command, onnx_artifact: Path, gguf_artifact: Path, tmp_path: Path
) -> None:
    files = [tmp_path / f"speed.{kind}" for kind in ("html", "json", "md", "csv", "prom")]
    outputs = [word for file in files for word in ("--output", file)]
    done = command("profile", onnx_artifact, gguf_artifact, *FAKE, "--operators", *outputs)
    assert done.code == 0, done.err
    rows = done.out.splitlines()
    assert rows[0].split() == [
        "cell", "first", "token", "prefill", "decode", "p50", "p99", "peak", "memory",
    ]  # fmt: skip
    assert [row.split()[0] for row in rows[2:4]] == ["onnx", "gguf"]
    assert "onnx: a token's time goes to" in done.out
    assert "round 2 of 2, cell 1 of 2" in done.err
    document = json.loads(files[1].read_text())
    assert [cell["artifact"]["container"] for cell in document["cells"]] == ["onnx", "gguf"]
    assert str(tmp_path) not in files[1].read_text(), "no paths of the machine"
    command_line = "edgellm profile onnx gguf --runtime fake --prompt-tokens 12 --new-tokens 4"
    assert document["method"]["command"].startswith(command_line)
    with files[3].open() as file:
        assert len(list(csv.DictReader(file))) == 2
    assert "<html" in files[0].read_text()
    traces = sorted(tmp_path.glob("speed.*.trace.json"))
    assert [trace.name for trace in traces] == ["speed.1.trace.json", "speed.2.trace.json"]
    assert json.loads(traces[0].read_text())["traceEvents"]


def test_without_memory_for_the_limits_the_cells_are_measured(
    command: Command, onnx_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_memory(threads: object) -> object:
        raise MemoryError("Unable to allocate 128 MiB")

    monkeypatch.setattr("edgellm.profiling.measuring.measure_limits", without_memory)
    page, kept = tmp_path / "a.html", tmp_path / "a.json"
    done = command("profile", onnx_artifact, *FAKE, "--output", page, "--output", kept)
    assert done.code == 0, done.err
    assert "limits were not measured, and no shares of them: Unable to allocate" in done.err
    document = json.loads(kept.read_text())
    assert document["limits"] == []
    assert document["cells"][0]["decode_tokens_per_s"]["median"] > 0
    assert document["cells"][0]["roofline"]["decode_share"] is None
    assert page.exists()


def test_many_cells_that_are_all_noisy_take_one_line() -> None:
    def lines(shares: list[float | None]) -> list[str]:
        reason = "other programs had {}% of the CPU time (1.01 s)"
        return _noise(
            [
                documents.cell(f"q{n}", noisy=(reason.format(share),) if share else ())
                for n, share in enumerate(shares)
            ]
        )

    assert lines([50.5, 99.5, 70, 80, 60]) == [
        "all 5 cells are noisy: other programs had 50.5% to 99.5% of the CPU time"
    ]
    assert len(lines([50, 60, 70, 80])) == 4
    assert len(lines([50, 60, 70, 80, 90, None])) == 5, "who is quiet is told apart by names"
    assert lines([None]) == []


def test_kinds_of_operators_that_take_nothing_are_not_listed() -> None:
    line = _dearest("small", documents.operators())
    assert "kind-0 50%, " in line
    assert line.endswith("kind-6 1% (slower by 8% while watched)")


def test_json_is_the_document_and_nothing_else(command: Command, onnx_artifact: Path) -> None:
    done = command("profile", onnx_artifact, *FAKE, "--json")
    assert done.code == 0
    document = done.json()
    (cell,) = document["cells"]
    latencies = cell["inter_token_latency_s"]
    assert len(latencies["samples"]) == 2 * 3
    assert {"p50", "p90", "p95", "p99", "max", "mean"} <= latencies.keys()
    assert {"governor", "load_average", "bandwidth_bytes_per_s"} <= document["conditions"].keys()
    assert len(cell["artifact"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--prompt-tokens", "12,x"), 2, "'x' is no whole number"),
        (("--depth", "-1"), 2, "'-1' is no whole number from 0 on"),
        (("--prompt-tokens", "0"), 2, "--prompt-tokens 0: choose 1 or more"),
        (("--repeat", "0"), 2, "--repeat 0: choose 1 or more"),
        (("--repeat", "2", "--budget", "5s"), 2, "leave one out"),
        (("--budget", "soon"), 2, "give a time above 0, as 90s, 5m or 1h"),
        (("--runtime", "lama"), 2, "no runtime named 'lama'"),
        (("--output", "speed.pdf"), 2, ".pdf"),
        (("--output", "nowhere/speed.html"), 7, "nowhere"),
        (("--operators", "--trace", "nowhere"), 7, "nowhere"),
        (("--trace", "."), 2, "--trace is for the traces of --operators"),
        (("--prompt-tokens", "100000"), 9, "a context of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    options: tuple[str, ...],
    code: int,
    said: str,
    command: Command,
    onnx_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("profile", onnx_artifact, "--new-tokens", "4", *options)
    assert done.code == code
    assert said in done.out + done.err
    assert not list(tmp_path.glob("speed*"))


def test_a_missing_artifact_is_said(command: Command, tmp_path: Path) -> None:
    done = command("profile", tmp_path / "none", *FAKE)
    assert done.code == 3
    assert "does not exist" in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is sent otherwise there")
def test_ctrl_c_writes_what_was_measured(onnx_artifact: Path, tmp_path: Path) -> None:
    output = tmp_path / "speed.json"
    arguments = ["profile", str(onnx_artifact), *FAKE[:-2], "--repeat", "100000"]
    arguments += ["--output", str(output)]
    # pytest's own parent may have told it to ignore Ctrl-C, which a child inherits.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " \
           "from edgellm.cli import main; raise SystemExit(main())"  # fmt: skip
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("round 3"):
            break
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "stopped early" in err
    document = json.loads(output.read_text())
    assert document["interrupted"]
    assert document["cells"][0]["rounds"] >= 2


def test_profiles_of_two_artifacts_are_a_gate(
    command: Command, model: Path, onnx_artifact: Path, tmp_path: Path
) -> None:
    """As a build would do it: the artifact of before, that of now, and what is not accepted."""
    heavier = tmp_path / "heavier"
    assert command("convert", model, "--format", "onnx", "--quant", "f32", "--out", heavier,
                   "--no-check").code == 0  # fmt: skip
    asked = ("--prompt-tokens", "12", "--new-tokens", "8", "--repeat", "5")
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    for artifact, file in ((onnx_artifact, before), (heavier, after)):
        assert command("profile", artifact, *asked, "--output", file).code == 0
    unlike = command("compare", before, after)
    assert unlike.code == 2
    assert "artifact" in unlike.err
    easy = ("--fail-if", "decode_tokens_per_s < -99%", "--fail-if", "peak_memory_bytes > 900%")
    done = command("compare", before, after, "--by", "quant", *easy)
    assert done.code == 0, done.err
    assert "decode_tokens_per_s" in done.out
    document = json.loads(after.read_text())
    document["cells"][0]["memory"]["peak_bytes"] *= 20
    after.write_text(json.dumps(document))
    done = command("compare", before, after, "--by", "quant", *easy)
    assert done.code == 8
    assert "not accepted: peak_memory_bytes > 900%" in done.err
    found = command("compare", before, after, "--by", "quant", "--json").json()
    assert {pair["quantity"] for pair in found["pairs"]} >= {"decode_tokens_per_s"}


def test_what_is_no_profile_is_refused(command: Command, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    done = command("compare", other, other)
    assert done.code == 3
    assert "not a profile" in done.err


def test_the_schema_describes_what_is_written(command: Command, onnx_artifact: Path) -> None:
    schema = command("schema", "profile").json()
    document = command("profile", onnx_artifact, *FAKE, "--json").json()
    definitions = schema["$defs"]
    assert document.keys() <= definitions["Profile"]["properties"].keys()
    assert document["cells"][0].keys() <= definitions["Cell"]["properties"].keys()
    assert command("schema", "manifest").json()["$defs"]["Manifest"]
    assert command("schema", "recipes").code == 2
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_nothing_hangs_when_it_is_left_alone() -> None:
    """A worker whose asker is gone ends by itself."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgellm.profiling.worker"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    begun = time.monotonic()
    process.communicate(b"", timeout=60)
    assert process.returncode != 0
    assert time.monotonic() - begun < 60


@pytest.mark.parametrize("kind", ["table", "json"])
def test_what_cannot_be_written_is_shown_all_the_same(
    kind: str,
    command: Command,
    onnx_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(profiles: object, path: Path) -> None:
        raise OutputError(f"cannot write {path.name}: no space")

    monkeypatch.setattr(edgellm.report, "write_report", full)
    options = ("--json",) if kind == "json" else ()
    done = command("profile", onnx_artifact, *FAKE, "-o", tmp_path / "speed.md", *options)
    assert done.code == 7
    assert "error: cannot write speed.md: no space" in done.err
    assert "written" not in done.err
    if kind == "json":
        assert done.json()["cells"][0]["rounds"] == 2
    else:
        assert "tokens/s" in done.out


def test_the_command_is_kept_without_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["profile", "/home/a/q4", "--output=/home/a/x.md"]
    assert _command(words) == "edgellm profile q4 --output=x.md"
    monkeypatch.setattr(os, "sep", "\\")  # Windows takes both
    monkeypatch.setattr(os, "altsep", "/")
    assert _command(words) == "edgellm profile q4 --output=x.md"


def test_the_view_takes_no_time_between_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    before = threading.active_count()
    with watched() as watch:
        watch(Step("a", 1, 2, 0, 1, "measure"))
        assert threading.active_count() == before


def test_the_view_says_when_operators_are_watched() -> None:
    assert _where(Step("a", 0, 0, 1, 3, "operators")) == "watching operators, cell 2 of 3"
    assert _where(Step("a", 0, 0, 1, 3, "measure")) == "warming up, 3 cells"


def test_files_of_one_name_are_told_apart(
    command: Command, onnx_artifact: Path, tmp_path: Path
) -> None:
    files = [tmp_path / folder / "speed.json" for folder in ("before", "after")]
    for file in files:
        file.parent.mkdir()
    assert command("profile", onnx_artifact, *FAKE, "-o", files[0]).code == 0
    files[1].write_bytes(files[0].read_bytes())
    found = command("compare", *files, "--json").json()
    assert {(pair["of"], pair["to"]) for pair in found["pairs"]} == {
        (f"{files[1]}: onnx", f"{files[0]}: onnx")
    }
