"""Recipe: everything that a user asked for and that changes the bytes of the artifact."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edgellm.architectures.rope_scaling import parse_scaling
from edgellm.calibration import BUILT_IN
from edgellm.errors import OutputError, UnknownGrid, UsageError
from edgellm.lora.adapter import AdapterSpec, parse_spec
from edgellm.lora.binding import Combination
from edgellm.lora.combine.check import check as check_combination
from edgellm.quant import SOLVERS, SPLITS, TRANSFORMS
from edgellm.quant.devices import CPU

DEFAULT_SOLVER = "rtn"

SOLVER_AFTER = {"awq": "imatrix"}
"""What rounds after a transform where nothing was named: AWQ ends with a search of how far to clip
each group by what its channels bear, which is the search of ``imatrix``.

Output error in a layer of SmolLM2 off its grid by that of plain rounding, without awq and with it:
int4-g64 rtn 1 and 0.644, imatrix 0.741 and 0.537; q4_0 rtn 1 and 0.615, imatrix 0.637 and 0.502.
"""

LOWERED = (
    "format", "quant", "layout", "embed", "head", "kv_cache", "compute", "combine", "sign",
    "merge_base", "calibrate_on", "device", "rope_scaling",
)  # fmt: skip
"""Fields that hold names, which are compared in lower case."""

DEQUANTIZED = "dequantized"

FLOATS = ("f32", "f16", "bf16")
"""Grids on which there is nothing to solve."""

OF_ADAPTERS = (
    "combine",
    "density",
    "sign",
    "combine_rank",
    "merge_base",
    "keep_adapters",
    "allow_untrained",
    "min_survival",
)
"""Fields that say something about ``adapters`` and mean nothing without."""

LEAST_CHECK_TOKENS = 16

OF_CALIBRATION = ("calibration", "calibration_tokens", "calibrate_on", "imatrix")
"""Fields that say something about calibration, and mean nothing to a solver that needs none."""

CALIBRATE_ON = ("float", "quantized")
"""Layers before the one that is solved, as they were or as they were rounded.

