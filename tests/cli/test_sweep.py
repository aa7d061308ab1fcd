"""``edgellm sweep``: every grid is converted and compared, and what was found is written."""

from __future__ import annotations

import json
from pathlib import Path

from edgellm.artifact import open_artifact
from edgellm.errors import OutputError

from .conftest import Command


def test_figures_are_those_of_the_conversions(
    command: Command, model: Path, tmp_path: Path
) -> None:
    options = ["--solvers", "rtn", "--format", "gguf", "--check-tokens", "256", "--json"]
    places = ["--out", tmp_path / "out", "--keep", tmp_path / "kept"]
    places += ["--picture", tmp_path / "drawn" / "size.svg"]
    done = command("sweep", model, "--grids", "q4_0,q8_0", *options, *places)
    assert done.code == 0, done.err
    points = done.json()["points"]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["points"] == points
    drawn = (tmp_path / "out" / "sweep.svg").read_text()
    assert "rtn:q8_0</text>" in drawn
    assert (tmp_path / "drawn" / "size.svg").read_text() == drawn
    assert [point["quant"] for point in points] == ["rtn:q4_0", "rtn:q8_0"]
    assert points[0]["nbytes"] < points[1]["nbytes"]
    assert points[0]["kld_mean"] > 5 * points[1]["kld_mean"] > 0
    for point in points:
        artifact = open_artifact(Path(point["folder"]))
        assert artifact.manifest is not None
        assert artifact.manifest.measured["quality"]["kld_mean"] == point["kld_mean"]


def test_a_grid_that_is_not_there_is_refused_before_work(command: Command, model: Path) -> None:
    done = command("sweep", model, "--grids", "q4_0,q4_9", "--format", "gguf")
    assert done.code == 2, done.err
    assert "q4_9" in done.err


def test_a_picture_that_cannot_be_drawn_is_refused_before_work(
    command: Command, model: Path, tmp_path: Path
) -> None:
    done = command("sweep", model, "--grids", "q4_0", "--picture", tmp_path / "size.gif")
    assert done.code == 2, done.err
    assert ".svg or .png" in done.err


def test_a_place_that_cannot_be_written_is_refused_before_work(
    command: Command, model: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    for option, place in (("--out", file / "figures"), ("--picture", file / "size.svg")):
        done = command("sweep", model, "--grids", "q4_0", option, place)
        assert done.code == OutputError.exit_code, done.err
        assert f"{file} is a file" in done.err


def test_text_and_device_are_for_the_solvers_that_heed_them(
    command: Command, model: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("All is well that ends well, and the rest is told tomorrow. " * 120)
    options = ["--format", "gguf", "--calibration", text, "--calibration-tokens", "1024"]
    options += ["--check-tokens", "256", "--device", "auto", "--json"]
    done = command("sweep", model, "--grids", "q4_0", "--solvers", "rtn,gptq", *options)
    assert done.code == 0, done.err
    plain, solved = done.json()["points"]
    assert solved["kld_mean"] != plain["kld_mean"]
    done = command("sweep", model, "--grids", "q4_0,q8_0", "--solvers", "rtn", *options)
    assert done.code == 2
    assert "calibration is for solvers that see the model work" in done.json()["error"]["message"]
