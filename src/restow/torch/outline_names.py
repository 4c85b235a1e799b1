"""What a state's tensors are called in the files of a save: renames the other way round, then the hub's own names.

Of several names of one memory one is written, any other before the head's. Rejected are names for which `rename` has
no place.
"""

from __future__ import annotations

from collections.abc import Mapping

from restow.errors import UsageError, show
from restow.family import Family
from restow.module import Module
from restow.naming import Rename, renamed


def backwards(rename: Rename) -> Rename:
    """Renames from the destination's names to the source's."""
    if isinstance(rename, Mapping):
        turned: dict[str, str | None] = {}
        for old, new in rename.items():
            if new is not None:  # several names of one destination: experts, whose names the layout spells
                turned.setdefault(new, old)
        return turned
    return tuple((new, old) for old, new in rename)


def outer_name(name: str, family: Family | None, back: Rename) -> str:
    """A tensor's name in the files. Raises `UsageError` where the renames have none."""
    outer = renamed(name, back)
    if outer is None:
        raise UsageError(f"a name in the files for {show(name)}", "none in rename=")
    return family.on_hub(outer) if family is not None else outer


def outer_path(module: Module, family: Family | None, back: Rename) -> str:
    """Where the experts of a module lie in the files."""
    if not isinstance(back, Mapping):
        return outer_name(module.path, None, back)
    name = outer_name(
        next(n for names in module.tensors.values() for n in names if n is not None), None, back
    )
    before, gap, _ = name.partition("..")  # where the table has an expert's number, a stack has none
    if gap:
        return before
    known = sorted((c for line in family.containers for c in line) if family else (), key=len, reverse=True)
    found = next((c for c in known if f".{c}." in f".{name}"), None)
    return name[: f".{name}".index(f".{found}.") + len(found)] if found else name.rpartition(".")[0]


def said_once(
    tied: Mapping[str, str], family: Family | None, config: Mapping[str, object] | None
) -> set[str]:
    """The names of tied tensors that are not written: all but one a memory, the head's first of all.

    Where a config says that its model does not tie them, a reader wants both: then the head is written too.
    """
    heads = (
        {family.canonical(p.lstrip("?")) for p in family.required if p.startswith("?")} if family else set()
    )
    groups: dict[str, list[str]] = {}
    for name, first in tied.items():
        groups.setdefault(first, [first]).append(name)
    out: set[str] = set()
    for names in groups.values():
        head = {name for name in names if family is not None and family.canonical(name) in heads}
        kept = next((name for name in names if name not in head), names[0])
        apart = head if config is not None and family is not None and not family.ties(config) else set()
        out |= set(names) - {kept} - apart
    return out
