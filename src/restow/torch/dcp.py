"""Distributed Checkpoint over Hugging Face folders: native names in the state, hub files on the disk, no conversion step.

`Reader` presents every tensor of the source in the wanted layout, whole, one chunk each; plain `dcp.load` with its default
planner then asks for the boxes that this rank's tensors need, and those are read like any restow load: own bytes only,
straight into the tensors that the planner hands out. `Writer` is the same for `dcp.save`. Objects that are no tensors are
rejected by name: a Hugging Face folder has no place for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from restow import writing
from restow.boxes import overlap
from restow.errors import (
    CoverageError,
    MissingTensorError,
    RestowError,
    UnexpectedTensorError,
    UsageError,
    show,
)
from restow.family import Family
from restow.landing import Wish
from restow.layout import Layout
from restow.naming import Rename, renamed
from restow.opening import family_of, open_checkpoint
from restow.planning import Prepared, default_targets, plan_of, prepare
from restow.publish import Staging
from restow.targets import Target
from restow.torch.dtypes import dtype_name, torch_dtype
from restow.torch.outline import Outline, like_outline, new_outline
from restow.torch.read import run_plan
from restow.torch.write import write_plan

StrPath = str | os.PathLike[str]


class Reader(StorageReader):
    """A Hugging Face folder (or any checkpoint that restow opens) as Distributed Checkpoint's storage.

    Names are the source's module paths and the rows of `layout` ("grouped" if None), all other tensors by their own
    names, after `rename` (as in `restow.load`). Raises what `restow.open` and `restow.plan` raise.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        layout: str | Layout | None = None,
        rename: Rename = (),
        family: str | Family | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = path
        self._layout = layout or "grouped"
        self._rename = rename
        self._family = family_of(family)
        self._threads = threads
        self._prepared: Prepared | None = None

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin anew, at another folder if one is given."""
        if checkpoint_id is not None:
            self.path = checkpoint_id
        self._prepared = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Name, whole shape and dtype of every tensor that can be asked for. Headers only."""
        source = open_checkpoint(self.path, family=self._family)
        wish = Wish(layout=self._layout, family=self._family, rename=self._rename)
        named = [(renamed(t.name, self._rename), t) for t in default_targets(source, self._layout, wish)]
        targets = [target._replace(name=name) for name, target in named if name is not None]
        self._prepared = prepare(source, targets, wish)
        table = {target.name: _whole(target) for target in targets}
        return Metadata(state_dict_metadata=table)  # type: ignore[arg-type]

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing to set up: what is known is known from the headers."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Refuse what is no tensor, before anything is read."""
        strange = [item.dest_index.fqn for item in plan.items if item.type != LoadItemType.TENSOR]
        if strange:
            raise UsageError("tensors only", f"{show(strange[0])}, an object", path=self.path)
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Ranks read for themselves; their plans stay as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every item straight into the tensor that the planner resolves it to."""
        assert self._prepared is not None
        for items in _rounds(plan.items, lambda item: item.storage_index.fqn):
            chosen: dict[str, Target] = {}
            tensors: dict[str, torch.Tensor] = {}
            for item in items:
                name = item.storage_index.fqn
                into = planner.resolve_tensor(item).detach()
                box = zip(item.storage_offsets, item.lengths, strict=True)
                runs = tuple(((start, length),) for start, length in box)
                whole = self._prepared.targets[name]
                chosen[name] = whole._replace(dtype=dtype_name(into.dtype), runs=runs)
                tensors[name] = into
            made = plan_of(self._prepared, chosen)
            if made.missing:
                raise MissingTensorError(
                    "every tensor asked for in the source", f"none for {show(made.missing[0])}"
                )
            source = self._prepared.source
            run_plan(made, tensors, root=source.path, stamps=source.stamps, threads=self._threads)
            for item in items:
                planner.commit_tensor(item, tensors[item.storage_index.fqn])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether this is a path that exists."""
        return Path(checkpoint_id).exists()


def _whole(target: Target) -> TensorStorageMetadata:
    size = torch.Size(target.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(target.dtype)), size, [chunk])


Item = TypeVar("Item")


