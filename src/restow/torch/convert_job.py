"""What a conversion will write, decided before it begins: files, targets, side files, and what each is filled from.

It rejects words that contradict each other, experts that are not there, layouts in which two tensors have one name, and
sources or destinations of which a tensor is left over.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch

from restow.checkpoint import Checkpoint
from restow.codec import without_quantization
from restow.codecs import rounds
from restow.coded import value_dtype
from restow.decoded import CodedWeights
from restow.encodings import Encoding, plain_form
from restow.entries import FLOATS
from restow.errors import MissingTensorError, UnexpectedTensorError, UsageError, show
from restow.landing import Experts, Wish, check_modules, chosen_rows, layout_of
from restow.layout import Layout
from restow.mending import FLOATS as CASTS
from restow.mending import with_dtype, with_experts
from restow.outfiles import INDEX, OutFile, index_text, new_files, recorded_files
from restow.prepare import Prepared, prepare
from restow.quantized import refuse_cast
from restow.record import make_record, read_record
from restow.sidefiles import side_files
from restow.stated import statement
from restow.targets import Target, whole_target
from restow.torch.dtypes import dtype_name, narrows, wider
from restow.torch.encoded import Packing, encoded_config, encoded_targets, packing_of
from restow.wanted import default_targets, home_of


@dataclass(frozen=True)
class Job:
    """Everything a conversion will write, decided before it begins."""

    prepared: Prepared
    files: tuple[OutFile, ...]
    index: tuple[str, bytes] | None
    layout: str
    undo: Mapping[str, str]
    side: Mapping[str, bytes]
    left: tuple[str, ...]
    packing: Packing | None = None

    @property
    def written(self) -> Prepared:
        """The tensors of the files as they are."""
        return self.packing.written if self.packing is not None else self.prepared


def job_of(
    opened: Checkpoint,
    to: str | Layout,
    experts: Experts,
    dtype: torch.dtype | None,
    max_bytes: int,
    keep: bool,
    encoding: Encoding | None,
) -> Job:
    """Everything that a conversion of `opened` will write (see `restow.convert`); raises what may not be."""
    _judge_words(opened, to, dtype, max_bytes, keep, encoding)
    assert opened.path is not None
    side = side_files(opened.path, opened.stamps)
    sides = dict(side.files)
    if to == "source":
        if experts is not None or dtype is not None or encoding is not None:
            raise UsageError('to="source" alone', "experts=, dtype= or quantize= with it")
        return _undo(opened, sides, side.left)
    layout = layout_of(to, opened.family) if encoding is None else plain_form(to, opened.family, encoding)
    assert layout is not None
    _judge_experts(opened, experts)
    wish = Wish(
        layout=layout,
        family=opened.family,
        experts=experts,
        routers=experts is not None,
        places=frozenset(home_of(path, layout, opened.family) for path in opened.modules),
    )
    targets = list(_with_routers(opened, default_targets(opened, layout, wish, keep_quantized=keep), wish))
    _judge_names(targets)
    prepared = prepare(opened, targets, wish)
    prepared = dataclasses.replace(prepared, targets={t.name: _cast(prepared, t, dtype) for t in targets})
    _judge_cover(prepared)
    weights = prepared.source.coded
    decoded_from = sorted({c.name for c in weights.codecs}) if isinstance(weights, CodedWeights) else []
    sides = _mended(sides, opened, prepared.source if decoded_from else None, wish, dtype)
    specs = list(prepared.targets.values())
    if encoding is not None:
        sides["config.json"] = encoded_config(opened, sides.get("config.json"), encoding)
        specs = encoded_targets(opened, specs, layout, encoding, wish)
    metadata = {"format": "pt", **(statement(layout, opened.family) if encoding is None else {})}
    files = new_files(((t.name, t.dtype, t.shape) for t in specs), max_bytes, metadata)
    packing = None
    if encoding is not None:
        prepared, packing = packing_of(opened, files, sides["config.json"], layout, wish)
    why_not = (
        "experts were chosen" if experts is not None else "values were cast" if dtype is not None else ""
    )
    if decoded_from:
        why_not = f"values were decoded from {', '.join(decoded_from)}"
    if encoding is not None:
        why_not = f"values were encoded in {encoding.codec}"
    return Job(
        prepared=prepared,
        files=files,
        index=(INDEX, index_text(files)) if len(files) > 1 else None,
        layout=to if isinstance(to, str) else "the layout given",
        undo=make_record(opened, why_not),
        side=sides,
        left=side.left,
        packing=packing,
    )


def _judge_words(
    opened: Checkpoint,
    to: str | Layout,
    dtype: torch.dtype | None,
    max_bytes: int,
    keep: bool,
    encoding: Encoding | None,
) -> None:
    if opened.path is None or not opened.modules:
        raise UsageError("a checkpoint with experts", "none", path=opened.path)
    if not isinstance(to, str | Layout):
        raise UsageError("a layout's name, or a restow.Layout, as to=", type(to).__name__)
    if keep and dtype is not None:
        raise UsageError("keep_quantized=True alone", "dtype= with it: codes cannot be cast")
    if dtype is not None and str(dtype).removeprefix("torch.") not in CASTS:
        raise UsageError(
            f"dtype= as one of {', '.join(CASTS)}",
            str(dtype).removeprefix("torch."),
            hint="codes of fewer bits need scales: a cast gives none",
        )
    if keep and encoding is not None:
        raise UsageError("keep_quantized=True alone", "quantize= with it")
    if max_bytes < 1:
        raise UsageError("max_shard_bytes of at least 1", f"{max_bytes}")


def _mended(
    sides: Mapping[str, bytes],
    opened: Checkpoint,
    decoded: Checkpoint | None,
    wish: Wish,
    dtype: torch.dtype | None,
) -> dict[str, bytes]:
    """The side files, config.json without what is no longer so: codes that were `decoded`, a dtype, a number of experts."""
    found = dict(sides)
    if decoded is not None and "config.json" in found:
        for name in decoded.others:  # codes would lose their meaning: the new config announces none
            refuse_cast(decoded, name, value_dtype(opened.config))
        found["config.json"] = without_quantization(found["config.json"])
    if dtype is not None and "config.json" in found:
        found["config.json"] = with_dtype(found["config.json"], str(dtype).removeprefix("torch."))
    if wish.experts is not None:
        found["config.json"] = with_experts(opened, wish, found.get("config.json"))
    return found


def _undo(opened: Checkpoint, sides: Mapping[str, bytes], left: tuple[str, ...]) -> Job:
    record = read_record(opened)
    assert opened.path is not None
    files = recorded_files(record.heads, opened.path)
    targets = [whole_target(t.name, t.shape, t.dtype) for file in files for t in file.tensors]
    layouts = set(record.layouts.values())
    wish = Wish(
        layout=next(iter(layouts)) if len(layouts) == 1 else None,
        family=opened.family,
        places=frozenset(record.layouts),
    )
    prepared = prepare(opened, targets, wish)
    _judge_cover(prepared)
    return Job(prepared, files, record.listing, "its source's layout", make_record(opened, ""), sides, left)


def _judge_experts(opened: Checkpoint, experts: Experts) -> None:
    check_modules(opened, experts)
    for numbers in experts.values() if isinstance(experts, Mapping) else [] if experts is None else [experts]:
        if isinstance(numbers, str) or not len(numbers):
            raise UsageError("the numbers of the experts to keep, at least one", f"{numbers!r}")


def _judge_names(targets: Iterable[Target]) -> None:
    """Raise where the layout gives a tensor a name that another one has."""
    twice = [name for name, count in Counter(target.name for target in targets).items() if count > 1]
    if twice:
        raise UsageError("a layout whose names are free", f"{show(twice[0])} twice", tensor=twice[0])


def _judge_cover(prepared: Prepared) -> None:
    """Every tensor of the destination is filled, and every one of the source has a place; raises for the first."""
    if prepared.missing:
        raise MissingTensorError(
            "every tensor of the destination in the source",
            f"{len(prepared.missing)} that it does not hold",
            path=prepared.source.path,
            tensor=prepared.missing[0],
            sections=[("missing", map(show, prepared.missing))],
            hint="nothing is filled in their place",
        )
    unused = (*prepared.left[0], *prepared.left[1])
    if unused:
        raise UnexpectedTensorError(
            "a place for every tensor of the source",
            f"{len(unused)} without one",
            path=prepared.source.path,
            tensor=unused[0],
            sections=[("unused", map(show, unused))],
            hint="a layout needs a row for every role of the experts: their biases, their scales",
        )


def _with_routers(opened: Checkpoint, targets: Sequence[Target], wish: Wish) -> Iterator[Target]:
    """Targets with the router tensors' `e` dims as long as the experts that were chosen."""
    for target in targets:
        row = opened.routers.get(target.name)
        if row is None or wish.experts is None:
            yield target
            continue
        at = next(i for i, dim in enumerate(row.dims) if str(dim) == "e")
        path = max(opened.modules, key=partial(_shared, target.name))
        size = opened.modules[path].sizes.get("e", target.shape[at])
        chosen = chosen_rows(wish.experts, path, size, target.shape[at])
        n = target.shape[at] if chosen is None else len(chosen)
        yield whole_target(target.name, (*target.shape[:at], n, *target.shape[at + 1 :]), target.dtype)


