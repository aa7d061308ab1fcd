"""The matrices of a model as its container stores them, and what one token reads of them.

Headers are read, weights are not.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgellm.errors import UnsupportedModel
from edgellm.lora.checkpoint_weights import text_config
from edgellm.manifest import Digested, ExpertFacts, ModelFacts
from edgellm.quant.llm_int8 import is_beside
from edgellm.source.checkpoint import Checkpoint
from edgellm.source.gguf_file import GgufFile
from edgellm.source.quantized import dequantized

Kind = Literal["table", "head", "layer"]

EMBEDDING = re.compile(
    r"(.*\.)?(token_embd|embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight"
)
HEAD = re.compile(r"(output|(.*\.)?(lm_head|embed_out))\.weight")
OTHER_TABLE = re.compile(
    r"(.*\.)?(position_embd|wpe|embed_positions|per_layer_token_embd|embed_tokens_per_layer)\.weight"
)
"""Names in ggml's and edgellm's spelling, and in those of checkpoints."""

EXPERTS = re.compile(r"_exps\.|\.experts\.|\.block_sparse_moe\.(in|out)put_linear\.")
"""In names of matrices of which a token needs a few (mixture of experts); Granite's come last."""

USED_EXPERTS = "num_experts_per_tok"

COUNT_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True, slots=True)
class Matrix:
    """Numbers of one matrix, the bytes that they take, and how a token reads it.

    ``kind``: a row of a ``table``, the whole of a ``head`` or ``layer``. A head that is the
    embedding as well is a ``head``. ``share``: how much of it a token needs, 1 but for experts.
    """

    kind: Kind
    grid: str
    weights: int
    nbytes: int
    rows: int
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Counts:
    """What the matrices of a model come to; see ``document.ArtifactFacts``."""

    weights: int | None = None
    weight_bytes: int | None = None
    bytes_per_token: int | None = None
    prompt_weights: int | None = None


def counted(matrices: Sequence[Matrix]) -> Counts:
    """The sums. Without a head nobody knows what a token reads, and without a matrix nothing."""
    if not matrices:
        return Counts()
    weights = sum(matrix.weights for matrix in matrices)
    weight_bytes = sum(matrix.nbytes for matrix in matrices)
    if not any(matrix.kind == "head" for matrix in matrices):
        return Counts(weights, weight_bytes)
    read = sum(
        matrix.nbytes / matrix.rows if matrix.kind == "table" else matrix.nbytes * matrix.share
        for matrix in matrices
    )
    prompt = sum(matrix.weights * matrix.share for matrix in matrices if matrix.kind == "layer")
    return Counts(weights, weight_bytes, round(read), round(prompt))


def main_grid(matrices: Iterable[Matrix]) -> str:
    """The grid of most of the weights; empty without any."""
    weights: Counter[str] = Counter()
    for matrix in matrices:
        weights[matrix.grid] += matrix.weights
    return max(weights, key=lambda grid: weights[grid], default="")


def of_manifest(made: Digested) -> list[Matrix]:
    """From the tensors of a manifest: a tied one once, adapters beside the model not at all."""
    beside = {adapter.file for adapter in made.kept_adapters}
    stored = {tensor.arrays: tensor for tensor in made.tensors if tensor.arrays[0][0] not in beside}
    tied = not any(HEAD.fullmatch(tensor.role) for tensor in stored.values())
    share = share_of_model(made.model)
    return [
        Matrix(
            kind=_kind(tensor.role, tied=tied),
            grid=tensor.grid,
            # Columns that are floats beside codes have codes too, and count once.
            weights=0 if is_beside(tensor.role) else math.prod(tensor.shape),
            nbytes=tensor.nbytes,
            rows=tensor.shape[0],
            share=share if EXPERTS.search(tensor.role) else 1.0,
        )
        for tensor in stored.values()
        if is_beside(tensor.role) or _is_matrix(tensor.role, tensor.shape)
    ]