def _rounds(items: Sequence[Item], name: Callable[[Item], str]) -> list[list[Item]]:
    """Items in as few rounds as give each tensor one box a round."""
    rounds: list[list[Item]] = []
    seen: dict[str, int] = {}
    for item in items:
        number = seen.get(name(item), 0)
        seen[name(item)] = number + 1
        while len(rounds) <= number:
            rounds.append([])
        rounds[number].append(item)
    return rounds


class Writer(StorageWriter):
    """`dcp.save` and `dcp.async_save` into a Hugging Face folder, by every rank for its own bytes.

    `like` and `layout`, `family`, `rename`, `dtype`, `max_shard_bytes`, `replace` mean what they mean in `restow.save`.
    Raises on the coordinator what `restow.save` raises; DCP brings it to all ranks.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        like: StrPath | None = None,
        layout: str | Layout | None = None,
        family: str | Family | None = None,
        rename: Rename = (),
        dtype: torch.dtype | None = None,
        max_shard_bytes: int = 5 * 2**30,
        replace: bool = False,
        threads: int | None = None,
    ) -> None:
        if like is not None and (layout is not None or dtype is not None):
            raise UsageError("like= alone", "layout= or dtype= with it")
        self.path = path
        self._like, self._layout, self._family = like, layout, family_of(family)
        self._rename, self._dtype, self._limit = rename, dtype, max_shard_bytes
        self._replace, self._threads = replace, threads
        self._open = ExitStack()
        self._staging: Staging | None = None
        self._begun = ""

    def reset(self, checkpoint_id: StrPath | None = None) -> None:
        """Begin anew, at another folder if one is given; an unfinished attempt of ours is swept."""
        if checkpoint_id is not None:
            self.path = checkpoint_id
        self._withdraw()

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up before the plans are known."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what is no tensor."""
        strange = [item.index.fqn for item in plan.items if item.type == WriteItemType.BYTE_IO]
        if strange:
            raise UsageError(
                "tensors only", f"{show(strange[0])}, an object", path=self.path,
                hint="save what is no weight (steps, optimizer state) to a checkpoint of its own",
            )  # fmt: skip
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: lay out the files, prove that all of them is covered, stage them."""
        items = [item for plan in plans for item in plan.items]
        outline = self._outline(_union(items))
        prepared = self._prepared(outline, items)
        _cover(outline, prepared, items)
        size = sum(file.size for file in outline.files) + sum(map(len, outline.side.values()))
        sources = [outline.like] if outline.like else []
        staging = Staging(
            self.path,
            size=size,
            count=len(outline.files) + len(outline.side) + 1,
            sources=sources,
            replace=self._replace,
        )
        try:
            self._staging = self._open.enter_context(staging)
            for file in outline.files:
                staging.create(file.name, file.size)
                staging.write(file.name, 0, file.head)
            for name, data in outline.side.items():
                staging.add(name, data)
        except BaseException:
            self._withdraw()
            raise
        told = json.dumps({"staging": str(staging.place.staging), "union": _table(_union(items))})
        return [replace(plan, storage_data=told) for plan in plans]

    def _outline(self, union: Mapping[str, Target]) -> Outline:
        if self._like is not None:
            return like_outline(open_checkpoint(self._like, family=self._family))
        dtype = dtype_name(self._dtype) if self._dtype is not None else None
        return new_outline(union, self._layout, self._family, self._rename, (), dtype, self._limit, None)

    def _prepared(self, outline: Outline, items: Sequence[WriteItem]) -> Prepared:
        wish = Wish(family=outline.checkpoint.family, rename=self._rename)
        prepared = prepare(outline.checkpoint, list(_union(items).values()), wish)
        if prepared.missing:
            raise UnexpectedTensorError(
                "a place in the files for every tensor of the state",
                f"{len(prepared.missing)} without one",
                tensor=prepared.missing[0],
                sections=[("no place", map(show, prepared.missing))],
                hint="rename= says how names differ; leave out of the state what is not to be saved",
            )
        return prepared

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks into the staged files, by position."""
        told = json.loads(plan.storage_data)
        union = {name: Target(name, tuple(shape), dtype, tuple(((0, n),) for n in shape))
                 for name, shape, dtype in told["union"]}  # fmt: skip
        outline = self._outline(union)
        wish = Wish(family=outline.checkpoint.family, rename=self._rename)
        prepared = prepare(outline.checkpoint, list(union.values()), wish)
        staging = Path(told["staging"])
        files: dict[str, int] = {}
        counts: dict[str, int] = {}
        from threading import Lock

        lock = Lock()

        def write(name: str, offset: int, data: memoryview) -> int:
            with lock:
                if name not in files:
                    with writing.failures("open", staging / name):
                        files[name] = writing.reopen(staging / name)
                counts[name] = counts.get(name, 0) + len(data)
            with writing.failures("write", staging / name, len(data)):
                writing.pwrite_all(files[name], data, offset)
            return len(data)

        results = []
        try:
            for items in _rounds(plan.items, lambda item: item.index.fqn):
                chosen, tensors = {}, {}
                for item in items:
                    data = planner.resolve_data(item)
                    assert isinstance(data, torch.Tensor)
                    tensor = data.detach()
                    name = item.index.fqn
                    chosen[name] = prepared.targets[name]._replace(runs=_runs(item))
                    tensors[name] = tensor
                    results.append(WriteResult(item.index, tensor.nbytes, None))
                write_plan(plan_of(prepared, chosen), tensors, write, threads=self._threads)
            for name, fd in files.items():
                with writing.failures("sync", staging / name):
                    writing.fsync(fd)
        finally:
            for fd in files.values():
                writing.close(fd)
        if results:
            results[0] = WriteResult(results[0].index, results[0].size_in_bytes, counts)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: check that every byte was written, publish."""
        assert self._staging is not None
        try:
            for rank in results:
                for one in rank:
                    for name, count in (one.storage_data or {}).items():
                        self._staging.book(name, count)
            self._staging.finish({"source": {"saved_by_ranks": len(results)}})
        except BaseException:
            self._withdraw()
            raise
        self._staging = None
        self._open.close()

    def _withdraw(self) -> None:
        """Leave an unfinished attempt: its staging goes, the destination stays."""
        staging, self._staging = self._staging, None
        opened, self._open = self._open, ExitStack()
        if staging is not None:
            error = RestowError("a finished save", "one that was given up")
            opened.__exit__(type(error), error, None)

    def __del__(self) -> None:
        if getattr(self, "_staging", None) is not None:
            self._withdraw()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether something could be made there."""
        return Path(checkpoint_id).parent.is_dir()


