"""Manifest: the only thing that ``convert`` hands to ``run``, and the proof of what was done."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Self

import msgspec

from edgellm import verified
from edgellm.digests import file_sha256, ranges_sha256
from edgellm.errors import SourceError, UnsupportedTarget, VerificationError
from edgellm.json_file import read_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
GENAI_CONFIG = "genai_config.json"
"""What a folder that onnxruntime-genai runs has, whoever made it."""

PART_SUFFIXES = (
    ".data", ".gguf", ".jinja", ".json", ".model", ".onnx", ".safetensors", ".spm",
)  # fmt: skip
"""Files that a reader of an artifact's folder may take for a part of it."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the artifact, by path relative to its folder."""

    path: str
    nbytes: int
    sha256: str


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as stored. ``sha256`` is over its arrays' bytes in the order of ``arrays``.

    Empty where hashing all bytes a second time would cost too much: the file's digest covers them.
    """

    name: str
    role: str
    shape: tuple[int, ...]
    grid: str
    nbytes: int
    sha256: str
    arrays: tuple[tuple[str, int, int], ...]
    note: str = ""


class Base(msgspec.Struct, frozen=True, kw_only=True):
    """The model that went in; ``sha256`` as ``ModelSource.digest`` takes it of the weight files."""

    name: str
    kind: str
    revision: str = ""
    sha256: str = ""
    licence: str = ""
    url: str = ""


class AdapterEntry(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was merged in; ``sha256`` as ``Adapter.digest`` takes it of its files.

    ``rank`` and ``alpha`` are what its config says of most weights, None where its kind has no such
    thing. ``base_name``, ``base_revision``: what it says that it was trained on. ``revision``: of
    itself, on the Hub. ``changed_tensors``: how many tensors it changes.
    """

    name: str
    sha256: str
    kind: str
    weight: float
    rank: int | None = None
    alpha: float | None = None
    base_name: str = ""
    base_revision: str = ""
    revision: str = ""
    changed_tensors: int = 0


class KeptEntry(AdapterEntry, frozen=True, kw_only=True):
    """An adapter that lies beside the model, unmerged, in ``file`` of the artifact's folder.

    ``weight`` is how strongly it is applied where nobody says.
    """

    file: str


class MergeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Adapters, in order, and how they were combined and merged.

    ``density``, ``sign``, ``rank`` and ``seed`` are those of the combination that matter to its
    ``method``. ``merged_sha256`` is over the merged weights in float32, before any rounding, and so
    the same for every grid and container (``lora.record.Change``). ``base`` says which base the
    adapters were merged into (``full``, ``dequantized nf4``) and ``base_reason`` why.
    """

    adapters: tuple[AdapterEntry, ...]
    method: str
    density: float | None = None
    sign: str | None = None
    rank: int | None = None
    seed: int | None = None
    merged_sha256: str = ""
    base: str = ""
    base_reason: str = ""


class CalibrationEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the model was seen to work on before its weights were rounded.

    ``text`` is ``builtin`` or a file's name, ``text_sha256`` the digest of its bytes and
    ``ids_sha256`` of the token ids (``calibration.texts.ids_sha256``). ``gathered``: of the inputs
    of the weights, ``hessian`` or ``importance``, behind ``layers``: ``float`` or ``quantized``
    ones. Tokens counted by mean squares to the power ``token_power``
    (``calibration.passes.token_weights``). ``settings``: what the solver and the transforms were
    set to, by their names. With ``imatrix``, a file of importance by its name and digest, there is
    no text.
    ``device``: where codes were solved, by numpy on the ``cpu``, on others by torch.
    """

    gathered: str
    solver: str
    transforms: tuple[str, ...] = ()
    device: str = "cpu"
    text: str = ""
    text_sha256: str = ""
    ids_sha256: str = ""
    tokens: int = 0
    windows: int = 0
    seed: int = 0
    layers: str = "float"
    token_power: float = 0.0
    settings: dict[str, dict[str, Any]] = {}
    imatrix: str = ""
    imatrix_sha256: str = ""


