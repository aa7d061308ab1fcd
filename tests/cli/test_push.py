"""``edgellm push``: the bytes that arrive, the card, and what is refused before it is sent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import msgspec
import pytest
from hub_server import WRITER, StandIn, commit_of, sha256
from huggingface_hub import ModelCard, constants

import edgellm
from edgellm.artifact import Artifact, open_artifact, verify
from edgellm.hub.card import base_models, model_card, relation
from edgellm.hub.ids import HubId
from edgellm.manifest import Base, FileEntry, Manifest, read_manifest

from .conftest import Command
from .test_convert_adapter import write_adapter

# How huggingface_hub gives a file to its HTTP library, which would have it otherwise.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TARGET = HubId("me/small")


@pytest.fixture
def artifact(gguf_artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(gguf_artifact, tmp_path / "small"))


@pytest.fixture
def writer(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The stand-in, and a token that may write to it."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return hub


def front(card: str) -> dict[str, Any]:
    """The front matter as the Hub reads it."""
    found: dict[str, Any] = ModelCard(card).data.to_dict()
    return found


def described(artifact: Path, **changes: Any) -> Artifact:
    """The artifact with another manifest, in memory."""
    found = open_artifact(artifact)
    assert found.manifest is not None
    made = msgspec.structs.replace(found.manifest.artifact, **changes)
    return msgspec.structs.replace(found, manifest=Manifest.of(made, found.manifest.measured))


def test_what_arrives_is_what_was_made(
    command: Command, writer: StandIn, onnx_artifact: Path, tmp_path: Path
) -> None:
    (onnx_artifact / "note.txt").write_text("mine")
    done = command("push", onnx_artifact, "me/small")
    (onnx_artifact / "note.txt").unlink()
    assert done.code == 0, done.err
    arrived = writer.repositories["me/small"]
    assert commit_of(arrived) in done.out
    names = {entry.path for entry in read_manifest(onnx_artifact).artifact.files}
    assert arrived.keys() == names | {"manifest.json", "README.md", ".gitattributes"}
    for name in names | {"manifest.json"}:
        assert arrived[name] == (onnx_artifact / name).read_bytes()
    assert sha256(arrived["model.onnx"]) in writer.stored  # by LFS
    assert len(writer.commits) == 1
    back = tmp_path / "back"
    back.mkdir()
    for name, content in arrived.items():
        (back / name).write_bytes(content)
    verify(open_artifact(back))


@pytest.mark.parametrize("container", ["gguf", "hf", "mlx"])
def test_every_container_verifies_after_the_round_trip(
    container: str, command: Command, writer: StandIn, model: Path, tmp_path: Path
) -> None:
    quant = {"gguf": "rtn:q8_0", "hf": "rtn:int4-g32-sym", "mlx": "rtn:int8"}[container]
    out = tmp_path / "out"
    edgellm.convert(model, out, format=container, quant=quant, check=False)
    assert command("push", out, "me/small").code == 0
    back = Path(huggingface_hub.snapshot_download("me/small"))
    verify(open_artifact(back))
    assert (back / "README.md").read_text().startswith("---\n")


def test_through_the_environment_as_a_user_has_it(
    hub: StandIn, artifact: Path, model: Path, tmp_path: Path
) -> None:
    files = {file.name: file.read_bytes() for file in model.iterdir() if file.is_file()}
    files["README.md"] = b"---\nlicense: mit\n---\n"
    hub.repositories["org/tiny"] = files
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": WRITER,
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_DATA_HOME": str(tmp_path / "data"),
    }

    def run(*arguments: str) -> str:
        line = [sys.executable, "-m", "edgellm", *arguments]
        done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = str(tmp_path / "q8")
    run("convert", "org/tiny@v1", *("--out", out, "--format", "gguf", "-q", "rtn:q8_0"))
    run("push", out, "me/q8")
    run("models", "remove", "org/tiny", "--yes")
    shown = run("models")
    arrived = hub.repositories["me/q8"]
    assert arrived["model.gguf"] == (tmp_path / "q8" / "model.gguf").read_bytes()
    card = arrived["README.md"].decode()
    assert front(card)["license"] == "mit"
    assert front(card)["base_model"] == "org/tiny"
    assert f"org/tiny@{commit_of(files)[:12]}" in shown
    assert "nothing from the Hub" in shown


def test_a_dry_run_shows_all_and_sends_nothing(
    command: Command, hub: StandIn, artifact: Path
) -> None:
    done = command("push", artifact, "me/small", "--dry-run")  # without a token
    assert done.code == 0
    assert done.out.startswith("---\n")
    assert "manifest.json" in done.out
    found = command("push", artifact, "me/small@q8", "--dry-run", "--json").json()
    assert (found["repo"], found["revision"], found["private"]) == ("me/small", "q8", False)
    sizes = {each["path"]: each["nbytes"] for each in found["files"]}
    for name in ("model.gguf", "manifest.json"):
        assert sizes[name] == (artifact / name).stat().st_size
    assert sizes["README.md"] == len(found["card"].encode())
    assert hub.requests == []


def test_private_and_a_branch(command: Command, writer: StandIn, artifact: Path) -> None:
    done = command("push", artifact, "me/small", "--private", "--revision", "q8", "--json")
    assert done.err == ""
    found = done.json()
    assert found["url"] == f"{writer.url}/me/small/tree/q8"
    assert writer.private == {"me/small"}
    assert writer.repositories["me/small"].keys() == {".gitattributes"}
    arrived = writer.branches["me/small", "q8"]
    assert arrived["model.gguf"] == (artifact / "model.gguf").read_bytes()
    assert "--revision q8" in arrived["README.md"].decode()
    assert found["commit"] == commit_of(arrived)


def test_private_is_not_public(command: Command, writer: StandIn, artifact: Path) -> None:
    writer.repositories["me/small"] = {}
    done = command("push", artifact, "me/small", "--private")
    assert done.code == 2
    assert "is public" in done.err
    assert writer.repositories["me/small"] == {}


def test_a_card_that_the_hub_does_not_accept(
    command: Command, writer: StandIn, artifact: Path
) -> None:
    done = command("push", artifact, "me/small", "--license", "my-own")
    assert done.code == 3
    assert '"license" must be one of' in done.err
    assert "--license" in done.err.partition("must be one of")[2]
    assert command("push", artifact, "me/small", "--license", "mit").code == 0
    assert front(writer.repositories["me/small"]["README.md"].decode())["license"] == "mit"


def test_an_artifact_takes_the_place_of_the_one_before(
    command: Command, writer: StandIn, artifact: Path, onnx_artifact: Path
) -> None:
    assert command("push", onnx_artifact, "me/small").code == 0
    writer.repositories["me/small"]["picture.png"] = b"x"
    done = command("push", artifact, "me/small")
    assert done.code == 0, done.err
    assert "replaced what was there: " in done.err
    arrived = writer.repositories["me/small"]
    assert arrived.keys() == {
        *(".gitattributes", "picture.png"),
        *("model.gguf", "manifest.json", "README.md"),
    }


def test_parts_of_others_are_not_deleted(command: Command, writer: StandIn, artifact: Path) -> None:
    writer.repositories["me/small"] = {"other.gguf": b"x"}
    done = command("push", artifact, "me/small")
    assert done.code == 2
    assert "other.gguf" in done.err
    assert "--revision" in done.err
    assert writer.commits == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unfinished(path: Path) -> None:
    (path / "manifest.json").unlink()


def rejected(path: Path) -> None:
    found = read_manifest(path)
    quality = {"rejected": "the answers are 3 nats (KL) from the source's"}
    (path / "manifest.json").write_bytes(
        Manifest.of(found.artifact, {"quality": quality}).to_json()
    )


@pytest.mark.parametrize(
    ("harm", "code", "message"),
    [
        (lambda path: flip(path / "model.gguf"), 8, "model.gguf differs"),
        (lambda path: (path / "model.gguf").unlink(), 8, "model.gguf is missing"),
        (lambda path: (path / "more.gguf").write_bytes(b"x"), 8, "more.gguf does not belong"),
        (unfinished, 3, "no manifest.json"),
        (rejected, 8, "was rejected when it was made"),
    ],
)
def test_what_is_not_whole_is_not_sent(
    command: Command,
    writer: StandIn,
    artifact: Path,
    harm: Callable[[Path], object],
    code: int,
    message: str,
) -> None:
    harm(artifact)
    done = command("push", artifact, "me/small")
    assert done.code == code
    assert message in done.err
    assert writer.requests == []


def test_plain_models_are_not_sent(command: Command, writer: StandIn, model: Path) -> None:
    done = command("push", model, "me/small")
    assert done.code == 3
    assert "edgellm convert" in done.err


@pytest.mark.parametrize("repo", ["small", "me/small/more", "me/small:x.gguf", "./small"])
def test_what_is_no_repository(command: Command, artifact: Path, repo: str) -> None:
    done = command("push", artifact, repo)
    assert done.code == 2
    assert "org/name" in done.err


def test_two_branches_and_a_base_that_is_none(
    command: Command, artifact: Path, hub: StandIn
) -> None:
    assert command("push", artifact, "me/small@a", "--revision", "b").code == 2
    done = command("push", artifact, "me/small", "--base-model", "../model", "--dry-run")
    assert done.code == 2
    assert "--base-model" in done.err


def test_without_a_token(command: Command, hub: StandIn, artifact: Path) -> None:
    done = command("push", artifact, "me/small")
    assert done.code == 3
    assert "hf auth login" in done.err
    assert hub.requests == []


def test_a_token_that_may_not_write(
    command: Command, hub: StandIn, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    done = command("push", artifact, "me/small")
    assert done.code == 3
    assert "does not let this token write to me/small" in done.err
    assert "Traceback" not in done.err


def test_offline(
    command: Command, writer: StandIn, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    done = command("push", artifact, "me/small")
    assert done.code == 3
    assert "HF_HUB_OFFLINE" in done.err
    assert command("push", artifact, "me/small", "--dry-run").code == 0


def test_an_upload_that_fails_leaves_what_was_there(
    command: Command, writer: StandIn, artifact: Path, onnx_artifact: Path
) -> None:
    assert command("push", onnx_artifact, "me/small").code == 0
    before = dict(writer.repositories["me/small"])
    writer.refuse_upload = 413
    done = command("push", artifact, "me/small")
    assert done.code == 3
    assert "413" in done.err
    assert writer.repositories["me/small"] == before
    writer.refuse_upload = 0
    assert command("push", artifact, "me/small").code == 0


def test_what_the_hub_has_is_held_against_what_was_sent(
    command: Command, writer: StandIn, artifact: Path
) -> None:
    digest = read_manifest(artifact).artifact.files[0].sha256
    writer.stored[digest] = b"another content that was there under this digest"
    done = command("push", artifact, "me/small")
    assert done.code == 3
    assert "model.gguf of me/small" in done.err
    assert "is not what was sent" in done.err


def test_the_card_says_what_was_done(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = edgellm.convert(model, out, format="onnx", quant="rtn:int4-g32", check_tokens=128)
    assert made.manifest is not None
    facts, measured = made.manifest.artifact, made.manifest.measured
    card = model_card(made, TARGET, base_model="org/tiny")
    keys = front(card)
    assert keys["base_model"] == "org/tiny"
    assert keys["base_model_relation"] == "quantized"
    assert keys["pipeline_tag"] == "text-generation"
    assert {"edgellm", "onnx", "llama", "rtn-int4-g32"} <= set(keys["tags"])
    for entry in facts.files:
        assert f"| `{entry.path}` | {entry.nbytes:,} | `{entry.sha256}` |" in card
    assert made.manifest.sha256 in card
    assert facts.base.sha256 in card
    quality = measured["quality"]
    assert f"| {quality['kld_mean']:.4g} | {quality['kld_mean_stderr']:.2g} |" in card
    assert f"| perplexity | {quality['perplexity']:.4g} |" in card
    for grid in {tensor.grid for tensor in facts.tensors}:
        assert f"| `{grid}` | " in card
    assert "onnxruntime-genai opens the folder too" in card
    assert "edgellm run small" in card


@pytest.mark.parametrize(
    ("licence", "url", "expected"),
    [
        ("apache-2.0", "", {"license": "apache-2.0"}),
        ("", "", {}),
        (
            "other",
            "https://huggingface.co/org/tiny",
            {"license": "other", "license_link": "https://huggingface.co/org/tiny"},
        ),
        (
            "Some Community License: v1",
            "",
            {"license": "other", "license_name": "Some Community License: v1"},
        ),
    ],
)
def test_the_licence_is_carried_over(
    artifact: Path, licence: str, url: str, expected: dict[str, str]
) -> None:
    base = Base(name="tiny", kind="hf", licence=licence, url=url)
    keys = front(model_card(described(artifact, base=base), TARGET))
    assert {key: value for key, value in keys.items() if "license" in key} == expected


@pytest.mark.parametrize(
    ("url", "given", "expected"),
    [
        ("https://huggingface.co/org/tiny", None, ["org/tiny"]),
        ("https://huggingface.co/org/tiny", "org/other", ["org/other"]),
        ("https://example.com/org/tiny", None, []),
        ("", None, []),
    ],
)
def test_the_base_is_linked_by_its_id(
    artifact: Path, url: str, given: str | None, expected: list[str]
) -> None:
    base = Base(name="a/b", kind="hf", url=url)  # a name that looks like an id and need not be one
    found = described(artifact, base=base)
    assert found.manifest is not None
    assert base_models(found.manifest.artifact, given) == expected
    assert front(model_card(found, TARGET, base_model=given)).get("base_model") == (
        expected[0] if expected else None
    )


def test_merged_weights_are_a_merge_and_rounded_ones_are_quantized(
    model: Path, tmp_path: Path, hub: StandIn
) -> None:
    write_adapter(tmp_path / "files", seed=1)
    hub.repositories["org/lora"] = {
        file.name: file.read_bytes() for file in (tmp_path / "files").iterdir()
    }
    merged = edgellm.merge(model, tmp_path / "merged", adapters=["org/lora"])
    rounded = edgellm.convert(
        model, tmp_path / "q8", adapters=["org/lora"], format="gguf", quant="q8_0", check=False
    )
    for artifact, expected in ((merged, "merge"), (rounded, "quantized")):
        assert artifact.manifest is not None
        assert relation(artifact.manifest.artifact) == expected
        card = model_card(artifact, TARGET, base_model="org/tiny")
        assert front(card)["base_model"] == ["org/tiny", "org/lora"]
        assert "merged into it: org/lora" in card


def test_a_card_with_a_checksum_goes_as_it_is(
    command: Command, writer: StandIn, artifact: Path
) -> None:
    card = b"---\r\nlicense: mit\r\n---\r\n# as the first versions had it\r\n"
    (artifact / "README.md").write_bytes(card)
    found = read_manifest(artifact).artifact
    entry = FileEntry(path="README.md", nbytes=len(card), sha256=sha256(card))
    found = msgspec.structs.replace(found, files=(*found.files, entry))
    (artifact / "manifest.json").write_bytes(Manifest.of(found, {}).to_json())
    done = command("push", artifact, "me/small")
    assert done.code == 0, done.err
    assert writer.repositories["me/small"]["README.md"] == card
    assert "convert again for a card" in done.err


def test_words_of_others_make_no_markup(artifact: Path) -> None:
    base = Base(name="x](http://evil) <b>|\n# y", kind="hf")
    card = model_card(described(artifact, base=base), TARGET)
    assert "\n# y" not in card
    assert "](http://evil)" not in card.replace("\\]", "")
    assert "<b>" not in card.replace("\\<b\\>", "")
