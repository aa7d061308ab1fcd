"""Python that a model brings: never run unless it is trusted, and then what proves our reading."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("torch", reason="torch is not installed")

import tiny_models  # noqa: E402
from tiny_tokenizers import byte_level, sentencepiece_file  # noqa: E402

import edgellm  # noqa: E402
from edgellm import conversion  # noqa: E402
from edgellm.cli import main  # noqa: E402
from edgellm.errors import (  # noqa: E402
    EdgeError,
    RuntimeMissing,
    SourceError,
    UnsupportedModel,
    UnsupportedTokenizer,
    UsageError,
    VerificationError,
)
from edgellm.plan import make_plan  # noqa: E402
from edgellm.recipe import Recipe  # noqa: E402
from edgellm.remote.finding import find  # noqa: E402
from edgellm.tokenization import AWKWARD_TEXTS, Tokenizer  # noqa: E402

TinyModel = Callable[[str], Path]
Command = Callable[..., int]

MODEL = """
from .helping import SCALE
from transformers import LlamaForCausalLM

class OwnForCausalLM(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits * SCALE
        return found
"""

FAST = """
from transformers import GPT2Tokenizer

class OwnTokenizer(GPT2Tokenizer):
    pass
"""

SLOW = """
import sentencepiece
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    vocab_files_names = {"vocab_file": "tokenizer.model"}

    def __init__(self, vocab_file, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs):
        self.pieces = sentencepiece.SentencePieceProcessor()
        self.pieces.Load(vocab_file)
        super().__init__(bos_token=bos_token, eos_token=eos_token, unk_token=unk_token, **kwargs)

    @property
    def vocab_size(self):
        return self.pieces.get_piece_size()

    def get_vocab(self):
        return {self.pieces.IdToPiece(i): i for i in range(self.vocab_size)}

    def _tokenize(self, text):
        return self.pieces.encode(text.REPLACED, out_type=str)

    def _convert_token_to_id(self, token):
        return self.pieces.PieceToId(token)

    def _convert_id_to_token(self, index):
        return self.pieces.IdToPiece(index)

    def convert_tokens_to_string(self, tokens):
        return self.pieces.decode(tokens)

    def build_inputs_with_special_tokens(self, ids, pair=None):
        return ids + [self.eos_token_id]
"""


@pytest.fixture(autouse=True, scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies what it runs: into a folder of the tests' own."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr(sys, "path", [*sys.path])
        yield
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """``command("inspect", path)``: the exit code of edgellm."""
    for name in ("XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return lambda *words: main([str(word) for word in words])


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the model's Python writes when it is run."""
    return tmp_path / "was-run"


@pytest.fixture
def folder(tiny_model: TinyModel, tmp_path: Path, marker: Path) -> Path:
    """A tiny Llama that brings a class of its own."""
    made: Path = tiny_models.copy_of(tiny_model("llama"), tmp_path / f"own-{tmp_path.name}")
    bring(made, marker, "modeling_own.py", MODEL, AutoModelForCausalLM="OwnForCausalLM")
    (made / "helping.py").write_text("SCALE = 1.0\n")
    return made


def bring(folder: Path, marker: Path, name: str, text: str, **classes: str) -> None:
    """Put Python into ``folder`` that leaves a mark when it is run, and name it in a config."""
    mark = f"with open({str(marker)!r}, 'a') as file:\n    file.write('x')\n"
    (folder / name).write_text(mark + text)
    file = "tokenizer_config.json" if "AutoTokenizer" in classes else "config.json"
    config = json.loads((folder / file).read_text()) if (folder / file).is_file() else {}
    module = name.removesuffix(".py")
    config["auto_map"] = {kind: f"{module}.{one}" for kind, one in classes.items()}
    if "AutoTokenizer" in classes:
        config["auto_map"]["AutoTokenizer"] = [f"{module}.{classes['AutoTokenizer']}", None]
        config["tokenizer_class"] = classes["AutoTokenizer"]
    (folder / file).write_text(json.dumps(config))


def test_what_would_run_is_found_without_running_it(folder: Path, marker: Path) -> None:
    found = find(folder)
    assert found is not None
    assert found.files == ("modeling_own.py", "helping.py")
    assert found.classes == {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    assert not marker.exists()
    (folder / "config.json").write_text("{}")
    assert find(folder) is None


@pytest.mark.parametrize("quant", ["f32", "int8"])
def test_nothing_is_run_unasked(folder: Path, marker: Path, tmp_path: Path, quant: str) -> None:
    artifact = edgellm.convert(folder, tmp_path / "out", format="onnx", quant=quant)
    assert artifact.manifest is not None
    made = artifact.manifest.artifact
    (note,) = [note for note in made.notes if "auto_map" in note]
    assert "was not run" in note
    assert "read as LlamaForCausalLM" in note
    assert "modeling_own.py, helping.py" in note
    assert "--trust-remote-code" in note
    assert made.remote_code is None
    assert not marker.exists()


def test_nothing_is_run_by_other_commands(folder: Path, marker: Path, command: Command) -> None:
    for words in (
        ("inspect", folder),
        ("convert", folder, "--dry-run"),
        ("eval", folder, "--tokens", "40"),
        ("run", folder, "--raw", "a", "--max-tokens", "2", "--runtime", "torch"),
    ):
        command(*words)
        assert not marker.exists(), words


def test_what_is_trusted_proves_the_reading(folder: Path, marker: Path, tmp_path: Path) -> None:
    artifact = edgellm.convert(
        folder, tmp_path / "out", format="onnx", quant="int8", trust_remote_code=True
    )
    assert marker.exists()
    assert artifact.manifest is not None
    made, measured = artifact.manifest.artifact, artifact.manifest.measured
    assert made.remote_code is not None
    assert made.remote_code.files == {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in ("modeling_own.py", "helping.py")
    }
    assert measured["remote_code"]["logit_error"] < 1e-4
    assert measured["remote_code"]["top1_agreement"] == 1
    assert measured["quality"]["reference"] == "the model's own Python"
    plain = edgellm.convert(folder, tmp_path / "plain", format="onnx", quant="int8")
    assert plain.manifest is not None
    quality = plain.manifest.measured["quality"]
    assert quality["reference"] == "float"
    assert measured["quality"]["kld_mean"] == pytest.approx(quality["kld_mean"], rel=1e-2)
    assert plain.manifest.artifact.files == made.files


def test_what_computes_something_else_is_not_converted(
    folder: Path, marker: Path, tmp_path: Path
) -> None:
    (folder / "helping.py").write_text("SCALE = 1.1\n")
    options: dict[str, Any] = {"format": "onnx", "quant": "f32"}
    with pytest.raises(VerificationError, match=r"read as LlamaForCausalLM.*its own Python"):
        edgellm.convert(folder, tmp_path / "out", trust_remote_code=True, **options)
    assert marker.exists()
    assert not (tmp_path / "out").exists()
    # Which nobody knows who does not run it.
    edgellm.convert(folder, tmp_path / "out", **options)


@pytest.mark.parametrize("trusted", [False, True])
def test_a_type_that_is_not_known_stays_refused(
    trusted: bool, folder: Path, marker: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "brandnew"}))
    with pytest.raises(UnsupportedModel, match=r"brandnew.*only to compare with.*none for this"):
        edgellm.convert(folder, tmp_path / "out", trust_remote_code=trusted)
    assert not marker.exists()


