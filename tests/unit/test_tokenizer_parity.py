"""The parity check: what it compares, and that it can say no."""

from __future__ import annotations

from collections.abc import Sequence

from edgellm.tokenization import AWKWARD_TEXTS, check_parity


class Fake:
    """A tokenizer of characters that errs where it is told to."""

    def __init__(self, wrong: str = "\0never", special_texts: tuple[str, ...] = ("<s>",)) -> None:
        self.wrong = wrong
        self.special_texts = special_texts
        self.plain_only = False
        self.loud = False

    def encode(
        self, text: str, *, add_special: bool = False, parse_special: bool = True
    ) -> list[int]:
        ids = [*([1] if add_special else []), *map(ord, text)]
        errs = self.wrong in text and not (self.plain_only and parse_special)
        return [*ids, 2] if errs else ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        text = "".join(map(chr, ids))
        return text.upper() if self.loud and not skip_special else text


def test_equal_tokenizers() -> None:
    verdict = check_parity(Fake(), Fake(), method="two fakes")
    assert verdict.equal
    assert verdict.method == "two fakes"
    assert verdict.cases >= len(AWKWARD_TEXTS)
    assert verdict.mismatches == ()


def test_a_difference_is_shown_by_example() -> None:
    verdict = check_parity(Fake(), Fake("٣٤٥"))
    assert not verdict.equal
    (line,) = verdict.mismatches
    assert "٣٤٥" in line
    assert line.endswith("[] and [2]")


def test_special_tokens_are_tried_inside_text() -> None:
    assert not check_parity(Fake(special_texts=("<tool>",)), Fake("before<tool>after")).equal


def test_special_tokens_as_text_are_compared_too() -> None:
    other = Fake("<s>")
    other.plain_only = True
    verdict = check_parity(Fake(), other)
    assert "special tokens as text" in verdict.mismatches[0]


def test_many_differences_are_counted() -> None:
    verdict = check_parity(Fake(), Fake(""))
    assert len(verdict.mismatches) == 13
    assert verdict.mismatches[-1] == f"and {verdict.cases - 12} more texts"


def test_the_awkward_texts_hold_what_is_known_to_go_wrong() -> None:
    everything = "\n".join(AWKWARD_TEXTS)
    for kind in (
        "\n1",
        "  two",
        "\t",
        "عربي",
        "👨‍👩‍👧‍👦",
        "e\u0301",
        "٣",
        "日本語",
        "한국어",
        "I've",
        "\x00",
    ):
        assert kind in everything
    assert "" in AWKWARD_TEXTS
    assert any(len(text) > 400 and " " not in text for text in AWKWARD_TEXTS)


def test_ids_are_decoded_again() -> None:
    other = Fake()
    other.loud = True
    verdict = check_parity(Fake(), other)
    assert "'a' decoded, special tokens written out: 'a' and 'A'" in verdict.mismatches[0]
    assert check_parity(Fake(), other, decodes=False).equal
