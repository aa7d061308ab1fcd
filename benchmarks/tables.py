"""README.md's tables of figures, made from benchmarks/results/*.json.

`python -m benchmarks.tables` writes them between ``<!-- benchmark:NAME -->`` and
``<!-- /benchmark -->``; a test holds README.md equal to what this makes.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

from benchmarks.places import RESULTS, ROOT
from benchmarks.results import Comparison, Result, load

MARKED = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def render(result: Result) -> str:
    """The Markdown table of ``result`` and, under it, where and how it was measured."""
    compared = any(comparison.peer for comparison in result.comparisons)
    head = ["", "edgellm", *([result.peer, "ratio (lowest to highest pair)"] if compared else [])]
    lines = [
        "| " + " | ".join([*head, "target"]) + " |",
        "|---" * (len(head) + 1) + "|",
        *(_row(comparison, compared) for comparison in result.comparisons),
    ]
    return "\n".join([*lines, "", f"{result.setting} {_provenance(result)}"])


def fill(text: str, results: Path) -> str:
    """``text`` with every marked table made anew; one without a result says that it has none."""

    def table(found: re.Match[str]) -> str:
        path = results / f"{found[2]}.json"
        unmeasured = f"Not measured yet: `python -m benchmarks {found[2]}`."
        content = render(load(path)) if path.exists() else unmeasured
        return f"{found[1]}{content}\n{found[3]}"

    return MARKED.sub(table, text)


def update(readme: Path, results: Path) -> bool:
    """Write the tables into ``readme``; whether anything changed."""
    before = readme.read_text(encoding="utf-8")
    after = fill(before, results)
    readme.write_text(after, encoding="utf-8")
    return before != after


def _row(comparison: Comparison, compared: bool) -> str:
    unit = comparison.unit
    cells = [comparison.what, _shown(statistics.median(comparison.ours), unit)]
    if compared and comparison.peer:
        ratios = comparison.ratios
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        cells += [
            _shown(statistics.median(comparison.peer), unit),
            f"{comparison.judged:.2f}{spread}",
        ]
    elif compared:
        cells += ["", ""]
    return "| " + " | ".join([*cells, _target(comparison)]) + " |"


def _target(comparison: Comparison) -> str:
    bound, words = comparison.at_most, "at most"
    if bound is None:
        bound, words = comparison.at_least, "at least"
    if bound is None:
        return ""
    wanted = f"{bound:g}x" if comparison.peer else _shown(bound, comparison.unit)
    return f"{words} {wanted}: {'met' if comparison.met else '**missed**'}"


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if unit == "s":
        return f"{value:.2f} s"
    if unit == "tokens/s":
        return f"{value:.1f} tokens/s"
    return f"{value:.4f} {unit}" if unit else f"{value:.2f}"


def _provenance(result: Result) -> str:
    machine = result.machine
    features = [name for name in machine["cpu_features"] if name != "avx512f"]
    processor = machine["cpu"] + (f" with {', '.join(features)}" if features else "")
    repetitions = max(len(comparison.ours) for comparison in result.comparisons)
    versions = {name: found for group in result.versions.values() for name, found in group.items()}
    counted = [name for name in _concerned(result) if name in versions]
    return (
        f"{f'Medians of {repetitions}' if repetitions > 1 else 'One run'}. "
        f"{processor}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, {machine['system']}, "
        f"Python {machine['python']}{''.join(f', {name} {versions[name]}' for name in counted)}. "
        f"Repeat: `python -m benchmarks {result.benchmark}`."
    )


def _concerned(result: Result) -> list[str]:
    packages: list[str] = result.facts.get("packages", [])
    return packages


def main() -> int:
    """Write the tables into README.md."""
    changed = update(ROOT / "README.md", RESULTS)
    print("README.md changed" if changed else "README.md was up to date", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
