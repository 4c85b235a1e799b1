"""Distributed Checkpoint reads Hugging Face folders: native names in the state, hub files on the disk.

`Reader` presents every tensor of the source in the wanted layout, whole, one chunk each; plain `dcp.load` with its
default planner then asks for the boxes that this rank's tensors need, and those are read like any restow load: own
bytes only, straight into the tensors that the planner hands out; where DCP takes scattered rows for one box (it
refuses to save them), the placement says what is read. Objects that are no tensors are rejected by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.futures import Future

from restow.errors import MissingTensorError, RestowError, UsageError, show
from restow.family import Family
from restow.landing import Wish
from restow.layout import Layout
from restow.naming import Rename, renamed
from restow.opening import family_of, open_checkpoint
from restow.planning import plan_of
from restow.prepare import Prepared, prepare
from restow.targets import Target
from restow.torch.dtypes import dtype_name, torch_dtype
from restow.torch.execute import execute
from restow.torch.storage import Slot, slot_of
from restow.wanted import default_targets

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

    # Called `words`, since DCP asks again, for this rank alone and then without collectives, where it finds `kwargs`.
    def read_metadata(self, *args: Any, **words: Any) -> Metadata:
        """Name, whole shape and dtype of every tensor that can be asked for. Headers only.

        What is wrong with the source is raised when the answer is first looked at: DCP swallows what this call raises.
        """
        try:
            return self._metadata()
        except RestowError as error:
            return _Unread(error)

    def _metadata(self) -> Metadata:
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
        """Nothing to set up but to say what was wrong with the headers."""
        if isinstance(metadata, _Unread):
            raise metadata.error

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
        apart = {n: s for n, s in scattered(planner).items() if n in self._prepared.targets}
        if apart:
            self._execute(
                {name: slot.target for name, slot in apart.items()},
                {name: slot.local for name, slot in apart.items()},
            )
        asked = [item for item in plan.items if item.storage_index.fqn not in apart]
        for items in rounds(asked, lambda item: item.storage_index.fqn):
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
            self._execute(chosen, tensors)
            for item in items:
                planner.commit_tensor(item, tensors[item.storage_index.fqn])
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _execute(self, chosen: dict[str, Target], tensors: dict[str, torch.Tensor]) -> None:
        """Read what the targets say into the tensors of their names."""
        assert self._prepared is not None
        made = plan_of(self._prepared, chosen)
        if made.missing:
            raise MissingTensorError(
                "every tensor asked for in the source", f"none for {show(made.missing[0])}"
            )
        source = self._prepared.source
        execute(made, tensors, root=source.path, stamps=source.stamps, threads=self._threads)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: StrPath) -> bool:
        """Whether this is a path that exists."""
        return Path(checkpoint_id).exists()


class _Unread(Metadata):
    """Metadata that could not be read: whoever looks for a tensor in it is told why."""

    def __init__(self, error: RestowError) -> None:
        self.error = error

    def __getattr__(self, name: str) -> Any:
        if name == "state_dict_metadata":
            raise self.error
        raise AttributeError(name)


def _whole(target: Target) -> TensorStorageMetadata:
    size = torch.Size(target.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size([0] * len(size)), sizes=size)
    return TensorStorageMetadata(TensorProperties(dtype=torch_dtype(target.dtype)), size, [chunk])


def scattered(planner: LoadPlanner) -> dict[str, Slot]:
    """DTensors of a planner's state whose part is not one box: DCP takes them for one, at the first element's place."""
    state = getattr(planner, "state_dict", None) or {}
    slots = {
        name: slot_of(name, tensor, meta=True)
        for name, tensor in state.items()
        if isinstance(tensor, DTensor) and any(isinstance(p, _StridedShard) for p in tensor.placements)
    }
    return {name: slot for name, slot in slots.items() if any(len(runs) > 1 for runs in slot.target.runs)}


Item = TypeVar("Item")


def rounds(items: Sequence[Item], name: Callable[[Item], str]) -> list[list[Item]]:
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
