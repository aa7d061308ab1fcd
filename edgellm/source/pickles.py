"""Checkpoints that are never opened: reading a pickle runs whatever code it holds."""

from __future__ import annotations

from pathlib import Path

from edgellm.errors import SourceError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def refuse_pickle(path: Path) -> None:
    """Raise ``SourceError`` with the way out."""
    raise SourceError(
        f"{path} is a pickle, which can run any code when it is read, so edgellm does not read it. "
        "Most models on the Hub have safetensors in another revision; or, where you trust the "
        "file, save the model again with transformers: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    )
