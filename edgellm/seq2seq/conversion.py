"""Convert an encoder with a decoder; what is its own beside ``encoders.conversion``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from edgellm.artifact import Artifact
from edgellm.encoders.conversion import Kind, carry_out
from edgellm.encoders.planning import FolderPlan, plan_folder
from edgellm.export.seq2seq_onnx import ENCODER_FILE, lay_out_seq2seq
from edgellm.manifest import ModelFacts, Seq2SeqFacts
from edgellm.progress import Progress, unwatched
from edgellm.recipe import Recipe
from edgellm.seq2seq.quality import check_seq2seq
from edgellm.source.encoder_model import Seq2SeqSource
from edgellm.tokenization.languages import Languages, languages_of

Seq2SeqPlan: TypeAlias = FolderPlan[Seq2SeqSource]


def plan_seq2seq(
    recipe: Recipe, source: Seq2SeqSource, *, threads: int | None = None
) -> Seq2SeqPlan:
    """Everything that converting ``source`` by ``recipe`` will do; see ``plan_folder``."""
    what = f"an encoder with a decoder ({source.model.family})"
    return plan_folder(recipe, source, lay_out_seq2seq, what, threads)


def carry_out_seq2seq(
    plan: Seq2SeqPlan,
    out: Path,
    *,
    force: bool = False,
    check: bool = True,
    progress: Progress = unwatched,
) -> Artifact:
    """The artifact of a plan that was made before; see ``carry_out``."""
    return carry_out(plan, SEQ2SEQ, out, force=force, check=check, progress=progress)


def model_facts(plan: Seq2SeqPlan) -> ModelFacts:
    """The sizes of the decoder, under the names that language models have for them."""
    model, tokenizer = plan.source.model, plan.source.tokenizer
    return ModelFacts(
        family=model.family,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        layer_count=model.decoder.layers,
        head_count=model.decoder.heads,
        kv_head_count=model.decoder.heads,
        head_dim=model.head_dim,
        context_length=plan.layout.context_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=_ends(plan.source),
    )


def seq2seq_facts(plan: Seq2SeqPlan) -> Seq2SeqFacts:
    """What runs the artifact of ``plan``."""
    source, longest = plan.source, plan.layout.context_length
    generation, model = source.generation, source.model
    asked = _number(generation, "max_new_tokens") or (_number(generation, "max_length") or 1) - 1
    forced = _number(generation, "forced_bos_token_id")
    start = _number(generation, "decoder_start_token_id")
    spoken = languages_of(source.tokenizer) if model.family in WITH_LANGUAGES else Languages()
    return Seq2SeqFacts(
        encoder_file=ENCODER_FILE,
        start_token_id=model.start_token_id if start is None else start,
        end_token_ids=_ends(source),
        max_tokens=longest,
        # transformers' own default of 20 tokens, which it warns of, is nobody's wish.
        max_new_tokens=min(asked, longest) if asked > USUAL_LENGTH else longest,
        first_token_ids=() if forced is None else (forced,),
        suppressed_token_ids=_suppressed(generation),
        last_token_id=_forced_end(generation),
        languages=spoken.ids,
        source_language=spoken.source,
        language_begins=spoken.behind_text,
    )


WITH_LANGUAGES = ("mbart",)
"""Families whose tokenizer marks a text with its language's code."""

USUAL_LENGTH = 20
"""``max_length`` where a generation config says nothing."""


def _ends(source: Seq2SeqSource) -> tuple[int, ...]:
    """What ends an answer, of the generation config, or else of the tokenizer."""
    said = source.generation.get("eos_token_id")
    ids = [said] if isinstance(said, int) else said if isinstance(said, list) else []
    return tuple(int(each) for each in ids) or tuple(source.tokenizer.eos_token_ids)


def _number(generation: Mapping[str, Any], key: str) -> int | None:
    value = generation.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _forced_end(generation: Mapping[str, Any]) -> int | None:
    """What transformers makes the last token of an answer that goes on; of several the first."""
    forced = generation.get("forced_eos_token_id")
    if isinstance(forced, list):
        return min(forced, default=None)
    return _number(generation, "forced_eos_token_id")


def _suppressed(generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that are never taken: ``suppress_tokens``, and bad words of a single token."""
    bad = generation.get("bad_words_ids") or []
    single = [words[0] for words in bad if isinstance(words, list) and len(words) == 1]
    return tuple(dict.fromkeys([*(generation.get("suppress_tokens") or []), *single]))


SEQ2SEQ: Kind[Seq2SeqSource] = Kind(model=model_facts, check=check_seq2seq, seq2seq=seq2seq_facts)
