"""The wording of what is wrong with the tensors of an adapter: its experts, ranks and shapes.

Every text is made of names, shapes and what the config and the base say; `path` is where the adapter lies. Nothing is
decided here, and nothing rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from restow.adapter_config import Number
from restow.adapter_keys import module_of
from restow.errors import AdapterError, show
from restow.module import Shapes


def no_expert(path: object, name: str, number: int, limit: int) -> AdapterError:
    """An expert past the base's last one."""
    return AdapterError(
        f"adapters for experts 0 to {limit - 1}, which the base has",
        f"expert {number} in {show(name)}",
        path=path,
        tensor=name,
        hint="this adapter was trained on a base with more experts",
    )


def exchanged(path: object, shapes: Shapes, a: str, b: str) -> AdapterError:
    """Factors under each other's names."""
    return AdapterError(
        f"lora_A [rank, in] and lora_B [out, rank] of {show(module_of(a))}",
        f"the two exchanged: {list(shapes[a])} and {list(shapes[b])}",
        path=path,
        tensor=a,
        sections=[("tensors", [show(a), show(b)])],
        hint="exchange the names in the program that wrote this adapter",
    )


def other_rank(
    path: object, shapes: Shapes, module: str, names: Sequence[str], rank: int, found: int
) -> AdapterError:
    """Factors of another rank than the config's; `names` are A and B."""
    return AdapterError(
        f"rank {rank} for {show(module)}, as the config says",
        f"tensors of rank {found}",
        path=path,
        tensor=names[0],
        sections=[("tensors", (f"{show(n)} {list(shapes[n])}" for n in names))],
        hint="the scale is alpha / r: correct r or rank_pattern in the config, or the file is another adapter's",
    )


def other_shape(path: object, shapes: Shapes, module: str, name: str, want: Sequence[object]) -> AdapterError:
    """A factor of another shape than the base's sizes and the rank give."""
    return AdapterError(
        f"shape [{', '.join(map(str, want))}] for {show(name)}, which the base gives",
        f"{list(shapes[name])}",
        path=path,
        tensor=name,
        sections=[("tensor", [show(name)]), ("module", [show(module)])],
        hint="this adapter was trained on a base of other sizes",
    )


def two_scales(path: object, module: str, said: Mapping[tuple[int, Number], str]) -> AdapterError:
    """Experts of one module whose ranks or alphas differ: (rank, alpha) -> the first that has it."""
    return AdapterError(
        f"one rank and alpha for all experts of {show(module)}",
        ", ".join(f"{show(name)}: r {r}, alpha {a}" for (r, a), name in list(said.items())[:3]),
        path=path,
        hint="give the patterns for all experts at once",
    )


def other_family(path: object, wanted: str, found: str) -> AdapterError:
    """An adapter that PEFT says was trained on another family."""
    return AdapterError(
        f"an adapter for the base's family, {wanted}",
        f"one that was trained on {found} (auto_mapping)",
        path=path,
        hint="choose the base that it was trained on; remove auto_mapping from the config if it is wrong",
    )
