"""The calibration text on the command line: what was drawn is shown, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import Command, TinyModel

TEXT = "The quick brown fox jumps over the lazy dog. " * 1000


def test_the_plan_shows_what_is_drawn(
    command: Command, tiny_model: TinyModel, tmp_path: Path
) -> None:
    (text := tmp_path / "chats.jsonl").write_text(json.dumps({"text": TEXT}))
    options = ("--quant", "gptq:q4_0", "--format", "gguf", "--dry-run", "--json")
    asked = ("--calibration", text, "--calibration-tokens", 2100, "--seed", 3)
    done = command("convert", tiny_model("llama"), *options, *asked)
    found = done.json()["calibration"]
    assert (found["text"], found["seed"]) == ("chats.jsonl", 3)
    assert 2100 <= found["tokens"] < 2100 + 512
    other = command("convert", tiny_model("llama"), *options, *asked[:-1], 4).json()["calibration"]
    assert other["ids_sha256"] != found["ids_sha256"]
    assert other["text_sha256"] == found["text_sha256"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("gptq:q4_0", "--calibration", "none.txt"), "cannot read the text none.txt"),
        (("gptq:q4_0", "--calibration-tokens", "3"), "3 tokens of calibration are too few"),
        (("rtn:q4_0", "--calibration", "none.txt"), "calibration is for solvers"),
        (("rtn:q4_0", "--seed", "1"), "seed is for solvers"),
        (("q8_0", "--calibration-tokens", "9999"), "choose --quant gptq:q8_0"),
    ],
)
def test_what_is_wrong_is_named_before_any_work(
    options: tuple[str, ...], says: str, command: Command, tiny_model: TinyModel, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command(
        "convert", tiny_model("llama"), "--format", "gguf", "-o", out, "--quant", *options
    )
    assert done.code == 2
    assert says in " ".join(done.err.split())
    assert not out.exists()
