"""ModelSource: a model that was described and checked, none of its weights read yet."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgellm.digests import combined_sha256, file_sha256
from edgellm.tensors import TensorRef

if TYPE_CHECKING:
    from edgellm.architectures.decoder import Decoder
    from edgellm.architectures.family import Family
    from edgellm.lora.merging import Merge
    from edgellm.manifest import AdapterEntry
    from edgellm.remote.finding import RemoteCode
    from edgellm.tokenization import Tokenizer


@dataclass(frozen=True)
class ModelSource:
    """What goes into a conversion, whatever it came from.

    ``tensors`` are canonical: by role (GGUF tensor name), ``[out, in]``, rows of q and k in
    half-rotation order, norm weights as Hugging Face stores them; without ``output.weight`` where
    the head is tied. ``config`` is in Hugging Face's spelling for a GGUF file too. ``generation``
    is ``generation_config.json``. ``revision``, ``licence`` and ``url`` are empty where unknown.
    ``notes`` are facts that the user should be shown. ``weight_files`` are what ``digest`` covers,
    of a merged model too: they are the base's. ``merge`` says which adapters were merged into it,
    ``merged_before`` which had been when it was written, and ``scaled_by`` which transforms scaled
    channels of its weights, as far as it says. ``code``: Python of the model's own that may be run,
    None where nobody trusts it.
    """

    name: str
    kind: Literal["hf", "gguf"]
    path: Path
    config: dict[str, Any]
    family: Family
    decoder: Decoder
    tensors: dict[str, TensorRef]
    tokenizer: Tokenizer
    weight_files: tuple[Path, ...]
    generation: dict[str, Any] = field(default_factory=dict)
    revision: str = ""
    licence: str = ""
    url: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    merge: Merge | None = None
    merged_before: tuple[AdapterEntry, ...] = ()
    scaled_by: tuple[str, ...] = ()
    code: RemoteCode | None = None

    def digest(self) -> str:
        """SHA-256 of the weight files as ``combined_sha256`` takes it, by a thread for each core.

        Computed once. Raises ``SourceError`` when a file cannot be read.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest_of(self.weight_files)


def digest_of(weight_files: Sequence[Path]) -> str:
    """SHA-256 of ``weight_files`` as ``combined_sha256`` takes it, by a thread for each core."""
    files = sorted(weight_files, key=lambda path: path.name)
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_sha256, files))
    names = [path.name for path in files]
    if len(set(names)) < len(names):  # in folders of their own, as sentence-transformers has some
        names = [f"{path.parent.name}/{path.name}" for path in files]
    return combined_sha256(dict(zip(names, digests, strict=True)))
