"""``edgellm profile``."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import options, render
from edgellm.errors import OutputError, UsageError

if TYPE_CHECKING:
    from edgellm.profiling.document import Cell, Distribution, Operators, Profile

INTERRUPTED = 130
FAILED = 9

DEAREST = 10
"""Kinds of operators that are shown."""

LEAST_SHARE = 0.005
"""Of a token's time, what a kind of operator takes to be shown."""

MOST_NOISY = 4
"""So many noisy cells have a line each."""


def profile(
    context: typer.Context,
    paths: Annotated[
        list[str],
        typer.Argument(metavar="PATH...", help="Artifacts, GGUF files or Hugging Face folders."),
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="all: every one that opens it. Repeatable."),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, ... Repeatable.")
    ] = None,
    prompt_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Lengths of the prompt. Default: 512; of encoders' texts 128."
        ),
    ] = None,
    new_tokens: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Tokens to write; ends of text do not end it. Default: 128; behind encoders 64.",
        ),
    ] = None,
    depth: Annotated[
        str, typer.Option(metavar="N,N,...", help="Tokens in the cache before the prompt.")
    ] = "0",
    batch: Annotated[
        str, typer.Option(metavar="N,N,...", help="Texts at a time, of encoders.")
    ] = "1",
    threads: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Default: the physical cores.")
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE,...", help="Keys and values in f32, f16, q8_0, ...; see doctor."
        ),
    ] = None,
    repeat: Annotated[
        int | None, typer.Option(metavar="N", help="Rounds that count. Default: 5.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="As many rounds as fit into 60s, 5m; in place of N."),
    ] = None,
    warmup: Annotated[int, typer.Option(metavar="N", help="Rounds before that do not count.")] = 1,
    timeout: Annotated[
        str, typer.Option(metavar="TIME", help="Give a cell up that does not answer for so long.")
    ] = "600s",
    operators: Annotated[
        bool, typer.Option("--operators", help="Where a token's time goes, by kind and layer.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Traces of --operators for Perfetto. Default: beside the FILE."
        ),
    ] = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help=".html, .json, .md, .csv or .prom. Repeatable."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure how fast artifacts answer on this machine.

    Every combination of what is given is a cell, in a process of its own. Cells take turns, round
    by round, so that heat and other programs hit all alike. Times go from the prompt's text to the
    answer's; docs/profiling.md says what each figure counts. A cell that fails is a row with its
    reason; Ctrl-C keeps what was measured.

    Of encoders it is how long batches of texts take (--prompt-tokens long each, more of them with
    --batch), and with a decoder how soon and how fast a text is answered.

    \b
    Examples:
      edgellm profile small
      edgellm profile q4 q8 --output report.html --output report.json
      edgellm profile small --runtime all --threads 1,2
      edgellm profile small --prompt-tokens 128,2048 --depth 0,4096 --budget 5m
      edgellm profile small.gguf --kv-cache f16,q8_0 --operators
      edgellm profile embedder --prompt-tokens 16,128 --batch 1,16
      edgellm profile small --json | jq '.cells[].decode_tokens_per_s.median'
    """
    from edgellm.profiling.matrix import Asked
    from edgellm.profiling.measuring import ROUNDS, Effort
    from edgellm.profiling.measuring import profile as measure
    from edgellm.report import check_output, write_report

    if repeat is not None and budget is not None:
        raise UsageError("--repeat and --budget both say how long to measure: leave one out")
    if repeat is not None and repeat < 1:
        raise UsageError(f"--repeat {repeat}: choose 1 or more")
    if warmup < 0:
        raise UsageError(f"--warmup {warmup}: choose 0 or more")
    if trace is not None and not operators:
        raise UsageError("--trace is for the traces of --operators: give both, or leave it out")
    for path in output or ():
        check_output(path)
    asked = Asked(
        runtimes=runtime or (None,),
        devices=device or ("auto",),
        threads=_numbers("--threads", threads) if threads else (None,),
        kv_caches=[word.strip() for word in kv_cache.split(",")] if kv_cache else (None,),
        prompt_tokens=_numbers("--prompt-tokens", prompt_tokens)
        if prompt_tokens is not None
        else None,
        new_tokens=_numbers("--new-tokens", new_tokens) if new_tokens is not None else None,
        depth_tokens=_numbers("--depth", depth),
        batches=_numbers("--batch", batch),
    )
    effort = Effort(
        rounds=repeat or ROUNDS,
        warmup_rounds=warmup,
        budget_s=_seconds("--budget", budget) if budget else None,
        timeout_s=_seconds("--timeout", timeout),
    )
    from edgellm.cli.profile_view import watched

    with watched(quiet=as_json) as watch:
        found = measure(
            paths,
            asked,
            effort,
            operators=operators,
            traces=_traces(trace, output or ()) if operators else None,
            command=_command(context.find_root().obj),
            watch=watch,
        )
    written, failures = [], []
    for path in output or ():
        try:
            write_report([found], path)
            written.append(path)
        except OutputError as error:  # what was measured is not lost: it is shown all the same
            failures.append(error)
    if as_json:
        render.show_json(found)
    else:
        _show(found, written)
    for failure in failures:
        render.say_error(failure)
    if failures:
        raise typer.Exit(failures[0].exit_code)
    if found.interrupted:
        raise typer.Exit(INTERRUPTED)
    if all(cell.failure for cell in found.cells):
        raise typer.Exit(FAILED)


def _show(found: Profile, written: Sequence[Path]) -> None:
    render.say_notes(found.notes)
    head, row = _SHOWN.get(found.cells[0].settings.task, (READING, _reading))
    render.show_table(head, [row(cell) for cell in found.cells], right="123456")
    notes = [f"{cell.name}: {cell.failure}" for cell in found.cells if cell.failure]
    notes += [_dearest(cell.name, cell.operators) for cell in found.cells if cell.operators]
    render.show_notes([*notes, *_noise(found.cells)])
    if found.interrupted:
        render.say_notes(["stopped early: this is what was done by then"])
    render.say_notes([f"written: {path}" for path in written])


def _noise(cells: Sequence[Cell]) -> list[str]:
    """A line for each noisy cell; one of all where all of many are, for names tell nothing then."""
    from edgellm.report.wording import gathered

    measured = [cell for cell in cells if cell.rounds]
    noisy = [cell for cell in measured if cell.noisy]
    if len(noisy) == len(measured) > MOST_NOISY:
        reasons = gathered(reason for cell in noisy for reason in cell.noisy)
        return [f"all {len(noisy)} cells are noisy: {'; '.join(reasons)}"]
    return [f"{cell.name} is noisy: {'; '.join(cell.noisy)}" for cell in noisy]


def _dearest(name: str, found: Operators) -> str:
    if not found.by_kind:
        return f"{name}: no operators, for {found.reason}"
    # The document has all; nothing is learnt from a row of "0%".
    shown = [kind for kind in found.by_kind[:DEAREST] if kind.share >= LEAST_SHARE]
    kinds = ", ".join(f"{kind.name} {kind.share:.0%}" for kind in shown)
    slower = f" (slower by {found.overhead:.0%} while watched)" if found.overhead else ""
    trace = f"; {found.trace} for ui.perfetto.dev" if found.trace else ""
    return f"{name}: a token's time goes to {kinds}{slower}{trace}"


WRITING = ("cell", "first token", "prefill", "decode", "p50", "p99", "peak memory")
ANSWERING = ("cell", "encoder", "first token", "decode", "p50", "p99", "peak memory")
READING = ("cell", "texts", "tokens", "p50", "p99", "load", "peak memory")


def _writing(cell: Cell) -> tuple[str, ...]:
    first, prefill = cell.time_to_first_token_s, cell.prefill_tokens_per_s
    return (
        cell.name,
        render.duration(first.median) if first else "-",
        f"{prefill.median:,.0f} tokens/s" if prefill else "-",
        *_decoding(cell),
    )


def _answering(cell: Cell) -> tuple[str, ...]:
    read, first = cell.encode_s, cell.time_to_first_token_s
    return (
        cell.name,
        render.duration(read.median) if read else "-",
        render.duration(first.median) if first else "-",
        *_decoding(cell),
    )


def _decoding(cell: Cell) -> tuple[str, ...]:
    decode = cell.decode_tokens_per_s
    return (
        f"{decode.median:.1f} tokens/s" if decode else "-",
        *_spread(cell.inter_token_latency_s),
        _peak(cell),
    )


def _reading(cell: Cell) -> tuple[str, ...]:
    texts, tokens = cell.texts_per_s, cell.tokens_per_s
    return (
        cell.name,
        f"{texts.median:,.1f} texts/s" if texts else "-",
        f"{tokens.median:,.0f} tokens/s" if tokens else "-",
        *_spread(cell.latency_s),
        render.duration(cell.load_s.median) if cell.load_s else "-",
        _peak(cell),
    )


def _spread(latency: Distribution | None) -> tuple[str, str]:
    if latency is None:
        return "-", "-"
    return f"{latency.p50 * 1e3:.1f} ms", f"{latency.p99 * 1e3:.1f} ms"


def _peak(cell: Cell) -> str:
    return render.size(cell.memory.peak_bytes) if cell.memory else "-"


_SHOWN = {"generate": (WRITING, _writing), "translate": (ANSWERING, _answering)}
"""By task, the columns of the table and what stands in them; of others see ``READING``."""


def _traces(folder: Path | None, output: Sequence[Path]) -> Path | None:
    """How the traces' files begin; None where nothing says a place for them."""
    if folder is not None:
        if not folder.is_dir():
            raise OutputError(
                f"there is no folder {folder} for the traces: make it, or leave it out"
            )
        return folder / (output[0].stem if output else "profile")
    return output[0].with_suffix("") if output else None


def _numbers(option: str, given: str) -> tuple[int, ...]:
    words = [word.strip() for word in given.split(",")]
    wrong = [word for word in words if not word.isdecimal()]
    if wrong:
        raise UsageError(
            f"{option} {given}: {wrong[0]!r} is no whole number from 0 on; give some as 128,512"
        )
    return tuple(dict.fromkeys(map(int, words)))


def _seconds(option: str, given: str) -> float:
    scale = {"s": 1.0, "m": 60.0, "h": 3600.0}
    unit = given[-1:] if given[-1:] in scale else "s"
    try:
        seconds = float(given.removesuffix(unit)) * scale[unit]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"{option} {given}: give a time above 0, as 90s, 5m or 1h")
    return seconds


def _command(words: Sequence[str]) -> str:
    """The command line as it was typed, of paths the last part alone."""
    shown = []
    for word in words:
        option, equals, value = word.partition("=")
        named = f"{option}={Path(value).name}" if equals else Path(word).name
        shown.append(named if any(each in word for each in (os.sep, os.altsep or os.sep)) else word)
    return " ".join(["edgellm", *map(shlex.quote, shown)])
