"""GGUF adapters, the form that llama.cpp loads: read, checked, and put into PEFT's terms.

The reference is ``llama_adapter_lora_init_impl`` in llama.cpp's ``llama-adapter.cpp``. What it
drops in silence (norms) or what works at run time alone (activated LoRA) is told or refused here.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgellm.architectures import passed_over
from edgellm.architectures.experts import SHARED_GATE
from edgellm.architectures.family import TensorRow
from edgellm.architectures.gguf_rows import as_checkpoint_stores, name_in_file
from edgellm.architectures.row_order import as_checkpoint_has
from edgellm.errors import AdapterError
from edgellm.lora.adapter import Adapter, Parts
from edgellm.lora.lineage import HUB_URL
from edgellm.lora.reading.complete import check_values
from edgellm.source.gguf_file import GgufFile, read_gguf
from edgellm.source.gguf_model import references
from edgellm.source.matching import listed
from edgellm.source.model import ModelSource
from edgellm.tensors import TensorRef, transposed

ARCHITECTURE = "general.architecture"
TYPE = "general.type"
ADAPTER_TYPE = "adapter.type"
ALPHA = "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"
MADE_FROM = "edgellm.adapter.sha256"
"""Where edgellm wrote the file: the digest of the adapter that it is in another form."""

PROMPT_PREFIX = "adapter.lora.prompt_prefix"

A, B = ".lora_a", ".lora_b"
NORM = "_norm.weight"
"""llama.cpp's converter writes whole norms under such names, and its loader passes them over."""

NO_PRODUCTS = (NORM, "shortconv.conv.weight", "ssm_conv1d.weight")
"""Ends of the roles of what may be a matrix and is multiplied value by value."""

EMBEDDING, HEAD, POSITIONS = "token_embd.weight", "output.weight", "position_embd.weight"
BASE = "general.base_model.0."


def open_gguf_adapter(path: Path) -> Adapter:
    """The LoRA adapter in a GGUF file; its values are looked at once, since NaN spreads over rows.

    ``parts`` are named as in the file (``lora_a``, ``lora_b``), with rows as llama.cpp stores them:
    ``in_checkpoint_terms`` turns them round. Raises ``SourceError`` for a damaged file and
    ``AdapterError`` for a model, a control vector, an activated LoRA, half a pair, NaN or Inf, and
    factors that do not fit each other.
    """
    stored = read_gguf(path)
    metadata = stored.metadata
    _check_kind(path, metadata)
    alpha = metadata.get(ALPHA, 0.0)
    if not isinstance(alpha, float | int) or not math.isfinite(alpha):
        raise AdapterError(f"{path}: {ALPHA} is {alpha}: the file is damaged, make it anew")
    parts, replaced = _paired(path, references(stored))
    ranks = {name: _rank(path, name, pair) for name, pair in parts.items()}
    for pair in (*parts.values(), replaced):
        for ref in pair.values():
            check_values(path, ref)
    notes = []
    if not alpha:
        notes.append(f"{path.name} states no alpha: its products are added as they are, scale 1")
    if prefix := metadata.get(PROMPT_PREFIX):
        notes.append(f"{path.name} was trained for prompts that begin with {prefix!r}")
    return Adapter(
        name=path.stem,
        path=path,
        kind="lora",
        config={
            "peft_type": "LORA",
            "r": Counter(ranks.values()).most_common(1)[0][0],
            "lora_alpha": float(alpha),
            ARCHITECTURE: str(metadata.get(ARCHITECTURE, "")),
        },
        made_from=str(metadata.get(MADE_FROM, "")),
        parts={name: dict(pair) for name, pair in parts.items()},
        files=stored.files,
        naming="gguf",
        replaced=replaced,
        base_name=_base_name(stored),
        base_revision=str(metadata.get(f"{BASE}version", "")),
        notes=tuple(notes),
    )