def test_what_does_not_load_is_said(folder: Path, tmp_path: Path) -> None:
    (folder / "helping.py").write_text("import a_library_that_nobody_has\n")
    artifact = edgellm.convert(
        folder, tmp_path / "out", format="onnx", quant="f32", trust_remote_code=True
    )
    assert artifact.manifest is not None
    assert "a_library_that_nobody_has" in artifact.manifest.measured["remote_code"]["skipped"]
    assert artifact.manifest.artifact.remote_code is None


@pytest.mark.parametrize("adapted", [False, True])
def test_what_was_not_loaded_is_not_said_to_have_run(
    adapted: bool, folder: Path, tiny_model: TinyModel, marker: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"format": "onnx", "quant": "f32", "check": adapted}
    if adapted:
        peft = pytest.importorskip("peft", reason="peft is not installed")
        from peft_adapters import make_adapter

        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        adapter = make_adapter(tiny_model("llama"), config, tmp_path / "adapter")
        options["adapters"] = [adapter.folder]
    artifact = edgellm.convert(folder, tmp_path / "out", trust_remote_code=True, **options)
    assert not marker.exists()
    assert artifact.manifest is not None
    assert artifact.manifest.artifact.remote_code is None
    assert artifact.manifest.measured["remote_code"]["skipped"]
    (note,) = [note for note in artifact.manifest.artifact.notes if "auto_map" in note]
    assert "may be run, as you trust it: modeling_own.py, helping.py" in note


