"""``edgellm adapter-check``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import options, render
from edgellm.cli.progress_bar import progress_shown

if TYPE_CHECKING:
    from edgellm.lora.check.changes import TensorChange
    from edgellm.lora.check.checkup import Checkup
    from edgellm.lora.check.doctor import AdapterFacts, TargetFacts
    from edgellm.lora.check.survival import Survival

COLUMNS = ("weights", "number", "rank", "scale", "change", "largest", "lost in bf16", "in f16")
COSINE = "cosine"


def adapter_check(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model: a folder, a GGUF file or a Hub id.")
    ],
    adapter: Annotated[
        list[str],
        typer.Argument(
            metavar="ADAPTER...", help="PATH or PATH=WEIGHT: a PEFT folder, a GGUF or a Hub id."
        ),
    ],
    artifact: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="An artifact made of them: how much of the fine-tune is left in it?"
        ),
    ] = None,
    check_text: options.CheckText = None,
    min_survival: options.MinSurvival = None,
    combine: options.Combine = None,
    density: options.Density = None,
    combine_sign: options.CombineSign = None,
    combine_rank: options.CombineRank = None,
    seed: options.Seed = None,
    merge_base: options.MergeBase = None,
    allow_untrained: options.AllowUntrained = False,
    ignore_config_key: options.IgnoreConfigKey = None,
    every: Annotated[bool, typer.Option("--all", help="Show every weight, not kinds.")] = False,
    threads: options.Workers = None,
    as_json: options.AsJson = False,
) -> None:
    """Show what adapters do to a base, and what is wrong.

    Which weights they match, ranks and scales, how large each change is, what of it narrow types
    lose, whether base and adapter belong together, and what llama.cpp would make of the adapter.
    With --artifact also how much of the fine-tune is left after rounding: 100% when rounding moved
    the answers by nothing, 0% when by as much as the fine-tune did. Nothing is written.

    Ends with an exit code other than 0 when something is wrong; warnings alone do not.

    \b
    Examples:
      edgellm adapter-check ./base ./my-lora
      edgellm adapter-check ./base ./style=0.7 ./facts --all
      edgellm adapter-check ./base ./my-lora --artifact small
      edgellm adapter-check ./base ./my-lora --json | jq .faults
    """
    from edgellm.lora.check.checkup import check_up
    from edgellm.recipe import make_recipe

    recipe = make_recipe(
        {
            "source": base,
            "adapters": adapter,
            "combine": combine,
            "density": density,
            "sign": combine_sign,
            "combine_rank": combine_rank,
            "seed": seed,
            "merge_base": merge_base,
            "allow_untrained": allow_untrained or None,
            "ignore_config_keys": ignore_config_key or None,
            "min_survival": min_survival,
            "check_text": check_text,
        }
    )
    with progress_shown(quiet=as_json) as progress:
        found = check_up(recipe, artifact=artifact, threads=threads, progress=progress)
    if as_json:
        render.show_json(found)
    else:
        _show(found, every=every)
    if found.exit_code:
        raise typer.Exit(found.exit_code)


def _show(found: Checkup, *, every: bool) -> None:
    report = found.report
    cosines: dict[str, float] = {}
    if found.survival is not None:
        cosines = {weight.role: weight.cosine for weight in found.survival.weights}
    for adapter in report.adapters:
        _show_adapter(adapter, cosines, every=every)
        print()
    if report.together:
        print(f"together ({report.method}): changes are {_share(report.together_relative)} of the "
              f"weights in {render.count(len(report.together), 'tensor')}\n")  # fmt: skip
    if found.survival is not None:
        render.show_facts(_survival_facts(found.survival))
        print()
    render.show_notes(report.notes)
    render.show_notes(report.warnings, "!")
    render.show_notes(found.faults, "✗")
    if not found.faults:
        print(f"nothing is wrong{' beside the warnings' if report.warnings else ''}")


def _show_adapter(adapter: AdapterFacts, cosines: dict[str, float], *, every: bool) -> None:
    belonging = adapter.belonging
    render.show_facts(
        [
            ("adapter", f"{adapter.name} ({adapter.kind}), weight {adapter.weight:g}"),
            ("sha256", adapter.sha256),
            ("trained on", f"{belonging.stated} ({belonging.verdict})" if belonging.stated else ""),
            ("changes", f"{_share(adapter.relative)} of {len(adapter.targets)} weights, by norm"),
            ("whole tensors", ", ".join(adapter.replaced)),
            *(("llama.cpp", fault) for fault in adapter.llamacpp_faults),
        ]
    )
    print()
    groups = (
        {target.name: [target] for target in adapter.targets}
        if every
        else _by_kind(adapter.targets)
    )
    columns = COLUMNS + ((COSINE,) if cosines else ())
    rows = [_row(name, targets, cosines) for name, targets in groups.items()]
    render.show_table(columns, rows, right="12345678")


def _by_kind(targets: Iterable[TargetFacts]) -> dict[str, list[TargetFacts]]:
    """Targets by what they are in their layer: ``attn_q``, ``ffn_down``."""
    groups: dict[str, list[TargetFacts]] = {}
    for target in targets:
        parts = target.role.split(".")
        kind = ".".join(part for part in parts if not part.isdigit() and part != "blk")
        groups.setdefault(kind.removesuffix(".weight"), []).append(target)
    return groups


def _row(name: str, targets: Sequence[TargetFacts], cosines: dict[str, float]) -> tuple[str, ...]:
    from edgellm.lora.check.changes import overall

    changes: list[TensorChange] = [target.change for target in targets if target.change]
    kept = [cosines[target.role] for target in targets if target.role in cosines]
    return (
        name,
        str(len(targets)),
        _range([target.rank for target in targets]),
        _range([target.scale for target in targets]),
        _share(overall(changes)),
        f"{max((change.largest for change in changes), default=0):.3g}",
        f"{_mean([change.vanishing_bf16 for change in changes]):.1%}",
        f"{_mean([change.vanishing_f16 for change in changes]):.1%}",
        *((f"{median(kept):.4f}" if kept else "-",) if cosines else ()),
    )


def _survival_facts(survival: Survival) -> list[tuple[str, str]]:
    base, rounded, cosine = survival.from_base, survival.from_quantized, survival.median_cosine
    share = "not measured" if survival.survival is None else f"{survival.survival:.1%}"
    facts = [("survival", f"{share}{f' ({survival.reason})' if survival.reason else ''}")]
    if base is not None and rounded is not None:
        facts += [
            (
                "the fine-tune",
                f"moved the answers by KL {base.kl:.4f} ± {base.kl_error:.4f}, the likeliest token "
                f"stayed in {base.top1_agreement:.1%}",
            ),
            (
                "rounding",
                f"moved them by KL {rounded.kl:.4f} ± {rounded.kl_error:.4f}, the likeliest token "
                f"stayed in {rounded.top1_agreement:.1%}",
            ),
            (
                "measured on",
                f"{rounded.tokens} tokens ({survival.text}), with {survival.runtime}",
            ),
        ]
    if cosine is not None:
        lowest = min(survival.weights, key=lambda weight: weight.cosine)
        facts.append(
            (
                "directions",
                f"cosine of the change before and after {cosine:.4f} in the median weight, "
                f"{lowest.cosine:.4f} in the worst ({lowest.name}, {lowest.grid})",
            )
        )
    return facts


def _share(relative: float | None) -> str:
    return "-" if relative is None else f"{relative:.2%}"


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g}-{high:.3g}"


def _mean(shares: Sequence[float]) -> float:
    return sum(shares) / len(shares) if shares else 0.0
