"""Chat templates: rendered in a sandbox, and refused with a reason that a stranger understands."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from edgellm.errors import SourceError, UsageError
from edgellm.tokenization.chat import render

HELLO = [{"role": "user", "content": "hello"}]


def rendered(template: str | None, messages: Any = HELLO, **variables: Any) -> str:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return render(template, messages, special_tokens=special, **variables)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>hello"),
        ("{% if add_generation_prompt %}yes{% endif %}", "yes"),
        ("a\n  {% if true %}\n  b\n  {% endif %}\nc", "a\n  b\nc"),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "hello"),
        ("""{{ {'b': 'é<', 'a': 1} | tojson }}""", '{"b": "é<", "a": 1}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{{ tools is none }} {{ documents is none }} {{ absent is defined }}", "True True False"),
    ],
)
def test_what_templates_rely_on(template: str, expected: str) -> None:
    assert rendered(template) == expected


def test_the_date_of_today() -> None:
    before = datetime.now().strftime("%d %b %Y")
    shown = rendered("{{ strftime_now('%d %b %Y') }}")
    assert shown in (before, datetime.now().strftime("%d %b %Y"))


def test_keys_without_a_value_are_left_out() -> None:
    template = "{% if 'tool_calls' in messages[0] %}calls{% else %}none{% endif %}"
    assert rendered(template, [{"role": "assistant", "tool_calls": None}]) == "none"
    assert rendered(template, [{"role": "assistant", "tool_calls": []}]) == "calls"


def test_variables_win_over_special_tokens() -> None:
    assert rendered("{{ bos_token }}{{ thinking }}", bos_token="B", thinking=True) == "BTrue"


def test_no_template_says_what_to_do() -> None:
    for nothing in (None, ""):
        with pytest.raises(UsageError, match=r"no chat template.*--raw"):
            rendered(nothing)


def test_a_syntax_error_names_its_line() -> None:
    with pytest.raises(SourceError, match=r"line 2: .*near '\{% if broken\("):
        rendered("fine\n{% if broken( %}\n{% endif %}")


def test_a_template_can_refuse_a_conversation() -> None:
    with pytest.raises(UsageError, match="refuses this conversation: roles must alternate"):
        rendered("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] + 1 }}", "{{ messages[0].missing.deeper }}", "{{ 1 / 0 }}"],
)
def test_a_failing_template_is_an_error_of_ours(template: str) -> None:
    with pytest.raises(UsageError, match="chat template"):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['sys'] }}",
    ],
)
def test_a_template_cannot_leave_the_sandbox(template: str) -> None:
    messages = [*HELLO]
    with pytest.raises(UsageError, match="chat template"):
        rendered(template, messages)
    assert messages == HELLO
