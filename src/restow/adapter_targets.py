"""`target_modules` and `target_parameters` of a converted adapter: entries that catch its modules and no others.

The source's own entries stay where they mean the same. What an ordinary module is called matters too: PEFT takes some
leaves for the experts', whatever stands before them. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig
from restow.adapter_formats import Format, leaf
from restow.adapter_orient import registered
from restow.adapter_place import parameter_of, place_of
from restow.adapter_read import Adapter
from restow.segments import ends

RENAMED = (
    "gate",
    "gate_proj",
    "up_proj",
    "down_proj",
    "w1",
    "w2",
    "w3",
)  # what PEFT takes for experts by the leaf
Held = Mapping[
    str, Sequence[tuple[str, tuple[int, ...]]]
]  # module path -> roles and projections of its blocks


def targets(adapter: Adapter, base: Base, fmt: Format, held: Held) -> dict[str, Any]:
    """target_modules and target_parameters in the format's names."""
    config = adapter.config
    given = config.names("target_parameters")
    weights = by_weight(adapter, base, fmt)
    new = [f"{m}.weight" for m in weights if not any(ends(f"{m}.weight", t) for t in given)]
    plain = [p.module for p in adapter.plain if p.module not in weights]
    modules = _modules(config, plain, base)
    names: list[str] = []
    tails: list[str] = []
    leaves: list[str] = []
    for path, blocks in held.items():
        to, container = place_of(base, path, fmt)
        for role, labels in blocks:
            names.append(f"{to}.{parameter_of(fmt, base, role, labels)}")
            tails.append(f"{container}.{parameter_of(fmt, base, role, labels)}")
            leaves += [leaf(base.family, role, label) for label in labels or (0,)]
    if fmt.kind == "expert":
        experts = _expert_entries(adapter, base, list(dict.fromkeys(leaves)))
        stay = [t for t in given if not any(ends(n, t) for n in _parameters(adapter, base))]
        ours = [f"{p.module}.weight" for p in adapter.plain if p.module not in weights]
        stay = [t for t in stay if not any(ends(n, t) for n in ours)]
        return {"target_modules": [*modules, *experts], "target_parameters": stay or None}
    every = base.checkpoint is None or len(adapter.modules) == len(base.checkpoint.modules)
    counts = {tail: tails.count(tail) for tail in tails}
    every = every and len(set(counts.values())) <= 1
    parameters = [*_expert_parameters(config, names, tails, _parameters(adapter, base), every), *new]
    return {"target_modules": modules, "target_parameters": parameters}


def by_weight(adapter: Adapter, base: Base, fmt: Format) -> list[str]:
    """Ordinary modules that are targeted by their weights' names.

    Routers already are. PEFT from 0.19 on takes every name that ends in `gate_proj` and the like for the experts of
    models whose hub names it knows (transformers_weight_conversion.py, _convert_peft_config_moe), whatever stands
    before it: dense layers and shared experts of such models can only be meant by their weights.
    """
    given = adapter.config.names("target_parameters")
    linear = {n.removesuffix(".weight") for n in base.canonical_weights}
    found = []
    for plain in adapter.plain:
        module, end = plain.module, plain.module.rpartition(".")[2]
        named = any(ends(f"{module}.weight", t) for t in given)
        taken = fmt.kind in ("wrapper", "apart") and fmt.era == "0.19.1" and end in RENAMED
        taken = taken and len(base.family.labels) > 1
        back = named and fmt.kind == "expert" and end in RENAMED and end != "gate"
        known = base.checkpoint is None or base.family.canonical(module) in linear
        if (named and not back) or (taken and known):
            found.append(module)
    return found


def _parameters(adapter: Adapter, base: Base) -> list[str]:
    both = (registered(path, base.family) for path in adapter.modules)
    return list(dict.fromkeys(name for pair in both for one in pair for name in one.values()))


def _expert_entries(adapter: Adapter, base: Base, leaves: list[str]) -> list[str]:
    """Leaves where they mean experts alone, else `experts.0.gate_proj` and so on."""
    plain = {base.family.canonical(p.module) for p in adapter.plain}
    linear = {n.removesuffix(".weight") for n in base.canonical_weights}
    clash = {n.rpartition(".")[2] for n in linear - plain}
    count = max((p.sizes["e"] for p in adapter.pairs), default=0)
    found: list[str] = []
    for end in leaves:
        found += [end] if end not in clash else [f"experts.{e}.{end}" for e in range(count)]
    return found


def _modules(config: AdapterConfig, plain: Sequence[str], base: Base) -> list[str]:
    """Entries that catch these ordinary modules (full paths) and nothing else that the base has.

    The source's own entries are kept where they do; a leaf that PEFT would take for the experts' (RENAMED) is written
    with the segments before it.
    """
    names = config.raw.get("target_modules")
    given = [str(n) for n in names] if isinstance(names, list | tuple | set) else []
    linear = [n.removesuffix(".weight") for n in base.canonical_weights if n.endswith(".weight")]
    other = set(linear) - {base.family.canonical(p) for p in plain} if base.checkpoint is not None else set()
    kept: list[str] = []
    left = list(plain)
    for entry in given:
        ours = [p for p in plain if ends(p, entry)]
        if ours and entry not in RENAMED and not any(ends(o, entry) for o in other):
            kept.append(entry)
            left = [p for p in left if p not in ours]
    for module in left:
        if any(ends(module, entry) for entry in kept):
            continue
        unsure = base.checkpoint is None and any(s.isdecimal() for s in module.split("."))
        short = (
            entry for entry in _ends_of(module)
            if entry not in RENAMED and not any(ends(o, entry) for o in other)
            and (not unsure or entry in given)
        )  # fmt: skip
        kept.append(next(short, module))
    return kept


def _ends_of(module: str) -> Iterator[str]:
    """The ends of a path that begin with no number, shortest first."""
    segments = module.split(".")
    for at in range(len(segments) - 1, 0, -1):
        if not segments[at].isdecimal():
            yield ".".join(segments[at:])


def _expert_parameters(
    config: AdapterConfig, ours: Sequence[str], tails: Sequence[str], before: Sequence[str], every: bool
) -> list[str]:
    """Entries for the experts' parameters: their tails where every layer has them, else full names.

    Entries that mean anything but experts (`before`: their parameters as the source may name them) stay.
    """
    given = config.names("target_parameters")
    stay = [t for t in given if not any(ends(name, t) for name in (*ours, *before))]
    mine = [t for t in given if any(ends(name, t) for name in ours)]
    if every and mine and all(any(ends(n, t) for t in mine) for n in ours):
        return list(given)
    return [*(dict.fromkeys(tails if every else ours)), *stay]
