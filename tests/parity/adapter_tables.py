"""The tables of docs/adapters.md and docs/combining-adapters.md: each bound, and what was measured.

`pytest tests/parity/test_peft_lora.py tests/parity/test_peft_kinds.py
tests/parity/test_peft_combine.py --write-figures` measures anew and writes them; a test holds the
documents equal to this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = Path(__file__).with_name("adapter_figures.json")
DOCUMENTS = (ROOT / "docs" / "adapters.md", ROOT / "docs" / "combining-adapters.md")
MARKED = re.compile(r"(<!-- figures:(\w+) -->\n).*?(<!-- /figures -->)", re.DOTALL)

KINDS = {
    "lora": "LoRA, and `target_modules` of any linear layer, Conv1D included",
    "rslora": "rsLoRA (`use_rslora`)",
    "patterns": "LoRA with `rank_pattern` and `alpha_pattern`",
    "dora": "DoRA (`use_dora`), on linear layers, Conv1D and embeddings",
    "embedding": "LoRA on `embed_tokens` and `lm_head`",
    "bias": "trained biases (`bias` all or lora_only)",
    "lora_bias": "`lora_bias`",
    "modules_to_save": "`modules_to_save`",
    "target_parameters": "`target_parameters`",
    "trainable_tokens": "`trainable_token_indices`, trainable tokens",
    "ln_tuning": "LN tuning",
    "loha": "LoHa",
    "lokr": "LoKr",
    "ia3": "(IA)³",
    "vera": "VeRA, its projections saved",
    "oft": "OFT",
    "boft": "BOFT",
    "adalora": "AdaLoRA",
    "c3a": "C³A",
    "hira": "HiRA",
    "hra": "HRA",
    "miss": "MiSS",
    "vblora": "VB-LoRA",
}


def bounds() -> dict[str, dict[str, float]]:
    """The bounds that the tests hold, by table and row."""
    import test_peft_combine
    import test_peft_kinds
    import test_peft_lora

    return {
        "kinds": {**test_peft_lora.BOUNDS, **test_peft_kinds.BOUNDS},
        "methods": dict(test_peft_combine.BOUNDS),
    }


def fill(text: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """``text`` with every marked table made anew."""
    held = bounds()

    def table(found: re.Match[str]) -> str:
        name = found[2]
        lines = [f"| {name[:-1]} | bound | measured |", "|---|---|---|"]
        for row, bound in held[name].items():
            label = KINDS[row] if name == "kinds" else f"`{row}`"
            lines.append(f"| {label} | {_shown(bound)} | {_shown(figures[name][row])} |")
        return found[1] + "\n".join(lines) + "\n" + found[3]

    return MARKED.sub(table, text)


def write(measured: Mapping[str, Mapping[str, float]]) -> None:
    """Keep what was measured and make the documents' tables of it."""
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for table, rows in measured.items():
        kept[table] = {**kept.get(table, {}), **{row: float(f"{x:.1e}") for row, x in rows.items()}}
    FIGURES.write_text(json.dumps(kept, indent=2) + "\n")
    for document in DOCUMENTS:
        document.write_text(fill(document.read_text(encoding="utf-8"), kept), encoding="utf-8")


def _shown(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-") if value else "0"
