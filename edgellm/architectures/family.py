"""A family of models: how its config is read, what its tensors are called, how GGUF stores it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Activation, Decoder, Feature
from edgellm.architectures.row_order import RowOrder
from edgellm.errors import UnsupportedTarget
from edgellm.remote.finding import AUTO_MAP

Value = bool | int | float | str | list[bool] | list[int]
"""Of a key in a GGUF file; int stands for uint32 there, float for float32."""

Kind = Literal[
    "embedding",
    "positions",
    "linear",
    "router",
    "small",
    "convolution",
    "decay",
    "norm",
    "bias",
    "head",
]
"""What a tensor is. ``router``: its product chooses experts, and no container rounds it;
``small``: a product's weight that stays float where grids are chosen for products; ``decay``: the
logarithms of a state's decay."""

SMALL_PRODUCT = "ssm_dt"
"""The ``small`` one: so few columns, and so much depends on it, that ONNX keeps it in floats."""


@dataclass(frozen=True, slots=True)
class Part:
    """Where checkpoints of another spelling have a tensor: rows of ``name`` from ``first`` on.

    ``shape`` is that of the whole; rows are counted over all of its dimensions but the last.
    """

    name: str
    shape: tuple[int, ...]
    first: int


@dataclass(frozen=True, slots=True)
class TensorRow:
    """One tensor that a model of the family has.

    ``source`` is its name in a Hugging Face checkpoint, ``role`` its GGUF name, ``shape`` what is
    expected in ``[out, in]`` order, of a convolution ``[channels, 1, width]``. ``transposed``: the
    checkpoint holds ``[in, out]`` (GPT-2's Conv1D). ``order``: how rows lie in the checkpoint,
    where the network takes them in another.
    ``elsewhere``: other places that it may be in. Where it is not stored ``apart``, it is always in
    one of these, and ``source`` is our own name for it. ``pieces``: names of the tensors that a
    checkpoint has its rows in, one in each, in place of ``source``.
    """

    source: str
    role: str
    shape: tuple[int, ...]
    kind: Kind
    transposed: bool = False
    order: RowOrder | None = None
    elsewhere: tuple[Part, ...] = ()
    apart: bool = True
    pieces: tuple[str, ...] = ()


def weight_and_bias(
    source: str,
    role: str,
    shape: tuple[int, ...],
    kind: Kind,
    biased: bool = True,
    *,
    order: RowOrder | None = None,
) -> Iterator[TensorRow]:
    """The rows of a product's or a norm's weight of ``shape``, and of its bias where it has one."""
    yield TensorRow(f"{source}.weight", f"{role}.weight", shape, kind, order=order)
    if biased:
        yield TensorRow(f"{source}.bias", f"{role}.bias", shape[:1], "bias", order=order)


def _nothing(decoder: Decoder) -> Iterator[str]:
    return iter(())


def _no_keys(decoder: Decoder) -> dict[str, Value]:
    return {}


def _no_names(decoder: Decoder) -> dict[str, str]:
    return {}


def _no_shapes(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    return {}


@dataclass(frozen=True, slots=True)
class GgufGraph:
    """What llama.cpp's graph of an architecture computes (``src/models/`` there).

    llama.cpp reads most hyper-parameters from the file but builds the rest into the graph: a
    difference would load without a word and answer wrongly. ``features`` are those that it has,
    ``always`` those that it cannot be without. ``nearly``: activations that its own stands for,
    which the user is told of. ``square_attention``: the heads together are as wide
    as the model. ``any_yarn``: settings that no key says are baked into ``rope_freqs.weight``.
    ``without_adapters``: parts of a layer, and the head, whose products pass adapters over.
    ``differences``: what else it would compute differently, in words.
    """

    features: frozenset[Feature]
    activation: Activation
    nearly: tuple[Activation, ...] = ()
    always: frozenset[Feature] = frozenset()
    square_attention: bool = False
    any_yarn: bool = False
    without_adapters: tuple[str, ...] = ()
    differences: Callable[[Decoder], Iterator[str]] = _nothing


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF file says of its network: the architecture's ``keys``, and more where it helps.

    ``names``: of all tensors. ``factors``: the values of ``rope_freqs.weight``, if there is one.
    """

    keys: Config
    names: frozenset[str]
    factors: Sequence[float] | None


@dataclass(frozen=True, slots=True)
class GgufLayout:
    """How llama.cpp expects the family: its architecture name, and where the stored bytes differ.

    ``interleaved_rope``: rows of q and k are stored in pairs (x0, x1) instead of halves.
    ``norm_plus_one``: norm weights are stored with the offset added. ``window``: llama.cpp's graph
    applies the sliding window; where it does not, the context is capped at the window.
    ``rope_factors``: tensors whose values its graph divides rotary frequencies by, all alike; none
    where it looks at no such. ``as_checkpoint``: rows lie as in a checkpoint (``TensorRow.order``).

    ``absorbed``: what makes keys and values of latent vectors is in two stacks (``gguf_latent``).

    ``names``: parts of a layer, and of the whole, that its tensors call otherwise than their roles,
    by the role's.
    ``shapes``: what tensors of a layer have there, by their roles without ``blk.N.``, where it is
    not the network's. ``keys`` are the architecture's own, beside those that all have
    (``gguf_metadata.gguf_keys``).
    ``config`` reads a file back as the config of this family; None where files of the architecture
    are read as another family's.
    """

    arch: str
    graph: GgufGraph
    interleaved_rope: bool = False
    norm_plus_one: bool = False
    window: bool = False
    rope_factors: tuple[str, ...] = ()
    as_checkpoint: bool = False
    absorbed: bool = False
    names: Callable[[Decoder], Mapping[str, str]] = _no_names
    shapes: Callable[[Decoder], Mapping[str, tuple[int, ...]]] = _no_shapes
    keys: Callable[[Decoder], dict[str, Value]] = _no_keys
    config: Callable[[GgufFacts], dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """One row of the registry, which every source and exporter reads.

    ``architecture`` is the class that transformers loads such a checkpoint with. ``base_prefix``
    may be missing from all names of a checkpoint that was saved without its head. ``gguf`` is None
    where llama.cpp has no graph for it.
    ``ignored_tensors``: ends of names of checkpoint tensors that hold nothing to convert (masks
    and tables that are computed anyway).
    ``guessing_layers``: the key of a config that counts layers behind the network's own, which
    guess further tokens and are left out.
    """

    model_type: str
    architecture: str
    read: Callable[[Config], Decoder]
    tensors: Callable[[Decoder], Iterator[TensorRow]]
    gguf: GgufLayout | None
    base_prefix: str
    ignored_tensors: tuple[str, ...] = ()
    guessing_layers: str = ""

    @property
    def gguf_layout(self) -> GgufLayout:
        """How GGUF stores it; raises ``UnsupportedTarget`` where llama.cpp has no graph for it."""
        if self.gguf is None:
            raise UnsupportedTarget(
                f"llama.cpp has no graph for {self.model_type} models: choose --format onnx"
            )
        return self.gguf

    def describe(self, config: Config) -> Decoder:
        """The network that ``config`` stands for.

        Raises ``UnsupportedModel`` for a missing key, a value that is not understood, and every
        key that nothing has read and that could change the maths.
        """
        decoder = self.read(config)
        config.skip(AUTO_MAP)  # the network is not taken from it; who reads the folder says so
        config.refuse_unread()
        return decoder