The default is first: it takes the least time, and the other gains nothing. KL of SmolLM2 off its
grid in q4_0, 16,384 tokens of calibration, in llama.cpp on 4,088 held-out tokens: ``float`` 0.0911
+- 0.0017, ``quantized`` 0.0906 +- 0.0016. Behind quantized layers, weights moved at first by half
the step towards what float layers gave (GPTAQ, arXiv 2504.02692, section 3) lost: 0.0957 +- 0.0018,
and by the whole step they were useless.
"""

OPTIONAL = (
    "layout",
    "seed",
    "tune",
    "tensor_grids",
    "fit",
    "bits",
    "device",
    "rope_scaling",
    "text_only",
)
"""Fields that the digest of a recipe without them is not to know of."""

ONLY_CHECKED = (
    "allow_untrained",
    "min_survival",
    "check_text",
    "check_tokens",
    "max_kld",
    "max_ppl_increase",
)
"""Fields that change no byte: they say what is refused."""


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What to convert and how; read from a TOML file, flags override it.

    ``quant`` reads ``[transform+][solver:]grid``; ``embed`` and ``head`` name other grids for the
    embedding and the output head. ``layout``: how codes are laid out, where the container has
    several ways (``export.hf_layouts.LAYOUTS``). ``kv_cache``: what keys and values are cached in,
    where the container fixes it; ``compute``: what its graph computes in, likewise. ``context``:
    cap on the context length in tokens.
    ``rope_scaling``: ``KIND:FACTOR``, a rope for more context than the model was trained for
    (``architectures.rope_scaling``).
    ``text_only``: of a model that also sees, the language model (``source.text_part``).
    ``tensor_grids``: the grids of tensors that are named one by one, by role or by a pattern of
    roles (``export.tensor_grids.grids_by_role``), which go before ``quant``. ``fit``: a size of all
    files (``90MB``), ``bits``: of a weight, for which they are chosen (``budget.fitting.fit``); a
    resolved recipe has the choice and no budget.
    ``ignore_config_keys``: config keys that edgellm does not know and the user vouches for.

    ``adapters`` are ``PATH`` or ``PATH=WEIGHT``, in order. ``combine`` names a row of
    ``lora.combine.METHODS``, with its ``density``, ``sign``, ``combine_rank`` and ``seed``
    (``lora.binding.Combination``). ``merge_base``: which base they are merged into
    (``lora.base.bases.CHOICES``), by default the one that they were trained on; ``dequantized``
    without adapters rounds a model that is quantized already again, though its codes could be kept.
    ``keep_adapters``: write them beside the base instead of merging. ``allow_untrained``: take
    adapters that change nothing. ``min_survival``: the least share of the fine-tune that must be
    left after rounding.

    ``check_text``: what the result is compared with the source on, a file or ``builtin``, up to
    ``check_tokens`` of it. ``max_kld``: the most that its answers may be from the source's, in nats
    a token; ``max_ppl_increase``: by how many percent its perplexity may exceed the source's.

    ``calibration`` is the text that solvers and transforms see the model work on, a file or
    ``builtin``, of which ``calibration_tokens`` are drawn by ``seed``
    (``calibration.texts.calibration_windows``). ``calibrate_on``: whether a layer is solved for
    what the ``float`` layers before it give, or for what the ``quantized`` ones give. ``device``:
    where codes are solved (``quant.devices``), by default the CPU. ``tune``: steps of training on
    it after rounding, which move scales and norms while codes stay; ``gptq``'s codes are solved by
    gradients of the source then (``quant.coupled``), and ``calibration_tokens`` are all that
    training reads by default.
    """

    source: str
    format: str | None = None
    quant: str | None = None
    layout: str | None = None
    embed: str | None = None
    head: str | None = None
    tensor_grids: dict[str, str] = {}
    fit: str | None = None
    bits: float | None = None
    kv_cache: str | None = None
    compute: str | None = None
    context: int | None = None
    rope_scaling: str | None = None
    text_only: bool | None = None
    ignore_config_keys: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    combine: str | None = None
    density: float | None = None
    sign: str | None = None
    combine_rank: int | None = None
    seed: int | None = None
    merge_base: str | None = None
    keep_adapters: bool = False
    allow_untrained: bool = False
    min_survival: float | None = None
    check_text: str | None = None
    check_tokens: int | None = None
    max_kld: float | None = None
    max_ppl_increase: float | None = None
    calibration: str | None = None
    calibration_tokens: int | None = None
    calibrate_on: str | None = None
    imatrix: str | None = None
    device: str | None = None
    tune: int | None = None

    @property
    def solver(self) -> str:
        """The solver's name; when none was named ``rtn``, or what belongs to the transform."""
        quant = split_quant(self.quant or "")
        after = next((SOLVER_AFTER[name] for name in quant.transforms if name in SOLVER_AFTER), "")
        return quant.solver or after or DEFAULT_SOLVER

    @property
    def calibrates(self) -> bool:
        """Whether the solver, a transform or tuning must see the model work."""
        by_solver = SOLVERS[self.solver].needs != "nothing"
        return by_solver or bool(self.transforms) or self.tune is not None

    @property
    def follows(self) -> bool:
        """Whether layers are calibrated on those before them as they were rounded."""
        return self.layers != "float"

    @property
    def layers(self) -> str:
        """``calibrate_on``, or its default."""
        return self.calibrate_on or CALIBRATE_ON[0]

    @property
    def transforms(self) -> tuple[str, ...]:
        """Names of the transforms that come before the solver."""
        return split_quant(self.quant or "").transforms

    @property
    def grid(self) -> str:
        """The grid's or mixture's name, without the solver; empty when none was chosen yet."""
        return split_quant(self.quant or "").grid

    def sha256(self) -> str:
        """Digest of the choices, the same wherever the source lies."""
        return hashlib.sha256(msgspec.json.encode(self.choices(), order="sorted")).hexdigest()

    def choices(self) -> dict[str, Any]:
        """What changes the bytes, without paths: the manifest describes what lies there by digest.

        Of ``adapters`` the weights stay, in order. A recipe without adapters has none of the keys
        that are about them. What only decides whether the result is kept is left out.
        """
        fields: dict[str, Any] = msgspec.to_builtins(self)
        for name in ("source", "adapters", "calibration", "imatrix", *ONLY_CHECKED):
            del fields[name]
        for name in (*OPTIONAL, *OF_CALIBRATION, *OF_ADAPTERS):
            if not fields.get(name):
                fields.pop(name, None)
        if not self.follows:
            fields.pop("calibrate_on", None)
        if self.device == CPU:
            del fields["device"]
        if self.adapters:
            fields["adapters"] = [spec.weight for spec in self.adapter_specs()]
        return fields

    def adapter_specs(self) -> list[AdapterSpec]:
        """``adapters``, each taken apart into a path and a weight."""
        return [parse_spec(text) for text in self.adapters]

    def combination(self) -> Combination:
        """How the adapters are combined, defaults filled in: ``cat``, the exact weighted sum."""
        default = Combination()
        return Combination(
            method=self.combine or default.method,
            density=self.density,
            sign=self.sign or default.sign,
            rank=self.combine_rank,
            seed=default.seed if self.seed is None else self.seed,
        )


