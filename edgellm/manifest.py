"""Manifest: the only thing that ``convert`` hands to ``run``, and the proof of what was done."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Self

import msgspec

from edgellm.errors import SourceError, VerificationError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


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

    With ``gradient_tokens`` codes were solved by gradients of the source before. ``settings`` are
    those of ``tune.settings.Settings``, ``ids_sha256`` the digest of the text's ids, a part of
    which was held out. The bytes depend on ``threads`` and the version of torch too.
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
    base said had been merged into it already, oldest first, ``scaled_before``: transforms that it
    said had scaled channels of its weights. ``kept_adapters`` lie beside the model.
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
    scaled_before: tuple[str, ...] = ()
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
