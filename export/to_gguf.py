"""GGUF, the container of llama.cpp: one file with weights, hyper-parameters and tokenizer."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

from gguf.constants import GGML_QUANT_VERSION
from gguf.utility import size_label

import edgellm
from edgellm.architectures import gguf_keys, rope_factors
from edgellm.architectures.experts import stack_of
from edgellm.architectures.gguf_latent import apart, stored_shape
from edgellm.architectures.gguf_rows import as_llamacpp_stores, name_in_file
from edgellm.errors import UnsupportedTarget
from edgellm.export.gguf_chooser import Choice, chooser, quantizable
from edgellm.export.gguf_graphs import check_expressible, context_of, notes_of
from edgellm.export.gguf_head import ARCHITECTURE, StoredTensor, gguf_head
from edgellm.export.gguf_mixture import MIXTURES
from edgellm.export.layout import Container, Layout, OutputTensor, StoredArray
from edgellm.export.packing import PACKERS
from edgellm.generation_defaults import sampling_keys
from edgellm.lora.lineage import BASE_MODEL, gguf_lineage
from edgellm.tensors import TensorRef, constant

if TYPE_CHECKING:
    from edgellm.architectures.decoder import Decoder
    from edgellm.lora.adapter import Adapter
    from edgellm.recipe import Recipe
    from edgellm.source import ModelSource

FILE = "model.gguf"

PHI3_NAME = re.compile("phi-?3", re.IGNORECASE)
PHI3_TOKENS = frozenset({"</s>", "<unk>", "<s>", "<|endoftext|>"})

KEPT_KEYS = tuple(
    f"general.{key}"
    for key in (
        "organization",
        "author",
        "version",
        "basename",
        "finetune",
        "description",
        "license.name",
        "license.link",
        "url",
        "tags",
        "languages",
    )
)
"""What a GGUF source says of itself and a conversion does not change."""

IQ3_NOTE = (
    "iq3 grids are made for importance matrices; without one their answers are further off than "
    "q3_k's at nearly the same size: prefer q3_k_m"
)
"""SmolLM2, KL to f32: 1.4 to 1.7 for iq3_s, iq3_m and iq3_xs, 0.13 to 0.5 for the q3_k mixtures."""


def lay_out(source: ModelSource, recipe: Recipe) -> Layout:
    """Where every byte of the GGUF file lies; reads no weight.

    Raises ``UnsupportedTarget`` for what llama.cpp's graph or a ggml type cannot hold,
    ``UnknownGrid``, and ``UsageError`` for a context beyond the model's.
    """
    family, decoder = source.family, source.decoder
    if recipe.kv_cache is not None:
        raise UnsupportedTarget(
            f"--kv-cache {recipe.kv_cache}: a GGUF file does not say how its keys and values are "
            "cached, llama.cpp is told when it runs; leave it out, or choose --format onnx"
        )
    if recipe.compute is not None:
        raise UnsupportedTarget(
            f"--compute {recipe.compute}: a GGUF file does not say what it is computed in; leave "
            "it out, or choose --format onnx"
        )
    stored_as = family.gguf_layout
    check_expressible(decoder, stored_as)
    context, notes = context_of(decoder, stored_as, recipe.context)
    stated = dataclasses.replace(decoder, context_length=context)
    found = stacks_of(stored_tensors(source, context))
    roles = [each.role for each in found if quantizable(each.role, each.shape)]
    types = chooser(recipe, decoder, stored_as.arch, roles)
    stored = [
        (name_in_file(each.role, decoder, stored_as), each, types.choose(each.role, each.shape))
        for each in found
    ]
    words = source.tokenizer.gguf_metadata(rows=decoder.vocab_size)
    general = general_keys(source)
    name, renamed = loadable_name(str(general["general.name"]), words["tokenizer.ggml.tokens"])
    metadata = {
        ARCHITECTURE: stored_as.arch,
        **general,
        "general.name": name,
        "general.file_type": types.mixture.file_type,
        "general.quantization_version": int(GGML_QUANT_VERSION),
        **gguf_keys(stated, stored_as),
        **sampling_keys(source.generation),
        **words,
    }
    head = gguf_head(metadata, [_entry(*each, decoder) for each in stored])
    unweighed_iq3 = types.mixture.grid.startswith("iq3") and not types.weighed
    return Layout(
        container=CONTAINER.name,
        main_file=FILE,
        files={FILE: head.content},
        data_files={FILE: head.total_bytes},
        tensors=tuple(
            _output(*each, offset) for each, offset in zip(stored, head.offsets, strict=True)
        ),
        context_length=context,
        notes=(
            *notes,
            *notes_of(decoder, stored_as),
            *renamed,
            *((IQ3_NOTE,) if unweighed_iq3 else ()),
        ),
        tokenizer_limits=source.tokenizer.gguf_limits(),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of the file: one of the model's, or the same part of all experts of a layer."""

    role: str
    parts: tuple[TensorRef, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """``[out, in]``, ``[n]``, or ``[experts, out, in]``."""
        shape = self.parts[0].shape
        return shape if len(self.parts) == 1 else (len(self.parts), *shape)

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def stacks_of(refs: Iterable[TensorRef]) -> list[Stored]:
    """``refs`` in their order, with the weights of experts stacked where the first of them was."""
    found: dict[str, list[TensorRef]] = {}
    for ref in refs:
        found.setdefault(stack_of(ref.role) or ref.role, []).append(ref)
    return [Stored(role, tuple(parts)) for role, parts in found.items()]


def loadable_name(name: str, tokens: object) -> tuple[str, tuple[str, ...]]:
    """``name`` as llama.cpp can load it with these ``tokens``, and a note where it is another.

    llama.cpp knows the tokenizer of Phi 3 by the model's name and fails where its special tokens
    are not there (``llama-vocab.cpp``).
    """
    if PHI3_NAME.search(name) and not PHI3_TOKENS.issubset(cast("Collection[str]", tokens)):
        changed = PHI3_NAME.sub("phi 3", name)
        return changed, (
            f"general.name is {changed!r}: llama.cpp takes a model named {name!r} for one with Phi "
            "3's tokenizer, and cannot load this one",
        )
    return name, ()


def stored_tensors(source: ModelSource, context: int) -> Iterator[TensorRef]:
    """The tensors as llama.cpp expects them, in the family's order."""
    layout = source.family.gguf_layout
    divisors = rope_factors(source.decoder, layout)
    if divisors is not None:
        for name in layout.rope_factors:
            yield constant(name, divisors)
    for row in source.family.tensors(source.decoder):
        ref = source.tensors.get(row.role)
        if ref is not None and row.kind == "positions":
            # llama.cpp wants one row for each token of the stated context.
            ref = dataclasses.replace(ref, shape=(context, *ref.shape[1:]))
        if ref is not None:
            stored = as_llamacpp_stores(ref, row, source.decoder, layout)
            yield from apart(stored, source.decoder) if layout.absorbed else (stored,)


def general_keys(source: ModelSource) -> dict[str, object]:
    """``general.*``: what the model is, where it came from, who changed it; no time, no path.

    What a GGUF source says of itself is kept. Where it names no parents, it is the base itself.
    Adapters that were merged in are parents too.
    """
    kept = {key: source.provenance[key] for key in KEPT_KEYS if key in source.provenance}
    parents = {key: value for key, value in source.provenance.items() if key.startswith(BASE_MODEL)}
    organization, slash, _ = source.name.rpartition("/")
    finetune = " + ".join(each.name for each in source.merge.adapters) if source.merge else ""
    parents = parents or {
        f"{BASE_MODEL}count": 1,
        f"{BASE_MODEL}0.name": source.name,
        f"{BASE_MODEL}0.organization": kept.get("general.organization", organization),
        f"{BASE_MODEL}0.version": source.revision,
        f"{BASE_MODEL}0.repo_url": source.url,
    }
    return {
        "general.type": "model",
        "general.name": source.name,
        "general.organization": organization if slash else "",
        "general.size_label": _size(source),
        **kept,
        **({"general.finetune": finetune} if finetune else {}),
        "general.license": source.licence,
        **gguf_lineage(source, parents),
        "general.quantized_by": f"edgellm {edgellm.__version__}",
    }


def _size(source: ModelSource) -> str:
    """The label as llama.cpp's converter makes it: ``8x7B`` where there are experts."""
    experts = [ref.size for ref in source.tensors.values() if stack_of(ref.role)]
    weights = sum(ref.size for ref in source.tensors.values())
    if not experts:
        return str(size_label(weights, weights, 0, 0))
    count = max(layer.experts.count for layer in source.decoder.layers if layer.experts)
    each = sum(experts) // count
    return str(size_label(weights, weights - sum(experts), each, count))


def _entry(name: str, each: Stored, choice: Choice, decoder: Decoder) -> StoredTensor:
    grid = choice.grid
    assert grid.ggml_type is not None
    nbytes = each.rows * _row_bytes(each.parts[0], choice)
    shape = stored_shape(each.role, each.shape, decoder)
    return StoredTensor(name, shape, grid.ggml_type, nbytes)


def _output(name: str, each: Stored, choice: Choice, offset: int) -> OutputTensor:
    row_bytes = _row_bytes(each.parts[0], choice)
    array = StoredArray(name, "data", FILE, offset, row_bytes, each.rows)
    return OutputTensor(
        name=name,
        role=each.role,
        parts=each.parts,
        grid=choice.grid,
        packer=choice.grid.kind,
        arrays=(array,),
        note=choice.note,
        experts=len(each.parts),
    )


def _row_bytes(ref: TensorRef, choice: Choice) -> int:
    return PACKERS[choice.grid.kind].row_bytes(choice.grid, ref.columns)["data"]


def _keep_apart(layout: Layout, source: ModelSource, adapters: Sequence[Adapter]) -> Layout:
    from edgellm.export.gguf_adapter import keep_apart  # brings all kinds of adapter with it

    return keep_apart(layout, source, adapters)


CONTAINER = Container(
    name="gguf",
    grids=tuple(MIXTURES),
    default_grid="q4_k_m",
    lay_out=lay_out,
    packages=("gguf",),
    keep_apart=_keep_apart,
)
