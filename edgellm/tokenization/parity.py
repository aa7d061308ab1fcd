"""Whether two tokenizers give the same ids, on texts that are known to set tokenizers apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from edgellm.manifest import Parity


class Encoder(Protocol):
    """Anything that turns text into token ids."""

    @property
    def special_texts(self) -> Sequence[str]:
        """The texts of special tokens."""

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        """The ids of ``text``."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of ``ids``."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a container's reader is known to do differently, and which texts that ``concerns``."""

    sentence: str
    concerns: Callable[[str], bool]


# Texts, not words: what goes wrong is where one kind of character meets another.
AWKWARD_TEXTS: tuple[str, ...] = (
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "a",
    "Hello, world!",
    " leading space",
    "trailing space ",
    "  two leading, two trailing  ",
    "double  spaces   and    more     of      them",
    "line one\nline two\r\nline three\n\n\nline six",
    "\n1",
    "\n\n12\n345\n\n\n6789",
    "  7  88   999",
    "3 33 333 3333 33333 333333 3333333 33333333 3.14159 1,000,000.00 1e-5 0x1F",
    "In 2024, 3rd of 100% at $5.00/kg; 12:34:56",
    "٣٤٥ ۷۸ १२३ ２０２４ ①② ½¾ Ⅷ x²",
    "I've I'm you're he'd she'll it's they'VE DON'T 'tis rock'n'roll o’clock ''quoted'' 'S",
    "我想在apple工作1314151天～ 你好，世界。「引用」",
    "これは日本語のテキストです。カタカナとひらがな、漢字。",
    "한국어 텍스트입니다. 띄어쓰기 시험",
    "Привет, Мир! ПРИВЕТмир ёЁ",
    "Ünïcödé ÀÉÎõü ñ ß ẞ İı ŒuvreÉTÉ",
    "cafe\u0301 e\u0301\u0301 a\u0308o\u0308 n\u0303 Z\u0361A\u0335L\u0336",
    "हिन्दी में देवनागरी লেখা ภาษาไทย កាន់តែពិសេស தமிழ்",
    "שלום עולם مرحبا بالعالم \u200fRTL\u200e mixed عربي 123",
    "🙂😀 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 👍🏽 ✌️ ☺ 🦙🦙 text🚀text",
    "def f(x):\n\tif x  >= 10:\n\t\treturn [i**2 for i in range(x)]\n    else:\n        pass\n",
    '#include <stdio.h>\nint main(void) { printf("%d\\n", a[0] += 1); /* c */ } // end',
    '{"key": [1, 2.5, null], "nested": {"a\\tb": "\\u00e9"}}',
    "https://example.org/path?q=a+b&c=%20#frag user@mail.com C:\\dir\\file.txt",
    "<div class='x'>&amp;</div> <!-- c --> </s> <s> <unk> <pad> [INST] [/INST] <|x|>",
    "camelCaseWord HTTPServer snake_case_word kebab-case-word SCREAMING_CASE iPhone15Pro",
    "------======= ++++ ***** ~~~~ ____ ..... !!!??? ``` \"\"\"''' ((([[[{{{",
    "\u00a0nbsp\u00a0\u00a0x \u3000wide\u2003em\u2009thin\u200bzero\ufeffbom\u2028ls\u0085nel",
    "\x00\x01\x02\x07\x08\x0b\x0c\x1b[31m\x7f\x80\x9f",
    "\u2581already\u2581escaped \u0120dotted\u010a Ġ Ċ ▁▁",
    "\ufffd\uffff\U0010ffff \ue000 𝒜𝓫 𐍈 𠀀",
    "a" * 40 + "b" * 400,
    "=" * 67,
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "x " * 30,
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
)
_MOST_SPECIAL_TOKENS = 24
_MOST_EXAMPLES = 12
_SHOWN_IDS = 12


