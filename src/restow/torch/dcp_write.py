"""Distributed Checkpoint writes Hugging Face folders: `dcp.save` and `dcp.async_save`, by every rank for its own bytes.

The coordinator lays out and stages the files when the plans come together, ranks write their chunks into them by
position, the coordinator publishes at the end; DCP itself brings the ranks together. Objects that are no tensors are
rejected by name: a Hugging Face folder has no place for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from restow.boxes import overlap
from restow.checkpoint import Checkpoint
from restow.destination import locate
from restow.errors import CoverageError, RestowError, UsageError, show
from restow.family import Family
from restow.landing import Wish
from restow.layout import Layout
from restow.naming import Rename, check_rename
from restow.opening import family_of
from restow.placing import sweep
from restow.planning import plan_of
from restow.prepare import Prepared, prepare
from restow.publish import Staging
from restow.sharing import Share, leave_witness, remove_witness
from restow.targets import Target, whole_target
from restow.torch.dcp_read import StrPath, rounds
from restow.torch.dtypes import dtype_name
from restow.torch.holdings import check_filled, check_homes, narrowed
from restow.torch.outline import Outline, config_bytes, like_opened, like_outline, like_path
from restow.torch.outline_new import new_outline
from restow.torch.write import write_plan

_LIVE: WeakValueDictionary[Path, Writer] = WeakValueDictionary()  # who stages for a path, in this process


class Writer(StorageWriter):
    """`dcp.save` and `dcp.async_save` into a Hugging Face folder, by every rank for its own bytes.

    `like` and `layout`, `family`, `rename`, `dtype`, `config`, `max_shard_bytes`, `replace` mean what they mean in
    `restow.save`. Raises on the coordinator what `restow.save` raises; DCP brings it to all ranks as its
    `CheckpointException`, and the destination is as it was.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        like: StrPath | Checkpoint | None = None,
        layout: str | Layout | None = None,
        family: str | Family | None = None,
        rename: Rename = (),
        dtype: torch.dtype | None = None,
        config: object = None,
        max_shard_bytes: int = 5 * 2**30,
        replace: bool = False,
        threads: int | None = None,
    ) -> None:
        if like is not None and not (layout is None and dtype is None and config is None):
            raise UsageError("like= alone", "layout=, dtype= or config= with it")
        check_rename(rename)
        like_path(like)  # one in memory is refused here
        self.path = path
        self._like, self._layout, self._family = like, layout, family_of(family)
        self._rename, self._dtype, self._limit = rename, dtype, max_shard_bytes
        self._config = config_bytes(config)
        self._replace, self._threads = replace, threads
        self._open = ExitStack()
        self._staging: Staging | None = None

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
        union = _union(items)
        outline = self._outline(union)
        prepared = self._prepared(outline, union)
        check_homes(prepared, {})
        check_filled(prepared)
        narrowed(union.values(), prepared)
        _check_cover(items)
        try:
            told = self._stage(outline, union)
        except BaseException:
            self._withdraw()
            raise
        return [replace(plan, storage_data=told) for plan in plans]

    def _stage(self, outline: Outline, union: Mapping[str, Target]) -> str:
        place = locate(self.path)
        before = _LIVE.get(place.path)
        if before is not None and before is not self and before._given_up():
            before._withdraw()
        sources = [outline.like] if outline.like else []
        staging = Staging(
            self.path, size=outline.size, count=outline.count, sources=sources, replace=self._replace
        )
        self._staging = self._open.enter_context(staging)
        _LIVE[place.path] = self
        for file in outline.files:
            staging.create(file.name, file.size)
            staging.write(file.name, 0, file.head)
            for tensor in (tensor for tensor in file.tensors if tensor.name in outline.constants):
                staging.write(file.name, tensor.begin, memoryview(outline.constants[tensor.name]))
        for name, data in outline.side.items():
            staging.add(name, data)
        token = sha256(os.urandom(16)).hexdigest()
        leave_witness(place.staging, token)
        table = [(target.name, target.shape, target.dtype) for target in union.values()]
        return json.dumps([str(place.staging), token, table])

    def _outline(self, union: Mapping[str, Target]) -> Outline:
        if self._like is not None:
            return like_outline(like_opened(self._like, self._family))
        dtype = dtype_name(self._dtype) if self._dtype is not None else None
        return new_outline(
            union, {}, None, self._layout, self._family, self._rename, dtype, self._limit, self._config
        )

    def _prepared(self, outline: Outline, union: Mapping[str, Target]) -> Prepared:
        return prepare(
            outline.checkpoint,
            list(union.values()),
            Wish(family=outline.checkpoint.family, rename=self._rename),
        )

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's chunks into the staged files, by position."""
        folder, token, table = json.loads(plan.storage_data)
        try:
            results = self._write(plan, planner, Path(folder), token, table)
        except BaseException:
            self._give_up(Path(folder))
            raise
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(
        self, plan: SavePlan, planner: SavePlanner, folder: Path, token: str, table: Sequence[Any]
    ) -> list[WriteResult]:
        union = {name: whole_target(name, shape, dtype) for name, shape, dtype in table}
        prepared = self._prepared(self._outline(union), union)
        results = []
        with Share(folder, token) as share:
            for items in rounds(plan.items, lambda item: item.index.fqn):
                chosen, tensors = {}, {}
                for item in items:
                    data = planner.resolve_data(item)
                    assert isinstance(data, torch.Tensor)
                    name = item.index.fqn
                    chosen[name] = prepared.targets[name]._replace(runs=_runs(item))
                    tensors[name] = data.detach()
                    results.append(WriteResult(item.index, data.nbytes, None))
                write_plan(plan_of(prepared, chosen), tensors, share.write, threads=self._threads)
            share.sync()
            counts = dict(share.counts)
        if results:
            results[0] = WriteResult(results[0].index, results[0].size_in_bytes, counts)
        return results

    def _give_up(self, folder: Path) -> None:
        """After a failure here nobody publishes: DCP asks for that only if all is well. So the staged files go."""
        if self._staging is not None:
            self._withdraw()
            return
        place = locate(self.path)
        if place.staging == folder:
            with suppress(RestowError, OSError):
                sweep(place)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: check that every byte was written, publish."""
        staging = self._staging
        assert staging is not None
        try:
            for rank in results:
                for one in rank:
                    for name, count in (one.storage_data or {}).items():
                        staging.book(name, count)
            remove_witness(staging.place.staging)
            staging.finish({"source": {"saved_by_ranks": len(results)}})
        except BaseException:
            self._withdraw()
            raise
        self._staging = None
        self._open.close()

    def _given_up(self) -> bool:
        """Whether the rank that failed has taken the staged files away."""
        return self._staging is not None and not self._staging.place.staging.exists()

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
        name = item.index.fqn
        union[name] = whole_target(name, tuple(data.size), dtype_name(data.properties.dtype))
    return union


def _runs(item: WriteItem) -> tuple[tuple[tuple[int, int], ...], ...]:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    return tuple(((start, length),) for start, length in zip(chunk.offsets, chunk.sizes, strict=True))


def _check_cover(items: Sequence[WriteItem]) -> None:
    """Raise `CoverageError` unless every element of every tensor lies in one chunk."""
    boxes: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for item in items:
        assert item.tensor_data is not None
        boxes.setdefault(item.index.fqn, []).append(tuple(run for (run,) in _runs(item)))
        shapes[item.index.fqn] = tuple(item.tensor_data.size)
    for name, parts in boxes.items():
        volume = sum(prod(length for _, length in part) for part in parts)
        whole = prod(shapes[name])
        if volume != whole or overlap(parts) is not None:
            found = f"{volume} of {whole} held" if volume != whole else "parts that overlap"
            raise CoverageError(f"every element of {show(name)} in one chunk", found, tensor=name)
