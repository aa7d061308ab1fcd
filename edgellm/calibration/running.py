"""A calibrated conversion block by block: statistics, transforms, solving, writing, journal."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgellm import registry
from edgellm.architectures.experts import stack_of
from edgellm.calibration.blocks import Block, grids_by_role, heads_among, statistics_of
from edgellm.calibration.cost import solving_slabs
from edgellm.calibration.planning import Calibration
from edgellm.calibration.routing import FEW_TOKENS
from edgellm.calibration.splitting import Splitting
from edgellm.calibration.stored_layers import as_stored
from edgellm.hardware import peak_memory_bytes
from edgellm.parallel import in_parallel
from edgellm.progress import Progress, ProgressEvent
from edgellm.quant import SOLVERS, coupled
from edgellm.quant.devices import choose, torch_name
from edgellm.quant.factor import factor_of
from edgellm.quant.rtn import solve as round_plainly
from edgellm.quant.statistics import Statistics
from edgellm.slabs import Slab, Solve, Written, expert_in, slabs_of, write_slab
from edgellm.source.matching import listed
from edgellm.tensors import Array

if TYPE_CHECKING:
    from edgellm.calibration.passes import CalibrationPass
    from edgellm.export.writer import StagedFolder
    from edgellm.plan import Plan
    from edgellm.tune.coupling import RowCoupling

SAVE_SECONDS = 60.0
"""Hidden states that are in memory are saved when the last time is longer ago: what a killed run
loses at most, beside the layer that it was at."""

TOKENS = "tokens/"
"""Before the role, the name under which it is kept how many tokens an expert's weight was given."""

READING_SHARE = 0.6
"""Of the time that a layer takes, roughly, for the text to be read."""


@dataclass
class Outcome:
    """What became of the blocks: ``notes`` for people, ``measured`` for the manifest.

    ``importance`` is by role what was found of the weights' inputs, before any transform,
    ``tokens`` how many tokens an expert's weight was given.
    """

    notes: list[str] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    importance: dict[str, Array] = field(default_factory=dict)
    tokens: dict[str, Array] = field(default_factory=dict)


def round_in_blocks(
    plan: Plan,
    calibration: Calibration,
    staged: StagedFolder,
    progress: Progress,
    coupling: RowCoupling | None = None,
) -> Outcome:
    """Write every tensor of ``plan``: first what has no statistics, then layer by layer, the head.

    ``coupling``: how rows are to be solved together, by ``gptq``.

    Goes on from what the journal of ``staged`` has. Raises what loading, computing and solving
    raise; errors name the tensor or the layer.
    """
    return _Run(plan, calibration, staged, progress, coupling).run()


