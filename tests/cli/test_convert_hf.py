"""``convert --format hf`` and ``--layout``: the folder, what is said of it, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., Any]


def test_a_folder_in_a_layout(model: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "out"
    asked = ("--format", "hf", "--quant", "rtn:int4-g32", "--layout", "AWQ", "--no-check")
    done = command("convert", model, "--out", out, *asked)
    assert done.code == 0, done.err
    assert "stored as awq: transformers loads it with gptqmodel" in done.err
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "awq"
    assert command("verify", out).code == 0
    run = command("run", out, "hello", "--max-tokens", "2", "--json")
    assert run.json()["runtime"] == "torch"


def test_the_plan_says_which_layout_and_why(model: Path, command: Command) -> None:
    asked = ("--format", "hf", "--quant", "rtn:int8", "--dry-run", "--json")
    plan = command("convert", model, *asked).json()
    assert plan["recipe"]["layout"] == "compressed-tensors"
    assert "layout compressed-tensors: the default of int8" in plan["reasons"]


def test_a_layout_that_means_nothing_is_refused(model: Path, command: Command) -> None:
    done = command("convert", model, "--format", "gguf", "--layout", "gptq", "--dry-run")
    assert done.code == 2
    assert "gguf lays codes out in one way alone" in done.err
