"""``edgellm verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgellm.cli import render
from edgellm.errors import VerificationError

DAMAGED = 1
"""Exit code for an artifact that could be read and is not what its manifest says."""


def verify(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by convert.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Recompute every checksum of an artifact.

    Exit code 0: every byte is as it was written. Exit code 1: it is not, and the file or tensor
    is named. Other codes: there is nothing to verify (see edgellm --help).

    \b
    Examples:
      edgellm verify small
      edgellm verify small && scp -r small board:models/
      edgellm verify small --json | jq .verified
    """
    from edgellm.artifact import open_artifact
    from edgellm.artifact import verify as verify_artifact

    manifest, failure = None, ""
    try:
        artifact = open_artifact(path)
        manifest = artifact.manifest
        verify_artifact(artifact)
    except VerificationError as error:
        failure = str(error)
    if as_json:
        render.show_json(
            {
                "path": path,
                "verified": not failure,
                "reason": failure,
                "sha256": manifest.sha256 if manifest else "",
                "files": manifest.artifact.files if manifest else (),
            }
        )
    elif failure:
        render.say(f"damaged: {failure}")
    elif manifest:
        files = render.count(len(manifest.artifact.files), "file")
        tensors = render.count(len(manifest.artifact.tensors), "tensor")
        nbytes = render.size(sum(file.nbytes for file in manifest.artifact.files))
        print(f"{path}: {files} with {tensors} as they were written, {nbytes}")
    if failure:
        raise typer.Exit(DAMAGED)
