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


LOOPS = "{% for a in range(99999) %}" * 3 + "X" + "{% endfor %}" * 3
GROWING = "{% set ns = namespace(s=START) %}{% for i in range(200) %}X{% endfor %}{{ ns.s }}"


def growing(step: str, start: str = "'ab'") -> str:
    """A template that doubles ``ns.s`` 200 times."""
    return GROWING.replace("START", start).replace("X", f"{{% set ns.s = {step} %}}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS.replace("X", ""), "steps"),
        (LOOPS.replace("X", "text" * 100), "steps"),
        ("{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n }}{% endmacro %}{{ m(60) }}", "steps"),
        ("{% for i in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}", "steps"),
        ("{{ 'a' * 10 ** 10 }}", "a text of more than"),
        ("{{ [0] * 10 ** 9 }}", "a text of more than"),
        ("{{ 3 * (10 ** 9 * [0]) }}", "a text of more than"),
        ("{{ 10 ** 99 ** 99 }}", "a number too long"),
        (growing("ns.s * ns.s", "3"), "a number too long"),
        (growing("ns.s + ns.s"), "a text of more than"),
        (growing("ns.s ~ ns.s"), "a text of more than"),
        (GROWING.replace("START", "'ab'").replace(
            "X", "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"
        ), "a text of more than"),
        (growing("ns.s + ns.s", "[1]"), "more than"),
        (growing("[ns.s, ns.s]", "[1]"), "a list of more than"),
        (growing("(ns.s, ns.s)", "[1]"), "a list of more than"),
        (growing("{'a': ns.s, 'b': ns.s}", "[1]"), "a list of more than"),
        (growing("dict(a=ns.s, b=ns.s)", "[1]"), "a list of more than"),
        (growing("ns.s.replace('a', 'aa')"), "a text of more than"),
        (growing("ns.s | replace('a', 'aa')"), "a text of more than"),
        (growing("ns.s.join([ns.s, ns.s])"), "more than"),
        (growing("[ns.s, ns.s] | join(ns.s)"), "more than"),
        (growing("'%s%s' % (ns.s, ns.s)"), "more than"),
        (growing("'%s%s' | format(ns.s, ns.s)"), "more than"),
        (growing("'{0}{0}'.format(ns.s)"), "more than"),
        (growing("ns.s | indent(ns.s, true)", r"'a\n'"), "more than"),
        ("{{ 'a' | center(10 ** 10) }}", "filled up to"),
        ("{{ 'a'.center(10 ** 10) }}", "filled up to"),
        ("{{ 'a'.zfill(width=10 ** 10) }}", "filled up to"),
        ("{{ [1] | batch(10 ** 10, 0) | list }}", "filled up to"),
        ("{{ [1] | slice(10 ** 10) | list }}", "filled up to"),
        ("{{ [1] | tojson(indent=10 ** 10) }}", "filled up to"),
        ("{{ '%9999999999d' % 1 }}", "a field wider"),
        ("{{ '%*d' % (10 ** 10, 1) }}", "a field wider"),
        ("{{ '%.999999999f' | format(1) }}", "a field wider"),
        ("{{ '{:9999999999}'.format(1) }}", "a field wider"),
        ("{{ '{:{}}'.format(1, 10 ** 10) }}", "a field wider"),
        ("{{ ('<' * 500000) | striptags }}", "for striptags"),
        ("{{ strftime_now('%Y' * 9000000) }}", "a text of more than"),
    ],
)  # fmt: skip
def test_a_template_that_does_not_end_is_stopped(
    monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    # Fewer than outside of tests, to be there sooner.
    monkeypatch.setattr("edgellm.tokenization.meter.MOST_STEPS", 500_000)
    monkeypatch.setattr("edgellm.tokenization.meter.LONGEST", 1_000_000)
    with pytest.raises(SourceError, match=rf"chat template takes .*{message}.*--raw"):
        rendered(template)


def test_what_steps_do_not_measure_is_stopped_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("edgellm.tokenization.meter.MOST_SECONDS", 0.05)
    searching = (
        "{% set many = range(99999) | list %}"
        "{% for i in range(99999) %}{% if 'a' in many %}{% endif %}{% endfor %}"
    )
    with pytest.raises(SourceError, match=r"more than 0\.05 seconds"):
        rendered(searching)


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
        "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ " + "9" * 6000 + " }}",
        "a" * 2_000_000,
        "{{ 1 | no_such_filter }}",
        "{{ 1 is no_such_test }}",
    ],
)
def test_a_template_that_cannot_be_compiled_is_named(template: str) -> None:
    with pytest.raises(SourceError, match=r"chat template.*--raw"):
        rendered(template)


