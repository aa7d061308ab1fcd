"""What is inside a model: an artifact, or a GGUF, ONNX or safetensors model from anywhere.

Headers are read, weights are not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import msgspec

from edgellm.artifact import Artifact, open_artifact
from edgellm.errors import SourceError
from edgellm.json_file import read_json
from edgellm.lora.checkpoint_weights import text_config
from edgellm.manifest import MANIFEST, Manifest
from edgellm.profiling.matrices import (
    EXPERTS,
    share_of_config,
    share_of_gguf,
    share_of_model,
)
from edgellm.source.pickles import PICKLES, refuse_pickle

LONGEST_VALUE = 200
"""Characters of a metadata value that are kept; a vocabulary or a chat template is longer."""


class InspectedTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A stored tensor; ``shape`` is ``[out, in]`` for a linear weight, ``grid`` its stored type."""

    name: str
    shape: tuple[int, ...]
    grid: str
    nbytes: int
    note: str = ""


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What ``inspect`` shows.

    ``kind``: ``artifact``, ``gguf``, ``onnx`` or ``safetensors``. ``output_bytes``: all its files.
    ``bits_per_weight`` counts a tied tensor once; None where codes are packed and their number
    cannot be known (a plain ONNX file). ``grid_bytes``: bytes of tensors by stored type.
    ``weights``: how many there are, ``active_weights`` of these without the experts that a token
    does not pass; None where ``bits_per_weight`` is, or there are no experts.
    """

    path: Path
    kind: str
    output_bytes: int
    bits_per_weight: float | None
    grid_bytes: dict[str, int]
    metadata: dict[str, Any]
    tensors: tuple[InspectedTensor, ...]
    notes: tuple[str, ...] = ()
    manifest: Manifest | None = None
    weights: int | None = None
    active_weights: int | None = None


def inspect(path: str | PathLike[str]) -> Inspection:
    """What is at ``path``, a file or a folder.

    Raises ``SourceError`` for something that is no model, is damaged, or is a pickle.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(f"{path} does not exist: give an artifact, a folder or a model file")
    if path.is_dir():
        return _inspect_folder(path)
    if path.suffix in PICKLES:
        refuse_pickle(path)
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return _inspect_gguf(path)
    readers: dict[str, Callable[[Path], Inspection]] = {
        ".onnx": _inspect_onnx,
        ".safetensors": lambda file: _inspect_safetensors(file, [file]),
    }
    if path.suffix not in readers:
        raise SourceError(
            f"{path} is not a model that can be shown (it starts with {start!r}): give an artifact "
            "folder, a .gguf, .onnx or .safetensors file, or a folder of safetensors"
        )
    return readers[path.suffix](path)


def _inspect_folder(path: Path) -> Inspection:
    if (path / MANIFEST).exists():
        return _inspect_artifact(open_artifact(path))
    if shards := sorted(path.glob("*.safetensors")):
        return _inspect_safetensors(path, shards)
    models = [*path.glob("*.gguf"), *path.glob("*.onnx")]
    if len(models) == 1:
        return inspect(models[0])
    found = ", ".join(model.name for model in models) or "none"
    raise SourceError(
        f"{path} has no {MANIFEST} and no safetensors (models in it: {found}): name one file"
    )


def _inspect_artifact(artifact: Artifact) -> Inspection:
    assert artifact.manifest is not None
    made = artifact.manifest.artifact
    grid_bytes: Counter[str] = Counter()
    weights, active, share = 0, 0.0, share_of_model(made.model)
    counted: set[tuple[tuple[str, int, int], ...]] = set()
    beside = {adapter.file for adapter in made.kept_adapters}
    for tensor in made.tensors:
        if tensor.arrays not in counted and tensor.arrays[0][0] not in beside:
            counted.add(tensor.arrays)
            grid_bytes[tensor.grid] += tensor.nbytes
            weights += math.prod(tensor.shape)
            active += math.prod(tensor.shape) * (share if EXPERTS.search(tensor.role) else 1.0)
    return Inspection(
        path=artifact.path,
        kind="artifact",
        output_bytes=sum(file.nbytes for file in made.files),
        bits_per_weight=8 * grid_bytes.total() / weights if weights else None,
        grid_bytes=dict(grid_bytes.most_common()),
        metadata={
            "container": made.container,
            "main_file": made.main_file,
            **msgspec.to_builtins(made.model),  # without what is unset
            **({} if made.encoder is None else msgspec.structs.asdict(made.encoder)),
            **({} if made.seq2seq is None else msgspec.structs.asdict(made.seq2seq)),
        },
        tensors=tuple(
            InspectedTensor(
                name=tensor.name,
                shape=tensor.shape,
                grid=tensor.grid,
                nbytes=tensor.nbytes,
                note=tensor.note,
            )
            for tensor in made.tensors
        ),
        notes=made.notes,
        manifest=artifact.manifest,
        weights=weights,
        active_weights=round(active) if share < 1 else None,
    )


