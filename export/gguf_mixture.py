"""Which ggml type each tensor of a GGUF file takes: llama.cpp's own mixtures, as a table.

A mixture such as ``q4_k_m`` names a type for most tensors and gives more bits to those whose
rounding hurts most. The choices are those of ``llama_model_quantize``, with an importance matrix
where the solver weighs by importance and without one else (llama.cpp, src/llama-quant.cpp);
``tests/parity`` compares both byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from edgellm.architectures.decoder import Decoder, Experts, Layer
from edgellm.architectures.experts import ROUTER
from edgellm.architectures.gguf_latent import KEYS
from edgellm.errors import UnknownGrid, UnsupportedTarget, UsageError
from edgellm.export.tensor_grids import grids_by_role
from edgellm.quant import SOLVERS
from edgellm.quant.grid import GRIDS, Grid, grid_named, unknown_grid
from edgellm.quant.levels import VECTOR_CODEBOOKS
from edgellm.recipe import DEFAULT_SOLVER, Recipe

EMBEDDING, HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: its layer of how many, and how many heads share a key/value head.

    ``weighed``: the solver weighs columns by their importance. ``experts``: how many a layer has.
    ``down``: how many products lie before it that lead out of a feed-forward, a shared expert's
    among them.
    """

    layer: int
    layers: int
    sharing: int
    weighed: bool = False
    experts: int = 0
    down: int = 0


Condition = Callable[[Place], bool]
Rules = tuple[tuple[str, Condition], ...]


def always(place: Place) -> bool:
    return True


def shared_by_four(place: Place) -> bool:
    """Keys and values are small beside the queries, so that bits for them are cheap."""
    return place.sharing >= 4


def eight_experts(place: Place) -> bool:
    """What llama.cpp takes for Mixtral."""
    return place.experts == 8


def cheap_values(place: Place) -> bool:
    """Keys and values are small beside the queries, or beside the experts."""
    return shared_by_four(place) or place.experts >= 4


def first_downs(place: Place) -> bool:
    """The first eighth, as llama.cpp counts: with a shared expert, a layer counts twice."""
    return place.down < place.layers // 8


def first(count: int) -> Condition:
    return lambda place: place.layer < count


def first_part(parts: int) -> Condition:
    return lambda place: place.layer < place.layers // parts


def weighed(condition: Condition) -> Condition:
    """``condition``, and only with importance."""
    return lambda place: place.weighed and condition(place)


def unweighed(condition: Condition) -> Condition:
    """``condition``, and only without importance."""
    return lambda place: not place.weighed and condition(place)


def middle(place: Place) -> bool:
    return place.layers // 8 <= place.layer < 7 * place.layers // 8


