"""Text out of a session: sampling, stopping, streaming, and what it took.

The engine below knows token ids only and the tokenizer knows text only; here they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, Self

from edgellm.drafting import Drafter, Lookahead
from edgellm.errors import GenerationError, UsageError
from edgellm.hardware import peak_memory_bytes
from edgellm.prefix_cache import PrefixCache
from edgellm.runtimes.session import Logits, Session
from edgellm.runtimes.token_prefix import shared_length
from edgellm.sampling import Sampler, SamplingOptions
from edgellm.token_times import TokenTimes, clock

FinishReason = Literal["stop", "length", "cancelled"]

ContextPolicy = Literal["stop", "shift", "sinks"]
"""What happens when the context is full: the answer ends; or the oldest tokens behind the beginning
are forgotten, and those that stay are computed anew. ``shift`` keeps the whole beginning (a system
message), ``sinks`` the few tokens that all others attend to (arXiv 2309.17453)."""

SINK_TOKENS = 4
"""First tokens that are never forgotten: without them a model loses its thread (ibid., table 2)."""


class TextStepper(Protocol):
    """Turns ids into text one by one, never splitting a character."""

    def step(self, token_id: int) -> str | None: ...

    def finish(self) -> str | None: ...


class Decoding(Protocol):
    """What generation needs of a tokenizer."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    def decode_stream(self) -> TextStepper: ...


@dataclass(frozen=True, slots=True)
class Answer:
    """What was generated and what it took; the fields of ``run --json``.

    ``token_ids``: the new tokens, without the one that ended the text. ``finish_reason``: ``stop``
    (the model ended, or a stop string appeared), ``length`` (``max_tokens``, or the context is
    full), ``cancelled``. ``time_to_first_token_s``: from before the prompt is tokenized to the
    first token's text.
    ``prefilled_tokens``: tokens of the prompt that had to be computed; the others were cached.
    Rates exclude the time that whoever reads the stream takes; ``decode_tokens_per_s`` is None when
    only one token was generated. ``forgotten_tokens`` left a full context to make room.
    ``drafted_tokens`` were guessed ahead, and ``accepted_tokens`` of
    them came true. ``peak_memory_bytes`` is the process's, mapped files counted.
    ``seed``: None for greedy decoding.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    prefilled_tokens: int
    new_tokens: int
    finish_reason: FinishReason
    time_to_first_token_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None
    peak_memory_bytes: int
    runtime: str
    device: str
    reason: str
    seed: int | None = None
    forgotten_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, ready for JSON."""
        return asdict(self)


class StopStrings:
    """Cuts a text stream at the first of some strings, also where one spans several pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty: every text would end before it begins")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text so far may be shown; what may begin a stop string is held back."""
        if not self._stops:
            return piece
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        hold = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The text held back, once nothing can follow."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def reuse_prefix(session: Session, prompt_ids: Sequence[int]) -> int:
    """Trim ``session`` to what its cache shares with ``prompt_ids``; the number of tokens kept.

    At least one token is left to compute, because its logits are needed.
    """
    shared = min(shared_length(session.tokens, prompt_ids), len(prompt_ids) - 1)
    if shared < len(session.tokens):
        session.trim(shared)
    return shared


