"""The model card of an artifact, written from its manifest: what it is, how good, how to run it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from edgellm.artifact import GENAI_CONFIG, Artifact
from edgellm.errors import UsageError
from edgellm.hub.ids import HubId
from edgellm.manifest import AdapterEntry, Digested, Manifest

HUB_PAGE = re.compile(r"https://(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)/?")
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""How the Hub spells licences; anything else is the name of one that it does not list."""

LIBRARIES = {"hf": "transformers", "mlx": "mlx"}
"""By container the library that the Hub shows code for; GGUF and ONNX it tells by their files."""

TAGS = {"gguf": ("gguf", "llama.cpp"), "onnx": ("onnx", "onnxruntime"), "hf": (), "mlx": ("mlx",)}
TASKS = {
    "embeddings": "feature-extraction",
    "sequence_classification": "text-classification",
    "token_classification": "token-classification",
    "masked_lm": "fill-mask",
}
"""Of encoders by their task."""

OF_OUTPUTS = {
    "cosine_mean": "cosine to the source's outputs, mean",
    "cosine_min": "cosine, least",
    "max_difference": "largest difference of a value",
    "kld_mean": "KL divergence, mean (nats)",
    "top1_agreement": "the same likeliest answer (share)",
}
"""What conversions of encoders, alone or with a decoder, measure of themselves."""

FLOATS = ("f32", "f16", "bf16")


def model_card(
    artifact: Artifact, target: HubId, *, base_model: str | None = None, licence: str | None = None
) -> str:
    """The README.md of ``artifact`` in the repository ``target``: front matter, then Markdown.

    ``base_model``: the Hub id of the model that it was made from, and ``licence``: its own in the
    Hub's terms, where the manifest has none or another. Raises ``UsageError`` for an id that is
    none.
    """
    from huggingface_hub import ModelCardData

    assert artifact.manifest is not None
    made = artifact.manifest.artifact
    bases = base_models(made, base_model)
    front = ModelCardData(
        base_model=(bases[0] if len(bases) == 1 else bases) or None,
        base_model_relation=relation(made) if bases else None,
        library_name=LIBRARIES.get(made.container),
        pipeline_tag=_task(made),
        tags=_tags(made),
        **(_licence(made) if licence is None else {"license": licence}),
    )
    body = "\n".join(_body(artifact, artifact.manifest, target)).rstrip()
    return f"---\n{front.to_yaml()}\n---\n\n{body}\n"


def base_models(made: Digested, base_model: str | None = None) -> list[str]:
    """The Hub ids of what the artifact was made from: the base, then adapters merged into it."""
    if base_model is not None and not REPOSITORY.fullmatch(base_model):
        raise UsageError(f"--base-model is a Hub id, such as org/name, and {base_model!r} is none")
    page = HUB_PAGE.fullmatch(made.base.url)
    base = base_model or (page[1] if page else None)
    # An adapter that was fetched has its id for a name and a commit; of a folder only a name is
    # known, which may look like an id and be none.
    adapters = [each.name for each in _merged(made) if each.revision]
    return [name for name in (base, *dict.fromkeys(adapters)) if name]


def relation(made: Digested) -> str:
    """What the artifact is to its base, in the Hub's words: ``quantized`` or ``merge``.

    ``merge`` where adapters were merged into float weights, ``quantized`` for everything else that
    convert writes: also floats in another container, as the Hub has it of GGUF files.
    """
    floats = all(tensor.grid in FLOATS for tensor in made.tensors)
    return "merge" if made.merge is not None and floats else "quantized"


def _merged(made: Digested) -> tuple[AdapterEntry, ...]:
    return (*made.merged_before, *(made.merge.adapters if made.merge else ()))


def _licence(made: Digested) -> dict[str, Any]:
    """The licence's keys as the source states it; none where it states nothing."""
    licence = made.base.licence
    if not licence:
        return {}
    page = HUB_PAGE.fullmatch(made.base.url)
    link = {"license_link": made.base.url} if page else {}
    if licence == "other":
        return {"license": "other", **link}
    if LICENCE_ID.fullmatch(licence):
        return {"license": licence}
    return {"license": "other", "license_name": licence, **link}


