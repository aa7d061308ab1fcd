import hashlib
import json
import os
from pathlib import Path

import msgspec
import pytest

from edgellm.artifact import open_artifact, verify
from edgellm.errors import SourceError, VerificationError
from edgellm.manifest import (
    SCHEMA_VERSION,
    Base,
    Digested,
    FileEntry,
    Manifest,
    ModelFacts,
    Parity,
    TensorEntry,
)

DATA = bytes(range(100))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact of one data file with two tensors, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "artifact"
    out.mkdir()
    (out / "model.bin").write_bytes(DATA)
    tensors = [("first", 10, 40), ("second", 50, 50)]
    digested = Digested(
        schema_version=SCHEMA_VERSION,
        container="gguf",
        main_file="model.bin",
        files=(FileEntry(path="model.bin", nbytes=len(DATA), sha256=sha256(DATA)),),
        tensors=tuple(
            TensorEntry(
                name=name,
                role=name,
                shape=(nbytes,),
                grid="f32",
                nbytes=nbytes,
                sha256=sha256(DATA[start : start + nbytes]),
                arrays=(("model.bin", start, nbytes),),
            )
            for name, start, nbytes in tensors
        ),
        base=Base(name="m", kind="hf"),
        model=ModelFacts(
            family="llama",
            vocab_size=1,
            hidden_size=1,
            layer_count=1,
            head_count=1,
            kv_head_count=1,
            head_dim=1,
            context_length=1,
        ),
        recipe={},
        recipe_sha256="",
        tokenizer_sha256="",
        chat_template_sha256="",
        tokenizer_parity=Parity(equal=True, cases=1),
        notes=(),
        tool_versions={},
    )
    (out / "manifest.json").write_bytes(Manifest.of(digested, {"convert_s": 1.5}).to_json())
    return out


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_an_intact_artifact_verifies(folder: Path) -> None:
    verify(open_artifact(folder))


@pytest.mark.parametrize(
    ("position", "named"),
    [(10, "in first"), (49, "in first"), (50, "in second"), (99, "in second"), (3, "outside")],
)
def test_one_flipped_bit_is_traced_to_its_tensor(folder: Path, position: int, named: str) -> None:
    flip(folder / "model.bin", position)
    with pytest.raises(VerificationError, match=rf"model\.bin differs {named}"):
        verify(open_artifact(folder))


def test_missing_and_shortened_files_are_named(folder: Path) -> None:
    (folder / "model.bin").write_bytes(DATA[:-1])
    with pytest.raises(VerificationError, match="99 bytes instead of 100"):
        verify(open_artifact(folder))
    (folder / "model.bin").unlink()
    with pytest.raises(VerificationError, match="is missing"):
        verify(open_artifact(folder))


def test_files_that_readers_would_take_for_parts_do_not_belong(folder: Path) -> None:
    (folder / "notes.md").write_text("my own")
    verify(open_artifact(folder))
    (folder / "chat_template.jinja").write_text("another")
    with pytest.raises(VerificationError, match=r"chat_template\.jinja does not belong"):
        verify(open_artifact(folder), trust_unchanged=True)


def test_an_unchanged_file_is_not_read_twice_and_a_changed_one_is(folder: Path) -> None:
    artifact = open_artifact(folder)
    verify(artifact)
    cached = next((folder.parent / "cache" / "edgellm" / "verified").iterdir())
    before = cached.stat().st_mtime_ns
    verify(artifact, trust_unchanged=True)
    assert cached.stat().st_mtime_ns == before
    flip(folder / "model.bin", 20)
    with pytest.raises(VerificationError, match="differs"):
        verify(artifact, trust_unchanged=True)


def test_a_user_without_a_home_and_one_whose_home_is_a_file_verify_all_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    verify(open_artifact(folder), trust_unchanged=True)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    verify(open_artifact(str(folder)), trust_unchanged=True)


