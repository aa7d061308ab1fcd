"""A stand-in for the Hugging Face Hub on this machine: what its documented endpoints answer.

It serves downloads with ranges and the Hub's headers, and takes uploads, small files within the
commit and large ones by LFS. It can refuse, damage and cut.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

WRITER = "hf_writer"
"""A token that may write everywhere."""

LARGE = (".safetensors", ".gguf", ".onnx", ".data", ".bin", "tokenizer.json")
"""Ends of names of files that are kept by LFS."""


@dataclass
class StandIn:
    """What it holds, how it misbehaves, and what it was asked.

    ``gated``: by repository the tokens that may read its files. ``cut_at``: where in a file the
    connection breaks, ``cuts`` times. ``damaged``: names of files that arrive with another byte.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)
    gated: dict[str, set[str]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)
    cut_at: int = 0
    cuts: int = 0
    refuse_upload: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    tokens_at_cdn: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def cdn(self) -> str:
        """Where large files lie: another host, so that it must not be sent the token."""
        return self.url.replace("127.0.0.1", "localhost")

    def fetched(self) -> set[str]:
        """Names of files whose content was asked for."""
        found = (re.fullmatch(r"GET /[^/]+/[^/]+/resolve/[^/]+/(.+)", x) for x in self.requests)
        names = {match[1] for match in found if match}
        wanted = {x.removeprefix("GET /cdn/") for x in self.requests if x.startswith("GET /cdn/")}
        for files in self.repositories.values():
            names |= {name for name, content in files.items() if sha256(content) in wanted}
        return names

    def revision(self, repo: str, name: str) -> dict[str, bytes] | None:
        """The files of a revision: ``main``, its commit, the tag ``v1`` of it, or a branch."""
        main = self.repositories[repo]
        if name in ("main", "v1", commit_of(main)):
            return main
        of_branches = {k[1]: files for k, files in self.branches.items() if k[0] == repo}
        of_branches |= {commit_of(files): files for files in of_branches.values()}
        return of_branches.get(name)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    """As ``git hash-object`` has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def commit_of(files: dict[str, bytes]) -> str:
    """A name that stands for just these files."""
    content = json.dumps({name: sha256(files[name]) for name in sorted(files)})
    return hashlib.sha1(content.encode()).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


def pointer(content: bytes) -> bytes:
    """What git holds of a file that LFS keeps."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(content)}\n"
    return f"{text}size {len(content)}\n".encode()


def entry(name: str, content: bytes) -> dict[str, Any]:
    """A file as the listing of a revision has it."""
    if not is_large(name):
        return {"size": len(content), "blobId": git_sha1(content)}
    held = pointer(content)
    lfs = {"sha256": sha256(content), "size": len(content), "pointerSize": len(held)}
    return {"size": len(content), "blobId": git_sha1(held), "lfs": lfs}