class TuningEntry(msgspec.Struct, frozen=True, kw_only=True):
    """How scales, minima, norms and biases were trained after rounding, while codes stayed.

    ``settings`` are those of ``tune.settings.Settings``, ``ids_sha256`` the digest of the text's
    ids, a part of which was held out. The bytes depend on ``threads`` and the version of torch too.
    """

    settings: dict[str, Any]
    text: str
    text_sha256: str
    ids_sha256: str
    training_tokens: int
    held_out_tokens: int
    threads: int
    torch: str


class ExpertFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Of a mixture: how many experts a layer has, and how many of them each token passes."""

    count: int
    used: int


class ModelFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a runtime needs to know to run the artifact without the source's config.

    ``attention_layer_count``: how many layers have keys and values; unset, or None in
    older manifests, where all have.
    """

    family: str
    vocab_size: int
    hidden_size: int
    layer_count: int
    head_count: int
    kv_head_count: int
    head_dim: int
    context_length: int
    windows: tuple[int | None, ...] = ()
    attention_layer_count: int | msgspec.UnsetType | None = msgspec.UNSET
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    features: tuple[str, ...] = ()
    experts: ExpertFacts | msgspec.UnsetType = msgspec.UNSET


class EncoderFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a runtime needs to know to run an encoder; of a model that generates there is none.

    ``task``: ``embeddings``, ``sequence_classification``, ``token_classification`` or
    ``masked_lm``. ``outputs`` of the graph, the one that answers first. ``max_tokens``: what a text
    is cut to, the model's own tokens counted. ``padding_token_id`` fills shorter texts of a batch
    up. ``takes_types``: the second text of a pair is told from the first by its token types; zeros
    otherwise, where the graph has them. ``labels`` by number, and
    ``scores``: what makes scores of their logits (``softmax``, ``sigmoid``, ``none``).
    ``pooling``: the vectors of tokens that stand side by side in an embedding of
    ``embedding_size`` values, which ``normalized`` says is of length 1. ``lowercase``: of texts,
    before the tokenizer. ``prompts`` by name go before a text, ``default_prompt`` where none is
    named.
    """

    task: str
    outputs: tuple[str, ...]
    max_tokens: int
    padding_token_id: int = 0
    takes_types: bool = False
    labels: tuple[str, ...] = ()
    scores: str = "none"
    mask_token_id: int | None = None
    pooling: tuple[str, ...] = ()
    embedding_size: int = 0
    normalized: bool = False
    lowercase: bool = False
    prompts: dict[str, str] = {}
    default_prompt: str = ""


class Seq2SeqFacts(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a runtime needs to know to run an encoder with a decoder; of others there is none.

    ``encoder_file`` holds the encoder's graph beside the main file, the decoder's. An answer begins
    with ``start_token_id`` (and ``first_token_ids``, which are given) and ends with one of
    ``end_token_ids``; ``suppressed_token_ids`` are never taken. ``max_tokens``: what a text is cut
    to; ``max_new_tokens``: what an answer has at the most where nobody says, and then
    ``last_token_id`` is its last. ``languages``: ids of their codes by name, one of which stands
    beside a text, ``source_language`` where nobody says. The answer's own stands before it, in
    place of the start token where ``language_begins``, else behind it.
    """

    encoder_file: str
    start_token_id: int
    end_token_ids: tuple[int, ...]
    max_tokens: int
    max_new_tokens: int
    first_token_ids: tuple[int, ...] = ()
    suppressed_token_ids: tuple[int, ...] = ()
    last_token_id: int | None = None
    languages: dict[str, int] = {}
    source_language: str = ""
    language_begins: bool = False


