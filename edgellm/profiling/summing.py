"""A cell's rounds summed up, and what of one cell can be said against another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from edgellm.profiling import document
from edgellm.profiling.energy import quoted
from edgellm.profiling.gauges import during, noise
from edgellm.profiling.intervals import distribution, figure, ratio
from edgellm.profiling.roofline import roofline
from edgellm.profiling.tasks import ABSENT, KINDS

if TYPE_CHECKING:
    from edgellm.profiling.exchange import Round
    from edgellm.profiling.measuring import Running

COMPARED: dict[str, Literal["higher", "lower"]] = {
    "time_to_first_token_s": "lower",
    "prefill_tokens_per_s": "higher",
    "decode_tokens_per_s": "higher",
    "encode_s": "lower",
    "texts_per_s": "higher",
}
"""Quantities that cells are compared in, and which way is better."""


MOST_PAIRED = 6
"""So many cells have 15 pairs, which a reader can still go through."""


def summed(
    cell: Running, limits: Sequence[document.Limit], cores: int, warmup_rounds: int
) -> document.Cell:
    """What the rounds of ``cell`` come to; without any, why there are none."""
    wanted, rounds = cell.wanted, cell.rounds
    settings = document.Settings(
        runtime=wanted.runtime,
        device=cell.ready.device if cell.ready else wanted.device,
        threads=wanted.threads,
        kv_cache=cell.ready.kv_cache if cell.ready else wanted.kv_cache or "",
        prompt_tokens=_read_tokens(cell),
        new_tokens=wanted.new_tokens,
        depth_tokens=wanted.depth_tokens,
        task=wanted.task,
        batch=wanted.batch,
    )
    shown = document.Cell(
        name=cell.name,
        artifact=cell.facts,
        settings=settings,
        runtime_version=wanted.runtime_version,
        failure=cell.failure,
    )
    if not rounds:
        return shown

    limit = next((each for each in limits if each.threads == (wanted.threads or cores)), None)
    took: dict[str, Any] = {
        "own_cpu_s": sum(each.cpu_s for each in rounds),
        "seconds": sum(cell.between_s),
        "cores": cores,
    }
    figures = _of_texts if KINDS[wanted.task] == KINDS["embed"] else _of_answers
    return msgspec.structs.replace(
        shown,
        rounds=len(rounds),
        warmup_rounds=warmup_rounds,
        load_s=figure(cell.loads_s),
        tokenization_s=_over(rounds, lambda each: each.tokenization_s),
        cpu_s=_over(rounds, lambda each: each.cpu_s),
        memory=_memory(rounds),
        during=during(cell.gauges, **took),
        noisy=noise(cell.gauges, **took),
        text_sha256=rounds[-1].text_sha256,
        absent=ABSENT[wanted.task],
        **figures(rounds, cell.facts, settings, limit),
    )


def _read_tokens(cell: Running) -> int:
    """Tokens of the prompt, or those that a text came to."""
    said = cell.ready.prompt_tokens if cell.ready else None
    return cell.wanted.prompt_tokens if said is None else said


def _of_answers(
    rounds: Sequence[Round],
    facts: document.ArtifactFacts,
    settings: document.Settings,
    limit: document.Limit | None,
) -> dict[str, Any]:
    """Figures of what writes an answer, by the names of their fields."""
    decode = _over(rounds, _decode_speed) if settings.new_tokens > 1 else None
    prefill = _over(rounds, lambda each: each.prefill_s and settings.prompt_tokens / each.prefill_s)
    latencies = [one for each in rounds for one in each.latencies_s]
    kv_bytes = rounds[-1].memory.kv_bytes or 0
    counted = settings.task == "generate"
    return {
        "encode_s": _over(rounds, lambda each: each.encode_s),
        "time_to_first_token_s": _over(rounds, lambda each: each.first_token_s),
        "prefill_tokens_per_s": prefill,
        "inter_token_latency_s": distribution(latencies) if decode else None,
        "decode_tokens_per_s": decode,
        "end_to_end_s": _over(rounds, lambda each: each.end_to_end_s),
        "sampling_s": _over(rounds, lambda each: each.sampling_s),
        "detokenization_s": _over(rounds, lambda each: each.detokenization_s),
        "energy": _energy(rounds, settings.new_tokens, settings.device),
        "roofline": (
            roofline(facts, settings, kv_bytes, decode, prefill, limit) if counted else None
        ),
    }


def _of_texts(
    rounds: Sequence[Round],
    facts: document.ArtifactFacts,
    settings: document.Settings,
    limit: document.Limit | None,
) -> dict[str, Any]:
    """Figures of what only reads texts, by the names of their fields."""
    texts = [settings.batch * _decode_speed(each) for each in rounds]
    return {
        "latency_s": distribution([one for each in rounds for one in each.latencies_s]),
        "texts_per_s": figure(texts),
        "tokens_per_s": figure([settings.prompt_tokens * each for each in texts]),
    }


def _over(
    rounds: Sequence[Round], value: Callable[[Round], float | None]
) -> document.Figure | None:
    """The figure of ``value``, None where the rounds have none."""
    samples = [value(each) for each in rounds]
    known = [each for each in samples if each is not None]
    return figure(known) if len(known) == len(samples) else None


def ratios(cells: Iterable[document.Cell]) -> tuple[document.Ratio, ...]:
    """Each cell against those before it that were asked the same, in what both have.

    Pairs are samples of one round, so only rounds that both were measured in count. Of more than
    ``MOST_PAIRED`` cells that were asked the same, each is compared with the first alone.
    """
    groups: dict[tuple[object, ...], list[document.Cell]] = {}
    for cell in cells:
        if cell.rounds:
            groups.setdefault(_asked(cell), []).append(cell)
    found: list[document.Ratio] = []
    for group in groups.values():
        bases = group if len(group) <= MOST_PAIRED else group[:1]
        for place, cell in enumerate(group):
            for base in bases[:place]:
                found += _pair(cell, base)
    return tuple(found)


def _asked(cell: document.Cell) -> tuple[object, ...]:
    asked = cell.settings
    lengths = (asked.prompt_tokens, asked.new_tokens, asked.depth_tokens)
    return (asked.task, *lengths, asked.batch)


def _pair(cell: document.Cell, base: document.Cell) -> list[document.Ratio]:
    """``cell`` by ``base`` in every quantity that both have."""
    found = []
    for quantity, better in COMPARED.items():
        of, to = getattr(cell, quantity), getattr(base, quantity)
        if of is None or to is None:
            continue
        found.append(
            ratio(
                of.samples,
                to.samples,
                quantity,
                better=better,
                noisy=bool(cell.noisy or base.noisy),
                names=(cell.name, base.name),
            )
        )
    return found


def _decode_speed(each: Round) -> float:
    """Tokens but the first, or batches, a second."""
    return len(each.latencies_s) / sum(each.latencies_s)


def _memory(rounds: Sequence[Round]) -> document.Memory:
    most = max(each.memory.peak_bytes for each in rounds)
    return msgspec.structs.replace(rounds[-1].memory, peak_bytes=most)


def _energy(rounds: Sequence[Round], new_tokens: int, device: str) -> document.Energy | None:
    name = quoted(set.intersection(*(set(each.energy) for each in rounds)), device)
    if name is None:
        return None
    behind = new_tokens - rounds[0].first_text_tokens
    if behind < 1:
        return None
    prefill = [each.energy[name][0] for each in rounds]
    decode = [each.energy[name][1] for each in rounds]
    return document.Energy(
        source=name,
        prefill_j=figure(prefill),
        decode_j=figure(decode),
        decode_j_per_token=figure([each / behind for each in decode]),
    )
