"""Chat templates: Jinja from an untrusted file, rendered as transformers renders it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.errors import SourceError, UsageError
from edgellm.tokenization.meter import metered

if TYPE_CHECKING:
    import jinja2


_LONGEST_TEMPLATE = 1_000_000
# What a template's expressions raise, beside jinja2's own errors.
_FAILURES = (
    TypeError, LookupError, ValueError, ArithmeticError, AttributeError, AssertionError,
    NotImplementedError, RecursionError, MemoryError,
)  # fmt: skip


def render(
    template: str | None,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    special_tokens: Mapping[str, str],
    **variables: Any,
) -> str:
    """The prompt that ``template`` makes of ``messages``, special tokens written out.

    ``special_tokens`` (``bos_token``, ...) and ``variables`` are what the template can name; the
    latter win. Keys of a message whose value is None are left out, as transformers does. Raises
    ``UsageError`` when there is no template or it refuses the conversation, ``SourceError`` when
    it is not valid Jinja or does not end.
    """
    if not template:
        raise UsageError(
            "this model has no chat template, so a conversation cannot be made into a prompt: "
            "use --raw to send the text as it is, or add a chat_template to tokenizer_config.json"
        )
    compiled = _compiled(template)
    import jinja2

    conversation = [
        {key: value for key, value in message.items() if value is not None} for message in messages
    ]
    names: dict[str, Any] = {
        "tools": None,
        "documents": None,
        **special_tokens,
        **variables,
        "messages": conversation,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with metered():
            return compiled.render(**names)
    except jinja2.TemplateError as error:
        raise UsageError(
            f"the model's chat template refuses this conversation: {error.message or error}"
        ) from error
    except _FAILURES as error:
        raise UsageError(
            f"the model's chat template fails on this conversation: {type(error).__name__}: {error}"
            "; check that each message has a role and a content, or use --raw"
        ) from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    import jinja2

    from edgellm.tokenization.sandbox import sandbox

    if len(template) > _LONGEST_TEMPLATE:
        raise SourceError(
            f"the chat template has {len(template)} characters, more than {_LONGEST_TEMPLATE}: "
            "that is no chat template; mend the file, or use --raw to do without it"
        )
    try:
        return sandbox().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        lines = template.splitlines()
        line = lines[error.lineno - 1].strip() if 0 < error.lineno <= len(lines) else ""
        raise SourceError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            f" (near {line[:80]!r}); mend the template, or use --raw to do without it"
        ) from error
    except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
        # Python's own limits, met by the code that jinja2 makes of the template.
        raise SourceError(
            f"the chat template cannot be compiled: {type(error).__name__}: {error}; mend the "
            "template, or use --raw to do without it"
        ) from error