class AnswerStream(Iterator[str]):
    """The answer as it comes: iterate for pieces of text, then ask for ``answer()``.

    ``close`` (or leaving the ``with`` block, or Ctrl-C while it computes) cancels: the cache then
    holds exactly the tokens that were computed, and the session can go on. The pieces joined are
    ``text``: the decoded tokens, cut at a stop string. ``times``: what each token took.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Decoding,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingOptions | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        reuse_cache: bool = False,
        prefixes: PrefixCache | None = None,
        owner: str = "",
        drafter: Drafter | None = None,
        context_policy: ContextPolicy = "stop",
        beginning_tokens: int = 0,
        started_s: float | None = None,
        ignore_end: bool = False,
        reason: str = "",
        on_end: Callable[[AnswerStream], None] | None = None,
    ) -> None:
        """Raises ``GenerationError`` when the prompt is empty or does not fit the context.

        ``beginning_tokens``: how many of the prompt ``shift`` must keep. ``ignore_end``: go on
        behind tokens that end a text. ``started_s``: when it was asked for, by
        ``token_times.clock``.
        """
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}: choose 1 or more")
        if not prompt_ids:
            raise GenerationError("the prompt is empty: give at least one token")
        if len(prompt_ids) >= session.context_tokens:
            raise GenerationError(
                f"the prompt has {len(prompt_ids)} tokens and the context holds "
                f"{session.context_tokens}, the answer included: shorten the prompt, start the "
                "chat over (/clear), or open the model with a larger context (--context)"
            )
        self._session = session
        self._tokenizer = tokenizer
        self._prompt_ids = tuple(prompt_ids)
        self._sampler = Sampler(sampling or SamplingOptions())
        self._max_tokens = max_tokens
        self._stops = StopStrings(stop)
        self._reuse_cache = reuse_cache
        self._policy = context_policy
        self._kept = max(SINK_TOKENS, beginning_tokens if context_policy == "shift" else 0)
        self._held = [*prompt_ids]
        self._forgotten = 0
        self._prefixes, self._owner = prefixes, owner
        self._ahead = None if drafter is None else Lookahead(session, drafter)
        self._ends = frozenset(() if ignore_end else tokenizer.eos_token_ids)
        self.times = TokenTimes(clock() if started_s is None else started_s)
        self._reason = reason
        self._on_end = on_end
        self._shown: list[str] = []
        self._token_ids: list[int] = []
        self._prefilled = 0
        self._finish_reason: FinishReason = "cancelled"
        self._ended = False
        self._pieces: Generator[str, None, None] = self._generate()

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._shown)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The new tokens so far."""
        return tuple(self._token_ids)

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended; ``cancelled`` while it has not."""
        return self._finish_reason

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End now, if it has not ended; harmless otherwise."""
        self._pieces.close()
        self._end()

    def answer(self) -> Answer:
        """The whole answer, or what there is of it once closed; reads the stream to its end."""
        for _ in self:
            pass
        sampling, times = self._sampler.options, self.times
        return Answer(
            text=self.text,
            token_ids=self.token_ids,
            prompt_tokens=len(self._prompt_ids),
            prefilled_tokens=self._prefilled,
            new_tokens=len(self._token_ids),
            finish_reason=self._finish_reason,
            time_to_first_token_s=times.first_token_s,
            prefill_tokens_per_s=self._prefilled / times.prefill_s if times.prefill_s else 0.0,
            decode_tokens_per_s=times.decode_tokens_per_s,
            peak_memory_bytes=peak_memory_bytes(),
            runtime=self._session.runtime,
            device=self._session.device,
            reason=self._reason,
            seed=self._sampler.seed if sampling.temperature > 0 else None,
            forgotten_tokens=self._forgotten,
            drafted_tokens=self._ahead.guessed if self._ahead else 0,
            accepted_tokens=self._ahead.taken if self._ahead else 0,
        )

    def _end(self) -> None:
        if not self._ended:
            self._ended = True
            if self._on_end is not None:
                self._on_end(self)

    def _generate(self) -> Generator[str, None, None]:
        try:
            yield from self._texts()
        finally:
            if self._ahead is not None:  # what was guessed and not said leaves the cache
                self._ahead.forget(len(self._held))

    def _next_logits(self) -> Logits:
        """Logits of what follows the tokens that are held, whose last is not computed yet."""
        if len(self._held) > self._session.context_tokens:
            return self._make_room()
        if self._ahead is None:
            return self._session.decode(self._held[-1])
        limit = self._max_tokens or self._session.context_tokens
        return self._ahead.logits_after(self._held, limit - len(self._token_ids))

    def _make_room(self) -> Logits:
        """Forget tokens behind the beginning, so that half of the room behind it is free again."""
        room = self._session.context_tokens
        kept = min(self._kept, room // 2)
        rest = self._held[-max(1, (room - kept) // 2) :]
        self._forgotten += len(self._held) - kept - len(rest)
        self._held = [*self._held[:kept], *rest]
        if self._ahead is not None:
            self._ahead.forget(kept)
        else:
            self._session.trim(kept)
        logits: Logits = self._session.prefill(rest)[-1]
        return logits

    def _chosen(self, logits: Logits, seen: Sequence[int]) -> int:
        token = self._sampler.pick(logits, seen)
        self.times.chosen(ends=token in self._ends)
        return token

    def _texts(self) -> Generator[str, None, None]:
        session, stops, times = self._session, self._stops, self.times
        steps = self._tokenizer.decode_stream()
        times.begin()
        if self._prefixes is not None:
            reused = self._prefixes.reuse(session, self._prompt_ids, self._owner)
        elif self._reuse_cache:
            reused = reuse_prefix(session, self._prompt_ids)
        else:
            reused = 0
            session.trim(0)
        logits = session.prefill(self._prompt_ids[reused:])[-1]
        self._prefilled = len(self._prompt_ids) - reused
        if self._prefixes is not None:
            logits = logits.copy()
            self._prefixes.keep(session, self._owner)
        times.computed()
        seen = [*self._prompt_ids]
        token = self._chosen(logits, seen)
        while token not in self._ends:
            self._token_ids.append(token)
            seen.append(token)
            self._held.append(token)
            piece = stops.push(steps.step(token) or "")
            times.said()
            if piece:
                self._shown.append(piece)
                yield piece
                times.resumed()
            if stops.found:
                break
            full = self._policy == "stop" and len(self._held) > session.context_tokens
            if full or len(self._token_ids) == self._max_tokens:
                self._finish_reason = "length"
                break
            logits = self._next_logits()
            times.computed()
            token = self._chosen(logits, seen)
        if self._finish_reason != "length":
            self._finish_reason = "stop"
        rest = "" if stops.found else stops.push(steps.finish() or "") + stops.flush()
        if rest:
            self._shown.append(rest)
            yield rest