def ends_and_thirds(place: Place) -> bool:
    """The first and the last eighth, and every third layer between."""
    return not middle(place) or (place.layer - place.layers // 8) % 3 == 2


def more_for_eight(place: Place) -> bool:
    return eight_experts(place) and ends_and_thirds(place)


@dataclass(frozen=True, slots=True)
class Mixture:
    """One row: ``file_type`` is llama.cpp's number of it (``general.file_type``).

    ``grid`` is the type where nothing else is said. The other columns are rules for one kind of
    tensor, of which the first that holds counts; ``value`` is for attn_v, and for attn_qkv and
    attn_kv_b, which make values among others.
    ``head`` is the output head, and the embedding too where the two are one tensor. ``needs``: the
    types that are garbage without importance in this mixture alone (``NEED_IMPORTANCE``: in all).
    ``more_for_70b``: values of models of that size get more bits, keys and values of those with
    eight experts too.
    """

    file_type: int
    grid: str
    value: Rules = ()
    key: Rules = ()
    query: Rules = ()
    attention_output: Rules = ()
    gate_and_up: Rules = ()
    down: Rules = ()
    embedding: Rules = ()
    head: Rules = (("q6_k", always),)
    needs: tuple[str, ...] = ()
    more_for_70b: bool = True


_MORE = (("q6_k", ends_and_thirds),)
_AS_GRID: Rules = ()


def _iq4(file_type: int, grid: str) -> Mixture:
    return Mixture(
        file_type,
        grid,
        value=(("q5_k", shared_by_four),),
        down=(("q5_k", unweighed(first_part(8))),),
    )


def _iq1_or_2(
    file_type: int, grid: str, more: str, embedding: str, attention_output: Rules = ()
) -> Mixture:
    """The mixtures below three bits differ in the type of what gets ``more`` bits."""
    return Mixture(
        file_type,
        grid,
        value=(("q4_k", cheap_values), (more, always)),
        key=(("q4_k", eight_experts),),
        attention_output=(("q5_k", eight_experts), *attention_output),
        down=((more, first_downs),),
        embedding=((embedding, always),),
        head=(("q5_k", always),),
        more_for_70b=False,
    )


MIXTURES: dict[str, Mixture] = {
    "f32": Mixture(0, "f32", head=_AS_GRID),
    "f16": Mixture(1, "f16", head=_AS_GRID),
    "bf16": Mixture(32, "bf16", head=_AS_GRID),
    "q8_0": Mixture(7, "q8_0", head=_AS_GRID),
    "q6_k": Mixture(18, "q6_k"),
    "q5_k_m": Mixture(17, "q5_k", value=_MORE, down=_MORE),
    "q5_k_s": Mixture(16, "q5_k"),
    "q5_1": Mixture(9, "q5_1"),
    "q5_0": Mixture(8, "q5_0", down=(("q5_1", weighed(first_part(8))),)),
    "q4_k_m": Mixture(15, "q4_k", value=_MORE, down=_MORE),
    "q4_k_s": Mixture(14, "q4_k", value=(("q5_k", first(4)),), down=(("q5_k", first_part(8)),)),
    "q4_1": Mixture(3, "q4_1"),
    "q4_0": Mixture(2, "q4_0", down=(("q4_1", weighed(first_part(8))),)),
    "iq4_nl": _iq4(25, "iq4_nl"),
    "iq4_xs": _iq4(30, "iq4_xs"),
    "q3_k_l": Mixture(
        13,
        "q3_k",
        value=(("q5_k", always),),
        attention_output=(("q5_k", always),),
        down=(("q5_k", always),),
    ),
    "q3_k_m": Mixture(
        12,
        "q3_k",
        value=(("q5_k", first(2)), ("q4_k", always)),
        attention_output=(("q4_k", always),),
        down=(("q5_k", first_part(16)), ("q4_k", always)),
    ),
    "q3_k_s": Mixture(11, "q3_k"),
    "q2_k": Mixture(
        10,
        "q2_k",
        value=(("q4_k", shared_by_four), ("q3_k", always)),
        attention_output=(("q3_k", always),),
        down=(("q3_k", always),),
    ),
    "q2_k_s": Mixture(
        21,
        "q2_k",
        value=(("q4_k", shared_by_four),),
        down=(("q4_k", first_part(8)),),
        needs=("q2_k",),
    ),
    "iq3_m": Mixture(
        27,
        "iq3_s",
        value=(("q4_k", always),),
        attention_output=(("q4_k", always),),
        down=(("q4_k", first_part(8)), ("q4_k", more_for_eight)),
    ),
    "iq3_s": Mixture(26, "iq3_s", value=(("q4_k", shared_by_four),)),
    "iq3_xs": Mixture(
        22,
        "iq3_s",
        value=(("q4_k", shared_by_four),),
        key=(("iq3_xxs", always),),
        query=(("iq3_xxs", always),),
        gate_and_up=(("iq3_xxs", middle),),
    ),
    "iq3_xxs": Mixture(
        23,
        "iq3_xxs",
        value=(("q4_k", shared_by_four), ("iq3_s", unweighed(always))),
        key=(("iq2_s", always),),
        query=(("iq2_s", always),),
        attention_output=(("iq3_s", always),),
        down=(("q4_k", unweighed(first_part(8))), ("q3_k", unweighed(always))),
        embedding=(("iq3_s", always),),
        head=(("q5_k", always),),
    ),
    "iq2_m": _iq1_or_2(29, "iq2_s", "iq3_s", "iq3_s", (("iq3_s", always),)),
    "iq2_s": _iq1_or_2(28, "iq2_xs", "iq3_s", "iq3_s", (("iq3_s", always),)),
    "iq2_xs": _iq1_or_2(20, "iq2_xs", "q2_k", "q2_k"),
    "iq2_xxs": _iq1_or_2(19, "iq2_xxs", "q2_k", "q2_k"),
    "iq1_m": _iq1_or_2(31, "iq1_m", "q2_k", "q2_k", (("iq2_xxs", always),)),
    "iq1_s": _iq1_or_2(24, "iq1_s", "q2_k", "q2_k", (("iq2_xxs", always),)),
}

KINDS = {
    "attn_v.weight": "value",
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_k.weight": "key",
    "attn_q.weight": "query",
    "attn_output.weight": "attention_output",
    "ffn_gate.weight": "gate_and_up",
    "ffn_up.weight": "gate_and_up",
    "ffn_down.weight": "down",
    "ffn_gate_exps.weight": "gate_and_up",
    "ffn_up_exps.weight": "gate_and_up",
    "ffn_down_exps.weight": "down",
    "ffn_gate_shexp.weight": "gate_and_up",
    "ffn_up_shexp.weight": "gate_and_up",
    "ffn_down_shexp.weight": "down",
    EMBEDDING: "embedding",
    HEAD: "head",
}
"""The column of ``Mixture`` for a role without its ``blk.N.``."""

OUTPUT_OF_EIGHT = (
    "q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "iq3_xxs", "iq3_xs", "iq3_s", "iq3_m", "iq4_nl",
    "iq4_xs",
)  # fmt: skip
"""Mixtures that give attention's output five bits where there are eight experts, and else the
mixture's own type, beside keys and values of eight bits."""

FLOATS = ("_norm.weight", ROUTER, "shortconv.conv.weight", "ssm_conv1d.weight")
"""Ends of the roles of what stays float whatever its shape."""

FALLBACKS = {
    "iq1_s": "iq4_nl",
    "iq1_m": "iq4_nl",
    "iq2_xxs": "iq4_nl",
    "iq2_xs": "iq4_nl",
    "iq2_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq3_s": "iq4_nl",
    "iq4_xs": "iq4_nl",
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
}
"""What takes the place of a type of blocks of 256 where they do not divide a row."""

NEED_IMPORTANCE = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs")
"""Types that are garbage without an importance matrix, except for the embedding and the head."""

NO_GUESS = ("iq1_s", "iq2_xxs", "iq2_xs")
"""Those of them that ggml cannot round to at all without (``ggml_quantize_requires_imatrix``)."""


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
