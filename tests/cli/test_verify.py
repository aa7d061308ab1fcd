"""``edgellm verify``: exit code 0 or 1, and the file or tensor by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgellm.manifest import read_manifest

from .conftest import Command


@pytest.fixture
def artifact(gguf_artifact: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(gguf_artifact, tmp_path / "small"))


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_whole(command: Command, artifact: Path) -> None:
    done = command("verify", artifact)
    assert done.code == 0
    assert str(artifact) in done.out
    assert command("verify", artifact, "--json").json()["verified"] is True


def test_a_flipped_byte_names_its_tensor(command: Command, artifact: Path) -> None:
    assert command("verify", artifact).code == 0  # what it remembers must not hide the damage
    made = read_manifest(artifact).artifact
    tensor = made.tensors[len(made.tensors) // 2]
    _, offset, nbytes = tensor.arrays[0]
    flip_byte(artifact / made.main_file, offset + nbytes // 2)
    done = command("verify", artifact)
    assert done.code == 1
    assert tensor.name in done.err
    assert done.out == ""
    as_json = command("verify", artifact, "--json")
    assert as_json.code == 1
    assert as_json.json()["verified"] is False
    assert tensor.name in as_json.json()["reason"]


def test_a_missing_file_is_named(command: Command, artifact: Path) -> None:
    main_file = read_manifest(artifact).artifact.main_file
    (artifact / main_file).unlink()
    done = command("verify", artifact)
    assert done.code == 1
    assert main_file in done.err


def test_a_changed_manifest_is_damage(command: Command, artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace('"licence": "', '"licence": "free, '))
    done = command("verify", artifact)
    assert done.code == 1
    assert "manifest.json" in done.err


def test_a_newer_schema_is_not_damage(command: Command, artifact: Path) -> None:
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["artifact"]["schema_version"] = 99
    path.write_text(json.dumps(manifest))
    done = command("verify", artifact)
    assert done.code == 3
    assert "99" in done.err


def test_what_is_no_artifact(command: Command, model: Path, tmp_path: Path) -> None:
    for path in (model, tmp_path / "nowhere", Path(__file__)):
        done = command("verify", path)
        assert done.code == 3
        assert str(path) in done.err


def test_a_plain_file_has_nothing_to_verify_against(command: Command, tmp_path: Path) -> None:
    (tmp_path / "plain.gguf").write_bytes(b"GGUF....")
    done = command("verify", tmp_path / "plain.gguf")
    assert done.code == 3
    assert "nothing to verify it against" in done.err
