"""One source converted on several grids, each compared with it: what a byte buys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec

from edgellm.budget.chart import Drawing, Mark, can_be_drawn, chart
from edgellm.budget.picture import picture
from edgellm.conversion import carry_out
from edgellm.errors import OutputError, UsageError
from edgellm.export.writer import check_output
from edgellm.plan import make_plan
from edgellm.progress import Progress, unwatched
from edgellm.recipe import OF_CALIBRATION, Recipe, split_quant

PICTURE = "sweep.svg"
FIGURES = "sweep.json"


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One conversion and how far its answers are from the source's (``evaluation.Figures``).

    ``nbytes``: of all its files but the manifest. ``quant`` is what was asked for, ``resolved``
    with the solver that was chosen. ``folder`` is None where the artifact was not kept.
    """

    quant: str
    resolved: str
    format: str
    nbytes: int
    bits_per_weight: float
    kld_mean: float
    kld_mean_stderr: float | None
    perplexity: float
    reference_perplexity: float
    top1_agreement: float
    tokens: int
    text: str
    windows_sha256: str
    runtime: str
    folder: str | None


def quants(grids: Sequence[str], solvers: Sequence[str]) -> list[str]:
    """Every grid by every solver, as ``--quant`` reads them.

    Raises ``UsageError`` where there is no grid, or one is asked for twice.
    """
    found = [f"{solver}:{grid}" if solver else grid for grid in grids for solver in solvers or [""]]
    if not found or not all(split_quant(each).grid for each in found):
        raise UsageError("sweep needs the grids to try: --grids q4_0,q4_k_m,q8_0")
    if len(set(found)) < len(found):
        raise UsageError("--grids and --solvers name a conversion twice: leave the second out")
    return found


def sweep(
    recipe: Recipe,
    wanted: Sequence[str],
    *,
    keep: Path | None = None,
    threads: int | None = None,
    progress: Progress = unwatched,
) -> Iterator[Point]:
    """A point for each ``--quant`` in ``wanted``, as they are done; ``recipe`` says all the rest.

    All are planned before the first is begun. Artifacts go to folders in ``keep``, or are deleted.
    Raises what planning and converting do, and ``UsageError`` for grids that nothing is compared
    for.
    """
    if recipe.check_tokens is None:
        raise AssertionError("a sweep compares whatever it takes: check_tokens must be set")
    plans = []
    for one in recipes(recipe, wanted):
        plans.append(make_plan(one, threads=threads))
        if keep is not None:
            check_output(keep / folder_of(one.quant or ""), force=False)
    with TemporaryDirectory(prefix="edgellm-sweep-") as temporary:
        for quant, plan in zip(wanted, plans, strict=True):
            out = (keep or Path(temporary)) / folder_of(quant)
            artifact = carry_out(plan, out, progress=progress)
            assert artifact.manifest is not None
            found = artifact.manifest.measured["quality"]
            assert plan.recipe.format is not None
            assert plan.recipe.quant is not None
            yield Point(
                quant=quant,
                resolved=plan.recipe.quant,
                format=plan.recipe.format,
                nbytes=sum(file.nbytes for file in artifact.manifest.artifact.files),
                bits_per_weight=plan.bits_per_weight,
                folder=None if keep is None else str(out),
                **{name: found[name] for name in SHOWN},
            )
            if keep is None:
                _delete(out)


def recipes(recipe: Recipe, wanted: Sequence[str]) -> list[Recipe]:
    """``recipe`` for each ``--quant``; those that round without calibration have no word of it.

    Where none of them would heed such a word it stays, to be refused.
    """
    found = [msgspec.structs.replace(recipe, quant=quant) for quant in wanted]
    heeding = [split_quant(each.quant or "").solver is None or each.calibrates for each in found]
    if not any(heeding):
        return found
    idle = dict.fromkeys((*OF_CALIBRATION, "device"))
    return [
        each if heeds else msgspec.structs.replace(each, **idle)
        for each, heeds in zip(found, heeding, strict=True)
    ]


SHOWN = (
    "kld_mean",
    "kld_mean_stderr",
    "perplexity",
    "reference_perplexity",
    "top1_agreement",
    "tokens",
    "text",
    "windows_sha256",
    "runtime",
)


def folder_of(quant: str) -> str:
    """The name of the folder of a conversion."""
    return quant.replace(":", "-").replace("+", "-")


def drawing_of(points: Sequence[Point], source: str) -> Drawing | None:
    """KL against size; None where all answers are the source's own.

    Points have their solver's colour and shape where there is more than one solver.
    """
    named = [(_solver_of(each), split_quant(each.resolved).grid) for each in points]
    if len({solver for solver, _ in named}) == 1:
        named = [("", each.quant) for each in points]
    marks = [
        Mark(label, each.nbytes, each.kld_mean, each.kld_mean_stderr or 0.0, series)
        for each, (series, label) in zip(points, named, strict=True)
    ]
    return chart(marks, source) if can_be_drawn(marks) else None


def write_sweep(
    points: Sequence[Point], source: str, out: Path | None, picture_path: Path | None = None
) -> list[Path]:
    """Write ``sweep.json`` and ``sweep.svg`` to the folder ``out``, and ``picture_path``.

    Returns what was written: no picture where all answers are the source's own. Raises
    ``OutputError``, and what ``picture.check_picture`` does.
    """
    contents: dict[Path, bytes] = {}
    if out is not None:
        figures = msgspec.json.format(msgspec.json.encode({"source": source, "points": points}))
        contents[out / FIGURES] = figures + b"\n"
    drawing = drawing_of(points, source)
    if drawing is not None:
        paths = [out / PICTURE] if out is not None else []
        paths += [picture_path] if picture_path is not None else []
        contents |= {path: picture(drawing, path) for path in paths}
    for path, content in contents.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise OutputError(
                f"cannot write the sweep to {path} ({error.strerror}): choose another place"
            ) from error
    return list(contents)


def _solver_of(point: Point) -> str:
    """Transforms and solver, as ``--quant`` has them before the grid."""
    return point.resolved.rpartition(":")[0]


def _delete(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder)
