"""What a profile says: the document that `edgellm profile` writes and every report reads.

Times are seconds, sizes bytes, speeds tokens per second. Field names are the JSON's keys. What each
figure counts and leaves out stands in docs/profiling.md and, in short, at its field here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from edgellm.errors import SourceError

SCHEMA_VERSION = 1

KIND = "edgellm profile"
"""What ``kind`` says in a file that is one."""


Task = Literal["generate", "translate", "embed", "label", "fill"]
"""What a cell does: a language model goes on with a prompt, an encoder with a decoder answers a
text, an encoder gives a vector, labels (of texts or their tokens) or words for what is masked."""


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity, a sample for each round in their order, its median, and where that lies.

    ``low`` and ``high`` bound the median with 95 % confidence (bootstrap over the rounds); with
    fewer than four rounds they are the least and the largest sample.
    """

    samples: tuple[float, ...]
    median: float
    low: float
    high: float


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """All samples of all rounds, round after round, and how they spread."""

    samples: tuple[float, ...]
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class ArtifactFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was run.

    ``name``: the path's last part, for people. ``sha256``: the manifest's digest, or that of a
    plain model file. ``model_sha256``: digest of what it was made from, the same for all artifacts
    of one base; empty where no manifest says it. ``size_bytes``: its files. ``weights``: how many
    numbers its matrices hold; ``weight_bytes``: what they take, and ``bytes_per_token`` what one
    token reads of them (a row of the embedding, all else whole); None where the container does not
    say. ``prompt_weights``: those that each token of a prompt is multiplied with: without embedding
    and output head, which the last one alone needs. ``kv_values``: how many numbers are in the keys
    and values of one token; ``kv_windows``: how far back each layer looks, where some do not look
    at all tokens. ``kld_mean``: KL divergence to the source in nats, measured when it was made.
    """

    name: str
    container: str
    quant: str = ""
    sha256: str
    model_sha256: str = ""
    size_bytes: int
    weights: int | None = None
    weight_bytes: int | None = None
    bytes_per_token: int | None = None
    prompt_weights: int | None = None
    kv_values: int | None = None
    kv_windows: tuple[int | None, ...] = ()
    kld_mean: float | None = None


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How a cell was run. ``depth_tokens`` lie in the cache before the prompt, computed untimed.

    ``threads``: what the runtime was told; None where it chooses itself. ``kv_cache``: the type of
    keys and values, empty where there are none. ``prompt_tokens``: of an encoder those of each of
    the ``batch`` texts that are computed together, and ``new_tokens`` is 0.
    """

    runtime: str
    device: str
    threads: int | None
    kv_cache: str
    prompt_tokens: int
    new_tokens: int
    depth_tokens: int = 0
    task: Task = "generate"
    batch: int = 1


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What the cell's process took.

    ``peak_bytes``: most resident at once, mapped file pages counted. ``steady_bytes``: resident
    after the last round; ``steady_shared_bytes``: the same with pages that several processes map
    counted in parts (PSS), None where the system does not say. ``device_bytes``: on a GPU, None
    where there is none or it does not say. ``kv_bytes``: keys and values; None of an encoder.
    """

    peak_bytes: int
    steady_bytes: int
    steady_shared_bytes: int | None = None
    device_bytes: int | None = None
    kv_bytes: int | None = None


class Energy(msgspec.Struct, frozen=True, kw_only=True):
    """Energy of the whole machine or package while a cell ran, by ``source`` (a counter's name)."""

    source: str
    prefill_j: Figure
    decode_j: Figure
    decode_j_per_token: Figure


class Roofline(msgspec.Struct, frozen=True, kw_only=True):
    """How near a cell comes to what this machine could do at best.

    Decoding: the bytes that a token needs (weights, and keys and values of the middle of the
    answer) times its speed, as a share of the memory bandwidth at these threads. Prefill: 2
    floating-point operations a token for each weight that a prompt's tokens are multiplied with,
    attention not counted, as a share of a float32 matrix product at these threads; kernels that
    compute in 8 bits may pass it. None where the artifact does not say what it reads, and on
    devices other than the CPU.
    """

    bytes_per_token: int | None = None
    decode_share: float | None = None
    flops_per_token: int | None = None
    prefill_share: float | None = None


class Operator(msgspec.Struct, frozen=True, kw_only=True):
    """Time of one kind of operator, or of one layer: seconds a token, its share, calls a token."""

    name: str
    seconds: float
    share: float
    calls: float


class Operators(msgspec.Struct, frozen=True, kw_only=True):
    """Where a decoded token's time goes; from a run of its own.

    Kinds stand the dearest first, layers in their order, and shares are of the operators' sum.
    ``source``: whose clock. ``overhead``: how much longer a token took while it was watched, as a
    share of ``token_s``. ``tokens``: how many were. ``token_s`` and ``watched_token_s``: a token's
    whole time just before without being watched, and while it was. All times are means of the
    quicker half of the tokens. ``trace``: the file for Perfetto, as it was named; empty for none.
    ``reason``: why there is none of it, where ``by_kind`` is empty.
    """

    source: str = ""
    tokens: int = 0
    overhead: float | None = None
    token_s: float | None = None
    watched_token_s: float | None = None
    by_kind: tuple[Operator, ...] = ()
    by_layer: tuple[Operator, ...] = ()
    trace: str = ""
    reason: str = ""


class During(msgspec.Struct, frozen=True, kw_only=True):
    """What else went on while a cell's rounds were measured; None where the machine does not say.

    ``load_average``: the highest that was seen. ``stolen_share`` and ``others_share``: of the time
    of the cores that the cell could use, what other virtual machines and other programs had.
    ``throttled``: how often the CPU slowed down for heat. ``temperature_c``: the highest.
    """

    load_average: float | None = None
    stolen_share: float | None = None
    others_share: float | None = None
    throttled: int | None = None
    temperature_c: float | None = None


class Cell(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One artifact with one setting. ``failure``: why it has no figures, or no more of them.

    ``name`` tells it from the others of its profile. ``rounds`` were counted, after
    ``warmup_rounds`` that were not.

    ``load_s``: until a session can compute, importing the backend included; one sample for each
    time its process was started. ``tokenization_s``: the prompt's text to tokens.
    ``time_to_first_token_s``: from the prompt's text to the first token's text; loading is not in
    it. ``prefill_tokens_per_s``: the prompt's tokens by the time until the first token is chosen.
    ``inter_token_latency_s``: from one token's text to the next one's, ``new_tokens`` - 1 samples
    a round. ``decode_tokens_per_s``: the other tokens but the first by the time between the first
    and the last. ``end_to_end_s``: from the prompt's text to the last token's text.
    ``sampling_s`` and ``detokenization_s``: of one token, which the figures before include.
    ``cpu_s``: the process's time on all cores, per round. ``noisy``: why the figures may mislead.
    ``encode_s``: of an encoder with a decoder, from the text's tokens until the encoder has read
    them. ``latency_s``: of an encoder, from a batch's texts to what it says of them, several
    samples a round; ``texts_per_s`` and ``tokens_per_s``: those of a round's batches by their time.
    ``absent``: for figures that its task has not, why.
    ``text_sha256``: of the answer's tokens, equal wherever the answers are.
    """

    name: str
    artifact: ArtifactFacts
    settings: Settings
    runtime_version: str = ""
    failure: str = ""
    rounds: int = 0
    warmup_rounds: int = 0
    load_s: Figure | None = None
    tokenization_s: Figure | None = None
    time_to_first_token_s: Figure | None = None
    prefill_tokens_per_s: Figure | None = None
    inter_token_latency_s: Distribution | None = None
    decode_tokens_per_s: Figure | None = None
    end_to_end_s: Figure | None = None
    sampling_s: Figure | None = None
    detokenization_s: Figure | None = None
    cpu_s: Figure | None = None
    encode_s: Figure | None = None
    latency_s: Distribution | None = None
    texts_per_s: Figure | None = None
    tokens_per_s: Figure | None = None
    absent: dict[str, str] = {}
    memory: Memory | None = None
    energy: Energy | None = None
    roofline: Roofline | None = None
    operators: Operators | None = None
    during: During | None = None
    noisy: tuple[str, ...] = ()
    text_sha256: str = ""


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """``of`` divided by ``to`` in one quantity, round by round.

    ``verdict``: ``faster``, ``slower``, ``no difference shown`` where the interval holds 1, or
    ``noisy, not judged`` where either side is.
    """

    quantity: str
    of: str
    to: str
    ratio: Figure
    verdict: str


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What this machine reads and computes at best on ``threads`` threads.

    ``bandwidth_bytes_per_s``: reading memory. ``flops_per_s``: float32 matrix products of
    onnxruntime.
    """

    threads: int
    bandwidth_bytes_per_s: float
    flops_per_s: float


class Gauge(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the machine said at one moment; None or empty where it does not say.

    ``load_average``: threads that wanted to run, mean of the last minute. ``stolen_s``: time that
    other virtual machines had of its CPUs, since it started; ``busy_s``: time that its CPUs
    worked, of all programs. ``throttled``: times that the CPU slowed down for heat, since it
    started. ``temperature_c``: of the hottest sensor of the CPU; ``temperature_limit_c``: where
    that sensor says that the CPU slows down, or stops. ``frequency_hz``: mean of the CPUs now.
    """

    load_average: float | None = None
    stolen_s: float | None = None
    busy_s: float | None = None
    throttled: int | None = None
    temperature_c: float | None = None
    temperature_limit_c: float | None = None
    frequency_hz: float | None = None


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """On what and under which circumstances. No names of hosts or people, and no paths.

    ``threads_pinned``: how threads are kept to cores, in words. ``unknown``: what could not be
    read, with the reason.
    """

    cpu: str
    cpu_features: tuple[str, ...]
    physical_cores: int
    memory_bytes: int
    gpus: tuple[str, ...]
    os: str
    python: str
    versions: dict[str, str]
    governor: str = ""
    power_source: str = ""
    virtual_machine: str = ""
    threads_pinned: str = ""
    load_average: float | None = None
    bandwidth_bytes_per_s: float | None = None
    before: Gauge
    after: Gauge
    unknown: tuple[str, ...] = ()


class Method(msgspec.Struct, frozen=True, kw_only=True):
    """How it was measured, so that others can judge and repeat it.

    ``command``: without paths of the machine. ``interleaved``: the cells took turns, round by
    round. ``stayed_loaded``: their processes lived through several rounds, and were started
    ``starts`` times. ``not_counted``: what no figure includes, in sentences.
    """

    command: str
    rounds: int
    warmup_rounds: int
    budget_s: float | None = None
    interleaved: bool = True
    stayed_loaded: bool = True
    starts: int = 1
    sampling: str = "greedy"
    prompt: str = ""
    not_counted: tuple[str, ...] = ()


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document. ``interrupted``: it was stopped, and holds what was done by then."""

    kind: str = KIND
    schema_version: int = SCHEMA_VERSION
    edgellm: str
    started: str
    seconds: float
    method: Method
    conditions: Conditions
    limits: tuple[Limit, ...]
    cells: tuple[Cell, ...]
    ratios: tuple[Ratio, ...] = ()
    interrupted: bool = False
    notes: tuple[str, ...] = ()


def to_json(profile: Profile) -> bytes:
    """The file's content, indented for people."""
    return msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n"


def read_profile(path: Path) -> Profile:
    """The profile in ``path``; raises ``SourceError`` for a file that is none, or is newer."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    try:
        stored = msgspec.json.decode(content)
        if not isinstance(stored, dict) or stored.get("kind") != KIND:
            raise SourceError(
                f"{path} is JSON, but not a profile: give a file that `edgellm profile --output "
                "FILE.json` wrote"
            )
        version = stored.get("schema_version")
        if version != SCHEMA_VERSION:
            raise SourceError(
                f"{path} has schema version {version}; this edgellm reads {SCHEMA_VERSION}: use "
                "the edgellm that wrote it, or measure again"
            )
        return msgspec.convert(stored, Profile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be understood as a profile: {error}") from error
