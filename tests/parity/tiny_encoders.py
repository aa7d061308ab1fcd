"""Tiny random encoders, alone and with a decoder, of the real transformers classes, as folders.

Sizes are odd ones, and weights drawn so that everything shows in the outputs: norms are not one,
biases not zero, attention not flat. Each has a real tokenizer: WordPiece, or byte-level BPE between
``<s>`` and ``</s>``.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import TEXT, quiet

SPECIAL = {
    "wordpiece": {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"},
    "bpe": {"cls": "<s>", "pad": "<pad>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"},
}


@dataclass(frozen=True)
class TinyEncoder:
    """A model to build: its transformers class and what its config is given."""

    architecture: str
    settings: dict[str, Any]
    tokenizer: str = "wordpiece"
    vocab_size: int = field(default=301, kw_only=True)


_BERT: dict[str, Any] = {
    "hidden_size": 60,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 70,
}
_ROBERTA = _BERT | {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 72}
_DISTIL: dict[str, Any] = {
    "dim": 52,
    "hidden_dim": 84,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 66,
}
_THREE = {"num_labels": 3}

MODELS: dict[str, TinyEncoder] = {
    "bert": TinyEncoder("BertModel", _BERT),
    "bert-relu": TinyEncoder("BertModel", _BERT | {"hidden_act": "relu", "type_vocab_size": 3}),
    "bert-gelu-new": TinyEncoder(
        "BertModel", _BERT | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}
    ),
    "bert-classes": TinyEncoder("BertForSequenceClassification", _BERT | _THREE),
    "bert-two-classes": TinyEncoder("BertForSequenceClassification", _BERT),
    "bert-tokens": TinyEncoder("BertForTokenClassification", _BERT | {"num_labels": 5}),
    "bert-masked": TinyEncoder("BertForMaskedLM", _BERT),
    "bert-masked-untied": TinyEncoder(
        "BertForMaskedLM", _BERT | {"tie_word_embeddings": False, "hidden_act": "silu"}
    ),
    "roberta": TinyEncoder("RobertaModel", _ROBERTA, "bpe"),
    "roberta-classes": TinyEncoder("RobertaForSequenceClassification", _ROBERTA | _THREE, "bpe"),
    "roberta-tokens": TinyEncoder("RobertaForTokenClassification", _ROBERTA | _THREE, "bpe"),
    "roberta-masked": TinyEncoder(
        "RobertaForMaskedLM", _ROBERTA | {"hidden_act": "relu", "pad_token_id": 4}, "bpe"
    ),
    "xlm-roberta": TinyEncoder("XLMRobertaModel", _ROBERTA, "bpe"),
    "distilbert": TinyEncoder("DistilBertModel", _DISTIL),
    "distilbert-classes": TinyEncoder(
        "DistilBertForSequenceClassification", _DISTIL | {"num_labels": 4, "activation": "relu"}
    ),
    "distilbert-tokens": TinyEncoder("DistilBertForTokenClassification", _DISTIL | _THREE),
    "distilbert-masked": TinyEncoder("DistilBertForMaskedLM", _DISTIL),
    # Rows that groups of 32 and 64 divide.
    "bert-64": TinyEncoder(
        "BertModel", _BERT | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    ),
    "bert-64-masked": TinyEncoder(
        "BertForMaskedLM",
        _BERT | {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    ),
}


_T5: dict[str, Any] = {
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 52,
    "num_layers": 3,
    "num_decoder_layers": 2,  # transformers' cache has no room for more than the encoder has
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "d_model": 36,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 44,
    "decoder_ffn_dim": 60,
    "max_position_embeddings": 64,
}
# Rows that groups of 32 and 64 divide.
_WIDE: dict[str, Any] = {
    "d_model": 64,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
}
ANSWER_VOCAB_SIZE = 310
_MARIAN = _BART | {
    "activation_function": "swish",
    "scale_embedding": True,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "forced_eos_token_id": 0,
    "eos_token_id": 0,
}
_MBART_CLASS, _MARIAN_CLASS = "MBartForConditionalGeneration", "MarianMTModel"
_T5_CLASS, _BART_CLASS = "T5ForConditionalGeneration", "BartForConditionalGeneration"

SEQ2SEQ: dict[str, TinyEncoder] = {
    "t5": TinyEncoder(_T5_CLASS, _T5, "bpe"),
    # As Flan-T5: gated, and what the head multiplies is not scaled.
    "t5-gated": TinyEncoder(
        _T5_CLASS, _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, "bpe"
    ),
    "t5-untied": TinyEncoder(_T5_CLASS, _T5 | {"feed_forward_proj": "gated-silu"}, "bpe"),
    "mt5": TinyEncoder(
        "MT5ForConditionalGeneration", _T5 | {"feed_forward_proj": "gated-gelu"}, "bpe"
    ),
    "bart": TinyEncoder(_BART_CLASS, _BART, "bpe"),
    "bart-scaled": TinyEncoder(
        _BART_CLASS, _BART | {"scale_embedding": True, "activation_function": "relu"}, "bpe"
    ),
    "t5-64": TinyEncoder(_T5_CLASS, _T5 | {"d_model": 64, "d_kv": 16, "d_ff": 128}, "bpe"),
    "mbart": TinyEncoder(_MBART_CLASS, _BART | {"scale_embedding": True}, "mbart"),
    "mbart-64": TinyEncoder(_MBART_CLASS, _BART | _WIDE, "mbart"),
    "mbart50": TinyEncoder(_MBART_CLASS, _BART | {"activation_function": "relu"}, "mbart50"),
    "marian": TinyEncoder(_MARIAN_CLASS, _MARIAN, "marian"),
    "marian-separate": TinyEncoder(
        _MARIAN_CLASS,
        _MARIAN
        | {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": ANSWER_VOCAB_SIZE},
        "marian-apart",
    ),
    "marian-64": TinyEncoder(
        _MARIAN_CLASS,
        _MARIAN | _WIDE,
        "marian",
    ),
}


def build(name: str, folder: Path) -> Path:
    """Save the model ``name`` of ``MODELS`` or ``SEQ2SEQ`` into ``folder``: config, safetensors,
    tokenizer."""
    import torch
    import transformers

    tiny = (MODELS | SEQ2SEQ)[name]
    real = getattr(transformers, tiny.architecture)
    write = WRITERS.get(tiny.tokenizer, save_tokenizer)
    special = write(tiny.tokenizer, tiny.vocab_size, folder)
    settings = {"pad_token_id": special["pad"], **tiny.settings}
    if "marian" in tiny.tokenizer:
        settings["decoder_start_token_id"] = special["pad"]
    if "mbart" in tiny.tokenizer:
        settings["decoder_start_token_id"] = special["sep"]
    config = real.config_class(vocab_size=tiny.vocab_size, **settings)
    with quiet():
        torch.manual_seed(0)
        model = real(config).eval()
    draw = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            if parameter.ndim == 1:
                norm = "norm" in each.lower() and each.endswith("weight")
                parameter.copy_(float(norm) + 0.3 * noise)
            elif "embed" in each or "shared" in each or "relative" in each:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(1.3 * noise / parameter.shape[-1] ** 0.5)
    if name in SEQ2SEQ:
        with torch.no_grad():
            getattr(model, "final_logits_bias", torch.zeros(1)).normal_(0, 0.3, generator=draw)
        # What random weights like to say is the same token for ever: let them end sometimes.
        model.generation_config.eos_token_id = special["sep"]
        model.generation_config.pad_token_id = special["pad"]
        if "marian" in tiny.tokenizer:
            model.generation_config.bad_words_ids = [[special["pad"]]]
    model.save_pretrained(folder)
    if name == "t5-untied":
        _untie(folder, draw)
    return folder


def _untie(folder: Path, draw: Any) -> None:
    """Give a checkpoint a head of its own, as those of T5 1.1 have."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    shape = tensors["shared.weight"].shape
    tensors["lm_head.weight"] = 0.5 * torch.randn(shape, generator=draw)
    save_file(tensors, path, metadata={"format": "pt"})