TRANSLATORS = ("marian", "mbart")
"""Families that were made to translate."""


def _task(made: Digested) -> str:
    """What it is for, in the Hub's words."""
    if made.seq2seq is not None:
        return "translation" if made.model.family in TRANSLATORS else "text2text-generation"
    return "text-generation" if made.encoder is None else TASKS[made.encoder.task]


def _tags(made: Digested) -> list[str]:
    quant = str(made.recipe.get("quant") or "").replace(":", "-")
    chat = ["conversational"] if made.chat_template_sha256 else []
    tags = ["edgellm", *TAGS.get(made.container, ()), made.model.family, quant, *chat]
    return [tag for tag in dict.fromkeys(tags) if tag]


def _body(artifact: Artifact, manifest: Manifest, target: HubId) -> Iterator[str]:
    made = manifest.artifact
    total = sum(file.nbytes for file in made.files)
    yield f"# {target.repo.partition('/')[2]}"
    yield ""
    yield f"{_what(made)}, {_size(total)}, made by edgellm {made.tool_versions['edgellm']}."
    yield ""
    yield "## What was done"
    yield ""
    yield from (f"- {line}" for line in _done(made))
    yield ""
    yield from _grids(made)
    yield from _quality(manifest)
    yield "## How to run it"
    yield ""
    yield from _running(artifact, made, target)
    yield "## Checksums"
    yield ""
    yield (
        "`manifest.json` says what went in, what was done to each tensor, and the checksum of "
        f"every byte. The artifact's own digest is `{manifest.sha256}`; `edgellm verify` on the "
        "downloaded folder recomputes all of them."
    )
    yield ""
    yield from _table(
        ("file", "bytes", "sha256"),
        [(f"`{file.path}`", f"{file.nbytes:,}", f"`{file.sha256}`") for file in made.files],
    )


def _what(made: Digested) -> str:
    page = made.base.url
    base = f"[{made.base.name}]({page})" if page.startswith("https://") else _plain(made.base.name)
    grids = made.recipe.get("quant") or "the base's own dtype"
    form = {"hf": "a Hugging Face folder", "mlx": "an MLX folder"}
    return f"{base} as {form.get(made.container, made.container.upper())}, `{grids}`"


def _done(made: Digested) -> Iterator[str]:
    """What went in and what was done to it, a line each."""
    from edgellm.lora.lineage import described

    base = made.base
    revision = f" at revision `{base.revision}`" if base.revision else ""
    yield f"base: {_plain(base.name)}{revision}, weights of sha256 `{base.sha256}`"
    for adapter in _merged(made):
        yield f"merged into it: {_plain(adapter.name)} ({described(adapter)})"
    if made.merge is not None and len(made.merge.adapters) > 1:
        yield f"combined by `{made.merge.method}`"
    if made.merge is not None and made.merge.base_reason:
        yield f"merged into {_plain(made.merge.base_reason)}"
    for kept in made.kept_adapters:
        yield f"beside it, unmerged: `{kept.file}`, {_plain(kept.name)} ({described(kept)})"
    given = made.calibration
    if given is not None:
        text = given.imatrix or given.text
        steps = "+".join([*given.transforms, given.solver])
        yield f"calibrated: `{steps}` on {given.tokens:,} tokens of {_plain(text)}"
    if made.tuning is not None:
        tuned = made.tuning
        text = _plain(tuned.text)
        yield f"tuned afterwards: scales and norms, on {tuned.training_tokens:,} tokens of {text}"
    yield f"context: {made.model.context_length:,} tokens"
    for note in made.notes:
        yield _plain(note)


def _grids(made: Digested) -> Iterator[str]:
    """The table of grids; a tensor that shares its bytes with another is counted once."""
    nbytes: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    weights: Counter[str] = Counter()
    beside = {kept.file for kept in made.kept_adapters}
    own = {tensor.arrays: tensor for tensor in made.tensors if tensor.arrays[0][0] not in beside}
    for tensor in own.values():
        nbytes[tensor.grid] += tensor.nbytes
        tensors[tensor.grid] += 1
        weights[tensor.grid] += math.prod(tensor.shape)
    rows = [
        (f"`{grid}`", str(tensors[grid]), _size(count), f"{8 * count / weights[grid]:.2f}")
        for grid, count in nbytes.most_common()
        if weights[grid]
    ]
    if len(rows) > 1:
        bits = 8 * nbytes.total() / weights.total()
        rows.append(("all", str(tensors.total()), _size(nbytes.total()), f"{bits:.2f}"))
    yield from _table(("grid", "tensors", "size", "bits per weight"), rows)


