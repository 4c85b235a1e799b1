"""What a checkpoint lacks, or has too much of, against its config and its family: from names, shapes, dtypes.

`find` judges each experts module by itself; this looks at the whole: required names and the head
(`required`), routers and layers (`layers`), shapes outside the experts, dtypes. It reads no data, knows no
model, and rejects nothing: every finding is a `Problem`, and one cause makes one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping

from restow.checkpoint import Checkpoint
from restow.codec import SUFFIX, announced
from restow.codecs import CODES, COMPANIONS
from restow.entries import FLOATS
from restow.errors import (
    DtypeMismatchError,
    MissingTensorError,
    QuantizationError,
    RestowError,
    ShapeMismatchError,
    UnexpectedTensorError,
    show,
)
from restow.family import Family
from restow.layers import LayerFindings, judge_layers
from restow.problems import Problem
from restow.quantized import judge_quantized
from restow.required import judge_required, there


def judge(found: Checkpoint, dtypes: Mapping[str, str]) -> tuple[Problem, ...]:
    """Every finding about `found` as a whole checkpoint; `dtypes` by name, as the files spell them."""
    problems = [*_dtypes(found, dtypes), *judge_quantized(found, dtypes)]
    family = found.family
    if family is None:
        return tuple(problems)
    if not found.modules:
        if not any(problem.fatal for problem in found.problems):
            problems.append(Problem(_no_experts(found, family), True))
        return tuple(problems)
    layers = judge_layers(found, family)
    problems += layers.problems
    problems += judge_required(found, family)
    problems += _shapes(found, family, layers)
    return tuple(problems)


def undecodable(found: Checkpoint) -> list[RestowError]:
    """The fatal findings that leave coded weights without values: about codes and scales, or what announces them."""
    fatal = [problem.error for problem in found.problems if problem.fatal]
    if found.codec is None and found.config is not None and announced(found.config) is not None:
        return fatal
    return [error for error in fatal if isinstance(error, QuantizationError)]


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


def _shapes(found: Checkpoint, family: Family, layers: LayerFindings) -> Iterator[Problem]:
    """Embedding, final norm, head and routers against the sizes, unless the experts have told it already."""
    told = {type(problem.error) for problem in found.problems if problem.fatal}
    if ShapeMismatchError in told:
        return
    width = found.sizes.get("h", found.sizes.get("d"))
    wrong = [] if told & {MissingTensorError, UnexpectedTensorError} else list(layers.wrong)
    plain = found.config is not None and announced(found.config) is None
    for name in family.required:
        held = there(found, family, name.lstrip("?"))
        if held is None or width is None:
            continue
        shape = found.tensors[held].shape
        matrix = "norm" not in name.rpartition(".")[0].rpartition(".")[2]
        if matrix and plain and (len(shape) != 2 or shape[1] != width):
            wrong.append((held, f"[vocabulary, {width}]"))
        elif not matrix and shape not in _norms(width):
            wrong.append((held, f"[{width}]"))
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


def _norms(width: int) -> Collection[tuple[int, ...]]:
    """The shapes of a final norm: some models norm several streams at once."""
    return [(n * width,) for n in range(1, 17)]


def _dtypes(found: Checkpoint, dtypes: Mapping[str, str]) -> Iterator[Problem]:
    """Experts in integers or 8-bit floats that nothing announces, and modules that mix dtypes."""
    plain = found.config is not None and announced(found.config) is None
    coded: list[tuple[str, str]] = []
    mixed: list[tuple[str, str, str]] = []
    for module in found.modules.values():
        for role, tensors in module.tensors.items():
            kinds = Counter(dtypes[name] for name in tensors if name is not None)
            if role.endswith((*COMPANIONS, CODES)) or (
                len(kinds) == 1 and (not plain or kinds.keys() <= set(FLOATS))
            ):
                continue
            usual = max(kinds, key=lambda kind: (kinds[kind], kind in FLOATS, kind), default="")
            for name in tensors:
                dtype = dtypes[name] if name is not None else usual
                if name is not None and plain and dtype not in FLOATS:
                    coded.append((name, dtype))
                elif name is not None and dtype != usual and found.codec is None:
                    mixed.append((name, dtype, usual))
    if coded:
        scaled = any(name + SUFFIX in found.tensors for name, _ in coded)
        kind: type[RestowError] = QuantizationError if scaled else DtypeMismatchError
        error = kind(
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
            hint="get the file again if this is no choice of who wrote it; the values are read as they are",
        )
        yield Problem(error, False)