def in_checkpoint_terms(adapter: Adapter, source: ModelSource) -> Adapter:
    """A GGUF adapter as PEFT would have stored it for ``source``: names, order of rows, config.

    Ranks and alphas of single weights are patterns, so that LoRA's own rule gives the scale that
    llama.cpp uses (alpha by rank, 1 where no alpha is stated). Raises ``AdapterError`` for another
    architecture and for names that the base does not have.
    """
    family, decoder = source.family, source.decoder
    check_architecture(adapter, family.gguf_layout.arch, source.name)
    rows = {
        name_in_file(row.role, decoder, family.gguf_layout): row
        for row in family.tensors(decoder)
        if row.role in source.tensors
    }
    unknown = [name for name in (*adapter.parts, *adapter.replaced) if name not in rows]
    if unknown:
        raise AdapterError(_not_there(adapter, unknown, source.name))
    parts: dict[str, Parts] = {}
    ranks: dict[str, int] = {}
    for role, pair in adapter.parts.items():
        row = rows[role]
        parts[row.source] = _as_peft(pair, row, source)
        ranks[row.source.removesuffix(".weight")] = pair["lora_b"].shape[-1]
    alpha = adapter.config["lora_alpha"]
    config = {
        "peft_type": "LORA",
        "r": adapter.config["r"],
        "lora_alpha": alpha or adapter.config["r"],
        "rank_pattern": ranks,
        "alpha_pattern": {} if alpha else dict(ranks),
    }
    replaced = {
        rows[role].source: as_checkpoint_stores(ref, rows[role], decoder, family.gguf_layout)
        for role, ref in adapter.replaced.items()
    }
    return replace(adapter, config=config, parts=parts, replaced=replaced, naming="hf")


def check_architecture(adapter: Adapter, architecture: str, model: str) -> None:
    """Raise ``AdapterError`` where a GGUF adapter was made for another ``general.architecture``."""
    made_for = adapter.config[ARCHITECTURE]
    if made_for != architecture:
        raise AdapterError(
            f"{adapter.path} was made for the architecture {made_for!r}, and {model} is "
            f"{architecture!r}: name the base that it was trained on"
        )


def check_fits(adapter: Adapter, base: GgufFile) -> None:
    """Raise ``AdapterError`` unless llama.cpp applies all of a GGUF adapter to the model ``base``.

    Right for every file that llama.cpp runs, but that of graphs which pass adapters over it knows
    those of our families alone.
    """
    name, tensors = base.path.name, base.tensors
    check_architecture(adapter, str(base.metadata.get(ARCHITECTURE, "")), name)
    if adapter.replaced:
        raise AdapterError(
            f"{adapter.path} holds whole norms ({listed(list(adapter.replaced))}), which llama.cpp "
            "passes over in silence: merge the adapter into the weights instead"
        )
    over = passed_over(str(base.metadata.get(ARCHITECTURE, "")))
    unknown = [role for role in adapter.parts if role not in tensors]
    if unknown:
        raise AdapterError(_not_there(adapter, unknown, name))
    for role, pair in adapter.parts.items():
        a, b, shape = pair["lora_a"].shape, pair["lora_b"].shape, tensors[role].shape
        if role == EMBEDDING and HEAD not in tensors:
            raise AdapterError(
                f"{adapter.path} changes {role}, which {name} uses both as embedding and as head: "
                "llama.cpp stops the whole process over it; merge the adapter instead"
            )
        if role.endswith(SHARED_GATE):
            shape = (1, shape[-1])  # which files have as a vector
        no_product = role == POSITIONS or role.endswith(NO_PRODUCTS)
        if len(shape) != 2 or no_product or role.split(".")[-2] in over:
            raise AdapterError(
                f"{adapter.path} changes {role}, which llama.cpp adds no product to: merge the "
                "adapter into the weights instead"
            )
        changed = (a[0], b[0]) if role == EMBEDDING else (b[0], a[1])
        if changed != shape:
            raise AdapterError(
                f"{adapter.path} changes {role} as {list(changed)}, and {name} has "
                f"{list(shape)}: it was trained on another model; name its base"
            )


def _not_there(adapter: Adapter, names: list[str], model: str) -> str:
    return (
        f"{adapter.path} changes {listed(names)}, which {model} does not have: it was made for "
        "another base; name the right one"
    )