def save_tokenizer(kind: str, vocab_size: int, folder: Path) -> dict[str, int]:
    """Train a tokenizer on ``TEXT`` and save it as transformers does; its special ids by name.

    It has a few ids less than ``vocab_size``, as real models do.
    """
    import tokenizers
    import transformers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = SPECIAL[kind]
    lines = TEXT.splitlines() * 3
    size, tokens = vocab_size - 5, list(special.values())
    if kind == "wordpiece":
        backend = tokenizers.Tokenizer(models.WordPiece(unk_token=special["unk"]))
        backend.normalizer = normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        backend.train_from_iterator(
            lines, trainers.WordPieceTrainer(vocab_size=size, special_tokens=tokens)
        )
        around = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    else:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            lines,
            trainers.BpeTrainer(
                vocab_size=size,
                special_tokens=tokens,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        )
        around = ("<s> $A </s>", "<s> $A </s> </s> $B </s>")
    ids = {name: backend.token_to_id(token) for name, token in special.items()}
    backend.post_processor = processors.TemplateProcessing(
        single=around[0],
        pair=around[1],
        special_tokens=[(special[name], ids[name]) for name in ("cls", "sep")],
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{name}_token": token for name, token in special.items()}
    )
    fast.save_pretrained(folder)
    return ids


