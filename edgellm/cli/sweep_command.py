"""``edgellm sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import options, render
from edgellm.cli.progress_bar import progress_shown
from edgellm.writing_places import check_folder_place

if TYPE_CHECKING:
    from edgellm.budget.sweeping import Point


def sweep(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A Hugging Face folder, a GGUF file or a Hub id (owner/name)."
        ),
    ],
    grids: Annotated[
        str, typer.Option(metavar="GRID,GRID,...", help="What to try: q4_0,q4_k_m,q8_0.")
    ],
    solvers: Annotated[
        str | None,
        typer.Option(
            metavar="SOLVER,...", help="Each grid by each: rtn,gptq. Default: as convert chooses."
        ),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="gguf, onnx, hf or mlx. Default: as convert chooses.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A folder for sweep.json and sweep.svg, a picture."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="KL against size, drawn as .svg or .png (with Pillow installed)."
        ),
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Keep what was converted in here.")
    ] = None,
    calibration: options.Calibration = None,
    calibration_tokens: options.CalibrationTokens = None,
    device: options.Device = None,
    check_text: options.CheckText = None,
    check_tokens: options.CheckTokens = None,
    ignore_config_key: options.IgnoreConfigKey = None,
    threads: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Convert a model on several grids and compare each with it.

    Shows the size of each and how far its answers are from the source's on a held-out text, so
    that a grid can be chosen by what its bytes buy.

    \b
    Examples:
      edgellm sweep ./my-model --grids q4_0,q4_k_m,q8_0
      edgellm sweep ./my-model --grids q4_0,q3_k_m --out figures
      edgellm sweep ./my-model --grids q4_0,q3_k_m --picture size-kl.png
      edgellm sweep ./my-model --grids q4_0 --solvers rtn,gptq
      edgellm sweep ./my-model --format onnx --grids int4-g32,int8 --keep tried
      edgellm sweep ./my-model --grids q4_0,q8_0 --json | jq .points
    """
    from edgellm.budget.picture import check_picture
    from edgellm.budget.sweeping import quants, write_sweep
    from edgellm.budget.sweeping import sweep as each_of
    from edgellm.calibration.texts import MEASURED_TOKENS
    from edgellm.recipe import make_recipe

    wanted = quants(_listed(grids), _listed(solvers or ""))
    recipe = make_recipe(
        {
            "source": source,
            "format": format,
            "calibration": calibration,
            "calibration_tokens": calibration_tokens,
            "device": device,
            "check_text": check_text,
            "check_tokens": check_tokens or MEASURED_TOKENS,
            "ignore_config_keys": ignore_config_key or None,
        }
    )
    if picture is not None:
        check_picture(picture)
        check_folder_place(picture.parent)
    if out is not None:
        check_folder_place(out)
    points: list[Point] = []
    with progress_shown(quiet=as_json) as progress:
        for point in each_of(recipe, wanted, keep=keep, threads=threads, progress=progress):
            points.append(point)
            if not as_json:
                render.say(f"{point.quant}: {render.size(point.nbytes)}, KL {point.kld_mean:.3g}")
    written = write_sweep(points, source, out, picture)
    if as_json:
        render.show_json({"source": source, "points": points, "written": written})
        return
    render.show_table(
        ("quant", "size", "bits per weight", "KL", "perplexity", "top-1"),
        [
            (
                point.quant,
                render.size(point.nbytes),
                f"{point.bits_per_weight:.2f}",
                _with_error(point),
                f"{point.perplexity:.4g}",
                f"{point.top1_agreement:.1%}",
            )
            for point in points
        ],
        right="12345",
    )
    first = points[0]
    notes = [
        f"the source's own perplexity on these {first.tokens} tokens of {first.text}: "
        f"{first.reference_perplexity:.4g}"
    ]
    if picture is not None and picture not in written:
        notes.append(f"{picture} is not drawn: all answers are the source's own, of KL 0")
    render.show_notes([*notes, *(f"written: {path}" for path in written)])


def _listed(text: str) -> list[str]:
    return [part.strip().lower() for part in text.split(",") if part.strip()]


def _with_error(point: Point) -> str:
    error = "" if point.kld_mean_stderr is None else f" ± {point.kld_mean_stderr:.1g}"
    return f"{point.kld_mean:.3g}{error}"
