"""Names that a whole checkpoint must hold: embedding, final norm, and the head unless the config ties it.

A head is wanted under the family's own name. Where all names lack the outer modules' part it is an export of
the model without its head, which is told and not refused. It rejects nothing: its findings are `Problem`s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from restow.checkpoint import Checkpoint
from restow.errors import AmbiguousTensorError, MissingTensorError, show
from restow.family import Family
from restow.problems import Problem

FETCH = "get the checkpoint again, with every file that its index names"


def there(found: Checkpoint, family: Family, name: str) -> str | None:
    """A required name as this checkpoint has it, on the hub's path or the runtime's."""
    canonical = family.canonical(name)
    held = next((n for n in (name, canonical) if n in found.tensors), None)
    if held is None and family.aliases:
        held = next((n for n in found.others if family.canonical(n) == canonical), None)
    return held


def judge_required(found: Checkpoint, family: Family) -> Iterator[Problem]:
    """Names that a whole checkpoint must hold: missing ones, and the head against the config's tie."""
    needed = [name for name in family.required if not name.startswith("?")]
    heads = [name.lstrip("?") for name in family.required if name.startswith("?")]
    lost = [name for name in needed if there(found, family, name) is None]
    bare = _without_prefix(found, needed) if len(lost) == len(needed) else []
    if bare:
        yield Problem(_headless_error(family, lost, bare), False)
        return
    if lost:
        ends = tuple("." + name.partition(".")[2] for name in lost)
        near = [name for name in found.others if name.endswith(ends)]
        yield Problem(
            MissingTensorError(
                f"the tensors that every {family.model_types[0]} checkpoint holds",
                f"{len(lost)} of {len(needed)} missing",
                path=found.path,
                tensor=lost[0],
                sections=[("missing", map(show, lost)), ("there are", map(show, near[:3]))],
                hint="if these stand under other names, load them with rename=" if near else FETCH,
            ),
            True,
        )
    if found.config is None:
        return
    tied = family.ties(found.config)
    for head in heads:
        held = there(found, family, head)
        if held is None and not tied:
            yield Problem(_head_error(found, family, head), True)
        elif held is not None and tied:
            yield from _tied(found, held, there(found, family, needed[0]))


def tied_pair(found: Checkpoint) -> tuple[str, str] | None:
    """A head and the embedding that the config ties it to, where both are there and could hold the same values."""
    family = found.family
    if family is None or found.config is None or not family.ties(found.config):
        return None
    names = [name.lstrip("?") for name in family.required]
    head = next((there(found, family, n) for n in names if f"?{n}" in family.required), None)
    embedding = there(found, family, names[0])
    if head is None or embedding is None or head == embedding:
        return None
    kinds = {(found.tensors[name].dtype, found.tensors[name].shape) for name in (head, embedding)}
    return (head, embedding) if len(kinds) == 1 else None


def _without_prefix(found: Checkpoint, needed: Sequence[str]) -> list[str]:
    """The needed names as an export without its outer modules has them; empty if it is none."""
    for cut in range(1, needed[0].count(".")):
        bare = [".".join(name.split(".")[cut:]) for name in needed]
        if all(name in found.tensors for name in bare):
            return bare
    return []


def _headless_error(family: Family, lost: Sequence[str], bare: Sequence[str]) -> MissingTensorError:
    prefix = lost[0].removesuffix(bare[0])
    return MissingTensorError(
        f"names that begin with {prefix} in a whole {family.model_types[0]} model",
        "none: an export without its head",
        tensor=lost[-1],
        sections=[("missing", map(show, lost)), ("found", map(show, bare))],
        hint="a model without a head loads them as they are; for a whole one say rename=",
    )


def _head_error(found: Checkpoint, family: Family, head: str) -> MissingTensorError:
    why = f"since {family.tie} does not tie it" if family.tie else "since this family never ties it"
    return MissingTensorError(
        f"{show(head)}, {why} to the embedding",
        "none",
        path=found.path,
        tensor=head,
        sections=[("missing", [show(head)])],
        hint="get the checkpoint again" + (f", or correct {family.tie} in config.json" if family.tie else ""),
    )


def _tied(found: Checkpoint, head: str, embedding: str | None) -> Iterator[Problem]:
    """A head beside the embedding that the config ties it to: told where it cannot be the same tensor."""
    if embedding is None:
        return
    both = [(name, found.tensors[name]) for name in (head, embedding)]
    if len({(entry.dtype, entry.shape) for _, entry in both}) == 1:
        return  # whether the values are the same, only the data say
    error = AmbiguousTensorError(
        "one tensor for head and embedding, since the config ties them",
        "two that differ",
        tensor=head,
        sections=[("tensors", (f"{show(name)} {e.dtype} {list(e.shape)}" for name, e in both))],
        hint="correct tie_word_embeddings in config.json, or drop the head",
    )
    yield Problem(error, False)
