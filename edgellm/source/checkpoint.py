"""Hugging Face folders: ``config.json``, safetensors in one or many shards, tokenizer files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from edgellm.architectures import family_of
from edgellm.architectures.config import Config
from edgellm.architectures.decoder import Decoder
from edgellm.architectures.family import Family
from edgellm.errors import SourceError, TensorError, UnsupportedModel, UnsupportedTokenizer
from edgellm.json_file import read_json
from edgellm.lora import lineage
from edgellm.manifest import MANIFEST
from edgellm.remote.finding import AUTO_MAP, OPTION, TOKENIZER, RemoteCode, find
from edgellm.source.matching import check_vocabulary, embedding_row, equal, head_row, listed, match
from edgellm.source.model import ModelSource
from edgellm.source.pickles import PICKLES, refuse_pickle
from edgellm.source.quantized import (
    as_checkpoint_turns,
    dequantized,
    method_of,
    note_on,
)
from edgellm.source.safetensors_file import READABLE, RawTensor, read_safetensors
from edgellm.source.stacks import unstacked
from edgellm.source.text_part import text_config, text_tensors
from edgellm.tensors import TensorRef, transposed
from edgellm.tokenization import Tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MLX_PREFIX = "model."
PROVENANCE_KEYS = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder by the names they are stored under, and the files they are in."""

    raw: dict[str, RawTensor]
    files: tuple[Path, ...]

    @property
    def tensors(self) -> dict[str, TensorRef]:
        """The same tensors as references, whatever their dtype."""
        return {name: tensor.ref() for name, tensor in self.raw.items()}


def open_folder(
    path: Path,
    *,
    ignore_config_keys: Collection[str] = (),
    context: int | None = None,
    quantized: bool = False,
    text_only: bool = False,
    trust_remote_code: bool = False,
) -> ModelSource:
    """The model in folder ``path``; headers and the tokenizer are read, weights are not.

    ``context``: the context length that it is wanted for, where the maths depends on it. Weights
    are read only where a head that should be tied is stored too, to compare the two.
    ``quantized``: take weights that are quantized already as the values that they stand for.
    ``text_only``: of a model that also sees, the language model. ``trust_remote_code``: Python of
    the model's own may be run, to compare with.
    Raises ``SourceError`` for what is missing or damaged, ``UnsupportedModel`` for what is not
    understood.
    """
    if not (path / "config.json").exists():
        _refuse_without_config(path)
    config = read_json(path / "config.json")
    if text_only:
        config = text_config(config, str(path))
    # Before the weights: an unknown family is the more useful thing to be told.
    family = family_of(config)
    checkpoint = read_checkpoint(path)
    settings = config.pop("quantization_config", None)
    settings = config.pop("quantization", None) or settings  # mlx-lm's, often without the other
    if settings:
        tensors = dequantized(checkpoint.raw, settings, str(path))
        if not quantized:
            _refuse_quantized(path, settings)
    else:
        tensors = checkpoint.tensors
        refuse_other_dtypes(path, tensors)
    left_out: tuple[str, ...] = ()
    if text_only:
        tensors, left_out = text_tensors(tensors, family)
        config["architectures"] = [family.architecture]
    reader = Config(
        config, ignore=ignore_config_keys, context=context, where=str(path / "config.json")
    )
    decoder = family.describe(reader)
    stored = _with_prefix(_from_mlx(tensors, family, decoder), family, decoder)
    stored, decoder, notes = _settle_head(stored, family, decoder)
    stored, guessing = _without_guessing(stored, family, decoder, config)
    stored = unstacked(
        stored, family.tensors(decoder), lambda ref: checkpoint.raw[ref.name].matrix(), str(path)
    )
    if settings:
        stored = as_checkpoint_turns(stored, family.tensors(decoder))
        notes = (note_on(stored, str(path)), *notes)
    tensors = match(
        family.tensors(decoder),
        stored,
        by="source",
        where=str(path),
        ignored=lambda name: name.endswith(family.ignored_tensors),
    )
    code = find(path)
    if code is not None and trust_remote_code:
        code.digests()  # what is not there is said before any work
    tokenizer = _tokenizer(path, code, trust_remote_code)
    notes += check_vocabulary(str(path), tokenizer.vocab_size, decoder.vocab_size)
    generation = path / "generation_config.json"
    return ModelSource(
        name=path.resolve().name,
        kind="hf",
        path=path,
        config={**config, "tie_word_embeddings": decoder.tied_head},
        family=family,
        decoder=decoder,
        tensors=tensors,
        tokenizer=tokenizer,
        weight_files=checkpoint.files,
        generation=read_json(generation) if generation.exists() else {},
        licence=licence_of(path / "README.md"),
        provenance={key: config[key] for key in PROVENANCE_KEYS if config.get(key)},
        notes=(
            *left_out,
            *guessing,
            *reader.notes,
            *_on_code(code, trust_remote_code, family),
            *notes,
        ),
        merged_before=lineage.from_folder(path),
        scaled_by=lineage.scaled_in_folder(path),
        code=code if trust_remote_code else None,
    )


