import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgellm.errors import OutputError
from edgellm.export.writer import StagedFolder, check_output


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def interrupted(out: Path) -> None:
    """Write an artifact and fail before it is committed."""
    with StagedFolder(out, force=True) as staged:
        staged.write_file("manifest.json", b"new")
        staged.create_data_file("deep/data", 3)
        staged.write_at("deep/data", 0, b"abc")
        raise RuntimeError


def test_a_folder_appears_only_when_committed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with StagedFolder(out) as staged:
        staged.create_data_file("data", 6)
        staged.write_at("data", 3, b"def")
        staged.write_at("data", 0, b"abc")
        staged.write_file("manifest.json", b"{}")
        staged.sync()
        assert not out.exists()
        staged.commit()
    assert (out / "data").read_bytes() == b"abcdef"
    assert names(tmp_path) == {"out"}


def test_nothing_is_left_when_writing_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        interrupted(tmp_path / "out")
    assert names(tmp_path) == set()


def test_an_older_artifact_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError):
        interrupted(out)
    assert (out / "manifest.json").read_text() == "old"
    with StagedFolder(out, force=True) as staged:
        staged.write_file("manifest.json", b"new")
        staged.commit()
    assert (out / "manifest.json").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_what_is_rejected_is_put_aside_and_the_older_artifact_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    for content in (b"first", b"second"):
        with StagedFolder(out, force=True) as staged:
            staged.write_file("manifest.json", content)
            assert staged.put_aside() == tmp_path / "out.rejected"
        assert (tmp_path / "out.rejected" / "manifest.json").read_bytes() == content
    assert (out / "manifest.json").read_text() == "old"
    assert names(tmp_path) == {"out", "out.rejected"}
    (tmp_path / "out.rejected" / "manifest.json").rename(tmp_path / "out.rejected" / "mine")
    with StagedFolder(out, force=True) as staged, pytest.raises(OutputError, match="did not write"):
        staged.put_aside()
    assert names(tmp_path / "out.rejected") == {"mine"}


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, dangling: bool) -> None:
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    target.parent.mkdir()
    if not dangling:
        target.mkdir()
        (target / "manifest.json").write_text("old")
    link.symlink_to(target)
    with StagedFolder(link, force=True) as staged:
        staged.write_file("manifest.json", b"new")
        staged.commit()
    assert link.is_symlink()
    assert (target / "manifest.json").read_text() == "new"
    assert names(tmp_path) == {"link", "disk"}
    assert names(target.parent) == {"target"}


@pytest.mark.parametrize("force", [False, True])
def test_the_folder_of_the_shell_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), tmp_path):
        with pytest.raises(OutputError, match="name a new folder in it"):
            check_output(out, force=force)


def test_force_does_not_replace_what_is_not_an_artifact(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(OutputError, match="did not write"):
        check_output(tmp_path, force=True)


def test_an_existing_artifact_needs_force(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match="--force"):
        check_output(tmp_path, force=False)
    check_output(tmp_path, force=True)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "out", force=True)


def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path
    )  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"):
        check_output(tmp_path / "deep" / "out", force=False)


def test_a_folder_that_the_system_refuses_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="Permission denied"), StagedFolder(tmp_path / "out"):
        pass


def test_a_disk_that_fills_up_is_said_and_nothing_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutputError, match="disk filled up"):
        interrupted(tmp_path / "out")
    assert names(tmp_path) == set()


def test_what_a_killed_run_left_is_cleared_and_a_living_run_is_not(tmp_path: Path) -> None:
    dead, living = tmp_path / ".out.999999999.partial", tmp_path / f".out.{os.getppid()}.partial"
    dead.mkdir()
    living.mkdir()
    with StagedFolder(tmp_path / "out") as staged:
        staged.commit()
    assert names(tmp_path) == {"out", living.name}


def test_what_a_run_killed_between_its_renames_put_aside_comes_back(tmp_path: Path) -> None:
    retired = tmp_path / ".out.999999999.retired"
    retired.mkdir()
    (retired / "manifest.json").write_text("old")
    with pytest.raises(RuntimeError):
        interrupted(tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_an_older_artifact_stays_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text("old")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with StagedFolder(out, force=True) as staged:
        staged.write_file("manifest.json", b"new")
        with pytest.raises(OutputError, match="nothing was kept"):
            staged.commit()
    assert (out / "manifest.json").read_text() == "old"
    assert names(tmp_path) == {"out"}


def test_systems_without_positioned_writes_and_reserved_blocks_get_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    with StagedFolder(tmp_path / "out") as staged:
        staged.create_data_file("data", 3 * 4096)
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda n: staged.write_at("data", n * 4096, bytes([n]) * 4096), range(3)))
        staged.sync()
        staged.commit()
    expected = b"".join(bytes([n]) * 4096 for n in range(3))
    assert (tmp_path / "out" / "data").read_bytes() == expected


def test_a_file_system_that_reserves_nothing_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    with StagedFolder(tmp_path / "out") as staged:
        staged.create_data_file("data", 6)
        staged.write_at("data", 3, b"def")
        staged.commit()
    assert (tmp_path / "out" / "data").read_bytes() == b"\0\0\0def"
