"""``edgellm push``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgellm.cli import render
from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.hub.push import Publication


def push(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An artifact's folder.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: org/name.")],
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="A branch, made if there is none. Default: main."),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a repository that others do not see.")
    ] = False,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="org/name", help="What it was made from, if the manifest has no id."),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="Its licence in the Hub's terms, if not the source's."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the card and the files; upload nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, nothing on stderr.")
    ] = False,
) -> None:
    """Publish an artifact on the Hub, with a model card.

    Every checksum is recomputed first, and what is damaged, unfinished or was rejected is not
    uploaded. The card is written from the manifest: base and licence, what was done, the grids, how
    far its answers are from the source's, how to run it, checksums. All files appear in one commit,
    in place of an artifact that was there before; then the Hub's own hashes are compared. It takes
    a token with write permission (hf auth login, or HF_TOKEN).

    \b
    Examples:
      edgellm push small me/SmolLM2-135M-q4 --dry-run
      edgellm push small me/SmolLM2-135M-q4 --private
      edgellm push small me/SmolLM2-135M --revision q4_k_m
      edgellm push small me/SmolLM2-135M-q4 --json | jq -r .url
    """
    from edgellm.hub.ids import HubId, parse_hub_id
    from edgellm.hub.push import check_token, prepare, publish

    target = None if repo.startswith((".", "~")) else parse_hub_id(repo)
    if target is None or target.file is not None:
        raise UsageError(f"{repo!r} is no repository on the Hub: give org/name")
    if target.revision and revision and target.revision != revision:
        raise UsageError(f"{repo} names one branch and --revision {revision} another: name one")
    target = HubId(target.repo, revision or target.revision)
    publication = prepare(path, target, base_model=base_model, licence=licence)
    if not as_json:
        render.say_notes(publication.notes)
    if dry_run:
        _show_plan(publication, private=private, as_json=as_json)
        return
    check_token()
    if not as_json:
        files = render.count(len(publication.files) + 1, "file")
        render.say(f"uploading {render.size(publication.nbytes)} in {files} to {target.repo}")
    done = publish(publication, private=private, bars=not as_json and sys.stderr.isatty())
    if as_json:
        render.show_json(done)
        return
    if done.replaced:
        render.say_notes([f"replaced what was there: {', '.join(done.replaced)}"])
    print(f"{done.url}: commit {done.commit}, as it was sent by the Hub's own hashes")


def _show_plan(publication: Publication, *, private: bool, as_json: bool) -> None:
    sizes = {name: file.stat().st_size for name, file in publication.files.items()}
    sizes["README.md"] = len(publication.card.encode())
    if as_json:
        render.show_json(
            {
                "repo": publication.target.repo,
                "revision": publication.target.revision or "main",
                "private": private,
                "files": [{"path": name, "nbytes": size} for name, size in sizes.items()],
                "card": publication.card,
                "notes": publication.notes,
            }
        )
        return
    print(publication.card)
    render.show_table(
        ("file", "size"), [(name, render.size(size)) for name, size in sizes.items()], right="1"
    )
