"""One conversion of an adapter, decided before anything is written: names, shapes, config, stamp; then the tensors.

Modules are taken one after the other, twice: once to see what they become, once to make it, so that memory holds one
module, whatever the adapter's size. Tensors of ordinary modules go along as they are. It rejects an adapter of which a
tensor would be neither converted nor taken along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig, adapter_config
from restow.adapter_emit import (
    FIELDS,
    NEWEST,
    RENAMED,
    VERSIONS,
    Wanted,
    one_scale,
    says,
    scales,
    target_modules,
    target_parameters,
    written,
)
from restow.adapter_formats import FORMATS, Format, era_of, faces_of, leaf
from restow.adapter_keys import PREFIX
from restow.adapter_orient import registered
from restow.adapter_pair import Pair
from restow.adapter_read import Adapter, Plain
from restow.adapter_stamp import Stamp, origin_of
from restow.errors import AdapterError, show
from restow.segments import ends
from restow.torch.adapter_factors import Get, exact, times, unfolded
from restow.torch.adapter_write import (
    Module,
    Original,
    arrange,
    fold,
    key_of,
    parameter_of,
    place_of,
    spell,
    wanted,
)
from restow.torch.dtypes import dtype_name

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
Held = dict[str, list[tuple[str, tuple[int, ...]]]]  # module path -> the roles and projections of its blocks


@dataclass(frozen=True)
class Job:
    """A conversion: what is read, and everything that will be written."""

    adapter: Adapter
    base: Base
    fmt: Format
    stamp: Stamp
    get: Get
    config: Mapping[str, Any]
    out_stamp: Stamp
    scale: float | None  # the one scale of formats that have one
    specs: tuple[Spec, ...]
    passed: Mapping[str, str]  # name there -> name in the source
    notes: tuple[str, ...]
    rounded: tuple[str, ...]  # modules whose B was rounded
    original: Original

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the result, module by module; only what is asked for is in memory."""
        for pairs in self.adapter.modules.values():
            module = self._module(pairs)
            for spelled in spell(module, self.fmt, self.base):
                yield from spelled.make().items()
        plains = {plain.names[1]: plain for plain in self.adapter.plain}
        for name, source in self.passed.items():
            if source in plains:
                yield (
                    name,
                    _plain_b(
                        plains[source], self.adapter.config, self.stamp, self.get, self.original, self.scale
                    )[0],
                )
            else:
                yield name, self.get(source)

    def originals(self) -> Iterator[tuple[str, torch.Tensor]]:
        """B as it was, by key, of what multiplying rounded: kept beside the adapter, so that the way back is exact."""
        for pairs in self.adapter.modules.values():
            module = arrange(
                pairs, self.get, self.fmt, self.base, self.adapter.config, self.stamp, self.original
            )
            yield from module.originals.items()
            if self.scale is not None:
                for block in module.blocks:
                    if not exact(fold(block, self.adapter.config, self.scale)[1]):
                        yield key_of(self.base, block.path, block.role, block.labels), block.b
        if self.scale is not None:
            for plain in self.adapter.plain:
                b, scale = _plain_b(plain, self.adapter.config, self.stamp, self.get, self.original, None)
                if not exact(_ratio(scale, self.scale)):
                    yield f"plain|{plain.module}", b

    def _module(self, pairs: list[Pair]) -> Module:
        module = arrange(pairs, self.get, self.fmt, self.base, self.adapter.config, self.stamp, self.original)
        if self.scale is None:
            return module
        return replace(
            module, blocks=tuple(fold(b, self.adapter.config, self.scale)[0] for b in module.blocks)
        )


def _ratio(scale: float, one: float) -> float:
    return 1.0 if abs(scale / one - 1) < 1e-12 else scale / one


def _plain_b(
    plain: Plain, config: AdapterConfig, stamp: Stamp, get: Get, original: Original, scale: float | None
) -> tuple[torch.Tensor, float]:
    """An ordinary module's B, with another scale multiplied in or taken out, and the scale that is left to say."""
    tensor = get(plain.names[1])
    said = config.scale(plain.rank, plain.alpha)
    before = stamp.folded.get(f"plain|{plain.module}")
    if before is not None:
        back = unfolded(tensor, before / said, original(f"plain|{plain.module}"))
        if back is not None:
            tensor, said = back, before
    if scale is None:
        return tensor, said
    ratio = _ratio(said, scale)
    return (tensor if ratio == 1 else times(tensor, ratio)), scale


