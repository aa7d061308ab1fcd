"""Open an encoder and ask it: embeddings, labels of texts or of their tokens, masked words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self, get_args

import numpy as np

from edgellm.artifact import Artifact, open_artifact
from edgellm.artifact import verify as verify_artifact
from edgellm.errors import UnsupportedTarget, UsageError
from edgellm.manifest import EncoderFacts
from edgellm.runtimes.ort_encoder import OnnxEncoder, Values, open_graph_of
from edgellm.runtimes.session import Device
from edgellm.tokenization import Tokenizer
from edgellm.tokenization.tokenizer import EncodedText

Text = str | tuple[str, str]
"""A text, or a pair that the model sees together (a question and a passage)."""

BATCH = 16
"""Texts that are computed together, those of like length side by side. all-MiniLM-L6-v2 in int8 on
two cores gains nothing from more."""

TOP = 5
"""Words that are given for a masked one where no number was asked for."""


@dataclass(frozen=True, slots=True)
class Result:
    """What the model says of one text.

    ``tokens``: how many there were, the model's own counted; ``truncated``: the text was longer
    than the model looks, and its end did not count. Of the others there is the one that the task
    gives: ``embedding``; ``labels`` of the text, the likeliest first; ``entities``, a label for
    every token with its place in the text; ``words``, the likeliest for each masked token.
    """

    text: Text
    tokens: int
    truncated: bool
    embedding: Values | None = None
    labels: tuple[dict[str, Any], ...] | None = None
    entities: tuple[dict[str, Any], ...] | None = None
    words: tuple[tuple[dict[str, Any], ...], ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found: dict[str, Any] = {
            "text": self.text if isinstance(self.text, str) else list(self.text),
            "tokens": self.tokens,
            "truncated": self.truncated,
        }
        if self.embedding is not None:
            # As short as reads back to the same float32.
            found["embedding"] = [float(str(value)) for value in self.embedding]
        for name in ("labels", "entities", "words"):
            if getattr(self, name) is not None:
                found[name] = getattr(self, name)
        return found


def open_encoder(
    path: str | PathLike[str],
    *,
    device: Device = "auto",
    threads: int | None = None,
    verify: bool = True,
) -> EncoderModel:
    """The encoder at ``path``, an artifact that ``convert`` made of BERT or one of its kin.

    ``verify`` checks its checksums (files that passed before and did not change since are not read
    again). Raises ``SourceError``, ``VerificationError``, ``RuntimeMissing``, ``UnsupportedTarget``
    or ``GenerationError``.
    """
    if device not in get_args(Device):
        raise UsageError(f"no device named {device!r}: choose {', '.join(get_args(Device))}")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads must be at least 1, got {threads}")
    artifact = open_artifact(path)
    if artifact.encoder is None:
        raise UnsupportedTarget(
            f"{artifact.path} is no encoder: open it with edgellm.open (edgellm run), or convert "
            "an encoder (bert, roberta, distilbert) first"
        )
    if verify:
        verify_artifact(artifact, trust_unchanged=True)
    tokenizer = Tokenizer.from_hf_folder(artifact.main.parent)
    graph = open_graph_of(artifact, device=device, threads=threads)
    return EncoderModel(graph, tokenizer, artifact.encoder, artifact)


class EncoderModel:
    """An encoder, ready to be asked; use it in a ``with`` block, or ``close`` it.

    One thread at a time. ``facts`` say what it is for.
    """

    def __init__(
        self,
        graph: OnnxEncoder,
        tokenizer: Tokenizer,
        facts: EncoderFacts,
        artifact: Artifact | None = None,
    ) -> None:
        self.graph = graph
        self.tokenizer = tokenizer
        self.facts = facts
        self.artifact = artifact

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *reason: object) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back; further calls raise ``GenerationError``."""
        self.graph.close()

    def embed(
        self, texts: Sequence[Text], *, prompt: str | None = None, batch: int = BATCH
    ) -> Values:
        """The embeddings of ``texts``, float32 ``[texts, width]``; see ``ask``."""
        self._check_task("embeddings")
        found = [result.embedding for result in self.ask(texts, prompt=prompt, batch=batch)]
        vectors = [vector for vector in found if vector is not None]
        return (
            np.stack(vectors) if vectors else np.empty((0, self.facts.embedding_size), np.float32)
        )

    def ask(
        self,
        texts: Sequence[Text],
        *,
        prompt: str | None = None,
        top: int = TOP,
        batch: int = BATCH,
    ) -> list[Result]:
        """What the model says of each of ``texts``, in their order.

        A text beyond ``facts.max_tokens`` is cut, which its result says. ``prompt`` names one of
        ``facts.prompts``, which is put before every text; None takes the default one if there is
        one. ``top``: words for a masked one. ``batch``: texts that are computed together. Raises
        ``UsageError`` for a prompt that there is not.
        """
        if batch < 1 or top < 1:
            raise UsageError(f"batch and top must be at least 1, got {batch} and {top}")
        before = self._prompt(prompt)
        encoded = [self.encode(text, before) for text in texts]
        answer = self._answers()
        results: list[Result | None] = [None] * len(texts)
        for places in _batches([len(each.ids) for each in encoded], batch):
            (values,) = self.run([encoded[place] for place in places], self.facts.outputs[:1])
            for place, row in zip(places, values, strict=True):
                results[place] = answer(texts[place], encoded[place], row, top)
        return [result for result in results if result is not None]

    def encode(self, text: Text, before: str = "") -> EncodedText:
        """The tokens of ``text`` behind the text ``before``, cut where it is too long."""
        first, second = (text, None) if isinstance(text, str) else text
        first = before + first
        if self.facts.lowercase:
            first, second = first.lower(), None if second is None else second.lower()
        return self.tokenizer.encode_whole(first, second, max_tokens=self.facts.max_tokens)

    def run(self, encoded: Sequence[EncodedText], outputs: Sequence[str]) -> list[Values]:
        """The graph's ``outputs`` for texts that are computed together, shorter ones padded."""
        length = max(len(each.ids) for each in encoded)
        ids = np.full((len(encoded), length), self.facts.padding_token_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, each in enumerate(encoded):
            ids[row, : len(each.ids)] = each.ids
            if self.facts.takes_types:
                types[row, : len(each.ids)] = each.types
            mask[row, : len(each.ids)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
        return self.graph.run(inputs, outputs)

    def _prompt(self, name: str | None) -> str:
        prompts = self.facts.prompts
        if name is None:
            return prompts.get(self.facts.default_prompt, "")
        if name not in prompts:
            known = f"choose {', '.join(prompts)}" if prompts else "the model has none"
            raise UsageError(f"no prompt named {name!r}: {known}")
        return prompts[name]

    def _check_task(self, wanted: str) -> None:
        if self.facts.task != wanted:
            raise UsageError(
                f"this model is for {self.facts.task}, not {wanted}: ask it with ask()"
            )

    def _answers(self) -> Callable[[Text, EncodedText, Values, int], Result]:
        tasks = {
            "embeddings": self._embedding,
            "sequence_classification": self._labels,
            "token_classification": self._entities,
            "masked_lm": self._words,
        }
        return tasks[self.facts.task]

    def _embedding(self, text: Text, encoded: EncodedText, row: Values, _: int) -> Result:
        return Result(text, len(encoded.ids), encoded.truncated, embedding=row)

    def _labels(self, text: Text, encoded: EncodedText, row: Values, _: int) -> Result:
        values = scores_of(row, self.facts.scores)
        order = np.argsort(-values, kind="stable")
        labels = tuple(
            {"label": self.facts.labels[place], "score": float(values[place])} for place in order
        )
        return Result(text, len(encoded.ids), encoded.truncated, labels=labels)

    def _entities(self, text: Text, encoded: EncodedText, row: Values, _: int) -> Result:
        values = scores_of(row[: len(encoded.ids)], "softmax")
        entities = []
        for place, (span, special) in enumerate(zip(encoded.spans, encoded.special, strict=True)):
            if special:
                continue
            best = int(values[place].argmax())
            entities.append(
                {
                    "token": self.tokenizer.backend.id_to_token(encoded.ids[place]),
                    "label": self.facts.labels[best],
                    "score": float(values[place, best]),
                    "start": span[0],
                    "end": span[1],
                }
            )
        return Result(text, len(encoded.ids), encoded.truncated, entities=tuple(entities))

    def _words(self, text: Text, encoded: EncodedText, row: Values, top: int) -> Result:
        masked = [
            place for place, token in enumerate(encoded.ids) if token == self.facts.mask_token_id
        ]
        if not masked:
            mask = self.tokenizer.special_tokens.get("mask_token", "its mask token")
            raise UsageError(
                f"{text!r} has no {mask}, and this model says what stands in its place: write one"
            )
        words = []
        for values in scores_of(row[masked], "softmax"):
            order = np.argsort(-values, kind="stable")[:top]
            words.append(
                tuple(
                    {
                        "word": self.tokenizer.decode([int(token)]).strip(),
                        "token_id": int(token),
                        "score": float(values[token]),
                    }
                    for token in order
                )
            )
        return Result(text, len(encoded.ids), encoded.truncated, words=tuple(words))


def scores_of(logits: Values, kind: str) -> Values:
    """Scores of ``logits`` ``[..., labels]``: ``softmax``, ``sigmoid``, or they themselves."""
    if kind == "none":
        return logits
    if kind == "sigmoid":
        found: Values = np.reciprocal(1 + np.exp(-logits))
        return found
    powers: Values = np.exp(logits - logits.max(axis=-1, keepdims=True))
    powers /= powers.sum(axis=-1, keepdims=True)
    return powers


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places of texts by length, ``size`` at a time, so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda place: lengths[place])
    for start in range(0, len(order), size):
        yield order[start : start + size]
