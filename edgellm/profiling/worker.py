"""A cell's own process: it loads the artifact and measures a round each time it is asked.

`python -m edgellm.profiling.worker` reads a line of JSON (``Job``), answers with one (``Ready``),
and then measures a ``Round`` for every further line, until its input ends. A job for ``operators``
has those as its only answer. An answer has the field ``error`` where something failed. What
backends print goes to stderr.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import msgspec

from edgellm.errors import ContextTooLong, EdgeError, GenerationError

if TYPE_CHECKING:
    from edgellm.manifest import Artifact
    from edgellm.profiling.document import Operators
    from edgellm.profiling.energy import Counter
    from edgellm.profiling.prompts import Prompt
    from edgellm.runtimes.session import Device, KvDtype, RunOptions, Session


LEAST_STEPS = 20
"""Of a counter: less energy than so many of them is told with an error of more than 5 %."""


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What to load and what to ask; the rest as in ``document.Settings``.

    ``trace``: where to put the operators' trace, empty for nowhere.
    """

    path: str
    runtime: str
    device: str
    threads: int | None
    kv_cache: str | None
    prompt_tokens: int
    new_tokens: int
    depth_tokens: int
    operators: bool = False
    trace: str = ""


class Ready(msgspec.Struct, frozen=True, kw_only=True):
    """The artifact is loaded; ``kv_cache`` and ``device`` as they came to be."""

    load_s: float
    device: str
    kv_cache: str


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt and its answer. Seconds, bytes and joules; see ``document.Cell``.

    ``first_text_tokens``: how many tokens there were when the first text came; the energy of the
    prompt ends there.

    ``energy``: by counter, of the prompt and of the rest; ``no_energy``: why a counter is left out.
    """

    tokenization_s: float
    first_token_s: float
    prefill_s: float
    latencies_s: tuple[float, ...]
    sampling_s: float
    detokenization_s: float
    end_to_end_s: float
    cpu_s: float
    seconds: float
    peak_bytes: int
    steady_bytes: int
    steady_shared_bytes: int | None
    device_bytes: int | None
    kv_bytes: int
    first_text_tokens: int
    text_sha256: str
    energy: dict[str, tuple[float, float]]
    no_energy: tuple[str, ...] = ()


def main(requests: IO[bytes], answers: IO[bytes]) -> int:
    """Serve one cell until ``requests`` ends; the exit code."""
    # Ctrl-C is for the process that asks: it ends this one, and keeps what was measured.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = msgspec.json.decode(requests.readline(), type=Job)
        if job.operators:
            _say(answers, _operators(job))
            return 0
        cell = LoadedCell(job)
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
    from edgellm.manifest import open_artifact
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
    """An artifact, open, and what it is asked."""

    def __init__(self, job: Job) -> None:
        from edgellm.profiling.energy import counters
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
        self.counters: Sequence[Counter] = counters()[0]
        self.steps_j = {counter.name: counter.step_j or 0.0 for counter in self.counters}
        if self.prompt.depth_ids:
            self.session.prefill(self.prompt.depth_ids)

    def round(self) -> Round:
        """Ask once; the cache holds the depth's tokens alone before."""
        from edgellm.generate import AnswerStream
        from edgellm.hardware import peak_memory_bytes
        from edgellm.profiling.device_memory import device_bytes
        from edgellm.token_times import clock

        session, prompt = self.session, self.prompt
        session.trim(len(prompt.depth_ids))
        silent: dict[str, str] = {}
        counted = self._joules(silent)
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
        at_first, first_text_tokens = counted, 0
        for _ in stream:
            if not first_text_tokens:
                first_text_tokens = len(stream.token_ids)
                at_first = self._joules(silent)
        ended = clock()
        cpu_s = time.process_time() - cpu_s
        at_end = self._joules(silent)
        for name, end in at_end.items():
            least_j = LEAST_STEPS * self.steps_j[name]
            if name not in silent and end - counted[name] < least_j:
                silent[name] = (
                    f"{name}: a round takes less than the {least_j:g} J that it can tell: ask for "
                    "more tokens"
                )
        answer, times = stream.answer(), stream.times
        resident, shared = _resident()
        ids = ",".join(map(str, answer.token_ids))
        return Round(
            tokenization_s=tokenized - begun,
            first_token_s=times.first_token_s,
            prefill_s=times.prefill_s,
            latencies_s=tuple(times.latencies_s),
            sampling_s=sum(times.sampling_s) / len(times.sampling_s),
            detokenization_s=sum(times.text_s) / len(times.text_s),
            end_to_end_s=times.first_token_s + sum(times.latencies_s),
            cpu_s=cpu_s,
            seconds=ended - begun,
            peak_bytes=peak_memory_bytes(),
            steady_bytes=resident,
            steady_shared_bytes=shared,
            device_bytes=device_bytes(session.device),
            kv_bytes=session.kv_bytes(),
            first_text_tokens=first_text_tokens or self.new_tokens,
            text_sha256=hashlib.sha256(ids.encode()).hexdigest(),
            energy={
                name: (at_first[name] - counted[name], end - at_first[name])
                for name, end in at_end.items()
                if name not in silent
            },
            no_energy=tuple(silent.values()),
        )

    def _joules(self, silent: dict[str, str]) -> dict[str, float]:
        """What the counters say now; one that says no more is put among ``silent``, with why."""
        found = {}
        for counter in self.counters:
            try:
                found[counter.name] = counter.read_j()
            except GenerationError as error:
                silent[counter.name] = str(error)
        return found


def _resident() -> tuple[int, int | None]:
    """Bytes resident now, and with shared pages counted in parts where the system says it."""
    import psutil

    process = psutil.Process()
    try:
        whole = process.memory_full_info()
    except (psutil.Error, OSError):
        return process.memory_info().rss, None
    return whole.rss, getattr(whole, "pss", None)


if __name__ == "__main__":
    # Backends print to stdout too: its number becomes stderr's, and the answers get another one.
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "wb") as answers:
        raise SystemExit(main(sys.stdin.buffer, answers))
