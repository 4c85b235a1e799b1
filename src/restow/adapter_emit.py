"""Ranks and scales in the config of a converted adapter: what was there is kept word for word where it means the same.

Where ranks do not change, r, lora_alpha, both patterns and use_rslora stay verbatim, unused keys too. A module that PEFT
would then scale otherwise than before (its name is another in the new format, or its rank has changed) gets a pattern
of its own, before the others. Nothing is rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from restow.adapter_config import AdapterConfig, Number, adapter_config, alpha_of
from restow.adapter_formats import Format
from restow.adapter_match import matches
from restow.segments import ends


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the config must say: `names` as PEFT asks for them, `tail` a key that means all like it.

    `aliases`: the names are of one thing, and the first that a pattern matches counts (formats that PEFT does not read).
    """

    names: tuple[str, ...]
    tail: str
    rank: int
    scale: float
    aliases: bool = False

    def said(self, config: AdapterConfig) -> list[tuple[int, Number]]:
        """Rank and alpha by a config, for each name."""
        return [config.of_any(self.names)] if self.aliases else [config.of(name) for name in self.names]

    def fits(self, config: AdapterConfig) -> bool:
        """Whether a config gives every name this rank and scale."""
        return all(
            r == self.rank and isclose(config.scale(r, a), self.scale, rel_tol=1e-12)
            for r, a in self.said(config)
        )


def scales(config: AdapterConfig, wanted: Iterable[Wanted], fmt: Format) -> AdapterConfig:
    """The config with r, alpha and patterns that give every wanted name its rank and scale."""
    todo = list(wanted)
    if (
        fmt.one_scale
    ):  # the caller has made all scales one; patterns that give ranks are for others than its reader
        rank, alpha, rslora = one_scale(config, todo, fmt)
        config = replace(config, rank=rank, alpha=alpha, rslora=rslora, ranks={}, alphas={})
        todo = [replace(w, scale=config.scale(rank, alpha)) for w in todo]
    wrong = [w for w in todo if not w.fits(config)]
    if not wrong:
        return config
    usual = Counter((w.rank, alpha_of(w.rank, w.scale, config.rslora)) for w in todo)
    if (config.rank, config.alpha) not in usual:
        rank, alpha = usual.most_common(1)[0][0]
        names = [name for w in todo for name in w.names]
        config = replace(
            config, rank=rank, alpha=alpha,
            ranks={k: v for k, v in config.ranks.items() if any(matches(k, n) for n in names)},
            alphas={k: v for k, v in config.alphas.items() if any(matches(k, n) for n in names)},
        )  # fmt: skip
        wrong = [w for w in todo if not w.fits(config)]
    alike = {w.tail: len({(o.rank, o.scale) for o in todo if o.tail == w.tail}) == 1 for w in wrong}
    added = _added(config, wrong, alike)
    return added if says(added, todo) else _added(config, wrong, {})


def _added(config: AdapterConfig, wrong: Sequence[Wanted], alike: Mapping[str, bool]) -> AdapterConfig:
    """The config with a pattern, in front, for everything that it says wrong."""
    ranks: dict[str, int] = {}
    alphas: dict[str, Number] = {}
    for w in wrong:
        alpha = alpha_of(w.rank, w.scale, config.rslora)
        names = w.names[:1] if w.aliases else w.names
        for key in [w.tail] if alike.get(w.tail) else [name.replace(".", r"\.") for name in names]:
            if any(rank != w.rank for rank, _ in w.said(config)):
                ranks[key] = w.rank
            if any(other != alpha for _, other in w.said(config)):
                alphas[key] = alpha
    return replace(
        config,
        ranks={**ranks, **{k: v for k, v in config.ranks.items() if k not in ranks}},
        alphas={**alphas, **{k: v for k, v in config.alphas.items() if k not in alphas}},
    )


def says(config: AdapterConfig, wanted: Iterable[Wanted]) -> bool:
    """Whether a config gives every wanted name its rank and scale."""
    return all(w.fits(config) for w in wanted)


def catches(raw: Mapping[str, Any], wanted: Iterable[Wanted]) -> bool:
    """Whether target fields catch every name that PEFT asks for; an expression (`all-linear`) is taken at its word."""
    fields = [raw.get("target_modules"), raw.get("target_parameters")]
    caught = [str(end) for field in fields if isinstance(field, list) for end in field]
    names = (name for w in wanted if not w.aliases for name in w.names)
    return any(isinstance(f, str) for f in fields) or all(any(ends(n, end) for end in caught) for n in names)


def one_scale(config: AdapterConfig, wanted: Sequence[Wanted], fmt: Format) -> tuple[int, Number, bool]:
    """The one (r, alpha, use_rslora) of such a reader: the scale that most modules have, the config's own if it is it.

    Not 0, of which no other is a multiple. A rank that most have is kept as r. rsLoRA stays where every rank is r;
    elsewhere it becomes a plain alpha.
    """
    common = Counter(w.scale for w in wanted if w.scale).most_common(1)
    scale = common[0][0] if common else config.scale(config.rank, config.alpha)
    ranks = Counter(w.rank for w in wanted)
    rank = config.rank if config.rank in ranks or not ranks else ranks.most_common(1)[0][0]
    rslora = config.rslora and not config.ranks and set(ranks) <= {rank} and fmt.kind != "stacked"
    if isclose(config.scale(config.rank, config.alpha), scale, rel_tol=1e-12) and (
        rank == config.rank and rslora == config.rslora
    ):
        return rank, config.alpha, rslora
    return rank, alpha_of(rank, scale, rslora), rslora


def written(config: AdapterConfig, **changes: Any) -> dict[str, Any]:
    """The fields of a file: the source's, with what the config says now; unchanged fields stay as they were spelled."""
    raw = dict(config.raw)
    values = {
        "r": config.rank, "lora_alpha": config.alpha, "use_rslora": config.rslora,
        "rank_pattern": dict(config.ranks), "alpha_pattern": dict(config.alphas), **changes,
    }  # fmt: skip
    before = adapter_config(config.raw)
    had = {"r": before.rank, "lora_alpha": before.alpha, "use_rslora": before.rslora,
           "rank_pattern": dict(before.ranks), "alpha_pattern": dict(before.alphas)}  # fmt: skip
    for field, value in values.items():
        if field in had and value == had[field] and _listed(value) == _listed(had[field]):
            continue
        raw[field] = value
    return raw


def _listed(value: object) -> object:
    """A table with its order, which is that in which patterns are asked."""
    return list(value.items()) if isinstance(value, Mapping) else value
