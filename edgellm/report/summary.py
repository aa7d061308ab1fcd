"""What the figures say, in plain sentences: no winner where the evidence does not name one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgellm.profiling.document import Figure, Profile
from edgellm.report.quantities import DECODE, FIRST_TOKEN, TEXTS, Quantity
from edgellm.report.rows import BETWEEN, Row, models, rows, several_machines
from edgellm.report.wording import (
    count,
    gathered,
    interval,
    listed,
    number,
    plain,
    seconds_of,
    size,
)

FEWEST_ROUNDS = 4
"""With fewer an interval is but the span of the samples, and names no winner."""

MOST_GROUPS = 4
"""So many models, each on each machine, have sentences of their own."""


@dataclass(frozen=True, slots=True)
class Sentence:
    """``text`` on one ``topic``; ``warns``: it says what is uncertain or went wrong."""

    topic: str
    text: str
    warns: bool = False


@dataclass(frozen=True, slots=True)
class Words:
    """How it is said who leads in a quantity."""

    topic: str
    alone: str
    superlative: str
    lead: str
    pace: str


LED = {
    DECODE: Words("Speed", "writes", "fastest", "writes fastest", "as fast"),
    TEXTS: Words("Speed", "reads", "fastest", "reads fastest", "as fast"),
    FIRST_TOKEN: Words(
        "First token",
        "gives the first token after",
        "first",
        "gives its first token soonest",
        "as long",
    ),
}
"""What the sentences are about."""


def summary(profiles: Sequence[Profile]) -> list[Sentence]:
    """Speed, first token, memory and quality, then failures, noise and what limits comparing."""
    found = rows(profiles)
    said: list[Sentence] = []
    groups = compared(found)
    for group in groups[:MOST_GROUPS]:
        named = names_of(group)
        said.append(Sentence("Compared", _setting(group, groups)))
        said += [
            _leading(group, named, quantity)
            for quantity in LED
            if any(quantity.of(row.cell) for row in group)
        ]
        said += _memory(group, named)
        said += [each for each in _quality(group) if each not in said]
    if not groups:
        said.append(Sentence("Nothing measured", "No cell has a speed.", warns=True))
    if len(groups) > MOST_GROUPS:
        text = f"{len(groups) - MOST_GROUPS} more such comparisons are left to the table of cells."
        said.append(Sentence("More", text))
    return [*said, *_machines(found), *_failed(found), *_noisy(found), *_limits(profiles, found)]


def compared(found: Sequence[Row]) -> list[list[Row]]:
    """Rows that can be compared, a list for each model on each machine.

    Of the lengths of prompt, answer and depth, and of texts at a time, these are the ones that most
    of them have.
    """
    groups: dict[tuple[str, str], dict[tuple[object, ...], list[Row]]] = {}
    for row in found:
        if any(each.of(row.cell) for each in LED) and not row.cell.failure:
            of_model = groups.setdefault((row.machine, row.cell.artifact.model_sha256), {})
            of_model.setdefault(row.asked, []).append(row)
    return [max(by_lengths.values(), key=len) for by_lengths in groups.values()]


def what_intervals_are(found: Sequence[Row]) -> str:
    """What stands in brackets beside a median, in words; few rounds give less than many."""
    enough = {row.cell.rounds >= FEWEST_ROUNDS for row in found if row.cell.rounds}
    sure, few = "where the median lies with 95 % confidence", "the least and the largest sample"
    if enough == {False}:
        return few
    return sure if False not in enough else f"{sure}; of fewer than {FEWEST_ROUNDS} rounds {few}"


def names_of(group: Sequence[Row]) -> dict[str, str]:
    """By label, the shortest name that tells a row from the others of ``group``, on one machine."""
    parts = [row.kind.split(BETWEEN) for row in group]
    if len({len(each) for each in parts}) == 1:
        # The artifact's name stays; of its settings those that are not the same in all.
        told = [
            len(set(column)) > 1 or not place
            for place, column in enumerate(zip(*parts, strict=True))
        ]
        parts = [[part for part, tells in zip(each, told, strict=True) if tells] for each in parts]
    kinds = [BETWEEN.join(each) for each in parts]
    return {
        row.label: kind if kinds.count(kind) == 1 else row.name
        for row, kind in zip(group, kinds, strict=True)
    }


def doubts(
    best: Row, rivals: Sequence[Row], named: dict[str, str], quantity: Quantity
) -> list[str]:
    """Why ``best`` cannot be called better than the ``rivals``; empty where it can."""
    figures = [quantity.of(row.cell) for row in (best, *rivals)]
    noisy = [row for row in (best, *rivals) if row.cell.noisy]
    found = []
    few = min(row.cell.rounds for row in (best, *rivals))
    if few < FEWEST_ROUNDS:
        found.append(f"{count(few, 'round')} {'are' if few != 1 else 'is'} too few to tell")
    top = figures[0]
    close = [
        named[row.label]
        for row, figure in zip(rivals, figures[1:], strict=True)
        if top and figure and _overlap(top, figure)
    ]
    if close and len(close) == len(rivals) > 1:
        found.append("its interval overlaps those of all others")
    elif close:
        found.append(f"its interval overlaps that of {listed(close)}")
    if len(noisy) > 1 and len(noisy) > len(rivals):
        found.append("both are noisy" if len(noisy) == 2 else f"all {len(noisy)} are noisy")
    elif noisy:
        verb = "are" if len(noisy) > 1 else "is"
        found.append(f"{listed([named[row.label] for row in noisy])} {verb} noisy")
    return found


def _leading(group: Sequence[Row], named: dict[str, str], quantity: Quantity) -> Sentence:
    """Who leads in ``quantity``, by how much, and whether that is certain."""
    measured = [(row, figure) for row in group if (figure := quantity.of(row.cell))]
    measured.sort(key=lambda pair: pair[1].median, reverse=quantity.more)
    (best, figure), rivals = measured[0], [row for row, _ in measured[1:]]
    words = LED[quantity]
    topic = words.topic
    name = named[best.label]
    if not rivals:
        noisy = "; the cell is noisy" if best.cell.noisy else ""
        return Sentence(
            topic, f"{name} {words.alone} {_shown(quantity, figure)}{noisy}.", bool(noisy)
        )
    why_not = doubts(best, rivals, named, quantity)
    second = measured[1][1]
    if why_not:
        return Sentence(
            topic,
            f"No one is named {words.superlative}: the best median is that of {name}, "
            f"{_shown(quantity, figure)}, but {listed(why_not)}. "
            f"Next: {named[rivals[0].label]} with {_shown(quantity, second)}.",
            warns=True,
        )
    worse, better = sorted((figure.median, second.median))
    times = f"{better / worse:.2f} times" if worse else "far"
    next_one = named[rivals[0].label]
    compared_to = (
        f"{times} {words.pace} as the next, {next_one} with {_shown(quantity, second)}"
        if quantity.more
        else f"the next, {next_one}, takes {times} {words.pace}, {_shown(quantity, second)}"
    )
    return Sentence(topic, f"{name} {words.lead}: {_shown(quantity, figure)}; {compared_to}.")


def _shown(quantity: Quantity, figure: Figure) -> str:
    if quantity.unit == "s":
        return seconds_of(figure)
    median, span = interval(figure)
    return f"{median} {quantity.unit} ({span})"


def _setting(group: Sequence[Row], groups: Sequence[Sequence[Row]]) -> str:
    """What the cells of ``group`` have in common; of the first one also what brackets mean."""
    prompt, new, depth = group[0].lengths
    batch = group[0].cell.settings.batch
    text = count(len(group), "cell")
    if len(models(each[0] for each in groups)) > 1:
        digest = group[0].cell.artifact.model_sha256[:8]
        text += f" of model {digest}" if digest else " of a model that no manifest names"
    if group[0].reads:
        text += f" with {count(batch, 'text')} of {count(prompt, 'token')} at a time"
    else:
        text += f" with {count(prompt, 'prompt token')} and {count(new, 'new token')}"
    if depth:
        text += f", behind {count(depth, 'token')} in the cache"
    if len({each[0].machine for each in groups}) > 1:
        text += f", on {group[0].machine}"
    if group is not groups[0]:
        return f"{text}."
    everywhere = [row for each in groups for row in each]
    return f"{text}. In brackets: {what_intervals_are(everywhere)}."


def _memory(group: Sequence[Row], named: dict[str, str]) -> list[Sentence]:
    taken = [(memory, row) for row in group if (memory := row.cell.memory)]
    if not taken:
        return []
    taken.sort(key=lambda pair: pair[0].peak_bytes)
    least, row = taken[0]
    text = f"{named[row.label]} takes {size(least.peak_bytes)} at its peak"
    if least.kv_bytes is not None:
        text += f", {size(least.kv_bytes)} of it for keys and values"
    if len(taken) > 1:
        most, other = taken[-1]
        text = (
            f"{named[row.label]} takes least at its peak, {size(least.peak_bytes)}; "
            f"{named[other.label]} most, {size(most.peak_bytes)}"
        )
    return [Sentence("Memory", f"{text} (one reading a cell, so without an interval).")]


def _quality(group: Sequence[Row]) -> list[Sentence]:
    """How near the artifacts' answers are to their source's; the machine does not matter."""
    rated = {
        plain(row.cell.artifact.name): kld
        for row in group
        if (kld := row.cell.artifact.kld_mean) is not None
    }
    if not rated:
        return []
    ranked = sorted(rated, key=lambda name: rated[name])
    nearest, furthest = ranked[0], ranked[-1]
    text = f"{nearest} is {number(rated[nearest])} nats (KL divergence) from its source's answers"
    if rated[furthest] > rated[nearest]:
        text = (
            f"{nearest} is nearest to its source's answers, KL divergence "
            f"{number(rated[nearest])} nats; {furthest} furthest, {number(rated[furthest])}"
        )
    return [Sentence("Quality", f"{text}.")]


def _machines(found: Sequence[Row]) -> list[Sentence]:
    """Which machine is fastest with an artifact that the most of them ran."""
    if not several_machines(found):
        return []
    shared: dict[tuple[str, tuple[object, ...]], dict[str, Row]] = {}
    for row in found:
        figure = _speed(row).of(row.cell)
        if figure is None or row.cell.failure:
            continue
        ran = shared.setdefault((row.cell.artifact.sha256, row.asked), {})
        known = ran.get(row.machine)
        before = _speed(known).of(known.cell) if known else None
        if before is None or figure.median > before.median:
            ran[row.machine] = row
    ran = max(shared.values(), key=len, default={})
    if len(ran) < 2:
        text = "The machines have no artifact and setting in common: nothing compares them."
        return [Sentence("Machines", text, warns=True)]
    chosen = list(ran.values())
    said = _leading(chosen, {row.label: row.machine for row in chosen}, _speed(chosen[0]))
    artifact = plain(chosen[0].cell.artifact.name)
    prompt = count(chosen[0].lengths[0], "prompt token")
    return [Sentence("Machines", f"With {artifact} and {prompt}: {said.text}", said.warns)]


def _speed(row: Row) -> Quantity:
    return TEXTS if row.reads else DECODE


def _failed(found: Sequence[Row]) -> list[Sentence]:
    failed = [row for row in found if row.cell.failure]
    if not failed:
        return []
    told = "; ".join(f"{row.label}: {_reason(row.cell.failure)}" for row in failed[:4])
    more = f"; and {len(failed) - 4} more in the table" if len(failed) > 4 else ""
    text = f"{len(failed)} of {count(len(found), 'cell')}. {told}{more}."
    return [Sentence("Failed", text, warns=True)]


def _noisy(found: Sequence[Row]) -> list[Sentence]:
    noisy = [row for row in found if row.cell.noisy]
    if not noisy:
        return []
    if len(noisy) > 4:
        told = "; ".join(gathered([each for row in noisy for each in row.cell.noisy]))
        told = told[0].upper() + told[1:]
    else:
        told = "; ".join(f"{row.label}: {', '.join(map(_reason, row.cell.noisy))}" for row in noisy)
    text = f"{len(noisy)} of {count(len(found), 'cell')} may mislead. {told}."
    return [Sentence("Noisy", text, warns=True)]


def _limits(profiles: Sequence[Profile], found: Sequence[Row]) -> list[Sentence]:
    """What stands in the way of comparing."""
    said = []
    known = models(found)
    if len(known) > 1:
        of = f"{len(known)} different models"
        if "" in known:
            of = "models of which some are not known"
        text = f"The artifacts are made of {of}: speeds of unlike models are no race."
        said.append(Sentence("Unlike models", text, warns=True))
    for what, versions in _versions(profiles):
        text = f"{what}: {listed(versions)}. A difference may be the version's."
        said.append(Sentence("Unlike versions", text, warns=True))
    if any(profile.interrupted for profile in profiles):
        text = "Measuring was stopped early; this is what was done by then."
        said.append(Sentence("Interrupted", text, warns=True))
    return said


def _versions(profiles: Sequence[Profile]) -> list[tuple[str, list[str]]]:
    """edgellm and each runtime, where they were not of one version throughout."""
    used = [("edgellm", profile.edgellm) for profile in profiles]
    used += [
        (cell.settings.runtime, cell.runtime_version)
        for profile in profiles
        for cell in profile.cells
        if cell.runtime_version
    ]
    met: dict[str, list[str]] = {}
    for what, version in dict.fromkeys(used):
        met.setdefault(plain(what), []).append(plain(version))
    return [(what, versions) for what, versions in met.items() if len(versions) > 1]


def _overlap(one: Figure, other: Figure) -> bool:
    return one.low <= other.high and other.low <= one.high


def _reason(text: str) -> str:
    return plain(text).rstrip(".")