def _shared(name: str, path: str) -> int:
    """How many segments two names have in common from the left."""
    pairs = zip(name.split("."), path.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _dtypes(prepared: Prepared, name: str) -> tuple[str, ...]:
    """The dtypes of what fills a target: of one tensor, or of all of a role."""
    source = prepared.source
    if name in prepared.plain:
        return (source.tensors[prepared.plain[name]].dtype,)
    path, role, _ = prepared.owners[name]
    names = source.modules[prepared.pairs[path]].tensors[role]
    return tuple(dict.fromkeys(source.tensors[n].dtype for n in names if n is not None))


def _cast(prepared: Prepared, target: Target, dtype: torch.dtype | None) -> Target:
    """A target in `dtype`, unless it must stay exact; without one in the dtype that holds all that fills it."""
    if target.name not in prepared.plain and target.name not in prepared.owners:
        return target
    row = prepared.source.routers.get(prepared.plain.get(target.name, ""))
    held = wider(_dtypes(prepared, target.name))
    if dtype is None or held not in FLOATS or (row is not None and row.exact):
        return target._replace(dtype=held or target.dtype)
    return target._replace(dtype=dtype_name(dtype))


def narrowed(job: Job) -> dict[str, str]:
    """The tensors whose values a cast may have changed."""
    found = {}
    for name, target in job.prepared.targets.items():
        lossy = [dtype for dtype in _dtypes(job.prepared, name) if narrows(dtype, target.dtype)]
        lossy = lossy or _decoded_lossy(job.prepared, name, target.dtype)
        if lossy:
            found[name] = f"{lossy[0]} -> {target.dtype}"
    for name, packed in (job.packing.weights if job.packing is not None else {}).items():
        found[packed.codes] = f"{_dtypes(job.prepared, name)[0]} -> {packed.codec.name}"
    return found


def _decoded_lossy(prepared: Prepared, name: str, dtype: str) -> list[str]:
    """The codecs of what fills a target, whose values may have more digits than its dtype holds."""
    source = prepared.source
    if not isinstance(source.coded, CodedWeights) or name not in prepared.targets:
        return []
    names = [prepared.plain[name]] if name in prepared.plain else []
    if name in prepared.owners:
        path, role, _ = prepared.owners[name]
        names = [n for n in source.modules[prepared.pairs[path]].tensors[role] if n is not None]
    return sorted(
        {
            codec.name
            for codec in (source.coded.codec(n) for n in names if n in source.coded)
            if rounds(codec, dtype)
        }
    )
