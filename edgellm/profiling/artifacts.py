"""What is profiled: an artifact's name, digest, size, and what one token reads of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edgellm.architectures.decoder import Feature
from edgellm.artifact import GENAI_CONFIG, PART_SUFFIXES, Artifact
from edgellm.digests import combined_sha256, file_sha256
from edgellm.json_file import read_json
from edgellm.lora.checkpoint_weights import text_config
from edgellm.manifest import Manifest, ModelFacts
from edgellm.profiling.document import ArtifactFacts
from edgellm.profiling.matrices import (
    Counts,
    counted,
    main_grid,
    of_checkpoint,
    of_gguf,
    of_manifest,
)


def artifact_facts(artifact: Artifact) -> ArtifactFacts:
    """The facts of ``artifact``, from its manifest or, of plain files, from their headers.

    Plain files are read whole once, for their digest. Raises ``SourceError`` for damaged ones.
    """
    if artifact.manifest is not None:
        return _of_manifest(artifact, artifact.manifest)
    readers = {"gguf": _of_gguf, "hf": _of_checkpoint, "genai": _of_genai}
    return readers[artifact.container](artifact)


def _of_manifest(artifact: Artifact, manifest: Manifest) -> ArtifactFacts:
    made = manifest.artifact
    matrices = of_manifest(made)
    model = made.model
    quality = manifest.measured.get("quality")
    kld = quality.get("kld_mean") if isinstance(quality, Mapping) else None
    limited = any(window is not None for window in model.windows)
    facts = ArtifactFacts(
        name=_name(artifact),
        container=artifact.container,
        quant=made.recipe.get("quant") or main_grid(matrices),
        sha256=manifest.sha256,
        model_sha256=made.base.sha256,
        size_bytes=sum(file.nbytes for file in made.files),
        kv_values=_kept_values(artifact, model),
        kv_windows=model.windows if limited else (),
        kld_mean=kld,
    )
    return _with(facts, counted(matrices))


def _kept_values(artifact: Artifact, model: ModelFacts) -> int | None:
    """Numbers that are kept of a token; None where nobody knows.

    With latent attention llama.cpp's graphs differ; our own keep keys that are values too, and
    transformers (5.23) the same numbers in two parts.
    """
    if Feature.LATENT_ATTENTION not in model.features:
        layers = model.attention_layer_count
        layers = layers if isinstance(layers, int) else model.layer_count
        return _kv_values(layers, model.kv_head_count, model.head_dim)
    if artifact.container == "gguf":
        from edgellm.source.gguf_file import read_gguf_model

        return _kept_by_llamacpp(read_gguf_model(artifact.main).metadata)
    return model.layer_count * model.kv_head_count * model.head_dim or None


def _kept_by_llamacpp(metadata: dict[str, Any]) -> int:
    from edgellm.quant.ggml_types import NAMED
    from edgellm.runtimes.llamacpp_memory import kv_token_bytes

    return sum(kv_token_bytes(metadata, NAMED["f16"])) // 2


def _of_gguf(artifact: Artifact) -> ArtifactFacts:
    from edgellm.export.gguf_mixture import MIXTURES
    from edgellm.source.gguf_file import read_gguf_model

    stored = read_gguf_model(artifact.main)
    matrices = of_gguf(stored)
    names: dict[Any, str] = {mixture.file_type: name for name, mixture in MIXTURES.items()}
    values = 0
    if "general.architecture" in stored.metadata:
        values = _kept_by_llamacpp(stored.metadata)
    facts = ArtifactFacts(
        name=_name(artifact),
        container="gguf",
        quant=names.get(stored.metadata.get("general.file_type")) or main_grid(matrices),
        sha256=_digest(stored.files),
        size_bytes=_size(stored.files),
        kv_values=values or None,
    )
    return _with(facts, counted(matrices))


def _of_checkpoint(artifact: Artifact) -> ArtifactFacts:
    from edgellm.source.checkpoint import read_checkpoint
    from edgellm.source.quantized import method_of

    config = read_json(artifact.path / "config.json")
    checkpoint = read_checkpoint(artifact.path)
    matrices = of_checkpoint(checkpoint, config, str(artifact.path))
    text = text_config(config)
    settings = config.get("quantization") or config.get("quantization_config")
    facts = ArtifactFacts(
        name=_name(artifact),
        container="hf",
        quant=main_grid(matrices) or (method_of(settings) if settings else ""),
        sha256=_digest(checkpoint.files),
        size_bytes=_size({*_parts(artifact.path), *checkpoint.files}),
        kv_values=_kv_values_of_config(text),
    )
    return _with(facts, counted(matrices))


def _of_genai(artifact: Artifact) -> ArtifactFacts:
    from edgellm.profiling.onnx_matrices import data_files, of_graph, read_graph

    model = read_json(artifact.path / GENAI_CONFIG)["model"]
    graph = read_graph(artifact.main)
    matrices = of_graph(graph, int(model.get("vocab_size", 0)))
    beside = (artifact.main.parent / name for name in data_files(graph))
    files = {artifact.main, *(file for file in beside if file.is_file())}
    decoder = model["decoder"]
    facts = ArtifactFacts(
        name=_name(artifact),
        container="genai",
        quant=main_grid(matrices),
        sha256=_digest(files),
        size_bytes=_size({*_parts(artifact.path), *files}),
        kv_values=_kv_values(
            attention_layers(decoder, decoder.get("num_hidden_layers")),
            decoder.get("num_key_value_heads"),
            decoder.get("head_size"),
        ),
    )
    return _with(facts, counted(matrices))


def _name(artifact: Artifact) -> str:
    return artifact.path.resolve().name


def _with(facts: ArtifactFacts, counts: Counts) -> ArtifactFacts:
    return msgspec.structs.replace(facts, **dataclasses.asdict(counts))


def _kv_values_of_config(config: Mapping[str, Any]) -> int | None:
    def said(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    if "kv_lora_rank" in config:  # latent keys and values (MLA), which are counted in other ways
        return None
    heads, width = said("num_attention_heads", "n_head"), said("hidden_size", "n_embd")
    known = isinstance(heads, int) and isinstance(width, int) and heads > 0
    head_dim = said("head_dim") or (width // heads if known else None)
    kv_heads = said("num_key_value_heads") or heads
    layers = attention_layers(config, said("num_hidden_layers", "n_layer"))
    return _kv_values(layers, kv_heads, head_dim)


def attention_layers(config: Mapping[str, Any], layers: Any) -> Any:
    """How many of ``layers`` have keys and values, by ``layer_types`` or ``full_attn_idxs``."""
    types, listed = config.get("layer_types"), config.get("full_attn_idxs")
    if isinstance(types, Sequence):
        return sum(
            str(kind).endswith("_attention") and kind != "linear_attention" for kind in types
        )
    return len(listed) if isinstance(listed, Sequence) else layers


def _kv_values(layers: Any, kv_heads: Any, head_dim: Any) -> int | None:
    """Numbers in the keys and values of one token; None where a config does not say."""
    numbers = (layers, kv_heads, head_dim)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return 2 * int(layers) * int(kv_heads) * int(head_dim)


def _parts(folder: Path) -> list[Path]:
    """Files of a folder that a reader may take for a part of a model."""
    return [file for file in folder.iterdir() if file.is_file() and file.suffix in PART_SUFFIXES]


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _digest(files: Iterable[Path]) -> str:
    return combined_sha256({file.name: file_sha256(file) for file in files})