def make_job(
    adapter: Adapter, base: Base, fmt: Format, stamp: Stamp, get: Get, dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]], installed: str | None = None, original: Original = lambda key: None,
) -> Job:  # fmt: skip
    """Decide a conversion. `dtypes` and `shapes` are the source's by name; `installed` the PEFT that will read it."""
    config = adapter.config
    _account(adapter, shapes)
    _judge(adapter, fmt)
    specs: list[Spec] = []
    want: list[Wanted] = []
    notes: list[str] = []
    rounded: list[str] = []
    folded: dict[str, float] = {}
    parts: dict[str, Any] = {}
    scale_keys: list[tuple[str, int, float]] = []
    held: Held = {}
    for path, pairs in adapter.modules.items():
        module = arrange(pairs, get, fmt, base, config, stamp, original)
        for spelled in spell(module, fmt, base):
            specs += [(name, dtype_name(spelled.dtype), spelled.shape) for name in spelled.names]
        held[path] = [(block.role, block.labels) for block in module.blocks]
        want += wanted(module, path, fmt, base, config)
        scale_keys += [(key_of(base, path, b.role, b.labels), b.rank, config.scale(b.rank, b.alpha))
                       for b in module.blocks]  # fmt: skip
        notes += module.notes
        folded.update(module.folded)
        rounded += module.originals
        if module.parts is not None:
            parts["|".join(map(str, base.family.place(path)))] = module.parts
    by_weight = _by_weight(adapter, base, fmt)
    for plain in adapter.plain:
        scale = _plain_b(plain, config, stamp, get, original, None)[1]
        weight = ".weight" if plain.module in by_weight else ""
        tail = ".".join(plain.module.split(".")[-2:])
        want.append(Wanted((f"{plain.module}{weight}",), f"{tail}{weight}", plain.rank, scale))
        scale_keys.append((f"plain|{plain.module}", plain.rank, scale))
    passed = _passed(adapter)
    specs += [(name, dtypes[source], shapes[source]) for name, source in passed.items()]
    one = None
    carry = _carried(config, stamp, fmt)
    if fmt.one_scale:
        rank, alpha, rslora = one_scale(config, want, fmt)
        one = replace(config, rslora=rslora).scale(rank, alpha)
        mine = {key: scale for key, _, scale in scale_keys if abs(scale / one - 1) > 1e-12}
        rounded += [key for key, scale in mine.items() if not exact(scale / one)]
        folded.update(mine)
        if mine:
            notes.append(
                f"{len(mine)} modules have another scale than {one:g}; the ratio was multiplied into B"
            )
    raw = _config(adapter, base, fmt, stamp, carry, want, held, installed, notes)
    first = next(iter(adapter.faces.values()), ("", ""))[0]
    kind = next(iter(adapter.kinds.values())).kind if adapter.kinds else "none"
    origin = stamp.origin or origin_of(config, kind, first, _one_scale_name(stamp))
    names = [name for name, *_ in specs]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise AdapterError("a name for every tensor", f"{show(twice)} twice", tensor=twice)
    return Job(adapter, base, fmt, stamp, get, raw, Stamp(fmt.name, origin, parts, folded), one, tuple(sorted(specs)),
               passed, tuple(dict.fromkeys(notes)), tuple(rounded), original)  # fmt: skip


def _account(adapter: Adapter, shapes: Mapping[str, object]) -> None:
    """Every tensor of the source is a factor or goes along."""
    used = {n for p in adapter.pairs for f in (p.a, p.b) for n in f.names if n is not None}
    used |= {n for p in adapter.plain for n in p.names} | set(adapter.others)
    lost = [name for name in shapes if name not in used]
    if lost:
        raise AdapterError(
            "a place for every tensor of the adapter", f"{len(lost)} without one", tensor=lost[0],
            sections=[("tensors", map(show, lost))], hint="please report the adapter's names",
        )  # fmt: skip


def _judge(adapter: Adapter, fmt: Format) -> None:
    """What a format cannot say: DoRA and biases of B on experts, extra weights where an engine refuses them."""
    raw = adapter.config.raw
    for word in ("use_dora", "lora_bias"):
        if raw.get(word) and adapter.pairs:
            raise AdapterError(f"{word} false for adapters of experts", "true", path=adapter.config.path,
                               hint="such an adapter can only be merged by the program that trained it")  # fmt: skip
    if fmt.one_scale and adapter.others:
        raise AdapterError(
            f"factors alone, which is all that {fmt.name} reads", f"{len(adapter.others)} other tensors",
            path=adapter.config.path, tensor=adapter.others[0], sections=[("tensors", map(show, adapter.others))],
            hint="merge the adapter into its base instead",
        )  # fmt: skip


def _passed(adapter: Adapter) -> dict[str, str]:
    names = [n for plain in adapter.plain for n in plain.names] + list(adapter.others)
    return {n if n.startswith(PREFIX) else f"{PREFIX}{n}": n for n in sorted(names)}


def _one_scale_name(stamp: Stamp) -> bool:
    return stamp.format in FORMATS and FORMATS[stamp.format].one_scale


