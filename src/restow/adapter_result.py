"""The config of a converted adapter: the first one of the chain where it says the same, else this one, changed.

Only what would mean something else in the new format changes: ranks and scales by `adapter_emit`, targets by
`adapter_targets`, and the version of PEFT that lora_A faces as. Nothing is rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from restow.adapter_base import Base
from restow.adapter_config import AdapterConfig, adapter_config
from restow.adapter_emit import Wanted, catches, says, scales, written
from restow.adapter_formats import FORMATS, Format, era_of, faces_of
from restow.adapter_read import Adapter
from restow.adapter_stamp import FIELDS, NUMBERS, Stamp
from restow.adapter_targets import Held, targets
from restow.errors import AdapterError

NEWEST = "0.21.2"
VERSIONS = {"0.18": "0.18.1", "0.19.0": "0.19.0", "0.19.1": "0.19.1"}


def had_one_scale(stamp: Stamp) -> bool:
    """Whether the adapter was written for a reader that knows one scale."""
    return stamp.format in FORMATS and FORMATS[stamp.format].one_scale


def result_config(
    adapter: Adapter, base: Base, fmt: Format, stamp: Stamp, want: Sequence[Wanted], held: Held,
    installed: str | None,
) -> tuple[Mapping[str, Any], tuple[str, ...]]:  # fmt: skip
    """The config that gives every wanted name its rank and scale, as JSON has it; and what should be said of it.

    `installed` is the PEFT that will read it, None where nobody said.
    """
    faces = str(faces_of(fmt.era, base.family)) if fmt.era else ""
    origin = stamp.origin
    if origin is not None and origin.signature == (fmt.kind, faces, fmt.one_scale):
        raw = {k: v for k, v in adapter.config.raw.items() if k not in FIELDS} | dict(origin.fields)
        try:
            if says(adapter_config(raw), want) and catches(raw, want):
                return _dated(raw, fmt, installed), ()
        except AdapterError:
            pass
    notes: tuple[str, ...] = ()
    changes = targets(adapter, base, fmt, held)
    if fmt.kind in ("wrapper", "apart") and fmt.peft:
        changes["peft_version"] = installed or VERSIONS.get(fmt.era, NEWEST)
        if adapter.config.raw.get("lora_dropout"):
            changes["lora_dropout"] = 0.0
            notes = ("lora_dropout is 0 here: PEFT has no dropout on parameters",)
    elif fmt.kind in ("wrapper", "wrapper3"):  # a version that has lora_A face the same side
        same = faces == faces_of("0.19.1", base.family)
        changes["peft_version"] = NEWEST if same else VERSIONS["0.18"]
    raw = written(scales(_carried(adapter.config, stamp, fmt), want, fmt), **changes)
    raw.pop("lora_B_layout", None)
    raw.pop("restow_layout", None)
    if fmt.kind in ("native", "stacked", "outer", "wrapper3"):
        raw["restow_layout"] = fmt.name
    return raw, notes


def _carried(config: AdapterConfig, stamp: Stamp, fmt: Format) -> AdapterConfig:
    """The config whose numbers are kept: this one, or the first of the chain where this one had to give them up."""
    if not had_one_scale(stamp) or stamp.origin is None or fmt.one_scale:
        return config
    fields = {k: v for k, v in stamp.origin.fields.items() if k in NUMBERS}
    try:
        first = adapter_config(
            {**{k: v for k, v in config.raw.items() if k not in NUMBERS}, **fields}, config.path
        )
    except AdapterError:
        return config
    return replace(config, rank=first.rank, alpha=first.alpha, rslora=first.rslora, ranks=first.ranks,
                   alphas=first.alphas)  # fmt: skip


def _dated(raw: dict[str, Any], fmt: Format, installed: str | None) -> dict[str, Any]:
    """A first config as this format's: a version of another era would be a wrong one here."""
    version = raw.get("peft_version")
    era = era_of(version) if isinstance(version, str) else None
    if fmt.peft and fmt.era and era not in (None, fmt.era):
        raw["peft_version"] = installed or VERSIONS[fmt.era]
    return raw
