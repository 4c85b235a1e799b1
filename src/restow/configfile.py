"""A config.json as plain values; no code that it names is ever run.

Rejects what is not JSON, a name twice in one object, deep nesting and integers of more than 64 bits. What the
values must be is for those who ask for them. Infinity is let through: transformers writes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from restow import files
from restow.errors import ConfigError, show
from restow.jsontext import JsonFault, parse
from restow.limits import LIMITS, Limits

AGAIN = "get the config.json that belongs to these files"


def read_config(folder: str, name: str = "config.json", limits: Limits = LIMITS) -> Mapping[str, Any] | None:
    """The config in `folder`, None if there is none; `ConfigError` if it cannot be read as one."""
    path = Path(folder) / name
    if not path.exists() and not path.is_symlink():
        return None
    raw = files.read_all(path, limits.config, what="a JSON config", refuse=ConfigError)
    try:
        value = parse(raw, limits.depth, fraction=float, constant=float)
    except JsonFault as fault:
        raise ConfigError("a config of strict JSON", fault.found, path=path, hint=AGAIN) from None
    if not isinstance(value, dict):
        raise ConfigError(
            "a config that is a JSON object", f"a {type(value).__name__}", path=path, hint=AGAIN
        )
    _check_integers(value, path)
    return value


def _check_integers(value: dict[str, Any], path: Path) -> None:
    """Refuse integers that no size can be; the nesting is bounded, but the stack here is our own."""
    todo: list[tuple[str, Any]] = list(value.items())
    while todo:
        name, item = todo.pop()
        if isinstance(item, dict):
            todo += [(f"{name}.{key}", inner) for key, inner in item.items()]
        elif isinstance(item, list):
            todo += [(name, inner) for inner in item]
        elif isinstance(item, int) and not -(2**63) <= item < 2**63:
            digits = item.bit_length()
            found = f"one of {digits} bits at {show(name)}"
            raise ConfigError("integers of at most 64 bits", found, path=path, hint=AGAIN)
