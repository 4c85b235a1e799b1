"""What a conversion writes into the adapter file's own metadata, so that the way back is exact.

The format that was written; of the adapter at the beginning of the chain: its kind and the config fields that
conversions touch; which columns of joined factors were whose; scales that were multiplied into B. It lies in the
safetensors header, where engines and PEFT do not look, since PEFT warns of config fields that it does not know. A stamp
is a help and never trusted: what it says is checked against the tensors, and a strange one is as good as none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from restow.adapter_config import AdapterConfig

KEY = "restow.adapter"
NUMBERS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # the fields that make a scale
FIELDS = (*NUMBERS, "target_modules", "target_parameters", "peft_version", "lora_dropout", "restow_layout")
Place = tuple[tuple[int, ...], int, int]  # projections, first column of the rank, columns


@dataclass(frozen=True)
class Origin:
    """The beginning of a chain of conversions: its kind (wrappers: and the side lora_A faces), its config's fields."""

    kind: str
    faces: str
    one_scale: bool
    fields: Mapping[str, Any]

    @property
    def signature(self) -> tuple[str, str, bool]:
        return self.kind, self.faces, self.one_scale


@dataclass(frozen=True)
class Stamp:
    """`parts` maps a module's place to (places of gate and up, rank of down); `folded` a pair's key to its true scale."""

    format: str = ""
    origin: Origin | None = None
    parts: Mapping[str, tuple[tuple[Place, ...], int]] = field(default_factory=dict)
    folded: Mapping[str, float] = field(default_factory=dict)

    def text(self) -> str:
        """The stamp as it is written."""
        origin = None
        if self.origin is not None:
            origin = {"kind": self.origin.kind, "faces": self.origin.faces, "one_scale": self.origin.one_scale,
                      "fields": dict(self.origin.fields)}  # fmt: skip
        body = {"version": 1, "format": self.format, "origin": origin,
                "parts": {k: [list(v[0]), v[1]] for k, v in self.parts.items()}, "folded": dict(self.folded)}  # fmt: skip
        return json.dumps(body, separators=(",", ":"))


def origin_of(config: AdapterConfig, kind: str, faces: str, one_scale: bool = False) -> Origin:
    """An adapter that no conversion has touched, as an origin."""
    return Origin(kind, faces, one_scale, {name: config.raw[name] for name in FIELDS if name in config.raw})


def read_stamp(metadata: Mapping[str, str]) -> Stamp:
    """The stamp in a header's metadata; an empty one where there is none that can be read."""
    try:
        body = json.loads(metadata[KEY])
        made = body["origin"]
        origin = Origin(made["kind"], made["faces"], made["one_scale"], made["fields"]) if made else None
        parts = {k: (tuple(_place(p) for p in v[0]), int(v[1])) for k, v in body["parts"].items()}
        folded = {k: float(v) for k, v in body["folded"].items()}
        return Stamp(str(body["format"]), origin, parts, folded)
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return Stamp()


def _place(value: Sequence[Any]) -> Place:
    labels, at, count = value
    return tuple(int(i) for i in labels), int(at), int(count)
