"""Which ggml type each tensor of a GGUF file takes: a recipe's mixture, applied to one model.

What the user asked for of single tensors goes before the mixture's rules (``gguf_mixture``), and
what blocks do not divide or nobody can round is refused or falls back, as llama.cpp has it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from edgellm.architectures.decoder import Decoder, Experts, Layer
from edgellm.architectures.gguf_latent import KEYS
from edgellm.errors import UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.gguf_mixture import (
    EMBEDDING,
    FALLBACKS,
    FLOATS,
    HEAD,
    KINDS,
    MIXTURES,
    NEED_IMPORTANCE,
    NO_GUESS,
    OUTPUT_OF_EIGHT,
    Mixture,
    Place,
    Rules,
    eight_experts,
)
from edgellm.export.tensor_grids import grids_by_role
from edgellm.quant import SOLVERS
from edgellm.quant.grid import GRIDS, Grid, grid_named, unknown_grid
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.recipe import DEFAULT_SOLVER, Recipe


@dataclass(frozen=True, slots=True)
class Choice:
    """The grid of one tensor, and what the user should know about it."""

    grid: Grid
    note: str = ""


@dataclass(frozen=True, slots=True)
class Chooser:
    """Chooses the grids of one model; ``embed`` and ``head`` are what the user asked for apart.

    ``by_role``: the grids that the user named for single tensors, which go before the mixture's.
    ``solver`` is a name of ``quant.SOLVERS``: whether it weighs columns decides some types.
    """

    name: str
    mixture: Mixture
    decoder: Decoder
    arch: str
    embed: Grid | None = None
    head: Grid | None = None
    solver: str = DEFAULT_SOLVER
    by_role: Mapping[str, Grid] = field(default_factory=dict)

    @property
    def weighed(self) -> bool:
        """Whether the solver knows the importance of columns."""
        return SOLVERS[self.solver].needs != "nothing"

    def choose(self, role: str, shape: tuple[int, ...]) -> Choice:
        """The grid for a tensor ``[out, in]``, or a vector.

        Raises ``UnsupportedTarget`` when blocks of the type that the user asked for do not divide
        its rows, or when its type needs importance.
        """
        if not quantizable(role, shape):
            return Choice(GRIDS["f32"])
        asked = self._asked(role)
        if asked is not None:
            if shape[-1] % asked.block:
                raise UnsupportedTarget(_does_not_divide(role, shape[-1], asked))
            table = role in (EMBEDDING, HEAD)
            if asked.name in (NO_GUESS if table else NEED_IMPORTANCE) and (
                role == EMBEDDING or not self._has_importance(role)
            ):
                raise UnsupportedTarget(
                    f"{role} cannot be {asked.name}, which ggml rounds to by importance alone, "
                    f"{'and an embedding has none' if role == EMBEDDING else 'and there is none'}: "
                    "choose q2_k or iq3_s"
                )
            return Choice(asked, self._note(asked))
        wanted = GRIDS[self._by_rule(role, shape[-1])]
        grid = fallback(wanted, shape[-1])
        needs = grid.name in NEED_IMPORTANCE or grid.name in self.mixture.needs
        if needs and not self._has_importance(role) and role not in (EMBEDDING, HEAD):
            raise UnsupportedTarget(
                f"{self.name} makes {role} {grid.name}, which is garbage without an importance "
                f"matrix: choose imatrix:{self.name} or gptq:{self.name}, which calibrate first, "
                "or iq3_s, iq3_m, q3_k_s or q2_k"
            )
        if grid == wanted:
            return Choice(grid, self._note(grid))
        return Choice(grid, f"{wanted.name}'s blocks of {wanted.block} do not divide {shape[-1]}")

    def _has_importance(self, role: str) -> bool:
        """Whether that of the columns of ``role`` is known: not where inputs differ by head."""
        return self.weighed and KEYS not in role

    def _note(self, grid: Grid) -> str:
        """What becomes of a solver that ``grid`` is not for."""
        if self.solver != "gptq" or grid.name not in VECTOR_CODEBOOKS:
            return ""
        return f"a code of {grid.name} stands for several values: rounded by imatrix, not gptq"

    def _asked(self, role: str) -> Grid | None:
        """What the user asked for: of a table by its own option, or by the name of a tensor."""
        option = None
        if role == HEAD:
            option = self.head
        elif role == EMBEDDING:
            option = self.embed or (self.head if self.decoder.tied_head else None)
        return option or self.by_role.get(role)

    def _by_rule(self, role: str, columns: int) -> str:
        layer, kind = self._kind(role)
        place = self._place(role, layer, kind)
        if kind == "head" and columns % GRIDS[self.mixture.grid].block:
            return "q8_0"
        rules: Rules = getattr(self.mixture, kind) if kind else ()
        name = next((name for name, holds in rules if holds(place)), self.mixture.grid)
        of_eight = {"value": "q8_0", "key": "q8_0", "attention_output": self.mixture.grid}
        if self.name in OUTPUT_OF_EIGHT:
            of_eight["attention_output"] = "q5_k"
        quantized = GRIDS[self.mixture.grid].kind != "float" and self.mixture.more_for_70b
        if quantized and eight_experts(place) and kind in of_eight:
            return of_eight[kind]
        more = kind == "value" and self.mixture.more_for_70b
        if more and is_70b(self.arch, self.decoder) and name in ("q3_k", "q4_k"):
            # Eight heads share a value head: more bits for it cost next to nothing.
            return "q5_k"
        return name

    def _experts(self) -> Experts | None:
        return next((each.experts for each in self.decoder.layers if each.experts), None)

    def _place(self, role: str, layer: int, kind: str) -> Place:
        """llama.cpp counts values among their like, and heads that share in the first layer."""
        decoder, experts = self.decoder, self._experts()
        attends = [each.attends for each in decoder.layers]
        sharing = decoder.heads // decoder.kv_heads if attends[0] else 0
        count = experts.count if experts else 0
        if kind == "value":
            before = sum(attends[:layer])
            return Place(before, sum(attends), sharing, self.weighed, count, before)
        down = sum(map(_downs, decoder.layers[:layer])) + ("_shexp" in role)
        return Place(layer, len(attends), sharing, self.weighed, count, down)

    def _kind(self, role: str) -> tuple[int, str]:
        layer, stem = 0, role
        if role.startswith("blk."):
            _, number, stem = role.split(".", 2)
            layer = int(number)
        kind = KINDS.get(stem, "")
        return layer, "head" if kind == "embedding" and self.decoder.tied_head else kind


def _downs(layer: Layer) -> int:
    """How many of a layer's tensors lead out of a feed-forward; experts are one, stacked."""
    return 2 if layer.experts is not None and layer.experts.shared_width else 1