def of_gguf(stored: GgufFile) -> list[Matrix]:
    """From the tensor table; llama.cpp takes the embedding for a head that is not there."""
    share = share_of_gguf(stored.metadata)
    tied = not any(HEAD.fullmatch(name) for name in stored.tensors)
    return [
        Matrix(
            kind=_kind(name, tied=tied),
            grid=tensor.dtype,
            weights=math.prod(tensor.shape),
            nbytes=tensor.nbytes,
            rows=tensor.shape[0],
            share=share if EXPERTS.search(name) else 1.0,
        )
        for name, tensor in stored.tensors.items()
        if _is_matrix(name, tensor.shape)
    ]


def of_checkpoint(checkpoint: Checkpoint, config: Mapping[str, Any], where: str) -> list[Matrix]:
    """From the headers of a Hugging Face folder, quantized or not.

    Empty where it is quantized in a way that edgellm does not read.
    """
    settings = config.get("quantization") or config.get("quantization_config")
    try:
        tensors = dequantized(checkpoint.raw, settings, where) if settings else checkpoint.tensors
    except UnsupportedModel:
        return []
    text = text_config(config)
    share = share_of_config(text)
    heads = [name for name in tensors if HEAD.fullmatch(name)]
    # A head that the config ties is the embedding, though it may be stored as well.
    tied = not heads or bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings")))
    embedding = any(EMBEDDING.fullmatch(name) for name in tensors)
    nbytes = _stored_bytes(checkpoint, tensors)
    return [
        Matrix(
            kind=_kind(name, tied=tied),
            grid=ref.dtype.lower(),
            weights=ref.size,
            nbytes=nbytes[name],
            rows=ref.shape[0],
            share=share if EXPERTS.search(name) else 1.0,
        )
        for name, ref in tensors.items()
        if _is_matrix(name, ref.shape) and not (tied and embedding and name in heads)
    ]


def _stored_bytes(checkpoint: Checkpoint, names: Iterable[str]) -> Counter[str]:
    """What each of the tensors ``names`` takes: codes, scales and all that belongs to them."""
    owners = {name.removesuffix(".weight"): name for name in names}
    found: Counter[str] = Counter()
    for stored, tensor in checkpoint.raw.items():
        module = stored
        while module and module not in owners:
            module = module.rpartition(".")[0]
        if module and stored != f"{module}.bias":
            found[owners[module]] += tensor.stored.nbytes
    return found


def _kind(name: str, *, tied: bool) -> Kind:
    if HEAD.fullmatch(name):
        return "head"
    if EMBEDDING.fullmatch(name):
        return "head" if tied else "table"
    return "table" if OTHER_TABLE.fullmatch(name) else "layer"


def _is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether it is one of weights: ONNX has biases as columns and tables of angles."""
    return len(shape) > 1 and min(shape) > 1 and not name.startswith("rope.")


def share_of_model(model: ModelFacts) -> float:
    """How much of a layer's experts each token passes, as a manifest says; 1 without experts."""
    experts = model.experts
    return experts.used / experts.count if isinstance(experts, ExpertFacts) else 1.0


def share_of_gguf(metadata: Mapping[str, Any]) -> float:
    """The same of a GGUF file."""
    arch = metadata.get("general.architecture", "")
    used, count = (metadata.get(f"{arch}.expert_{key}") for key in ("used_count", "count"))
    return _share(used, count)


def share_of_config(config: Mapping[str, Any]) -> float:
    """The same of a config."""
    facts = experts_of_config(config)
    return facts.used / facts.count if facts else 1.0


def experts_of_config(config: Mapping[str, Any]) -> ExpertFacts | None:
    """How many experts there are, and how many a token passes; None where it does not say."""
    count: Any = next((config[key] for key in COUNT_OF_EXPERTS if config.get(key)), None)
    used: Any = config.get(USED_EXPERTS)
    return ExpertFacts(count=count, used=used) if _are_counts(used, count) else None


def _share(used: Any, count: Any) -> float:
    return used / count if _are_counts(used, count) else 1.0


def _are_counts(used: Any, count: Any) -> bool:
    return isinstance(used, int) and isinstance(count, int) and 0 < used <= count
