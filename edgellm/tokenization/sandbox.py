"""The sandbox that chat templates run in: transformers' environment, with an end to everything.

The environment (blocks trimmed, ``tojson`` without HTML escapes, ``raise_exception``,
``strftime_now``, loop controls, ``generation`` blocks) follows
``transformers.utils.chat_template_utils``. jinja2's sandbox keeps templates from Python's insides,
not from running forever or filling the memory: here steps are counted, and what makes texts long
is looked at before it is done.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from edgellm.tokenization.meter import current, endless

_WIDEST = 10_000  # columns that a text may be filled up to, and parts that a list may be cut into
_LONGEST_NUMBER_BITS = 4096
_LONGEST_SEARCHED = 100_000  # characters, for filters whose search takes the square of them
# Fields of five digits, or as wide as a value says, for ``%`` and for ``str.format``.
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[#0\- +]*(\*|\d{5,}|\d*\.(\*|\d{5,}))")
_WIDE_FIELD = re.compile(r"\{[^{}]*(\d{5,}|\{)")
_FILLING_METHODS = frozenset(("center", "expandtabs", "ljust", "rjust", "zfill"))
_FILLING_FILTERS = frozenset(("batch", "center", "indent", "round", "slice", "tojson", "wordwrap"))
_SEARCHING_FILTERS = frozenset(("striptags", "urlize", "wordwrap"))
_WRITING_FILTERS = frozenset(
    ("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower",
     "pprint", "replace", "string", "striptags", "title", "tojson", "trim", "truncate", "upper",
     "urlencode", "urlize", "wordcount", "wordwrap", "xmlattr")
)  # fmt: skip
_QUICK_FILTERS = frozenset(("count", "d", "default", "first", "last", "length"))
_CALL_STEPS, _ITEMS_A_STEP = 10, 2
# Names that no template writes: their filters count what the compiled template does.
_TURN, _MADE, _JOINED = "edgellm turn", "edgellm made", "edgellm joined"


class Sandbox(ImmutableSandboxedEnvironment):
    """jinja2's sandbox, counting the steps of a template and the texts that it makes."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Python for a template, counting calls put into it."""
        counted = _Counting().visit(source)
        counted.set_environment(self)
        return super()._generate(counted, *args, **kwargs)

    def concat(self, parts: Iterable[str]) -> str:
        """The texts that a template wrote, as one."""
        found = list(parts)
        current().text(sum(map(len, found)))
        return "".join(found)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """``left operator right``, unless that is huge."""
        meter = current()
        meter.step()
        if operator == "%" and isinstance(left, str):
            _check_widths(left, right, _WIDE_PERCENT)
        elif isinstance(left, Sized) or isinstance(right, Sized):
            if operator == "+" and isinstance(left, Sized) and isinstance(right, Sized):
                _count_made(left, len(left) + len(right))
            elif operator == "*" and (isinstance(left, int) or isinstance(right, int)):
                many, times = (right, left) if isinstance(left, int) else (left, right)
                _count_made(many, len(many) * max(0, times))
                meter.text(0 if isinstance(many, str) else meter.weight(many) * max(0, times))
        elif operator in ("*", "**"):
            times = max(1, abs(right)) if isinstance(right, int) else 1
            bits = _bits(left) * times if operator == "**" else _bits(left) + _bits(right)
            if bits > _LONGEST_NUMBER_BITS:
                raise endless("a number too long to calculate with")
        made = super().call_binop(context, operator, left, right)
        meter.weight(made)
        return made

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call that a template makes, unless it makes something huge."""
        meter = current()
        meter.step(_CALL_STEPS)
        # The sandbox wraps str.format, for safety's sake.
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str):
            if name in _FILLING_METHODS:
                _check_fill(args, kwargs)
            elif name == "replace":
                _check_replace(owner, args, kwargs)
            elif name in ("format", "format_map"):
                _check_widths(owner.replace("{{", ""), (*args, *kwargs.values()), _WIDE_FIELD)
            elif name == "join" and args:
                parts = list(args[0])
                meter.text(meter.weight(parts) + len(owner) * len(parts))
                args = (parts,)
        made = super().call(__context, __obj, *args, **kwargs)
        if __obj is dict:
            meter.weight(made)
        elif isinstance(made, str):
            meter.text(len(made))
        return made


class _Counting(NodeTransformer):
    """Puts a count at each turn of a loop, each list that is made and each text that is joined."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        written = 1 + sum(len(each.nodes) for each in node.find_all(nodes.Output))
        turn = _filtered(nodes.Const(written, lineno=node.lineno), _TURN)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED)

    def _visit_made(self, node: nodes.List | nodes.Tuple | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        items = [each for item in node.items for each in _parts(item)]
        if all(isinstance(each, nodes.Const) for each in items):
            return node
        return _filtered(node, _MADE)

    visit_List = visit_Tuple = visit_Dict = _visit_made


def _parts(item: Any) -> tuple[Any, ...]:
    return (item.key, item.value) if isinstance(item, nodes.Pair) else (item,)


def _filtered(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


# These take the context so that jinja2 does not settle them while it compiles.
@pass_context
def _turn(_: Context, written: int) -> None:
    current().step(written)


@pass_context
def _made(_: Context, value: Any) -> Any:
    current().weight(value)
    return value


@pass_context
def _joined(_: Context, parts: Sequence[Any]) -> str:
    meter = current()
    meter.text(sum(map(meter.weight, parts)))
    return "".join(map(str, parts))


def _written(value: Any) -> Any:
    """``value``, which is about to be written out."""
    if not isinstance(value, str):
        meter = current()
        meter.text(meter.weight(value))
    return value


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_fill(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for value in (*args, *kwargs.values()):
        size = abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0
        if size > _WIDEST:
            raise endless(f"a text or list filled up to {size}, more than {_WIDEST},")


def _check_widths(form: str, values: Any, wide: re.Pattern[str]) -> None:
    """``form`` filled with ``values``: no field is wide, whoever says how wide."""
    meter = current()
    meter.text(len(form) + meter.weight(values))
    if wide.search(form):
        raise endless("a field wider than 9999 columns")


def _count_made(kind: Any, length: int) -> None:
    if isinstance(kind, str):
        current().text(length)
    else:
        current().items(length)


def _check_replace(text: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    given = [*args, *(kwargs[key] for key in ("old", "new", "count") if key in kwargs)]
    if len(given) > 1 and isinstance(given[0], str) and isinstance(given[1], str):
        current().text(len(text) + text.count(given[0]) * len(given[1]))


def _watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter ``function``, unless it makes something huge."""
    # Some take the context, the environment or its settings before the value.
    skipped = int(hasattr(function, "jinja_pass_arg"))

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        meter = current()
        before, (value, *more) = args[:skipped], args[skipped:]
        many = (
            isinstance(value, Sized) and not isinstance(value, str) and name not in _QUICK_FILTERS
        )
        meter.step(1 + len(value) // _ITEMS_A_STEP if many else 1)
        if name in _FILLING_FILTERS:
            _check_fill(more, kwargs)
        if name in _WRITING_FILTERS:
            if name == "join" and not isinstance(value, str | dict):
                value = list(value)
            meter.text(meter.weight(value))
            meter.text(_put_between(name, value, more, kwargs))
        if name in _SEARCHING_FILTERS and len(str(value)) > _LONGEST_SEARCHED:
            raise endless(f"more than {_LONGEST_SEARCHED} characters for {name}")
        if name == "replace":
            _check_replace(str(value), more, kwargs)
        if name == "format":
            _check_widths(str(value), (*more, *kwargs.values()), _WIDE_PERCENT)
        return function(*before, value, *more, **kwargs)

    return watched


def _put_between(name: str, value: Any, more: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The characters that ``indent`` puts before lines, and ``join`` between items."""
    given = [*more, *kwargs.values()]
    widths = [each if isinstance(each, int) else len(each) for each in given if _has_width(each)]
    widest = max([4, *widths])
    if name == "indent" and isinstance(value, str):
        return widest * value.count("\n")
    if name == "join" and isinstance(value, Sized):
        return widest * len(value)
    return 0


def _has_width(value: Any) -> bool:
    return isinstance(value, int | str)


class _Namespace(Namespace):
    """jinja2's, written out without what is in it: two that hold each other have no end."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's text for training; here it does nothing."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
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


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.cache
def sandbox() -> Sandbox:
    """The sandbox that all templates share."""
    environment = Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_written,
    )
    environment.filters["tojson"] = _to_json
    for name, function in list(environment.filters.items()):
        environment.filters[name] = _watched(name, function)
    environment.filters.update({_TURN: _turn, _MADE: _made, _JOINED: _joined})
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    # Nobody's chat needs nonsense text, of any length.
    del environment.globals["lipsum"]
    return environment
