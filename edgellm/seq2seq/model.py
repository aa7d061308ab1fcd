"""Open an encoder with a decoder and ask it: a text goes in, another comes out token by token."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, Self, get_args

import numpy as np

from edgellm.artifact import Artifact, open_artifact
from edgellm.artifact import verify as verify_artifact
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.manifest import Seq2SeqFacts
from edgellm.runtimes.ort_seq2seq import OnnxSeq2Seq, open_graphs_of
from edgellm.runtimes.session import Device
from edgellm.sampling import Sampler, SamplingOptions
from edgellm.tokenization import Tokenizer
from edgellm.tokenization.tokenizer import EncodedText


@dataclass(frozen=True, slots=True)
class Seq2SeqAnswer:
    """A finished answer.

    ``finish_reason``: ``stop`` where the model ended it, ``length`` where it was cut (models that
    force an end put it there then). ``prompt_tokens``: of the text; ``truncated``: it was longer
    than the model looks, and its end did not count. ``first_token_s``: from the text to the
    answer's first token, ``end_to_end_s`` to its last.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    truncated: bool
    first_token_s: float
    end_to_end_s: float
    seed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def open_seq2seq(
    path: str | PathLike[str],
    *,
    device: Device = "auto",
    threads: int | None = None,
    verify: bool = True,
) -> Seq2SeqModel:
    """The model at ``path``, an artifact that ``convert`` made of T5, BART or Marian.

    ``verify`` checks its checksums (files that passed before and did not change since are not read
    again). Raises ``SourceError``, ``VerificationError``, ``RuntimeMissing``, ``UnsupportedTarget``
    or ``GenerationError``.
    """
    if device not in get_args(Device):
        raise UsageError(f"no device named {device!r}: choose {', '.join(get_args(Device))}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    artifact = open_artifact(path)
    if artifact.seq2seq is None:
        raise UnsupportedTarget(
            f"{artifact.path} is no encoder with a decoder: open it with edgellm.open or "
            "edgellm.open_encoder (edgellm run), or convert one (t5, bart, marian) first"
        )
    if verify:
        verify_artifact(artifact, trust_unchanged=True)
    tokenizer = Tokenizer.from_hf_folder(artifact.main.parent)
    graphs = open_graphs_of(artifact, device=device, threads=threads)
    return Seq2SeqModel(graphs, tokenizer, artifact.seq2seq, artifact)


class Seq2SeqModel:
    """An encoder with a decoder, ready to be asked; use it in a ``with`` block, or ``close`` it."""

    def __init__(
        self,
        graphs: OnnxSeq2Seq,
        tokenizer: Tokenizer,
        facts: Seq2SeqFacts,
        artifact: Artifact | None = None,
    ) -> None:
        self.graphs = graphs
        self.tokenizer = tokenizer
        self.facts = facts
        self.artifact = artifact

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back; further calls raise ``GenerationError``."""
        self.graphs.close()

    def generate(
        self,
        text: str,
        *,
        max_tokens: int | None = None,
        sampling: SamplingOptions | None = None,
        source_language: str | None = None,
        target_language: str | None = None,
    ) -> Seq2SeqAnswer:
        """The answer to ``text``, of ``max_tokens`` at the most; see ``tokens`` for what it raises.

        ``sampling``: how tokens are chosen, the likeliest where nothing is said. Languages by the
        names of ``facts.languages``: of the text, and of the answer.
        """
        encoded = self.tokenizer.encode_whole(text, max_tokens=self.facts.max_tokens)
        text_ids = self._spoken(encoded, source_language)
        sampler = Sampler(sampling or SamplingOptions())
        started = time.perf_counter()
        first = None
        ids: list[int] = []
        for token in self.tokens(
            text_ids, max_tokens=max_tokens, sampler=sampler, language=target_language
        ):
            first = first or time.perf_counter()
            ids.append(token)
        ended = time.perf_counter()
        cut = len(ids) == self._limit(max_tokens) and self.facts.last_token_id is not None
        stopped = bool(ids) and not cut and ids[-1] in self.facts.end_token_ids
        drawn = sampler.options.temperature > 0
        return Seq2SeqAnswer(
            text=self.tokenizer.decode(ids),
            token_ids=tuple(ids),
            finish_reason="stop" if stopped else "length",
            prompt_tokens=len(text_ids),
            truncated=encoded.truncated,
            first_token_s=(first or ended) - started,
            end_to_end_s=ended - started,
            seed=sampler.seed if drawn else None,
        )

    def tokens(
        self,
        text_ids: Sequence[int],
        *,
        max_tokens: int | None = None,
        sampler: Sampler,
        language: str | None = None,
    ) -> Iterator[int]:
        """The tokens of the answer to a text of ``text_ids``, as they come, its end among them.

        ``language``: of the answer. Raises ``UsageError`` for a language that the model has not or
        a number of tokens that there cannot be, and ``GenerationError``.
        """
        facts, limit = self.facts, self._limit(max_tokens)
        step, given = facts.start_token_id, list(facts.first_token_ids)
        if language is not None:
            code = self._code(language)
            step, given = (code, []) if facts.language_begins else (step, [code])
        self.graphs.read(text_ids)
        so_far = [step]
        for number in range(limit):
            logits = self.graphs.step([step])[-1]
            if number == limit - 1 and facts.last_token_id is not None:
                step = facts.last_token_id
            elif given:
                step = given.pop(0)
            else:
                logits[list(facts.suppressed_token_ids)] = -np.inf
                step = sampler.pick(logits, so_far)
            so_far.append(step)
            yield step
            if step in facts.end_token_ids:
                return

    def _limit(self, max_tokens: int | None) -> int:
        limit = self.facts.max_new_tokens if max_tokens is None else max_tokens
        if not 1 <= limit <= self.facts.max_tokens:
            raise UsageError(
                f"an answer of {limit} tokens is not possible: choose 1 to {self.facts.max_tokens}"
            )
        return limit

    def _spoken(self, encoded: EncodedText, language: str | None) -> tuple[int, ...]:
        """The ids of a text with the code of its ``language``, where one is named."""
        usual = self.facts.languages.get(self.facts.source_language)
        if language is None:
            return encoded.ids
        code = self._code(language)
        return tuple(
            code if own and token_id == usual else token_id
            for token_id, own in zip(encoded.ids, encoded.special, strict=True)
        )

    def _code(self, language: str) -> int:
        known = self.facts.languages
        if language in known:
            return known[language]
        if not known:
            raise UsageError(
                f"the language {language!r} cannot be named: this model has no codes for languages "
                "beside its text; leave it out"
            )
        raise UsageError(f"no language named {language!r}: this model knows {', '.join(known)}")
