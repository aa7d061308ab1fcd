"""``edgellm selftest``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast

import typer

from edgellm.cli import options, render
from edgellm.errors import VerificationError

if TYPE_CHECKING:
    from edgellm.runtimes.session import Device
    from edgellm.selftest import SelfTest


def selftest(
    runtime: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: all that are installed.")
    ] = None,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="auto (all that are here), cpu, cuda or metal.")
    ] = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Try the runtimes of this machine with a tiny model.

    A model drawn at random is converted for each runtime and computed in several ways that must
    agree: at once and token by token, saved and restored, against the float network. The table can
    be pasted into a report: it names no person, host or path. Some seconds for each runtime.

    \b
    Examples:
      edgellm selftest
      edgellm selftest --runtime llamacpp --device cuda
      edgellm selftest --json | jq '.outcomes[] | select(.passed | not)'
    """
    from edgellm.selftest import selftest as try_all

    found = try_all(runtime, cast("Device", device))
    if as_json:
        render.show_json(found)
    else:
        _show(found)
    if found.failed:
        raise VerificationError(
            f"{render.count(found.failed, 'check')} of {len(found.outcomes)} failed: please report "
            "it with this table"
        )


def _show(found: SelfTest) -> None:
    render.show_facts(
        [
            ("edgellm", f"{found.edgellm_version} on Python {found.python_version}"),
            ("system", found.system),
            ("processor", f"{found.cpu}, {render.count(found.physical_cores, 'core')}"),
            ("memory", render.size(found.memory_bytes)),
            *(("gpu", gpu) for gpu in found.gpus),
        ]
    )
    print()
    rows = [
        (
            f"{each.runtime} {found.versions[each.runtime]}",
            each.device,
            each.check,
            "pass" if each.passed else "FAIL",
            "" if each.difference is None else f"{each.difference:.1e}",
            each.reason,
        )
        for each in found.outcomes
    ]
    head = ("runtime", "device", "check", "", "largest difference", "")
    render.show_table(head, rows, right="4")
    print()
    passed = len(found.outcomes) - found.failed
    lines = [f"{passed} of {len(found.outcomes)} passed in {render.duration(found.seconds)}"]
    lines += [f"not tried: {name} ({why})" for name, why in found.skipped.items()]
    render.show_notes(lines)
