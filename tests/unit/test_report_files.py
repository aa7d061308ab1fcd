"""Markdown, CSV and Prometheus parse back; files are written whole or not at all."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest

from edgellm import registry
from edgellm.errors import OutputError, UsageError
from edgellm.profiling.document import read_profile
from edgellm.report import WRITERS, check_output, write_report
from edgellm.report.markdown import literal, markdown
from edgellm.report.prometheus import prometheus
from edgellm.report.table_rows import csv_text

from . import profile_documents as documents

METRIC = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({METRIC})\{{({LABEL}(?:,{LABEL})*)\}} (\S+)")


def cells_of(line: str) -> list[str]:
    """A row of a GitHub table: split at pipes that no backslash precedes."""
    assert line.startswith("| ")
    assert line.endswith(" |")
    return re.split(r"(?<!\\)\|", line[1:-1])


def hostile() -> object:
    name = documents.HOSTILE
    return documents.profile(
        [documents.cell(name, noisy=(name,)), documents.failed("other" + name, name)],
        conditions=documents.conditions(name),
        ratios=(documents.ratio(name, name, 1.0, name),),
    )


@pytest.mark.parametrize(
    "given",
    [[documents.rich()], [documents.rich(), documents.other_machine()], [hostile()]],
    ids=["one", "two", "hostile"],
)
def test_tables_have_equal_columns_in_each_row(given: list) -> None:
    tables: list[list[str]] = [[]]
    for line in markdown(given).splitlines():
        if line.startswith("|"):
            tables[-1].append(line)
        elif tables[-1]:
            tables.append([])
    tables = [table for table in tables if table]
    assert len(tables) == 4
    for table in tables:
        assert re.fullmatch(r"\|( -+:? \|)+", table[1])
        assert len({len(cells_of(line)) for line in table}) == 1


def test_markdown_says_what_matters() -> None:
    text = markdown([documents.rich()])
    assert "- **Speed:** smollm2-135m-q4\\_0 writes fastest" in text
    assert "44.4 (43.5 to 45.3)" in text
    assert "p512 is noisy: decode speed differs by 14 %" in text
    assert "d2048 failed: the context of 2048 tokens is full" in text
    assert "| decode speed | " in text
    assert "governor | performance" in text


def test_markdown_calls_nobody_and_holds_no_markup() -> None:
    assert literal("a|b <b>*x*</b>\n@maintainer #12") == (
        r"a\|b \<b\>\*x\*\</b\> @<!-- -->maintainer #<!-- -->12"
    )
    assert "<script>" not in markdown([hostile()])


def test_csv_parses_back() -> None:
    profiles = [documents.rich(), documents.other_machine()]
    cells = [cell for profile in profiles for cell in profile.cells]
    read = list(csv.DictReader(io.StringIO(csv_text(profiles), newline="")))
    assert [row["cell"] for row in read] == [cell.name for cell in cells]
    for row, cell in zip(read, cells, strict=True):
        assert None not in row
        assert row["failure"] == cell.failure
        assert int(row["prompt_tokens"]) == cell.settings.prompt_tokens
        figure = cell.decode_tokens_per_s
        if figure is None:
            assert row["decode_tokens_per_s_median"] == ""
            continue
        assert float(row["decode_tokens_per_s_median"]) == figure.median
        assert float(row["decode_tokens_per_s_low"]) == figure.low
        assert float(row["inter_token_latency_s_p99"]) == cell.inter_token_latency_s.p99
        assert int(row["memory_peak_bytes"]) == cell.memory.peak_bytes


def test_csv_holds_hostile_names_and_energy() -> None:
    name = documents.HOSTILE
    cell = documents.cell(name, energy=documents.energy())
    (row,) = csv.DictReader(io.StringIO(csv_text([documents.profile([cell])]), newline=""))
    assert row["cell"] == name
    assert float(row["energy_decode_j_per_token_median"]) == 0.29
    assert csv_text([documents.profile([])]) == "cell\n"


@pytest.mark.parametrize("given", [[documents.rich(), documents.other_machine()], [hostile()]])
def test_exposition_format(given: list) -> None:
    text = prometheus(given)
    assert text.endswith("\n")
    current, seen, samples = "", set(), {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split()[2]
            assert current not in seen  # all samples of one gauge stand together
            seen.add(current)
        elif line.startswith("# TYPE "):
            assert line == f"# TYPE {current} gauge"
        else:
            found = SAMPLE.fullmatch(line)
            assert found, line
            assert found[1] == current
            assert (found[1], found[2]) not in samples
            samples[found[1], found[2]] = float(found[3])
    assert "edgellm_decode_tokens_per_second" in seen


def test_exposition_has_the_medians_and_the_labels() -> None:
    name = 'a"b\\c\nd'
    text = prometheus([documents.profile([documents.cell(name, 40), documents.failed("x", "no")])])
    (line,) = (
        each for each in text.splitlines() if each.startswith("edgellm_decode_tokens_per_second{")
    )
    assert line.endswith(" 40.0")
    assert r'artifact="a\"b\\c\nd"' in line
    assert re.search(r'edgellm_cell_failed\{cell="x".*\} 1\.0', text)
    assert re.search(r"edgellm_time_to_first_token_seconds_high\{.*\} 0\.408", text)
    assert 'quantile="0.99"' in text


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_is_written_whole(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"profile.{kind.upper()}"
    path.write_text("before")
    write_report([documents.rich()], path)
    assert path.read_text(encoding="utf-8") == registry.attribute(WRITERS[kind])([documents.rich()])
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_json_is_the_document(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    write_report([documents.rich()], path)
    assert read_profile(path) == documents.rich()


def test_json_takes_one_profile(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds one profile, and there are 2"):
        write_report([documents.rich(), documents.other_machine()], tmp_path / "both.json")


@pytest.mark.parametrize("name", ["report.pdf", "report"])
def test_an_unknown_suffix_lists_the_known(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.html, \.md, \.json, \.csv, \.prom"):
        check_output(tmp_path / name)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "folder.md")
    with pytest.raises(OutputError, match="there is no folder"):
        check_output(tmp_path / "nowhere" / "a.md")


def test_a_failing_write_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.md"
    path.write_text("before")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        write_report([documents.rich()], path)
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["a.md"]