def _outputs(quality: Mapping[str, Any]) -> Iterator[str]:
    rows = [
        (said, f"{quality[name]:.4g}")
        for name, said in OF_OUTPUTS.items()
        if quality.get(name) is not None
    ]
    if rows:
        yield "## How far its outputs are from the source's"
        yield ""
        yield from _table(("figure", "value"), rows)


def _quality(manifest: Manifest) -> Iterator[str]:
    """The figures against the source, where the conversion took them."""
    from edgellm.lora.check.surviving import survival_line

    quality = manifest.measured.get("quality", {})
    if manifest.artifact.encoder is not None or manifest.artifact.seq2seq is not None:
        yield from _outputs(quality)
        return
    survival = survival_line(manifest.measured)
    if "kld_mean" not in quality and not survival:
        return
    yield "## How far its answers are from the source's"
    yield ""
    if "kld_mean" in quality:
        text = "edgellm's built-in text" if quality["text"] == "builtin" else quality["text"]
        yield (
            f"Over {quality['tokens']:,} tokens of {_plain(text)}, on {quality['runtime']}, "
            "against the source in float:"
        )
        yield ""
        yield from _table(
            ("figure", "value", "standard error"),
            [
                _figure("KL divergence, mean (nats)", quality, "kld_mean"),
                _figure("KL divergence, 99th percentile (nats)", quality, "kld_p99"),
                _figure("the same most likely token", quality, "top1_agreement", percent=True),
                _figure("perplexity", quality, "perplexity"),
                _figure("perplexity of the source", quality, "reference_perplexity"),
                _figure("perplexity, increase", quality, "perplexity_increase", percent=True),
            ],
        )
    if survival:
        yield f"Survival of the fine-tune: {_plain(survival)}."
        yield ""


def _figure(
    name: str, quality: dict[str, Any], key: str, *, percent: bool = False
) -> tuple[str, str, str]:
    def shown(value: float | None, digits: int) -> str:
        if value is None:
            return ""
        return f"{100 * value:.1f}%" if percent else f"{value:.{digits}g}"

    return name, shown(quality.get(key), 4), shown(quality.get(f"{key}_stderr"), 2)


def _running(artifact: Artifact, made: Digested, target: HubId) -> Iterator[str]:
    repo, name = target.repo, target.repo.partition("/")[2]
    at = f" --revision {target.revision}" if target.revision else ""
    commands = [
        f"hf download {repo}{at} --local-dir {name}",
        f"edgellm verify {name}",
        f'edgellm run {name} "Why is the sky blue?"',
    ]
    if artifact.container == "gguf" and not at:
        commands += ["", "# or with llama.cpp alone"]
        commands.append(f"llama-cli --hf-repo {repo} --hf-file {made.main_file}")
    if artifact.container == "mlx" and not at:
        commands += ["", "# or with mlx-lm alone"]
        commands.append(f'mlx_lm.generate --model {repo} --prompt "Why is the sky blue?"')
    yield from ("```sh", *commands, "```", "")
    if artifact.container == "hf":
        revision = f', revision="{target.revision}"' if target.revision else ""
        yield from (
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{repo}"{revision})',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}"{revision})',
            "```",
            "",
        )
    if GENAI_CONFIG in {file.path for file in made.files}:
        yield "onnxruntime-genai opens the folder too."
        yield ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


def _plain(text: str) -> str:
    """Words of others as they are: in Markdown nothing of them becomes a link, a tag or a line."""
    return re.sub(r"([\\`*_{}\[\]<>|])", r"\\\1", " ".join(text.split()))


def _size(nbytes: float) -> str:
    unit, scale = next(
        ((unit, scale) for unit, scale in (("GB", 1e9), ("MB", 1e6)) if nbytes >= scale),
        ("kB", 1e3),
    )
    return f"{nbytes / scale:.1f} {unit}"