def _carried(config: AdapterConfig, stamp: Stamp, fmt: Format) -> AdapterConfig:
    """The config whose numbers are kept: this one, or the first of the chain where this one had to give them up."""
    if not _one_scale_name(stamp) or stamp.origin is None or fmt.one_scale:
        return config
    fields = {k: v for k, v in stamp.origin.fields.items() if k in FIELDS[:5]}
    try:
        first = adapter_config(
            {**{k: v for k, v in config.raw.items() if k not in FIELDS[:5]}, **fields}, config.path
        )
    except AdapterError:
        return config
    return replace(config, rank=first.rank, alpha=first.alpha, rslora=first.rslora, ranks=first.ranks,
                   alphas=first.alphas)  # fmt: skip


def _config(
    adapter: Adapter, base: Base, fmt: Format, stamp: Stamp, carry: AdapterConfig, want: list[Wanted],
    held: Held, installed: str | None, notes: list[str],
) -> Mapping[str, Any]:  # fmt: skip
    """The result's config: the first one of the chain where it says the same, else this one with what must change."""
    faces = str(faces_of(fmt.era, base.family)) if fmt.era else ""
    origin = stamp.origin
    if origin is not None and origin.signature == (fmt.kind, faces, fmt.one_scale):
        raw = {k: v for k, v in adapter.config.raw.items() if k not in FIELDS} | dict(origin.fields)
        try:
            if says(adapter_config(raw), want):
                return _dated(raw, fmt, installed)
        except AdapterError:
            pass
    said = scales(carry, want, fmt)
    changes: dict[str, Any] = _targets(adapter, base, fmt, held)
    if fmt.kind in ("wrapper", "apart") and fmt.peft:
        changes["peft_version"] = installed or VERSIONS.get(fmt.era, NEWEST)
        if adapter.config.raw.get("lora_dropout"):
            changes["lora_dropout"] = 0.0
            notes.append("lora_dropout is 0 here: PEFT has no dropout on parameters")
    elif fmt.kind in ("wrapper", "wrapper3"):  # a version that has lora_A face the same side
        same = faces == faces_of("0.19.1", base.family)
        changes["peft_version"] = NEWEST if same else VERSIONS["0.18"]
    raw = written(said, **changes)
    raw.pop("lora_B_layout", None)
    raw.pop("restow_layout", None)
    if fmt.kind in ("native", "stacked", "outer", "wrapper3"):
        raw["restow_layout"] = fmt.name
    return raw


def _dated(raw: dict[str, Any], fmt: Format, installed: str | None) -> dict[str, Any]:
    """A first config as this format's: a version of another era would be a wrong one here."""
    version = raw.get("peft_version")
    era = era_of(version) if isinstance(version, str) else None
    if fmt.peft and fmt.era and era not in (None, fmt.era):
        raw["peft_version"] = installed or VERSIONS[fmt.era]
    return raw


def _targets(adapter: Adapter, base: Base, fmt: Format, held: Held) -> dict[str, Any]:
    """target_modules and target_parameters in the format's names."""
    config = adapter.config
    given = config.names("target_parameters")
    weights = _by_weight(adapter, base, fmt)
    new = [f"{m}.weight" for m in weights if not any(ends(f"{m}.weight", t) for t in given)]
    plain = [p.module for p in adapter.plain if p.module not in weights]
    modules = target_modules(config, plain, base)
    names: list[str] = []
    tails: list[str] = []
    leaves: list[str] = []
    for path, blocks in held.items():
        to, container = place_of(base, path, fmt)
        for role, labels in blocks:
            names.append(f"{to}.{parameter_of(fmt, base, role, labels)}")
            tails.append(f"{container}.{parameter_of(fmt, base, role, labels)}")
            leaves += [leaf(base.family, role, label) for label in labels or (0,)]
    if fmt.kind in ("expert",):
        experts = _expert_entries(adapter, base, list(dict.fromkeys(leaves)))
        stay = [t for t in given if not any(ends(n, t) for n in _parameters(adapter, base))]
        ours = [f"{p.module}.weight" for p in adapter.plain if p.module not in weights]
        stay = [t for t in stay if not any(ends(n, t) for n in ours)]
        return {"target_modules": [*modules, *experts], "target_parameters": stay or None}
    every = base.checkpoint is None or len(adapter.modules) == len(base.checkpoint.modules)
    counts = {tail: tails.count(tail) for tail in tails}
    every = every and len(set(counts.values())) <= 1
    parameters = [*target_parameters(config, names, tails, _parameters(adapter, base), every), *new]
    return {"target_modules": modules, "target_parameters": parameters}


def _by_weight(adapter: Adapter, base: Base, fmt: Format) -> list[str]:
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
        taken = (
            fmt.kind in ("wrapper", "apart")
            and fmt.era == "0.19.1"
            and end in RENAMED
            and len(base.family.labels) > 1
        )
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


__all__ = ["Job", "Plain", "era_of", "make_job"]