def _without_guessing(
    stored: dict[str, TensorRef], family: Family, decoder: Decoder, config: dict[str, Any]
) -> tuple[dict[str, TensorRef], tuple[str, ...]]:
    """``stored`` without layers that guess further tokens, and what to say of them.

    The ``config`` then says that there are none.
    """
    key = family.guessing_layers
    count, first = config.get(key), len(decoder.layers)
    if not isinstance(count, int):
        return stored, ()
    layers = tuple(f"{family.base_prefix}layers.{first + n}." for n in range(count))
    kept = {name: ref for name, ref in stored.items() if not name.startswith(layers)}
    left = len(stored) - len(kept)
    config[key] = 0
    note = f"{left} tensors of {count} layers that guess further tokens ({key}) are left out"
    return kept, (note,) if left else ()


def _tokenizer(path: Path, code: RemoteCode | None, trusted: bool) -> Tokenizer:
    """The tokenizer of folder ``path``, by its own Python where it has one that is ``trusted``."""
    if code is None or TOKENIZER not in code.classes:
        return Tokenizer.from_hf_folder(path)
    if trusted:
        from edgellm.remote.tokenizing import trusted_tokenizer

        return trusted_tokenizer(path, code)
    try:
        return Tokenizer.from_hf_folder(path)
    except UnsupportedTokenizer as error:
        raise UnsupportedTokenizer(
            f"{error}. Python of the model's own has that class ({code.listed}), and was not run: "
            f"`edgellm convert {OPTION}` runs it, to find which tokenizer here gives its ids"
        ) from error


def _on_code(code: RemoteCode | None, trusted: bool, family: Family) -> tuple[str, ...]:
    """What may become of the Python that a folder brings; a manifest says what was loaded."""
    if code is None:
        return ()
    said = (
        f"may be run, as you trust it: {code.listed}"
        if trusted
        else f"was not run: {code.listed} ({OPTION} runs it, to compare with)"
    )
    return (
        f"Python of the model's own ({AUTO_MAP}) {said}; the network is not taken from it, it is "
        f"read as {family.architecture}",
    )


def read_checkpoint(path: Path) -> Checkpoint:
    """All tensors of the folder's safetensors files, headers checked.

    Raises ``SourceError`` for shards that are missing, damaged or outside the folder, for an index
    that does not agree with them, and for pickles.
    """
    if (path / INDEX).exists():
        return _sharded(path, read_json(path / INDEX))
    found = sorted(path.glob("*.safetensors"))
    single = path / SINGLE
    if single not in found:
        if not found:
            _refuse_without_weights(path)
        if len(found) > 1:
            raise SourceError(
                f"{path} holds {len(found)} safetensors files "
                f"({listed([file.name for file in found])}) and neither {SINGLE} nor {INDEX} to "
                "say which make the model: fetch the index"
            )
        single = found[0]
    header = read_safetensors(single)
    return Checkpoint({name: header.raw(name) for name in header.tensors}, (single,))


def _sharded(path: Path, index: Mapping[str, Any]) -> Checkpoint:
    where = path / INDEX
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{where} has no weight_map: fetch it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _plain_name(shard):
            raise SourceError(
                f"{where} places tensor {name} in {shard!r}, which is not the name of a "
                "safetensors file in this folder: the index is unsafe or damaged; fetch it again"
            )
    shards = sorted(set(weight_map.values()))
    absent = [shard for shard in shards if not (path / shard).exists()]
    if absent:
        raise SourceError(
            f"{path} lacks {len(absent)} of its {len(shards)} shards: {listed(absent)}; fetch them"
        )
    headers = {shard: read_safetensors(path / shard) for shard in shards}
    lost = [name for name, shard in weight_map.items() if name not in headers[shard].tensors]
    if lost:
        raise SourceError(
            f"{where} names {len(lost)} tensors that their shards do not hold: {listed(lost)}; "
            "index and shards belong to different models: fetch both again"
        )
    raw = {name: headers[shard].raw(name) for name, shard in weight_map.items()}
    # What a shard holds and the index does not name is shown as left over, if it matters.
    for header in headers.values():
        raw.update({name: header.raw(name) for name in header.tensors if name not in weight_map})
    return Checkpoint(raw, tuple(path / shard for shard in shards))


def _plain_name(shard: str) -> bool:
    """A file name alone, on any system; ``:`` would name a stream or a drive on Windows."""
    return (
        PurePosixPath(shard).name == shard == PureWindowsPath(shard).name
        and shard.endswith(".safetensors")
        and not any(character in shard for character in ":\0")
    )


