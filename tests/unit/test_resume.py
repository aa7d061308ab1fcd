"""A staged folder that goes on from what a killed run with the same key wrote."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgellm.export.journal import Journal
from edgellm.export.writer import StagedFolder, begun_before

DEAD = 2**22 + 1
"""No process has this id: Linux gives none above 2^22."""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run(out: Path, key: str, blocks: int, end: type[BaseException]) -> None:
    """Do some blocks and end with ``end``."""
    with StagedFolder(out, resume_key=key) as staged:
        staged.create_data_file("data", 6)
        staged.write_at("data", 0, b"abc")
        for block in range(blocks):
            staged.note({"block": f"layer {block}"})
        raise end


def stopped(out: Path, key: str, blocks: int, process: int = DEAD) -> Path:
    """What a run that was killed after ``blocks`` blocks leaves beside ``out``."""
    with pytest.raises(KeyboardInterrupt):
        run(out, key, blocks, KeyboardInterrupt)
    left = out.parent / f".{out.name}.{process}.partial"
    (out.parent / f".{out.name}.{os.getpid()}.partial").rename(left)
    return left


def test_the_same_key_goes_on_with_what_was_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out, "one", blocks=2)
    assert [entry["block"] for entry in begun_before(out, "one")] == ["layer 0", "layer 1"]
    assert begun_before(out, "other") == []
    with StagedFolder(out, resume_key="one") as staged:
        assert staged.resumed
        staged.create_data_file("data", 6)
        staged.write_at("data", 3, b"def")
        staged.note({"block": "layer 2"})
        assert len(staged.journal.entries()) == 3
        staged.sync()
        staged.commit()
    assert (out / "data").read_bytes() == b"abcdef"
    assert names(out) == {"data"}
    assert names(tmp_path) == {"out"}


@pytest.mark.parametrize("key", ["other", ""])
def test_another_key_discards_it(key: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out, "one", blocks=2)
    with StagedFolder(out, resume_key=key) as staged:
        assert not staged.resumed
        assert not (staged.path / "data").exists()
        assert not staged.journal.entries()
    assert names(tmp_path) == set()


def test_the_furthest_of_several_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(out, "one", blocks=1, process=DEAD)
    far = stopped(tmp_path / "elsewhere", "one", blocks=3, process=DEAD + 1)
    far.rename(tmp_path / f".out.{DEAD + 1}.partial")
    stopped(tmp_path / "third", "one", blocks=2).rename(tmp_path / f".out.{DEAD + 2}.partial")
    with StagedFolder(out, resume_key="one") as staged:
        assert len(staged.journal.entries()) == 3
        assert names(tmp_path) == {staged.path.name}


def test_nothing_is_kept_where_no_block_was_done_or_something_failed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(out, "one", 0, KeyboardInterrupt)
    assert names(tmp_path) == set()
    with pytest.raises(RuntimeError):
        run(out, "one", 1, RuntimeError)
    assert names(tmp_path) == set()


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin("key")
    journal.append({"block": "layer 0"})
    with journal.file.open("ab") as file:
        file.write(b'{"block": "lay')
    assert journal.key() == "key"
    assert journal.entries() == [{"block": "layer 0"}]
    journal.repair()
    journal.append({"block": "layer 1"})
    assert [entry["block"] for entry in journal.entries()] == ["layer 0", "layer 1"]


def test_a_file_that_is_no_journal_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.folder.mkdir()
    journal.file.write_bytes(b"\x00\x01\n[]\n")
    assert journal.key() == ""
    assert journal.entries() == []
