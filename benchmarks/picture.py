"""The picture of size against KL in docs/, made from benchmarks/results/quality.json.

`python -m benchmarks.tables` writes it, and shows it in docs/quantization.md between
``<!-- size-kl -->`` and ``<!-- /size-kl -->``; figures of `--tune` and `--fit` stand in it too once
there are results of the same text.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.places import ROOT
from benchmarks.results import Result, load

if TYPE_CHECKING:
    from edgellm.budget.chart import Mark

PICTURE = ROOT / "docs" / "size-kl.svg"
DOCUMENT = ROOT / "docs" / "quantization.md"
MARKED = re.compile(r"(<!-- size-kl -->\n).*?(<!-- /size-kl -->)", re.DOTALL)
PEER, OURS, TUNED = "llama.cpp, importance matrix", "edgellm", "edgellm --tune, own text"
FITTED = "edgellm --fit"
ALTERNATIVE = "KL divergence against file size: GGUF files of edgellm and of llama.cpp, by type"
TITLE = "SmolLM2-135M off its 4-bit grid: GGUF files in stock llama.cpp"


def contents(results: Path) -> dict[Path, str]:
    """What ``DOCUMENT`` and ``PICTURE`` should hold; no picture where quality was not measured."""
    text = DOCUMENT.read_text(encoding="utf-8")
    if not (results / "quality.json").exists():
        unmeasured = "Not measured yet: `python -m benchmarks quality`."
        return {DOCUMENT: MARKED.sub(rf"\g<1>{unmeasured}\n\g<2>", text)}
    from edgellm.budget.chart import chart
    from edgellm.budget.picture import svg

    shown = f"![{ALTERNATIVE}]({PICTURE.name})"
    return {
        DOCUMENT: MARKED.sub(rf"\g<1>{shown}\n\g<2>", text),
        PICTURE: svg(chart(marks(results), TITLE)).decode(),
    }


def marks(results: Path) -> list[Mark]:
    """The points: of each type the peer's file and ours, tuned ours, and what ``--fit`` chose."""
    quality = load(results / "quality.json")
    found = []
    for comparison in quality.comparisons:
        name = comparison.what
        ours, peer = f"ours-{name}/model.gguf", f"peer-{name}.gguf"
        size = quality.facts["sizes"][ours]
        # Early results have no size of the peer's: its tensors are of the same types.
        peer_size = quality.facts["sizes"].get(peer, size)
        found += [
            _mark(quality, name, peer, peer_size, PEER),
            _mark(quality, name, ours, size, OURS),
        ]
    for name, series in (("tune", TUNED), ("fit", FITTED)):
        result = _beside(results, name, quality)
        if result is not None:
            found += _of_tune(result) if series == TUNED else _of_fit(result)
    return found


def _of_tune(result: Result) -> list[Mark]:
    sizes = {file: size for file, size in result.facts["sizes"].items() if file.startswith("tuned")}
    return [
        _mark(result, file.partition("/")[0].removeprefix("tuned-"), file, size, TUNED)
        for file, size in sizes.items()
    ]


def _of_fit(result: Result) -> list[Mark]:
    size = result.facts["sizes"]["fitted"]
    return [_mark(result, "--fit", "fitted/model.gguf", size, FITTED)]


def _beside(results: Path, name: str, quality: Result) -> Result | None:
    """Another benchmark's result, if it is of the text that ``quality`` is of."""
    path = results / f"{name}.json"
    result = load(path) if path.exists() else None
    same = result is not None and result.facts["text_sha256"] == quality.facts["text_sha256"]
    return result if same else None


def _mark(result: Result, label: str, file: str, size: int, series: str) -> Mark:
    from edgellm.budget.chart import Mark

    figures: dict[str, Any] = result.facts["figures"][file]
    return Mark(label, size, figures["kld_mean"], figures["kld_mean_stderr"], series)
