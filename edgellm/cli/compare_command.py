"""``edgellm compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import options, render
from edgellm.errors import VerificationError

if TYPE_CHECKING:
    from edgellm.profiling.comparing import Pair


def compare(
    paths: Annotated[
        list[Path], typer.Argument(metavar="A.json B.json...", help="Files of edgellm profile.")
    ],
    by: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="What may differ: backend, machine or quant."),
    ] = None,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help="A change that is not accepted; exit code 8. Repeatable."
        ),
    ] = None,
    unlike: Annotated[
        bool, typer.Option("--unlike", help="Compare unlike runs all the same, and say how.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare profiles, with a verdict that can stop a build.

    The first file is what the others are measured by. Only what is alike is compared: the same
    artifact, prompt, runtime and machine; --by says which of these may differ, and then cells of
    one file are compared too. A condition counts where the change is certain: the interval of the
    ratio does not hold 1, and no side is noisy. With conditions a cell that failed, or is missing
    beside one of the first file, stops the build too.

    \b
    Examples:
      edgellm compare before.json after.json
      edgellm compare before.json after.json --fail-if "decode_tokens_per_s < -5%"
      edgellm compare laptop.json server.json --by machine
      edgellm compare all.json --by backend
      edgellm compare q4.json q8.json --by quant --json | jq '.pairs[].ratio'
    """
    from edgellm.profiling.comparing import compare as compared
    from edgellm.profiling.document import read_profile

    short = len({path.name for path in paths}) == len(paths)
    profiles = [(path.name if short else str(path), read_profile(path)) for path in paths]
    found = compared(profiles, by=by, fail_if=fail_if or (), unlike=unlike)
    if as_json:
        render.show_json(found)
    else:
        render.show_table(
            ("quantity", "cell", "compared with", "cell's", "other's", "ratio", "verdict"),
            [_row(pair) for pair in found.pairs],
            right="345",
        )
        render.show_notes(f"unlike: {difference}" for difference in found.differences)
        render.show_notes(f"not compared: {each}" for each in found.missing)
        render.show_notes(f"noisy: {each}" for each in found.noisy)
        render.show_notes(f"not certain: {each}" for each in found.doubtful)
    if found.failed:
        raise VerificationError("not accepted: " + "; ".join(found.failed))


def _row(pair: Pair) -> tuple[str, ...]:
    ratio = pair.ratio
    spread = f" ({ratio.low:.2f} to {ratio.high:.2f})" if len(ratio.samples) > 1 else ""
    return (
        pair.quantity,
        pair.of,
        pair.to,
        _shown(pair.quantity, pair.of_median),
        _shown(pair.quantity, pair.to_median),
        f"{ratio.median:.2f}{spread}",
        pair.verdict,
    )


def _shown(quantity: str, value: float) -> str:
    if quantity.endswith("_bytes"):
        return render.size(value)
    if quantity.endswith("_per_s"):
        return f"{value:.1f}/s"
    return render.duration(value)
