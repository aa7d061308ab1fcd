"""Adapters that PEFT itself makes, saves and merges: the reference of every kind of adapter.

``make_adapter`` is what most tests want. ``trained`` gives the live model, for a reference that
needs more than ``merge_and_unload`` (``add_weighted_adapter``).
"""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiny_models

if TYPE_CHECKING:
    import peft
    import transformers

Prepare = Callable[["transformers.PreTrainedModel"], Any]


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter on disk, and what PEFT makes of it.

    ``folder`` is what ``save_pretrained`` wrote. ``base`` and ``merged`` are float32 state dicts
    by Hugging Face names, as the checkpoint stores them (a Conv1D ``[in, out]``), a tied head
    under both of its names.
    """

    folder: Path
    base: dict[str, np.ndarray]
    merged: dict[str, np.ndarray]


def make_adapter(
    base: Path,
    config: peft.PeftConfig,
    folder: Path,
    *,
    seed: int = 0,
    noise: float = 0.1,
    prepare: Prepare | None = None,
    save: Mapping[str, Any] | None = None,
) -> PeftAdapter:
    """The adapter of ``config`` on the model folder ``base``, saved into ``folder`` and merged.

    Every trainable value, whatever its kind, moves off its start by ``noise`` times a normal draw,
    so that nothing is a no-op. ``prepare`` changes the base before (a resized vocabulary), and then
    ``base`` of the result is what it made. ``save`` are arguments of ``save_pretrained``.
    """
    model, before = _trained(base, config, seed, noise, prepare, "default")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if folder.exists():
            shutil.rmtree(folder)
        model.save_pretrained(folder, **(save or {}))
        merged = model.merge_and_unload(safe_merge=False)
    return PeftAdapter(folder, before, state_of(merged))


def trained(
    base: Path,
    config: peft.PeftConfig,
    *,
    seed: int = 0,
    noise: float = 0.1,
    prepare: Prepare | None = None,
    adapter_name: str = "default",
) -> peft.PeftModel:
    """The live PEFT model in float32, its trainable values drawn as ``make_adapter`` says."""
    return _trained(base, config, seed, noise, prepare, adapter_name)[0]


def _trained(
    base: Path,
    config: peft.PeftConfig,
    seed: int,
    noise: float,
    prepare: Prepare | None,
    adapter_name: str,
) -> tuple[peft.PeftModel, dict[str, np.ndarray]]:
    """The live PEFT model, and the state of its base before."""
    import peft
    import torch

    torch.manual_seed(seed)
    model = tiny_models.load(base)
    if prepare is not None:
        prepare(model)
    before = state_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT writes the names of this very model's modules into the config that it is given.
        result = peft.get_peft_model(model, copy.deepcopy(config), adapter_name=adapter_name)
    move(result, seed=seed, noise=noise)
    return result.eval(), before


def loaded(base: Path, folder: Path) -> peft.PeftModel:
    """The adapter of ``folder`` as PEFT reads it, on the model of ``base`` in float32."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(tiny_models.load(base), folder).eval()


def move(model: peft.PeftModel, *, seed: int, noise: float = 0.1) -> None:
    """Add ``noise`` times a normal draw to every value of ``model`` that is trainable now."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += noise * torch.randn(parameter.shape, generator=draw)


def state_of(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """A copy of the state dict as float32 arrays."""
    return {name: value.float().numpy().copy() for name, value in model.state_dict().items()}
