"""Tune an artifact that was written, before its digests are taken: read, train, write back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from edgellm.export.layout import Layout, OutputTensor
from edgellm.export.writer import StagedFolder
from edgellm.forward import Windows
from edgellm.progress import Progress, ProgressEvent, unwatched
from edgellm.source.model import ModelSource
from edgellm.tune import torch_decoder
from edgellm.tune.blocks import BlockExample, train_block
from edgellm.tune.settings import Settings, Tuned, split
from edgellm.tune.stored import StoredModel
from edgellm.tune.weights import SourceWeights, StudentWeights
from edgellm.tune.whole import Example, Network, train_whole


def tune(
    layout: Layout,
    source: ModelSource,
    staged: StagedFolder,
    windows: Windows,
    settings: Settings,
    *,
    threads: int,
    recompute: bool = False,
    whole: bool = True,
    progress: Progress = unwatched,
) -> Tuned:
    """Train the artifact in ``staged`` towards ``source`` on ``windows`` of token ids.

    ``whole``: end to end too, which needs all codes in memory; ``recompute`` saves memory there.
    """
    training, held_out = (batches(part, settings.step_tokens) for part in split(windows))
    with _threads(threads):
        tuner = _Tuner(layout, source, staged, settings, progress)
        result = Tuned(
            settings=settings,
            training_tokens=sum(ids.numel() for ids in training),
            held_out_tokens=sum(ids.numel() for ids in held_out),
            threads=threads,
            torch=torch.__version__,
        )
        return tuner.run(training, held_out, result, whole=whole, recompute=recompute)


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
        self,
        layout: Layout,
        source: ModelSource,
        staged: StagedFolder,
        settings: Settings,
        progress: Progress,
    ) -> None:
        self.source, self.decoder = source, source.decoder
        self.staged, self.settings, self.progress = staged, settings, progress
        self.stored = StoredModel(layout, source, staged.path)

    def run(
        self,
        training: list[Tensor],
        held_out: list[Tensor],
        result: Tuned,
        *,
        whole: bool,
        recompute: bool,
    ) -> Tuned:
        import msgspec

        count, batches = len(training), [*training, *held_out]
        wanted, blocks = self._blocks(batches, count)
        result = msgspec.structs.replace(result, blocks=blocks)
        if not whole:
            return result
        examples = [Example(ids, states) for ids, states in zip(batches, wanted, strict=True)]
        weights, outputs = self._student("")
        network = Network(self.decoder, weights, self._teacher_head(), recompute)
        outcome = train_whole(
            network, examples[:count], examples[count:], self.settings, self._tell
        )
        if outcome.kept_step:
            self._write(weights, outputs)
        return msgspec.structs.replace(
            result,
            kl_before=outcome.before,
            kl_after=outcome.after,
            kept_step=outcome.kept_step,
        )

    def _blocks(self, batches: list[Tensor], count: int) -> tuple[list[Tensor], int]:
        """What the source's head is given for ``batches``, and the number of blocks trained."""
        decoder, settings = self.decoder, self.settings
        tables = self._source(["token_embd.weight", "position_embd.weight"])
        with torch.no_grad():
            floats = [torch_decoder.embedded(decoder, tables, ids) for ids in batches]
        del tables
        streams: list[Tensor] = []
        if settings.block_steps:
            tables_of_student, _ = self._student(("token_embd", "position_embd"))
            with torch.no_grad():
                streams = [
                    torch_decoder.embedded(decoder, tables_of_student, ids) for ids in batches
                ]
        kept, layers, started = 0, len(decoder.layers), time.perf_counter()
        for index in range(layers):
            prefix = f"blk.{index}."
            teacher = self._source(
                [role for role in self.source.tensors if role.startswith(prefix)]
            )
            with torch.no_grad():
                floats = [torch_decoder.layer(decoder, index, teacher, each) for each in floats]
            if settings.block_steps:
                weights, outputs = self._student(prefix)
                examples = [
                    BlockExample(given, wanted)
                    for given, wanted in zip(streams, floats, strict=True)
                ]
                before, after = train_block(
                    decoder, index, weights, examples[:count], examples[count:], settings
                )
                if after < before:
                    kept += 1
                    self._write(weights, outputs)
                with torch.no_grad():
                    streams = [torch_decoder.layer(decoder, index, weights, x) for x in streams]
                left = (time.perf_counter() - started) / (index + 1) * (layers - index - 1)
                self._tell(
                    f"block {index}, error {before:.2e} to {after:.2e}, {left:.0f} s left",
                    index + 1,
                    layers,
                )
        final = self._source(
            [role for role in self.source.tensors if role.startswith("output_norm")]
        )
        with torch.no_grad():
            return [torch_decoder.norm(decoder, final, "output_norm", x) for x in floats], kept

    def _source(self, roles: Sequence[str]) -> SourceWeights:
        tensors = self.source.tensors
        return SourceWeights.load(
            (tensors[role] for role in roles if role in tensors), self.decoder
        )

    def _student(self, prefix: str | tuple[str, ...]) -> tuple[StudentWeights, list[OutputTensor]]:
        found = list(self.stored.under(prefix))
        weights = {role: weight for _, by_role in found for role, weight in by_role.items()}
        student = StudentWeights(weights, self.decoder, norms_offset=self.stored.norms_offset)
        return student, [tensor for tensor, _ in found]

    def _write(self, weights: StudentWeights, outputs: list[OutputTensor]) -> None:
        for tensor in outputs:
            roles = self.stored.roles_of(tensor)
            self.stored.write(tensor, {role: weights.stored(role) for role in roles}, self.staged)

    def _teacher_head(self) -> Tensor:
        """The source's head ``[vocab, hidden]``, in 16 bits where they hold it exactly."""
        role = "token_embd.weight" if self.decoder.tied_head else "output.weight"
        head = torch.from_numpy(self.source.tensors[role].load())
        half = head.bfloat16()
        return half if bool((half.float() == head).all()) else head

    def _tell(self, item: str, done: int, total: int) -> None:
        self.progress(ProgressEvent("tune", item, 0, 0, done, total))


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Sums are added up in an order that depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
