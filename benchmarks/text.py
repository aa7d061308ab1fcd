"""Token ids to measure with: a prompt and a held-out text; run as a program.

The text is the language reference that every CPython carries (``pydoc_data.topics``): prose with
code, on every machine without a download, though not the same in every Python version, so results
keep its digest.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import run
from benchmarks.places import WORK

PROMPT_TOKENS = 512
WINDOW_TOKENS = 512
WINDOWS = 8
SKIPPED_CHARACTERS = 2000
RUN_WORDS = 8
"""So many words in a row are taken for a copy."""


@dataclass(frozen=True, slots=True)
class Text:
    """Where the ids lie (JSON: ``prompt`` and ``windows``), and the digest of the text.

    ``rest``: a file of the text that follows, of their kind and without what stands in them too.
    """

    path: Path
    sha256: str

    @property
    def rest(self) -> Path:
        return _rest_of(self.path)


def tokens(model: Path, windows: int = WINDOWS) -> Text:
    """The ids for the tokenizer of ``model``, made in a process of its own when missing."""
    path = WORK / f"{model.name}-tokens{'' if windows == WINDOWS else f'-{windows}'}.json"
    if not path.exists() or not _rest_of(path).exists():
        run([sys.executable, "-m", "benchmarks.text", str(model), str(path), str(windows)])
    digest: str = json.loads(path.read_text())["sha256"]
    return Text(path, digest)


def write_tokens(model: Path, path: Path, windows: int) -> None:
    """Write the ids of the text for the tokenizer of the folder ``model``."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer

    text = "\n\n".join(topics[name] for name in sorted(topics))[SKIPPED_CHARACTERS:]
    encoded = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text)
    ids, end = encoded.ids, PROMPT_TOKENS + windows * WINDOW_TOKENS
    held_out = ids[PROMPT_TOKENS:end]
    document = {
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
        "prompt": ids[:PROMPT_TOKENS],
        "windows": [
            held_out[start : start + WINDOW_TOKENS]
            for start in range(0, len(held_out), WINDOW_TOKENS)
        ],
    }
    path.write_text(json.dumps(document))
    cut = encoded.offsets[end][0]
    _rest_of(path).write_text(unseen_paragraphs(text[:cut], text[cut:]))


def unseen_paragraphs(before: str, text: str) -> str:
    """The paragraphs of ``text`` without those that share a run of words with what came earlier.

    The reference says much twice or more: two fifths of what is judged by stood in the rest again.
    """
    seen = _runs(before)
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        runs = _runs(paragraph)
        if not runs & seen:
            kept.append(paragraph)
            seen |= runs
    return "\n\n".join(kept)


def _runs(text: str) -> set[tuple[str, ...]]:
    """All runs of ``RUN_WORDS`` words; a shorter text whole."""
    words = text.split()
    return {
        tuple(words[start : start + RUN_WORDS])
        for start in range(max(1, len(words) - RUN_WORDS + 1))
    }


def _rest_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}-unseen.txt")


if __name__ == "__main__":
    write_tokens(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
