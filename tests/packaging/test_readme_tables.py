"""The documents' tables are what benchmarks/results holds; results hold nothing of the machine."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

if str(ROOT) not in sys.path:  # benchmarks/ is no part of the installed package
    sys.path.append(str(ROOT))

from benchmarks import picture, tables  # noqa: E402
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


@pytest.mark.parametrize("commands", [False, True])
def test_documents_are_up_to_date(commands: bool) -> None:
    document = tables.COMMANDED if commands else tables.README
    text = document.read_text(encoding="utf-8")
    found = tables.fill(text, RESULTS, commands=commands)
    assert found == text, "run `python -m benchmarks.tables`"


def test_the_picture_is_up_to_date() -> None:
    for path, content in picture.contents(RESULTS).items():
        assert path.read_text(encoding="utf-8") == content, "run `python -m benchmarks.tables`"


def test_every_result_is_quoted() -> None:
    documents = (tables.README, tables.COMMANDED)
    texts = [document.read_text(encoding="utf-8") for document in documents]
    quoted = {name for text in texts for _, name, _ in tables.MARKED.findall(text)}
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


def test_commands_and_types_stand_under_their_table() -> None:
    types = {
        "q4_k_m": {
            "q5_0": {"bytes": 600, "tensors": {"attn_q": 30, "ffn_up": 30}},
            "q4_k": {"bytes": 200, "tensors": {"ffn_down": 15}},
        }
    }
    commands = {"edgellm": "edgellm convert m", "peer": "quantize m"}
    facts = {**SAMPLE.facts, "types": types}
    text = tables.render(replace(SAMPLE, commands=commands, facts=facts), commands=True)
    assert "| q4_k_m | 75% q5_0 (30 attn_q, 30 ffn_up); 25% q4_k (15 ffn_down) |" in text
    assert "# edgellm\nedgellm convert m\n# peer\nquantize m\n```" in text
    assert "convert m" not in tables.render(replace(SAMPLE, commands=commands))


def test_a_bound_on_both_sides_is_shown_and_judged() -> None:
    both = Comparison("measured / planned", "", [1.2], at_least=0.85, at_most=1.15)
    row = tables.render(replace(SAMPLE, comparisons=[both], peer="")).splitlines()[2]
    assert row == "| measured / planned | 1.20 | 0.85 to 1.15: **missed** |"


def test_the_picture_has_each_file_where_it_was_measured(tmp_path: Path) -> None:
    from benchmarks.results import save

    def figures(kl: float) -> dict[str, float]:
        return {"kld_mean": kl, "kld_mean_stderr": kl / 50}

    quality = replace(
        SAMPLE,
        benchmark="quality",
        comparisons=[Comparison("q4_0", "nats", [0.1], [0.2])],
        facts={
            "figures": {"ours-q4_0/model.gguf": figures(0.1), "peer-q4_0.gguf": figures(0.2)},
            "sizes": {"ours-q4_0/model.gguf": 90, "peer-q4_0.gguf": 91},
            "text_sha256": "a",
        },
    )
    assert picture.contents(tmp_path).keys() == {picture.DOCUMENT}
    save(quality, tmp_path / "quality.json")
    fit = {
        "figures": {"fitted/model.gguf": figures(0.05)},
        "sizes": {"fitted": 95},
        "text_sha256": "a",
    }
    save(replace(quality, benchmark="fit", facts=fit), tmp_path / "fit.json")
    of_another_text = {**quality.facts, "text_sha256": "b"}
    save(replace(quality, benchmark="tune", facts=of_another_text), tmp_path / "tune.json")
    found = [(mark.series, mark.label, mark.nbytes, mark.kl) for mark in picture.marks(tmp_path)]
    assert found == [
        (picture.PEER, "q4_0", 91, 0.2),
        (picture.OURS, "q4_0", 90, 0.1),
        (picture.FITTED, "--fit", 95, 0.05),
    ]
    made = picture.contents(tmp_path)
    assert picture.FITTED in made[picture.PICTURE]
    assert "](size-kl.svg)\n<!-- /size-kl -->" in made[picture.DOCUMENT]