def test_only_a_full_verification_sees_a_change_that_hides_its_time(folder: Path) -> None:
    artifact = open_artifact(folder)
    verify(artifact)
    stat = (folder / "model.bin").stat()
    flip(folder / "model.bin", 20)
    os.utime(folder / "model.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    verify(artifact, trust_unchanged=True)
    with pytest.raises(VerificationError, match="differs in first"):
        verify(artifact)


def test_a_manifest_that_was_edited_is_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"family": "llama"', '"family": "qwen2"'))
    with pytest.raises(VerificationError, match="changed after it was written"):
        open_artifact(folder)


def test_a_manifest_of_the_same_schema_may_lack_or_add_optional_fields(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["artifact"]["model"]["windows"]
    content["artifact"]["a_later_field"] = 1
    canonical = json.dumps(content["artifact"], sort_keys=True, separators=(",", ":"))
    content["sha256"] = sha256(canonical.encode())
    path.write_text(json.dumps(content))
    verify(open_artifact(folder))


def test_measured_figures_are_not_part_of_the_digest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("1.5", "2.5"))
    verify(open_artifact(folder))


def test_a_newer_schema_is_named(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    content["artifact"]["schema_version"] = SCHEMA_VERSION + 1
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match="newer edgellm"):
        open_artifact(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"artifact": {"schema_version": 1}}'])
def test_a_damaged_manifest_is_refused(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(SourceError, match="not a manifest"):
        open_artifact(folder)


def test_files_that_cannot_be_read_are_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    with pytest.raises(SourceError, match=r"cannot read .*manifest\.json"):
        open_artifact(folder)
    (tmp_path / "plain.gguf").write_bytes(b"GGUF")

    def refused(*given: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(SourceError, match=r"cannot read .*plain\.gguf: Permission denied"):
        open_artifact(tmp_path / "plain.gguf")


def test_a_folder_without_a_manifest_is_not_an_artifact(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no manifest"):
        open_artifact(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        open_artifact(tmp_path / "absent")


def test_the_main_file_of_an_artifact_stands_for_its_folder(folder: Path) -> None:
    assert open_artifact(folder / "model.bin") == open_artifact(folder)
    with pytest.raises(SourceError, match="not a GGUF"):
        open_artifact(folder / "manifest.json")


def test_a_manifest_of_another_program_beside_a_gguf_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "plain.gguf").write_bytes(b"GGUF....")
    assert open_artifact(tmp_path / "plain.gguf").manifest is None


def test_a_plain_gguf_opens_unverified_and_other_files_do_not(tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    plain.write_bytes(b"GGUF....")
    assert open_artifact(plain).manifest is None
    plain.write_bytes(b"\x80\x02pickle")
    with pytest.raises(SourceError, match="not a GGUF"):
        open_artifact(plain)


def test_a_manifest_cannot_reach_outside_its_folder(folder: Path) -> None:
    manifest = open_artifact(folder).manifest
    assert manifest is not None
    entry = FileEntry(path="../secret", nbytes=1, sha256="")
    digested = msgspec.structs.replace(manifest.artifact, files=(entry,))
    (folder / "manifest.json").write_bytes(Manifest.of(digested, {}).to_json())
    with pytest.raises(VerificationError, match="outside its folder"):
        open_artifact(folder)


@pytest.mark.parametrize("main_file", ["../other/model.bin", "/etc/hostname", "manifest.json"])
def test_the_file_that_is_run_has_a_checksum(folder: Path, main_file: str) -> None:
    manifest = open_artifact(folder).manifest
    assert manifest is not None
    digested = msgspec.structs.replace(manifest.artifact, main_file=main_file)
    (folder / "manifest.json").write_bytes(Manifest.of(digested, {}).to_json())
    with pytest.raises(VerificationError, match="main file without a checksum"):
        open_artifact(folder)


def test_a_damaged_file_is_named_where_its_tensors_were_not_hashed(folder: Path) -> None:
    entry = open_artifact(folder).manifest
    assert entry is not None
    bare = tuple(msgspec.structs.replace(each, sha256="") for each in entry.artifact.tensors)
    digested = msgspec.structs.replace(entry.artifact, tensors=bare)
    (folder / "manifest.json").write_bytes(Manifest.of(digested, {}).to_json())
    flip(folder / "model.bin", 10)
    with pytest.raises(VerificationError, match=r"model\.bin differs\. Copy"):
        verify(open_artifact(folder))


def test_facts_that_a_dense_model_has_not_are_no_part_of_its_digest(folder: Path) -> None:
    model = json.loads((folder / "manifest.json").read_text())["artifact"]["model"]
    assert not {"attention_layer_count", "experts"} & set(model)
