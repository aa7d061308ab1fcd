"""LoRA adapters as GGUF files that stock llama.cpp applies beside a model.

llama.cpp knows one alpha for a whole file and scales every product by alpha over the rank of its
pair (``llama_adapter_lora_weight::get_scale``). Scales of another form (rsLoRA, alpha patterns) are
put into that alpha where one fits all pairs, and into B where none does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import edgellm
from edgellm.architectures.experts import SHARED_GATE, stack_of
from edgellm.architectures.family import TensorRow
from edgellm.architectures.gguf_rows import as_llamacpp_stores
from edgellm.architectures.row_order import as_network_takes
from edgellm.errors import AdapterError, OutputError
from edgellm.export.gguf_head import ARCHITECTURE, StoredTensor, gguf_head
from edgellm.export.layout import AdapterBeside, Layout, OutputTensor, StoredArray
from edgellm.export.packing import PACKERS
from edgellm.lora.adapter import Adapter
from edgellm.lora.edit import Edit, LowRank
from edgellm.lora.kinds.loha import Hadamard
from edgellm.lora.merging import bindings
from edgellm.lora.reading.gguf_adapter import ADAPTER_TYPE, ALPHA, MADE_FROM, TYPE, A, B
from edgellm.quant.grid import GRIDS
from edgellm.quant.rtn import solve
from edgellm.source.matching import equal
from edgellm.source.model import ModelSource
from edgellm.tensors import SLAB_BYTES, Array, TensorRef, derived, rows_within, stacked_rows
from edgellm.tensors import transposed as turned

FACTORS = GRIDS["f32"]
"""What factors are stored in. With f16 llama.cpp rounds activations to f16 before both products:
logits of a tiny Llama (up to 20) then lie 0.03 to 0.8 from the merged model's, with f32 0.0004."""

PRODUCTS = ("linear", "head", "router", "small")
"""Kinds of rows that llama.cpp's graphs multiply by, and add an adapter's product to
(``build_lora_mm``): routers and the steps of states too, which are never rounded."""

MERGE_IT = "merge it into the weights instead (convert or merge with --adapter alone)"

WHOLE = (
    "replaces whole tensors ({}), which llama.cpp does not take from an adapter (where they are a "
    "mere copy of the base's, save it without: save_embedding_layers=False)"
)
TIED = (
    "changes the table that {} uses both as embedding and as head, on which llama.cpp stops the "
    "whole process"
)


@dataclass(frozen=True, slots=True)
class Factors:
    """One changed weight: ``lora_a`` and ``lora_b`` as the file holds them, less the scale.

    ``wanted`` is the scale of the product times its rank: what alpha would have to be.
    """

    role: str
    a: TensorRef
    b: TensorRef
    wanted: float


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """Where every byte of an adapter's file lies; ``head`` ends where the first tensor begins."""

    file: str
    head: bytes
    total_bytes: int
    tensors: tuple[OutputTensor, ...]


def lay_out_adapter(source: ModelSource, adapter: Adapter, file: str) -> AdapterLayout:
    """How ``adapter`` is laid out in ``file`` for ``source``; no factor is read.

    The adapter's own weight is not in it: a runtime applies it. Raises ``AdapterError`` for an
    adapter of another base, and for one that no GGUF adapter can hold.
    """
    pairs = factors(source, adapter)
    alpha = _common_alpha(adapter, pairs)
    metadata = {
        ARCHITECTURE: source.family.gguf_layout.arch,
        TYPE: "adapter",
        ADAPTER_TYPE: "lora",
        ALPHA: alpha,
        "general.name": adapter.name,
        **_base_keys(source),
        "general.quantized_by": f"edgellm {edgellm.__version__}",
        MADE_FROM: adapter.digest(),
    }
    assert FACTORS.ggml_type is not None
    refs = [ref for pair in pairs for ref in _stored(pair, alpha)]
    row_bytes = [PACKERS[FACTORS.kind].row_bytes(FACTORS, ref.columns)["data"] for ref in refs]
    head = gguf_head(
        metadata,
        [
            StoredTensor(ref.role, ref.shape, FACTORS.ggml_type, ref.rows * nbytes)
            for ref, nbytes in zip(refs, row_bytes, strict=True)
        ],
    )
    tensors = tuple(
        OutputTensor(
            name=f"{file}/{ref.role}",
            role=ref.role,
            parts=(ref,),
            grid=FACTORS,
            packer=FACTORS.kind,
            arrays=(StoredArray(ref.role, "data", file, offset, nbytes, ref.rows),),
        )
        for ref, nbytes, offset in zip(refs, row_bytes, head.offsets, strict=True)
    )
    return AdapterLayout(file, head.content, head.total_bytes, tensors)


