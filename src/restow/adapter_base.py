"""What an adapter is for: the base model's family, sizes, experts modules and weights, asked by the adapter's names.

An adapter names modules as PEFT met them, in the hub's spelling or transformers' runtime's; `Base` answers to both. It
is made from a checkpoint, from a folder that holds a config alone, or from a family by name; the less is known, the
less is checked. Rejects modules and experts that the base lacks (`AdapterError`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from restow.checkpoint import Checkpoint
from restow.configfile import read_config
from restow.errors import AdapterError, UnsupportedFamilyError, show
from restow.family import Family
from restow.known import FAMILIES
from restow.layout import shape_of
from restow.module import Module
from restow.opening import family_of, open_checkpoint
from restow.problems import merged
from restow.segments import ends

BaseLike = str | os.PathLike[str] | Checkpoint


@dataclass(frozen=True)
class Base:
    """A base model. `checkpoint` is None where only a config or a family's name is known."""

    family: Family
    sizes: Mapping[str, int]
    checkpoint: Checkpoint | None = None
    path: str | None = None

    @cached_property
    def _modules(self) -> Mapping[tuple[str, int], Module]:
        found = self.checkpoint.modules if self.checkpoint is not None else {}
        return {self.family.place(path): module for path, module in found.items()}

    @cached_property
    def _weights(self) -> Mapping[str, str]:
        names = self.checkpoint.others if self.checkpoint is not None else ()
        return {self.family.canonical(name): name for name in names}

    @cached_property
    def _by_end(self) -> Mapping[str, tuple[str, ...]]:
        """Canonical name without its first segments -> names: prefixes such as `language_model.` come and go."""
        found: dict[str, list[str]] = {}
        for canonical in self._weights:
            parts = canonical.split(".")
            for i in range(len(parts)):
                found.setdefault(".".join(parts[i:]), []).append(canonical)
        return {end: tuple(names) for end, names in found.items()}

    def experts(self, path: str) -> Module | None:
        """The base's experts module that an adapter's path means; None where modules are not known.

        Raises `AdapterError` where they are known and this is none of them.
        """
        if self.checkpoint is None:
            return None
        layer, which = self.family.place(path)
        if (layer, which) in self._modules:
            return self._modules[layer, which]
        near = [m for (other, i), m in self._modules.items()
                if i == which and (ends(other, layer) or ends(layer, other))]  # fmt: skip
        if len(near) != 1:
            raise AdapterError(
                "an adapter for experts that the base has",
                f"{show(path)}, which it lacks",
                path=self.path,
                tensor=path,
                sections=[("module", [show(path)])],
                hint="this adapter was trained on another model, or with more layers",
            )
        return near[0]

    def weight(self, name: str) -> str | None:
        """The base's tensor that a module's weight means (`...q_proj.weight`); None where tensors are not known.

        Raises `AdapterError` where they are known and there is none.
        """
        if self.checkpoint is None:
            return None
        canonical = self.family.canonical(name)
        if canonical in self._weights:
            return self._weights[canonical]
        near = self._by_end.get(canonical, ())
        parts = canonical.split(".")
        for i in range(1, len(parts) - 3):
            if near:
                break
            end = ".".join(parts[i:])
            near = tuple(n for n in [end] if n in self._weights)
        if len(near) != 1:
            raise AdapterError(
                "adapters for modules that the base has",
                f"{show(name.rpartition('.')[0])}, which it lacks",
                path=self.path,
                tensor=name,
                sections=[("module", [show(name.rpartition(".")[0])])],
                hint="this adapter was trained on another model, or with more layers",
            )
        return self._weights[near[0]]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a weight outside the experts, by the adapter's name for it."""
        found = self.weight(name)
        return None if found is None or self.checkpoint is None else self.checkpoint.tensors[found].shape

    def is_linear(self, name: str) -> bool:
        """Whether a tensor of the base is the weight of something like an nn.Linear."""
        return self.checkpoint is not None and len(self.checkpoint.tensors[name].shape) == 2

    @cached_property
    def canonical_weights(self) -> tuple[str, ...]:
        """Every weight outside the experts, in the runtime's spelling."""
        return tuple(self._weights)

    def expert_shape(self, role: str) -> tuple[int, ...]:
        """The shape of the runtime's stacked parameter."""
        return shape_of(self.family.form("fused").row(role), {"p": len(self.family.labels), **self.sizes})


def base_of(base: BaseLike | Base | None, family: str | Family | None, hint: object = None) -> Base:
    """A base from a checkpoint, its folder, a folder with a config alone, or a family. `hint`: where the adapter says
    that its base is, taken if it is a folder here. Raises `AdapterError` where nothing says the family.
    """
    if isinstance(base, Base):
        return base
    known = family_of(family)
    if base is None and isinstance(hint, str) and (Path(hint) / "config.json").is_file():
        base = hint
    if base is None:
        if known is None:
            said = f"{show(hint)}, which is no folder here" if isinstance(hint, str) and hint else "none"
            raise AdapterError(
                "a base model, which says the family and the sizes",
                said,
                hint="say base= (--base), a folder with at least config.json, or family= (--family)",
            )
        return Base(known, {"p": len(known.labels)})
    if not isinstance(base, Checkpoint):
        folder = Path(base)
        if folder.is_dir() and (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
            return _from_config(str(folder), known)
        base = open_checkpoint(base, family=known)
    family_ = known or base.family
    if family_ is None:
        if fatal := [problem.error for problem in base.problems if problem.fatal]:
            raise merged(fatal)
        hint = "say family= (--family) if it stores its experts as a known one does"
        raise UnsupportedFamilyError(
            "a base of a family that restow knows", "another", path=base.path, hint=hint
        )
    return Base(family_, {"p": len(family_.labels), **base.sizes}, base, base.path)


def _from_config(folder: str, known: Family | None) -> Base:
    config = read_config(folder) or {}
    text = config.get("text_config")
    kinds = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    family = known or next((FAMILIES[k] for k in kinds if isinstance(k, str) and k in FAMILIES), None)
    if family is None:
        raise UnsupportedFamilyError(
            "a base of a family that restow knows",
            show(repr(kinds[0])),
            path=folder,
            hint="say family= (--family) if it stores its experts as a known one does",
        )
    return Base(family, {"p": len(family.labels), **family.read_sizes(config)}, None, folder)
