"""T5 and BART on the command line: converted, asked, inspected, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_encoders  # noqa: E402

import edgellm  # noqa: E402
from edgellm.errors import UnsupportedTarget, UsageError  # noqa: E402

Command = Callable[..., Any]
TinyEncoder = Callable[[str], Path]

TEXT = "The quick brown fox jumps."


@pytest.fixture(scope="module")
def artifact(tiny_encoder: TinyEncoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny T5, converted in f32."""
    out = tmp_path_factory.mktemp("seq2seq") / "out"
    edgellm.convert(tiny_encoder("t5"), out, quant="f32")
    return out


def test_a_text_is_answered_as_transformers_would(
    command: Command, artifact: Path, tiny_encoder: TinyEncoder
) -> None:
    import torch

    folder = tiny_encoder("t5")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    wanted = tiny_encoders.load(folder).generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False
    )
    found = command("run", artifact, *TEXT.split(), "--max-tokens", "10", "--json").json()
    assert found["token_ids"] == wanted[0, 1:].tolist()
    assert found["prompt_tokens"] == ids.shape[1]
    said = tokenizer.decode(wanted[0], skip_special_tokens=True)
    assert found["text"] == said
    plain = command("run", artifact, TEXT, "--max-tokens", "10", "--stats")
    assert plain.out == said + "\n"
    assert "first token after" in plain.err
    assert command("run", artifact, stdin=TEXT + "\n").out.startswith(said[:5])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--system", "x"), "--system"),
        (("--stop", "x"), "--stop"),
        (("--draft", "lookup"), "--draft"),
        (("--runtime", "llamacpp"), "--runtime llamacpp"),
        (("--max-tokens", "0"), "1 to 512"),
        (("--temperature", "-1"), "temperature"),
    ],
)
def test_options_that_nothing_would_heed_are_refused(
    options: tuple[str, str], said: str, command: Command, artifact: Path
) -> None:
    done = command("run", artifact, TEXT, *options)
    assert done.code == UsageError.exit_code
    assert said in done.err
    assert not done.out


def test_without_a_text_it_says_so(command: Command, artifact: Path) -> None:
    for stdin in (None, "  "):
        done = command("run", artifact, stdin=stdin)
        assert done.code == UsageError.exit_code
        assert "text" in done.err


def test_convert_says_what_it_made(
    command: Command, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = command("convert", tiny_encoder("t5-64"), "-o", out)
    assert done.code == 0
    assert "nats to the source, top-1" in done.err
    assert command("verify", out).code == 0
    shown = command("inspect", out).out
    assert "encoder_model.onnx" in shown
    assert "nats to the source" in shown
    names = {file.name for file in out.iterdir()}
    assert {"encoder_model.onnx", "decoder_model.onnx", "model.onnx.data"} < names
    facts = command("convert", tiny_encoder("t5-64"), "--dry-run", "--json").json()
    assert facts["task"] == "seq2seq"
    manifest = json.loads((out / "manifest.json").read_text())
    assert facts["output_bytes"] == sum(file["nbytes"] for file in manifest["artifact"]["files"])


def test_other_formats_and_solvers_are_refused(
    command: Command, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    for option, said in (("--format=gguf", "--format onnx"), ("--quant=gptq", "--quant int8")):
        done = command("convert", tiny_encoder("t5"), "-o", tmp_path / "out", option)
        assert done.code == UnsupportedTarget.exit_code
        assert said in done.err
        assert not (tmp_path / "out").exists()


def test_profiles_tell_how_quickly_answers_come(
    command: Command, artifact: Path, tmp_path: Path
) -> None:
    path, page = tmp_path / "profile.json", tmp_path / "page.html"
    options = ("--prompt-tokens", "8,40", "--new-tokens", "6", "--repeat", "4", "--threads", "1")
    done = command("profile", artifact, *options, "-o", path, "-o", page)
    assert done.code == 0, done.err
    assert "tokens/s" in done.out
    found = json.loads(path.read_text())
    assert [cell["settings"]["prompt_tokens"] for cell in found["cells"]] == [8, 40]
    for cell in found["cells"]:
        assert cell["settings"]["task"] == "translate"
        first, read = (cell[name]["samples"] for name in ("time_to_first_token_s", "encode_s"))
        assert all(one > other > 0 for one, other in zip(first, read, strict=True))
        latencies = cell["inter_token_latency_s"]["samples"]
        assert len(latencies) == 4 * 5
        speeds = [5 / sum(latencies[at : at + 5]) for at in range(0, 20, 5)]
        assert cell["decode_tokens_per_s"]["samples"] == pytest.approx(speeds)
        wholes = [each + sum(latencies[5 * at : 5 * at + 5]) for at, each in enumerate(first)]
        assert cell["end_to_end_s"]["samples"] == pytest.approx(wholes)
        # Keys and values, 12 wide by 4 heads, of 2 layers: of the text, and of the answer.
        tokens = cell["settings"]["prompt_tokens"] + 6
        assert cell["memory"]["kv_bytes"] == 4 * 2 * 2 * 4 * 12 * tokens
        assert "prefill_tokens_per_s" not in cell
        assert "prefill_tokens_per_s" in cell["absent"]
        assert len(cell["text_sha256"]) == 64
    assert "Reading the text" in page.read_text()


def test_profiles_keep_kinds_apart(
    command: Command, artifact: Path, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    edgellm.convert(tiny_encoder("bert"), tmp_path / "bert", quant="f32", check=False)
    for paths, options, said in (
        ((artifact, tmp_path / "bert"), (), "another kind"),
        ((artifact,), ("--batch", "2"), "--batch"),
        ((artifact,), ("--depth", "2"), "--depth"),
        ((artifact,), ("--new-tokens", "513"), "at most 512"),
        ((tmp_path / "bert",), ("--new-tokens", "5"), "--new-tokens"),
    ):
        done = command("profile", *paths, *options)
        assert done.code in (UsageError.exit_code, 9)
        assert said in done.err + done.out


def test_languages_are_named_on_the_command_line(
    command: Command, tiny_encoder: TinyEncoder, artifact: Path, tmp_path: Path
) -> None:
    import torch

    folder = tiny_encoder("mbart50")
    edgellm.convert(folder, tmp_path / "out", quant="f32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, src_lang="de_DE")
    ids = torch.tensor([tokenizer(TEXT)["input_ids"]])
    code = tokenizer.convert_tokens_to_ids("fr_XX")
    wanted = tiny_encoders.load(folder).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=8,
        do_sample=False,
        forced_bos_token_id=code,
    )
    asked = ("run", tmp_path / "out", TEXT, "--max-tokens", "8")
    named = ("--source-lang", "de_DE", "--target-lang", "fr_XX")
    assert command(*asked, *named, "--json").json()["token_ids"] == wanted[0, 1:].tolist()
    assert "no language was named" in command(*asked).err
    assert "no language was named" not in command(*asked, *named).err
    for words, said in (
        ((*asked, "--target-lang", "french"), "no language named 'french'"),
        (("run", artifact, TEXT, "--source-lang", "de_DE"), "no codes for languages"),
    ):
        done = command(*words)
        assert done.code == UsageError.exit_code
        assert said in done.err
    card = command("push", tmp_path / "out", "org/made", "--dry-run").out
    assert "pipeline_tag: translation" in card


def test_languages_are_nothing_to_a_language_model(command: Command, onnx_artifact: Path) -> None:
    done = command("run", onnx_artifact, "a", "--target-lang", "de_DE")
    assert done.code == UsageError.exit_code
    assert "translators" in done.err
