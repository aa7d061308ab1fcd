"""The interactive chat of ``edgellm run``: lines in, streamed answers out, slash commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgellm.cli import render
from edgellm.errors import EdgeError, UsageError

if TYPE_CHECKING:
    from edgellm.chat import ChatSession
    from edgellm.generate import Answer

PROMPT = ">>> "
MORE = "... "

HELP = """\
/adapter     the LoRA adapters; NAME=0.5 or PATH applies one, NAME off stops it
/clear       forget the conversation
/stats       speed and memory of the last answer, and how full the context is
/save FILE   write the conversation to a file, as JSON
/help        this
/exit        leave (so does Ctrl-D)
\"\"\"          before and after a text of several lines that you type
Ctrl-C       stop the answer; the conversation goes on"""


class Chat:
    """A conversation on a terminal; ``options`` go to every ``session.stream``."""

    def __init__(
        self, session: ChatSession, options: dict[str, Any], *, show_stats: bool = False
    ) -> None:
        self._session = session
        self._options = options
        self._show_stats = show_stats
        self._last: Answer | None = None
        self._commands: dict[str, Callable[[str], None]] = {
            "/adapter": self._adapter,
            "/clear": self._clear,
            "/help": self._help,
            "/save": self._save,
            "/stats": self._stats,
        }

    def run(self) -> None:
        """Read and answer until /exit, Ctrl-D or a second Ctrl-C at an empty prompt."""
        _edit_lines()
        choice, room = self._session.choice, self._session.context_tokens
        render.say(f"{choice.runtime} on {choice.device}, with room for {room} tokens.")
        if self._session.tokenizer.chat_template is None:
            render.say("This model has no chat template: each text is continued, nothing is kept.")
        render.say("Type a message, /help for commands, Ctrl-D to leave.")
        interrupted = False
        while True:
            try:
                text = _read()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if interrupted:
                    return
                render.say("Ctrl-C again, Ctrl-D or /exit leaves.")
                interrupted = True
                continue
            interrupted = False
            if text in ("/exit", "/quit", "/bye"):
                return
            if text:
                try:
                    self._handle(text)
                except KeyboardInterrupt:  # before an answer had begun, or as it ended
                    render.say("(stopped)")

    def _handle(self, text: str) -> None:
        name, _, argument = text.partition(" ")
        if name in self._commands:
            self._commands[name](argument.strip())
        elif name.startswith("/") and "/" not in name[1:] and "\n" not in text:
            render.say(f"no command {name}: /help lists them (a message cannot start with /)")
        else:
            try:
                self._answer(text)
            except EdgeError as error:  # a full context ends an answer, not the chat
                render.say_error(error)

    def _answer(self, text: str) -> None:
        forgotten = self._session.forgotten
        self._last = render.show_stream(self._session.stream(text, **self._options))
        if self._last.finish_reason == "cancelled":
            render.say("(stopped)")
        if left := self._session.forgotten - forgotten:
            render.say(f"(the context was full: the oldest {left} messages are forgotten)")
        max_tokens, room = self._options["max_tokens"], self._session.context_tokens
        if why := render.why_cut(self._last, max_tokens, room):
            render.say(f"(cut: {why})")
        if self._show_stats:
            self._stats("")

    def _adapter(self, argument: str) -> None:
        session = self._session
        told = len(session.adapter_notes)
        name, _, rest = argument.rpartition(" ")
        try:
            if rest == "off" and name:
                if name not in session.adapters:
                    raise UsageError(f"no adapter named {name!r}: /adapter lists them")
                session.set_adapters({**session.adapters, name: 0.0})
            elif argument:
                session.add_adapter(argument)
        except EdgeError as error:
            render.say_error(error)
            return
        known = session.adapters
        render.say_notes(session.adapter_notes[told:])
        render.say_notes(
            [f"{name}  {weight:g}" if weight else f"{name}  off" for name, weight in known.items()]
            or ["no adapters: /adapter PATH[=WEIGHT] applies one"]
        )

    def _clear(self, _: str) -> None:
        self._session.clear()
        self._last = None
        render.say("the conversation is forgotten")

    def _help(self, _: str) -> None:
        render.say(HELP)

    def _save(self, argument: str) -> None:
        if not argument:
            render.say("/save needs a file name: /save talk.json")
            return
        import json

        system = self._session.system
        first = [{"role": "system", "content": system}] if system else []
        document = {"messages": [*first, *self._session.messages]}
        target = Path(argument).expanduser()
        try:
            target.write_text(
                json.dumps(document, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
            )
        except OSError as error:
            render.say(f"cannot write {target}: {error.strerror}")
            return
        render.say(f"{len(document['messages'])} messages written to {target}")

    def _stats(self, _: str) -> None:
        if self._last is None:
            render.say("nothing was answered yet")
            return
        render.say_notes(render.answer_facts(self._last))
        used, room = self._session.used_tokens, self._session.context_tokens
        render.say_notes([f"context: {used} of {room} tokens"])


def _read() -> str:
    text = input(PROMPT).strip()
    if not text.startswith('"""'):
        return text
    text = text.removeprefix('"""')
    lines = [text] if text else []
    while not text.endswith('"""'):
        text = input(MORE)
        lines.append(text)
    return "\n".join(lines).removesuffix('"""').strip()


def _edit_lines() -> None:
    """Arrow keys, history and pasted lines in ``input``, where the platform has readline."""
    if sys.platform != "win32":
        import readline

        readline.set_auto_history(True)
        if "libedit" not in (readline.__doc__ or ""):
            # Python turns it off; with it, a text of several lines that is pasted is one message.
            readline.parse_and_bind("set enable-bracketed-paste on")