def _inspect_safetensors(path: Path, shards: list[Path]) -> Inspection:
    from edgellm.source.safetensors_file import read_safetensors

    headers = [read_safetensors(shard) for shard in shards]
    metadata: dict[str, Any] = {}
    for config in (path / "config.json", path / "adapter_config.json"):
        if config.exists():
            metadata.update(read_json(config))
    share = share_of_config(text_config(metadata))
    for header in headers:
        metadata.update(header.metadata)
    return _inspection(
        path,
        "safetensors",
        files=shards,
        share=share,
        metadata=metadata,
        tensors=[
            InspectedTensor(
                name=tensor.name,
                shape=tensor.shape,
                grid=tensor.dtype.lower(),
                nbytes=tensor.nbytes,
            )
            for header in headers
            for tensor in header.tensors.values()
        ],
    )


def _inspect_gguf(path: Path) -> Inspection:
    from edgellm.source.gguf_file import read_gguf

    stored = read_gguf(path)
    return _inspection(
        path,
        "gguf",
        files=stored.files,
        share=share_of_gguf(stored.metadata),
        metadata=stored.metadata,
        tensors=[
            InspectedTensor(
                name=tensor.name, shape=tensor.shape, grid=tensor.dtype, nbytes=tensor.nbytes
            )
            for tensor in stored.tensors.values()
        ],
    )


def _inspect_onnx(path: Path) -> Inspection:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise SourceError(f"{path} is not an ONNX model, or cut short: {error}") from error
    graph = model.graph
    locations: set[str] = set()
    tensors, places = [], set()
    for initializer in graph.initializer:
        external = {entry.key: entry.value for entry in initializer.external_data}
        dtype = onnx.TensorProto.DataType.Name(initializer.data_type).lower()
        nbytes, note = _onnx_bytes(initializer.data_type, math.prod(initializer.dims)), ""
        if external:
            location, length = external.get("location", ""), external.get("length", str(nbytes))
            if not location or not length.isdecimal():
                raise SourceError(
                    f"{path}: the place of tensor {initializer.name} is {external}, which is none: "
                    "the file is damaged"
                )
            locations.add(location)
            place = (location, external.get("offset", "0"))
            note = "shares its bytes with another tensor" if place in places else ""
            nbytes = 0 if note else int(length)
            places.add(place)
        tensors.append(
            InspectedTensor(
                name=initializer.name,
                shape=tuple(initializer.dims),
                grid=dtype,
                nbytes=nbytes,
                note=note,
            )
        )
    missing = sorted(name for name in locations if not (path.parent / name).is_file())
    opsets = {opset.domain or "ai.onnx": opset.version for opset in model.opset_import}
    operators = Counter(node.op_type for node in graph.node)
    found = _inspection(
        path,
        "onnx",
        files=[path, *(path.parent / name for name in locations.difference(missing))],
        metadata={
            "producer": f"{model.producer_name} {model.producer_version}".strip(),
            "ir_version": model.ir_version,
            "opsets": opsets,
            "operators": dict(operators.most_common()),
            "inputs": [value.name for value in graph.input],
            "outputs": [value.name for value in graph.output],
            **{entry.key: entry.value for entry in model.metadata_props},
        },
        tensors=tensors,
        notes=tuple(f"its data file {name} is missing" for name in missing),
    )
    return msgspec.structs.replace(found, bits_per_weight=None, weights=None)


def _onnx_bytes(data_type: int, size: int) -> int:
    import onnx

    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two to a byte
        return (size + 1) // 2
    if data_type == onnx.TensorProto.STRING:
        return 0
    return int(onnx.helper.tensor_dtype_to_np_dtype(data_type).itemsize) * size


def _inspection(
    path: Path,
    kind: str,
    *,
    files: Iterable[Path],
    metadata: dict[str, Any],
    tensors: list[InspectedTensor],
    notes: tuple[str, ...] = (),
    share: float = 1.0,
) -> Inspection:
    """``share``: how much of a layer's experts each token passes."""
    grid_bytes: Counter[str] = Counter()
    for tensor in tensors:
        grid_bytes[tensor.grid] += tensor.nbytes
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    of_experts = sum(math.prod(each.shape) for each in tensors if EXPERTS.search(each.name))
    return Inspection(
        path=path,
        kind=kind,
        output_bytes=sum(file.stat().st_size for file in files),
        bits_per_weight=8 * grid_bytes.total() / weights if weights else None,
        grid_bytes=dict(grid_bytes.most_common()),
        metadata={name: shortened(value) for name, value in metadata.items()},
        tensors=tuple(tensors),
        notes=notes,
        weights=weights,
        active_weights=round(weights - (1 - share) * of_experts) if share < 1 else None,
    )


def shortened(value: Any) -> Any:
    """``value`` as it is when short, else its beginning and how much there is."""
    if isinstance(value, (list, tuple)) and len(value) > 16:
        return f"[{', '.join(map(str, value[:3]))}, ...] ({len(value)} values)"
    if isinstance(value, str) and len(value) > LONGEST_VALUE:
        return f"{value[:LONGEST_VALUE]}... ({len(value)} characters)"
    if isinstance(value, (str, int, float, bool, dict, list, tuple)) or value is None:
        return value
    return shortened(value.tolist()) if hasattr(value, "tolist") else str(value)
