"""The families by model type, parsed when they are first asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

from restow.catalog import TABLES
from restow.family import Family, parse_family


class Families(Mapping[str, Family]):
    """Model type -> `Family`. Reads the catalogue once, at the first question."""

    @cached_property
    def _by_type(self) -> dict[str, Family]:
        return {name: family for family in map(parse_family, TABLES) for name in family.model_types}

    def __getitem__(self, model_type: str) -> Family:
        return self._by_type[model_type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_type)

    def __len__(self) -> int:
        return len(self._by_type)

    def __repr__(self) -> str:
        return f"<{len(self)} model types>"


FAMILIES = Families()
