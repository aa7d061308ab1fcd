"""What a combination needs, checked before a tensor is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

from edgellm import registry
from edgellm.errors import UsageError
from edgellm.lora.combine.methods import METHODS, Method
from edgellm.lora.combine.ties import Sign

if TYPE_CHECKING:
    from edgellm.lora.binding import Combination


def check(combination: Combination, weights: Sequence[float]) -> tuple[str, ...]:
    """Facts that the user should be shown about ``weights`` combined so; one weight an adapter.

    Raises ``UsageError`` for what the method cannot do, lacks or would ignore.
    """
    method = method_named(combination.method)
    _check_weights(combination.method, method, weights)
    _check_density(combination, method)
    if combination.sign not in get_args(Sign):
        raise UsageError(
            f"signs cannot be elected by {combination.sign!r}: choose {' or '.join(get_args(Sign))}"
        )
    if combination.sign != "total" and not method.elect:
        raise UsageError(
            f"{combination.method} elects no signs, so electing them by {combination.sign} would "
            f"change nothing: leave it out, or choose {_names(lambda row: row.elect)}"
        )
    if combination.rank is not None and not method.truncate:
        raise UsageError(
            f"{combination.method} does not cut to a rank, got rank {combination.rank}: leave it "
            f"out, or choose {_names(lambda row: row.truncate)}"
        )
    if combination.rank is not None and combination.rank < 1:
        raise UsageError(f"the rank of a combination must be 1 or more, got {combination.rank}")
    if len(weights) == 1 and combination.method != "cat":
        return (
            f"one adapter has nothing to be combined with: it is merged as it is, without "
            f"{combination.method}, as PEFT does",
        )
    return ()


def settled(combination: Combination, configs: Sequence[Mapping[str, Any]]) -> Combination:
    """``combination`` with the rank that PEFT gives the SVD methods where none was asked for.

    It is the largest that any adapter's config has, of whatever weight (``add_weighted_adapter``);
    configs without a rank (``r``) do not count.
    """
    if combination.rank is not None or not method_named(combination.method).truncate:
        return combination
    ranks = [
        max([int(config["r"]), *_ranks(config.get("rank_pattern"))])
        for config in configs
        if config.get("r")
    ]
    return replace(combination, rank=max(ranks)) if ranks else combination


def method_named(name: str) -> Method:
    """The row of ``METHODS``. Raises ``UsageError`` with the nearest names."""
    if name not in METHODS:
        raise UsageError(
            f"no way to combine adapters is named {name!r}: {registry.suggestion(name, METHODS)}"
        )
    return METHODS[name]


def _ranks(pattern: Any) -> list[int]:
    """Those of a ``rank_pattern``; AdaLoRA's holds masks instead."""
    values = pattern.values() if isinstance(pattern, Mapping) else ()
    return [value for value in values if isinstance(value, int)]


def _check_weights(name: str, method: Method, weights: Sequence[float]) -> None:
    if not weights:
        raise UsageError(f"{name} needs at least one adapter, got none: name one with --adapter")
    for weight in weights:
        if not math.isfinite(weight) or not weight:
            raise UsageError(
                f"an adapter's weight must be a finite number other than 0, got {weight}"
            )
    if method.elect and len({weight > 0 for weight in weights}) > 1:
        # PEFT computes it all the same: it elects before it weights.
        raise UsageError(
            f"{name} keeps what the adapters agree on, judged before their weights count, so "
            f"weights of opposite sign ({', '.join(f'{weight:g}' for weight in weights)}) would "
            "subtract an adapter exactly where it agrees with the others: give all weights one "
            "sign, or choose cat, the exact sum"
        )


def _check_density(combination: Combination, method: Method) -> None:
    name, density = combination.method, combination.density
    if method.prune is None:
        if density is not None:
            raise UsageError(
                f"{name} prunes nothing, got density {density:g}: leave it out, or choose "
                f"{_names(lambda row: row.prune is not None)}"
            )
        return
    if density is None:
        typical = 0.2 if method.prune == "magnitude" else 0.5
        raise UsageError(
            f"{name} needs a density, the share of values that is kept: more than 0, at most 1 "
            f"(say --density {typical})"
        )
    if not 0 < density <= 1:
        raise UsageError(
            f"{name} keeps a share of the values that is more than 0 and at most 1, got density "
            f"{density:g}: choose one between"
        )


def _names(wanted: Callable[[Method], bool]) -> str:
    return ", ".join(name for name, row in METHODS.items() if wanted(row))
