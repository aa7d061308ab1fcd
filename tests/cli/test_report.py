"""``edgellm report``: profiles in, pages and tables out."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgellm.profiling.document import to_json

from ..unit import profile_documents as documents
from .conftest import Command


@pytest.fixture
def laptop(tmp_path: Path) -> Path:
    path = tmp_path / "laptop.json"
    path.write_bytes(to_json(documents.rich()))
    return path


@pytest.fixture
def board(tmp_path: Path) -> Path:
    path = tmp_path / "board.json"
    path.write_bytes(to_json(documents.other_machine()))
    return path


def test_markdown_is_printed_where_no_file_is_named(laptop: Path, command: Command) -> None:
    done = command("report", laptop)
    assert done.code == 0
    assert done.out.startswith("## edgellm profile\n")
    assert done.out.endswith("</details>\n")
    assert done.err == ""


def test_files_are_written(laptop: Path, board: Path, tmp_path: Path, command: Command) -> None:
    page, table = tmp_path / "both.html", tmp_path / "both.csv"
    done = command("report", laptop, board, "--html", page, "-o", table)
    assert done.code == 0
    assert f"written: {page}" in done.out
    assert "writes fastest" in done.out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert len(table.read_text(encoding="utf-8").splitlines()) == 1 + 12 + 4


def test_json_is_one_document(laptop: Path, tmp_path: Path, command: Command) -> None:
    page = tmp_path / "a.html"
    shown = command("report", laptop, "--html", page, "--json").json()
    assert shown["written"] == [str(page)]
    assert shown["summary"][1]["topic"] == "Speed"


def test_nothing_is_written_where_one_output_cannot_be(
    laptop: Path, tmp_path: Path, command: Command
) -> None:
    page = tmp_path / "a.html"
    done = command("report", laptop, "--html", page, "-o", tmp_path / "a.pdf")
    assert done.code == 2
    assert ".prom" in done.err
    assert not page.exists()


def test_a_page_has_a_page_s_name(laptop: Path, command: Command) -> None:
    done = command("report", laptop, "--html", "page.md")
    assert done.code == 2
    assert ".html" in done.err


def test_what_is_no_profile_is_refused(tmp_path: Path, command: Command) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    done = command("report", other)
    assert done.code == 3
    assert "not a profile" in done.err
    assert command("report", tmp_path / "none.json").code == 3