def write_gguf_adapter(source: ModelSource, adapter: Adapter, path: Path) -> None:
    """Write ``adapter`` for ``source`` to ``path``; see ``lay_out_adapter``.

    Raises ``TensorError`` for NaN or Inf in a factor, ``OutputError`` when it cannot be written.
    """
    layout = lay_out_adapter(source, adapter, path.name)
    try:
        with path.open("wb") as file:
            file.write(layout.head)
            for tensor in layout.tensors:
                file.seek(tensor.arrays[0].offset)
                step = rows_within(SLAB_BYTES, tensor.columns)
                for start in range(0, tensor.rows, step):
                    rows = stacked_rows(tensor.parts, start, min(start + step, tensor.rows))
                    file.write(PACKERS[tensor.packer].pack(solve(rows, tensor.grid))["data"].data)
            file.truncate(layout.total_bytes)
    except OSError as error:
        raise OutputError(f"cannot write the adapter {path}: {error.strerror}") from error


def keep_apart(layout: Layout, source: ModelSource, adapters: Sequence[Adapter]) -> Layout:
    """``layout`` with the adapters in files beside the model.

    Raises ``AdapterError`` as ``lay_out_adapter`` does.
    """
    files = adapter_files(adapters)
    beside = [
        lay_out_adapter(source, adapter, file)
        for adapter, file in zip(adapters, files, strict=True)
    ]
    return replace(
        layout,
        files={**layout.files, **{each.file: each.head for each in beside}},
        data_files={**layout.data_files, **{each.file: each.total_bytes for each in beside}},
        tensors=(*layout.tensors, *(tensor for each in beside for tensor in each.tensors)),
        adapters=tuple(map(AdapterBeside, adapters, files)),
    )


def adapter_files(adapters: Sequence[Adapter]) -> tuple[str, ...]:
    """A file name for each adapter, made of its own name; a number where two would be alike."""
    names: list[str] = []
    for adapter in adapters:
        plain = re.sub(r"[^\w.-]+", "-", adapter.name).strip("-.") or "adapter"
        name, number = f"adapter-{plain}.gguf", 2
        while name.lower() in {other.lower() for other in names}:
            name, number = f"adapter-{plain}-{number}.gguf", number + 1
        names.append(name)
    return tuple(names)


def factors(source: ModelSource, adapter: Adapter) -> list[Factors]:
    """Every weight that ``adapter`` changes as a pair of factors, in the order of the model.

    Raises ``AdapterError`` for what a GGUF adapter cannot hold, by name.
    """
    if whole := _replaced(source, adapter):
        raise _cannot(adapter, WHOLE.format(", ".join(whole[:3])))
    edits = bindings(source, adapter)
    rows = {row.role: row for row in source.family.tensors(source.decoder)}
    for role in edits:
        if role not in rows or role not in source.tensors or stack_of(role):
            raise _cannot(adapter, f"changes {role}, which is no weight of its own in a GGUF file")
    return [
        _pair(adapter, source, row, edits[role].edit) for role, row in rows.items() if role in edits
    ]