def chooser(recipe: Recipe, decoder: Decoder, arch: str, roles: Collection[str] = ()) -> Chooser:
    """The chooser for a recipe; ``arch`` is llama.cpp's name of the family.

    ``roles``: the tensors that ``recipe.tensor_grids`` may name. Raises ``UnknownGrid``,
    ``UnsupportedTarget`` for a grid of another container, and ``UsageError`` for two grids of one
    tensor and for names that match nothing.
    """
    embed = grid_asked(recipe.embed, "--embed") if recipe.embed else None
    head = grid_asked(recipe.head, "--head") if recipe.head else None
    if decoder.tied_head and embed and head and embed != head:
        raise UsageError(
            "the output head of this model is its embedding, one tensor, so it cannot be both "
            f"{embed.name} and {head.name}: give --embed or --head alone"
        )
    mixture = mixture_named(recipe.grid)
    named = grids_by_role(recipe.tensor_grids, roles)
    by_role = {role: grid_asked(name, f"tensor_grids, {role}:") for role, name in named.items()}
    made = Chooser(recipe.grid, mixture, decoder, arch, embed, head, recipe.solver, by_role)
    for role in (EMBEDDING, HEAD):
        option, grid = made._asked(role), by_role.get(role)
        if role in recipe.tensor_grids and grid is not None and option != grid:
            assert option is not None
            raise UsageError(
                f"{role} cannot be both {option.name} (--embed, --head) and {grid.name} "
                "(tensor_grids): leave one of them out"
            )
    return made