class Quant(NamedTuple):
    """``--quant`` taken apart: ``[TRANSFORM+][SOLVER:]GRID``.

    ``solver`` is None where none was named, ``grid`` empty where none was.
    """

    transforms: tuple[str, ...]
    solver: str | None
    grid: str

    def __str__(self) -> str:
        methods = "+".join([*self.transforms, *([self.solver] if self.solver else [])])
        return f"{methods}:{self.grid}" if methods else self.grid


def split_quant(text: str) -> Quant:
    """``text`` taken apart: ``q4_0``, ``gptq:q4_0``, ``awq:q4_0``, ``awq+gptq:q4_0``, ``gptq``.

    Raises ``UnknownGrid`` for a solver or transform that is not known, or in the wrong place.
    """
    methods, colon, grid = text.strip().lower().rpartition(":")
    before = sorted({*TRANSFORMS, *SPLITS})
    known = {*SOLVERS, *before}
    if not colon and all(part in known for part in grid.split("+")):
        methods, grid = grid, ""
    parts = methods.split("+") if methods else []
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise UnknownGrid(
            f"no solver named {unknown[0]!r} in --quant {text!r}: choose "
            f"{', '.join(sorted(SOLVERS))}, with {' or '.join(before)} before it "
            f"(awq+gptq:q4_0), or leave the solver out (--quant {grid or 'GRID'})"
        )
    solver = parts.pop() if parts and parts[-1] in SOLVERS else None
    if any(part in SOLVERS for part in parts) or len(set(parts)) < len(parts):
        raise UnknownGrid(
            f"--quant {text!r} names more than one solver, or a transform twice: it reads "
            "[TRANSFORM+][SOLVER:]GRID, such as awq+gptq:q4_0"
        )
    return Quant(tuple(parts), solver, grid)


def load_recipe(path: Path, overrides: Mapping[str, Any]) -> Recipe:
    """The recipe of a TOML file, with those ``overrides`` that are not None put over it.

    A relative ``source``, adapter, ``calibration`` or ``check_text`` that exists beside the file is
    taken from there. Raises ``UsageError`` for a file that cannot be read, keys that are not known
    and values of the wrong type.
    """
    try:
        fields = msgspec.toml.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise UsageError(f"cannot read the recipe {path}: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the recipe {path} is not TOML: {error}") from error
    fields["source"] = _beside(path, fields.get("source"))
    fields["imatrix"] = _beside(path, fields.get("imatrix"))
    for name in ("calibration", "check_text"):
        if fields.get(name) != BUILT_IN:
            fields[name] = _beside(path, fields.get(name))
    if isinstance(fields.get("adapters"), list):
        fields["adapters"] = [_beside(path, entry) for entry in fields["adapters"]]
    return make_recipe({**fields, **_given(overrides)}, origin=str(path))


def _beside(recipe: Path, entry: Any) -> Any:
    """``entry``, a path with or without ``=WEIGHT``, from beside ``recipe`` if it exists there."""
    if not isinstance(entry, str):
        return entry  # None, or refused later with its name
    if (recipe.parent / entry).exists():
        return str(recipe.parent / entry)
    path, equals, weight = entry.rpartition("=")
    if equals and (recipe.parent / path).exists():
        return f"{recipe.parent / path}={weight}"
    return entry


