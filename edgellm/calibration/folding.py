"""A source whose coupled tensors are scaled when they are loaded, once their factors are known.

How a conversion uses it::

    source, folding = folded_source(source, search)                # lay this source out
    for index in range(folding.units):                             # the layers, then the head
        statistics = folding.fill_layer(index, statistics_of_inputs, grids_by_role, threads)
        ...                                                        # load, solve, write the tensors

``statistics_of_inputs`` come from the original source (``folding.original``), by the roles of its
weights; what ``fill_layer`` gives back is of the scaled inputs and goes to the solver. A tensor
whose ``folding.unit_of(role)`` is not None must not be loaded before that unit was filled, a norm
as little as a weight: it raises. A conversion that resumes restores ``folding.factors(index)``, as
they were recorded, with ``folding.restore``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from edgellm.architectures.couplings import Absorber, Coupling, couplings, left_out
from edgellm.errors import TensorError
from edgellm.parallel import in_parallel
from edgellm.quant.grid import Grid
from edgellm.quant.scaling import Scaling, Search, Weight, unscaled
from edgellm.quant.statistics import Statistics
from edgellm.source.model import ModelSource
from edgellm.tensors import Array, TensorRef

MOST_WEIGHTS = 24
"""Of weights that share an input a search looks at so many, spread over all: experts are many."""


@dataclass
class Folding:
    """The factors of every coupling of ``original``, unit by unit: layers from 0 on, then the head.

    ``corrected`` is what ``Search`` is told of the solver. ``scalings`` keeps what the searches
    found, by ``Coupling.key``.
    """

    original: ModelSource
    search: Search
    coupled: tuple[Coupling, ...]
    corrected: bool = False
    scalings: dict[str, Scaling] = field(default_factory=dict)
    _touching: dict[str, list[Coupling]] = field(default_factory=dict, init=False, repr=False)

    @property
    def units(self) -> int:
        """How many times to call ``fill_layer``: once a layer, and once for the head."""
        return len(self.original.decoder.layers) + 1

    def unit_of(self, role: str) -> int | None:
        """The unit that must be filled before tensor ``role`` is loaded; None where none must."""
        return next((each.layer for each in self._by_role().get(role, [])), None)

    def fill_layer(
        self,
        index: int,
        statistics: Mapping[str, Statistics],
        grids: Mapping[str, Grid],
        threads: int = 1,
    ) -> dict[str, Statistics]:
        """Search the factors of unit ``index``; returns ``statistics`` of the scaled inputs.

        ``statistics`` and ``grids`` are by role of the weight. Weights that share an input share
        one object, before and after. An input without statistics keeps its scale, as ``scalings``
        then says. Raises ``TensorError`` as loading does, and for factors that are not finite.
        """

        def work(coupling: Coupling) -> tuple[Coupling, Scaling]:
            return coupling, self._searched(coupling, statistics, grids)

        for coupling, scaling in in_parallel(work, self._of(index), threads):
            self._keep(coupling, scaling)
        folded = dict(statistics)
        for coupling in self._of(index):
            known = [role for role in coupling.consumers if role in statistics]
            made: dict[int, Statistics] = {}
            for role in known:  # experts have statistics of their own, of a part of the tokens
                given = statistics[role]
                if id(given) not in made:
                    made[id(given)] = folded_statistics(given, self._columns_of(coupling))
                folded[role] = made[id(given)]
        return folded

    def factors(self, index: int) -> dict[str, Array]:
        """The factors of unit ``index`` by ``Coupling.name``, to be recorded for ``restore``."""
        return {each.name: self.scalings[each.key].factors for each in self._of(index)}

    def restore(self, index: int, factors: Mapping[str, Array]) -> None:
        """Fill unit ``index`` with factors that were searched before."""
        for coupling in self._of(index):
            self._keep(coupling, Scaling(np.asarray(factors[coupling.name], np.float32)))

    def row_divisors(self, role: str, rows: int) -> Array | None:
        """What the ``rows`` rows of weight ``role`` are divided by, ``[rows]``; None if by nothing.

        Its unit must have been filled.
        """
        found = None
        for coupling in self._by_role().get(role, []):
            for absorber in coupling.absorbers:
                if absorber.role == role:
                    found = np.ones(rows, np.float32) if found is None else found
                    found[absorber.places(coupling.channels)] *= self._factors_of(coupling)
        return found

    def _by_role(self) -> dict[str, list[Coupling]]:
        """The couplings of every role that has some; thousands where there are experts."""
        if not self._touching:
            for coupling in self.coupled:
                for role in roles_of(coupling):
                    self._touching.setdefault(role, []).append(coupling)
        return self._touching

    def _of(self, index: int) -> list[Coupling]:
        return [each for each in self.coupled if each.layer == index]

    def _searched(
        self,
        coupling: Coupling,
        statistics: Mapping[str, Statistics],
        grids: Mapping[str, Grid],
    ) -> Scaling:
        inputs = next((statistics[role] for role in coupling.consumers if role in statistics), None)
        if inputs is None:
            return unscaled(coupling, "no statistics of its input")
        weights = [
            Weight(self.original.tensors[role], grids[role])
            for role in coupling.consumers
            if grids[role].kind != "float"
        ]
        weights = weights[:: -(-len(weights) // MOST_WEIGHTS)] if weights else weights
        if not weights:
            return unscaled(coupling, "its weights stay floats")
        return self.search(weights, inputs, coupling, corrected=self.corrected)

    def _keep(self, coupling: Coupling, scaling: Scaling) -> None:
        factors = scaling.factors
        if factors.shape != (coupling.channels,):
            raise AssertionError(f"{coupling.key} has {coupling.channels} channels")
        if not (np.isfinite(factors).all() and (factors > 0).all()):
            raise TensorError(
                f"the factors found for the input of {', '.join(coupling.consumers)} are not all "
                "positive and finite: calibrate with more or other text, or convert without a "
                "transform"
            )
        self.scalings[coupling.key] = scaling

    def _factors_of(self, coupling: Coupling) -> Array:
        if coupling.key not in self.scalings:
            raise AssertionError(
                f"a tensor of unit {coupling.layer} was loaded before the factors of "
                f"{coupling.name} were there: call fill_layer({coupling.layer}, ...) first"
            )
        return self.scalings[coupling.key].factors

    def _columns_of(self, coupling: Coupling) -> Array:
        return coupling.spread(self._factors_of(coupling))

    # --- tensors ---------------------------------------------------------------------------------

    def folded(self, role: str, ref: TensorRef) -> TensorRef:
        """``ref`` scaled by all couplings that it is part of; itself where there are none."""
        touching = self._by_role().get(role, [])
        consumed = [each for each in touching if role in each.consumers]
        absorbing = [
            (each, absorber)
            for each in touching
            for absorber in each.absorbers
            if absorber.role == role
        ]
        if not consumed and not absorbing:
            return ref

        def load_rows(start: int, stop: int) -> Array:
            rows = ref.load_rows(start, stop)
            for coupling in consumed:
                rows *= self._columns_of(coupling)
            for coupling, absorber in absorbing:
                _absorb(rows, start, len(ref.shape) == 1, absorber, self._factors_of(coupling))
            return rows

        return replace(ref, load_rows=load_rows, column_loader=None)


def folded_source(
    source: ModelSource, search: Search, *, corrected: bool = False
) -> tuple[ModelSource, Folding]:
    """``source`` with its coupled tensors scaled by factors that ``search`` finds later."""
    folding = Folding(source, search, couplings(source.decoder), corrected)
    tensors = {role: folding.folded(role, ref) for role, ref in source.tensors.items()}
    reasons = left_out(source.decoder)
    if source.decoder.tied_head:
        reasons.pop("output")  # so it is in every such model
    notes = [f"{part} keeps the scale of its input: {why}" for part, why in reasons.items()]
    return replace(source, tensors=tensors, notes=(*source.notes, *notes)), folding


def folded_statistics(statistics: Statistics, columns: Array) -> Statistics:
    """Of inputs divided by ``columns`` ``[in]``: ``D^-1 H D^-1`` for the Hessian."""
    inverse = np.float32(1) / columns
    hessian = statistics.hessian * inverse
    hessian *= inverse if hessian.ndim == 1 else inverse[:, None]
    squares = statistics.mean_squares * np.square(inverse)
    largest = statistics.largest * inverse
    return replace(statistics, hessian=hessian, largest=largest, squares=squares)


def roles_of(coupling: Coupling) -> tuple[str, ...]:
    """Every tensor that the factors change."""
    return (*coupling.consumers, *(absorber.role for absorber in coupling.absorbers))


def _absorb(rows: Array, start: int, vector: bool, absorber: Absorber, factors: Array) -> None:
    """Divide in place what ``rows`` (from row ``start`` of the tensor on) hold of the absorber."""
    places = absorber.places(len(factors))
    if vector:
        values = rows[0, places]
        values += np.float32(absorber.offset)
        values /= factors
        rows[0, places] = values - np.float32(absorber.offset)
        return
    low, high = np.searchsorted(places, (start, start + len(rows)))
    rows[places[low:high] - start] /= factors[low:high, None]
