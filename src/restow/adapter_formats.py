"""Adapter formats as rows: for a family and a format, how the factors A and B of each role are stored.

Roles are `in.A`, `in.B`, `out.A`, `out.B`; A always takes the mathematical input (`d` of `in`, `f` of `out`), B gives
the output, `r` is the rank. A transpose is an order of dims, a fold is a group, and PEFT's turned-round files are rows
in which the file's `lora_A` holds B. Sources: PEFT 0.18.1 to 0.21.2 (`tuners/lora/layer.py`, ParamWrapper), NeMo
AutoModel (`components/_peft/lora_experts.py`), SGLang (`lora/lora.py`), vLLM (`lora/model_manager.py`),
Megatron-Bridge and unsloth-zoo, read or run. Nothing here sees a tensor; unknown format names are a `UsageError`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from restow.errors import UsageError, show
from restow.family import Family
from restow.layout import name_of
from restow.notation import Labels, Part, Row, parse_row

Kind = Literal["native", "wrapper", "wrapper3", "apart", "stacked", "expert", "expert_fused", "outer"]
Faces = Literal["input", "output"]
ROLES = ("in", "out")


@dataclass(frozen=True, slots=True)
class Format:
    """A format that can be written.

    `place`: which of a family's containers its names use: the vendor's, transformers' runtime's, or the source's own.
    `era`: whose orientation its fused tensors have; `one_scale`: its reader knows one alpha / r and no patterns;
    `peft`: PEFT reads it, so that its config must mean what PEFT means.
    """

    name: str
    kind: Kind
    place: Literal["hub", "runtime", "keep"]
    era: str = ""
    one_scale: bool = False
    peft: bool = False


FORMATS: Mapping[str, Format] = MappingProxyType({f.name: f for f in (
    Format("grouped", "native", "keep"),
    Format("peft", "wrapper", "runtime", "0.19.1", peft=True),
    Format("peft-0.19.1", "wrapper", "runtime", "0.19.1", peft=True),
    Format("peft-0.19.0", "wrapper", "runtime", "0.19.0", peft=True),
    Format("peft-0.18", "wrapper", "runtime", "0.18", peft=True),
    Format("peft-separate", "apart", "runtime", "0.19.1", peft=True),
    Format("peft-per-expert", "expert", "hub", peft=True),
    Format("vllm", "expert", "hub", one_scale=True),
    Format("vllm-3d", "wrapper", "runtime", "input", one_scale=True),
    Format("vllm-shared-outer", "outer", "runtime", one_scale=True),
    Format("sglang", "stacked", "runtime", one_scale=True),
    Format("megatron", "stacked", "runtime"),
    Format("megatron-3d", "wrapper3", "runtime", "0.19.1"),
)})  # fmt: skip

# Which side PEFT's lora_A faces in a fused file, by who wrote it and how the parameter is stored: [e, out, in];
# [e, in, out] with the module's `is_transposed`; [e, in, out] without it. Measured with each version.
FACES: Mapping[str, tuple[Faces, Faces, Faces]] = MappingProxyType({
    "0.18": ("output", "input", "input"),
    "0.19.0": ("output", "output", "input"),
    "0.19.1": ("input", "input", "output"),
    "input": ("input", "input", "input"),
})  # fmt: skip
TRANSPOSED = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
UNMARKED = ("llama4", "llama4_text")
VLLM_3D = (
    "gpt_oss",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_vl_moe",
    "qwen3_vl_moe_text",
)  # is_3d_moe_weight


def judge_name(name: str, *, checkable: bool = False) -> None:
    """Raise `UsageError` for a name that is no format's, or (`checkable`) of one that PEFT cannot run."""
    if name not in FORMATS:
        raise UsageError(f"an adapter format, one of {', '.join(FORMATS)}", f"'{show(name)}'")
    if checkable and not FORMATS[name].peft:
        known = ", ".join(f.name for f in FORMATS.values() if f.peft)
        raise UsageError(f"a format that PEFT reads with --check, one of {known}", f"'{show(name)}'")


def format_of(name: str, family: Family) -> Format:
    """A format by name; `vllm` is the one that vLLM expects of this family. Raises `UsageError`."""
    judge_name(name)
    if name == "vllm" and any(kind in VLLM_3D for kind in family.model_types):
        return FORMATS["vllm-3d"]
    return FORMATS[name]


def era_of(version: str) -> str | None:
    """The era of a `peft_version`; None for builds between releases, which span the change."""
    if "dev" in version or "+" in version or "@" in version:
        return None
    numbers = version.split(".")[:3]
    if len(numbers) < 2 or not all(n.isdecimal() for n in numbers):
        return None
    key = tuple(int(n) for n in [*numbers, "0"][:3])
    return "0.18" if key < (0, 19, 0) else "0.19.0" if key == (0, 19, 0) else "0.19.1"


