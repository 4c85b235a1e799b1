"""One conversion of an adapter, decided before anything is written: names, shapes, config, stamp; then the tensors.

Modules are taken one after the other, twice: once to see what they become, once to make it, so that memory holds one
module, whatever the adapter's size. Tensors of ordinary modules go along as they are. It rejects an adapter of which a
tensor would be neither converted nor taken along.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from restow.adapter_base import Base
from restow.adapter_emit import Wanted, one_scale
from restow.adapter_formats import Format
from restow.adapter_keys import PREFIX
from restow.adapter_place import key_of, module_key, plain_key
from restow.adapter_read import Adapter, Plain
from restow.adapter_result import had_one_scale, result_config
from restow.adapter_scope import judge_delta
from restow.adapter_stamp import Stamp, origin_of
from restow.adapter_targets import by_weight
from restow.errors import AdapterError, show
from restow.torch.adapter_arrange import Arranged, Parts, arrange
from restow.torch.adapter_factors import Get
from restow.torch.adapter_scale import Original, Reading, exact, ratio_of, times
from restow.torch.adapter_write import spell, wanted
from restow.torch.dtypes import dtype_name

Spec = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


@dataclass(frozen=True)
class Job:
    """A conversion: what is read, and everything that will be written."""

    adapter: Adapter
    reading: Reading
    fmt: Format
    config: Mapping[str, Any]
    stamp: Stamp
    scale: float | None  # the one scale of formats that have one
    specs: tuple[Spec, ...]
    passed: Mapping[str, str]  # name there -> name in the source
    notes: tuple[str, ...]
    rounded: tuple[str, ...]  # modules whose B was rounded

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the result, module by module; only what is asked for is in memory."""
        for pairs in self.adapter.modules.values():
            module = arrange(pairs, self.fmt, self.reading)
            if self.scale is not None:
                module = replace(
                    module, blocks=tuple(self.reading.folded(b, self.scale)[0] for b in module.blocks)
                )
            for spelled in spell(module, self.fmt, self.reading.base):
                yield from spelled.make().items()
        plains = {plain.names[1]: plain for plain in self.adapter.plain}
        for name, source in self.passed.items():
            yield name, self._plain_b(plains[source]) if source in plains else self.reading.get(source)

    def _plain_b(self, plain: Plain) -> torch.Tensor:
        tensor, said = self.reading.plain_b(plain)
        ratio = 1.0 if self.scale is None else ratio_of(said, self.scale)
        return tensor if ratio == 1 else times(tensor, ratio)

    def originals(self) -> Iterator[tuple[str, torch.Tensor]]:
        """B as it was, by key, of what multiplying rounded: kept beside the adapter, so that the way back is exact."""
        base, scale = self.reading.base, self.scale
        for pairs in self.adapter.modules.values():
            module = arrange(pairs, self.fmt, self.reading)
            yield from module.originals.items()
            for block in module.blocks:
                if scale is not None and not exact(self.reading.folded(block, scale)[1]):
                    yield key_of(base, block.path, block.role, block.labels), block.b
        if scale is None:
            return
        for plain in self.adapter.plain:
            b, said = self.reading.plain_b(plain)
            if not exact(ratio_of(said, scale)):
                yield plain_key(plain.module), b


