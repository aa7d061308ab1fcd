"""Rounds summed up: pairs of cells, energy, by hand."""

from __future__ import annotations

import msgspec
import pytest

from edgellm.profiling import document
from edgellm.profiling.document import Memory
from edgellm.profiling.exchange import Round
from edgellm.profiling.intervals import figure
from edgellm.profiling.summing import MOST_PAIRED, _energy, ratios


def cell(name: str, speed: float, prompt: int = 8) -> document.Cell:
    return document.Cell(
        name=name,
        artifact=document.ArtifactFacts(name=name, container="onnx", sha256=name, size_bytes=1),
        settings=document.Settings(
            runtime="r", device="cpu", threads=1, kv_cache="f32", prompt_tokens=prompt, new_tokens=4
        ),
        rounds=5,
        decode_tokens_per_s=figure([speed * (1 + n / 100) for n in range(5)]),
    )


def pairs(cells: list[document.Cell]) -> list[tuple[str, str]]:
    return [(each.of, each.to) for each in ratios(cells)]


def test_every_two_cells_that_were_asked_the_same_are_a_pair() -> None:
    cells = [cell("a", 10), cell("b", 20), cell("other", 1, prompt=9), cell("c", 40)]
    found = ratios(cells)
    assert [(each.of, each.to) for each in found] == [("b", "a"), ("c", "a"), ("c", "b")]
    assert [each.ratio.median for each in found] == pytest.approx([2, 4, 2])
    assert {each.verdict for each in found} == {"faster"}
    failed = msgspec.structs.replace(cells[1], rounds=0, decode_tokens_per_s=None)
    assert pairs([cells[0], failed, cells[3]]) == [("c", "a")]


def test_of_many_each_is_compared_with_the_first() -> None:
    cells = [cell(str(n), n + 1) for n in range(MOST_PAIRED + 1)]
    assert pairs(cells) == [(str(n), "0") for n in range(1, MOST_PAIRED + 1)]
    assert len(pairs(cells[:-1])) == MOST_PAIRED * (MOST_PAIRED - 1) // 2


def round_of(energy: dict[str, tuple[float, float]], first_text_tokens: int) -> Round:
    return Round(
        tokenization_s=0, first_token_s=1, prefill_s=1, latencies_s=(1,), sampling_s=0,
        detokenization_s=0, end_to_end_s=2, cpu_s=1,
        memory=Memory(peak_bytes=1, steady_bytes=1, kv_bytes=1),
        first_text_tokens=first_text_tokens, energy=energy,
    )  # fmt: skip


def test_energy_is_of_the_tokens_behind_the_first_text() -> None:
    rapl = {"RAPL package": (5.0, 12.0), "battery": (6.0, 13.0)}
    found = _energy([round_of(rapl, 2)], 6, "cpu")
    assert found is not None
    assert (found.source, found.prefill_j.median) == ("RAPL package", 5)
    assert found.decode_j_per_token.median == 12 / 4
    assert _energy([round_of(rapl, 1)], 1, "cpu") is None, "no token behind it"
    assert _energy([round_of({}, 1)], 6, "cpu") is None
    half = [round_of(rapl, 1), round_of({"battery": (6.0, 13.0)}, 1)]
    found = _energy(half, 6, "cpu")
    assert found is not None
    assert found.source == "battery", "what every round has"
