"""The text that models are compared on where the user names none, and cutting texts into windows.

Half of it is prose, code and lists, in our own words; half are questions with answers, which go
through the model's chat template where it has one: a fine-tune for chats shows there, and may not
in prose. A text of the fine-tune's own field measures it best (``--calibration-text FILE``).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from edgellm.errors import UsageError

if TYPE_CHECKING:
    from edgellm.tokenization import Tokenizer

WINDOW_TOKENS = 256
TEXT_TOKENS = 1024
"""Tokens that are compared by default, in windows of at most ``WINDOW_TOKENS``."""


def windows(
    tokenizer: Tokenizer,
    text: str | None = None,
    *,
    tokens: int = TEXT_TOKENS,
    window_tokens: int = WINDOW_TOKENS,
) -> list[list[int]]:
    """At most ``tokens`` token ids in windows of ``window_tokens`` at the most.

    Each begins with what the tokenizer puts before a text. ``text`` None is the built-in one, whose
    chats and passages take turns. Raises ``UsageError`` for a text without tokens.
    """
    pieces = (
        _built_in(tokenizer, window_tokens)
        if text is None
        else _cut(tokenizer, tokenizer.encode(text, parse_special=False), window_tokens)
    )
    found: list[list[int]] = []
    left = tokens
    for piece in pieces:
        if left < 2:
            break
        found.append(piece[:left])
        left -= len(found[-1])
    if not found:
        raise UsageError("the calibration text has no tokens: name a file that holds some text")
    return found


def read_text(path: Path) -> str:
    """The content of a UTF-8 text file; raises ``UsageError`` when it is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read the calibration text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(
            f"the calibration text {path} is not UTF-8 ({error}): name a plain text file"
        ) from error


def _cut(tokenizer: Tokenizer, ids: list[int], window_tokens: int) -> Iterator[list[int]]:
    prefix = list(tokenizer.settings.prefix_ids)
    step = max(1, window_tokens - len(prefix))
    for start in range(0, len(ids), step):
        yield [*prefix, *ids[start : start + step]]


def _built_in(tokenizer: Tokenizer, window_tokens: int) -> Iterator[list[int]]:
    """A chat, a passage, a chat, ...; one of them a window."""
    chats = (_chat(tokenizer, turns)[:window_tokens] for turns in CHATS)
    passages = (tokenizer.encode(text, add_special=True)[:window_tokens] for text in PASSAGES)
    for piece in chain.from_iterable(zip_longest(chats, passages)):
        if piece is not None:
            yield piece


def _chat(tokenizer: Tokenizer, turns: tuple[str, ...]) -> list[int]:
    """Questions and answers in turn, as the model's template writes them or in plain words."""
    if tokenizer.chat_template is None:
        speakers = cycle(("Question", "Answer"))
        lines = [f"{next(speakers)}: {text}" for text in turns]
        return tokenizer.encode("\n".join(lines), add_special=True)
    roles = cycle(("user", "assistant"))
    messages = [{"role": next(roles), "content": text} for text in turns]
    # The template writes the begin token itself.
    return tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=False))


CHATS = (
    (
        "What is the capital of France, and what is it known for?",
        "The capital of France is Paris. It is known for the Eiffel Tower, for its museums, the "
        "Louvre above all, and for its cafes and bakeries. The river Seine runs through it.",
        "How far is it from there to the sea?",
        "About 170 kilometres: the nearest coast is in Normandy, two hours away by train.",
    ),
    (
        "Write a short poem about the rain.",
        "The rain comes softly down the lane,\nit taps upon the window pane,\nit fills the river, "
        "field and stone,\nand sings to those who sit alone.",
    ),
    (
        "How do I boil an egg?",
        "Bring a pot of water to a boil and lower the egg in with a spoon. Wait six minutes for a "
        "soft yolk, or ten for a hard one. Then put the egg into cold water for a minute, so that "
        "it stops cooking and is easier to peel.",
    ),
    (
        "I have 12 apples, give away 5 and buy 8. How many have I now?",
        "You begin with 12 apples. After giving away 5 you have 12 - 5 = 7. After buying 8 more "
        "you have 7 + 8 = 15 apples.",
    ),
    (
        "Can you write a Python function that tells whether a number is even?",
        "Of course:\n\ndef is_even(number):\n    return number % 2 == 0\n\n"
        "The operator % gives the "
        "rest of a division, which is zero for even numbers.",
    ),
    (
        "Tell me about yourself. Who are you?",
        "I am an assistant that answers questions and helps with writing, with code and with "
        "planning. What would you like to talk about today?",
    ),
)
"""Questions and answers in turn, the person first."""

PASSAGES = (
    "The old harbour lay quiet in the early morning. A few fishing boats were tied to the wall, "
    "their nets drying in the wind, and an old man sat on a crate and mended one of them with a "
    "wooden needle. Nobody had told him that the boats would not go out that day. When the bell of "
    "the church rang eight he looked up, counted the masts as he always did, and noticed that one "
    "was missing. He put his work aside, walked to the end of the pier, and looked for a long time "
    "at the grey line where the water met the sky.",
    "Plants make their food from light, water and the carbon dioxide of the air. The green of "
    "their leaves is chlorophyll, which takes in red and blue light and leaves the green over. "
    "With the energy of that light a plant splits water into hydrogen and oxygen; the oxygen goes "
    "back into the air, and the hydrogen helps to build sugar. At night, when there is no light, "
    "plants burn some of that sugar as animals do. A grown tree gives off about as much oxygen in "
    "a year as two people breathe.",
    "import json\n\n\n"
    "def read_scores(path):\n"
    '    """The highest score of each player in a file of lines."""\n'
    "    scores = {}\n"
    "    with open(path) as file:\n"
    "        for line in file:\n"
    "            entry = json.loads(line)\n"
    '            name = entry["name"]\n'
    '            scores[name] = max(scores.get(name, 0), entry["score"])\n'
    "    return scores\n",
    "To: all members of the club\nSubject: Meeting on Thursday\n\nDear friends,\n\n"
    "our next meeting will be on Thursday, 14 March, at 7 p.m. in the library. Please bring:\n\n"
    "1. your membership card,\n2. a book that you would like to talk about,\n"
    "3. something small to eat.\n\n"
    "If you cannot come, let us know by Tuesday.\n\nKind regards,\nAnna",
    "In the year 1492 three ships left a small port in Spain and sailed west. Their captain "
    "believed that the world was smaller than it is, and that he would reach Asia in a few weeks. "
    "After two months without land the crews grew afraid and asked him to turn back. On 12 October "
    "a sailor saw a light, and in the morning there was an island. The captain was sure until his "
    "death that he had found the way to India.",
)
"""Prose, code and a letter."""
