"""Artifact: what can be run at a path, opened and checked against its manifest."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from edgellm import verified
from edgellm.digests import file_sha256, ranges_sha256
from edgellm.errors import SourceError, UnsupportedTarget, VerificationError
from edgellm.json_file import read_json
from edgellm.manifest import MANIFEST, EncoderFacts, Manifest, Seq2SeqFacts, read_manifest

GENAI_CONFIG = "genai_config.json"
"""What a folder that onnxruntime-genai runs has, whoever made it."""

PART_SUFFIXES = (
    ".data", ".gguf", ".jinja", ".json", ".model", ".onnx", ".safetensors", ".spm",
)  # fmt: skip
"""Files that a reader of an artifact's folder may take for a part of it."""


class Artifact(msgspec.Struct, frozen=True, kw_only=True):
    """A model that can be run: a folder with a manifest, or a plain file from elsewhere.

    ``manifest`` is None for a plain file, which is then unverified. ``main`` is the file that the
    runtime opens.
    """

    path: Path
    main: Path
    container: str
    manifest: Manifest | None = None

    @property
    def compute(self) -> str | None:
        """What its graph computes in, ``f32`` or ``f16``; None where the runtime chooses."""
        if self.container != "onnx" or self.manifest is None:
            return None
        return str(self.manifest.artifact.recipe.get("compute") or "f32")

    @property
    def encoder(self) -> EncoderFacts | None:
        """What there is to know of an encoder; None for a model that generates text."""
        return None if self.manifest is None else self.manifest.artifact.encoder

    @property
    def seq2seq(self) -> Seq2SeqFacts | None:
        """What there is to know of an encoder with a decoder; None for others."""
        return None if self.manifest is None else self.manifest.artifact.seq2seq


def open_artifact(path: str | os.PathLike[str]) -> Artifact:
    """What can be run at ``path``: a folder with a manifest, or a Hugging Face folder, a folder of
    onnxruntime-genai or single GGUF file of others (unverified).

    The model file inside a folder with a manifest stands for the folder.

    Raises ``SourceError`` when there is nothing to run, or the manifest cannot be understood.
    """
    path = Path(path)
    if not path.exists():
        raise SourceError(
            f"{path} does not exist: give an artifact folder or a .gguf file (a model on the Hub "
            "is converted first: `edgellm convert`)"
        )
    if path.is_dir() and not (path / MANIFEST).exists():
        weights = sorted(path.glob("*.safetensors"))
        if weights and (path / "config.json").exists():
            return Artifact(path=path, main=weights[0], container="hf")
        if (path / GENAI_CONFIG).exists():
            return Artifact(path=path, main=_genai_graph(path), container="genai")
    if path.is_dir():
        manifest = read_manifest(path)
        main = path / manifest.artifact.main_file
        return Artifact(
            path=path, main=main, container=manifest.artifact.container, manifest=manifest
        )
    if _is_main_file(path):
        return open_artifact(path.parent)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if magic == b"GGUF":
        return Artifact(path=path, main=path, container="gguf")
    raise SourceError(
        f"{path} is not a GGUF file (it starts with {magic!r}): give an artifact folder or a .gguf "
        "file, or convert the model first with `edgellm convert`"
    )


def refuse_encoders(artifact: Artifact) -> None:
    """Raise ``UnsupportedTarget`` for what is no language model, and say how it is opened."""
    if artifact.encoder is not None:
        raise UnsupportedTarget(
            f"{artifact.path} is an encoder ({artifact.encoder.task}), which generates no text: "
            "open it with edgellm.open_encoder, or ask it with `edgellm run`"
        )
    if artifact.seq2seq is not None:
        raise UnsupportedTarget(
            f"{artifact.path} is an encoder with a decoder, which holds no conversation: open it "
            "with edgellm.open_seq2seq, or ask it with `edgellm run`"
        )


def _genai_graph(folder: Path) -> Path:
    """The graph of the decoder in a folder that onnxruntime-genai runs."""
    config = read_json(folder / GENAI_CONFIG)
    try:
        graph = folder / str(config["model"]["decoder"]["filename"])
    except (KeyError, TypeError):
        raise SourceError(
            f"{folder / GENAI_CONFIG} names no graph of a decoder (model.decoder.filename): fetch "
            "the folder again, or make it anew"
        ) from None
    if not graph.is_file():
        raise SourceError(
            f"{folder} lacks {graph.name}, which its {GENAI_CONFIG} names: fetch it again"
        )
    return graph


def _is_main_file(path: Path) -> bool:
    if not (path.parent / MANIFEST).exists():
        return False
    try:
        return path.name == read_manifest(path.parent).artifact.main_file
    except SourceError:  # a manifest.json of some other program
        return False


def verify(artifact: Artifact, *, trust_unchanged: bool = False) -> None:
    """Recompute the checksum of every file of ``artifact``.

    With ``trust_unchanged``, a file whose size and modification time are as they were when it last
    passed is not read again. Raises ``VerificationError`` naming every file, and the tensors inside
    it, that differ, are missing, or do not belong, and ``SourceError`` for a plain file.
    """
    if artifact.manifest is None:
        raise SourceError(
            f"{artifact.path} has no manifest, so there is nothing to verify it against"
        )
    entries = artifact.manifest.artifact.files
    passed = verified.passed_before(artifact.path) if trust_unchanged else {}
    faults: list[str] = []
    stamps: dict[str, verified.Stamp] = {}
    for entry in entries:
        file = artifact.path / entry.path
        if not file.is_file():
            faults.append(f"{entry.path} is missing")
            continue
        stat = file.stat()
        stamp = verified.stamp_of(stat, entry.sha256)
        stamps[entry.path] = stamp
        if passed.get(entry.path) == stamp:
            continue
        if stat.st_size != entry.nbytes:
            faults.append(f"{entry.path} has {stat.st_size} bytes instead of {entry.nbytes}")
        elif file_sha256(file) != entry.sha256:
            faults.append(f"{entry.path} differs{_damaged_tensors(artifact, entry.path)}")
    known = {MANIFEST, *(entry.path for entry in entries)}
    for name in sorted(file.name for file in artifact.path.iterdir()):
        # A note or a picture beside the model harms nobody; another chat template would be used.
        if name.endswith(PART_SUFFIXES) and name not in known:
            faults.append(f"{name} does not belong to it")
    if faults:
        raise VerificationError(
            f"{artifact.path} is not what was written: {'; '.join(faults)}. "
            "Copy or convert it again"
        )
    if stamps != passed:
        verified.remember(artifact.path, stamps)


def _damaged_tensors(artifact: Artifact, name: str) -> str:
    assert artifact.manifest is not None
    damaged = []
    tensors = [
        tensor
        for tensor in artifact.manifest.artifact.tensors
        if all(array[0] == name for array in tensor.arrays)
    ]
    if not all(tensor.sha256 for tensor in tensors):
        return ""
    for tensor in tensors:
        ranges = [(offset, nbytes) for _, offset, nbytes in tensor.arrays]
        if ranges_sha256(artifact.path / name, ranges) != tensor.sha256:
            damaged.append(tensor.name)
    if not damaged:
        return " outside its tensors"
    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    return f" in {', '.join(damaged[:5])}{more}"
