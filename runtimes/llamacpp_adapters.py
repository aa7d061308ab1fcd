"""LoRA adapters beside a llama.cpp model: checked, loaded once, applied at any strength."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.errors import AdapterError, GenerationError
from edgellm.runtimes.llamacpp_library import forget_log, last_words
from edgellm.runtimes.session import AdapterFile

if TYPE_CHECKING:
    from edgellm.source.gguf_file import GgufFile


class LlamaCppAdapters:
    """The adapters of one llama.cpp model; llama.cpp frees them with it."""

    def __init__(self, library: Any, model: Any, base: GgufFile) -> None:
        self._library = library
        self._model = model
        self._base = base
        self._loaded: dict[Path, Any] = {}
        self.applied: tuple[AdapterFile, ...] = ()

    def load(self, adapters: Sequence[AdapterFile]) -> None:
        """Read those that were not read before.

        Raises ``AdapterError`` for a file that does not belong to the model: shapes and names are
        compared first, as llama.cpp stops the whole process over some of them.
        """
        from edgellm.lora.reading.gguf_adapter import check_fits, open_gguf_adapter

        for path in {
            adapter.path: None for adapter in adapters if adapter.path not in self._loaded
        }:
            check_fits(open_gguf_adapter(path), self._base)
            forget_log()
            loaded = self._library.llama_adapter_lora_init(self._model, os.fsencode(path))
            if not loaded:
                raise AdapterError(f"llama.cpp could not load the adapter {path}: {last_words()}")
            self._loaded[path] = loaded

    def apply(self, context: Any, adapters: Sequence[AdapterFile]) -> None:
        """Let ``context`` compute with these, which were loaded, and no others."""
        count = len(adapters)
        pointers = (ctypes.POINTER(ctypes.c_void_p) * count)(
            *(self._loaded[adapter.path] for adapter in adapters)
        )
        weights = (ctypes.c_float * count)(*(adapter.weight for adapter in adapters))
        if self._library.llama_set_adapters_lora(context, pointers, count, weights) != 0:
            raise GenerationError(f"llama.cpp did not apply the adapters: {last_words()}")
        self.applied = tuple(adapters)


def summed(adapters: Sequence[AdapterFile]) -> tuple[AdapterFile, ...]:
    """The same change with each file once and none at weight 0; llama.cpp drops repetitions."""
    weights: dict[Path, float] = {}
    for adapter in adapters:
        weights[adapter.path] = weights.get(adapter.path, 0.0) + adapter.weight
    return tuple(AdapterFile(path, weight) for path, weight in weights.items() if weight)
