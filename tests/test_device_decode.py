"""Decoding in the pump, on a lane of plain memory: every bit as `decode` writes it, whatever is cut; launches are few."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import restow
from coded import E2M1, State, codes, config, fp8_config, fp8_split, nibbles, rest, scales, write
from restow.boxes import whole
from restow.coding import Coding, Grid, Term
from restow.landing import Wish
from restow.opening import open_checkpoint
from restow.planning import make_plan
from restow.plans import Plan
from restow.targets import Target
from restow.torch import device, slotwork
from restow.torch.coded_slots import decodable, is_coded, parted
from restow.torch.coded_tiles import coded_jobs
from restow.torch.device_decode import TABLES
from restow.torch.read import run_plan
from test_device import TRAY, Memory
from test_quantized_formats import FORMATS, build

EXPERTS = "model.layers.0.mlp.experts"
IN, OUT = f"{EXPERTS}.gate_and_up_projs", f"{EXPERTS}.down_projs"
ROOM = 150_000  # bytes that a slot, and the scratch, of these tests take


class Larger(Memory):
    def __init__(self, where: torch.device, trays: int = 3, size: int = 0, slots: int = 3) -> None:
        super().__init__(where, trays, size, slots)
        room = -(-(slotwork.TABLE + ROOM) // 512) * 512
        self.there = [torch.full((room,), 0x7D, dtype=torch.uint8, device=where) for _ in range(slots)]

    def send(self, batch: Any) -> None:
        for tray, size, slot, at in batch:
            assert at + size <= ROOM
            self.there[slot][at : at + size].copy_(self.trays[tray][:size])
            self.trays[tray].fill_(0x7E)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Every bit, all NaNs as one."""
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    plain = tensor if tensor.element_size() == 1 else torch.where(tensor.isnan(), torch.nan, tensor)
    return plain.contiguous().view(word)


def same(plan: Plan, into: Mapping[str, torch.Tensor], root: Path | str) -> tuple[Plan, Plan | None]:
    """The pump's work equals the threads', in what it does of a plan; its halves."""
    lane = Larger(torch.device("cpu"))
    room = slotwork.room_of(lane.there[0].numel(), lane.there[0].numel())
    ours, left = decodable(plan, into, room)
    wanted = {name: torch.full_like(t, 7) for name, t in into.items()}
    plain = run_plan(ours, wanted, root=str(root), threads=1)
    assert device.run_on_device(ours, into, root=str(root), stamps={}, threads=3, lane=Larger) == plain
    for name in wanted:
        assert torch.equal(bits(into[name]), bits(wanted[name])), name
    return ours, left


def blank(plan: Plan, dtype: torch.dtype) -> State:
    return {
        t.name: torch.full(t.local_shape, 7, dtype=dtype if t.dtype in ("BF16", "F32") else torch.bfloat16)
        for t in plan.targets
    }


def coded(plan: Plan) -> int:
    return sum(is_coded(plan, copy) for copy in plan.copies)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("layout", ["grouped", "split", "fused"])
def test_every_format_is_decoded_to_the_bit(tmp_path: Path, kind: str, layout: str) -> None:
    folder, _, _ = build(tmp_path, FORMATS[kind])
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        plan = restow.plan(folder, layout=layout)
        ours, left = same(plan, blank(plan, dtype), folder)
        assert left is None and coded(ours) > 9
    for shard in (("f", 1, 3), ("d", 1, 4), ("e", 1, 2), ("d", 4, 7), ("f", 6, 7)):
        plan = restow.plan(folder, layout=layout, shard=restow.Shard(*shard))
        _, left = same(plan, blank(plan, torch.bfloat16), folder)
        assert left is None, shard
