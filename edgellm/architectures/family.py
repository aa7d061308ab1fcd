"""A family of models: how its config is read, what its tensors are called, how GGUF stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder

Kind = Literal["embedding", "positions", "linear", "norm", "bias", "head"]


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor that a model of the family has.

    ``source`` is its name in a Hugging Face checkpoint, ``role`` its GGUF name, ``shape`` what is
    expected in ``[out, in]`` order. ``transposed``: the checkpoint holds ``[in, out]`` (GPT-2's
    Conv1D).
    """

    source: str
    role: str
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How llama.cpp expects the family: its architecture name, and where the stored bytes differ.

    ``interleaved_rope``: rows of q and k are stored in pairs (x0, x1) instead of halves.
    ``norm_plus_one``: norm weights are stored with the offset added. ``window``: llama.cpp's graph
    applies the sliding window; where it does not, the context is capped at the window.
    """

    arch: str
    interleaved_rope: bool = False
    norm_plus_one: bool = False
    window: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the registry, which every source and exporter reads.

    ``architecture`` is the class that transformers loads such a checkpoint with. ``base_prefix``
    may be missing from all names of a checkpoint that was saved without its head.
    ``ignored_tensors``: ends of names of checkpoint tensors that hold nothing to convert (masks
    and tables that are computed anyway).
    """

    model_type: str
    architecture: str
    read: Callable[[Config], Decoder]
    tensors: Callable[[Decoder], Iterator[TensorRow]]
    gguf: GgufLayout
    base_prefix: str
    ignored_tensors: tuple[str, ...] = ()

    def describe(self, config: Config) -> Decoder:
        """The network that ``config`` stands for.

        Raises ``UnsupportedModel`` for a missing key, a value that is not understood, and every
        key that nothing has read and that could change the maths.
        """
        decoder = self.read(config)
        config.refuse_unread()
        return decoder
