"""``edgellm run`` with one question, on the fake runtime and on real ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgellm.manifest import read_manifest

from .conftest import Command

CONTRACT = {
    "text": str,
    "token_ids": list,
    "prompt_tokens": int,
    "new_tokens": int,
    "finish_reason": str,
    "time_to_first_token_s": float,
    "prefill_tokens_per_s": float,
    "decode_tokens_per_s": float,
    "peak_memory_bytes": int,
    "runtime": str,
    "device": str,
    "reason": str,
}

FAKE = ("--runtime", "fake", "--max-tokens", "12")


def test_json_contract(command: Command, onnx_artifact: Path) -> None:
    done = command("run", onnx_artifact, "hello", *FAKE, "--json")
    assert done.code == 0
    assert done.err == ""
    answer = done.json()
    for field, kind in CONTRACT.items():
        assert isinstance(answer[field], kind), field
    assert answer["runtime"] == "fake"
    assert answer["new_tokens"] == len(answer["token_ids"]) == 12
    assert answer["finish_reason"] == "length"


def test_the_answer_alone_is_on_stdout(command: Command, onnx_artifact: Path) -> None:
    text = command("run", onnx_artifact, "hello", *FAKE, "--json").json()["text"]
    done = command("run", onnx_artifact, "hello", *FAKE, "--stats")
    assert done.code == 0
    assert done.out == text + "\n"
    assert "tokens/s" in done.err
    assert "peak memory" in done.err


def test_stdin_is_the_prompt(command: Command, onnx_artifact: Path) -> None:
    given = command("run", onnx_artifact, "hello", *FAKE, "--json").json()
    piped = command("run", onnx_artifact, *FAKE, "--json", stdin="hello\n").json()
    dash = command("run", onnx_artifact, "-", *FAKE, "--json", stdin="hello").json()
    assert given["token_ids"] == piped["token_ids"] == dash["token_ids"]


def test_words_without_quotes_are_one_prompt(command: Command, onnx_artifact: Path) -> None:
    quoted = command("run", onnx_artifact, "hello you", *FAKE, "--json").json()
    words = command("run", onnx_artifact, "hello", *FAKE, "you", "--json").json()
    assert words["prompt_tokens"] == quoted["prompt_tokens"]
    assert words["token_ids"] == quoted["token_ids"]


def test_empty_stdin_is_an_error(command: Command, onnx_artifact: Path) -> None:
    done = command("run", onnx_artifact, *FAKE, stdin="  \n")
    assert done.code == 2
    assert "stdin" in done.err


def test_seed_repeats_and_is_reported(command: Command, onnx_artifact: Path) -> None:
    asked = ("run", onnx_artifact, "hello", *FAKE, "--temperature", "1.5", "--json")
    first = command(*asked).json()
    again = command(*asked, "--seed", first["seed"]).json()
    assert first["token_ids"] == again["token_ids"]
    other = command(*asked, "--seed", first["seed"] + 1).json()
    assert first["token_ids"] != other["token_ids"]


def test_stop_cuts_before_the_text(command: Command, onnx_artifact: Path) -> None:
    asked = ("run", onnx_artifact, "hello", *FAKE, "--json")
    whole = command(*asked).json()["text"]
    assert len(whole) > 4
    cut = command(*asked, "--stop", "never there", "--stop", whole[3:5]).json()
    assert cut["text"] == whole[: whole.index(whole[3:5])]
    assert cut["finish_reason"] == "stop"


def test_a_full_context_is_said_and_a_limit_that_was_asked_for_is_not(
    command: Command, onnx_artifact: Path
) -> None:
    asked = ("run", onnx_artifact, "hello", "--runtime", "fake", "--context", 40)
    full = command(*asked)
    assert full.code == 0
    assert "cut: the context of 40 tokens is full" in full.err
    assert command(*asked, "--json").json()["finish_reason"] == "length"
    assert "cut" not in command(*asked, "--max-tokens", 3).err


def test_template_system_and_raw_change_the_prompt(command: Command, onnx_artifact: Path) -> None:
    asked = ("run", onnx_artifact, "hello", *FAKE, "--json")
    raw = command(*asked, "--raw").json()["prompt_tokens"]
    plain = command(*asked).json()["prompt_tokens"]
    with_system = command(*asked, "--system", "Be brief.").json()["prompt_tokens"]
    assert raw < plain < with_system


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--runtime", "fakse"), 2, "fake"),
        (("--device", "cud"), 2, "cuda"),
        (("--device", "metal", "--runtime", "fake"), 5, "metal"),
        (("--runtime", "llamacpp"), 5, "onnx"),
        (("--temperature", "-1"), 2, "temperature"),
        (("--top-p", "0"), 2, "top_p"),
        (("--max-tokens", "0"), 2, "max_tokens"),
        (("--context", "1000000", "--runtime", "fake"), 2, "--context"),
        (("--context", "3", "--runtime", "fake"), 9, "--context"),
        (("--stop", ""), 2, "stop"),
        (("--threads", "0"), 2, "--threads"),
    ],
)
def test_refusals_name_what_to_do(
    options: tuple[str, ...], code: int, says: str, command: Command, onnx_artifact: Path
) -> None:
    done = command("run", onnx_artifact, "hello", *options)
    assert done.code == code, done.err
    assert says in done.err
    assert done.out == ""
    as_json = command("run", onnx_artifact, "hello", *options, "--json")
    assert as_json.json()["error"]["exit_code"] == code


@pytest.mark.parametrize("option", ["--json", "--raw"])
def test_a_chat_is_neither_json_nor_raw(option: str, command: Command, onnx_artifact: Path) -> None:
    done = command("run", onnx_artifact, option)
    assert done.code == 2
    assert f"{option} needs a PROMPT" in done.out + done.err


def test_damage_is_found_before_running(
    command: Command, onnx_artifact: Path, tmp_path: Path
) -> None:
    artifact = Path(shutil.copytree(onnx_artifact, tmp_path / "small"))
    made = read_manifest(artifact).artifact
    file, offset, _ = made.tensors[0].arrays[0]
    with (artifact / file).open("r+b") as data:
        data.seek(offset)
        data.write(b"\xff\x00\xff")
    done = command("run", artifact, "hello", *FAKE)
    assert done.code == 8
    assert made.tensors[0].name in done.err
    assert command("run", artifact, "hello", *FAKE, "--no-verify").code == 0


def test_a_plain_gguf_says_that_it_is_unverified(
    command: Command, gguf_artifact: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    main_file = read_manifest(gguf_artifact).artifact.main_file
    plain = shutil.copy(gguf_artifact / main_file, tmp_path)
    done = command("run", plain, "hello", "--max-tokens", "3", "--threads", "1")
    assert done.code == 0
    assert "unverified" in done.err


def test_a_folder_of_others_runs_by_transformers(command: Command, model: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    answer = command("run", model, "hello", "--max-tokens", "3", "--json").json()
    assert (answer["runtime"], answer["new_tokens"]) == ("torch", 3)


def test_what_cannot_be_run(command: Command, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "nowhere", tmp_path / "text.gguf"):
        done = command("run", path, "hello")
        assert done.code == 3
        assert str(path) in done.err


def test_onnxruntime(command: Command, onnx_artifact: Path) -> None:
    answer = command("run", onnx_artifact, "hello", "--max-tokens", "5", "--json").json()
    assert answer["runtime"] == "onnxruntime"
    assert answer["reason"]


def test_llamacpp(command: Command, gguf_artifact: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    options = ("--max-tokens", "5", "--json", "--threads", "1")
    answer = command("run", gguf_artifact, "hello", *options).json()
    assert answer["runtime"] == "llamacpp"


def test_a_missing_runtime_comes_with_its_command(
    command: Command, gguf_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    found_spec = importlib.util.find_spec

    def without_llamacpp(name: str, package: str | None = None) -> object:
        return None if name == "llama_cpp" else found_spec(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without_llamacpp)
    done = command("run", gguf_artifact, "hello")
    assert done.code == 6
    assert 'pip install "edgellm[llamacpp]"' in done.err


def test_a_newer_manifest_is_refused(command: Command, onnx_artifact: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(onnx_artifact, tmp_path / "small"))
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["artifact"]["schema_version"] = 99
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    done = command("run", artifact, "hello")
    assert done.code == 3
    assert "99" in done.err


def test_a_conversation_is_saved_and_goes_on(
    command: Command, onnx_artifact: Path, tmp_path: Path
) -> None:
    talk = tmp_path / "talk"
    options = ("--max-tokens", "4", "--threads", "1", "--json")
    first = command("run", onnx_artifact, "hello", "--save-session", talk, *options)
    assert first.code == 0, first.err
    assert f"saved in {talk}" in first.err
    again = command("run", onnx_artifact, "and?", "--load-session", talk, *options)
    assert "goes on with" in again.err
    answer = again.json()
    assert answer["prefilled_tokens"] < answer["prompt_tokens"]


def test_where_a_session_cannot_be_saved_nothing_is_computed(
    command: Command, onnx_artifact: Path, tmp_path: Path
) -> None:
    done = command("run", onnx_artifact, "hello", "--save-session", tmp_path / "no" / "talk")
    assert (done.code, done.out) == (7, "")
    both = command("run", onnx_artifact, "hello", "--raw", "--save-session", tmp_path / "talk")
    assert both.code == 2
