"""Hub ids against a stand-in for the Hub on this machine: cache, offline, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from edgellm.errors import AdapterError, HubError, SourceError
from edgellm.lora.reading.open import open_adapter
from edgellm.progress import ProgressEvent
from edgellm.source import open_source
from edgellm.source.hub import (
    HubId,
    download,
    needed_adapter_files,
    needed_files,
    parse_hub_id,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class StandIn:
    """What the stand-in holds, and what it was asked for."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut_short: bool = False
    requests: list[str] = field(default_factory=list)

    def fetched(self) -> set[str]:
        """Names of files whose content was sent."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", x) for x in self.requests)
        return {match[1] for match in found if match}


def handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            parts = path.strip("/").split("/")
            repo = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
            if repo in hub.refusals:
                status, code = hub.refusals[repo]
                return self.send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "no"})
            files = hub.repositories.get(repo)
            if files is None:
                return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            if parts[:2] == ["api", "models"]:
                if parts[4:5] == ["tree"]:
                    return self.send_json([tree_entry(name, files[name]) for name in files])
                revision = parts[5] if parts[4:5] == ["revision"] else "main"
                if revision not in ("main", "v1", COMMIT):
                    return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
                card = {"license": "mit"}
                return self.send_json(
                    {"id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card}
                )
            name = "/".join(parts[4:])
            if name not in files:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            digest = hashlib.sha256(files[name]).hexdigest()
            return self.send(200, files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})

        def send_json(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                cut = hub.cut_short and len(body) > 10_000
                self.wfile.write(body[: len(body) // 2] if cut else body)
                self.close_connection = cut

        def log_message(self, *args: Any) -> None:
            """Be quiet."""

    return Handler


def tree_entry(name: str, content: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(content).hexdigest()
    return {"type": "file", "path": name, "size": len(content), "oid": oid}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in and an empty cache; the variables behind were read when the library came in."""
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stand_in))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    huggingface_hub.close_session()
    yield stand_in
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()
    thread.join()


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


@pytest.mark.parametrize(
    ("wanted", "names", "error", "message"),
    [
        ("o/n", ["pytorch_model.bin", "config.json"], SourceError, "run any code.*@refs/pr/1"),
        ("o/n", ["a.gguf", "b.gguf"], HubError, "name one, such as o/n:a.gguf"),
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
    assert (source.name, source.revision, source.licence) == ("org/tiny", COMMIT, "mit")
    assert source.url == "https://huggingface.co/org/tiny"
    local = open_source(str(folder))
    role = "blk.0.attn_q.weight"
    np.testing.assert_array_equal(source.tensors[role].load(), local.tensors[role].load())
    assert hub.fetched() == set(content(folder))

    size = sum(len(x) for x in content(folder).values())
    assert {event.stage for event in events} == {"download"}
    assert (events[-1].done_bytes, events[-1].total_bytes) == (size, size)
    done = [event.done_bytes for event in events]
    assert done == sorted(done)

    hub.requests.clear()
    events.clear()
    assert open_source("org/tiny", progress=events.append).revision == COMMIT
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
    assert (adapter.name, adapter.revision, adapter.weight) == ("org/tuned", COMMIT, 0.5)
    assert adapter.base_name == "org/tiny"
    assert adapter.tokenizer_folder == adapter.path
    parts = adapter.parts["model.layers.0.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(parts["lora_A"].load(), np.full((1, 32), 2.0))
    assert {event.stage for event in events} == {"download"}

    hub.requests.clear()
    assert open_adapter("org/tuned@v1").revision == COMMIT
    assert hub.fetched() == set()


def test_a_cached_adapter_is_taken_when_the_hub_is_down(
    hub: StandIn, to_safetensors: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["org/tuned"] = adapter_files(to_safetensors)
    open_adapter("org/tuned")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    adapter = open_adapter("org/tuned")
    assert adapter.revision == COMMIT
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
    assert open_source("org/tiny@v1").revision == COMMIT
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
    assert source.revision == COMMIT
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
        ((403, "GatedRepo"), "gated: accept its terms at https://huggingface.co/org/tiny.*login"),
        ((401, "RepoNotFound"), "neither a file or folder org/tiny here nor a model"),
        ((404, "RepoNotFound"), "neither a file or folder org/tiny here nor a model"),
        ((429, ""), "could not be fetched.*429"),
    ],
)
def test_refusals_say_what_to_do(hub: StandIn, refusal: tuple[int, str], message: str) -> None:
    hub.refusals["org/tiny"] = refusal
    with pytest.raises(HubError, match=message):
        open_source("org/tiny")


def test_a_broken_download_is_an_error_and_is_taken_up_again(
    hub: StandIn, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's pauses between tries
    hub.repositories["org/tiny"] = content(folder)
    hub.cut_short = True
    with pytest.raises(HubError, match="could not be fetched"):
        open_source("org/tiny")
    hub.cut_short = False
    assert open_source("org/tiny").tensors
