"""What a checkpoint lacks, or has too much of, against its config and its family: findings, from names and shapes.

`find` judges each experts module by itself; this looks at the whole: required names, the head and its tie, routers,
layers that differ from their like, the number of layers, dtypes. It reads no data, knows no model, and rejects
nothing: every finding is a `Problem`, and one cause makes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from restow.checkpoint import Checkpoint
from restow.errors import (
    AmbiguousTensorError,
    DtypeMismatchError,
    MissingTensorError,
    ShapeMismatchError,
    UnexpectedTensorError,
    show,
)
from restow.family import Family
from restow.layers import LayerFindings, judge_layers
from restow.problems import Problem

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
QUANTISED = ("quantization_config", "compression_config")
FETCH = "get the checkpoint again, with every file that its index names"


def judge(found: Checkpoint, dtypes: Mapping[str, str]) -> tuple[Problem, ...]:
    """Every finding about `found` as a whole checkpoint; `dtypes` gives each tensor's, as its file spells it."""
    problems = list(_dtypes(found, dtypes))
    family = found.family
    if family is None:
        return tuple(problems)
    if not found.modules:
        if not any(problem.fatal for problem in found.problems):
            problems.append(Problem(_no_experts(found, family), True))
        return tuple(problems)
    layers = judge_layers(found, family)
    problems += layers.problems
    problems += _required(found, family)
    problems += _shapes(found, family, layers)
    return tuple(problems)


def _no_experts(found: Checkpoint, family: Family) -> MissingTensorError:
    hub = family.spellings[0]
    wanted = (f"{hub.container}.{''.join(map(str, row.name))}" for row in hub.layout.rows)
    near = [name for name in found.tensors if "expert" in name][:3]
    return MissingTensorError(
        f"the experts of a {family.model_types[0]} model",
        "none under its names",
        path=found.path,
        sections=[("wanted", wanted), ("there are", map(show, near))],
        hint="check model_type in config.json; if the files are another family's, say family= (--family)",
    )


def _there(found: Checkpoint, family: Family, name: str) -> str | None:
    """A required name as this checkpoint has it, on the hub's path or the runtime's."""
    return next((n for n in (name, family.canonical(name)) if n in found.tensors), None)


def _required(found: Checkpoint, family: Family) -> Iterator[Problem]:
    """Names that a whole checkpoint must hold: missing ones, and the head against the config's tie."""
    needed = [name for name in family.required if not name.startswith("?")]
    heads = [name.lstrip("?") for name in family.required if name.startswith("?")]
    lost = [name for name in needed if _there(found, family, name) is None]
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
        there = _there(found, family, head)
        if there is None and not tied:
            yield Problem(_head_error(found, family, head), True)
        elif there is not None and tied:
            yield from _tied(found, there, _there(found, family, needed[0]))


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
        f"names that begin with {prefix}, as a whole {family.model_types[0]} model has them",
        "names without it: an export without its head",
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
        hint=FETCH + (f", or correct {family.tie} in config.json" if family.tie else ""),
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


def _shapes(found: Checkpoint, family: Family, layers: LayerFindings) -> Iterator[Problem]:
    """Embedding, final norm, head and routers against the sizes, unless the experts have told that already."""
    told = {type(problem.error) for problem in found.problems if problem.fatal}
    if ShapeMismatchError in told:
        return
    width = found.sizes.get("h", found.sizes.get("d"))
    wrong = [] if told & {MissingTensorError, UnexpectedTensorError} else list(layers.wrong)
    plain = found.config is not None and not _quantised(found.config)
    for name in family.required:
        there = _there(found, family, name.lstrip("?"))
        if there is None or width is None:
            continue
        shape = found.tensors[there].shape
        matrix = "norm" not in name.rpartition(".")[0].rpartition(".")[2]
        if matrix and plain and (len(shape) != 2 or shape[1] != width):
            wrong.append((there, f"[vocabulary, {width}]"))
        elif not matrix and shape != (width,):
            wrong.append((there, f"[{width}]"))
    if wrong:
        name, expected = wrong[0]
        lines = (f"{show(n)} {list(found.tensors[n].shape)}, expected {want}" for n, want in wrong)
        error = ShapeMismatchError(
            f"shape {expected} for {show(name)}",
            f"{list(found.tensors[name].shape)}",
            tensor=name,
            sections=[("tensors", lines)],
            hint="check config.json against the files",
        )
        yield Problem(error, True)


def _quantised(config: Mapping[str, object]) -> bool:
    text = config.get("text_config")
    return any(key in part for part in (config, text) if isinstance(part, Mapping) for key in QUANTISED)


def _dtypes(found: Checkpoint, dtypes: Mapping[str, str]) -> Iterator[Problem]:
    """Experts in integers or 8-bit floats that nothing announces, and modules that mix dtypes."""
    plain = found.config is not None and not _quantised(found.config)
    coded: list[tuple[str, str]] = []
    mixed: list[tuple[str, str, str]] = []
    for module in found.modules.values():
        for role, tensors in module.tensors.items():
            kinds = Counter(dtypes[name] for name in tensors if name is not None)
            if "." in role or (len(kinds) == 1 and (not plain or FLOATS.issuperset(kinds))):
                continue
            usual = max(kinds, key=lambda kind: (kinds[kind], kind in FLOATS, kind), default="")
            for name in tensors:
                dtype = dtypes[name] if name is not None else usual
                if name is not None and plain and dtype not in FLOATS:
                    coded.append((name, dtype))
                elif name is not None and dtype != usual:
                    mixed.append((name, dtype, usual))
    if coded:
        error = DtypeMismatchError(
            f"experts in {', '.join(sorted(FLOATS))}, since config.json has no quantization_config",
            f"{coded[0][1]} in {len(coded)} tensors" if len(coded) > 1 else coded[0][1],
            tensor=coded[0][0],
            sections=[("tensors", (f"{show(name)} {dtype}" for name, dtype in coded))],
            hint="get the config.json that belongs to these files: without it nobody can decode them",
        )
        yield Problem(error, True)
    if mixed:
        name, dtype, usual = mixed[0]
        error = DtypeMismatchError(
            f"experts of one module in one dtype, {usual}",
            f"{dtype} in {len(mixed)} tensors" if len(mixed) > 1 else dtype,
            tensor=name,
            sections=[("tensors", (f"{show(n)} {other}, among {most}" for n, other, most in mixed))],
        )
        yield Problem(error, False)