def make_recipe(fields: Mapping[str, Any], origin: str = "the options") -> Recipe:
    """A validated recipe of plain values, names in lower case.

    Raises ``UsageError`` naming the field at fault.
    """
    try:
        recipe = msgspec.convert(_given(fields), Recipe)
    except msgspec.ValidationError as error:
        known = ", ".join(Recipe.__struct_fields__)
        raise UsageError(f"{origin}: {error}. A recipe has the keys {known}") from error
    if recipe.context is not None and recipe.context < 1:
        raise UsageError(f"{origin}: context must be at least 1 token, got {recipe.context}")
    if recipe.quant is not None:
        split_quant(recipe.quant)
    names = {name: getattr(recipe, name) for name in LOWERED}
    recipe = msgspec.structs.replace(
        recipe, **{name: text.strip().lower() for name, text in names.items() if text is not None}
    )
    recipe = msgspec.structs.replace(
        recipe, tensor_grids={k.strip(): v.strip().lower() for k, v in recipe.tensor_grids.items()}
    )
    if recipe.rope_scaling is not None:
        asked = str(parse_scaling(recipe.rope_scaling))
        recipe = msgspec.structs.replace(recipe, rope_scaling=asked)
    if recipe.seed is not None and not 0 <= recipe.seed < 2**63:
        raise UsageError(f"{origin}: seed must be 0 or more, got {recipe.seed}")
    if recipe.calibration_tokens is not None and recipe.calibration_tokens < 1:
        raise UsageError(
            f"{origin}: calibration_tokens must be at least 1, got {recipe.calibration_tokens}"
        )
    if recipe.calibrate_on not in (None, *CALIBRATE_ON):
        raise UsageError(
            f"{origin}: calibrate_on is {' or '.join(CALIBRATE_ON)}, got {recipe.calibrate_on!r}"
        )
    if recipe.bits is not None and not 0 < recipe.bits < math.inf:
        raise UsageError(f"{origin}: bits must be above 0, got {recipe.bits:g}")
    if recipe.tune is not None and recipe.tune < 1:
        raise UsageError(
            f"{origin}: tune is a number of steps, at least 1, got {recipe.tune}: leave it out to "
            "keep what rounding chose"
        )
    _check_adapters(recipe, origin)
    _check_limits(recipe, origin)
    if split_quant(recipe.quant or "").solver is not None:
        check_calibration(recipe, origin)
    return recipe


def check_calibration(recipe: Recipe, origin: str = "the options") -> None:
    """Raise ``UsageError`` for calibration options, or a seed, that the solver would not heed."""
    if recipe.calibrates or recipe.fit is not None or recipe.bits is not None:
        return
    names = OF_CALIBRATION if recipe.adapters else (*OF_CALIBRATION, "seed")
    for name in names:
        if getattr(recipe, name) is not None:
            floats = recipe.grid in FLOATS
            instead = "" if floats else f"choose --quant gptq:{recipe.grid or 'GRID'}, or "
            raise UsageError(
                f"{origin}: {name} is for solvers that see the model work, and {recipe.solver} "
                f"rounds without: {instead}leave it out"
            )


def _check_adapters(recipe: Recipe, origin: str) -> None:
    """Refuse options that contradict the adapters, or that nothing would heed."""
    if not recipe.adapters:
        given = {name: getattr(recipe, name) for name in OF_ADAPTERS}
        idle = [name for name, value in given.items() if value is not None and value is not False]
        if recipe.merge_base == DEQUANTIZED:  # a quantized model, to be rounded again
            idle.remove("merge_base")
        if idle:
            raise UsageError(
                f"{origin}: {idle[0]} is about adapters and there are none: name one with "
                "--adapter, or leave it out"
            )
        return
    if recipe.min_survival is not None and not 0 <= recipe.min_survival <= 1:
        raise UsageError(
            f"{origin}: min_survival is a share, from 0 to 1, got {recipe.min_survival:g}"
        )
    check_combination(recipe.combination(), [spec.weight for spec in recipe.adapter_specs()])


def _check_limits(recipe: Recipe, origin: str) -> None:
    """Refuse limits of the quality that nothing could keep, or that say nothing."""
    if recipe.check_tokens is not None and recipe.check_tokens < LEAST_CHECK_TOKENS:
        raise UsageError(
            f"{origin}: check_tokens must be at least {LEAST_CHECK_TOKENS}, got "
            f"{recipe.check_tokens}: fewer say nothing (--no-check compares none)"
        )
    for name in ("max_kld", "max_ppl_increase"):
        limit = getattr(recipe, name)
        if limit is not None and not 0 <= limit < math.inf:
            raise UsageError(f"{origin}: {name} must be 0 or more, got {limit:g}")


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write ``recipe`` as TOML that ``load_recipe`` reads back (a relative source apart).

    Raises ``OutputError`` when the file cannot be written.
    """
    fields = {
        name: value
        for name, value in _given(msgspec.to_builtins(recipe)).items()
        if value not in ([], (), {}) and value is not False
    }
    try:
        path.write_bytes(msgspec.toml.encode(fields))
    except OSError as error:
        raise OutputError(
            f"cannot write the recipe {path} ({error.strerror}): choose another --save-recipe"
        ) from error


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
