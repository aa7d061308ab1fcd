"""A cell's rounds summed up, and what of one cell can be said against another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from edgellm.profiling import document
from edgellm.profiling.energy import quoted
from edgellm.profiling.gauges import during, noise
from edgellm.profiling.intervals import distribution, figure, ratio
from edgellm.profiling.roofline import roofline

if TYPE_CHECKING:
    from edgellm.profiling.measuring import Running
    from edgellm.profiling.worker import Round

COMPARED: dict[str, Literal["higher", "lower"]] = {
    "time_to_first_token_s": "lower",
    "prefill_tokens_per_s": "higher",
    "decode_tokens_per_s": "higher",
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
        prompt_tokens=wanted.prompt_tokens,
        new_tokens=wanted.new_tokens,
        depth_tokens=wanted.depth_tokens,
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

    def over(value: Callable[[Round], float]) -> document.Figure:
        return figure([value(each) for each in rounds])

    decode = over(_decode_speed) if wanted.new_tokens > 1 else None
    prefill = over(lambda each: wanted.prompt_tokens / each.prefill_s)
    memory = _memory(rounds)
    limit = next((each for each in limits if each.threads == (wanted.threads or cores)), None)
    took: dict[str, Any] = {
        "own_cpu_s": sum(each.cpu_s for each in rounds),
        "seconds": sum(each.seconds for each in rounds),
        "cores": cores,
    }
    return document.Cell(
        name=cell.name,
        artifact=cell.facts,
        settings=settings,
        runtime_version=wanted.runtime_version,
        failure=cell.failure,
        rounds=len(rounds),
        warmup_rounds=warmup_rounds,
        load_s=figure(cell.loads_s),
        tokenization_s=over(lambda each: each.tokenization_s),
        time_to_first_token_s=over(lambda each: each.first_token_s),
        prefill_tokens_per_s=prefill,
        inter_token_latency_s=(
            distribution([one for each in rounds for one in each.latencies_s]) if decode else None
        ),
        decode_tokens_per_s=decode,
        end_to_end_s=over(lambda each: each.end_to_end_s),
        sampling_s=over(lambda each: each.sampling_s),
        detokenization_s=over(lambda each: each.detokenization_s),
        cpu_s=over(lambda each: each.cpu_s),
        memory=memory,
        energy=_energy(rounds, wanted.new_tokens, settings.device),
        roofline=roofline(cell.facts, settings, memory.kv_bytes, decode, prefill, limit),
        during=during(cell.gauges, **took),
        noisy=noise(cell.gauges, **took),
        text_sha256=rounds[-1].text_sha256,
    )


def ratios(cells: Iterable[document.Cell]) -> tuple[document.Ratio, ...]:
    """Each cell against those before it that were asked the same, in what both have.

    Pairs are samples of one round, so only rounds that both were measured in count. Of more than
    ``MOST_PAIRED`` cells that were asked the same, each is compared with the first alone.
    """
    groups: dict[tuple[int, int, int], list[document.Cell]] = {}
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


def _asked(cell: document.Cell) -> tuple[int, int, int]:
    asked = cell.settings
    return (asked.prompt_tokens, asked.new_tokens, asked.depth_tokens)


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
    return len(each.latencies_s) / sum(each.latencies_s)


def _memory(rounds: Sequence[Round]) -> document.Memory:
    last = rounds[-1]
    return document.Memory(
        peak_bytes=max(each.peak_bytes for each in rounds),
        steady_bytes=last.steady_bytes,
        steady_shared_bytes=last.steady_shared_bytes,
        device_bytes=last.device_bytes,
        kv_bytes=last.kv_bytes,
    )


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
