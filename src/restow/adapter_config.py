"""`adapter_config.json` as PEFT's LoraConfig means it: rank, alpha and their patterns, judged; every other field kept.

Rank and alpha of a module follow its name: the first key of the pattern that matches, else the default (PEFT 0.19.1,
`tuners/lora/model.py`, `_create_and_replace`). The scale is alpha / r, or alpha / sqrt(r) with `use_rslora`. Rejected
by field: no such file, JSON that is none, `r` below 1, an alpha that is no number, pattern keys that are expressions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from restow.adapter_match import check_key, first
from restow.errors import AdapterError, RestowError, show
from restow.files import read_all
from restow.jsontext import JsonFault, parse
from restow.limits import LIMITS

CONFIG = "adapter_config.json"
MODEL = "adapter_model.safetensors"
AGAIN = "get the config that belongs to this adapter"
RANK_LIMIT = 2**20
BIASES = ("none", "all", "lora_only")

Number = int | float


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """A judged config. `raw` is the whole file; `path` where it lies, for messages."""

    raw: Mapping[str, Any]
    rank: int
    alpha: Number
    rslora: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, Number]
    path: str | None = None
    free: bool = False  # NeMo's moe_rank_scaling: the experts' rank is the tensors', whatever r says

    def of(self, name: str) -> tuple[int, Number]:
        """Rank and alpha of a module or parameter, by its full name in the base model."""
        rank, alpha = first(self.ranks, name), first(self.alphas, name)
        return (
            self.rank if rank is None else self.ranks[rank],
            self.alpha if alpha is None else self.alphas[alpha],
        )

    def of_any(self, names: Iterable[str]) -> tuple[int, Number]:
        """The same for something that has several names: each pattern is asked about one after the other."""
        rank, alpha = self.rank, self.alpha
        known = tuple(names)
        for name in known:
            key = first(self.ranks, name)
            if key is not None:
                rank = self.ranks[key]
                break
        for name in known:
            key = first(self.alphas, name)
            if key is not None:
                alpha = self.alphas[key]
                break
        return rank, alpha

    def scale(self, rank: int, alpha: Number) -> float:
        """What B @ A is multiplied by."""
        return scale_of(rank, alpha, self.rslora)

    @property
    def version(self) -> str | None:
        """`peft_version` as the file has it; PEFT itself would put in its own where it is absent."""
        found = self.raw.get("peft_version")
        return found if isinstance(found, str) else None

    def names(self, field: str) -> tuple[str, ...]:
        """A field that holds a list of names; a single text is a list of one."""
        found = self.raw.get(field)
        if isinstance(found, str):
            return (found,)
        return tuple(str(name) for name in found) if isinstance(found, list | tuple | set) else ()


def scale_of(rank: int, alpha: Number, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(rank: int, scale: float, rslora: bool) -> Number:
    """The alpha that gives a scale at a rank; a whole number where it is one."""
    alpha = scale * math.sqrt(rank) if rslora else scale * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def read_adapter_config(folder: str) -> AdapterConfig:
    """The config in an adapter's folder. Raises `AdapterError`."""
    path = Path(folder) / CONFIG
    try:
        text = read_all(
            path, LIMITS.config, what=f"{CONFIG}, which gives rank and alpha", refuse=AdapterError
        )
        value = parse(text, LIMITS.depth, fraction=float, constant=float)
    except JsonFault as fault:
        raise AdapterError(f"{CONFIG} of strict JSON", fault.found, path=path, hint=AGAIN) from None
    except AdapterError:
        raise
    except RestowError as error:
        hint = "an adapter is a folder of adapter_config.json and adapter_model.safetensors"
        raise AdapterError(
            f"{CONFIG}, which gives rank and alpha", error.found, path=path, hint=hint
        ) from None
    config = adapter_config(value, str(path))
    beside = Path(folder) / "automodel_peft_config.json"  # NeMo AutoModel, components/_peft/lora.py
    if beside.is_file():
        try:
            text = read_all(beside, LIMITS.config, what="a JSON config", refuse=AdapterError)
            more = parse(text, LIMITS.depth, fraction=float, constant=float)
        except JsonFault as fault:
            raise AdapterError("a config of strict JSON", fault.found, path=beside, hint=AGAIN) from None
        if isinstance(more, dict) and more.get("moe_rank_scaling") is True:
            return replace(config, free=True)
    return config


def adapter_config(raw: object, path: str | None = None) -> AdapterConfig:
    """Judge a config that is already parsed. Raises `AdapterError`."""
    if not isinstance(raw, Mapping):
        found = f"a {type(raw).__name__}"
        raise AdapterError("an adapter config that is a JSON object", found, path=path, hint=AGAIN)
    kind = raw.get("peft_type", "LORA")
    if str(kind).rpartition(".")[2] != "LORA":
        raise AdapterError(
            "peft_type LORA", show(repr(kind)), path=path, hint="only LoRA adapters are converted"
        )
    if raw.get("bias", "none") not in BIASES:
        said = ", ".join(f"'{word}'" for word in BIASES)
        raise AdapterError(f"bias as one of {said}", show(repr(raw["bias"])), path=path, hint=AGAIN)
    return AdapterConfig(
        raw=MappingProxyType(dict(raw)),
        rank=_rank(raw.get("r", 8), "r", path),
        alpha=_alpha(raw.get("lora_alpha", 8), "lora_alpha", path),
        rslora=_flag(raw, "use_rslora", path),
        ranks=_patterns(raw, "rank_pattern", _rank, path),
        alphas=_patterns(raw, "alpha_pattern", _alpha, path),
        path=path,
    )


def _rank(value: object, field: str, path: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= RANK_LIMIT:
        hint = "the scale is alpha / r" if value == 0 else AGAIN
        raise AdapterError(f"{field} as a whole number from 1", show(repr(value)), path=path, hint=hint)
    return value


def _alpha(value: object, field: str, path: object) -> Number:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdapterError(f"{field} as a number", show(repr(value)), path=path, hint=AGAIN)
    return value


def _flag(raw: Mapping[str, Any], field: str, path: object) -> bool:
    value = raw.get(field) or False
    if not isinstance(value, bool):
        raise AdapterError(f"{field} as true or false", show(repr(value)), path=path, hint=AGAIN)
    return value


def _patterns(raw: Mapping[str, Any], field: str, judge: Any, path: object) -> Mapping[str, Any]:
    table = raw.get(field) or {}
    if not isinstance(table, Mapping):
        raise AdapterError(f"{field} as an object", f"a {type(table).__name__}", path=path, hint=AGAIN)
    for key, value in table.items():
        check_key(str(key), field, path)
        judge(value, f"{field}[{show(key)}]", path)
    return MappingProxyType(dict(table))


def config_text(raw: Mapping[str, Any]) -> bytes:
    """The file's text: as PEFT writes it, sorted, but for patterns, whose order is their meaning."""
    ordered = {key: raw[key] for key in sorted(raw)}
    return (json.dumps(ordered, indent=2) + "\n").encode()
