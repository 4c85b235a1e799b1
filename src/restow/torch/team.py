"""A load by all ranks of a group: headers read once on a machine, replicas read once and handed on, errors told to all.

Collectives are called in one order by every rank, whatever happens to it: machines, plans, how the reading went; then
the tensors. A rank that fails says so where the others wait. It rejects a process outside the group, and gives up the
load where another rank has failed; a process that dies is for the group's own timeout.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from restow.checkpoint import Checkpoint
from restow.errors import PeerFailedError, UsageError
from restow.family import Family
from restow.folder import open_folder
from restow.handover import handed_over, taken_over
from restow.opening import read_as
from restow.plans import Plan
from restow.torch.peers import machine
from restow.torch.replicas import Held, Shared, keys_of, own_part, shared, told
from restow.torch.threads import cores

BUNDLE = 16 << 20  # bytes that travel at once


class Team:
    """This rank among those of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise UsageError("a rank of the group", "a process outside it")
        machines: list[Any] = [None] * self.size
        dist.all_gather_object(machines, machine(), group=group)
        self.local = [rank for rank, one in enumerate(machines) if one == machines[self.rank]]
        self._kinds = [device.type for device in group._device_types]
        self._met = 0  # how many of the two meetings are over
        self._keys: Mapping[int, int] = {}
        self._shared: Sequence[Shared] = ()

    @property
    def threads(self) -> int:
        """What this machine has for each of its ranks."""
        return max(1, cores() // len(self.local))

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """The time of one load: an error of this rank reaches the others at their next meeting."""
        try:
            yield
        except BaseException as error:
            if self._met < 2:
                self._met = 2
                dist.all_gather_object([None] * self.size, _words(error), group=self.group)
            raise

    def opened(self, path: str | os.PathLike[str], family: Family | None) -> Checkpoint:
        """The checkpoint, its headers read by the first rank of this machine alone."""
        leader, others = self.local[0], self.local[1:]
        if self.rank != leader:
            box: list[Any] = [None]
            dist.recv_object_list(box, group_src=leader, group=self.group)
            if isinstance(box[0], BaseException):
                raise box[0]
            return read_as(taken_over(box[0]), family=family)
        try:
            folder = open_folder(path)
            answer: Any = handed_over(folder) if others else None
        except Exception as error:
            answer = error
            raise
        finally:
            for other in others:
                dist.send_object_list([answer], group_dst=other, group=self.group)
        return read_as(folder, family=family)

    def assigned(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> Plan:
        """This rank's part of the plan; the rest is what others will send."""
        self._keys = keys_of(plan, tensors, self._kinds)
        held: Sequence[Held] = self._meet("plan", told(plan, tensors, self._keys))
        self._shared = shared(held)
        return own_part(plan, self._keys, self._shared, self.rank)

    def hand_on(self, plan: Plan, tensors: Mapping[str, torch.Tensor]) -> int:
        """Send what this rank read for others, take what they read for it; the bytes taken."""
        self._meet("read", None)
        taken = 0
        for one in self._shared:
            if self.rank in one.holders:
                mine = [tensors[plan.targets[self._keys[key]].name] for key in one.keys]
                self._travel(one, mine)
                taken += sum(t.nbytes for t in mine) if one.reader != self.rank else 0
        return taken

    def _meet(self, what: str, mine: Any) -> list[Any]:
        """What every rank brought; raises if one brought an error instead."""
        found: list[Any] = [None] * self.size
        self._met += 1
        dist.all_gather_object(found, mine, group=self.group)
        for rank, brought in enumerate(found):
            if isinstance(brought, list):
                self._met = 2
                kind, text = brought
                raise PeerFailedError(
                    f"rank {rank} to {what} its part", f"{kind} there", rank=self.rank,
                    sections=[(f"rank {rank}", text.splitlines())],
                    hint="what was loaded on this rank is not complete: load again on all ranks",
                )  # fmt: skip
        return found

    def _travel(self, one: Shared, tensors: Sequence[torch.Tensor]) -> None:
        """Tensors from their reader to the other holders: large ones as they lie, small and strided ones in bundles."""
        bundle: list[torch.Tensor] = []
        size = 0
        for tensor in tensors:
            if tensor.is_contiguous() and tensor.nbytes >= BUNDLE // 16:
                for part in torch.split(tensor.view(-1).view(torch.uint8), 4 * BUNDLE):
                    self._pass(one, part)
                continue
            for piece in _pieces(tensor):
                if size + piece.nbytes > BUNDLE and bundle:
                    self._bundle(one, bundle)
                    bundle, size = [], 0
                bundle.append(piece)
                size += piece.nbytes
        if bundle:
            self._bundle(one, bundle)

    def _bundle(self, one: Shared, pieces: Sequence[torch.Tensor]) -> None:
        box = torch.empty(sum(p.nbytes for p in pieces), dtype=torch.uint8, device=pieces[0].device)
        parts = torch.split(box, [p.nbytes for p in pieces])
        if one.reader == self.rank:
            for piece, part in zip(pieces, parts, strict=True):
                part.copy_(piece.contiguous().view(-1).view(torch.uint8))
        self._pass(one, box)
        if one.reader != self.rank:
            for piece, part in zip(pieces, parts, strict=True):
                piece.copy_(part.clone().view(piece.dtype).view(piece.shape))

    def _pass(self, one: Shared, data: torch.Tensor) -> None:
        """Bytes to all holders: a broadcast where they are the whole group, else from each to two more."""
        if len(one.holders) == self.size:
            dist.broadcast(data, group=self.group, group_src=one.reader)
            return
        line = [one.reader, *(rank for rank in one.holders if rank != one.reader)]
        place = line.index(self.rank)
        if place:
            dist.recv(data, group_src=line[(place - 1) // 2], group=self.group)
        for child in line[2 * place + 1 : 2 * place + 3]:
            dist.send(data, group_dst=child, group=self.group)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a tensor along its first dim, at most a bundle each where that can be."""
    if tensor.nbytes <= BUNDLE or not tensor.dim():
        yield tensor
        return
    rows = max(1, BUNDLE * len(tensor) // tensor.nbytes)
    yield from torch.split(tensor, rows)


def _words(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error)]
