"""Which Python of its own a model's folder names, without importing any of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edgellm.digests import file_sha256
from edgellm.errors import SourceError
from edgellm.json_file import read_json

AUTO_MAP: Final = "auto_map"
"""The key of a config that names classes in the repository's own Python files."""

TOKENIZER, MODEL, CONFIG = "AutoTokenizer", "AutoModelForCausalLM", "AutoConfig"

OPTION: Final = "--trust-remote-code"

IMPORTS: Final = re.compile(r"^\s*(?:import\s+\.|from\s+\.)(\w+)", re.MULTILINE)
"""Modules beside a file that it imports (transformers' ``get_relative_imports``)."""

CONFIGS: Final = ("config.json", "tokenizer_config.json")


@dataclass(frozen=True, slots=True)
class RemoteCode:
    """The Python that ``folder`` names, for ``classes`` by what they stand in for.

    ``files``: names of all that would be run, those that lie there or not. ``elsewhere``:
    repositories that hold more of it.
    """

    folder: Path
    classes: Mapping[str, str]
    files: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()

    @property
    def listed(self) -> str:
        """The files in words."""
        return ", ".join((*self.files, *(f"what {repo} holds" for repo in self.elsewhere)))

    def loaded_for(self, *kinds: str) -> RemoteCode:
        """What transformers loads of it for ``kinds``: each brings the config's class with it."""
        wanted = {CONFIG, *kinds} if kinds else set()
        classes = {kind: text for kind, text in self.classes.items() if kind in wanted}
        return _with_files(self.folder, classes)

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file by its name; raises ``SourceError`` where one is not there."""
        found = {}
        for name in self.files:
            if not (self.folder / name).is_file():
                raise SourceError(
                    f"{self.folder} names {name} as Python of its own ({AUTO_MAP}), and has no "
                    f"such file: fetch it too, or leave {OPTION} out"
                )
            found[name] = file_sha256(self.folder / name)
        return found


def find(folder: Path) -> RemoteCode | None:
    """The Python that the configs in ``folder`` name; None where they name none."""
    classes: dict[str, str] = {}
    for config in CONFIGS:
        path = folder / config
        said = read_json(path).get(AUTO_MAP) if path.is_file() else None
        if isinstance(said, Mapping):
            classes |= {str(name): text for name, text in _named(said)}
        elif isinstance(said, list | str):  # a tokenizer's, in old configs
            classes |= dict(_named({TOKENIZER: said}))
    return _with_files(folder, classes) if classes else None


def _with_files(folder: Path, classes: Mapping[str, str]) -> RemoteCode:
    """``classes``, and the files and repositories that hold them."""
    local = [text for text in classes.values() if "--" not in text]
    elsewhere = dict.fromkeys(text.split("--")[0] for text in classes.values() if "--" in text)
    files = dict.fromkeys(f"{text.split('.')[0]}.py" for text in local)
    for name in list(files):
        files |= dict.fromkeys(_imported(folder, name, set(files)))
    return RemoteCode(folder, classes, tuple(files), tuple(elsewhere))


def _named(auto_map: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The class of each entry that transformers loads: of a list (slow, fast) the fast one."""
    for name, said in auto_map.items():
        texts = reversed(said) if isinstance(said, list) else [said]
        text = next((each for each in texts if isinstance(each, str) and "." in each), None)
        if text is not None:
            yield str(name), text


def _imported(folder: Path, name: str, seen: set[str]) -> Iterator[str]:
    """Files that the file ``name`` imports from beside it, and those imports' own."""
    path = folder / name
    if not path.is_file():
        return
    for module in IMPORTS.findall(path.read_text(encoding="utf-8", errors="replace")):
        other = f"{module}.py"
        if other not in seen:
            seen.add(other)
            yield other
            yield from _imported(folder, other, seen)
