"""``convert --keep-adapters``, ``run --adapter`` and ``/adapter`` in a chat."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import edgellm

pytest.importorskip("llama_cpp", reason="llama_cpp is not installed")
peft = pytest.importorskip("peft", reason="peft is not installed")

from peft_adapters import make_adapter  # noqa: E402

TinyModel = Callable[[str], Path]
Command = Callable[..., Any]
PROMPT = ("The quick brown", "--raw", "--max-tokens", 6)


@pytest.fixture(scope="module")
def adapters(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three PEFT folders: two of the tiny Llama, one of the tiny Qwen."""
    root = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "v_proj", "down_proj"]
    made = {}
    for seed, (name, model) in enumerate((("one", "llama"), ("two", "llama"), ("other", "qwen2"))):
        config = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=targets)
        made[name] = make_adapter(tiny_model(model), config, root / name, seed=seed).folder
    return made


@pytest.fixture(scope="module")
def kept(model: Path, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kept") / "kept"
    beside = [f"{adapters['one']}=0.7", adapters["two"]]
    edgellm.convert(model, out, quant="f32", adapters=beside, keep_adapters=True, check=False)
    return out


def token_ids(command: Command, *arguments: object) -> list[int]:
    done = command("run", *arguments, "--json")
    assert done.code == 0, done.err
    found: list[int] = done.json()["token_ids"]
    return found


def test_kept_adapters_lie_beside_the_model_and_are_verified(kept: Path, command: Command) -> None:
    assert sorted(path.name for path in kept.iterdir()) == [
        "adapter-one.gguf",
        "adapter-two.gguf",
        "manifest.json",
        "model.gguf",
    ]
    made = edgellm.open_artifact(kept).manifest
    assert made is not None
    entries = made.artifact.kept_adapters
    assert [(entry.name, entry.file, entry.weight) for entry in entries] == [
        ("one", "adapter-one.gguf", 0.7),
        ("two", "adapter-two.gguf", 1.0),
    ]
    assert made.artifact.merge is None
    damaged = bytearray((kept / "adapter-two.gguf").read_bytes())
    assert command("verify", kept).code == 0
    damaged[-9] ^= 1
    whole = (kept / "adapter-two.gguf").read_bytes()
    (kept / "adapter-two.gguf").write_bytes(damaged)
    try:
        done = command("verify", kept)
    finally:
        (kept / "adapter-two.gguf").write_bytes(whole)
    assert done.code == 1
    assert "adapter-two.gguf differs in adapter-two.gguf/blk.2.ffn_down.weight.lora_b" in done.err


def test_kept_adapters_are_checked_as_merged_ones(
    model: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    keep = ("--keep-adapters", "--no-check", "--quant", "f32", "--adapter")
    idle = shutil.copytree(adapters["one"], tmp_path / "idle")
    weights = idle / "adapter_model.safetensors"
    zeros = {n: v * 0 if "lora_B" in n else v for n, v in load_file(weights).items()}
    save_file(zeros, weights)
    done = command("convert", model, *keep, idle, "--out", tmp_path / "out")
    assert (done.code, "--allow-untrained" in done.err) == (3, True), done.err
    assert not (tmp_path / "out").exists()
    renamed = shutil.copytree(adapters["one"], tmp_path / "renamed")
    config = json.loads((renamed / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/else"
    (renamed / "adapter_config.json").write_text(json.dumps(config))
    done = command("convert", model, *keep, renamed, "--out", tmp_path / "named")
    assert "trained on someone/else" in done.err
    edgellm.merge(model, tmp_path / "merged", [adapters["one"]])
    assert "kept beside: adapter-renamed.gguf, lora adapter, rank 4, alpha 16, w" in done.err
    done = command("convert", tmp_path / "merged", *keep, adapters["one"], "-o", tmp_path / "twice")
    assert "WARNING: one has been merged into merged before" in done.err
    # Nor does another form of the same adapter hide it.
    form = tmp_path / "named" / "adapter-renamed.gguf"
    edgellm.merge(model, tmp_path / "again", [renamed])
    done = command("convert", tmp_path / "again", *keep, form, "--out", tmp_path / "thrice")
    assert "WARNING: adapter-renamed has been merged into again before (as renamed)" in done.err


def test_a_running_model_gets_the_same_warnings(
    model: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    options: dict[str, Any] = {"format": "gguf", "quant": "f32", "check": False}
    made = edgellm.convert(model, tmp_path / "merged", adapters=[adapters["one"]], **options)
    plain = tmp_path / "plain.gguf"  # which has its history in itself, and no manifest
    plain.write_bytes(made.main.read_bytes())
    renamed = shutil.copytree(adapters["two"], tmp_path / "renamed")
    config = json.loads((renamed / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/else"
    (renamed / "adapter_config.json").write_text(json.dumps(config))
    given = ("--adapter", adapters["one"], "--adapter", renamed)
    done = command("run", plain, "Hi", "--raw", "--max-tokens", 1, *given)
    assert done.code == 0, done.err
    assert done.err.count("WARNING: one is merged into plain.gguf already") == 1
    assert "before: its change" not in done.err
    assert "renamed says that it was trained on someone/else" in done.err


def test_an_adapter_beside_scaled_channels_is_refused(
    model: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    """It was trained to see them unscaled, and its change would be another one."""
    edgellm.convert(model, tmp_path / "scaled", format="gguf", quant="awq:q8_0", check=False)
    done = command("run", tmp_path / "scaled", *PROMPT, "--adapter", adapters["one"])
    assert (done.code, done.out) == (3, "")
    assert "scaled was rounded by awq, which scaled channels that" in done.err
    assert "merge the adapter" in done.err
    assert command("run", tmp_path / "scaled", *PROMPT).code == 0


def test_a_file_says_itself_that_its_channels_are_scaled(
    model: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    """Without its manifest, and after another conversion, which a merge is warned of."""
    options: dict[str, Any] = {"format": "gguf", "check": False}
    scaled = edgellm.convert(model, tmp_path / "scaled", quant="awq:q8_0", **options)
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(scaled.main.read_bytes())
    again = edgellm.convert(plain, tmp_path / "again", quant="f32", **options)
    assert again.manifest is not None
    assert again.manifest.artifact.scaled_before == ("awq",)
    for artifact in (plain, again.path):
        done = command("run", artifact, *PROMPT, "--adapter", adapters["one"])
        assert (done.code, done.out) == (3, "")
        assert "rounded by awq, which scaled channels that" in done.err
    merged = ("--adapter", adapters["one"], "--format", "gguf", "-q", "f32", "--no-check")
    for source, warned in ((again.main, True), (model, False)):
        done = command("convert", source, *merged, "--out", tmp_path / "merged", "--force")
        assert done.code == 0, done.err
        said = "were scaled by awq when it was rounded, and one fits only if" in done.err
        assert said == warned


def test_the_base_is_quantized_as_without_adapters(
    kept: Path, model: Path, tmp_path: Path, command: Command
) -> None:
    bare = edgellm.convert(model, tmp_path / "bare", format="gguf", quant="f32", check=False)
    assert bare.main.read_bytes() == (kept / "model.gguf").read_bytes()
    shown = command("inspect", kept)
    assert "kept beside  adapter-one.gguf: lora adapter, rank 4, alpha 16, weight 0.7" in shown.out
    assert "32.00 bits per weight" in shown.out


def test_run_applies_what_was_kept_and_none_leaves_it_out(
    kept: Path, adapters: dict[str, Path], model: Path, tmp_path: Path, command: Command
) -> None:
    beside = [f"{adapters['one']}=0.7", adapters["two"]]
    merged = tmp_path / "merged"
    edgellm.convert(model, merged, format="gguf", quant="f32", adapters=beside, check=False)
    with_both = token_ids(command, kept, *PROMPT)
    assert with_both == token_ids(command, merged, *PROMPT)
    bare = token_ids(command, kept, *PROMPT, "--adapter", "none")
    assert bare != with_both
    # Named by name, a folder, or both ways with a weight.
    named = ("--adapter", "one", "--adapter", adapters["two"])
    assert token_ids(command, kept, *PROMPT, *named) == with_both
    said = command("run", kept, "Hi", "--raw", "--max-tokens", 1, "--adapter", "two=0.25").err
    assert "adapter two applied at 0.25" in said
    assert "adapter one is off" in said


def test_a_runtime_that_applies_none_does_not_drop_kept_ones_in_silence(
    kept: Path, command: Command
) -> None:
    done = command("run", kept, *PROMPT, "--runtime", "fake")
    assert done.code == 5
    assert "with adapters beside them (fake: applies no adapters" in done.err
    assert "--adapter none" in done.err
    assert command("run", kept, *PROMPT, "--runtime", "fake", "--adapter", "none").code == 0


def test_any_gguf_file_takes_a_peft_folder(
    kept: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    plain = tmp_path / "plain.gguf"
    plain.write_bytes((kept / "model.gguf").read_bytes())
    given = ("--adapter", f"{adapters['one']}=0.7", "--adapter", kept / "adapter-two.gguf")
    assert token_ids(command, plain, *PROMPT, *given) == token_ids(command, kept, *PROMPT)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--adapter", "nowhere"), 3, "no adapter nowhere"),
        (("--adapter", "{one}=x"), 2, "must be a number other than 0"),
        (("--adapter", "{one}", "--adapter", "one"), 2, "one is named twice"),
        (("--adapter", "none", "--adapter", "{one}"), 2, "leaves all adapters out"),
        (("--adapter", "{other}"), 3, "it was trained on another model"),
        (("--adapter", "{one}", "--runtime", "fake"), 5, "applies no adapters beside a model"),
    ],
)
def test_wrong_adapters_are_refused(
    arguments: tuple[str, ...],
    code: int,
    message: str,
    kept: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    command: Command,
) -> None:
    plain = tmp_path / "plain.gguf"
    plain.write_bytes((kept / "model.gguf").read_bytes())
    given = [argument.format(**adapters) for argument in arguments]
    done = command("run", plain, *PROMPT, *given)
    assert done.code == code, done.err
    assert message in done.err


def test_an_adapter_is_no_model(kept: Path, tmp_path: Path, command: Command) -> None:
    alone = tmp_path / "alone.gguf"
    alone.write_bytes((kept / "adapter-two.gguf").read_bytes())
    for done in (
        command("run", alone, *PROMPT),
        command("convert", alone, "--out", tmp_path / "out"),
    ):
        assert done.code == 3
        assert "is a LoRA adapter, not a model" in done.err


def test_onnx_says_what_to_do_instead(
    onnx_artifact: Path, model: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    done = command("run", onnx_artifact, *PROMPT, "--adapter", adapters["one"])
    assert done.code == 5
    assert "applies no adapters beside a model: merge them (convert --adapter)" in done.err
    keep = ("--adapter", adapters["one"], "--keep-adapters", "--out", tmp_path / "out")
    done = command("convert", model, *keep, "--format", "onnx")
    assert done.code == 5
    assert "choose --format gguf, or leave --keep-adapters out to merge them" in done.err
    done = command("convert", model, *keep, "--combine", "ties", "--density", "0.5")
    assert done.code == 2
    assert "--combine says how adapters are merged" in done.err


def test_an_adapter_that_is_merged_already_is_warned_of(
    model: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    merged = tmp_path / "merged"
    options: dict[str, Any] = {"format": "gguf", "quant": "f32", "check": False}
    edgellm.convert(model, merged, adapters=[adapters["one"]], **options)
    done = command("run", merged, "Hi", "--raw", "--max-tokens", 1, "--adapter", adapters["one"])
    assert done.code == 0
    assert "WARNING: one is merged into merged already" in done.err


def test_a_chat_warns_of_an_adapter_that_is_merged_already(
    model: Path,
    adapters: dict[str, Path],
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merged = tmp_path / "merged"
    options: dict[str, Any] = {"format": "gguf", "quant": "f32", "check": False}
    edgellm.convert(model, merged, adapters=[adapters["one"]], **options)
    typed = iter([f"/adapter {adapters['one']}", "/adapter", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    done = command("run", merged)
    assert done.err.count("WARNING: one is merged into merged already") == 1


def test_an_unknown_config_key_can_be_vouched_for(
    kept: Path, adapters: dict[str, Path], tmp_path: Path, command: Command
) -> None:
    plain = tmp_path / "plain.gguf"
    plain.write_bytes((kept / "model.gguf").read_bytes())
    newer = shutil.copytree(adapters["two"], tmp_path / "newer")
    config = json.loads((newer / "adapter_config.json").read_text())
    (newer / "adapter_config.json").write_text(json.dumps({**config, "of_next_year": True}))
    given = (*PROMPT, "--adapter", newer)
    done = command("run", plain, *given)
    assert (done.code, "--ignore-config-key" in done.err) == (3, True), done.err
    vouched = token_ids(command, plain, *given, "--ignore-config-key", "of_next_year")
    assert vouched == token_ids(command, plain, *PROMPT, "--adapter", adapters["two"])


def test_adapters_are_swapped_in_a_chat(
    kept: Path, adapters: dict[str, Path], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(
        [
            "The quick",
            "/adapter",
            "/adapter two off",
            "/adapter one=0.25",
            f"/adapter {adapters['two']}=2",
            "/adapter gone off",
            "/adapter nowhere",
            "/adapter two-2 off",
            "The quick",
            "/exit",
        ]
    )
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    done = command("run", kept, "--max-tokens", 4)
    assert done.code == 0, done.err
    lists = [
        "  · one  0.7\n  · two  1\n",
        "  · one  0.7\n  · two  off\n",
        "  · one  0.25\n  · two  off\n",
        "  · one  0.25\n  · two  off\n  · two-2  2\n",
        "error: no adapter named 'gone': /adapter lists them\n",
        "error: no adapter nowhere",
        "  · one  0.25\n  · two  off\n  · two-2  off\n",
    ]
    place = 0
    for text in lists:
        found = done.err.find(text, place)
        assert found >= 0, (text, done.err[place:])
        place = found + len(text)


def test_the_library_swaps_by_name(kept: Path) -> None:
    with edgellm.open(kept, context_tokens=64) as chat:
        assert chat.adapters == {"one": 0.7, "two": 1.0}
        both = chat.generate("The quick brown", raw=True, max_tokens=6).token_ids
        chat.set_adapters({})
        assert chat.used_tokens == 0
        bare = chat.generate("The quick brown", raw=True, max_tokens=6).token_ids
        chat.set_adapters({"one": 0.7, "two": 1.0})
        assert chat.generate("The quick brown", raw=True, max_tokens=6).token_ids == both
        assert bare != both
    with edgellm.open(kept, context_tokens=64, adapters=[]) as chat:
        assert chat.adapters == {"one": 0.0, "two": 0.0}
        assert chat.generate("The quick brown", raw=True, max_tokens=6).token_ids == bare