@pytest.mark.parametrize(
    "template",
    [
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(1) }}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as o %}{{ o }}",
        "{{ range(10 ** 9) | list }}",
        "{% for x in 5 %}{% endfor %}",
        "{{ loop.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
    ],
)
def test_what_python_refuses_is_an_error_of_ours(template: str) -> None:
    with pytest.raises(UsageError, match="chat template"):
        rendered(template)


def test_long_conversations_are_no_harm() -> None:
    # A template that looks through the whole conversation at every message, and builds its text
    # bit by bit.
    template = (
        "{% set ns = namespace(text='', kept=[]) %}"
        "{% for message in messages %}{% set ns.kept = ns.kept + [message] %}"
        "{% for other in messages[::-1] %}{% if other.role == 'none' %}{% endif %}{% endfor %}"
        "{% set ns.text = ns.text + message.content | trim %}{% endfor %}{{ ns.text }}"
    )
    messages = [{"role": "user", "content": f" {index}" * 200} for index in range(400)]
    text = rendered(template, messages)
    assert text == "".join(str(message["content"]).strip() for message in messages)


def test_namespaces_within_namespaces_are_written_short() -> None:
    # Written out in full, each twice as long as the one inside.
    step = "namespace(a=ns.s, b=ns.s)"
    assert rendered(growing(step, "[1]")) == "<namespace>"
    assert rendered(growing(step).replace("{{ ns.s }}", "{{ [ns.s] }}")) == "[<namespace>]"
    with pytest.raises(UsageError, match="<namespace>"):
        rendered(growing(step).replace("{{ ns.s }}", "{{ raise_exception(ns.s) }}"))
    with pytest.raises(UsageError, match="<namespace>"):
        rendered(growing(step).replace("{{ ns.s }}", "{{ messages[ns.s].x }}"))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ ('a' * 30000) | truncate(20000) | length }}", "20000"),
        ("{% for a, b in [(1, 2), (3, x)] %}{{ loop.last }}{{ a }}{{ b }}{% endfor %}",
         "False12True37"),
        ("{% for a in [x] recursive %}{{ a }}{{ loop([a - 1]) if a > 5 }}{% endfor %}", "765"),
        ("{{ 'a' ~ 1 ~ none ~ x ~ [x] }}", "a1None7[7]"),
        ("{{ [x, 'a'] + [1] }}{{ (x,) }}{{ {'k': x, 'l': [x]} }}",
         "[7, 'a', 1](7,){'k': 7, 'l': [7]}"),
        ("{{ '%-5s|' % 'a' }}{{ '%d %% %s' | format(1, x) }}{{ '{:>4}|{{}}'.format(x) }}",
         "a    |1 % 7   7|{}"),
        ("{{ ['a', x] | join(', ') }}{{ ', '.join(['a', 'b']) }}{{ 'ab' | join('-') }}",
         "a, 7a, ba-b"),
        ("{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent('> ', true) }}", "a\n  b> a\n> b"),
        ("{{ 2 ** 10 * 3 }}{{ 'ab' * 2 }}{{ 2 * [x] }}{{ 7 % 4 }}{{ 1.5 * 2 }}",
         "3072abab[7, 7]33.0"),
        ("{% set a, b = 1, x %}{{ b }}{{ dict(k=[x]) }}{{ range(3) | list }}",
         "7{'k': [7]}[0, 1, 2]"),
        ("{{ messages | map(attribute='role') | join }}{{ messages | selectattr('role', 'equalto',"
         " 'user') | list | length }}", "user1"),
        ("{{ 'x'.center(5) }}{{ 'a-b'.replace('-', '+') }}{{ 'aXb' | replace('X', x) }}",
         "  x  a+ba7b"),
        ("{% macro m(a, b=[1]) %}{{ a }}{{ b }}{% endmacro %}{{ m(x) }}", "7[1]"),
        ("{% set t %}in{{ x }}{% endset %}{{ t }}", "in7"),
    ],
)  # fmt: skip
def test_counting_changes_nothing(template: str, expected: str) -> None:
    assert rendered(template, x=7) == expected