def _as_peft(pair: Parts, row: TensorRow, source: ModelSource) -> Parts:
    """The pair under PEFT's names, rows back in the order of the checkpoint."""
    a, b = pair["lora_a"], pair["lora_b"]
    if row.kind == "embedding":
        # llama.cpp looks rows of A up by token, so it is stored [vocabulary, rank].
        return {"lora_embedding_A": transposed(a), "lora_embedding_B": b}
    rows = as_checkpoint_stores(b, row, source.decoder, source.family.gguf_layout)
    return {"lora_A": a, "lora_B": as_checkpoint_has(rows, row)}


def _check_kind(path: Path, metadata: dict[str, Any]) -> None:
    kind = metadata.get(TYPE, "model")
    if metadata.get(ARCHITECTURE) == "controlvector":
        raise AdapterError(
            f"{path} is a control vector, which is added to activations and changes no weight: "
            "llama.cpp applies it with --control-vector, edgellm takes LoRA adapters"
        )
    if kind != "adapter":
        raise AdapterError(
            f"{path} is a GGUF {kind}, not an adapter ({TYPE} is {kind!r}): give a LoRA adapter, "
            "in GGUF or a PEFT folder"
        )
    if metadata.get(ADAPTER_TYPE) != "lora":
        raise AdapterError(
            f"{path} is an adapter of the type {metadata.get(ADAPTER_TYPE)!r}, and only 'lora' is "
            "known: give the PEFT folder that it was made from"
        )
    if metadata.get(INVOCATION):
        raise AdapterError(
            f"{path} is an activated LoRA: it works from its invocation tokens on, and no change "
            "of the weights does the same. Run it with llama.cpp's server, or train a plain LoRA"
        )


def _paired(
    path: Path, refs: dict[str, TensorRef]
) -> tuple[dict[str, dict[str, TensorRef]], dict[str, TensorRef]]:
    """The factors by the weight that they change, and the whole norms beside them."""
    parts: dict[str, dict[str, TensorRef]] = {}
    replaced: dict[str, TensorRef] = {}
    for name, ref in refs.items():
        if name.endswith((A, B)):
            parts.setdefault(name[: -len(A)], {})[name[-len(A) + 1 :]] = ref
        elif name.endswith(NORM):
            replaced[name] = ref
        else:
            raise AdapterError(
                f"{path} holds the tensor {name}, which is neither half of a LoRA pair "
                f"(NAME{A}, NAME{B}) nor a norm: it is no adapter that llama.cpp loads either"
            )
    lone = [next(iter(pair.values())).name for pair in parts.values() if len(pair) == 1]
    if lone:
        raise AdapterError(
            f"{path} holds {listed(lone)} without the other half of the pair: it is damaged, make "
            "it anew from the PEFT folder"
        )
    if not parts:
        raise AdapterError(f"{path} holds no pair of LoRA factors: there is nothing to apply")
    return parts, replaced


def _rank(path: Path, name: str, pair: dict[str, TensorRef]) -> int:
    a, b = pair["lora_a"].shape, pair["lora_b"].shape
    if len(a) != 2 or len(b) != 2:
        raise AdapterError(
            f"{path}: {name} has factors of shape {list(a)} and {list(b)}, and of matrices only "
            "they are understood: adapters of stacked experts are not converted"
        )
    rank = a[1] if name == EMBEDDING else a[0]
    if rank != b[1]:
        raise AdapterError(
            f"{path}: {name} has factors of shape {list(a)} and {list(b)}, whose ranks differ: it "
            "is damaged, make it anew from the PEFT folder"
        )
    return b[1]


def _base_name(stored: GgufFile) -> str:
    """What it was trained on: the Hub's id where its address is stated, else the name."""
    url = str(stored.metadata.get(f"{BASE}repo_url", ""))
    if url.startswith(HUB_URL):
        return url.removeprefix(HUB_URL).strip("/")
    return str(stored.metadata.get(f"{BASE}name", ""))
