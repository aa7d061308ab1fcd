"""A cell's own process: it loads the artifact and measures a round each time it is asked.

`python -m edgellm.profiling.worker` reads a line of JSON (``Job``), answers with one (``Ready``),
and then measures a ``Round`` for every further line, until its input ends. A job for ``operators``
has those as its only answer. An answer has the field ``error`` where something failed. What
backends print goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, cast

import msgspec

from edgellm import registry
from edgellm.errors import ContextTooLong, EdgeError
from edgellm.profiling.energy_meter import EnergyMeter
from edgellm.profiling.exchange import Job, Ready, Round, sha256_of, taken_memory

if TYPE_CHECKING:
    from edgellm.artifact import Artifact
    from edgellm.profiling.document import Operators
    from edgellm.profiling.prompts import Prompt
    from edgellm.runtimes.session import Device, KvDtype, RunOptions, Session

ENCODER = "edgellm.profiling.whole_texts:EncoderCell"
CELLS = {
    "translate": "edgellm.profiling.whole_texts:Seq2SeqCell",
    **dict.fromkeys(("embed", "label", "fill"), ENCODER),
}
"""By task, what loads and measures a cell that is no language model."""


class AnyCell(Protocol):
    """An artifact, open, and what it is asked."""

    @property
    def ready(self) -> Ready: ...

    def round(self) -> Round: ...


def main(requests: IO[bytes], answers: IO[bytes]) -> int:
    """Serve one cell until ``requests`` ends; the exit code."""
    # Ctrl-C is for the process that asks: it ends this one, and keeps what was measured.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = msgspec.json.decode(requests.readline(), type=Job)
        if job.operators:
            _say(answers, _operators(job))
            return 0
        kind = CELLS.get(job.task)
        cell: AnyCell = registry.attribute(kind)(job) if kind else LoadedCell(job)
        _say(answers, cell.ready)
        for _ in requests:
            _say(answers, cell.round())
    except (EdgeError, MemoryError) as error:
        _say(answers, {"error": str(error) or "memory ran out"})
        return 1
    return 0


def _say(answers: IO[bytes], answer: Any) -> None:
    answers.write(msgspec.json.encode(answer) + b"\n")
    answers.flush()


def _opened(job: Job) -> tuple[Artifact, Any, Prompt, RunOptions]:
    """The artifact, its tokenizer, the prompt in its tokens, and how to open it."""
    from edgellm.artifact import open_artifact
    from edgellm.profiling.operators import SETTLING_TOKENS
    from edgellm.profiling.prompts import prompt_of
    from edgellm.runtimes.session import RunOptions
    from edgellm.tokenization.artifact import artifact_tokenizer

    artifact = open_artifact(Path(job.path))
    tokenizer = artifact_tokenizer(artifact.main, artifact.container)
    prompt = prompt_of(tokenizer, job.prompt_tokens, job.depth_tokens)
    spare = SETTLING_TOKENS if job.operators else 0
    options = RunOptions(
        device=cast("Device", job.device),
        context_tokens=job.depth_tokens + job.prompt_tokens + job.new_tokens + spare,
        threads=job.threads,
        kv_dtype=cast("KvDtype | None", job.kv_cache),
    )
    return artifact, tokenizer, prompt, options


def _operators(job: Job) -> Operators:
    from edgellm.profiling.operators import measure_operators
    from edgellm.runtimes import runtime_named

    artifact, _, prompt, options = _opened(job)
    return measure_operators(
        runtime_named(job.runtime),
        artifact,
        options,
        (*prompt.depth_ids, *prompt.ids),
        tokens=job.new_tokens,
        trace=Path(job.trace) if job.trace else None,
    )


class LoadedCell:
    """A language model, open, and what it is asked."""

    def __init__(self, job: Job) -> None:
        from edgellm.runtimes import runtime_named

        artifact, self.tokenizer, self.prompt, options = _opened(job)
        self.new_tokens = job.new_tokens
        begun = time.perf_counter()
        try:
            self.session: Session = runtime_named(job.runtime).open(artifact, options)
        except ContextTooLong as refusal:
            fewer = "ask for fewer --prompt-tokens, --new-tokens or --depth"
            raise ContextTooLong(refusal.problem, fewer) from refusal
        load_s = time.perf_counter() - begun
        self.ready = Ready(
            load_s=load_s, device=self.session.device, kv_cache=self.session.kv_dtype
        )
        self.meter = EnergyMeter()
        if self.prompt.depth_ids:
            self.session.prefill(self.prompt.depth_ids)

    def round(self) -> Round:
        """Ask once; the cache holds the depth's tokens alone before."""
        from edgellm.generate import AnswerStream
        from edgellm.token_times import clock

        session, prompt = self.session, self.prompt
        session.trim(len(prompt.depth_ids))
        self.meter.begin()
        cpu_s = time.process_time()
        begun = clock()
        self.tokenizer.encode(prompt.text)
        tokenized = clock()
        stream = AnswerStream(
            session,
            self.tokenizer,
            (*prompt.depth_ids, *prompt.ids),
            max_tokens=self.new_tokens,
            reuse_cache=bool(prompt.depth_ids),
            ignore_end=True,
            started_s=begun,
        )
        first_text_tokens = 0
        for _ in stream:
            if not first_text_tokens:
                first_text_tokens = len(stream.token_ids)
                self.meter.halfway()
        cpu_s = time.process_time() - cpu_s
        energy, no_energy = self.meter.spent()
        answer, times = stream.answer(), stream.times
        return Round(
            tokenization_s=tokenized - begun,
            first_token_s=times.first_token_s,
            prefill_s=times.prefill_s,
            latencies_s=tuple(times.latencies_s),
            sampling_s=sum(times.sampling_s) / len(times.sampling_s),
            detokenization_s=sum(times.text_s) / len(times.text_s),
            end_to_end_s=times.first_token_s + sum(times.latencies_s),
            cpu_s=cpu_s,
            memory=taken_memory(session.device, session.kv_bytes()),
            first_text_tokens=first_text_tokens or self.new_tokens,
            text_sha256=sha256_of(answer.token_ids),
            energy=energy,
            no_energy=no_energy,
        )


if __name__ == "__main__":
    # Backends print to stdout too: its number becomes stderr's, and the answers get another one.
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "wb") as answers:
        raise SystemExit(main(sys.stdin.buffer, answers))
