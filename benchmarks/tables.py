"""The documents' tables of figures, made from benchmarks/results/*.json, and the picture in docs/.

`python -m benchmarks.tables` writes them between ``<!-- benchmark:NAME -->`` and
``<!-- /benchmark -->`` of README.md, and with the commands into benchmarks/README.md; a test holds
both equal to what this makes.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.places import RESULTS, ROOT
from benchmarks.results import Comparison, Result, load

README, COMMANDED = ROOT / "README.md", ROOT / "benchmarks" / "README.md"
"""Documents with tables: the first without the commands, the other with them."""

MARKED = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def render(result: Result, *, commands: bool = False) -> str:
    """The Markdown table of ``result`` and, under it, where and how it was measured."""
    compared = any(comparison.peer for comparison in result.comparisons)
    head = ["", "edgellm", *([result.peer, "ratio (lowest to highest pair)"] if compared else [])]
    lines = [
        "| " + " | ".join([*head, "target"]) + " |",
        "|---" * (len(head) + 1) + "|",
        *(_row(comparison, compared) for comparison in result.comparisons),
    ]
    lines += ["", f"{result.setting} {_provenance(result)}"]
    if commands:
        lines += _types(result.facts["types"]) if "types" in result.facts else []
        lines += _commands(result)
    return "\n".join(lines)


def fill(text: str, results: Path, *, commands: bool = False) -> str:
    """``text`` with every marked table made anew; one without a result says that it has none."""

    def table(found: re.Match[str]) -> str:
        path = results / f"{found[2]}.json"
        unmeasured = f"Not measured yet: `python -m benchmarks {found[2]}`."
        content = render(load(path), commands=commands) if path.exists() else unmeasured
        return f"{found[1]}{content}\n{found[3]}"

    return MARKED.sub(table, text)


def update(results: Path = RESULTS) -> list[Path]:
    """Write tables and picture where they belong; returns the files that changed."""
    from benchmarks import picture

    contents = {
        document: fill(document.read_text(encoding="utf-8"), results, commands=commands)
        for document, commands in ((README, False), (COMMANDED, True))
    }
    contents |= picture.contents(results)
    changed = []
    for path, content in contents.items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            changed.append(path)
    return changed


def _types(types: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """What the files' tensors really are: types by their share of the bytes of all matrices."""
    lines = ["", "| file | types of its matrices, by their share of the bytes |", "|---|---|"]
    for name, of in types.items():
        total = sum(each["bytes"] for each in of.values())
        shares = []
        for kind, each in of.items():
            tensors = ", ".join(f"{count} {role}" for role, count in each["tensors"].items())
            share = each["bytes"] / total
            shares.append(f"{share:.{0 if share >= 0.01 else 1}%} {kind} ({tensors})")
        lines.append(f"| {name} | {'; '.join(shares)} |")
    return lines


def _commands(result: Result) -> list[str]:
    """The commands, folded away: what was run, by what it is for."""
    if not result.commands:
        return []
    lines = [f"# {what}\n{command}" for what, command in result.commands.items()]
    block = "\n".join(["```sh", *lines, "```"])
    return ["", "<details><summary>Commands</summary>", "", block, "", "</details>"]


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
    if comparison.at_least is not None and comparison.at_most is not None:
        bounds = (_bound(comparison, each) for each in (comparison.at_least, comparison.at_most))
        return f"{' to '.join(bounds)}: {_verdict(comparison)}"
    bound, words = comparison.at_most, "at most"
    if bound is None:
        bound, words = comparison.at_least, "at least"
    if bound is None:
        return ""
    return f"{words} {_bound(comparison, bound)}: {_verdict(comparison)}"


def _bound(comparison: Comparison, bound: float) -> str:
    return f"{bound:g}x" if comparison.peer else _shown(bound, comparison.unit)


def _verdict(comparison: Comparison) -> str:
    return "met" if comparison.met else "**missed**"


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
    """Write tables and picture, and say which files changed."""
    changed = [str(path.relative_to(ROOT)) for path in update()]
    print(f"changed: {', '.join(changed) or 'nothing'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
