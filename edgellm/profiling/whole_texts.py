"""Cells of models that read a text whole: encoders, and encoders with a decoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

from edgellm.artifact import open_artifact
from edgellm.profiling.energy_meter import EnergyMeter
from edgellm.profiling.exchange import Job, Ready, Round, sha256_of, taken_memory
from edgellm.profiling.prompts import whole_text
from edgellm.token_times import TokenTimes, clock
from edgellm.tokenization import Tokenizer

if TYPE_CHECKING:
    from edgellm.runtimes.session import Device

BATCHES = 10
"""Batches of a round, so that a handful of rounds have samples enough for percentiles."""


class EncoderCell:
    """An encoder, open, and the texts that it is asked of."""

    def __init__(self, job: Job) -> None:
        from edgellm.encoders.model import EncoderModel
        from edgellm.runtimes.ort_encoder import open_graph_of

        artifact = open_artifact(Path(job.path))
        tokenizer = Tokenizer.from_hf_folder(artifact.main.parent)
        facts = artifact.encoder
        assert facts is not None, job
        masked = tokenizer.special_tokens.get("mask_token", "") if job.task == "fill" else ""
        text, _ = whole_text(tokenizer, job.prompt_tokens, masked)
        begun = time.perf_counter()
        graph = open_graph_of(artifact, device=cast("Device", job.device), threads=job.threads)
        load_s = time.perf_counter() - begun
        self.model = EncoderModel(graph, tokenizer, facts, artifact)
        tokens = len(self.model.encode(text).ids)
        self.ready = Ready(load_s=load_s, device=graph.device, kv_cache="", prompt_tokens=tokens)
        self.texts = [text] * job.batch

    def round(self) -> Round:
        """Ask ``BATCHES`` times."""
        cpu_s, began = time.process_time(), clock()
        for text in self.texts:
            self.model.encode(text)
        tokenized = clock()
        latencies = []
        for _ in range(BATCHES):
            begun = clock()
            self.model.ask(self.texts, batch=len(self.texts))
            latencies.append(clock() - begun)
        return Round(
            tokenization_s=tokenized - began,
            latencies_s=tuple(latencies),
            cpu_s=time.process_time() - cpu_s,
            memory=taken_memory(self.model.graph.device, None),
        )


class Seq2SeqCell:
    """An encoder with a decoder, open, and the text that it answers."""

    def __init__(self, job: Job) -> None:
        from edgellm.runtimes.ort_seq2seq import open_graphs_of
        from edgellm.sampling import Sampler, SamplingOptions

        artifact = open_artifact(Path(job.path))
        tokenizer = Tokenizer.from_hf_folder(artifact.main.parent)
        facts = artifact.seq2seq
        assert facts is not None, job
        self.facts, self.tokenizer, self.new_tokens = facts, tokenizer, job.new_tokens
        self.text, tokens = whole_text(tokenizer, job.prompt_tokens)
        begun = time.perf_counter()
        self.graphs = open_graphs_of(
            artifact, device=cast("Device", job.device), threads=job.threads
        )
        load_s = time.perf_counter() - begun
        device = self.graphs.device
        self.ready = Ready(load_s=load_s, device=device, kv_cache="f32", prompt_tokens=tokens)
        self.sampler = Sampler(SamplingOptions())
        self.meter = EnergyMeter()

    def round(self) -> Round:
        """Answer the text once, the likeliest token each time; ends of an answer do not end it."""
        self.meter.begin()
        stream, first_text_tokens = self.tokenizer.decode_stream(), 0
        cpu_s = time.process_time()
        times = TokenTimes(asked_s=clock())
        encoded = self.tokenizer.encode_whole(self.text, max_tokens=self.facts.max_tokens)
        tokenized = clock()
        times.begin()
        self.graphs.read(encoded.ids)
        read = clock()
        ids = [self.facts.start_token_id]
        for number in range(1, self.new_tokens + 1):
            logits = self.graphs.step(ids[-1:])[-1]
            times.computed()
            ids.append(self.sampler.pick(logits, ids))
            times.chosen(ends=False)
            said = stream.step(ids[-1])
            times.said()
            if said and not first_text_tokens:
                first_text_tokens = number
                self.meter.halfway()
                times.resumed()
        cpu_s = time.process_time() - cpu_s
        energy, no_energy = self.meter.spent()
        return Round(
            tokenization_s=tokenized - times.asked_s,
            encode_s=read - tokenized,
            first_token_s=times.first_token_s,
            latencies_s=tuple(times.latencies_s),
            sampling_s=sum(times.sampling_s) / len(times.sampling_s),
            detokenization_s=sum(times.text_s) / len(times.text_s),
            end_to_end_s=times.first_token_s + sum(times.latencies_s),
            cpu_s=cpu_s,
            memory=taken_memory(self.graphs.device, self.graphs.kv_bytes()),
            first_text_tokens=first_text_tokens or self.new_tokens,
            text_sha256=sha256_of(ids[1:]),
            energy=energy,
            no_energy=no_energy,
        )