class RemoteCodeEntry(msgspec.Struct, frozen=True, kw_only=True):
    """Python of the source's own that was trusted, and loaded to compare with.

    ``classes`` by what they stand in for, ``files``: SHA-256 by name. What was compared, and how
    near it came, is measured (``measured.remote_code``).
    """

    classes: dict[str, str]
    files: dict[str, str]


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """Whether source and output split the built-in text of awkward cases into the same ids.

    ``known`` differences are those that the container's reader is known for (the manifest's notes
    say which), ``mismatches`` any others, which no artifact is kept with. ``method`` says whose
    tokenizers were asked. It is empty in a manifest's digested part, which must not depend on what
    else is installed, and stands among the measured figures.
    """

    equal: bool
    cases: int
    method: str = ""
    mismatches: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


class Digested(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The part that says what the artifact *is*: no paths, times or measured figures in it.

    ``merge``: what was merged into the base while converting. ``merged_before``: adapters that the
    base said had been merged into it already, oldest first. ``kept_adapters`` lie beside the model.
    ``encoder``, ``seq2seq``: of an encoder, alone or with a decoder, what runs it. ``remote_code``:
    Python of the source's own that was loaded.
    """

    schema_version: int
    container: str
    main_file: str
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    base: Base
    model: ModelFacts
    recipe: dict[str, Any]
    recipe_sha256: str
    tokenizer_sha256: str
    chat_template_sha256: str
    tokenizer_parity: Parity
    notes: tuple[str, ...]
    tool_versions: dict[str, str]
    merge: MergeEntry | None = None
    merged_before: tuple[AdapterEntry, ...] = ()
    kept_adapters: tuple[KeptEntry, ...] = ()
    calibration: CalibrationEntry | None = None
    tuning: TuningEntry | None = None
    encoder: EncoderFacts | None = None
    seq2seq: Seq2SeqFacts | None = None
    remote_code: RemoteCodeEntry | None = None

    def sha256(self) -> str:
        """Digest over the canonical JSON (sorted keys, no spaces) of this part."""
        return _canonical_sha256(self)


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """``artifact`` and its digest, and beside it ``measured``: time, host, peak memory, check."""

    artifact: Digested
    sha256: str
    measured: dict[str, Any] = {}

    @classmethod
    def of(cls, artifact: Digested, measured: dict[str, Any]) -> Self:
        """The manifest of an artifact, its digest computed."""
        return cls(artifact=artifact, sha256=artifact.sha256(), measured=measured)

    def to_json(self) -> bytes:
        """The file's content, keys sorted and indented for people."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


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


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact folder, its own digest checked.

    Raises ``SourceError`` for a folder without one or a newer schema, ``VerificationError`` for one
    that was changed after it was written.
    """
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if (folder / "adapter_config.json").exists():
            raise SourceError(
                f"{folder} is an adapter, not a model: apply it to one (`edgellm run MODEL "
                f"--adapter {folder}`), or merge it (`edgellm convert BASE --adapter {folder} "
                "--out DIR`)"
            ) from None
        what = (
            "a model to convert first"
            if (folder / "config.json").exists()
            else "an unfinished copy?"
        )
        raise SourceError(
            f"{folder} has no {MANIFEST}, so it is not an artifact ({what}): "
            f"make one with `edgellm convert {folder} --out DIR`"
        ) from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    try:
        stored = msgspec.json.decode(content, type=dict[str, Any])["artifact"]
        version = stored["schema_version"]
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise SourceError(
                f"{path} has schema version {version}; this edgellm reads up to {SCHEMA_VERSION}: "
                "install a newer edgellm, or convert again"
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise SourceError(f"{path} is not a manifest that edgellm understands: {error}") from error
    # Of what stands in the file: a field that a later edgellm added must not look like a change.
    if _canonical_sha256(stored) != manifest.sha256:
        raise VerificationError(
            f"{path} was changed after it was written: its own digest does not match"
        )
    for entry in manifest.artifact.files:
        if Path(entry.path).is_absolute() or ".." in Path(entry.path).parts:
            raise VerificationError(f"{path} names a file outside its folder: {entry.path!r}")
    main_file = manifest.artifact.main_file
    if main_file not in {entry.path for entry in manifest.artifact.files}:
        raise VerificationError(f"{path} names a main file without a checksum: {main_file!r}")
    return manifest


def _canonical_sha256(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="sorted")).hexdigest()


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
