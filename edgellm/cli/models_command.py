"""``edgellm models``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import render
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.holdings import Holdings
    from edgellm.hub.cached import CachedModel, CachedRevision, Removal
    from edgellm.made import Made

REMOVE = "remove"
SHORT = 12
"""Characters of a digest in a table; --json has all of them."""


def models(
    action: Annotated[
        str | None, typer.Argument(metavar="[remove]", help="Delete models, each by its NAME.")
    ] = None,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="An artifact's folder, or org/name[@revision]."),
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Look for artifacts in this folder too. Repeatable."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show the models of this machine, or remove some.

    Those that were fetched from the Hub, and the artifacts that edgellm made here: size, digest,
    and what each was made of. An artifact that was copied here is found with --folder.

    remove deletes what an artifact's manifest names, or a model of the Hub's cache, and nothing
    else: other files in the folder stay, and no link is followed.

    \b
    Examples:
      edgellm models
      edgellm models --folder ./exports
      edgellm models --json | jq '.artifacts[] | {path, sha256}'
      edgellm models remove ./small
      edgellm models remove HuggingFaceTB/SmolLM2-135M --yes
    """
    folders = tuple(folder or ())
    if action is None:
        from edgellm.holdings import holdings

        found = holdings(folders)
        render.show_json(found) if as_json else _show(found)
        return
    if action != REMOVE:
        raise UsageError(f"models {action}: the only word that goes there is {REMOVE}")
    if not names:
        raise UsageError(f"models {REMOVE} needs a NAME: `edgellm models` lists them")
    _remove(names, folders, yes=yes, as_json=as_json)


def _remove(names: list[str], folders: tuple[Path, ...], *, yes: bool, as_json: bool) -> None:
    """Find all of ``names`` first, ask once, then delete."""
    from edgellm.holdings import find_removal

    removals = [find_removal(name, folders) for name in dict.fromkeys(names)]
    if not yes:
        _ask(removals, as_json=as_json)
    done = []
    for removal in removals:
        left = removal.carry_out()
        done.append({"removed": removal.what, "nbytes": removal.nbytes, "left": left})
        if not as_json:
            print(f"removed {removal.what}, {render.size(removal.nbytes)}")
            if left:
                render.say_notes([f"not edgellm's, and still there: {', '.join(left)}"])
    if as_json:
        render.show_json({"removed": done})


def _ask(removals: list[Removal], *, as_json: bool) -> None:
    """Have the person confirm; ends the command where they do not."""
    for removal in removals:
        render.say(f"{removal.what}, {render.size(removal.nbytes)}")
    if as_json or not sys.stdin.isatty():
        raise UsageError("nobody can be asked here: add --yes to delete that")
    if not typer.confirm("Delete?", err=True):
        render.say("nothing was deleted")
        raise typer.Exit(1)


def _show(found: Holdings) -> None:
    cache, artifacts = found.cache, found.artifacts
    if cache.models:
        print(f"from the Hub, in {cache.path}\n")
        render.show_table(
            ("model", "revision", "size", "made of", "licence"),
            [
                _cached_row(model, revision)
                for model in cache.models
                for revision in model.revisions
            ],
            right="2",
        )
    else:
        print(f"nothing from the Hub in {cache.path}")
    print()
    if artifacts:
        print("made here\n")
        render.show_table(
            ("artifact", "quant", "size", "sha256", "made of"),
            [_made_row(made) for made in artifacts],
            right="2",
        )
    else:
        print("no artifact was made here (edgellm convert makes them)")
    notes = [f"{made.path}: {made.fault}" for made in artifacts if made.fault]
    notes += cache.faults
    if cache.unfinished_bytes:
        size = render.size(cache.unfinished_bytes)
        notes.append(f"{size} are left of broken downloads: `hf cache prune` deletes them")
    if notes:
        print()
    render.show_notes(notes)


def _cached_row(model: CachedModel, revision: CachedRevision) -> tuple[str, ...]:
    names = " ".join([revision.commit[:SHORT], *revision.refs])
    of = " ".join(filter(None, (revision.base, revision.quantization)))
    return model.repo, names, render.size(revision.nbytes), of, revision.licence


def _made_row(made: Made) -> tuple[str, ...]:
    quant = " ".join(filter(None, (made.container, made.quant)))
    size, digest = render.size(made.nbytes), made.sha256[:SHORT]
    return str(made.path), quant, size, digest, _lineage(made)


def _lineage(made: Made) -> str:
    """The base and the adapters in it, and those beside it, in a line."""
    if made.base is None:
        return "unknown: its manifest is damaged"
    revision = f"@{made.base.revision[:SHORT]}" if made.base.revision else ""
    merged = "".join(f" + {adapter.name}" for adapter in made.adapters)
    kept = ", ".join(adapter.name for adapter in made.kept_adapters)
    return f"{made.base.name}{revision}{merged}" + (f" (beside it: {kept})" if kept else "")
