"""Options that several commands take alike."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

Combine: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="METHOD", help="How adapters become one. Default: cat, the sum."),
]
Density: TypeAlias = Annotated[
    float | None, typer.Option(metavar="SHARE", help="Values kept by a METHOD that prunes, 0 to 1.")
]
CombineSign: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="HOW", help="How ties elects signs: total (default) or frequency."),
]
CombineRank: TypeAlias = Annotated[
    int | None, typer.Option(metavar="RANK", help="Rank of the result of an svd METHOD.")
]
Seed: TypeAlias = Annotated[
    int | None, typer.Option(metavar="NUMBER", help="Of a METHOD's random masks. Default: 0.")
]
MergeBase: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="BASE",
        help="Merge into full or dequantized weights. Default: what it was trained on.",
    ),
]
MinSurvival: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Fail when less of the fine-tune survives rounding. Default: 0.25."
    ),
]
RopeScaling: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="KIND:FACTOR",
        help="More context than was trained for: linear, ntk, yarn or llama3, such as yarn:4.",
    ),
]
Calibration: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Text that solvers see the model work on. Default: builtin, a mixed one.",
    ),
]
CalibrationTokens: TypeAlias = Annotated[
    int | None, typer.Option(metavar="NUMBER", help="Tokens of it that are used. Default: 32768.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Where gptq solves: cpu (default), cuda, metal or auto (GPUs need torch).",
    ),
]
CheckText: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="Text that answers are compared on. Default: builtin, a short one."
    ),
]
CheckTokens: TypeAlias = Annotated[
    int | None,
    typer.Option(
        metavar="NUMBER",
        help="Tokens of it. Default: 1024, fewer of a large model, none of a very large one.",
    ),
]
MaxKld: TypeAlias = Annotated[
    float | None,
    typer.Option(
        metavar="NATS", help="Reject a result whose answers are further (KL) from the source's."
    ),
]
MaxPplIncrease: TypeAlias = Annotated[
    str | None,
    typer.Option(
        metavar="PERCENT", help="Reject a result whose perplexity is higher by more, such as 5%."
    ),
]
AllowUntrained: TypeAlias = Annotated[
    bool, typer.Option("--allow-untrained", help="Take adapters that change nothing.")
]
IgnoreConfigKey: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY", help="A config key, not known here, that you vouch for."),
]
Workers: TypeAlias = Annotated[
    int | None, typer.Option(help="Workers. Default: the physical cores. Never changes a byte.")
]
Force: TypeAlias = Annotated[bool, typer.Option("--force", help="Replace --out if it exists.")]
DryRun: TypeAlias = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and stop: no weight is read.")
]
AsJson: TypeAlias = Annotated[
    bool, typer.Option("--json", help="One JSON document on stdout, nothing on stderr.")
]
