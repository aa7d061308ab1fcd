"""How much context an artifact states: the model's, what its runtime is right for, or less."""

from __future__ import annotations

from edgellm.errors import UsageError


def capped_context(
    trained: int, asked: int | None, usable: int | None = None, because: str = ""
) -> tuple[int, tuple[str, ...]]:
    """The context in tokens, and a line for each reason why it is not the ``trained`` one.

    ``usable``: what the container's runtime is right for, where that is less, ``because`` of what.
    Raises ``UsageError`` when more is ``asked`` for than the model has.
    """
    if asked is not None and asked > trained:
        raise UsageError(
            f"--context {asked} is more than the model's {trained}: choose at most {trained}"
        )
    context, notes = trained, []
    if usable is not None and usable < context:
        context = usable
        notes.append(f"context capped at {context} tokens instead of {trained}: {because}")
    if asked is not None and asked < context:
        context = asked
        notes.append(f"context capped at {context} tokens as asked")
    return context, tuple(notes)