def save_marian(kind: str, vocab_size: int, folder: Path) -> dict[str, int]:
    """Marian's files: two SentencePiece models, and a vocabulary without some of their pieces."""
    from tiny_tokenizers import sentencepiece_file

    folder.mkdir(parents=True, exist_ok=True)
    pieces = {}
    for side, lines in (("source", TEXT.splitlines()), ("target", TEXT.upper().splitlines())):
        data = sentencepiece_file(
            "unigram", vocab_size=130, corpus=lines * 3, bos_id=-1, eos_id=0, unk_id=1
        )
        (folder / f"{side}.spm").write_bytes(data)
        pieces[side] = pieces_of(data)
    found = [*pieces["source"][2:], *pieces["target"][2:]]
    known = [">>deu<<", *(piece for index, piece in enumerate(found) if index % 17)]
    vocab = _numbered(known, vocab_size)
    config: dict[str, Any] = {"tokenizer_class": "MarianTokenizer", "model_max_length": 512}
    if kind == "marian-apart":
        config["separate_vocabs"] = True
        answers = _numbered(pieces["target"][2:], ANSWER_VOCAB_SIZE)
        # Padding, which begins an answer too, has one id on both sides.
        last = vocab["<pad>"]
        answers = {piece: index for piece, index in answers.items() if index != last}
        answers["<pad>"] = last
        (folder / "target_vocab.json").write_text(json.dumps(answers))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return {"pad": vocab["<pad>"], "sep": 0}


def _numbered(pieces: Sequence[str], size: int) -> dict[str, int]:
    """Exactly ``size`` ids, as Marian's vocabularies have them: the end first, padding last."""
    more = (f"more{number}" for number in range(size))
    whole = list(dict.fromkeys(["</s>", "<unk>", *pieces, *more]))[: size - 1]
    return {piece: index for index, piece in enumerate([*whole, "<pad>"])}


def save_mbart(kind: str, vocab_size: int, folder: Path) -> dict[str, int]:
    """mBART's only file: the ids are fairseq's, with the languages behind them."""
    from tiny_tokenizers import sentencepiece_file

    folder.mkdir(parents=True, exist_ok=True)
    data = sentencepiece_file("unigram", vocab_size=200, corpus=TEXT.splitlines() * 3)
    (folder / "sentencepiece.bpe.model").write_bytes(data)
    named = {"mbart": "MBartTokenizer", "mbart50": "MBart50Tokenizer"}[kind]
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": named}))
    return {"pad": 1, "sep": 2}


WRITERS = {
    **dict.fromkeys(("marian", "marian-apart"), save_marian),
    **dict.fromkeys(("mbart", "mbart50"), save_mbart),
}


def pieces_of(data: bytes) -> list[str]:
    """The pieces of a SentencePiece model, by SentencePiece."""
    import sentencepiece

    found = sentencepiece.SentencePieceProcessor(model_proto=data)
    return [found.id_to_piece(index) for index in range(found.vocab_size())]


def load(folder: Path) -> Any:
    """The model in transformers, in float32 with plain attention."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())
    real = getattr(transformers, config["architectures"][0])
    with quiet():
        return real.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def outputs(model: Any, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Its outputs by name for ids, mask and, where it takes them, types."""
    import torch

    given = {name: torch.from_numpy(values) for name, values in batch.items()}
    if "type_vocab_size" not in model.config.to_dict():
        given.pop("token_type_ids")
    elif model.config.type_vocab_size == 1:
        given["token_type_ids"] = torch.zeros_like(given["token_type_ids"])
    with torch.no_grad():
        found = model(**given)
    return {name: values.numpy() for name, values in found.items()}


def some_ids(length: int, seed: int = 0) -> list[int]:
    """Random token ids, none of them special."""
    draw = np.random.default_rng(seed)
    return [int(each) for each in draw.integers(5, 296, length)]


def some_batch(
    lengths: Sequence[int], *, padding: int, vocab_size: int, types: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random ids of texts of ``lengths``, padded at the end; no id is the padding's but there."""
    draw = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    ids = draw.integers(0, vocab_size - 1, shape)
    ids += ids >= padding
    mask = (np.arange(shape[1]) < np.asarray(lengths)[:, None]).astype(np.int64)
    return {
        "input_ids": np.where(mask == 1, ids, padding).astype(np.int64),
        "attention_mask": mask,
        "token_type_ids": draw.integers(0, max(types, 1), shape).astype(np.int64) * mask,
    }
