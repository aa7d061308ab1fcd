"""Conditions and method as names and values, a value for each profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgellm.profiling.document import Conditions, Gauge, Profile
from edgellm.report.wording import count, listed, moment, number, percent, plain, seconds, size

Facts = list[tuple[str, list[str]]]
"""Names, and for each a value of every profile; an empty one where that does not say."""


def conditions(profiles: Sequence[Profile]) -> Facts:
    """On what was measured; what no profile says is left out."""
    details: dict[str, Callable[[Conditions], str]] = {
        "processor": lambda found: plain(found.cpu),
        "instructions": lambda found: plain(" ".join(found.cpu_features)),
        "physical cores": lambda found: str(found.physical_cores),
        "memory": lambda found: size(found.memory_bytes),
        "graphics": lambda found: listed([plain(gpu) for gpu in found.gpus]) or "none",
        "system": lambda found: plain(found.os),
        "virtual machine": lambda found: plain(found.virtual_machine),
        "threads": lambda found: plain(found.threads_pinned),
        "governor": lambda found: plain(found.governor),
        "power": lambda found: plain(found.power_source),
        "load before the first round": lambda found: _number(found.load_average),
        "load average": lambda found: _change(found, lambda gauge: _number(gauge.load_average)),
        "temperature": lambda found: _change(found, _temperature),
        "clock": lambda found: _change(found, _clock),
        "stolen time": _stolen,
        "slowed down for heat": _throttled,
        "memory bandwidth": lambda found: _rate(found.bandwidth_bytes_per_s, "B/s"),
    }
    facts = [
        (name, [detail(profile.conditions) for profile in profiles])
        for name, detail in details.items()
    ]
    facts.append(("best of this machine", [_limits(profile) for profile in profiles]))
    facts += _versions(profiles)
    unread = ["; ".join(map(plain, profile.conditions.unknown)) for profile in profiles]
    facts.append(("could not be read", [text or "nothing" for text in unread]))
    return [(name, values) for name, values in facts if any(values)]


def method(profiles: Sequence[Profile]) -> Facts:
    """How it was measured; what no profile says is left out."""
    details: dict[str, Callable[[Profile], str]] = {
        "command": lambda profile: plain(profile.method.command),
        "started": lambda profile: moment(profile.started),
        "took": lambda profile: seconds(profile.seconds),
        "rounds counted": lambda profile: str(profile.method.rounds),
        "rounds before, to warm up": lambda profile: str(profile.method.warmup_rounds),
        "time allowed": lambda profile: (
            "" if profile.method.budget_s is None else seconds(profile.method.budget_s)
        ),
        "order": lambda profile: (
            "cells take turns, round by round"
            if profile.method.interleaved
            else "one cell after another"
        ),
        "processes": lambda profile: (
            "start anew for each round"
            if not profile.method.stayed_loaded
            else f"stay loaded, started {profile.method.starts} times in turns"
            if profile.method.starts > 1
            else "stay loaded through all rounds"
        ),
        "next token": lambda profile: plain(profile.method.sampling),
        "prompt": lambda profile: plain(profile.method.prompt),
        "not counted": lambda profile: " ".join(map(plain, profile.method.not_counted)),
        "figures that there are not": _absent,
        "notes": lambda profile: "; ".join(map(plain, profile.notes)),
    }
    facts = [(name, [detail(profile) for profile in profiles]) for name, detail in details.items()]
    return [(name, values) for name, values in facts if any(values)]


def _absent(profile: Profile) -> str:
    """Which figures the cells' tasks have not, each reason once."""
    fields: dict[str, dict[str, None]] = {}
    for cell in profile.cells:
        for field, reason in cell.absent.items():
            fields.setdefault(reason, {})[field] = None
    return "; ".join(f"{', '.join(names)}: {plain(reason)}" for reason, names in fields.items())


def _change(found: Conditions, shown: Callable[[Gauge], str]) -> str:
    before, after = shown(found.before), shown(found.after)
    return f"{before} before, {after} after" if before and after else before or after


def _number(value: float | None) -> str:
    return "" if value is None else number(value, 2)


def _temperature(gauge: Gauge) -> str:
    return "" if gauge.temperature_c is None else f"{gauge.temperature_c:.0f} °C"


def _clock(gauge: Gauge) -> str:
    return "" if gauge.frequency_hz is None else f"{number(gauge.frequency_hz / 1e9, 2)} GHz"


def _stolen(found: Conditions) -> str:
    before, after = found.before, found.after
    if before.stolen_s is None or after.stolen_s is None:
        return ""
    stolen = max(0.0, after.stolen_s - before.stolen_s)
    if before.busy_s is None or after.busy_s is None:
        return f"{number(stolen, 1)} s"
    busy = after.busy_s - before.busy_s
    share = f", {percent(stolen / (busy + stolen))} of what was wanted" if busy + stolen > 0 else ""
    return f"{number(stolen, 1)} s{share}"


def _throttled(found: Conditions) -> str:
    before, after = found.before.throttled, found.after.throttled
    return "" if before is None or after is None else count(after - before, "time")


def _rate(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value / 1e9)} G{unit}"


def _limits(profile: Profile) -> str:
    return "; ".join(
        f"{count(limit.threads, 'thread')}: {_rate(limit.bandwidth_bytes_per_s, 'B/s')}, "
        f"{_rate(limit.flops_per_s, 'FLOP/s')}"
        for limit in profile.limits
    )


def _versions(profiles: Sequence[Profile]) -> Facts:
    """edgellm, Python and every library."""
    names = dict.fromkeys(
        name for profile in profiles for name in sorted(profile.conditions.versions)
    )
    return [
        ("edgellm", [plain(profile.edgellm) for profile in profiles]),
        ("Python", [plain(profile.conditions.python) for profile in profiles]),
        *(
            (plain(name), [plain(each.conditions.versions.get(name, "")) for each in profiles])
            for name in names
            if name != "edgellm"
        ),
    ]
