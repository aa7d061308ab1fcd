"""Whether an adapter and a base belong together, by what both say of themselves.

Shapes, names of weights and the vocabulary are checked where adapters are bound to their base;
what is left are names. They prove nothing, since folders and files are renamed freely: a difference
is told, not refused.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from edgellm.lora.adapter import Adapter
from edgellm.lora.lineage import without_place
from edgellm.source.model import ModelSource

Verdict = Literal["same", "different", "unknown"]

STORED_AS = re.compile(
    r"[-_. ](gguf|bnb|4bit|8bit|unsloth|gptq|awq|hf|mlx|onnx|fp8|fp16|bf16|f16|f32|int4|int8"
    r"|i?q\d\w*)$"
)
"""What is added to a model's name where it is stored in another way."""

NAME_KEYS = ("_name_or_path", "general.name", "general.base_model.0.name")


class Belonging(msgspec.Struct, frozen=True, kw_only=True):
    """``stated``: the base that the adapter names; ``given``: names of the one at hand."""

    verdict: Verdict
    stated: str
    given: tuple[str, ...]

    def warning(self, adapter: str) -> str:
        """What to tell of a base that goes by another name; empty otherwise."""
        if self.verdict != "different":
            return ""
        return (
            f"{adapter} says that it was trained on {self.stated}, and the base given is "
            f"{' or '.join(self.given)}: all shapes agree, but make sure that it is the same model"
        )


def belonging(source: ModelSource, adapter: Adapter) -> Belonging:
    """Whether ``adapter`` names ``source`` as its base."""
    stated = without_place(adapter.base_name)
    if adapter.base_revision and stated:
        stated = f"{stated}@{adapter.base_revision}"
    facts = {**source.config, **source.provenance}
    stored = [without_place(str(facts[key])) for key in NAME_KEYS if facts.get(key)]
    names = [source.name, *stored]
    path_name = source.path.name.removesuffix(".gguf")
    given = tuple(dict.fromkeys((*names, path_name)))
    if not adapter.base_name:
        return Belonging(verdict="unknown", stated="", given=given)
    known = plain_name(adapter.base_name) in {plain_name(name) for name in given}
    other_revision = (
        adapter.base_revision
        and source.revision
        and not source.revision.startswith(adapter.base_revision)
    )
    verdict: Verdict = "same" if known and not other_revision else "different"
    if other_revision:
        given = tuple(f"{name}@{source.revision}" for name in given[:1])
    return Belonging(verdict=verdict, stated=stated, given=given)


def plain_name(name: str) -> str:
    """A model's name without its owner or folder, and without how it is stored."""
    plain = re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().removesuffix(".gguf")
    while (shorter := STORED_AS.sub("", plain)) != plain:
        plain = shorter
    return re.sub(r"[^a-z0-9]", "", plain)
