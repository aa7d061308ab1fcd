"""``edgellm schema``."""

from __future__ import annotations

from typing import Annotated

import typer

from edgellm.cli import render
from edgellm.errors import UsageError

DOCUMENTS = {
    "profile": "edgellm.profiling.document:Profile",
    "manifest": "edgellm.manifest:Manifest",
}
"""Documents that edgellm writes: where their structs stand."""


DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema(
    document: Annotated[
        str,
        typer.Argument(metavar="DOCUMENT", help="profile or manifest."),
    ],
) -> None:
    """Show the JSON Schema of a document that edgellm writes.

    \b
    Examples:
      edgellm schema profile > profile.schema.json
      edgellm schema manifest | jq '."$defs".Digested.properties | keys'
    """
    import msgspec

    from edgellm import registry

    if document not in DOCUMENTS:
        raise UsageError(f"no document named {document!r}: choose {' or '.join(DOCUMENTS)}")
    found = registry.attribute(DOCUMENTS[document])
    render.show_json({"$schema": DIALECT, **msgspec.json.schema(found)})
