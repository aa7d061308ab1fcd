"""What the manifest of a merged folder says: digests, lineage, and the base's own facts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

import edgellm
from edgellm.architectures.decoder import Feature
from edgellm.digests import combined_sha256
from edgellm.hub.circumstances import lasting
from edgellm.lora.checkpoint_weights import text_config
from edgellm.lora.lineage import combined_entry
from edgellm.made import CARD
from edgellm.manifest import (
    SCHEMA_VERSION,
    Digested,
    FileEntry,
    ModelFacts,
    Parity,
    TensorEntry,
)
from edgellm.profiling.artifacts import attention_layers
from edgellm.profiling.matrices import experts_of_config

if TYPE_CHECKING:
    from edgellm.export.shard_writer import ShardWriter
    from edgellm.folder_merge import MergePlan

CONTAINER = "hf"

FAINT = 0.5
"""Share of the changed values that rounding may take back before a note says so."""


def describe(plan: MergePlan, writer: ShardWriter, notes: tuple[str, ...]) -> Digested:
    """What was written, by digests, and where it came from; nothing is read again."""
    base_digests = {
        shard.name: writer.base_digests[number].hexdigest(shard.base.file.size_bytes)
        for number, shard in enumerate(plan.shards)
    }
    files = [
        *(
            FileEntry(path=name, nbytes=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in plan.files.items()
            if name != CARD  # for people, who may go on writing it
        ),
        *(
            FileEntry(
                path=shard.name,
                nbytes=shard.nbytes,
                sha256=writer.file_digests[number].hexdigest(shard.nbytes),
            )
            for number, shard in enumerate(plan.shards)
        ),
    ]
    tokenizer = plan.tokenizer
    return Digested(
        schema_version=SCHEMA_VERSION,
        container=CONTAINER,
        main_file=plan.shards[0].name,
        files=tuple(sorted(files, key=lambda entry: entry.path)),
        tensors=_tensor_entries(plan),
        base=msgspec.structs.replace(plan.base, sha256=combined_sha256(base_digests)),
        model=_model_facts(plan),
        recipe=plan.recipe.choices(),
        recipe_sha256=plan.recipe.sha256(),
        tokenizer_sha256="" if tokenizer is None else tokenizer.sha256(),
        chat_template_sha256="" if tokenizer is None else tokenizer.chat_template_sha256(),
        tokenizer_parity=Parity(equal=True, cases=0),
        notes=lasting((*plan.notes, *notes)),
        tool_versions={"edgellm": edgellm.__version__, "numpy": np.__version__},
        merge=msgspec.structs.replace(
            combined_entry(plan.adapter_entries(), plan.combination),
            base=plan.into[0],
            base_reason=plan.into[1],
        ),
        merged_before=plan.merged_before,
        scaled_before=plan.scaled_by,
    )


def _tensor_entries(plan: MergePlan) -> tuple[TensorEntry, ...]:
    def role(name: str) -> str:
        weight = plan.weights.weights.get(name)
        return weight.ref.role if weight is not None else name

    return tuple(
        TensorEntry(
            name=tensor.name,
            role=role(tensor.name),
            shape=tensor.shape,
            grid=tensor.dtype.lower(),
            nbytes=tensor.nbytes,
            sha256="",
            arrays=((shard.name, tensor.offset, tensor.nbytes),),
            note="merged" if tensor.change else "",
        )
        for shard in plan.shards
        for tensor in shard.tensors
    )


def vanishing_notes(vanished: Mapping[str, Any]) -> tuple[str, ...]:
    share = vanished["share"]
    if share is None or share <= FAINT:
        return ()
    return (
        f"{share:.0%} of the values that the adapters change are the same after rounding: the "
        "dtype is too coarse for so small a change; --dtype f32 keeps all of it",
    )


def _model_facts(plan: MergePlan) -> ModelFacts:
    """What the config says; 0 for what one of an unknown family does not.

    With latent attention ``head_dim`` is 0 too: the config's is not what is kept of a token.
    """
    config = text_config(plan.config)
    tokenizer = plan.tokenizer

    def number(*keys: str) -> int:
        return next((config[key] for key in keys if isinstance(config.get(key), int)), 0)

    heads, hidden = number("num_attention_heads", "n_head"), number("hidden_size", "n_embd")
    layers = number("num_hidden_layers", "n_layer")
    attending = attention_layers(config, layers)
    latent = "kv_lora_rank" in config
    head_dim = number("head_dim") or (hidden // heads if heads else 0)
    return ModelFacts(
        family=str(plan.config.get("model_type", "")),
        vocab_size=plan.vocabulary_rows or number("vocab_size"),
        hidden_size=hidden,
        layer_count=layers,
        head_count=heads,
        kv_head_count=number("num_key_value_heads") or heads,
        head_dim=0 if latent else head_dim,
        context_length=number("max_position_embeddings", "n_positions"),
        attention_layer_count=attending if attending < layers else msgspec.UNSET,
        bos_token_id=None if tokenizer is None else tokenizer.bos_token_id,
        eos_token_ids=() if tokenizer is None else tuple(tokenizer.eos_token_ids),
        features=(Feature.LATENT_ATTENTION.value,) if latent else (),
        experts=experts_of_config(config) or msgspec.UNSET,
    )
