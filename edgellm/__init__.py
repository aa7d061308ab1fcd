"""edgellm: quantize language models for the machine in front of you, and run them there.

``convert`` makes an artifact, ``open`` runs one (``open_encoder`` one that gives embeddings or
labels, ``open_seq2seq`` one with an encoder and a decoder), ``verify`` and ``inspect`` look at it,
``profile`` measures it; ``merge`` puts adapters into a model's own folder. Importing the package
costs nothing: what these need is imported when they are called.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.artifact import open_artifact as open_artifact
    from edgellm.artifact import verify as verify
    from edgellm.chat import open as open
    from edgellm.encoders.model import open_encoder as open_encoder
    from edgellm.inspection import inspect as inspect
    from edgellm.prefix_cache import PrefixCache as PrefixCache
    from edgellm.profiling.measuring import profile as profile
    from edgellm.progress import Progress
    from edgellm.seq2seq.model import open_seq2seq as open_seq2seq

__version__ = "0.1.0"

__all__ = [
    "PrefixCache",
    "convert",
    "inspect",
    "merge",
    "open",
    "open_artifact",
    "open_encoder",
    "open_seq2seq",
    "profile",
    "verify",
]

ON_USE = {
    "PrefixCache": "edgellm.prefix_cache:PrefixCache",
    "inspect": "edgellm.inspection:inspect",
    "open": "edgellm.chat:open",
    "open_artifact": "edgellm.artifact:open_artifact",
    "open_encoder": "edgellm.encoders.model:open_encoder",
    "open_seq2seq": "edgellm.seq2seq.model:open_seq2seq",
    "profile": "edgellm.profiling.measuring:profile",
    "verify": "edgellm.artifact:verify",
}


def convert(
    source: str | PathLike[str],
    out: str | PathLike[str],
    *,
    format: str | None = None,
    quant: str | None = None,
    layout: str | None = None,
    embed: str | None = None,
    head: str | None = None,
    tensor_grids: Mapping[str, str] | None = None,
    fit: str | None = None,
    bits: float | None = None,
    kv_cache: str | None = None,
    compute: str | None = None,
    context: int | None = None,
    rope_scaling: str | None = None,
    text_only: bool = False,
    calibration: str | PathLike[str] | None = None,
    calibration_tokens: int | None = None,
    calibrate_on: str | None = None,
    tune: int | None = None,
    ignore_config_keys: tuple[str, ...] = (),
    adapters: Sequence[str | PathLike[str]] = (),
    combine: str | None = None,
    density: float | None = None,
    sign: str | None = None,
    combine_rank: int | None = None,
    seed: int | None = None,
    merge_base: str | None = None,
    keep_adapters: bool = False,
    allow_untrained: bool = False,
    min_survival: float | None = None,
    check_text: str | PathLike[str] | None = None,
    check_tokens: int | None = None,
    max_kld: float | None = None,
    max_ppl_increase: float | None = None,
    threads: int | None = None,
    force: bool = False,
    check: bool = True,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """The artifact made of ``source`` (a folder, GGUF file or Hub id) in the new folder ``out``.

    The options are those of ``edgellm convert``; an adapter is ``PATH`` or ``PATH=WEIGHT``. Raises
    ``edgellm.errors.EdgeError``, and then nothing is left at ``out``.
    """
    from pathlib import Path

    from edgellm.conversion import convert as carry_out_recipe
    from edgellm.progress import unwatched
    from edgellm.recipe import make_recipe

    recipe = make_recipe(
        {
            "source": str(source),
            "format": format,
            "quant": quant,
            "layout": layout,
            "embed": embed,
            "head": head,
            "tensor_grids": dict(tensor_grids or {}),
            "fit": fit,
            "bits": bits,
            "kv_cache": kv_cache,
            "compute": compute,
            "context": context,
            "rope_scaling": rope_scaling,
            "text_only": text_only or None,
            "calibration": None if calibration is None else str(calibration),
            "calibration_tokens": calibration_tokens,
            "calibrate_on": calibrate_on,
            "tune": tune,
            "ignore_config_keys": ignore_config_keys,
            "adapters": [str(adapter) for adapter in adapters],
            "combine": combine,
            "density": density,
            "sign": sign,
            "combine_rank": combine_rank,
            "seed": seed,
            "merge_base": merge_base,
            "keep_adapters": keep_adapters,
            "allow_untrained": allow_untrained,
            "min_survival": min_survival,
            "check_text": None if check_text is None else str(check_text),
            "check_tokens": check_tokens,
            "max_kld": max_kld,
            "max_ppl_increase": max_ppl_increase,
        }
    )
    return carry_out_recipe(
        recipe,
        Path(out),
        threads=threads,
        force=force,
        check=check,
        trust_remote_code=trust_remote_code,
        progress=progress or unwatched,
    )


def merge(
    base: str | PathLike[str],
    out: str | PathLike[str],
    adapters: Sequence[str | PathLike[str]],
    *,
    dtype: str | None = None,
    combine: str | None = None,
    density: float | None = None,
    sign: str | None = None,
    combine_rank: int | None = None,
    seed: int | None = None,
    merge_base: str | None = None,
    allow_untrained: bool = False,
    ignore_config_keys: tuple[str, ...] = (),
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Artifact:
    """The Hugging Face folder ``out``: ``base`` (a folder or Hub id) with ``adapters`` merged in.

    The options are those of ``edgellm merge``; an adapter is ``PATH`` or ``PATH=WEIGHT``. Raises
    ``edgellm.errors.EdgeError``, and then nothing is left at ``out``.
    """
    from pathlib import Path

    from edgellm.folder_merge import merge as carry_out_recipe
    from edgellm.progress import unwatched
    from edgellm.recipe import make_recipe

    recipe = make_recipe(
        {
            "source": str(base),
            "format": "hf",
            "quant": dtype,
            "adapters": [str(adapter) for adapter in adapters],
            "combine": combine,
            "density": density,
            "sign": sign,
            "combine_rank": combine_rank,
            "seed": seed,
            "merge_base": merge_base,
            "allow_untrained": allow_untrained,
            "ignore_config_keys": ignore_config_keys,
        }
    )
    return carry_out_recipe(
        recipe, Path(out), threads=threads, force=force, progress=progress or unwatched
    )


def __getattr__(name: str) -> Any:
    if name not in ON_USE:
        raise AttributeError(f"module 'edgellm' has no attribute {name!r}")
    from edgellm import registry

    return registry.attribute(ON_USE[name])
