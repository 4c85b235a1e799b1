"""A config.json for other numbers of experts: every key of the family's that counts them.

Rejected are configs that do not say the number, modules that keep different numbers, and routing that the experts which
are left cannot do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from restow.checkpoint import Checkpoint
from restow.errors import ConfigError, UsageError
from restow.landing import Wish, chosen_experts

PER_TOKEN = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k",
    "top_k_experts", "num_selected_experts",
)  # fmt: skip


def mended(opened: Checkpoint, wish: Wish, config: bytes | None) -> bytes:
    """config.json with the number of experts that was kept. Raises where a config cannot say it."""
    if config is None or opened.family is None:
        raise ConfigError("a config.json whose number of experts can be mended", "none", path=opened.path)
    kept = {
        len(chosen_experts(wish.experts, path, module.sizes["e"]) or range(module.sizes["e"]))
        for path, module in opened.modules.items()
    }
    if len(kept) != 1:
        raise UsageError(
            "as many experts in every module, since the config has one number", f"{sorted(kept)}"
        )
    body = json.loads(config)
    (count,) = kept
    changed = [
        path
        for line in opened.family.sizes
        if line.key == "e"
        for path in _set_sizes(body, line.terms, count)
    ]
    if not changed:
        raise ConfigError("the number of experts in config.json", "none", path=opened.path)
    for part in _parts(body):
        _judge_routing(part, count)
    return (json.dumps(body, indent=2) + "\n").encode()


def _parts(body: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A config and the objects in it."""
    yield body
    for value in body.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _judge_routing(part: Mapping[str, Any], count: int) -> None:
    """Raise where a token cannot be given its experts any more."""
    for key in PER_TOKEN:
        if isinstance(part.get(key), int) and part[key] > count:
            raise UsageError(f"at least {part[key]} experts, as many as each token takes ({key})", f"{count}")
    groups = part.get("n_group")
    if isinstance(groups, int) and groups > 0 and count % groups:
        raise UsageError(f"a number of experts that {groups} groups (n_group) divide", f"{count}")


def _set_sizes(body: dict[str, Any], terms: Sequence[str], count: int) -> list[str]:
    changed = []
    for path in (path for term in terms for path in term.split("|")):
        for start in (body, body.get("text_config")):
            *above, last = path.split(".")
            part: Any = start
            for word in above:
                part = part.get(word) if isinstance(part, dict) else None
            if isinstance(part, dict) and isinstance(part.get(last), int):
                part[last] = count
                changed.append(path)
    return changed