def mixture_named(name: str) -> Mixture:
    """The mixture called ``name``, in any case.

    Raises ``UnknownGrid`` with the nearest names, and ``UnsupportedTarget`` if another container
    has it.
    """
    lower = name.lower()
    if lower in MIXTURES:
        return MIXTURES[lower]
    if lower in GRIDS and GRIDS[lower].ggml_type is not None:
        files = [other for other in MIXTURES if MIXTURES[other].grid == lower]
        raise UnknownGrid(
            f"{name} is a type of single tensors, for --embed, --head and --tensor-grid: for a "
            f"whole model choose {' or '.join(files)}"
        )
    if lower in GRIDS:
        raise UnsupportedTarget(f"GGUF {cannot_hold(GRIDS[lower])}")
    # Grids of other containers count as near: the name may be meant for one of them.
    others = [other for other, grid in GRIDS.items() if grid.ggml_type is None]
    raise unknown_grid(name, (*MIXTURES, *others))


def grid_asked(text: str, option: str) -> Grid:
    """The grid that ``option`` names; raises ``UnsupportedTarget`` for other containers'."""
    stored = [name for name, grid in GRIDS.items() if grid.ggml_type is not None]
    try:
        grid = grid_named(text)
    except UnknownGrid as error:
        raise unknown_grid(text, stored) from error
    if grid.ggml_type is None:
        raise UnsupportedTarget(f"{option} {text}: GGUF {cannot_hold(grid)}")
    return grid


def cannot_hold(grid: Grid) -> str:
    """Why GGUF has no ``grid`` and what comes nearest, to follow the word GGUF."""
    reason, instead = {
        "codebook": ("has no NF4 block", "iq4_nl"),
        "per_channel": ("has no single scale for a row", "q8_0"),
        "affine": ("has f16 scales and minima instead of integer zeros", "q4_1 or q4_k_m"),
    }[grid.kind]
    if grid.symmetric and grid.kind == "affine":
        instead = {4: "q4_0", 8: "q8_0"}[int(grid.bits)]
        reason = f"has {grid.bits:g}-bit weights in blocks of 32 alone"
        if grid.group == 32:
            reason = f"has these codes with f16 scales alone, as {instead}"
    if grid.minima:
        instead = "q4_1"
        reason = "has minima in blocks of 32 alone"
        if grid.group == 32:
            reason = f"has these codes with f16 scales and minima alone, as {instead}"
    other = "mlx" if grid.minima else "hf" if grid.name == "nf4-dq" else "onnx"
    return f"{reason}, so it cannot hold {grid.name}: choose {instead}, or --format {other}"


def quantizable(role: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp quantizes the tensor: matrices that are multiplied or looked up."""
    matrix = len(shape) >= 2 and role.endswith("weight")
    return matrix and not role.endswith(FLOATS) and role != "position_embd.weight"


def fallback(wanted: Grid, columns: int) -> Grid:
    """``wanted``, or what llama.cpp takes where its blocks do not divide a row: f16 at last."""
    if columns % wanted.block == 0:
        return wanted
    smaller = GRIDS[FALLBACKS.get(wanted.name, wanted.name)]
    return smaller if columns % smaller.block == 0 else GRIDS["f16"]


def is_70b(arch: str, decoder: Decoder) -> bool:
    """Whether llama.cpp takes the model for a 70B one, by its number of layers."""
    grouped = decoder.heads != decoder.kv_heads
    return len(decoder.layers) == 80 and (arch == "qwen2" or (arch == "llama" and grouped))


def _does_not_divide(role: str, columns: int, grid: Grid) -> str:
    fitting = [
        name for name, g in GRIDS.items() if g.ggml_type is not None and columns % g.block == 0
    ]
    return (
        f"{grid.name} has blocks of {grid.block}, which do not divide the rows of {columns} of "
        f"{role}: choose {', '.join(fitting)}"
    )