def _union(items: Sequence[WriteItem]) -> dict[str, Target]:
    """Every tensor that some rank writes, whole."""
    union = {}
    for item in items:
        data = item.tensor_data
        assert data is not None
        dtype = dtype_name(data.properties.dtype)
        shape = tuple(data.size)
        union[item.index.fqn] = Target(item.index.fqn, shape, dtype, tuple(((0, n),) for n in shape))
    return union


def _table(union: Mapping[str, Target]) -> list[tuple[str, tuple[int, ...], str]]:
    return [(target.name, target.shape, target.dtype) for target in union.values()]


def _runs(item: WriteItem) -> tuple[tuple[tuple[int, int], ...], ...]:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return tuple(((start, length),) for start, length in zip(chunk.offsets, chunk.sizes, strict=True))


def _cover(outline: Outline, prepared: Prepared, items: Sequence[WriteItem]) -> None:
    """Every element of every tensor in one chunk, and every tensor of the files among them."""
    boxes: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    for item in items:
        boxes.setdefault(item.index.fqn, []).append(tuple(run for (run,) in _runs(item)))
    for name, parts in boxes.items():
        shape = prepared.targets[name].shape
        volume = sum(torch.Size([n for _, n in part]).numel() for part in parts)
        if volume != torch.Size(shape).numel() or overlap(parts) is not None:
            raise CoverageError(
                f"every element of {show(name)} in one chunk", f"{volume} of {torch.Size(shape).numel()}"
            )
    filled = outline.filled(set(boxes), prepared)
    lost = [name for name in outline.checkpoint.tensors if name not in filled]
    if lost:
        raise MissingTensorError(
            "a tensor of the state for every tensor of the files",
            f"{len(lost)} that no rank holds",
            tensor=lost[0],
            sections=[("missing", map(show, lost))],
            hint="rename= says how names differ; like= must be a checkpoint of this very model",
        )


__all__ = ["Reader", "Writer"]
