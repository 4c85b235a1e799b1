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
from restow.entries import FLOATS
from restow.errors import AdapterError, RestowError, show
from restow.segments import ends

OTHERWISE = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
)
_LAYER = (
    r".*?\.[^.]*\.(\d{1,9})\."  # the first number: PEFT 0.21.2, tuners_utils.py, check_target_module_exists
)


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
    weights = config.names("target_parameters")  # to which neither field applies
    modules = [m for m in by_name.pairs if not any(ends(f"{m}.weight", t) for t in weights)]
    only, named = _layers(config), config.names("target_modules")
    if only is not None and not isinstance(config.raw.get("target_modules"), str):
        patterns = _patterns(config)
        over = [m for m in modules if m not in named and _layer(m, patterns) not in only]
        errors += _left_out(config, "layers_to_transform", over)
    if isinstance(config.raw.get("exclude_modules"), list):
        out = config.names("exclude_modules")
        errors += _left_out(config, "exclude_modules", (m for m in modules if any(ends(m, x) for x in out)))
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


def _patterns(config: AdapterConfig) -> list[str]:
    """Where PEFT looks for a layer's number: behind these names, or the first. Raises `AdapterError` for expressions."""
    names = config.names("layers_pattern") if config.raw.get("layers_pattern") else ()
    odd = next((name for name in names if not re.fullmatch(r"[A-Za-z0-9_.-]+", name)), None)
    if odd is not None:
        hint = "regular expressions of an adapter are never run"
        raise AdapterError("layers_pattern as names of modules", show(repr(odd)), path=config.path, hint=hint)
    return [rf"(?:^|.*?\.){re.escape(name)}\.(\d{{1,9}})\." for name in names] or [_LAYER]


def _layer(module: str, patterns: Iterable[str]) -> int | None:
    """The number of a module's layer; None where it has none, which PEFT then leaves out too."""
    found = (re.match(pattern, module) for pattern in patterns)
    return next((int(match[1]) for match in found if match), None)


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
