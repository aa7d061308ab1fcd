"""What a round took of each of the machine's counters of energy, and why one is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgellm.errors import GenerationError

if TYPE_CHECKING:
    from edgellm.profiling.energy import Counter

LEAST_STEPS = 20
"""Of a counter: less energy than so many of them is told with an error of more than 5 %."""


class EnergyMeter:
    """The counters of this machine, read at the ``begin``, the middle and the end of a round."""

    def __init__(self) -> None:
        from edgellm.profiling.energy import counters

        self._counters: Sequence[Counter] = counters()[0]
        self._silent: dict[str, str] = {}
        self._begun: dict[str, float] = {}
        self._middle: dict[str, float] = {}

    def begin(self) -> None:
        """A round begins; its middle is here until it is elsewhere."""
        self._silent = {}
        self._begun = self._middle = self._read()

    def halfway(self) -> None:
        """The prompt's part of the round is over."""
        self._middle = self._read()

    def spent(self) -> tuple[dict[str, tuple[float, float]], tuple[str, ...]]:
        """Joules by counter, before the middle and behind it; why other counters are left out."""
        ended = self._read()
        for counter in self._counters:
            name, least_j = counter.name, LEAST_STEPS * (counter.step_j or 0.0)
            if name not in self._silent and ended[name] - self._begun[name] < least_j:
                self._silent[name] = (
                    f"{name}: a round takes less than the {least_j:g} J that it can tell: ask for "
                    "more tokens"
                )
        energy = {
            name: (self._middle[name] - self._begun[name], end - self._middle[name])
            for name, end in ended.items()
            if name not in self._silent
        }
        return energy, tuple(self._silent.values())

    def _read(self) -> dict[str, float]:
        """What the counters say now; one that says no more is put aside, with why."""
        found = {}
        for counter in self._counters:
            try:
                found[counter.name] = counter.read_j()
            except GenerationError as error:
                self._silent[counter.name] = str(error)
        return found
