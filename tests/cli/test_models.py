"""``edgellm models``: what is listed, and that removing deletes that and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest
from hub_server import StandIn, commit_of, git_sha1, sha256
from huggingface_hub import constants, snapshot_download

import edgellm
from edgellm.manifest import Manifest, read_manifest

from .conftest import Command
from .test_convert_adapter import write_adapter


@pytest.fixture
def artifact(gguf_artifact: Path, tmp_path: Path) -> Path:
    """A copy to remove."""
    return Path(shutil.copytree(gguf_artifact, tmp_path / "copies" / "small"))


@pytest.fixture
def cached(hub: StandIn, model: Path) -> Path:
    """The snapshot of org/tiny in the cache."""
    hub.repositories["org/tiny"] = {
        file.name: file.read_bytes() for file in model.iterdir() if file.is_file()
    } | {"README.md": b"---\nlicense: mit\n---\n"}
    return Path(snapshot_download("org/tiny"))


def test_nothing_is_said_where_nothing_is(command: Command, hub: StandIn) -> None:
    done = command("models")
    assert done.code == 0
    assert "nothing from the Hub" in done.out
    assert "no artifact was made here" in done.out
    found = command("models", "--json").json()
    assert (found["cache"]["models"], found["artifacts"]) == ([], [])


def test_what_is_cached_is_listed_with_its_digests(
    command: Command, hub: StandIn, cached: Path
) -> None:
    files = hub.repositories["org/tiny"]
    (found,) = command("models", "--json").json()["cache"]["models"]
    assert found["repo"] == "org/tiny"
    assert found["nbytes"] == sum(map(len, files.values()))
    (revision,) = found["revisions"]
    assert revision["commit"] == commit_of(files)
    assert (revision["refs"], revision["licence"]) == (["main"], "mit")
    digests = {each["name"]: each["digest"] for each in revision["files"]}
    assert digests["model.safetensors"] == sha256(files["model.safetensors"])
    assert digests["config.json"] == git_sha1(files["config.json"])
    shown = command("models").out
    assert "org/tiny" in shown
    assert commit_of(files)[:12] in shown


def test_what_was_converted_is_listed_with_its_lineage(
    command: Command, hub: StandIn, model: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora", seed=1)
    done = command(
        *("convert", model, "--adapter", tmp_path / "lora", "--out", tmp_path / "tuned"),
        *("--format", "gguf", "--quant", "rtn:q8_0", "--no-check"),
    )
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "tuned")
    (found,) = command("models", "--json").json()["artifacts"]
    assert found["path"] == str(tmp_path / "tuned")
    assert found["sha256"] == manifest.sha256
    assert found["nbytes"] == sum(entry.nbytes for entry in manifest.artifact.files)
    assert (found["container"], found["quant"], found["fault"]) == ("gguf", "rtn:q8_0", "")
    assert found["base"]["sha256"] == manifest.artifact.base.sha256
    assert [each["name"] for each in found["adapters"]] == ["lora"]
    shown = command("models").out
    assert f"{manifest.artifact.base.name} + lora" in shown
    assert manifest.sha256[:12] in shown


def test_what_was_merged_is_listed_and_what_is_gone_is_not(
    command: Command, hub: StandIn, model: Path, tmp_path: Path
) -> None:
    write_adapter(tmp_path / "lora", seed=1)
    edgellm.merge(model, tmp_path / "merged", adapters=[tmp_path / "lora"])
    assert len(command("models", "--json").json()["artifacts"]) == 1
    shutil.rmtree(tmp_path / "merged")
    assert command("models", "--json").json()["artifacts"] == []
    (tmp_path / "merged").mkdir()
    assert command("models", "--json").json()["artifacts"] == []


def test_folders_are_looked_into_and_damage_is_shown(
    command: Command, hub: StandIn, artifact: Path
) -> None:
    (artifact.parent / "page").mkdir()
    (artifact.parent / "page" / "manifest.json").write_text('{"name": "a web app"}')
    found = command("models", "--folder", artifact.parent, "--json").json()["artifacts"]
    assert [each["name"] for each in found] == ["small"]
    main_file = read_manifest(artifact).artifact.main_file
    (artifact / main_file).write_bytes(b"short")
    assert f"{main_file} has 5 bytes instead" in command("models", "--folder", artifact).out
    (artifact / "manifest.json").write_text(
        (artifact / "manifest.json").read_text().replace('"licence": "', '"licence": "free ')
    )
    assert "changed after it was written" in command("models", "--folder", artifact).out
    assert command("models", "--folder", artifact / "nowhere").code == 3


def test_a_damaged_cache_is_shown_with_what_to_do(
    command: Command, hub: StandIn, cached: Path
) -> None:
    (cached / "config.json").resolve().unlink()
    shown = command("models").out
    assert "org/tiny is damaged" in shown
    assert "edgellm models remove org/tiny" in shown
    assert command("models", "remove", "org/tiny", "--yes").code == 0
    assert not cached.parents[1].exists()


def test_an_artifact_is_removed_and_nothing_beside_it(
    command: Command, hub: StandIn, artifact: Path, tmp_path: Path
) -> None:
    (artifact / "mine.txt").write_text("notes")
    done = command("models", "remove", artifact, "--yes")
    assert done.code == 0, done.err
    assert [file.name for file in artifact.iterdir()] == ["mine.txt"]
    assert "mine.txt" in done.err


def test_an_artifact_is_removed_by_its_name_with_its_folder(
    command: Command, hub: StandIn, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "somewhere" / "tiny-hf"
    edgellm.convert(model, out, format="hf", quant="int4-g32-sym", check=False)
    assert (out / "README.md").exists()
    done = command("models", "remove", "tiny-hf", "--yes", "--json").json()
    assert done["removed"][0]["left"] == []
    assert not out.exists()
    assert out.parent.exists()
    assert command("models", "--json").json()["artifacts"] == []


def test_a_person_is_asked(
    command: Command, artifact: Path, monkeypatch: pytest.MonkeyPatch, hub: StandIn
) -> None:
    piped = command("models", "remove", artifact, stdin="y\n")  # nobody's answer
    assert piped.code == 2
    assert "--yes" in piped.err
    assert command("models", "remove", artifact, "--json").code == 2
    answers = iter([False, True])
    monkeypatch.setattr("typer.confirm", lambda *_, **__: next(answers))
    declined = command("models", "remove", artifact)
    assert (declined.code, declined.out) == (1, "")
    assert artifact.exists()
    assert command("models", "remove", artifact).code == 0
    assert not artifact.exists()


def test_what_is_no_artifact_is_not_removed(
    command: Command, hub: StandIn, model: Path, tmp_path: Path
) -> None:
    before = sorted(model.iterdir())
    for path in (model, tmp_path):
        done = command("models", "remove", path, "--yes")
        assert done.code == 3
        assert "not an artifact" in done.err
    assert sorted(model.iterdir()) == before


def test_a_changed_manifest_deletes_nothing(
    command: Command, hub: StandIn, artifact: Path, tmp_path: Path
) -> None:
    victim = tmp_path / "copies" / "victim"
    victim.write_text("precious")
    text = (artifact / "manifest.json").read_text()
    main_file = read_manifest(artifact).artifact.main_file
    (artifact / "manifest.json").write_text(text.replace(f'"{main_file}"', '"../victim"'))
    assert command("models", "remove", artifact, "--yes").code == 8
    assert victim.exists()
    assert (artifact / main_file).exists()


def test_links_are_not_followed(
    command: Command, hub: StandIn, artifact: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(artifact)
    done = command("models", "remove", link, "--yes")
    assert done.code == 2
    assert "is a link" in done.err
    main_file = artifact / read_manifest(artifact).artifact.main_file
    outside = main_file.rename(tmp_path / "outside.gguf")
    main_file.symlink_to(outside)
    assert command("models", "remove", artifact, "--yes").code == 0
    assert outside.exists()
    assert not artifact.exists()


def test_a_folder_inside_that_is_a_link_stops_it(
    command: Command, hub: StandIn, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    edgellm.convert(model, out, format="gguf", quant="rtn:q8_0", check=False)
    manifest = read_manifest(out)
    (entry,) = manifest.artifact.files
    moved = msgspec.structs.replace(entry, path="sub/model.gguf")
    changed = msgspec.structs.replace(manifest.artifact, files=(moved,), main_file="sub/model.gguf")
    (out / "manifest.json").write_bytes(Manifest.of(changed, {}).to_json())
    (tmp_path / "elsewhere").mkdir()
    (out / entry.path).rename(tmp_path / "elsewhere" / "model.gguf")
    (out / "sub").symlink_to(tmp_path / "elsewhere")
    done = command("models", "remove", out, "--yes")
    assert done.code == 7
    assert "nothing outside" in done.err
    assert (tmp_path / "elsewhere" / "model.gguf").exists()
    assert (out / "manifest.json").exists()


def test_a_cached_model_is_removed_and_no_other(
    command: Command, hub: StandIn, cached: Path
) -> None:
    hub.repositories["org/other"] = {"config.json": b"{}"}
    other = Path(snapshot_download("org/other"))
    done = command("models", "remove", "org/tiny", "--yes")
    assert done.code == 0, done.err
    assert not cached.parents[1].exists()
    assert (other / "config.json").exists()


def test_one_revision_is_removed_and_what_the_others_share_stays(
    command: Command, hub: StandIn, cached: Path
) -> None:
    first = commit_of(hub.repositories["org/tiny"])
    hub.repositories["org/tiny"] |= {"config.json": b"{}"}
    second = Path(snapshot_download("org/tiny"))
    assert second.name != first
    assert command("models", "remove", "org/tiny@nothing", "--yes").code == 2
    assert command("models", "remove", f"org/tiny@{first[:10]}", "--yes").code == 0
    assert not cached.exists()
    assert (second / "model.safetensors").read_bytes()
    assert command("models", "remove", "org/tiny@main", "--yes").code == 0
    assert not second.exists()


def test_nothing_outside_of_the_cache_is_removed(
    command: Command, hub: StandIn, cached: Path, tmp_path: Path
) -> None:
    hub.repositories["org/tiny"] |= {"config.json": b"{}"}
    snapshot_download("org/tiny")  # so that the first is not the only one
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"precious")
    (cached / "model.safetensors").unlink()
    (cached / "model.safetensors").symlink_to(outside)
    done = command("models", "remove", f"org/tiny@{cached.name}", "--yes")
    assert done.code == 7
    assert str(outside) in done.err
    assert command("models", "remove", "org/tiny", "--yes").code == 0  # the link, not the file
    assert outside.exists()
    repo = Path(constants.HF_HUB_CACHE) / "models--org--tiny"
    (tmp_path / "moved").mkdir()
    repo.symlink_to(tmp_path / "moved")
    assert command("models", "remove", "org/tiny", "--yes").code == 7
    assert (tmp_path / "moved").exists()


def test_names_that_mean_nothing_or_two_things(
    command: Command, hub: StandIn, cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "did you mean org/tiny" in command("models", "remove", "org/tini", "--yes").err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    done = command("models", "remove", "org/tiny", "--yes")
    assert done.code == 2
    assert "./org/tiny" in done.err
    assert cached.exists()
    assert command("models", "remove").code == 2
    assert command("models", "delete", "x").code == 2
    assert command("models", "remove", "org/tiny:x.gguf").code == 2


def test_nothing_is_removed_when_one_of_several_cannot_be(
    command: Command, hub: StandIn, artifact: Path
) -> None:
    assert command("models", "remove", artifact, "no-such", "--yes").code == 2
    assert artifact.exists()


def test_what_is_left_of_broken_downloads_is_said(
    command: Command, hub: StandIn, cached: Path
) -> None:
    (cached.parents[1] / "blobs" / "abc.incomplete").write_bytes(bytes(5_000_000))
    assert "5.0 MB are left of broken downloads" in command("models").out
    assert json.loads(command("models", "--json").out)["cache"]["unfinished_bytes"] == 5_000_000


def test_the_folder_that_one_is_in_stays(
    command: Command, hub: StandIn, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(artifact)
    done = command("models", "remove", ".", "--yes")
    assert done.code == 7
    assert "leave it first" in done.err