def _pair(adapter: Adapter, source: ModelSource, row: TensorRow, edit: Edit) -> Factors:
    low = _low_rank(edit)
    if low is None:
        raise _cannot(adapter, f"changes {row.role} by {adapter.kind}, not by a product A and B")
    if row.kind == "embedding" and source.decoder.tied_head:
        raise _cannot(adapter, TIED.format(source.name))
    wanted = float(np.float32(low.scale * low.rank))
    if row.kind == "embedding":
        # A is looked up by token there: [vocabulary, rank] in the file, B [hidden, rank].
        return Factors(row.role, low.b, turned(low.a), wanted)
    graph = source.family.gguf_layout.graph
    if row.role.split(".")[-2] in graph.without_adapters or row.kind not in PRODUCTS:
        raise _cannot(adapter, f"changes {row.role}, which llama.cpp adds no product to")
    rows = as_network_takes(low.b, row)
    b = rows
    # A shared expert's gate is a vector in a model's file; its factors are matrices all the same.
    if not row.role.endswith(SHARED_GATE):
        b = as_llamacpp_stores(rows, row, source.decoder, source.family.gguf_layout)
    return Factors(row.role, low.a, b, wanted)


def _replaced(source: ModelSource, adapter: Adapter) -> list[str]:
    """The whole tensors of ``adapter``, without those that are the base's own.

    PEFT saves the tables of a model beside every adapter that changes one of them.
    """
    roles = {row.source: row.role for row in source.family.tensors(source.decoder)}

    def is_the_base_s(name: str, ref: TensorRef) -> bool:
        own = source.tensors.get(roles.get(name, ""))
        return own is not None and own.shape == ref.shape and equal(own, ref)

    return sorted(name for name, ref in adapter.replaced.items() if not is_the_base_s(name, ref))


def _low_rank(edit: Edit) -> LowRank | None:
    """``edit`` as one product of two factors; None where it is none.

    LoHa's product value by value, of two products of rank r, is one of rank r squared: its factors
    are the products of all pairs of columns, and of all pairs of rows.
    """
    if isinstance(edit, LowRank):
        return edit
    if not isinstance(edit, Hadamard):
        return None
    (left, other_left), (right, other_right) = edit.left, edit.right
    (out, rank), into = left.shape, right.columns

    def load_b(start: int, stop: int) -> Array:
        first, second = left.load(start, stop), other_left.load(start, stop)
        return (first[:, :, None] * second[:, None, :]).reshape(stop - start, rank * rank)

    def load_a(start: int, stop: int) -> Array:
        pairs = np.arange(start, stop)
        return right.load()[pairs // rank] * other_right.load()[pairs % rank]

    return LowRank(
        replace(right, shape=(rank * rank, into), load_rows=load_a, column_loader=None),
        replace(left, shape=(out, rank * rank), load_rows=load_b, column_loader=None),
        edit.scale,
    )


def _common_alpha(adapter: Adapter, pairs: Sequence[Factors]) -> float:
    """The alpha that most pairs want; llama.cpp takes 0 for a scale of 1, so it is never that."""
    wanted = Counter(pair.wanted for pair in pairs if pair.wanted)
    if not wanted:
        raise AdapterError(
            f"{adapter.path} has a scale of 0 on every weight, so it changes nothing: check "
            "lora_alpha in its adapter_config.json"
        )
    return wanted.most_common(1)[0][0]


def _stored(pair: Factors, alpha: float) -> Iterator[TensorRef]:
    """Both factors under their names in the file, what alpha leaves of the scale put into B."""
    yield pair.a.with_role(f"{pair.role}{A}")
    b = pair.b if pair.wanted == alpha else _scaled(pair.b, pair.wanted / alpha)
    yield b.with_role(f"{pair.role}{B}")


def _scaled(ref: TensorRef, factor: float) -> TensorRef:
    def scaled(rows: Array) -> Array:
        return rows * np.float32(factor)

    return derived(ref, scaled)


def _base_keys(source: ModelSource) -> dict[str, Any]:
    organization, slash, _ = source.name.rpartition("/")
    return {
        "general.base_model.count": 1,
        "general.base_model.0.name": source.name,
        "general.base_model.0.organization": organization if slash else "",
        "general.base_model.0.version": source.revision,
        "general.base_model.0.repo_url": source.url,
    }


def _cannot(adapter: Adapter, why: str) -> AdapterError:
    return AdapterError(f"{adapter.path} cannot stay apart as a GGUF adapter: it {why}; {MERGE_IT}")
