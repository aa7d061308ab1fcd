"""Names of models on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

HUB_ID = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[^:@\s]+))?(?::(?P<file>[^:\s]+\.gguf))?"
)


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the Hub: ``repo`` is ``org/name``, ``file`` a GGUF in it, if one was named."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @property
    def url(self) -> str:
        """Its page, whatever mirror it is fetched from."""
        return f"https://huggingface.co/{self.repo}"


def parse_hub_id(text: str) -> HubId | None:
    """``org/name[@revision][:file.gguf]`` as a ``HubId``, or None for anything else."""
    found = HUB_ID.fullmatch(text)
    return HubId(found["repo"], found["revision"], found["file"]) if found else None
