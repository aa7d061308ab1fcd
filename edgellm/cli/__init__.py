"""The command line: parse, call one library function, show what comes back.

stdout carries the answer, stderr everything else. A command's module is imported when it is
called, so that ``edgellm --help`` stays quick.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from edgellm import __version__, registry
from edgellm.cli import render
from edgellm.errors import EdgeError

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": (
        "edgellm.cli.demo_command:demo",
        "Convert a small real model, verify it and ask it.",
    ),
    "convert": (
        "edgellm.cli.convert_command:convert",
        "Quantize a model into a folder that runs, with proof.",
    ),
    "merge": (
        "edgellm.cli.merge_command:merge",
        "Merge adapters into a folder that transformers loads.",
    ),
    "adapter-check": (
        "edgellm.cli.adapter_check_command:adapter_check",
        "Show what adapters do to a base, and what is wrong.",
    ),
    "run": (
        "edgellm.cli.run_command:run",
        "Ask an artifact or a GGUF file, or chat with it.",
    ),
    "eval": (
        "edgellm.cli.eval_command:eval_",
        "Measure a model on a text, and how far it is from another.",
    ),
    "sweep": (
        "edgellm.cli.sweep_command:sweep",
        "Convert a model on several grids and compare each with it.",
    ),
    "profile": (
        "edgellm.cli.profile_command:profile",
        "Measure how fast artifacts answer on this machine.",
    ),
    "compare": (
        "edgellm.cli.compare_command:compare",
        "Compare profiles, with a verdict that can stop a build.",
    ),
    "inspect": (
        "edgellm.cli.inspect_command:inspect",
        "Show what is inside an artifact or a model file.",
    ),
    "models": (
        "edgellm.cli.models_command:models",
        "Show the models of this machine, or remove some.",
    ),
    "push": (
        "edgellm.cli.push_command:push",
        "Publish an artifact on the Hub, with a model card.",
    ),
    "verify": (
        "edgellm.cli.verify_command:verify",
        "Recompute every checksum of an artifact.",
    ),
    "doctor": (
        "edgellm.cli.doctor_command:doctor",
        "Show what this machine has and what would run here.",
    ),
    "report": (
        "edgellm.cli.report_command:report",
        "Make pages and tables of profiles.",
    ),
    "selftest": (
        "edgellm.cli.selftest_command:selftest",
        "Try the runtimes of this machine with a tiny model.",
    ),
    "schema": (
        "edgellm.cli.schema_command:schema",
        "Show the JSON Schema of a document that edgellm writes.",
    ),
}
"""Command to ``module:function`` and the first line of its help."""

HELP = """Quantize language models for the machine in front of you, and run them there.

\b
Examples:
  edgellm demo                              see it work on a real model
  edgellm convert ./my-model --out small    4 bits, for the best runtime here
  edgellm run small "Why is the sky blue?"  ask it
  edgellm run small                         chat with it
  edgellm verify small                      is every byte as it was written?
  edgellm doctor                            what does this machine have?
"""

EXIT_CODES = """\b
Exit codes: 0 done; 1 verify found damage; 2 options not understood;
3 the source cannot be read; 4 the model is not supported;
5 this grid or container cannot hold it; 6 a runtime is missing;
7 the output cannot be written; 8 verification failed; 9 running failed;
130 stopped by Ctrl-C.
"""

BROKEN_PIPE = 1
"""When whoever reads stdout leaves early (typer's own choice while a command writes)."""


def build_app(wanted: Sequence[str] | None = None) -> typer.Typer:
    """The typer app; of the commands only those in ``wanted`` are imported (None: all of them)."""
    app = typer.Typer(
        name="edgellm",
        help=HELP,
        epilog=EXIT_CODES,
        no_args_is_help=True,
        context_settings={"help_option_names": ["--help", "-h"]},
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )

    @app.callback()
    def root(
        version: Annotated[
            bool,
            typer.Option("--version", callback=_show_version, is_eager=True, help="The version."),
        ] = False,
    ) -> None:
        pass

    for name, (target, summary) in COMMANDS.items():
        if wanted is None or name in wanted:
            app.command(name)(registry.attribute(target))
        else:
            app.command(name, help=summary)(_unused)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors made on purpose become a message."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    completing = "_EDGELLM_COMPLETE" in os.environ
    code = 0
    try:
        build_app(None if completing else given[:1])(given, prog_name="edgellm", obj=given)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except EdgeError as error:
        code = _report(error, as_json="--json" in given)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Keep the interpreter from trying again, and complaining, when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or BROKEN_PIPE
    return code


def _report(error: EdgeError, *, as_json: bool) -> int:
    if as_json:
        facts = {
            "kind": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
        print(json.dumps({"error": facts}, ensure_ascii=False, indent=2))
    else:
        render.say_error(error)
    return error.exit_code


def _unused() -> None:
    raise AssertionError("a command that was not asked for cannot be called")


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"edgellm {__version__}")
        raise typer.Exit
