"""An adapter's tensors against what its config leaves out, and against dtypes and shapes that they cannot have.

Rejected, by name: pairs of layers or modules that the config excludes, which PEFT would drop without a word; whole
tensors of another shape than the base's; factors that are no floats; variants of LoRA whose delta is not scale * B @ A.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from restow.adapter_base import Base
from restow.adapter_config import AGAIN, AdapterConfig
from restow.adapter_keys import PREFIX, Sorted
from restow.errors import AdapterError, RestowError, show

FLOATS = ("F64", "F32", "F16", "BF16")
OTHERWISE = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
_LAYER = re.compile(r".*\.(\d+)\.")  # PEFT 0.21.2, tuners_utils.py, check_target_module_exists


def judge_factors(dtypes: Mapping[str, str], path: object = None) -> None:
    """Raise `AdapterError` for a factor of integers or of 8 bits: nobody multiplies those."""
    wrong = [name for name, dtype in dtypes.items() if "lora_" in name and dtype not in FLOATS]
    if wrong:
        raise AdapterError(
            f"factors in {', '.join(sorted(FLOATS))}",
            dtypes[wrong[0]],
            path=path,
            tensor=wrong[0],
            sections=[("tensors", (f"{show(name)} {dtypes[name]}" for name in wrong))],
            hint="save the adapter again in one of these dtypes",
        )


def judge_delta(config: AdapterConfig, whose: str, hint: str) -> None:
    """Raise `AdapterError` for a variant that adds something else than scale * B @ A."""
    for word in OTHERWISE:
        value = config.raw.get(word)
        if value:
            wanted, found = ("false", "true") if value is True else ("null", show(repr(value)))
            raise AdapterError(f"{word} {wanted}{whose}", found, path=config.path, hint=hint)


def judge_scope(
    by_name: Sorted, shapes: Mapping[str, tuple[int, ...]], config: AdapterConfig, base: Base
) -> list[RestowError]:
    """What is there and left out by the config, or cannot take the place of the base's tensor."""
    errors: list[RestowError] = []
    if config.raw.get("layer_replication"):
        errors.append(
            AdapterError(
                "an adapter for the base's own layers", f"layer_replication {show(config.raw['layer_replication'])}",
                path=config.path, hint="PEFT repeats layers of the base first: merge it with PEFT",
            )
        )  # fmt: skip
    only = _layers(config)
    if only is not None and not isinstance(config.raw.get("target_modules"), str):
        found = {module: _LAYER.match(module) for module in by_name.pairs}
        errors += _left_out(
            config, "layers_to_transform", (m for m, n in found.items() if n and int(n[1]) not in only)
        )
    if isinstance(config.raw.get("exclude_modules"), list):
        ends = config.names("exclude_modules")
        over = (m for m in by_name.pairs if any(m == end or m.endswith(f".{end}") for end in ends))
        errors += _left_out(config, "exclude_modules", over)
    for name in by_name.others:
        canonical = base.family.canonical(name.removeprefix(PREFIX))
        want = base.shape(canonical) if canonical in base.canonical_weights else None
        if want is not None and want != shapes[name]:
            errors.append(
                AdapterError(
                    f"shape {list(want)} for {show(name)}, which takes the place of the base's",
                    f"{list(shapes[name])}", path=config.path, tensor=name,
                    hint="this adapter was trained on a base of other sizes",
                )
            )  # fmt: skip
    return errors


def _layers(config: AdapterConfig) -> set[int] | None:
    """The layers that the config adapts; None for all. Raises `AdapterError` for what is no list of numbers."""
    said = config.raw.get("layers_to_transform")
    listed = [said] if isinstance(said, int) else said
    if not listed and listed != 0:
        return None
    if not isinstance(listed, list) or any(isinstance(n, bool) or not isinstance(n, int) for n in listed):
        raise AdapterError(
            "layers_to_transform as numbers of layers", show(repr(said)), path=config.path, hint=AGAIN
        )
    return set(listed)


def _left_out(config: AdapterConfig, field: str, modules: Iterable[str]) -> list[RestowError]:
    names = list(modules)
    if not names:
        return []
    return [
        AdapterError(
            f"pairs of modules that {field} does not leave out",
            f"{len(names)} that it does",
            path=config.path,
            tensor=names[0],
            sections=[("modules", map(show, names))],
            hint=f"PEFT would drop them without a word: correct {field} in the config, or the file is another adapter's",
        )
    ]
