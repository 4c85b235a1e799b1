"""Which tensor of an adapter is what: names sorted into experts modules by format, ordinary modules, and the rest.

Nothing is decided here that needs shapes. Every name ends in exactly one place. Rejected by name: a factor without
its partner, names below an experts module that no format has, one module in two formats.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from restow.adapter_formats import Kind, rows
from restow.errors import AdapterError, RestowError, show
from restow.family import Family
from restow.match import Matcher
from restow.notation import Row
from restow.problems import merged

PREFIX = "base_model.model."
DEPTH = 3  # wrappers around one experts module: gate, up and down by themselves
FACTORS = ("A", "B")
_WORDS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_BESIDE = (
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_B.bias",
)  # of DoRA and lora_bias: go along


class Spelled(NamedTuple):
    """One way to read names: a kind, and how many `base_layer.` a wrapper's names have."""

    kind: Kind
    depth: int = 0
    weight: bool = True


@dataclass(frozen=True)
class Found:
    """The names of one experts module in one kind: role -> index of the name's axes -> full name.

    A wrapper's role is `lora_A` or `lora_B` at a depth: `0.A`; what it means is for `adapter_read` to say.
    """

    path: str
    spelled: Spelled
    names: Mapping[str, Mapping[tuple[int, ...], str]]
    rows: Mapping[str, Row]


@dataclass
class Sorted:
    """Names by place: experts modules; ordinary pairs by module path; whole tensors that go along."""

    experts: dict[str, list[Found]] = field(default_factory=dict)
    pairs: dict[str, dict[str, str]] = field(default_factory=dict)  # module path -> factor -> full name
    others: list[str] = field(default_factory=list)


def sort_names(names: Iterable[str], family: Family, path: object = None) -> Sorted:
    """Sort the names of an adapter's tensors. Raises `AdapterError`."""
    known = _candidates(family)
    matcher = Matcher(
        ((tag, container, row) for tag, (_, table) in enumerate(known) for row in table.values()
         for line in family.containers for container in dict.fromkeys(line)), {}
    )  # fmt: skip
    hits: dict[str, dict[int, dict[str, dict[tuple[int, ...], str]]]] = {}
    claimed: dict[str, set[str]] = {}
    out = Sorted()
    rest: list[str] = []
    for name in names:
        below = name.removeprefix(PREFIX)
        matched = matcher.match(below)
        if not matched:
            rest.append(name)
        longest = max((len(hit.path) for hit in matched), default=0)
        for hit in matched:
            if len(hit.path) == longest:
                table = hits.setdefault(hit.path, {}).setdefault(hit.tag, {})
                table.setdefault(hit.row.role, {})[hit.index] = name
                claimed.setdefault(hit.path, set()).add(name)
    errors: list[RestowError] = []
    for module, tags in hits.items():
        best = _cover(tags, claimed[module])
        if best is None:
            errors.append(_mixed(module, tags, known, path))
            continue
        out.experts[module] = [Found(module, known[tag][0], tags[tag], known[tag][1]) for tag in best]
    for name in rest:
        below = name.removeprefix(PREFIX)
        errors += _strange(name, below, hits, family, path)
        module, factor = _factor(below)
        if factor:
            out.pairs.setdefault(module, {})[factor] = name
        else:
            out.others.append(name)
    for module, factors in out.pairs.items():
        errors += half(module, factors, path)
    if errors:
        raise merged(errors)
    return out


def module_of(name: str) -> str:
    """The module whose factor a tensor is, as PEFT names it."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def half(module: str, factors: Mapping[str, str], path: object) -> list[RestowError]:
    """A factor without its partner."""
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        if (a in factors) != (b in factors):
            there, lost = (a, b) if a in factors else (b, a)
            name = factors[there]
            partner = name.replace(f"{module}.{there}", f"{module}.{lost}")
            return [AdapterError(
                "both factors of every module",
                f"{there} of {show(module)} alone",
                path=path,
                tensor=name,
                sections=[("missing", [show(partner)]), ("found", [show(name)])],
                hint="the file was cut or filtered; save the adapter again",
            )]  # fmt: skip
    return []


def _candidates(family: Family) -> list[tuple[Spelled, dict[str, Row]]]:
    plain: list[Spelled] = [Spelled("native"), Spelled("stacked"), Spelled("stacked", 0, False), Spelled("outer"),
                            Spelled("expert"), Spelled("expert_fused")]  # fmt: skip
    found = [(s, rows(s.kind, family, weight=s.weight)) for s in plain]
    if len(family.labels) == 1:  # not gated: a fused name per expert is the plain name
        found = [(s, table) for s, table in found if s.kind != "expert_fused"]
    for depth in range(DEPTH):
        table = rows("wrapper", family, depth={"in": depth, "out": depth})
        raw = {role: row for role, row in table.items() if role.startswith("out.")}
        found.append((Spelled("wrapper", depth), raw))
    return found


def _cover(
    tags: Mapping[int, Mapping[str, Mapping[tuple[int, ...], str]]], names: set[str]
) -> list[int] | None:
    """The tags that explain every name: one, or the wrappers of one module together."""
    for tag, table in tags.items():
        if {name for found in table.values() for name in found.values()} == names:
            return [tag]
    several = [tag for tag, table in tags.items() if all(() in found for found in table.values())]
    explained = {name for tag in several for found in tags[tag].values() for name in found.values()}
    return sorted(several) if explained == names and len(several) > 1 else None


def _mixed(
    module: str,
    tags: Mapping[int, Mapping[str, Mapping[tuple[int, ...], str]]],
    known: list[tuple[Spelled, dict[str, Row]]],
    path: object,
) -> AdapterError:
    lines = []
    for tag, table in tags.items():
        names = [name for found in table.values() for name in found.values()]
        lines.append(f"{known[tag][0].kind}: {len(names)} tensors, such as {show(names[0])}")
    return AdapterError(
        f"the adapter of {show(module)} in one format",
        f"in parts of {len(tags)}",
        path=path,
        sections=[("formats", lines)],
        hint="two adapters were mixed in one file: keep one",
    )


def _strange(
    name: str, below: str, modules: Mapping[str, object], family: Family, path: object
) -> list[RestowError]:
    """A name below an experts module that no format has, or a factor spelled in a way nobody does."""
    inside = any(below.startswith(f"{module}.") for module in modules) or any(
        f".{container}." in f".{below}" for line in family.containers for container in line
        if container.endswith("experts")
    )  # fmt: skip
    spelled = ".lora_" in f".{below}" and not _factor(below)[1] and not below.endswith(_BESIDE)
    if (inside and "lora" in below) or spelled:
        return [AdapterError(
            "names below an experts module that an adapter format has" if inside else "factors that LoRA has",
            f"{show(below)}",
            path=path,
            tensor=name,
            hint="tell us which program wrote this adapter",
        )]  # fmt: skip
    return []


def _factor(below: str) -> tuple[str, str]:
    """(module path, which factor) of an ordinary LoRA tensor; the factor is empty for everything else."""
    for word in _WORDS:
        module, found, end = below.rpartition(f".{word}")
        if found and end in ("", ".weight"):
            return module, word
    return below, ""