def faces_of(era: str, family: Family) -> Faces:
    """Which side `lora_A` faces in fused files of an era."""
    kinds = family.model_types
    place = 1 if any(k in TRANSPOSED for k in kinds) else 2 if any(k in UNMARKED for k in kinds) else 0
    return FACES[era][place]


def parameter(family: Family, role: str) -> str:
    """The stacked parameter of a role in transformers' runtime: gate_up_proj, up_proj, down_proj."""
    row = family.form("fused").row(role)
    return name_of(row, (0,) * len(row.name_axes), {})


def per_expert(family: Family) -> Mapping[str, Row]:
    """The rows of one nn.Linear per expert and projection, as transformers 4 and the hub name them."""
    own = [
        s.layout
        for s in family.spellings
        if "{e}." in str(s.layout.row("in")) and len(s.layout.row("in").dims) == 2
    ]
    layout = own[0] if own and own[0].row("in").labels else family.form("split")
    return {role: layout.row(role) for role in ROLES}


def leaf(family: Family, role: str, label: int) -> str:
    """What one projection is called where each is stored by itself: gate_proj, w3."""
    row = per_expert(family)[role]
    index = tuple(0 if axis == "e" else label for axis in row.name_axes)
    return name_of(row, index, {}).removesuffix(".weight").rpartition(".")[2]


def _io(family: Family, role: str) -> tuple[str, str]:
    """The dims of a role's input and output; the output of `in` is a group in the family's order."""
    return ("d", f"({' '.join(family.order)})") if role == "in" else ("f", "d")


def rows(
    kind: Kind,
    family: Family,
    *,
    faces: Faces = "input",
    depth: Mapping[str, int] = MappingProxyType({"in": 1, "out": 0}),
    expert_major: bool = False,
    weight: bool = True,
) -> dict[str, Row]:
    """The rows of a format's kind, by role: `in.A`, `in.B`, `out.A`, `out.B`.

    `faces` and `depth` (how many `base_layer.` a role's names have) matter to wrappers; those of single projections
    (`apart`) are the same rows with a `p` of 1, each at its own depth. `expert_major` is Unsloth's
    order of lora_B before its marker `lora_B_layout`; `weight` whether stacked names end in `.weight`.
    """
    text: dict[str, str] = {}
    for role in ROLES:
        i, o = _io(family, role)
        if kind in ("wrapper", "wrapper3", "apart"):
            below = "base_layer." * depth.get(role, 0)
            first, second = (i, o) if faces == "input" else (o, i)
            a, b = ("A", "B") if faces == "input" else ("B", "A")
            fold = "(e r)" if expert_major else "(r e)"
            flat = kind != "wrapper3"
            text[f"{role}.{a}"] = f"{below}lora_A.weight {'(e r)' if flat else 'e r'} {first}"
            text[f"{role}.{b}"] = f"{below}lora_B.weight {second} {fold if flat else 'r e'}"
        elif kind == "native":
            name = "lora_gate_and_up" if role == "in" else "lora_down"
            text[f"{role}.A"], text[f"{role}.B"] = f"{name}_A e {i} r", f"{name}_B e r {o}"
        elif kind == "stacked":
            name, end = parameter(family, role), ".weight" if weight else ""
            text[f"{role}.A"] = f"{name}.lora_A{end} e r {i}"
            text[f"{role}.B"] = f"{name}.lora_B{end} e {o} r"
        elif kind == "outer":
            words = {1: "{p:w1}", 2: "{p:w1|w3}"}[len(family.labels)]
            name, o = (words, "f") if role == "in" else ("w2", o)
            text[f"{role}.A"] = f"{name}.lora_A.weight e r {i}"
            text[f"{role}.B"] = f"{name}.lora_B.weight e {o} r"
        elif kind == "expert_fused":
            name = parameter(family, role)
            text[f"{role}.A"] = f"{{e}}.{name}.lora_A.weight r {i}"
            text[f"{role}.B"] = f"{{e}}.{name}.lora_B.weight {o} r"
        else:
            name = "".join(map(str, per_expert(family)[role].name)).removesuffix(".weight")
            text[f"{role}.A"] = f"{name}.lora_A.weight r {i}"
            text[f"{role}.B"] = f"{name}.lora_B.weight {'f' if role == 'in' else o} r"
    return {role: parse_row(f"{role} {body}") for role, body in text.items()}


def one_label(row: Row, label: int) -> Row:
    """A row with labels in its name, cut down to one of them."""
    return Row(row.role, tuple(_cut(part, label) for part in row.name), row.dims, row.exact)


def _cut(part: Part, label: int) -> Part:
    return Labels(part.axis, (part.labels[label],)) if isinstance(part, Labels) else part


CANON = MappingProxyType({
    role: parse_row(f"{role} factor {dims}")
    for role, dims in (("in.A", "e r d"), ("in.B", "e p f r"), ("out.A", "e r f"), ("out.B", "e d r"))
})  # fmt: skip
"""What every format is converted through in memory: one factor of one role, an axis a dim."""
