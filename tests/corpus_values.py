"""The corpus's cases that names, dtypes and shapes do not show: bytes that changed, and values that cannot be meant.

`HIDDEN` ones are good checkpoints with other values: only a digest or another copy tells. `ODD` ones tell themselves.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import Builder, case
from corpus_bytes import CONFIG, E7, EXPERTS, S2, Shards, Tensor, good, split, write
from restow import errors
from restow.errors import RestowError

HIDDEN: dict[str, tuple[str, ...]] = {}  # what `verify` must name
ODD: dict[str, tuple[type[RestowError], tuple[str, ...]]] = {}


def hidden(*holds: str) -> Callable[[Builder], Builder]:
    """A case that `open` accepts: the good checkpoint is there before the builder damages it."""

    def register(build: Builder) -> Builder:
        def whole(root: Path) -> None:
            write(root, good())
            build(root)

        whole.__name__ = build.__name__
        HIDDEN[build.__name__] = holds
        return case(None)(whole)

    return register


def odd(*holds: str, error: type[RestowError]) -> Callable[[Callable[[Shards], Any]], Builder]:
    """A case that is told and not refused."""

    def register(change: Callable[[Shards], Any]) -> Builder:
        def build(root: Path) -> None:
            shards = good()
            config = change(shards)
            write(root, shards, config=config or CONFIG)

        build.__name__ = change.__name__
        ODD[change.__name__] = (error, holds)
        return case(None)(build)

    return register


@hidden(S2)
def F12_zero_tail(root: Path) -> None:
    data = (root / S2).read_bytes()
    (root / S2).write_bytes(data[:-2048] + bytes(2048))


@hidden(S2)
def F13_bit_flip(root: Path) -> None:
    text, _ = split(root / S2)
    data = bytearray((root / S2).read_bytes())
    data[8 + len(text) + 5001] ^= 4
    (root / S2).write_bytes(data)


def _swap(root: Path, name: Callable[[str], str]) -> None:
    shards = good()
    old = dict(shards[S2])
    for key in [key for key in old if key.startswith(EXPERTS)]:
        shards[S2][key] = old[name(key)]
    write(root, shards)


@hidden(f"{EXPERTS}.2.gate_proj.weight", "text order")
def T12_text_order(root: Path) -> None:
    order = sorted(range(12), key=str)

    def name(key: str) -> str:
        number = int(key.split(".")[5])
        return key.replace(f"experts.{number}.", f"experts.{order[number]}.")

    _swap(root, name)


@hidden(E7, "gate and up exchanged")
def T13_gate_up_swapped(root: Path) -> None:
    pair = {E7: E7.replace("gate", "up"), E7.replace("gate", "up"): E7}
    _swap(root, lambda key: pair.get(key, key))


@odd("model.layers.1.flags", "2 other bytes", error=errors.TensorValueError)
def F34_bool_byte_2(shards: Shards) -> None:
    for shard, layer in zip(shards.values(), (0, 1), strict=False):
        shard[f"model.layers.{layer}.flags"] = Tensor("BOOL", (4,), b"\0\1\2\xff" if layer else b"\0\1\1\0")


@odd(E7, "NaN", error=errors.NonFiniteError)
def T10_nan(shards: Shards) -> None:
    data = shards[S2][E7].data
    shards[S2][E7] = shards[S2][E7]._replace(data=data[:10] + struct.pack("<f", float("nan"))[2:] + data[12:])


@odd(E7, error=errors.SuspiciousTensorError)
def T11_zero_expert(shards: Shards) -> None:
    shards[S2][E7] = shards[S2][E7]._replace(data=bytes(len(shards[S2][E7].data)))


@odd("lm_head.weight", "model.embed_tokens.weight", error=errors.AmbiguousTensorError)
def T23_tied_but_different(shards: Shards) -> dict[str, Any]:
    return {**CONFIG, "tie_word_embeddings": True}