def handler(hub: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        @property
        def token(self) -> str:
            return self.headers.get("Authorization", "").removeprefix("Bearer ")

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            body = self.body()
            parts = path.strip("/").split("/")
            if parts[0] == "cdn":
                hub.tokens_at_cdn.append(self.token)
                content = next(x for x in self.contents() if sha256(x) == parts[1])
                return self.send_part(content, parts[1])
            if parts[0] == "lfs":
                return self.take(parts[1], body)
            if path == "/api/repos/create":
                return self.create(json.loads(body))
            if path == "/api/validate-yaml":
                return self.validate(json.loads(body)["content"])
            repo = "/".join(parts[2:4] if parts[:2] == ["api", "models"] else parts[:2])
            repo = repo.removesuffix(".git")
            if repo in hub.refusals:
                status, code = hub.refusals[repo]
                return self.refuse(status, code)
            if repo not in hub.repositories or (repo in hub.private and self.token != WRITER):
                return self.refuse(404 if self.token else 401, "RepoNotFound")
            if self.command == "POST" and self.token != WRITER:
                return self.refuse(403, "")
            if parts[:2] == ["api", "models"]:
                return self.api(repo, parts[4:], body)
            if parts[2:] == ["info", "lfs", "objects", "batch"]:
                return self.batch(json.loads(body))
            return self.resolve(repo, parts[3], "/".join(parts[4:]))

        def api(self, repo: str, parts: list[str], body: bytes) -> None:
            action = parts[0] if parts else "revision"
            name = "/".join(parts[1:]) or "main"
            if action == "branch":
                if (repo, name) in hub.branches:
                    return self.refuse(409, "")
                hub.branches[repo, name] = dict(hub.repositories[repo])
                return self.send_json({})
            files = hub.revision(repo, name)
            if files is None:
                return self.refuse(404, "RevisionNotFound")
            if action == "preupload":
                return self.preupload(files, json.loads(body))
            if action == "commit":
                return self.commit(repo, name, files, body)
            if action == "tree":
                return self.send_json([tree_entry(name, files[name]) for name in files])
            siblings = [{"rfilename": name} | entry(name, files[name]) for name in files]
            facts = {"id": repo, "sha": commit_of(files), "siblings": siblings}
            facts["private"] = repo in hub.private
            return self.send_json(facts | {"cardData": {"license": "mit"}})

        def resolve(self, repo: str, revision: str, name: str) -> None:
            files = hub.revision(repo, revision)
            if files is None or name not in files:
                return self.refuse(404, "EntryNotFound")
            if repo in hub.gated and self.token not in hub.gated[repo]:
                return self.refuse(403 if self.token else 401, "GatedRepo")
            content = files[name]
            headers = {"X-Repo-Commit": commit_of(files)}
            if not is_large(name):
                return self.send_part(content, git_sha1(content), headers, name)
            headers["X-Linked-Etag"] = f'"{sha256(content)}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{hub.cdn}/cdn/{sha256(content)}"
            return self.send(302, b"", headers)

        def contents(self) -> Iterator[bytes]:
            for files in (*hub.repositories.values(), *hub.branches.values()):
                yield from files.values()

        def create(self, asked: dict[str, Any]) -> None:
            if self.token != WRITER:
                return self.refuse(403 if self.token else 401, "")
            repo = f"{asked['organization']}/{asked['name']}"
            known = repo in hub.repositories
            if not known:
                hub.repositories[repo] = {".gitattributes": b"*.gguf filter=lfs\n"}
                if asked.get("visibility") == "private" or asked.get("private"):
                    hub.private.add(repo)
            return self.send_json({"url": f"{hub.url}/{repo}"}, 409 if known else 200)

        def validate(self, card: str) -> None:
            front = yaml.safe_load(card.split("---")[1])
            errors = [
                {"message": f'"{key}" must be a string'}
                for key in ("license", "pipeline_tag", "library_name", "base_model_relation")
                if not isinstance(front.get(key, ""), str)
            ]
            if front.get("license", "mit") not in ("mit", "apache-2.0", "other"):
                errors.append({"message": '"license" must be one of [mit, apache-2.0, other]'})
            bases = front.get("base_model", [])
            for base in [bases] if isinstance(bases, str) else bases:
                if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
                    errors.append({"message": f'"base_model" with value "{base}" is not valid'})
            self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)

        def preupload(self, files: dict[str, bytes], asked: dict[str, Any]) -> None:
            answers = []
            for each in asked["files"]:
                name = each["path"]
                known = entry(name, files[name])["blobId"] if name in files else None
                mode = "lfs" if is_large(name) else "regular"
                answers.append(
                    {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known}
                )
            self.send_json({"files": answers})

        def batch(self, asked: dict[str, Any]) -> None:
            objects = []
            for each in asked["objects"]:
                href = f"{hub.url}/lfs/{each['oid']}"
                actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
                objects.append(each if each["oid"] in hub.stored else each | {"actions": actions})
            self.send_json({"objects": objects, "transfer": "basic"})

        def take(self, oid: str, body: bytes) -> None:
            if self.command == "PUT":
                if hub.refuse_upload:
                    return self.refuse(hub.refuse_upload, "")
                hub.stored[oid] = body
                return self.send_json({})
            whole = sha256(hub.stored[oid]) == oid and json.loads(body)["oid"] == oid
            return self.send_json({}, 200 if whole else 400)

        def commit(self, repo: str, branch: str, files: dict[str, bytes], body: bytes) -> None:
            after = dict(files)
            for line in body.splitlines():
                item = json.loads(line)
                key, value = item["key"], item["value"]
                if key == "header":
                    hub.commits.append({"repo": repo, "branch": branch, **value})
                elif key == "file":
                    after[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    after[value["path"]] = hub.stored[value["oid"]]
                else:
                    assert key == "deletedFile"
                    del after[value["path"]]
            if branch == "main":
                hub.repositories[repo] = after
            else:
                hub.branches[repo, branch] = after
            commit = commit_of(after)
            self.send_json({"commitUrl": f"{hub.url}/{repo}/commit/{commit}", "commitOid": commit})

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))
            pieces = []
            while size := int(self.rfile.readline(), 16):
                pieces.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(pieces)

        def send_json(self, value: Any, status: int = 200) -> None:
            self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": "no"} if code else {}
            self.send(status, b"{}", headers)

        def send_part(
            self, content: bytes, etag: str, headers: dict[str, str] | None = None, name: str = ""
        ) -> None:
            """The content, or the range of it that is asked for; broken off where it should be."""
            head = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **(headers or {})}
            names = {name} | {
                each
                for files in hub.repositories.values()
                for each, held in files.items()
                if held == content
            }
            if names & hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            start, status = 0, 200
            if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
                start, status = int(asked[1]), 206
                head["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                hub.ranges.append(asked[0])
            cut = self.command == "GET" and hub.cuts > 0 and len(content) > hub.cut_at
            hub.cuts -= cut
            stop = max(start, hub.cut_at) if cut else len(content)
            head["Content-Length"] = str(len(content) - start)
            self.send(status, content[start:stop], head)
            self.close_connection |= cut

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Be quiet."""

    return Handler


def tree_entry(name: str, content: bytes) -> dict[str, Any]:
    facts = entry(name, content)
    found = {"type": "file", "path": name, "size": len(content), "oid": facts["blobId"]}
    if "lfs" in facts:
        found["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
    return found


@contextmanager
def serving() -> Iterator[StandIn]:
    """A stand-in that answers at its ``url`` until the block ends."""
    stand_in = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(stand_in))
    server.daemon_threads = True
    stand_in.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield stand_in
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