def test_what_is_missing_is_found_before_any_work(folder: Path) -> None:
    (folder / "helping.py").unlink()
    with pytest.raises(SourceError, match=r"helping\.py"):
        make_plan(Recipe(source=str(folder), format="onnx", quant="f32"), trust_remote_code=True)


def test_its_model_is_not_held_while_weights_are_rounded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    real = conversion.quantize_tensors

    def watched(*args: Any) -> Any:
        gc.collect()
        held.append(sum(type(each).__name__ == "OwnForCausalLM" for each in gc.get_objects()))
        return real(*args)

    monkeypatch.setattr(conversion, "quantize_tensors", watched)
    artifact = edgellm.convert(
        folder, tmp_path / "out", format="onnx", quant="int8", trust_remote_code=True
    )
    assert held == [0]
    assert artifact.manifest is not None
    assert artifact.manifest.measured["quality"]["reference"] == "the model's own Python"


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ("lost", SourceError, r"helping\.py"),
        ("elsewhere", None, "other/place"),
        ("no transformers", RuntimeMissing, "pip install"),
    ],
)
def test_what_is_missing_is_named(
    change: str,
    kind: type[EdgeError] | None,
    said: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if change == "lost":
        (folder / "helping.py").unlink()
    if change == "elsewhere":
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": "other/place--modeling.Model"}
        (folder / "config.json").write_text(json.dumps(config))
    if change == "no transformers":
        monkeypatch.setitem(sys.modules, "transformers", None)
    options: dict[str, Any] = {"format": "onnx", "quant": "f32", "trust_remote_code": True}
    if kind is not None:
        with pytest.raises(kind, match=said):
            edgellm.convert(folder, tmp_path / "out", **options)
        return
    artifact = edgellm.convert(folder, tmp_path / "out", **options)
    assert artifact.manifest is not None
    assert said in artifact.manifest.measured["remote_code"]["skipped"]


def test_encoders_have_nothing_to_trust(
    tiny_encoder: Callable[[str], Path], tmp_path: Path, command: Command
) -> None:
    with pytest.raises(UsageError, match="--trust-remote-code"):
        edgellm.convert(tiny_encoder("bert"), tmp_path / "out", trust_remote_code=True)
    words = ("convert", tiny_encoder("bert"), "-o", tmp_path / "out", "--trust-remote-code")
    assert command(*words) == UsageError.exit_code


def test_a_recipe_cannot_trust(
    folder: Path, marker: Path, tmp_path: Path, command: Command
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'source = "{folder}"\ntrust_remote_code = true\n')
    assert command("convert", "--recipe", recipe, "-o", tmp_path / "out") != 0
    assert not marker.exists()


# --- tokenizers


def with_tokenizer(folder: Path, kind: str) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    if kind == "fast":
        rules = json.loads(byte_level(vocab_size=config["vocab_size"] - 4).to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(rules["vocab"]))
        merges = ["#version: 0.2", *(" ".join(merge) for merge in rules["merges"]), ""]
        (folder / "merges.txt").write_text("\n".join(merges))
        return
    pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    data = sentencepiece_file(
        "bpe",
        vocab_size=400,
        corpus=tiny_models.TEXT.splitlines() * 3,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    (folder / "tokenizer.model").write_bytes(data)


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_a_class_that_only_its_own_python_has(
    kind: str, folder: Path, marker: Path, tmp_path: Path
) -> None:
    with_tokenizer(folder, kind)
    text = {"fast": FAST, "slow": SLOW.replace(".REPLACED", "")}[kind]
    bring(folder, marker, "tokenization_own.py", text, AutoTokenizer="OwnTokenizer")
    options: dict[str, Any] = {"format": "onnx", "quant": "f32"}
    with pytest.raises(UnsupportedTokenizer, match=r"tokenization_own\.py.*--trust-remote-code"):
        edgellm.convert(folder, tmp_path / "out", **options)
    assert not marker.exists()
    artifact = edgellm.convert(folder, tmp_path / "out", trust_remote_code=True, **options)
    assert marker.exists()
    theirs = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ours = Tokenizer.from_hf_folder(artifact.path)
    for each in AWKWARD_TEXTS:
        for special in (False, True):
            wanted = theirs.encode(each, add_special_tokens=special)
            assert ours.encode(each, add_special=special) == wanted, each
    assert artifact.manifest is not None
    assert artifact.manifest.artifact.remote_code is not None
    assert list(artifact.manifest.artifact.remote_code.files) == ["tokenization_own.py"]


@pytest.mark.parametrize("check", [True, False])
def test_of_a_tokenizer_and_a_model_what_was_loaded_is_kept(
    check: bool, folder: Path, marker: Path, tmp_path: Path
) -> None:
    with_tokenizer(folder, "fast")
    bring(folder, marker, "tokenization_own.py", FAST, AutoTokenizer="OwnTokenizer")
    bring(folder, marker, "modeling_own.py", MODEL, AutoModelForCausalLM="OwnForCausalLM")
    artifact = edgellm.convert(
        folder, tmp_path / "out", format="onnx", quant="f32", check=check, trust_remote_code=True
    )
    assert artifact.manifest is not None
    entry, measured = artifact.manifest.artifact.remote_code, artifact.manifest.measured
    assert entry is not None
    of_the_model = {"modeling_own.py", "helping.py"} if check else set()
    assert entry.files.keys() == {"tokenization_own.py"} | of_the_model
    assert ("AutoModelForCausalLM" in entry.classes) == check
    assert ("skipped" in measured["remote_code"]) != check


def test_a_class_that_nothing_equals_is_refused(folder: Path, marker: Path, tmp_path: Path) -> None:
    with_tokenizer(folder, "slow")
    text = SLOW.replace("text.REPLACED", "text[::-1]")
    bring(folder, marker, "tokenization_own.py", text, AutoTokenizer="OwnTokenizer")
    with pytest.raises(UnsupportedTokenizer, match="splits text as nothing does"):
        edgellm.convert(
            folder, tmp_path / "out", format="onnx", quant="f32", trust_remote_code=True
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("said", "file"),
    [
        (["slow_one.Own", "fast_one.OwnFast"], "fast_one.py"),
        (["slow_one.Own", None], "slow_one.py"),
        ([None, "fast_one.OwnFast"], "fast_one.py"),
        ("slow_one.Own", "slow_one.py"),
    ],
)
def test_of_a_slow_and_a_fast_class_the_one_is_listed_that_transformers_loads(
    said: Any, file: str, tmp_path: Path
) -> None:
    config = {"auto_map": {"AutoTokenizer": said}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    code = find(tmp_path)
    assert code is not None
    assert code.files == (file,)
