"""How quickly encoders answer on this machine: time of a batch and texts a second, in rounds.

All cells are loaded in this process and take turns, round by round, so that whatever drifts (heat,
other programs) hits all alike.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from edgellm import __version__
from edgellm.encoders.model import EncoderModel, open_encoder
from edgellm.errors import UsageError
from edgellm.hardware import detect
from edgellm.profiling.conditions import conditions_now
from edgellm.profiling.document import Conditions, Figure
from edgellm.profiling.gauges import gauge, noise
from edgellm.profiling.intervals import figure
from edgellm.profiling.prompts import builtin_text

KIND = "edgellm encoder profile"
SCHEMA_VERSION = 1

ROUNDS = 20
WARMUP_ROUNDS = 2


class EncoderCell(msgspec.Struct, frozen=True, kw_only=True):
    """One artifact with one setting.

    ``text_tokens``: of each text, the model's own counted; ``batch``: texts that are computed
    together. ``batch_s``: from texts to what the model says of them; ``texts_per_s`` and
    ``tokens_per_s`` follow from it. ``load_s``: until the model could be asked.
    """

    name: str
    artifact: str
    quant: str
    sha256: str
    size_bytes: int
    task: str
    device: str
    threads: int
    text_tokens: int
    batch: int
    load_s: float
    batch_s: Figure
    texts_per_s: Figure
    tokens_per_s: Figure


class EncoderProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document; seconds, bytes. ``noisy``: why the figures may mislead."""

    kind: str = KIND
    schema_version: int = SCHEMA_VERSION
    edgellm: str
    started: str
    seconds: float
    rounds: int
    warmup_rounds: int
    conditions: Conditions
    cells: tuple[EncoderCell, ...]
    noisy: tuple[str, ...] = ()


@dataclass
class _Running:
    """A cell while it is measured: a model, its texts, and a sample for each round."""

    path: Path
    model: EncoderModel
    threads: int
    texts: list[str]
    tokens: int
    load_s: float
    samples: list[float] = field(default_factory=list)


def profile_encoders(
    paths: Sequence[str | Path],
    *,
    text_tokens: Sequence[int] = (128,),
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
    rounds: int = ROUNDS,
    warmup_rounds: int = WARMUP_ROUNDS,
) -> EncoderProfile:
    """The profile of the encoders at ``paths``, with every combination of the settings.

    Raises ``UsageError`` for settings that no model has, and what ``open_encoder`` raises.
    """
    if rounds < 1 or warmup_rounds < 0 or min(batches, default=0) < 1:
        raise UsageError(
            f"rounds and batches must be at least 1 and warm-up rounds 0 or more, got {rounds}, "
            f"{list(batches)} and {warmup_rounds}"
        )
    hardware = detect()
    cores = hardware.physical_cores.value
    begun, before, own_cpu_s = time.perf_counter(), gauge(), time.process_time()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with ExitStack() as opened:
        cells: list[_Running] = []
        for path, count in itertools.product(paths, threads):
            loading = time.perf_counter()
            model = opened.enter_context(open_encoder(path, threads=count or cores))
            load_s = time.perf_counter() - loading
            for length, batch in itertools.product(text_tokens, batches):
                text, tokens = text_of(model, length)
                cells.append(
                    _Running(Path(path), model, count or cores, [text] * batch, tokens, load_s)
                )
        for number in range(warmup_rounds + rounds):
            for cell in cells:
                start = time.perf_counter()
                cell.model.ask(cell.texts, batch=len(cell.texts))
                if number >= warmup_rounds:
                    cell.samples.append(time.perf_counter() - start)
        after, seconds = gauge(), time.perf_counter() - begun
        return EncoderProfile(
            edgellm=__version__,
            started=started,
            seconds=seconds,
            rounds=rounds,
            warmup_rounds=warmup_rounds,
            conditions=conditions_now(hardware, (), before, after),
            cells=tuple(map(_described, cells)),
            noisy=noise(
                [(before, after)],
                own_cpu_s=time.process_time() - own_cpu_s,
                seconds=seconds,
                cores=cores,
            ),
        )


def text_of(model: EncoderModel, tokens: int) -> tuple[str, int]:
    """A text of so many ``tokens``, the model's own counted, and how many it came to.

    Raises ``UsageError`` for more than the model looks at. A masked language model's text begins
    with what is masked.
    """
    if tokens > model.facts.max_tokens:
        raise UsageError(
            f"a text of {tokens} tokens is longer than the model looks: choose at most "
            f"{model.facts.max_tokens}"
        )
    masked = model.tokenizer.special_tokens.get("mask_token", "")
    text = builtin_text()
    text = f"{masked} {text}" if model.facts.task == "masked_lm" else text
    while len(model.tokenizer.encode(text)) < tokens:
        text += f" {text}"
    encoded = model.tokenizer.encode_whole(text, max_tokens=tokens)
    text = text[: max(end for _, end in encoded.spans)]
    return text, len(model.encode(text).ids)


def _described(cell: _Running) -> EncoderCell:
    artifact, facts = cell.model.artifact, cell.model.facts
    assert artifact is not None
    assert artifact.manifest is not None
    made, batch = artifact.manifest.artifact, len(cell.texts)
    name = cell.path.resolve().name
    return EncoderCell(
        name=f"{name}, {batch} x {cell.tokens} tokens, {cell.threads} threads",
        artifact=name,
        quant=str(made.recipe.get("quant", "")),
        sha256=artifact.manifest.sha256,
        size_bytes=sum(file.nbytes for file in made.files),
        task=facts.task,
        device=cell.model.graph.device,
        threads=cell.threads,
        text_tokens=cell.tokens,
        batch=batch,
        load_s=cell.load_s,
        batch_s=figure(cell.samples),
        texts_per_s=figure([batch / each for each in cell.samples]),
        tokens_per_s=figure([batch * cell.tokens / each for each in cell.samples]),
    )