class _Run:
    def __init__(
        self,
        plan: Plan,
        calibration: Calibration,
        staged: StagedFolder,
        progress: Progress,
        coupling: RowCoupling | None,
    ) -> None:
        self.plan, self.calibration, self.staged = plan, calibration, staged
        self.progress, self.coupling = progress, coupling
        self.tensors = plan.layout.tensors
        self.solve: Solve = registry.attribute(SOLVERS[plan.recipe.solver].attribute)
        self.torch_device = torch_name(plan.recipe.device)
        if self.torch_device is not None:
            self.solve = partial(self.solve, torch_device=self.torch_device)
        decoder = plan.source.decoder
        self.layers = len(decoder.layers)
        self.heads = heads_among(self.tensors, tied=decoder.tied_head)
        self.grids = grids_by_role(self.tensors, tied=decoder.tied_head)
        self.entries = {
            entry["block"]: entry for entry in staged.journal.entries() if "block" in entry
        }
        self.resumed_after = len(self.entries)
        self.saved_file: str | None = None
        self.saved_at = time.monotonic()
        self.spent = {"statistics_s": 0.0, "solving_s": 0.0}
        self.steps = sum(block.name not in self.entries for block in calibration.blocks)
        self.steps_done = 0
        self.started = time.monotonic()

    def run(self) -> Outcome:
        blocks = {block.unit: block for block in self.calibration.blocks}
        if None in blocks and blocks[None].name not in self.entries:
            self._say(blocks[None], "")
            written = self._write(blocks[None], {})
            self._finish(blocks[None], written, {})
        if self.calibration.given is not None:
            self._round_by_given(blocks, self.calibration.given.statistics)
            return self._outcome()
        left = [
            unit
            for unit, block in blocks.items()
            if unit is not None and block.name not in self.entries
        ]
        if left:
            self._read_layers(blocks, max(left))
        return self._outcome()

    def _round_by_given(
        self, blocks: Mapping[int | None, Block], found: Mapping[str, Statistics]
    ) -> None:
        for unit, block in blocks.items():
            if unit is not None and block.name not in self.entries:
                self._say(block, "")
                self._finish(block, self._write(block, found), found)

    def _read_layers(self, blocks: Mapping[int | None, Block], last: int) -> None:
        """The layers up to ``last``, which stands for the head where it is one more."""
        from edgellm.calibration.passes import CalibrationPass  # brings onnx with it

        calibration, folding = self.calibration, self.calibration.folding
        assert calibration.text is not None
        reading = CalibrationPass(
            calibration.source,
            calibration.text.windows,
            threads=self.plan.threads,
            spool=self.staged.journal.folder,
            importance_only=calibration.needs != "hessian",
            weighs=calibration.weighs,
            layers=calibration.layers,
        )
        rounded = None
        if calibration.follows:
            rounded = as_stored(calibration.source, self.plan.layout, self.staged.path)
        self._place(reading)
        for unit in range(last + 1):
            block = blocks.get(unit)
            wanted = block is not None and block.name not in self.entries
            if not wanted:
                if folding is not None and block is not None:
                    with np.load(self._factors(unit)) as factors:
                        folding.restore(unit, dict(factors))
                if reading.next_layer == unit and unit < self.layers:
                    reading.pass_by(unit)
                    if rounded is not None:
                        reading.follow(unit, rounded)
                continue
            assert block is not None
            begun = time.perf_counter()
            found = self._statistics(reading, block, unit)
            self._keep(self._importance(unit), kept_importance(found))
            if folding is not None:
                found = folding.fill_layer(unit, found, self.grids, self.plan.threads)
                self._keep(self._factors(unit), folding.factors(unit))
            read = time.perf_counter()
            written = self._write(block, found)
            solved = time.perf_counter()
            if rounded is not None and unit < self.layers:
                reading.follow(unit, rounded)
            followed = time.perf_counter()
            self.spent["statistics_s"] += read - begun + followed - solved
            self.spent["solving_s"] += solved - read
            self._finish(block, written, found, reading)
            # With the factors that were made of them, before the next layer has its own.
            del found

    def _place(self, reading: CalibrationPass) -> None:
        """Put the pass where an earlier run saved its hidden states, else at the beginning."""
        saved = [entry for entry in self.entries.values() if "stream" in entry]
        if saved:
            self.saved_file = saved[-1]["stream"]
            file = self.staged.journal.folder / saved[-1]["stream"]
            reading.resume(saved[-1]["layer"], file)
        else:
            reading.begin()

    def _statistics(
        self, reading: CalibrationPass, block: Block, unit: int
    ) -> dict[str, Statistics]:
        def watch(share: float) -> None:
            self._say(block, f"reads the text, {share:.0%}", share * READING_SHARE)

        if unit < self.layers:
            return reading.layer(unit, watch)
        roles = {
            part.role
            for place in self.heads
            for part in self.tensors[place].parts
            if self.tensors[place].grid.kind != "float"
        }
        if not roles:
            return {}
        return dict.fromkeys(roles, reading.head(watch))

    def _write(self, block: Block, found: Mapping[str, Statistics]) -> list[Written]:
        """Solve and write the tensors of ``block``, those that take longest first."""
        known = {place: self._known(place, found) for place in block.tensors}

        def work(slab: Slab) -> Written:
            tensor = self.tensors[slab.tensor]
            statistics = known[slab.tensor][expert_in(tensor, slab)]
            solve = self._solver(slab) if statistics is not None else round_plainly
            return write_slab(tensor, slab, solve, self.staged, statistics, self.torch_device)

        order = sorted(known, key=lambda place: (-self.tensors[place].columns, place))
        most_bytes, workers = solving_slabs(self.plan.threads, self.torch_device is not None)
        slabs = slabs_of(self.tensors, order, most_bytes)
        results = []
        for result in in_parallel(work, slabs, workers):
            results.append(result)
            if len(slabs) > len(order):  # a large block
                share = READING_SHARE + (1 - READING_SHARE) * len(results) / len(slabs)
                self._say(block, f"solved {len(results)}/{len(slabs)}", share)
        return results

    def _solver(self, slab: Slab) -> Solve:
        """That of the plan; of rows that are coupled, ``coupled.solve``."""
        if self.coupling is None:
            return self.solve
        hessian = self.coupling.of(self.tensors[slab.tensor], slab.start, slab.stop)
        if hessian is None:
            return self.solve
        return partial(coupled.solve, torch_device=self.torch_device, output_hessian=hessian)

    def _known(self, place: int, found: Mapping[str, Statistics]) -> tuple[Statistics | None, ...]:
        """Of what each expert of a stack is given, or what any other tensor is."""
        tensor = self.tensors[place]
        if tensor.parts[0].role == "token_embd.weight" and place not in self.heads:
            return (None,)
        return tuple(statistics_of(tensor, found, expert) for expert in range(tensor.experts))

    def _finish(
        self,
        block: Block,
        written: list[Written],
        found: Mapping[str, Statistics],
        reading: CalibrationPass | None = None,
    ) -> None:
        """Bring the block to the disk, and say so in the journal."""
        sums: dict[str, list[float]] = {}
        # Slabs come as they are finished; their sums must not depend on that.
        for each in sorted(written, key=lambda each: (each.slab.tensor, each.slab.start)):
            if each.power:
                total = sums.setdefault(self.tensors[each.slab.tensor].name, [0.0, 0.0])
                total[0] += each.error
                total[1] += each.power
        entry: dict[str, Any] = {
            "block": block.name,
            "errors": sums,
            "notes": [*self._damped(found), *hardly_reached(found)],
        }
        self.staged.flush()
        outdated = self.saved_file
        if reading is not None and reading.next_layer < self.layers:
            entry |= self._save(reading)
        self.staged.note(entry)
        if outdated and outdated != self.saved_file and reading and reading.stream.file is None:
            (self.staged.journal.folder / outdated).unlink(missing_ok=True)
        self.entries[block.name] = entry
        self.steps_done += 1
        off = relative_error(sums.values())
        said = "" if off is None else f"output error {off:.1%}, "
        self._say(block, f"{said}memory {peak_memory_bytes() / 1e6:.0f} MB")

    def _save(self, reading: CalibrationPass) -> dict[str, Any]:
        """Keep the hidden states before the next layer, if it is time; what the journal says."""
        if reading.stream.file is None:
            if time.monotonic() - self.saved_at < SAVE_SECONDS:
                return {}
            self.saved_at = time.monotonic()
        self.saved_file = reading.save(self.staged.journal.folder).name
        return {"stream": self.saved_file, "layer": reading.next_layer}

    def _damped(self, found: Mapping[str, Statistics]) -> list[str]:
        """A line for each input whose Hessian took more damping than usual."""
        if SOLVERS[self.plan.recipe.solver].needs != "hessian":
            return []
        notes = []
        for statistics in {id(each): each for each in found.values()}.values():
            roles = [role for role, each in found.items() if each is statistics]
            if not any(self.grids[role].kind != "float" for role in roles if role in self.grids):
                continue
            factor = factor_of(statistics)
            if factor.raised:
                notes.append(
                    f"the Hessian of the input of {', '.join(roles)} is singular: "
                    f"{factor.damping:g} of its mean diagonal was added"
                )
        return notes

    def _factors(self, unit: int) -> Path:
        return self.staged.journal.folder / f"factors-{unit}.npz"

    def _importance(self, unit: int) -> Path:
        return self.staged.journal.folder / f"importance-{unit}.npz"

    def _keep(self, path: Path, values: Mapping[str, Array]) -> None:
        """Bring ``values`` to the disk, for a run that goes on after this one."""
        arrays: dict[str, Any] = dict(values)
        with path.open("wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())

    def _say(self, block: Block, what: str, share: float = 0.0) -> None:
        """Tell who watches; of blocks those that this run has to do are counted.

        ``share`` of this one is done.
        """
        item = f"{block.name}: {what}" if what else block.name
        done = self.steps_done + share
        left = (time.monotonic() - self.started) * (self.steps / done - 1) if done >= 1 else None
        self.progress(
            ProgressEvent("calibrate", item, 0, 0, self.steps_done, self.steps, seconds_left=left)
        )

    def _outcome(self) -> Outcome:
        outcome = Outcome()
        for unit in range(self.layers + 1):
            if self._importance(unit).exists():
                with np.load(self._importance(unit)) as kept:
                    for name, values in kept.items():
                        role = name.removeprefix(TOKENS)
                        (outcome.importance if role == name else outcome.tokens)[role] = values
        errors: dict[str, float | None] = {}
        by_block: dict[str, float | None] = {}
        for block in self.calibration.blocks:
            entry = self.entries[block.name]
            outcome.notes += entry["notes"]
            if entry["errors"]:
                by_block[block.name] = relative_error(entry["errors"].values())
                errors |= {name: relative_error([sums]) for name, sums in entry["errors"].items()}
        outcome.measured = {
            "output_error_by_block": by_block,
            "output_error_by_tensor": errors,
            "resumed_after_blocks": self.resumed_after,
            **{name: round(seconds, 3) for name, seconds in self.spent.items()},
        }
        if isinstance(splitting := self.calibration.folding, Splitting):
            for unit in range(self.layers + 1):
                if self._factors(unit).exists():  # of blocks that a run before this one did, too
                    with np.load(self._factors(unit)) as kept:
                        splitting.restore(unit, dict(kept))
            outcome.measured["outliers"] = splitting.figures()
        if self.torch_device is not None:
            outcome.measured["device"] = choose(self.plan.recipe.device).title
        return outcome


def kept_importance(found: Mapping[str, Statistics]) -> dict[str, Array]:
    """Importance by role, and below ``TOKENS`` what each expert's is the mean of."""
    importance = {role: statistics.mean_squares for role, statistics in found.items()}
    tokens = {
        TOKENS + role: np.asarray(0 if each.instead else each.tokens, np.float32)
        for role, each in found.items()
        if stack_of(role)
    }
    return importance | tokens


def hardly_reached(found: Mapping[str, Statistics]) -> list[str]:
    """A line for each way in which experts were rounded that the text says too little of."""
    roles: dict[str, list[str]] = {}
    for role, statistics in found.items():
        if statistics.instead:
            roles.setdefault(statistics.instead, []).append(role)
    return [
        f"fewer than {FEW_TOKENS} tokens of the calibration text reached {listed(names)}: rounded "
        f"{instead}"
        for instead, names in roles.items()
    ]


def relative_error(sums: Iterable[Sequence[float]]) -> float | None:
    """The norm of what outputs are off by, by that of the outputs, of ``[error, power]`` sums."""
    pairs = list(sums)
    error = math.fsum(each[0] for each in pairs)
    power = math.fsum(each[1] for each in pairs)
    return math.sqrt(error / power) if power > 0 else None
