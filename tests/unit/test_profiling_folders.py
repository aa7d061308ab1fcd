"""Errors without the names of folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.profiling.folders import without_folders


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("cannot read /home/anna/models/small: denied", "cannot read small: denied"),
        ("in '/opt/x/y.py', line 3", "in 'y.py', line 3"),
        (r"cannot load C:\Users\anna\small.gguf", "cannot load small.gguf"),
        ("~/models/small is none", "small is none"),
        ("(/srv/a/b)", "(b)"),
        ("see https://example.org/a/b for 3 tokens/s, 1/2/3 and and/or", None),
        ("give --output FILE or /tmp", None),
    ],
)
def test_of_a_path_the_last_part_is_left(said: str, told: str | None) -> None:
    assert without_folders(said) == (said if told is None else told)


def test_folders_with_spaces_and_relative_ones_are_known_by_the_artifact(tmp_path: Path) -> None:
    path = tmp_path / "of somebody" / "small"
    assert without_folders(f"cannot read {path}/model.onnx", path) == "cannot read small/model.onnx"
    assert without_folders("no x/small/a.onnx", Path("x/small")) == "no small/a.onnx"
    assert without_folders("no small/a.onnx", Path("small")) == "no small/a.onnx"
