"""Chat templates: Jinja from an untrusted file, rendered as transformers renders it.

The environment (sandbox, blocks trimmed, ``tojson`` without HTML escapes, ``raise_exception``,
``strftime_now``, loop controls, ``generation`` blocks) follows
``transformers.utils.chat_template_utils``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgellm.errors import SourceError, UsageError

if TYPE_CHECKING:
    import jinja2


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
    it is not valid Jinja.
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
        return compiled.render(**names)
    except jinja2.TemplateError as error:
        raise UsageError(
            f"the model's chat template refuses this conversation: {error.message or error}"
        ) from error
    except (TypeError, KeyError, ValueError, ArithmeticError) as error:
        raise UsageError(
            f"the model's chat template fails on this conversation: {type(error).__name__}: {error}"
            "; check that each message has a role and a content, or use --raw"
        ) from error


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    import jinja2

    try:
        return _environment().from_string(template)
    except jinja2.TemplateSyntaxError as error:
        lines = template.splitlines()
        line = lines[error.lineno - 1].strip() if 0 < error.lineno <= len(lines) else ""
        raise SourceError(
            f"the chat template is not valid Jinja: line {error.lineno}: {error.message}"
            f" (near {line[:80]!r}); mend the template, or use --raw to do without it"
        ) from error


@functools.cache
def _environment() -> jinja2.Environment:
    """The sandbox that all templates share; jinja2 is imported here, when first needed."""
    import json
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's text for training; here it does nothing."""

        tags = frozenset({"generation"})  # type: ignore[assignment]

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
