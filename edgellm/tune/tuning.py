"""Tune an artifact that was written, before its digests are taken: read, train, write back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from edgellm.architectures.decoder import Decoder
from edgellm.export.layout import Layout
from edgellm.export.writer import StagedFolder
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.source.model import ModelSource
from edgellm.tensors import Array
from edgellm.tune import torch_decoder
from edgellm.tune.blocks import BlockExample, train_block
from edgellm.tune.planning import Tuning
from edgellm.tune.products import quick_float32
from edgellm.tune.settings import BATCH_TOKENS, Tuned, split
from edgellm.tune.stored import StoredModel
from edgellm.tune.threads import torch_threads
from edgellm.tune.weights import SourceWeights, StudentWeights
from edgellm.tune.whole import Example, Network, train_whole

FOUND_FILE = "tuned.npz"


def tune(
    layout: Layout,
    source: ModelSource,
    staged: StagedFolder,
    tuning: Tuning,
    threads: int,
    progress: Progress = unwatched,
) -> Tuned:
    """Train the artifact in ``staged`` towards ``source``, as ``tuning`` says.

    Where ``staged`` can be resumed, what was found is put into its journal before anything is
    overwritten, and a run that finds it there writes it. Raises what reading weights raises.
    """
    stored = StoredModel(layout, source, staged.path)
    earlier = next((entry for entry in staged.journal.entries() if "tuned" in entry), None)
    file = staged.journal.folder / FOUND_FILE
    if earlier is not None:
        result = msgspec.convert(earlier["tuned"], Tuned)
        with np.load(file) as found:
            _write(stored, dict(found), source.decoder, staged)
        return result
    with torch_threads(threads):
        settings = tuning.settings
        windows, others = split(tuning.text.windows)
        # What no step would see needs no answers of the source; windows come in a random order.
        seen = max(settings.steps, settings.block_steps) * settings.step_tokens
        before = accumulate((len(window) for window in windows), initial=0)
        windows = [window for window, start in zip(windows, before, strict=False) if start < seen]
        training, held_out = (
            batches(part, min(settings.step_tokens, BATCH_TOKENS)) for part in (windows, others)
        )
        result = Tuned(
            settings=settings,
            training_tokens=sum(ids.numel() for ids in training),
            held_out_tokens=sum(ids.numel() for ids in held_out),
            threads=threads,
            torch=str(torch.__version__),
        )
        tuner = _Tuner(stored, source, tuning, progress)
        result, values = tuner.run(training, held_out, result)
        if values and staged.resume_key:
            np.savez(file, allow_pickle=False, **values)
            staged.note({"tuned": msgspec.to_builtins(result)})
        if values:
            _write(stored, values, source.decoder, staged)
    return result


def _write(
    stored: StoredModel, values: Mapping[str, Array], decoder: Decoder, staged: StagedFolder
) -> None:
    """Put ``values`` in the stead of what is stored, one tensor at a time."""
    for tensor, by_role in stored.under(""):
        weights = StudentWeights(by_role, decoder, norms_offset=stored.norms_offset)
        if weights.set_known(values):
            stored.write(tensor, {role: weights.stored(role) for role in by_role}, staged)


def batches(windows: Sequence[Sequence[int]], tokens: int) -> list[Tensor]:
    """Windows stacked ``[batch, tokens]`` with others of their length, to about ``tokens`` each."""
    found: list[list[Sequence[int]]] = []
    open_batches: dict[int, list[Sequence[int]]] = {}
    for window in windows:
        batch = open_batches.get(len(window))
        if batch is None or (len(batch) + 1) * len(window) > max(tokens, len(window)):
            batch = open_batches[len(window)] = []
            found.append(batch)
        batch.append(window)
    return [torch.tensor(batch) for batch in found]


class _Tuner:
    def __init__(
        self, stored: StoredModel, source: ModelSource, tuning: Tuning, progress: Progress
    ) -> None:
        self.source, self.decoder = source, source.decoder
        self.stored, self.tuning, self.progress = stored, tuning, progress
        self.settings = tuning.settings

    def run(
        self, training: list[Tensor], held_out: list[Tensor], result: Tuned
    ) -> tuple[Tuned, dict[str, Array]]:
        """``result`` with what came of it, and the numbers to store: none where nothing is kept."""
        count, batches = len(training), [*training, *held_out]
        if not self.tuning.whole:
            _, kept, values = self._through_layers(batches, count, None)
            return replace(result, blocks=kept), values
        weights = self._student("")
        wanted, kept, _ = self._through_layers(batches, count, weights)
        examples = [Example(ids, states) for ids, states in zip(batches, wanted, strict=True)]
        network = Network(self.decoder, weights, self._teacher_head(), self.tuning.recompute)
        by_blocks = weights.snapshot() if kept else None
        weights.restore(None)
        before = after = by_blocks_alone = network.mean_divergence(examples[count:])
        if kept:
            weights.restore(by_blocks)
            after = by_blocks_alone = network.mean_divergence(examples[count:])
            if after >= before:  # better blocks need not make a better network
                weights.restore(None)
                after, kept = before, 0
        del by_blocks
        outcome = train_whole(
            network, examples[:count], examples[count:], after, self.settings, self._tell_step
        )
        result = replace(
            result,
            kl_before=before,
            kl_blocks=by_blocks_alone if self.settings.block_steps else None,
            kl_after=outcome.after,
            kept_share=outcome.kept_share,
            blocks=kept,
        )
        return result, weights.values() if kept or outcome.kept_share else {}

    def _through_layers(
        self, batches: list[Tensor], count: int, student: StudentWeights | None
    ) -> tuple[list[Tensor], int, dict[str, Array]]:
        """What the source's head is given for ``batches``, and the number of blocks trained.

        The first ``count`` of them are trained on. Blocks are trained in ``student``; where there
        is none they are read one at a time, and what was trained is returned.
        """
        decoder, settings = self.decoder, self.settings
        tables = ("token_embd", "position_embd")
        source = self._source([role for role in self.source.tensors if role.startswith(tables)])
        wanted = _each(batches, count, partial(torch_decoder.embedded, decoder, source))
        given: list[Tensor] = []
        if settings.block_steps:
            own = student or self._student(tables)
            given = _each(batches, count, partial(torch_decoder.embedded, decoder, own))
        values: dict[str, Array] = {}
        kept = 0
        started = time.perf_counter()
        for index in range(len(decoder.layers)):
            prefix = f"blk.{index}."
            source = self._source([role for role in self.source.tensors if role.startswith(prefix)])
            layer = partial(torch_decoder.layer, decoder, index)
            wanted = _each(wanted, count, partial(layer, source))
            said = f"layer {index} of the source"
            if settings.block_steps:
                weights = student.under(prefix) if student else self._student(prefix)
                examples = [BlockExample(*each) for each in zip(given, wanted, strict=True)]
                before, after = train_block(
                    decoder, index, weights, examples[:count], examples[count:], settings
                )
                if after < before:
                    kept += 1
                    values |= {} if student else weights.values()
                given = _each(given, count, partial(layer, weights))
                said = f"block {index}, error {before:.2e} to {after:.2e}"
            # Steps take another time than layers: before the first the plan knows best.
            left = self.tuning.seconds - (time.perf_counter() - started)
            self._tell(said, index + 1, max(0.0, left) if self.tuning.whole else None)
        roles = [role for role in self.source.tensors if role.startswith("output_norm")]
        last = self._source(roles)
        wanted = _each(wanted, count, partial(torch_decoder.head_input, decoder, last))
        return wanted, kept, values

    def _source(self, roles: Sequence[str]) -> SourceWeights:
        tensors = self.source.tensors
        return SourceWeights.load(
            (tensors[role] for role in roles if role in tensors), self.decoder
        )

    def _student(self, prefix: str | tuple[str, ...]) -> StudentWeights:
        weights = {
            role: weight
            for _, by_role in self.stored.under(prefix)
            for role, weight in by_role.items()
        }
        student = StudentWeights(weights, self.decoder, norms_offset=self.stored.norms_offset)
        student.forget_codes()
        return student

    def _teacher_head(self) -> Tensor:
        """The source's head ``[vocab, hidden]``, in 16 bits where they hold it exactly."""
        role = "token_embd.weight" if self.decoder.tied_head else "output.weight"
        head = torch.from_numpy(self.source.tensors[role].load())
        half = head.bfloat16()
        return half if bool((half.float() == head).all()) else head

    def _tell_step(self, item: str, done: int, seconds_left: float) -> None:
        self._tell(item, len(self.decoder.layers) + done, seconds_left)

    def _tell(self, item: str, done: int, seconds_left: float | None) -> None:
        """Layers and steps are counted as one."""
        total = len(self.decoder.layers) + self.settings.steps
        self.progress(ProgressEvent("tune", item, 0, 0, done, total, seconds_left))


def _each(streams: list[Tensor], count: int, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """What ``compute`` makes of each: quickly of the first ``count``, which are trained on."""
    with torch.no_grad():
        with quick_float32():
            trained_on = [compute(each) for each in streams[:count]]
        return trained_on + [compute(each) for each in streams[count:]]