def _with_prefix(
    stored: dict[str, TensorRef], family: Family, decoder: Decoder
) -> dict[str, TensorRef]:
    """Names with the family's prefix, which a model saved without its head lacks."""
    embedding, head = embedding_row(family, decoder).source, head_row(family, decoder).source
    bare = embedding.removeprefix(family.base_prefix)
    if embedding in stored or bare not in stored:
        return stored
    return {
        name if name == head else family.base_prefix + name: ref for name, ref in stored.items()
    }


def _from_mlx(
    stored: dict[str, TensorRef], family: Family, decoder: Decoder
) -> dict[str, TensorRef]:
    """Names and matrices as the family has them, where mlx-lm wrote a model of another prefix.

    Below ``model.``, which all of its models have, Conv1D's matrices are ``[out, in]``.
    """
    bare = embedding_row(family, decoder).source.removeprefix(family.base_prefix)
    if family.base_prefix == MLX_PREFIX or MLX_PREFIX + bare not in stored:
        return stored
    renamed = {
        family.base_prefix + name.removeprefix(MLX_PREFIX): ref for name, ref in stored.items()
    }
    for row in family.tensors(decoder):
        ref = renamed.get(row.source)
        if row.transposed and ref is not None and ref.dtype.upper() in READABLE:
            renamed[row.source] = transposed(ref)
    return renamed


def _settle_head(
    stored: dict[str, TensorRef], family: Family, decoder: Decoder
) -> tuple[dict[str, TensorRef], Decoder, tuple[str, ...]]:
    """One table where the config ties head and embedding, whichever of them is stored.

    Two that differ are kept apart, as transformers does (``PreTrainedModel.tie_weights``).
    """
    embedding, head = embedding_row(family, decoder).source, head_row(family, decoder).source
    if not decoder.tied_head or head not in stored:
        return stored, decoder, ()
    others = {name: ref for name, ref in stored.items() if name != head}
    if embedding not in stored:
        return {**others, embedding: stored[head]}, decoder, ()
    if equal(stored[embedding], stored[head]):
        return others, decoder, ()
    note = (
        f"the config ties the output head to the embedding, but {head} and {embedding} differ: "
        "both were kept, as transformers does"
    )
    return stored, replace(decoder, tied_head=False), (note,)


def _refuse_quantized(path: Path, settings: Any) -> None:
    raise UnsupportedModel(
        f"{path} is quantized already ({method_of(settings)}): `edgellm convert {path} --out DIR` "
        "keeps its codes where a grid holds them; in Python, open_source(..., quantized=True) "
        "takes it as the values that they stand for"
    )


def refuse_other_dtypes(path: Path, tensors: Mapping[str, TensorRef]) -> None:
    """Raise ``TensorError`` for weights of a type that is not read as floats."""
    readable = {dtype.lower() for dtype in READABLE}
    quantized = {
        name: ref.dtype
        for name, ref in tensors.items()
        if ref.dtype not in readable
        and not name.endswith((".bias", ".masked_bias", ".position_ids"))
    }
    if quantized:
        dtypes = ", ".join(sorted(set(quantized.values())))
        raise TensorError(
            f"{path} stores {len(quantized)} tensors as {dtypes} ({listed(quantized)}), and "
            f"weights are read from {', '.join(sorted(readable))}: it is quantized already; "
            "convert the model that it was made from"
        )


def _refuse_without_config(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        raise UnsupportedModel(
            f"{path} holds an adapter, not a model: name the model that it was trained on, and it "
            f"is merged on the way (edgellm convert BASE --adapter {path})"
        )
    _refuse_other_formats(path)
    raise SourceError(f"{path} has no config.json: give the folder that from_pretrained would load")


def _refuse_without_weights(path: Path) -> None:
    _refuse_other_formats(path)
    raise SourceError(f"{path} holds no weights: fetch its *.safetensors files")


def _refuse_other_formats(path: Path) -> None:
    """Say what to do about weights that are there in a form which is not read from a folder."""
    if (path / MANIFEST).exists():
        raise SourceError(
            f"{path} is an artifact, rounded already: convert the model that it was made from "
            f"(`edgellm inspect {path}` names it)"
        )
    files = sorted(file.name for file in path.iterdir() if file.is_file())
    ggufs = [file for file in files if file.endswith(".gguf")]
    if ggufs:
        raise SourceError(
            f"{path} holds GGUF files: give one by its name, such as {path / ggufs[0]}"
        )
    pickles = [file for file in files if file.endswith(PICKLES)]
    if pickles and not any(file.endswith(".safetensors") for file in files):
        refuse_pickle(path / pickles[0])


def licence_of(readme: Path) -> str:
    """``license`` in the front matter of a model card, or nothing."""
    try:
        text = readme.read_bytes()[: 1 << 16].decode(errors="replace")
    except OSError:
        return ""
    if not text.startswith("---"):
        return ""
    for line in text[3:].split("\n---", 1)[0].splitlines():
        key, _, value = line.partition(":")
        if key == "license":
            return value.strip().strip("'\"")
    return ""