@dataclass
class _Found:
    """What the modules become, module by module."""

    specs: list[Spec] = field(default_factory=list)
    want: list[Wanted] = field(default_factory=list)
    held: dict[str, list[tuple[str, tuple[int, ...]]]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)  # by key
    parts: dict[str, Parts] = field(default_factory=dict)
    folded: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    rounded: list[str] = field(default_factory=list)

    def add(self, path: str, module: Arranged, fmt: Format, reading: Reading) -> None:
        """An experts module of the source, arranged."""
        base, config = reading.base, reading.config
        for spelled in spell(module, fmt, base):
            self.specs += [(name, dtype_name(spelled.dtype), spelled.shape) for name in spelled.names]
        self.held[path] = [(block.role, block.labels) for block in module.blocks]
        self.want += wanted(module, path, fmt, base, config)
        for b in module.blocks:
            self.scales[key_of(base, path, b.role, b.labels)] = config.scale(b.rank, b.alpha)
        if module.parts is not None:
            self.parts[module_key(base, path)] = module.parts
        self.folded.update(module.folded)
        self.notes += module.notes
        self.rounded += module.originals

    def add_plain(self, plain: Plain, scale: float, weight: str) -> None:
        """An ordinary module; `weight` is what its target ends in beside its path."""
        tail = ".".join(plain.module.split(".")[-2:])
        self.want.append(Wanted((f"{plain.module}{weight}",), f"{tail}{weight}", plain.rank, scale))
        self.scales[plain_key(plain.module)] = scale

    def fold(self, one: float) -> None:
        """Every scale that is another than `one` is multiplied into B."""
        ratios = {key: ratio_of(scale, one) for key, scale in self.scales.items()}
        mine = [key for key, ratio in ratios.items() if ratio != 1]
        self.folded.update({key: self.scales[key] for key in mine})
        self.rounded += [key for key in mine if not exact(ratios[key])]
        if mine:
            self.notes.append(
                f"{len(mine)} modules have another scale than {one:g}; the ratio was multiplied into B"
            )


def make_job(
    adapter: Adapter, base: Base, fmt: Format, stamp: Stamp, get: Get, dtypes: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]], installed: str | None = None, original: Original = lambda key: None,
) -> Job:  # fmt: skip
    """Decide a conversion. `dtypes` and `shapes` are the source's by name; `installed` the PEFT that will read it.

    Raises `AdapterError` for a tensor without a place, and for what the format cannot say.
    """
    config = adapter.config
    _account(adapter, shapes)
    _judge(adapter, fmt)
    reading, found = Reading(base, config, stamp, get, original), _Found()
    for path, pairs in adapter.modules.items():
        found.add(path, arrange(pairs, fmt, reading), fmt, reading)
    weights = by_weight(adapter, base, fmt)
    for plain in adapter.plain:
        found.add_plain(plain, reading.plain_b(plain)[1], ".weight" if plain.module in weights else "")
    one = None
    if fmt.one_scale:
        rank, alpha, rslora = one_scale(config, found.want, fmt)
        one = replace(config, rslora=rslora).scale(rank, alpha)
        found.fold(one)
    raw, said = result_config(adapter, base, fmt, stamp, found.want, found.held, installed)
    first = next(iter(adapter.faces.values()), ("", ""))[0]
    kind = next(iter(adapter.kinds.values())).kind if adapter.kinds else "none"
    origin = stamp.origin or origin_of(config, kind, first, had_one_scale(stamp))
    passed = _passed(adapter)
    specs = [*found.specs, *((name, dtypes[source], shapes[source]) for name, source in passed.items())]
    names = [name for name, *_ in specs]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise AdapterError("a name for every tensor", f"{show(twice)} twice", tensor=twice)
    notes = tuple(dict.fromkeys((*found.notes, *said)))
    return Job(adapter, reading, fmt, raw, Stamp(fmt.name, origin, found.parts, found.folded), one,
               tuple(sorted(specs)), passed, notes, tuple(found.rounded))  # fmt: skip


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
    if adapter.pairs:
        judge_delta(adapter.config, " for adapters of experts",
                    "such an adapter can only be merged by the program that trained it")  # fmt: skip
    if fmt.one_scale and adapter.others:
        raise AdapterError(
            f"factors alone, which is all that {fmt.name} reads", f"{len(adapter.others)} other tensors",
            path=adapter.config.path, tensor=adapter.others[0], sections=[("tensors", map(show, adapter.others))],
            hint="merge the adapter into its base instead",
        )  # fmt: skip


def _passed(adapter: Adapter) -> dict[str, str]:
    names = [n for plain in adapter.plain for n in plain.names] + list(adapter.others)
    return {n if n.startswith(PREFIX) else f"{PREFIX}{n}": n for n in sorted(names)}
