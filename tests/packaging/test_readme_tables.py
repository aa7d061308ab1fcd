"""README.md's tables are what benchmarks/results holds, and results hold nothing of the machine."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

if str(ROOT) not in sys.path:  # benchmarks/ is no part of the installed package
    sys.path.append(str(ROOT))

from benchmarks import tables  # noqa: E402
from benchmarks.results import Comparison, Result, load  # noqa: E402

SAMPLE = Result(
    benchmark="sample",
    peer="the peer",
    setting="A model.",
    comparisons=[
        Comparison("wall", "s", [1.0, 2.0, 3.0], [4.0, 4.0, 4.0], at_most=0.5),
        Comparison("decode", "tokens/s", [99.0], [100.0], at_least=1.03),
        Comparison("peak memory", "bytes", [500e6], at_most=700e6),
        Comparison("size", "bytes", [1e6]),
    ],
    commands={},
    facts={"packages": ["numpy"]},
    machine={
        "cpu": "A processor",
        "cpu_features": ["avx2", "avx512f"],
        "cores": 2,
        "memory_bytes": 24 << 30,
        "system": "A system",
        "python": "3.11.0",
    },
    versions={"ours": {"numpy": "2.0", "gguf": "1.0"}},
)


def test_readme_is_up_to_date() -> None:
    text = README.read_text(encoding="utf-8")
    assert tables.fill(text, RESULTS) == text, "run `python -m benchmarks.tables`"


def test_every_result_is_quoted() -> None:
    quoted = {name for _, name, _ in tables.MARKED.findall(README.read_text(encoding="utf-8"))}
    assert {path.stem for path in RESULTS.glob("*.json")} <= quoted


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_name_nothing_of_the_machine(path: Path) -> None:
    result = load(path)
    assert result.benchmark == path.stem
    assert all(comparison.ours for comparison in result.comparisons)
    strings = re.findall(r'"((?:[^"\\]|\\.)*)"', path.read_text(encoding="utf-8"))
    absolute = [text for text in strings if re.search(r"(^|[\s='])(/|[A-Z]:\\)\w", text)]
    assert not absolute


def test_table_shows_medians_ratios_and_verdicts() -> None:
    lines = tables.render(SAMPLE).splitlines()
    assert lines[:6] == [
        "|  | edgellm | the peer | ratio (lowest to highest pair) | target |",
        "|---|---|---|---|---|",
        "| wall | 2.00 s | 4.00 s | 0.50 (0.25 to 0.75) | at most 0.5x: met |",
        "| decode | 99.0 tokens/s | 100.0 tokens/s | 0.99 | at least 1.03x: **missed** |",
        "| peak memory | 500 MB |  |  | at most 700 MB: met |",
        "| size | 1 MB |  |  |  |",
    ]
    assert lines[-1] == (
        "A model. Medians of 3. A processor with avx2, 2 cores, 24 GiB, A system, Python 3.11.0, "
        "numpy 2.0. Repeat: `python -m benchmarks sample`."
    )


def test_tables_without_a_peer_have_no_empty_columns() -> None:
    alone = replace(SAMPLE, comparisons=SAMPLE.comparisons[2:], peer="")
    assert tables.render(alone).splitlines()[0] == "|  | edgellm | target |"


def test_results_survive_the_file(tmp_path: Path) -> None:
    from benchmarks.results import save

    path = tmp_path / "sample.json"
    save(SAMPLE, path)
    back = load(path)
    assert back.comparisons == SAMPLE.comparisons
    assert back.machine["memory_bytes"] > 0
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(ValueError, match="99"):
        load(path)


def test_filling_leaves_the_rest_alone(tmp_path: Path) -> None:
    from benchmarks.results import save

    save(SAMPLE, tmp_path / "sample.json")
    text = "before\n<!-- benchmark:sample -->\nstale\n<!-- /benchmark -->\nafter\n"
    filled = tables.fill(text, tmp_path)
    assert filled.startswith("before\n<!-- benchmark:sample -->\n|  | edgellm |")
    assert filled.endswith("<!-- /benchmark -->\nafter\n")
    assert "stale" not in filled
    assert tables.fill(filled, tmp_path) == filled
    absent = tables.fill(text.replace("sample", "absent"), tmp_path)
    assert "\nNot measured yet: `python -m benchmarks absent`.\n" in absent