def cases(special_tokens: Sequence[str] = ()) -> Iterator[str]:
    """The built-in texts, then each special token alone, between words, and doubled."""
    yield from AWKWARD_TEXTS
    for token in special_tokens[:_MOST_SPECIAL_TOKENS]:
        yield token
        yield f"before{token}after"
        yield f"before {token} after"
        yield f"{token}{token}\n{token[:-1]} {token[1:]}"


def check_parity(
    a: Encoder,
    b: Encoder,
    *,
    method: str = "ids of the source and of the artifact",
    limits: Sequence[Limit] = (),
    decodes: bool = True,
) -> Parity:
    """Whether ``a`` and ``b`` give equal ids to every awkward text, each difference as a line.

    Every text is encoded bare, with the special tokens of a beginning and an end, and with special
    tokens in the text taken as plain characters; the ids of the bare text are decoded again unless
    ``decodes`` is False. ``a``'s special tokens are tried inside text. A difference in a text that
    one of ``limits`` concerns is listed as ``known``, any other as a mismatch.
    """
    texts = tuple(dict.fromkeys(cases(a.special_texts)))
    mismatches: list[str] = []
    known: list[str] = []
    for text in texts:
        difference = _difference(a, b, text, decodes)
        if difference is not None:
            expected = any(limit.concerns(text) for limit in limits)
            (known if expected else mismatches).append(difference)
    return Parity(
        equal=not mismatches and not known,
        cases=len(texts),
        method=method,
        mismatches=_some(mismatches),
        known=_some(known),
    )


def _difference(a: Encoder, b: Encoder, text: str, decodes: bool) -> str | None:
    """The first thing that ``a`` and ``b`` do differently with ``text``, None for nothing."""
    for add_special, parse_special in ((False, True), (True, True), (False, False)):
        ids_a = a.encode(text, add_special=add_special, parse_special=parse_special)
        ids_b = b.encode(text, add_special=add_special, parse_special=parse_special)
        if ids_a != ids_b:
            return _describe(text, add_special, parse_special, ids_a, ids_b)
    ids = a.encode(text) if decodes else []
    for skip_special in (False, True):
        back_a, back_b = (each.decode(ids, skip_special) for each in (a, b))
        if back_a != back_b:
            how = "" if skip_special else ", special tokens written out"
            return f"the ids of {text[:60]!r} decoded{how}: {back_a[:60]!r} and {back_b[:60]!r}"
    return None


def _some(differences: list[str]) -> tuple[str, ...]:
    shown = tuple(differences[:_MOST_EXAMPLES])
    left = len(differences) - len(shown)
    return (*shown, f"and {left} more texts") if left else shown


def _describe(
    text: str, add_special: bool, parse_special: bool, ids_a: list[int], ids_b: list[int]
) -> str:
    """One mismatch: the text, and the ids from the first that differs on."""
    start = next(
        (i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=False)) if x != y),
        min(len(ids_a), len(ids_b)),
    )
    how = "" if parse_special else ", special tokens as text"
    how += ", with begin and end" if add_special else ""
    return (
        f"{text[:60]!r}{how}: from token {start}: "
        f"{ids_a[start : start + _SHOWN_IDS]} and {ids_b[start : start + _SHOWN_IDS]}"
    )


def with_mismatches(parity: Parity, more: Sequence[str]) -> Parity:
    """``parity`` with ``more`` mismatches."""
    if not more:
        return parity
    return msgspec.structs.replace(
        parity, equal=False, mismatches=tuple(dict.fromkeys((*parity.mismatches, *more)))
    )


def merged(first: Parity, second: Parity) -> Parity:
    """Both verdicts on the same texts as one; a mismatch that both found stands once."""
    return Parity(
        equal=first.equal and second.equal,
        cases=max(first.cases, second.cases),
        method=f"{first.method}; {second.method}",
        mismatches=tuple(dict.fromkeys((*first.mismatches, *second.mismatches))),
        known=tuple(dict.fromkeys((*first.known, *second.known))),
    )
