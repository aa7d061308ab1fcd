"""Hub ids against a stand-in for the Hub on this machine: cache, offline, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from hub_server import StandIn, commit_of
from huggingface_hub import constants

from edgellm.conversion import convert
from edgellm.errors import AdapterError, HubError, SourceError
from edgellm.hub.download import download
from edgellm.hub.ids import HubId, parse_hub_id
from edgellm.hub.needed import needed_adapter_files, needed_files
from edgellm.lora.reading.open import open_adapter
from edgellm.progress import ProgressEvent
from edgellm.recipe import Recipe
from edgellm.source import open_source


@pytest.fixture
def folder(write_model: Callable[..., Path], tensors: dict[str, Any]) -> Path:
    return write_model(tensors)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/1", HubId("org/name", "refs/pr/1")),
        ("org/name:x.gguf", HubId("org/name", None, "x.gguf")),
        ("org/name@v1:q4/x.gguf", HubId("org/name", "v1", "q4/x.gguf")),
        ("name", None),
        ("/org/name", None),
        ("org/name/more", None),
        ("org/name:x.bin", None),
        ("C:/models", None),
        ("", None),
    ],
)
def test_hub_ids(text: str, expected: HubId | None) -> None:
    assert parse_hub_id(text) == expected


@pytest.mark.parametrize(
    ("wanted", "names", "expected"),
    [
        (
            "o/n",
            [
                "config.json",
                "model.fp16.safetensors",
                "model.safetensors",
                "x.bin",
                "onnx/config.json",
                "model.gguf",
                "additional_chat_templates/tool_use.jinja",
            ],
            ["additional_chat_templates/tool_use.jinja", "config.json", "model.safetensors"],
        ),
        (
            "o/n",
            [
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "consolidated.safetensors",
                "tokenizer.json",
                "original/model.safetensors",
            ],
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "tokenizer.json",
            ],
        ),
        (
            "o/n",
            ["model.fp16.safetensors", "model.bf16.safetensors", "pytorch_model.bin"],
            ["model.bf16.safetensors"],
        ),
        ("o/n", ["only.safetensors", "pytorch_model.bin"], ["only.safetensors"]),
        (  # an encoder of sentence-transformers
            "o/n",
            [
                "1_Pooling/config.json",
                "2_Dense/model.safetensors",
                "config.json",
                "config_sentence_transformers.json",
                "model.safetensors",
                "modules.json",
                "onnx/config.json",
                "sentence_bert_config.json",
                "vocab.txt",
            ],
            [
                "1_Pooling/config.json",
                "2_Dense/model.safetensors",
                "config.json",
                "config_sentence_transformers.json",
                "model.safetensors",
                "modules.json",
                "sentence_bert_config.json",
                "vocab.txt",
            ],
        ),
        ("o/n:a.gguf", ["a.gguf", "b.gguf", "config.json"], ["a.gguf"]),
        (
            "o/n:q/a-00001-of-00002.gguf",
            ["q/a-00001-of-00002.gguf", "q/a-00002-of-00002.gguf", "q/a-00001-of-00003.gguf"],
            ["q/a-00001-of-00002.gguf", "q/a-00002-of-00002.gguf"],
        ),
    ],
)
def test_only_what_is_needed_is_chosen(wanted: str, names: list[str], expected: list[str]) -> None:
    hub_id = parse_hub_id(wanted)
    assert hub_id is not None
    assert needed_files(hub_id, names) == expected


@pytest.mark.parametrize("newer", [True, False])
def test_older_tokenizers_are_fetched_where_there_is_no_newer_one(newer: bool) -> None:
    older = ["qwen.tiktoken", "spiece.model", "tekken.json", "vocab.txt"]
    names = ["model.safetensors", "config.json", "original/tokenizer.tiktoken", *older]
    names += ["tokenizer.json"] if newer else []
    found = set(needed_files(HubId("org/name"), names))
    assert found.isdisjoint(older) if newer else found.issuperset(older)
    assert "original/tokenizer.tiktoken" not in found


@pytest.mark.parametrize(
    ("wanted", "names", "error", "message"),
    [
        ("o/n", ["pytorch_model.bin", "config.json"], SourceError, "run any code.*@refs/pr/1"),
        ("o/n", ["a.gguf", "b.gguf"], HubError, "name one, such as o/n:a.gguf"),
        ("o/n", ["a.safetensors", "b.safetensors"], HubError, "which make the model.*hf download"),
        ("o/n", ["README.md"], HubError, "holds no weights"),
        ("o/n:a.Q5.gguf", ["a.Q4.gguf", "x.json"], HubError, "no a.Q5.gguf; it has a.Q4.gguf"),
    ],
)
def test_repositories_without_a_model_say_why(
    wanted: str, names: list[str], error: type[Exception], message: str
) -> None:
    hub_id = parse_hub_id(wanted)
    assert hub_id is not None
    with pytest.raises(error, match=message):
        needed_files(hub_id, names)


def test_a_model_is_fetched_once_and_then_cached(hub: StandIn, folder: Path) -> None:
    extra = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x", "notes.txt": b"x"}
    hub.repositories["org/tiny"] = content(folder) | extra
    events: list[ProgressEvent] = []
    source = open_source("org/tiny", progress=events.append)
    commit = commit_of(hub.repositories["org/tiny"])
    assert (source.name, source.revision, source.licence) == ("org/tiny", commit, "apache-2.0")
    assert source.url == "https://huggingface.co/org/tiny"
    local = open_source(str(folder))
    role = "blk.0.attn_q.weight"
    np.testing.assert_array_equal(source.tensors[role].load(), local.tensors[role].load())
    assert hub.fetched() == set(content(folder))

    size = sum(len(x) for x in content(folder).values())
    for stage in ("download", "checksum"):
        done = [event.done_bytes for event in events if event.stage == stage]
        assert done == sorted(done)
        assert done[-1] == size
        assert events[-1].total_bytes == size

    hub.requests.clear()
    events.clear()
    assert open_source("org/tiny", progress=events.append).revision == commit
    assert hub.fetched() == set()
    assert events == []


ADAPTER = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": "org/tiny"}


def adapter_files(to_safetensors: Callable[..., bytes]) -> dict[str, bytes]:
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": np.full((1, 32), 2.0, np.float32),
        f"{prefix}.lora_B.weight": np.full((32, 1), 0.5, np.float32),
    }
    return {
        "adapter_config.json": json.dumps(ADAPTER).encode(),
        "adapter_model.safetensors": to_safetensors(tensors),
    }


def test_an_adapter_is_fetched_without_what_stands_beside_it(
    hub: StandIn, to_safetensors: Callable[..., bytes], folder: Path
) -> None:
    files = adapter_files(to_safetensors)
    tokenizer = {"tokenizer.json": (folder / "tokenizer.json").read_bytes(), "README.md": b"x"}
    others = {"optimizer.pt": b"x", "checkpoint-9/adapter_model.safetensors": b"x", "a.bin": b"x"}
    hub.repositories["org/tuned"] = files | tokenizer | others
    events: list[ProgressEvent] = []
    adapter = open_adapter("org/tuned=0.5", progress=events.append)
    assert hub.fetched() == set(files | tokenizer)
    commit = commit_of(hub.repositories["org/tuned"])
    assert (adapter.name, adapter.revision, adapter.weight) == ("org/tuned", commit, 0.5)
    assert adapter.base_name == "org/tiny"
    assert adapter.tokenizer_folder == adapter.path
    parts = adapter.parts["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(parts["lora_A"].load(), np.full((1, 32), 2.0))
    assert {event.stage for event in events} == {"download", "checksum"}

    hub.requests.clear()
    assert open_adapter("org/tuned@v1").revision == commit
    assert hub.fetched() == set()


def test_a_cached_adapter_is_taken_when_the_hub_is_down(
    hub: StandIn, to_safetensors: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tuned"] = adapter_files(to_safetensors)
    open_adapter("org/tuned")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    adapter = open_adapter("org/tuned")
    assert adapter.revision == commit_of(hub.repositories["org/tuned"])
    assert "taken from the cache" in adapter.notes[0]


@pytest.mark.parametrize(
    ("wanted", "names", "error", "message"),
    [
        (
            "o/n",
            ["adapter_config.json", "adapter_model.bin"],
            AdapterError,
            r"pickle \(adapter_model.bin\).*@refs/pr/1.*safe_serialization=True",
        ),
        (
            "o/n",
            ["config.json", "model.safetensors"],
            AdapterError,
            "is no adapter that PEFT saved",
        ),
        ("o/n", ["adapter_model.safetensors"], AdapterError, r"has no adapter_config.json"),
        ("o/n", ["lora.gguf", "README.md"], AdapterError, "such as o/n:lora.gguf"),
        ("o/n:x.gguf", ["lora.gguf"], HubError, "has no x.gguf"),
    ],
)
def test_repositories_without_an_adapter_say_why(
    wanted: str, names: list[str], error: type[Exception], message: str
) -> None:
    hub_id = parse_hub_id(wanted)
    assert hub_id is not None
    with pytest.raises(error, match=message):
        needed_adapter_files(hub_id, names)


def test_a_revision_is_asked_for(hub: StandIn, folder: Path) -> None:
    hub.repositories["org/tiny"] = content(folder)
    assert open_source("org/tiny@v1").revision == commit_of(hub.repositories["org/tiny"])
    with pytest.raises(HubError, match="no revision v2 of org/tiny"):
        open_source("org/tiny@v2")


def test_a_gguf_is_fetched_by_its_name(hub: StandIn) -> None:
    empty = b"GGUF" + (3).to_bytes(4, "little") + bytes(16) + bytes(8)
    hub.repositories["org/ggufs"] = {"q4/a.gguf": empty, "b.gguf": b"other"}
    found = download(HubId("org/ggufs", None, "q4/a.gguf"), lambda event: None)
    assert found.path.read_bytes() == empty
    assert hub.fetched() == {"q4/a.gguf"}


def test_offline_takes_the_cache_and_says_so(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = content(folder)
    open_source("org/tiny")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    source = open_source("org/tiny")
    assert source.revision == commit_of(hub.repositories["org/tiny"])
    assert source.licence == "apache-2.0"  # from the model card on disk
    assert any("taken from the cache" in note for note in source.notes)
    assert hub.requests == []
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids"):
        open_source("org/other")


def test_a_hub_that_is_down_takes_the_cache(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = content(folder)
    open_source("org/tiny")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert any("taken from the cache" in note for note in open_source("org/tiny").notes)
    with pytest.raises(HubError, match=r"could not be fetched.*run the same command again"):
        open_source("org/other")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "neither a file or folder org/tiny here nor a model"),
        ((404, "RepoNotFound"), "neither a file or folder org/tiny here nor a model"),
        ((429, ""), "could not be fetched.*429"),
    ],
)
def test_refusals_say_what_to_do(hub: StandIn, refusal: tuple[int, str], message: str) -> None:
    hub.refusals["org/tiny"] = refusal
    with pytest.raises(HubError, match=message):
        open_source("org/tiny")


def test_a_broken_download_goes_on_where_it_broke(
    hub: StandIn,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's pauses between tries
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 5000)  # what is kept of a broken one
    files = content(folder)
    hub.repositories["org/tiny"] = files
    hub.cut_at, hub.cuts = 10_000, 1
    weights = open_source("org/tiny").path / "model.safetensors"
    assert hub.ranges == ["bytes=10000-"]
    assert weights.read_bytes() == files["model.safetensors"]
    assert capsys.readouterr().err == ""


def test_a_download_that_does_not_go_on_is_an_error_and_is_taken_up_again(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.repositories["org/tiny"] = content(folder)
    hub.cut_at, hub.cuts = 10_000, 1000
    with pytest.raises(HubError, match=r"could not be fetched.*same command again"):
        open_source("org/tiny")
    hub.cuts = 0
    hub.requests.clear()
    assert open_source("org/tiny").tensors
    assert "config.json" not in hub.fetched()  # what had arrived whole is kept


def gate(hub: StandIn, folder: Path) -> None:
    hub.repositories["org/tiny"] = content(folder)
    hub.gated["org/tiny"] = {"hf_granted"}


def test_a_gated_repository_without_a_token(hub: StandIn, folder: Path) -> None:
    gate(hub, folder)
    with pytest.raises(
        HubError,
        match=r"is gated and no token is set: accept its terms at https://huggingface.co/org/tiny"
        r".*settings/tokens.*hf auth login",
    ):
        open_source("org/tiny")


def test_a_gated_repository_with_a_token_that_has_no_access(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate(hub, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="token that is set has no access to it: accept its terms"):
        open_source("org/tiny")


def test_a_gated_repository_that_was_granted_and_is_cached_then(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate(hub, folder)
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    assert open_source("org/tiny").tensors
    assert set(hub.tokens_at_cdn) == {""}  # the token goes to the Hub alone
    monkeypatch.delenv("HF_TOKEN")
    assert open_source("org/tiny").tensors


def test_a_gate_before_the_facts_says_the_same(hub: StandIn) -> None:
    hub.refusals["org/tiny"] = (403, "GatedRepo")
    with pytest.raises(HubError, match="is gated and no token is set"):
        open_source("org/tiny")


def test_a_token_that_is_not_accepted(hub: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    hub.refusals["org/tiny"] = (401, "InvalidToken")
    with pytest.raises(HubError, match="does not accept the token that is set"):
        download(HubId("org/tiny"), lambda event: None)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_named(hub: StandIn, folder: Path, name: str) -> None:
    hub.repositories["org/tiny"] = content(folder)
    hub.damaged.add(name)
    kind = "sha256" if name == "model.safetensors" else "git's sha1"
    with pytest.raises(HubError, match=f"{name} has {kind} [0-9a-f]+ instead of.*Delete "):
        open_source("org/tiny")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("offline", [False, True])
def test_a_cached_file_that_was_damaged_since_is_named_and_fetched_anew(
    hub: StandIn, folder: Path, name: str, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = content(folder)
    cached = open_source("org/tiny").path / name
    blob = cached.resolve()
    stored = bytearray(blob.read_bytes())
    stored[-1] ^= 1
    blob.write_bytes(stored)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(HubError, match=rf"{name} has .*Delete {blob} and run the same command"):
        open_source("org/tiny")
    with pytest.raises(HubError, match=f"{name} has "):  # not forgotten by the next run
        open_source("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    blob.unlink()
    hub.requests.clear()
    assert open_source("org/tiny").tensors
    assert hub.fetched() == {name}
    assert cached.read_bytes() == content(folder)[name]


def test_offline_takes_what_was_needed_of_a_repository_that_has_more(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"x", "LICENSE": b"x"}
    hub.repositories["org/tiny"] = content(folder) | others
    open_source("org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert any("taken from the cache" in note for note in open_source("org/tiny").notes)


@pytest.mark.parametrize("lost", ["README.md", "model.safetensors", "tokenizer.json"])
def test_offline_a_part_of_a_model_is_not_taken_for_the_whole(
    hub: StandIn, folder: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = content(folder)
    (open_source("org/tiny").path / lost).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"only a part of org/tiny.*HF_HUB_OFFLINE"):
        open_source("org/tiny")


def test_what_does_not_fit_on_the_disk_is_not_begun(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tiny"] = content(folder)
    full = SimpleNamespace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda place: full)
    with pytest.raises(HubError, match=r"needs .* MB more.*edgellm models.*HF_HOME"):
        open_source("org/tiny")
    assert hub.fetched() == set()


@pytest.mark.parametrize("format", ["onnx", "hf"])
def test_offline_the_same_is_made_as_online(
    format: str, hub: StandIn, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest covers lineage and notes; that the Hub was not asked stands beside it."""
    hub.repositories["org/tiny"] = content(folder)
    recipe = Recipe(source="org/tiny", format=format, quant="f16")
    online = convert(recipe, tmp_path / "online", check=False).manifest
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    offline = convert(recipe, tmp_path / "offline", check=False).manifest
    assert online is not None
    assert offline is not None
    assert online.artifact.base.licence == "apache-2.0"
    assert offline.artifact == online.artifact
    assert offline.sha256 == online.sha256
    assert "notes" not in online.measured
    assert offline.measured["notes"] == [
        "the Hub was not asked for a newer org/tiny: taken from the cache"
    ]


