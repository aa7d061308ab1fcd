"""Adapter: a fine-tune as it lies on disk, its config and its tensors, nothing applied yet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from edgellm.digests import file_sha256
from edgellm.errors import UsageError
from edgellm.tensors import TensorRef

Parts = Mapping[str, TensorRef]
"""The tensors that an adapter holds for one weight, by the part's name in PEFT (``lora_A``)."""


@dataclass(frozen=True, slots=True)
class AdapterSpec:
    """What a user names: ``PATH`` or ``PATH=WEIGHT``; a folder, a GGUF adapter or a Hub id."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read and checked by itself; what it changes is found by its base.

    ``kind`` is a row of ``KINDS``. ``config`` is ``adapter_config.json``. ``parts`` are by the name
    of the weight that they change: a Hugging Face name without the prefixes that PEFT adds
    (``model.layers.0.self_attn.q_proj.weight``), or, where ``naming`` is ``gguf``, a role
    (``blk.0.attn_q.weight``). What ``lora_bias`` adds to a bias is a part (``lora_bias``) under the
    bias's name, and a part that serves all weights (VeRA's projections) is given to each of them.
    ``replaced`` are whole tensors that take the place of the base's (``modules_to_save``, trained
    biases, tables that were saved beside their change), by the same names; where a weight has both,
    its parts change the replacement. ``tokenizer_folder``: where the adapter brings a tokenizer of
    its own. ``base_name`` and ``base_revision``: what it says that it was trained on, empty where
    it says nothing. ``made_from``: the digest of the adapter that this is another form of, where it
    says so. ``notes`` are facts that the user should be shown.
    """

    name: str
    path: Path
    kind: str
    config: dict[str, Any]
    parts: dict[str, Parts]
    files: tuple[Path, ...]
    naming: Literal["hf", "gguf"] = "hf"
    weight: float = 1.0
    replaced: dict[str, TensorRef] = field(default_factory=dict)
    tokenizer_folder: Path | None = None
    base_name: str = ""
    base_revision: str = ""
    revision: str = ""
    made_from: str = ""
    notes: tuple[str, ...] = ()

    def digest(self) -> str:
        """SHA-256 over the digests of its files (config and weights) in the order of their names.

        Raises ``SourceError`` when a file cannot be read.
        """
        return self._digest

    def digests(self) -> frozenset[str]:
        """All digests that a record of it may hold: its own, and that of what it was made from."""
        return frozenset(filter(None, (self.digest(), self.made_from)))

    @cached_property
    def _digest(self) -> str:
        files = sorted(self.files, key=lambda path: path.name)
        return hashlib.sha256(
            b"".join(bytes.fromhex(file_sha256(path)) for path in files)
        ).hexdigest()


def parse_spec(text: str) -> AdapterSpec:
    """``PATH[=WEIGHT]``; a path that holds ``=`` itself and exists is taken whole.

    Raises ``UsageError`` for a weight that is no number, infinite or zero.
    """
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).expanduser().exists():
        return AdapterSpec(text)
    try:
        weight = float(number)
    except ValueError:
        weight = float("nan")
    if not path or not -1e6 < weight < 1e6 or not weight:
        raise UsageError(
            f"--adapter {text}: the weight behind = must be a number other than 0, got {number!r}: "
            "write PATH, or PATH=0.5"
        )
    return AdapterSpec(path, weight)
