"""Adapters beside a running model, known by name: added, made stronger or weaker, left out."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.errors import AdapterError, UnsupportedModel, UsageError
from edgellm.lora.adapter import Adapter, AdapterSpec, parse_spec
from edgellm.registry import suggestion
from edgellm.runtimes.session import AdapterFile

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.manifest import KeptEntry
    from edgellm.runtimes.session import AdaptingSession
    from edgellm.source import ModelSource


@dataclass(frozen=True, slots=True)
class Known:
    """An adapter that can be applied: its file, and how strong it is where nobody says."""

    path: Path
    weight: float


class ApartAdapters:
    """The adapters of one session, by name.

    A PEFT folder is turned into a GGUF adapter for the very model that runs, in a folder of its own
    that ``close`` removes. ``notes`` are facts that the user should be shown.
    """

    def __init__(
        self,
        artifact: Artifact,
        session: AdaptingSession,
        *,
        ignore_config_keys: Collection[str] = (),
    ) -> None:
        """Knows the adapters that were kept beside the model, and applies none.

        ``ignore_config_keys``: unknown keys of adapters' configs that the user vouches for.
        """
        self._ignore_config_keys = ignore_config_keys
        self._artifact = artifact
        self._session = session
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._known: dict[str, Known] = {}
        self._weights: dict[str, float] = {}
        self._held = _digests_of_merged(artifact)
        self.notes: list[str] = []
        for entry in kept_adapters(artifact):
            name = self._free_name(entry.name)
            self._known[name] = Known(artifact.path / entry.file, entry.weight)

    @property
    def weights(self) -> dict[str, float]:
        """How strongly each known adapter is applied now, 0 for those that are not."""
        return {name: self._weights.get(name, 0.0) for name in self._known}

    def lines(self) -> list[str]:
        """What is applied, and what is known and is not, a line each."""
        return [
            f"adapter {name}" + (f" applied at {weight:g}" if weight else " is off")
            for name, weight in self.weights.items()
        ]

    def apply_kept(self) -> None:
        """Apply those that were kept beside the model, as strongly as was asked for then."""
        self.set({name: known.weight for name, known in self._known.items()})

    def apply(self, texts: Sequence[str]) -> None:
        """Apply these and no others: each ``PATH[=WEIGHT]``, or ``NAME[=WEIGHT]`` of a known one.

        Raises ``UsageError`` for one that is named twice, else as ``add`` does.
        """
        wanted: dict[str, float] = {}
        for text in texts:
            name, weight = self.add(text)
            if name in wanted:
                raise UsageError(
                    f"--adapter {text}: {name} is named twice: name it once, with the sum of both "
                    "weights"
                )
            wanted[name] = weight
        self.set(wanted)

    def add(self, text: str) -> tuple[str, float]:
        """Make an adapter known, without applying it: its name, and the weight that was given.

        Raises ``AdapterError`` for one that is damaged, of another base, or cannot stay apart, and
        beside a model whose channels were scaled.
        """
        spec = _named(text, self._known)
        if spec.path in self._known:
            known = self._known[spec.path]
            return spec.path, known.weight if spec.path == text else spec.weight
        if scaled := _scaled_by(self._artifact):
            raise AdapterError(
                f"{self._artifact.path.name} was rounded by {' and '.join(scaled)}, which scaled "
                f"channels that {spec.path} was trained to see unscaled: convert its base with "
                "--quant gptq:GRID and run that, or merge the adapter (edgellm convert --adapter)"
            )
        from edgellm.lora.reading.open import open_adapter

        adapter = open_adapter(spec, ignore_config_keys=self._ignore_config_keys)
        name = self._free_name(adapter.name)
        self._known[name] = Known(self._file(adapter, name), 1.0)
        self.notes += adapter.notes
        if self._is_merged(adapter):
            self.notes.append(
                f"WARNING: {name} is merged into {self._artifact.path.name} already: beside it, "
                "its change counts twice; leave it out, or run the base with it"
            )
        return name, spec.weight

    def set(self, weights: Mapping[str, float]) -> None:
        """Apply the known adapters at ``weights``; those that are not among them are off.

        Raises ``UsageError`` for a name that is not known, and ``AdapterError`` as the session's
        ``set_adapters`` does; nothing has changed then.
        """
        for name in weights:
            if name not in self._known:
                there = suggestion(name, self._known) if self._known else "none is known here"
                raise UsageError(f"no adapter named {name!r}: {there}")
        files = [AdapterFile(self._known[name].path, weight) for name, weight in weights.items()]
        self._session.set_adapters(files)
        self._weights = {name: weight for name, weight in weights.items() if weight}

    def close(self) -> None:
        """Remove what was made for this session."""
        if self._scratch is not None:
            self._scratch.cleanup()

    def _file(self, adapter: Adapter, name: str) -> Path:
        """The GGUF file of ``adapter`` for this model."""
        if adapter.naming == "gguf":
            return adapter.path
        from edgellm.export.gguf_adapter import write_gguf_adapter
        from edgellm.source import open_source

        try:
            source = open_source(str(self._artifact.main))
        except UnsupportedModel as error:
            raise AdapterError(
                f"{adapter.path} is in PEFT's form, and what its names mean in "
                f"{self._artifact.main.name} is not known ({error}): give it as a GGUF adapter"
            ) from error
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="edgellm-adapters-")
        path = Path(self._scratch.name) / f"{len(self._known)}.gguf"
        write_gguf_adapter(source, adapter, path)
        self._look_at(source, adapter)
        return path

    def _look_at(self, source: ModelSource, adapter: Adapter) -> None:
        """Note what a merge would warn of: another base by name, an adapter that was not trained.

        Learns from ``source`` which adapters a plain file says it holds.
        """
        from edgellm.lora.binding import Combination
        from edgellm.lora.check.doctor import check_static
        from edgellm.lora.lineage import merged_twice
        from edgellm.lora.merging import merged_source

        self._held |= {entry.sha256 for entry in source.merged_before}
        merged = merged_source(source, [adapter], Combination())
        warnings = check_static(merged, allow_untrained=True).warnings
        twice = merged_twice(merged)  # of which ``add`` says what it means beside a model
        self.notes += [warning for warning in warnings if warning not in twice]

    def _free_name(self, name: str) -> str:
        number, free = 2, name
        while free in self._known:
            free, number = f"{name}-{number}", number + 1
        return free

    def _is_merged(self, adapter: Adapter) -> bool:
        return not self._held.isdisjoint(adapter.digests())


def _digests_of_merged(artifact: Artifact) -> set[str]:
    """Digests of the adapters that the manifest says are in the model."""
    if artifact.manifest is None:
        return set()
    made = artifact.manifest.artifact
    merged = (*made.merged_before, *(made.merge.adapters if made.merge else ()))
    return {entry.sha256 for entry in merged}


def _scaled_by(artifact: Artifact) -> tuple[str, ...]:
    """What scaled channels of ``artifact``, by its manifest, or by a plain GGUF file's keys."""
    from edgellm.lora import lineage
    from edgellm.source.gguf_file import read_gguf

    if artifact.manifest is not None:
        return lineage.scaled_by(artifact.manifest.artifact)
    return lineage.scaled_in_gguf(read_gguf(artifact.main).metadata)


def kept_adapters(artifact: Artifact) -> tuple[KeptEntry, ...]:
    """The adapters that lie beside the model of ``artifact``, which a plain file has none of."""
    return artifact.manifest.artifact.kept_adapters if artifact.manifest else ()


def _named(text: str, known: Mapping[str, Known]) -> AdapterSpec:
    """``text`` taken apart; the name of a known adapter goes before a path."""
    if text in known:
        return AdapterSpec(text)
    return parse_spec(text)