def test_offline_a_gguf_has_the_licence_of_its_card(
    hub: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = b"---\nlicense: mit\n---\n"
    hub.repositories["org/ggufs"] = {"a.gguf": b"GGUF", "b.gguf": b"other", "README.md": card}
    wanted = HubId("org/ggufs", None, "a.gguf")
    online = download(wanted, lambda event: None)
    assert hub.fetched() == {"a.gguf", "README.md"}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    offline = download(wanted, lambda event: None)
    assert (online.licence, offline.licence) == ("mit", "mit")
    assert (offline.path, offline.revision) == (online.path, online.revision)
    # One that was fetched without its card is taken too.
    (online.path.parent / "README.md").unlink()
    assert download(wanted, lambda event: None).licence == ""


def test_python_of_a_models_own_is_fetched_for_those_who_trust_it(
    hub: StandIn, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_own.OwnModel"}
    python = {"modeling_own.py": b"raise SystemExit(1)", "tools/other.py": b""}
    hub.repositories["org/own"] = content(folder) | python
    hub.repositories["org/own"]["config.json"] = json.dumps(config).encode()
    source = open_source("org/own")
    assert source.code is None
    (note,) = [note for note in source.notes if "auto_map" in note]
    assert "was not run: modeling_own.py" in note
    assert f"read as {source.family.architecture}" in note
    assert not hub.fetched() & python.keys()
    trusted = open_source("org/own", trust_remote_code=True)
    assert hub.fetched() & python.keys() == {"modeling_own.py"}
    assert trusted.code is not None
    assert any("may be run, as you trust it: modeling_own.py" in note for note in trusted.notes)
    assert not any("was run" in note for note in trusted.notes)
    assert trusted.code.digests().keys() == {"modeling_own.py"}
