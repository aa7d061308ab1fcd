"""The page: whole, safe against hostile names, without network, and small."""

from __future__ import annotations

import html.parser
import json
import re

import msgspec
import pytest

from edgellm.profiling.document import Operators, Profile
from edgellm.report.markdown import markdown
from edgellm.report.page import html as page
from edgellm.report.prometheus import prometheus

from . import profile_documents as documents

VOID = {"meta", "br", "line", "path", "rect", "circle"}


class Elements(html.parser.HTMLParser):
    """Checks that every element is closed, and keeps the text and the scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.met: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.raw: dict[str, str] = {}
        self.script = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.met.append((tag, dict(attrs)))
        if tag not in VOID or tag in ("path", "rect", "circle"):
            self.open.append(tag)
        if tag == "script":
            self.script = dict(attrs).get("id") or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.met.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.raw[self.script] = self.raw.get(self.script, "") + data
        elif self.open and self.open[-1] != "style":
            self.text.append(data)


def parsed(text: str) -> Elements:
    elements = Elements()
    elements.feed(text)
    elements.close()
    assert elements.open == []
    return elements


def shown(text: str) -> str:
    return " ".join("".join(parsed(text).text).split())


@pytest.fixture(scope="module")
def rich() -> Profile:
    return documents.rich()


@pytest.fixture(scope="module")
def rich_page(rich: Profile) -> str:
    return page([rich])


def test_sections_stand_in_order(rich_page: str) -> None:
    sections = [facts["id"] for tag, facts in parsed(rich_page).met if tag == "section"]
    assert sections == [
        "summary", "cells", "latency", "lengths", "quality", "roofline", "operators", "ratios",
        "conditions", "method", "raw",
    ]  # fmt: skip


def test_figures_and_intervals_are_shown(rich_page: str) -> None:
    text = shown(rich_page)
    assert "44.4" in text
    assert "43.5 to 45.3" in text
    assert "1.80" in text
    assert "faster" in text
    assert "smollm2-135m-q4_0 writes fastest" in text
    assert "5 min 12 s" in text
    assert "temperature: no sensor" in text
    assert "1.0 % of what was wanted" in text


def test_failures_and_noise_have_their_reasons(rich_page: str) -> None:
    text = shown(rich_page)
    assert "Failed: the context of 2048 tokens is full" in text
    assert "Noisy: decode speed differs by 14 % between rounds; 3.1 % of the time stolen" in text
    assert len(re.findall('class="badge failed"', rich_page)) == 1
    assert len(re.findall('class="badge noisy"', rich_page)) == 1


def test_nothing_is_fetched(rich_page: str) -> None:
    for trace in ("http://", "https://", "src=", "@import", "url(", "<link", "<iframe", "//cdn"):
        assert trace not in rich_page
    assert "default-src 'none'" in rich_page


def test_the_script_is_the_one_that_the_policy_names(rich_page: str) -> None:
    import base64
    import hashlib

    found = re.search(r"script-src 'sha256-([^']+)'", rich_page)
    script = parsed(rich_page).raw[""]
    assert found
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() == found[1]


@pytest.mark.parametrize("count", [1, 2])
def test_raw_data_is_the_document(count: int) -> None:
    given = [documents.rich(), documents.other_machine()][:count]
    raw = parsed(page(given)).raw
    for number, profile in enumerate(given, 1):
        assert msgspec.json.decode(raw[f"profile-{number}"], type=Profile) == profile
        json.loads(raw[f"profile-{number}"])
    assert f"profile-{count + 1}" not in raw


def test_hostile_names_are_text_everywhere() -> None:
    name = documents.HOSTILE
    noisy = documents.cell(
        name,
        noisy=(name,),
        of=documents.artifact(name, quant=name, container=name),
        operators=msgspec.structs.replace(documents.operators(), source=name, trace=name),
        run=documents.settings(kv_cache=name, device=name, runtime=name),
    )
    profile = documents.profile(
        [
            noisy,
            documents.cell("plain", run=documents.settings(512)),
            documents.failed(name + "2", name, operators=Operators(reason=name)),
        ],
        conditions=documents.conditions(name, os=name, unknown=(name,), versions={name: name}),
        ratios=(documents.ratio(name, name, 1.1, name),),
        notes=(name,),
        started=name,
    )
    text = page([profile, documents.other_machine()])
    elements = parsed(text)
    assert not [
        facts for tag, facts in elements.met if tag == "script" and len(facts) not in (0, 2)
    ]
    assert len([tag for tag, _ in elements.met if tag == "script"]) == 3
    assert not [key for _, facts in elements.met for key in facts if key.startswith("on")]
    assert "<script>alert" not in text
    assert "</script ><script>alert('x')</script><!--&\"|`*_ \\" in shown(text)
    # Browsers end a script, or keep it open, where this parser does not.
    assert not set("<>&") & set(elements.raw["profile-1"])
    assert msgspec.json.decode(elements.raw["profile-1"], type=Profile) == profile


def test_large_profiles_make_a_small_page() -> None:
    large = documents.profile(
        [
            documents.cell(f"cell {n}", 20 + n, run=documents.settings(64 * 2 ** (n % 6), 128))
            for n in range(12)
        ]
    )
    assert len(page([large]).encode()) < 2_000_000


def test_parts_without_data_say_why_or_are_left_out() -> None:
    text = page([documents.profile([documents.failed("broken", "no memory left")])])
    told = shown(text)
    assert "No cell wrote more than one token." in told
    assert "Neither memory nor divergence" in told
    assert 'id="ratios"' not in text
    assert "<figure" not in text
    assert "broken: no memory left" in told
    assert "Nothing was measured" in page([documents.profile([])])


def test_operators_or_the_reason_why_there_are_none(rich_page: str) -> None:
    told = shown(rich_page)
    assert "By kind of operator" in told
    assert "By layer" in told
    assert "kind-9" in told
    assert "kind-10" not in told
    assert "Not drawn: 2 more, 0.1 % together." in told
    assert "not asked for" in told


def test_several_machines_are_a_column_and_compared() -> None:
    text = shown(page([documents.rich(), documents.other_machine()]))
    assert "Intel Xeon Platinum 8375C" in text
    assert "3.70 times as fast as the next, ARM Cortex-A76" in text
    assert "Unlike models" not in text


def test_unlike_models_are_said() -> None:
    other = documents.artifact("other", model_sha256="ff" * 32)
    text = shown(page([documents.profile([documents.cell("a"), documents.cell("b", of=other)])]))
    assert "2 different models" in text


def test_one_profile_twice_is_still_told_apart() -> None:
    profile = documents.profile([documents.cell("a")])
    later = msgspec.structs.replace(profile, started="2026-03-05T10:00:00+00:00")
    text = shown(page([profile, later]))
    assert "a, 2026-03-01 14:05 UTC" in text
    assert "a, 2026-03-05 10:00 UTC" in text


@pytest.mark.parametrize(
    "changed",
    [
        {"decode_tokens_per_s": None, "inter_token_latency_s": None},
        {"time_to_first_token_s": None, "memory": None},
        {"roofline": None, "operators": None, "rounds": 1},
        {"decode_tokens_per_s": documents.figure(0.0)},
        {"of": documents.artifact(kld_mean=0.0, size_bytes=0)},
        {"run": documents.settings(prompt=1, new=2, threads=None)},
        {"failure": "stopped half-way", "rounds": 2},
    ],
    ids=lambda changed: "-".join(changed),
)
def test_cells_that_lack_something(changed: dict[str, object]) -> None:
    whole = documents.cell("whole", run=documents.settings(2048))
    for cells in ([documents.cell(**changed)], [whole, documents.cell(**changed)]):
        profile = documents.profile(cells)
        assert "small-q4_0" in shown(page([profile]))
        assert "small-q4\\_0" in markdown([profile])
        assert 'cell="small-q4_0"' in prometheus([profile])


def test_of_very_many_samples_a_page_keeps_how_they_spread() -> None:
    huge = documents.profile(
        [
            documents.cell(f"cell {n}", 20 + n, run=documents.settings(64 * 2 ** (n % 6), 512))
            for n in range(40)
        ]
    )
    text = page([huge])
    assert len(text.encode()) < 2_000_000
    assert "Every sample is in this page" not in text
    kept = msgspec.json.decode(parsed(text).raw["profile-1"], type=Profile)
    latency, whole = (each.cells[0].inter_token_latency_s for each in (kept, huge))
    assert latency is not None
    assert whole is not None
    assert (latency.samples, latency.p99) == ((), whole.p99)
    assert len(whole.samples) == 10 * 511
