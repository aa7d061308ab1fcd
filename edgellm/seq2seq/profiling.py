"""How quickly models with an encoder and a decoder answer on this machine, in rounds.

All cells are loaded in this process and take turns, as those of ``encoders.profiling``.
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
from edgellm.errors import UsageError
from edgellm.hardware import detect
from edgellm.profiling.conditions import conditions_now
from edgellm.profiling.document import Conditions, Figure
from edgellm.profiling.gauges import gauge, noise
from edgellm.profiling.intervals import figure
from edgellm.profiling.prompts import builtin_text
from edgellm.seq2seq.model import Seq2SeqModel, open_seq2seq

KIND = "edgellm seq2seq profile"
SCHEMA_VERSION = 1

ROUNDS = 10
WARMUP_ROUNDS = 1


class Seq2SeqCell(msgspec.Struct, frozen=True, kw_only=True):
    """One artifact with one setting.

    ``text_tokens`` are read, ``new_tokens`` written; ends of an answer do not end it.
    ``first_token_s``: from the text to the answer's first token, the encoder's work.
    ``decode_tokens_per_s``: of the other tokens. ``load_s``: until the model could be asked.
    """

    name: str
    artifact: str
    quant: str
    sha256: str
    size_bytes: int
    device: str
    threads: int
    text_tokens: int
    new_tokens: int
    load_s: float
    first_token_s: Figure
    decode_tokens_per_s: Figure
    end_to_end_s: Figure


class Seq2SeqProfile(msgspec.Struct, frozen=True, kw_only=True):
    """The whole document; seconds, bytes. ``noisy``: why the figures may mislead."""

    kind: str = KIND
    schema_version: int = SCHEMA_VERSION
    edgellm: str
    started: str
    seconds: float
    rounds: int
    warmup_rounds: int
    conditions: Conditions
    cells: tuple[Seq2SeqCell, ...]
    noisy: tuple[str, ...] = ()


@dataclass
class _Running:
    """A cell while it is measured; ``samples``: seconds to the first token, and to the last."""

    path: Path
    model: Seq2SeqModel
    threads: int
    text: str
    tokens: int
    new_tokens: int
    load_s: float
    samples: list[tuple[float, float]] = field(default_factory=list)

    def measure(self) -> tuple[float, float]:
        """Answer the text once, the likeliest token each time."""
        graphs, facts = self.model.graphs, self.model.facts
        start = time.perf_counter()
        encoded = self.model.tokenizer.encode_whole(self.text, max_tokens=facts.max_tokens)
        graphs.read(encoded.ids)
        token = int(graphs.step([facts.start_token_id])[-1].argmax())
        first = time.perf_counter()
        for _ in range(self.new_tokens - 1):
            token = int(graphs.step([token])[-1].argmax())
        return first - start, time.perf_counter() - start


def profile_seq2seq(
    paths: Sequence[str | Path],
    *,
    text_tokens: Sequence[int] = (128,),
    new_tokens: Sequence[int] = (64,),
    threads: Sequence[int | None] = (None,),
    rounds: int = ROUNDS,
    warmup_rounds: int = WARMUP_ROUNDS,
) -> Seq2SeqProfile:
    """The profile of the models at ``paths``, with every combination of the settings.

    Raises ``UsageError`` for settings that no model has, and what ``open_seq2seq`` raises.
    """
    if rounds < 1 or warmup_rounds < 0 or min(new_tokens, default=0) < 2:
        raise UsageError(
            f"rounds must be at least 1, warm-up rounds 0 or more and new tokens at least 2, got "
            f"{rounds}, {warmup_rounds} and {list(new_tokens)}"
        )
    hardware = detect()
    cores = hardware.physical_cores.value
    begun, before, own_cpu_s = time.perf_counter(), gauge(), time.process_time()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with ExitStack() as opened:
        cells: list[_Running] = []
        for path, count in itertools.product(paths, threads):
            loading = time.perf_counter()
            model = opened.enter_context(open_seq2seq(path, threads=count or cores))
            load_s = time.perf_counter() - loading
            for length, new in itertools.product(text_tokens, new_tokens):
                text, tokens = _text_of(model, length, new)
                cells.append(_Running(Path(path), model, count or cores, text, tokens, new, load_s))
        for number in range(warmup_rounds + rounds):
            for cell in cells:
                sample = cell.measure()
                if number >= warmup_rounds:
                    cell.samples.append(sample)
        after, seconds = gauge(), time.perf_counter() - begun
        return Seq2SeqProfile(
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


def _text_of(model: Seq2SeqModel, tokens: int, new_tokens: int) -> tuple[str, int]:
    """A text of so many ``tokens``, and how many it came to.

    Raises ``UsageError`` where it or the answer is longer than the model's.
    """
    longest = model.facts.max_tokens
    if max(tokens, new_tokens) > longest:
        raise UsageError(
            f"a text of {tokens} and an answer of {new_tokens} tokens are not possible: choose at "
            f"most {longest} of each"
        )
    text = builtin_text()
    while len(model.tokenizer.encode(text)) < tokens:
        text += f" {text}"
    encoded = model.tokenizer.encode_whole(text, max_tokens=tokens)
    text = text[: max(end for _, end in encoded.spans)]
    return text, len(model.tokenizer.encode_whole(text, max_tokens=longest).ids)


def _described(cell: _Running) -> Seq2SeqCell:
    artifact = cell.model.artifact
    assert artifact is not None
    assert artifact.manifest is not None
    made, name = artifact.manifest.artifact, cell.path.resolve().name
    rest = cell.new_tokens - 1
    return Seq2SeqCell(
        name=f"{name}, {cell.tokens} to {cell.new_tokens} tokens, {cell.threads} threads",
        artifact=name,
        quant=str(made.recipe.get("quant", "")),
        sha256=artifact.manifest.sha256,
        size_bytes=sum(file.nbytes for file in made.files),
        device=cell.model.graphs.device,
        threads=cell.threads,
        text_tokens=cell.tokens,
        new_tokens=cell.new_tokens,
        load_s=cell.load_s,
        first_token_s=figure([first for first, _ in cell.samples]),
        decode_tokens_per_s=figure([rest / (whole - first) for first, whole in cell.samples]),
        end_to_end_s=figure([whole for _, whole in cell.samples]),
    )
