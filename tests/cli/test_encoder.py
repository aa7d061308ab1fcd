"""Encoders on the command line: converted, asked, verified, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

import tiny_encoders  # noqa: E402
import tiny_models  # noqa: E402

import edgellm  # noqa: E402
from edgellm.errors import UnsupportedTarget, UsageError  # noqa: E402

Command = Callable[..., Any]
TinyEncoder = Callable[[str], Path]

TEXTS = ["The quick brown fox.", "A tokenizer splits a text into tokens!", "12 apples"]


@pytest.fixture(scope="module")
def artifact(tiny_encoder: TinyEncoder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``artifact(name)``: a tiny encoder, converted in f32."""
    root = tmp_path_factory.mktemp("encoders")

    def made(name: str) -> Path:
        if not (root / name).exists():
            edgellm.convert(tiny_encoder(name), root / name, quant="f32")
        return root / name

    return made


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def logits_of(folder: Path, text: str) -> tuple[np.ndarray, list[int]]:
    """What transformers gives for ``text`` alone, and its ids."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = tokenizer(text, return_tensors="np")
    batch = {name: found[name] for name in ("input_ids", "attention_mask")}
    batch["token_type_ids"] = np.zeros_like(batch["input_ids"])
    outputs = tiny_encoders.outputs(tiny_encoders.load(folder), batch)
    return next(iter(outputs.values()))[0], list(batch["input_ids"][0])


def test_embeddings_are_lines_of_json(
    command: Command, artifact: Any, tiny_encoder: TinyEncoder
) -> None:
    done = command("run", artifact("bert"), *TEXTS)
    assert done.code == 0
    rows = lines(done.out)
    assert [row["text"] for row in rows] == TEXTS
    for row in rows:
        hidden, ids = logits_of(tiny_encoder("bert"), row["text"])
        assert row["tokens"] == len(ids)
        np.testing.assert_allclose(row["embedding"], hidden.mean(0), atol=1e-4)
    piped = command("run", artifact("bert"), "-", stdin="\n".join(TEXTS) + "\n\n")
    assert piped.out == done.out
    assert command("run", artifact("bert"), stdin="\n".join(TEXTS)).out == done.out


def test_labels_come_with_scores(
    command: Command, artifact: Any, tiny_encoder: TinyEncoder
) -> None:
    name = "roberta-classes"
    (row,) = command("run", artifact(name), TEXTS[0], "--json").json()["results"]
    logits, _ = logits_of(tiny_encoder(name), TEXTS[0])
    wanted = np.exp(logits) / np.exp(logits).sum()
    found = {each["label"]: each["score"] for each in row["labels"]}
    assert found == pytest.approx(
        {f"LABEL_{place}": score for place, score in enumerate(wanted)}, abs=1e-4
    )
    scores = [each["score"] for each in row["labels"]]
    assert scores == sorted(scores, reverse=True)


def test_tokens_have_labels_and_places(
    command: Command, artifact: Any, tiny_encoder: TinyEncoder
) -> None:
    name = "distilbert-tokens"
    (row,) = lines(command("run", artifact(name), TEXTS[1]).out)
    logits, ids = logits_of(tiny_encoder(name), TEXTS[1])
    best = [f"LABEL_{place}" for place in logits[1:-1].argmax(1)]  # without [CLS] and [SEP]
    assert [each["label"] for each in row["entities"]] == best
    assert len(best) == len(ids) - 2
    assert "".join(TEXTS[1][each["start"] : each["end"]] for each in row["entities"]) == (
        TEXTS[1].replace(" ", "")
    )


def test_masked_words_are_given_back(
    command: Command, artifact: Any, tiny_encoder: TinyEncoder
) -> None:
    name, text = "bert-masked", "A [MASK] splits a [MASK]."
    (row,) = lines(command("run", artifact(name), text).out)
    logits, ids = logits_of(tiny_encoder(name), text)
    mask = transformers.AutoTokenizer.from_pretrained(tiny_encoder(name)).mask_token_id
    places = [place for place, token in enumerate(ids) if token == mask]
    assert len(row["words"]) == len(places) == 2
    for words, place in zip(row["words"], places, strict=True):
        best = np.argsort(-logits[place])[:5]
        assert [word["token_id"] for word in words] == list(best)
    done = command("run", artifact(name), "No mask.")
    assert done.code == UsageError.exit_code
    assert "[MASK]" in done.err


def test_a_long_text_is_cut_and_said(command: Command, artifact: Any) -> None:
    done = command("run", artifact("bert"), "word " * 200, "--stats")
    (row,) = lines(done.out)
    assert row["tokens"] == 70
    assert row["truncated"]
    assert "1 text cut at the model's 70 tokens" in done.err
    assert "texts/s" in done.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "1"), "--temperature"),
        (("--system", "x"), "--system"),
        (("--draft", "lookup"), "--draft"),
        (("--runtime", "llamacpp"), "--runtime llamacpp"),
        (("--device", "toaster"), "toaster"),
        (("--threads", "0"), "--threads"),
    ],
)
def test_options_about_generating_are_refused(
    options: tuple[str, str], said: str, command: Command, artifact: Any
) -> None:
    done = command("run", artifact("bert"), "a", *options)
    assert done.code == UsageError.exit_code
    assert said in done.err
    assert not done.out


def test_without_texts_it_says_what_is_missing(command: Command, artifact: Any) -> None:
    for stdin in (None, " \n"):
        done = command("run", artifact("bert"), stdin=stdin)
        assert done.code == UsageError.exit_code
        assert "text" in done.err


def test_convert_says_what_it_made(
    command: Command, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", tmp_path / "recipe.toml"
    done = command("convert", tiny_encoder("bert-64"), "-o", out, "--save-recipe", recipe)
    assert done.code == 0
    assert "encoders are written as ONNX" in done.err
    assert "cosine to the source 0.99" in done.err
    assert command("verify", out).code == 0
    shown = command("inspect", out).out
    assert "embeddings" in shown
    assert "cosine to the source" in shown
    again = command("convert", "--recipe", recipe, "-o", tmp_path / "again", "--json").json()
    first = json.loads((out / "manifest.json").read_text())
    assert again["manifest"]["sha256"] == first["sha256"]


def test_a_dry_run_writes_nothing(
    command: Command, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    folder = tiny_encoder("bert-64")
    done = command("convert", folder, "-o", tmp_path / "out", "--dry-run")
    assert "longest text" in done.out
    facts = command("convert", folder, "--dry-run", "--json").json()
    assert facts["task"] == "embeddings"
    assert facts["recipe"]["quant"] == "int8"
    assert not (tmp_path / "out").exists()


def test_a_lower_cap_cuts_texts_sooner(
    command: Command, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    folder, out = tiny_encoder("bert"), tmp_path / "out"
    assert command("convert", folder, "-o", out, "-q", "f32", "--context", "9").code == 0
    (row,) = lines(command("run", out, "word " * 20).out)
    assert (row["tokens"], row["truncated"]) == (9, True)
    done = command("convert", folder, "-o", tmp_path / "more", "-q", "f32", "--context", "71")
    assert done.code == UsageError.exit_code
    assert "at most 70" in done.err


@pytest.mark.parametrize("name", ["bert-64", "t5-64"])
def test_the_bytes_are_the_same_for_any_number_of_workers(
    name: str, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    made = [
        edgellm.convert(tiny_encoder(name), tmp_path / str(count), threads=count, check=False)
        for count in (1, 3)
    ]
    first, second = (each.manifest for each in made)
    assert first is not None
    assert second is not None
    assert first.sha256 == second.sha256


def test_damage_is_found(command: Command, artifact: Any, tmp_path: Path) -> None:
    folder = tiny_models.copy_of(artifact("bert"), tmp_path / "copy")
    data = folder / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[9000] ^= 1
    data.write_bytes(content)
    done = command("run", folder, "a")
    assert done.code == 8
    assert "differs" in done.err


def test_encoders_do_not_chat(command: Command, artifact: Any, tiny_encoder: TinyEncoder) -> None:
    with pytest.raises(UnsupportedTarget, match="open_encoder"):
        edgellm.open(artifact("bert"))
    done = command("eval", artifact("bert"))
    assert done.code == UnsupportedTarget.exit_code
    done = command("eval", tiny_encoder("bert"))
    assert done.code == 4
    assert "is an encoder" in done.err


def test_models_that_generate_are_no_encoders(
    tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    edgellm.convert(tiny_model("gpt2"), tmp_path / "out", format="onnx", quant="f32", check=False)
    with pytest.raises(UnsupportedTarget, match=r"edgellm\.open "):
        edgellm.open_encoder(tmp_path / "out")


def test_python_asks_for_more(artifact: Any) -> None:
    with edgellm.open_encoder(artifact("bert")) as model:
        assert model.embed(TEXTS, batch=2).shape == (3, 60)
        assert model.embed([]).shape == (0, 60)
        pair = model.ask([("The quick", "brown fox")])[0]
        assert pair.text == ("The quick", "brown fox")
        with pytest.raises(UsageError, match="no prompt"):
            model.embed(TEXTS, prompt="query")
    with edgellm.open_encoder(artifact("bert-tokens")) as model, pytest.raises(UsageError):
        model.embed(TEXTS)


@pytest.mark.parametrize("inputs", [None, ["input_ids", "token_type_ids", "attention_mask"]])
@pytest.mark.parametrize("name", ["bert-classes", "roberta-classes"])
def test_pairs_are_told_apart_as_by_transformers(
    name: str, inputs: list[str] | None, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    import torch

    folder = tiny_models.copy_of(tiny_encoder(name), tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"model_input_names": inputs} if inputs else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    pairs = [("The quick", "brown fox jumps."), ("12 apples", "A tokenizer splits a text. " * 20)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    reference = tiny_encoders.load(folder)
    edgellm.convert(folder, tmp_path / "out", quant="f32", check=False)
    with edgellm.open_encoder(tmp_path / "out") as model:
        found = model.ask(pairs)
        longest = model.facts.max_tokens
    for pair, result in zip(pairs, found, strict=True):
        given = tokenizer(*pair, truncation=True, max_length=longest, return_tensors="pt")
        if name.startswith("roberta"):  # which has one type alone
            given.pop("token_type_ids", None)
        with torch.no_grad():
            wanted = reference(**given).logits.softmax(-1)[0].tolist()
        assert result.tokens == given["input_ids"].shape[1]
        scores = {label["label"]: label["score"] for label in result.labels or ()}
        assert [scores[f"LABEL_{place}"] for place in range(3)] == pytest.approx(wanted, abs=1e-4)
    assert [result.truncated for result in found] == [False, True]


def test_a_nan_in_the_source_is_found(tiny_encoder: TinyEncoder, tmp_path: Path) -> None:
    from edgellm.errors import TensorError

    safetensors = pytest.importorskip("safetensors.numpy")
    folder = tiny_models.copy_of(tiny_encoder("bert"), tmp_path / "copy")
    tensors = safetensors.load_file(folder / "model.safetensors")
    tensors["encoder.layer.1.output.dense.weight"][3, 4] = np.nan
    safetensors.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(TensorError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        edgellm.convert(folder, tmp_path / "out", quant="f32")
    assert not (tmp_path / "out").exists()


QUICK = ("--repeat", "4", "--warmup", "0", "--threads", "1")


def test_profiles_tell_time_for_each_setting(
    command: Command, artifact: Any, tmp_path: Path
) -> None:
    path = tmp_path / "profile.json"
    options = ("--prompt-tokens", "8,40", "--batch", "1,3", *QUICK)
    done = command("profile", artifact("bert"), artifact("bert-masked"), *options, "-o", path)
    assert done.code == 0, done.err
    assert "texts/s" in done.out
    found = json.loads(path.read_text())
    settings = [cell["settings"] for cell in found["cells"]]
    assert [(each["task"], each["prompt_tokens"], each["batch"]) for each in settings] == [
        (task, tokens, batch)
        for task in ("embed", "fill")
        for tokens in (8, 40)
        for batch in (1, 3)
    ]
    for cell, asked in zip(found["cells"], settings, strict=True):
        latencies = cell["latency_s"]["samples"]
        assert len(latencies) == 40
        rounds = [sum(latencies[at : at + 10]) for at in range(0, 40, 10)]
        texts = [10 * asked["batch"] / taken for taken in rounds]
        assert cell["texts_per_s"]["samples"] == pytest.approx(texts)
        tokens = [asked["prompt_tokens"] * each for each in texts]
        assert cell["tokens_per_s"]["samples"] == pytest.approx(tokens)
        assert cell["memory"]["peak_bytes"] > 0
        assert cell["memory"]["kv_bytes"] is None
        assert "decode_tokens_per_s" in cell["absent"]
        assert "decode_tokens_per_s" not in cell


def test_profiles_are_reported_and_compared(
    command: Command, artifact: Any, tmp_path: Path
) -> None:
    first, page, text, table = (tmp_path / f"a.{kind}" for kind in ("json", "html", "md", "csv"))
    options = ("--prompt-tokens", "8", "--batch", "1,2", *QUICK)
    outputs = [each for path in (first, page, text, table) for each in ("-o", path)]
    assert command("profile", artifact("bert"), *options, *outputs).code == 0
    second = tmp_path / "b.json"
    assert command("profile", artifact("bert"), *options, "-o", second).code == 0
    assert "Texts a second" in page.read_text()
    assert "an encoder writes no tokens" in page.read_text()
    assert "texts a second, texts/s" in text.read_text()
    assert "texts_per_s_median" in table.read_text().partition("\n")[0]
    done = command("compare", first, second, "--json", "--fail-if", "texts_per_s < -99%")
    assert done.code == 0, done.err
    quantities = {pair["quantity"] for pair in done.json()["pairs"]}
    assert {"texts_per_s", "latency_s", "load_s", "peak_memory_bytes"} == quantities
    gauges = tmp_path / "both.prom"
    assert command("report", first, second, "-o", gauges).code == 0
    assert "edgellm_encoder_texts_per_second" in gauges.read_text()
    assert "texts/s" in command("report", first, second).out
    slower = json.loads(second.read_text())
    for cell in slower["cells"]:
        figure = cell["texts_per_s"]
        cell["texts_per_s"] = {
            name: [each / 9 for each in value] if name == "samples" else value / 9
            for name, value in figure.items()
        }
        cell["noisy"] = []
    before = json.loads(first.read_text())
    for cell in before["cells"]:
        cell["noisy"] = []
    first.write_text(json.dumps(before))
    second.write_text(json.dumps(slower))
    assert command("compare", first, second, "--fail-if", "texts_per_s < -50%").code == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--depth", "4"), "--depth"),
        (("--operators",), "--operators"),
        (("--new-tokens", "5"), "--new-tokens"),
        (("--kv-cache", "f32"), "--kv-cache"),
        (("--runtime", "llamacpp"), "--runtime llamacpp"),
        (("--prompt-tokens", "71"), "at most 70"),
    ],
)
def test_profiles_refuse_what_encoders_have_not(
    options: tuple[str, ...], said: str, command: Command, artifact: Any
) -> None:
    done = command("profile", artifact("bert"), *options)
    assert done.code in (2, 9)
    assert said in done.err + done.out


@pytest.mark.parametrize(
    ("name", "task", "figure"),
    [
        ("bert-64", "feature-extraction", "cosine to the source's outputs, mean"),
        ("t5-64", "text2text-generation", "KL divergence, mean (nats)"),
    ],
)
def test_it_is_listed_and_has_a_card(
    name: str, task: str, figure: str, command: Command, tiny_encoder: TinyEncoder, tmp_path: Path
) -> None:
    out = tmp_path / "made"
    assert command("convert", tiny_encoder(name), "--out", out).code == 0
    (listed,) = command("models", "--json").json()["artifacts"]
    assert listed["path"] == str(out)
    card = command("push", out, "org/made", "--dry-run")
    assert card.code == 0, card.err
    assert f"pipeline_tag: {task}" in card.out
    assert f"| {figure} |" in card.out
