"""Decoding in the pump, on a lane of plain memory: every bit as `decode` writes it, whatever is cut; launches are few."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import restow
import restow.torch.execute
from coded import State, codes, config, fp8_config, fp8_split, rest, scales, write
from restow.boxes import whole
from restow.coding import Coding, Grid, Term
from restow.landing import Wish
from restow.opening import open_checkpoint
from restow.planning import make_plan
from restow.plans import Plan
from restow.targets import Target
from restow.torch import device, slotwork
from restow.torch.across import Launch
from restow.torch.coded_slots import decodable, is_coded, parted
from restow.torch.coded_tiles import coded_jobs
from restow.torch.device_decode import TABLES, Decoding, decode_there, scratch_of
from restow.torch.read import run_plan
from test_device import TRAY, Memory
from test_quantized import mxfp4
from test_quantized_formats import FORMATS, build

# The packages' names for these are functions.
executes, pump = sys.modules["restow.torch.execute"], sys.modules["restow.torch.pump"]
EXPERTS = "model.layers.0.mlp.experts"
IN, OUT = f"{EXPERTS}.gate_and_up_projs", f"{EXPERTS}.down_projs"
ROOM = 150_000  # bytes that a slot, and the scratch, of these tests take


class Larger(Memory):
    def __init__(self, where: torch.device, trays: int = 3, size: int = 0, slots: int = 3) -> None:
        super().__init__(where, trays, size, slots)
        room = -(-(slotwork.TABLE + ROOM) // 512) * 512
        self.there = [torch.full((room,), 0x7D, dtype=torch.uint8, device=where) for _ in range(slots)]

    def send(self, tray: int, size: int, slot: int, at: int) -> None:
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
def test_every_format_is_decoded_to_the_bit(tmp_path: Path, kind: str) -> None:
    folder, _, _ = build(tmp_path, FORMATS[kind])
    cuts = [("f", 1, 3), ("d", 1, 4), ("e", 1, 2), ("d", 4, 7), ("f", 6, 7)]
    for layout, shard, dtype in [
        ("grouped", None, torch.bfloat16),
        ("grouped", None, torch.float32),
        ("split", None, torch.float16),
        *(("grouped", cut, torch.bfloat16) for cut in cuts),
    ]:
        plan = restow.plan(folder, layout=layout, shard=restow.Shard(*shard) if shard else None)
        ours, left = same(plan, blank(plan, dtype), folder)
        assert left is None and coded(ours) > 2, "and plain copies beside them"
        assert coded(ours) < len(ours.copies)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ragged_blocks_in_modules_and_files_of_their_own(tmp_path: Path, dtype: torch.dtype) -> None:
    """Sizes that no block divides, NaN among codes and scales, scales in another file, an expert wanted twice."""
    stored, _ = fp8_split(3, 131, 257)
    more = {n.replace("layers.0", "layers.1"): t.flip(0) for n, t in stored.items() if "layers.0" in n}
    stored |= {name: t.contiguous() for name, t in more.items()}
    name = f"{EXPERTS}.1.up_proj.weight"
    stored[name].view(torch.uint8)[5, 7:9] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    stored[f"{name}_scale_inv"][1, 2] = torch.nan
    apart = [name for name in stored if name.endswith("_scale_inv")]
    about = config(fp8_config(), 3, 131, 257, num_hidden_layers=2)
    folder = write(tmp_path, stored, about, {"model-00001.safetensors": apart, "model-00002.safetensors": []})
    for shard in (None, ("f", 1, 2), ("d", 1, 2), ("d", 6, 11)):
        for layout in ("grouped", "split"):
            plan = restow.plan(folder, layout=layout, shard=restow.Shard(*shard) if shard else None)
            into = blank(plan, dtype)
            _, left = same(plan, into, folder)
            assert left is None
            assert shard is not None or sum(int(t.isnan().sum()) for t in into.values()) == 2 + 3
    like = {
        name: torch.empty(5, *shape, dtype=dtype) for name, shape in ((IN, (257, 262)), (OUT, (131, 257)))
    }
    plan = restow.plan(folder, like, experts=[2, 0, 2, 1, 2], part=True)
    assert len(list(plan.batches())) < len(plan.copies)
    same(plan, like, folder)


def test_scales_of_one_coding_may_have_dtypes_of_their_own(tmp_path: Path) -> None:
    """Experts of one tensor of which some scales lie in half precision."""
    stored, _ = fp8_split(4, 131, 257)
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        if any(f".experts.{e}." in name for e in (1, 2)):
            stored[name] = stored[name].to(torch.bfloat16)
    folder = write(tmp_path, stored, config(fp8_config(), 4, 131, 257))
    for layout in ("grouped", "split"):
        plan = restow.plan(folder, layout=layout)
        _, left = same(plan, blank(plan, torch.bfloat16), folder)
        assert left is None


def test_any_placement_and_strides_of_a_tensor(tmp_path: Path) -> None:
    """Runs that begin and end inside blocks, in a part of a larger tensor."""
    stored, _ = fp8_split()
    folder = write(tmp_path, stored, config(fp8_config()))
    source = open_checkpoint(folder)
    runs = (((1, 2), (4, 1)), ((5, 140), (290, 3)), ((100, 50), (199, 130)))
    targets = [
        Target(IN, (5, 300, 400), "F32", runs),
        Target(OUT, (5, 200, 300), "F32", whole((5, 200, 300))),
    ]
    plan = make_plan(source, targets, Wish(layout="grouped", part=True))
    into = {}
    for target in targets:
        large = torch.full([n + 2 for n in target.local_shape], 7.0)
        into[target.name] = large[tuple(slice(1, -1) for _ in large.shape)]
    _, left = same(plan, into, folder)
    assert left is None


def fused(e: int, f: int, d: int) -> State:
    """Gate and up one after the other, in blocks that reach from one into the other."""
    state = rest(e, d)
    for seed, (name, r, c) in enumerate((("gate_up_proj", 2 * f, d), ("down_proj", d, f))):
        state[f"{EXPERTS}.{name}"] = codes(seed, e, r, c).view(torch.float8_e4m3fn)
        state[f"{EXPERTS}.{name}_scale_inv"] = scales(seed, e, -(-r // 128), -(-c // 128))
    return state


def test_blocks_that_reach_over_two_projections(tmp_path: Path) -> None:
    folder = write(tmp_path, fused(3, 100, 150), config(fp8_config(), 3, 100, 150))
    for layout in ("grouped", "split"):
        for shard in (None, ("f", 1, 3), ("e", 0, 2)):
            plan = restow.plan(folder, layout=layout, shard=restow.Shard(*shard) if shard else None)
            _, left = same(plan, blank(plan, torch.bfloat16), folder)
            assert left is None


def test_mxfp4_of_gpt_oss_and_cuts_inside_bytes(tmp_path: Path) -> None:
    state, about = mxfp4(3, 96, 64)
    folder = write(tmp_path, state, about)
    plan = restow.plan(folder, layout="hf")
    _, left = same(plan, blank(plan, torch.bfloat16), folder)
    assert left is None
    name, source = f"{EXPERTS}.gate_up_proj", open_checkpoint(folder)
    for dim, run in ((1, (13, 13)), (1, (52, 1)), (1, (7, 50)), (0, (1, 2)), (2, (39, 41))):
        cut = {t.name: t._replace(runs=whole(t.shape)) for t in plan.targets}
        cut[name] = cut[name]._replace(
            runs=tuple((run,) if i == dim else r for i, r in enumerate(cut[name].runs))
        )
        made = make_plan(source, list(cut.values()), Wish(layout="hf"))
        _, left = same(made, blank(made, torch.bfloat16), folder)
        assert left is None


# Where a factor lies.


@pytest.mark.parametrize(("sizes", "steps", "at"), [
    ((2, 70, 33), (33, 66, 1), 0),      # (f p) d: p walks inside a block that f walks through, too
    ((70, 2, 33), (66, 33, 1), 0),
    ((41, 29), (66, 1), 33 * 17 + 3),
    ((140, 33), (33, 1), 0),
    ((90, 20), (33, 1), 33 * 31 + 9),
    ((7,), (66,), 33 * 5 + 32),
    ((), (), 33 * 130 + 31),
])  # fmt: skip
@pytest.mark.parametrize("divisor", [1, 2, 12, 128])
def test_every_factor_is_found(sizes: tuple[int, ...], steps: tuple[int, ...], at: int, divisor: int) -> None:
    """Scales that hold their own number, under elements that all are one."""
    rows, columns, by = 140, 33, 8
    shape = -(-rows // divisor), -(-columns // by)
    terms = (Term(0, 1, rows, divisor, 0, 1), Term(1, 1, columns, by, 1, 1))
    coding = Coding("fp8", "e4m3", 8, (rows, columns), (0, 0), (Grid("multiply", shape, terms),))
    places = tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))
    room = 1 << 16, 1 << 15
    jobs = coded_jobs(coding, (at, sizes, steps), ("F32",), torch.float32, places, room)
    assert jobs is not None
    grid = torch.arange(float(prod(shape)))
    found = torch.full((prod(sizes),), -1.0)
    (job,) = jobs
    slot = torch.zeros(room[0], dtype=torch.uint8)
    one = torch.tensor(1.0).to(torch.float8_e4m3fn).view(torch.uint8)
    slot[: job.seats[0].need] = one
    for begin, length, to in job.seats[1].reads:
        begin += job.begins[1]
        begun = -(-job.seats[0].need // 512) * 512 + to
        slot[begun : begun + length] = grid.view(torch.uint8)[begin : begin + length]
    scratch = scratch_of(torch.empty(1 << 16, dtype=torch.uint8), [])
    for tile in job.tiles:
        values, _, _ = tile.decode.room
        beside = -(-values // 512) * 512
        seats = (tile.at[0], 0), (-(-job.seats[0].need // 512) * 512 + tile.at[1], 0)
        decode_there(Decoding(0, 1, seats, 0, beside, 0), tile.decode, slot, scratch)
        box = scratch.room.view(torch.float32).as_strided(tile.sizes, tile.source, tile.first)
        found.as_strided(tile.sizes, tile.strides, tile.to).copy_(box)
    index = torch.zeros(sizes, dtype=torch.int64) + at
    for axis, (n, step) in enumerate(zip(sizes, steps, strict=True)):
        index = index + (torch.arange(n) * step).view(-1, *(1,) * (len(sizes) - axis - 1))
    wanted = (index // columns // divisor) * shape[1] + index % columns // by
    assert torch.equal(found, wanted.flatten().float())


# What goes where.


def test_large_jobs_are_cut_and_alike_tiles_are_one_launch(tmp_path: Path) -> None:
    """A matrix of more than a job holds, of more tiles than one, beside experts of which many are alike."""
    e, f, d = 6, 64, 96
    stored, _ = fp8_split(e, f, d)
    stored["lm_head.weight"] = codes(3, 4400, 2048).view(torch.float8_e4m3fn)
    stored["lm_head.weight_scale_inv"] = scales(3, 35, 16)
    folder = write(tmp_path, stored, config(fp8_config(), e, f, d))
    plan = restow.plan(folder, layout="grouped")
    into = blank(plan, torch.bfloat16)
    there = [torch.empty(10 << 20, dtype=torch.uint8) for _ in range(2)]
    scratch = torch.empty(10 << 20, dtype=torch.uint8)
    job = slotwork.prepared(plan, into, there, share=TRAY, scratch=scratch)
    assert job.size == plan.bytes
    decodings = [one for work in job.work for batch in work.batches for one in batch.decodings]
    alike = [one.times for one in decodings if job.decodes[one.decode].sizes in ((f, d), (d, f))]
    assert sorted(alike) == [e, e, e], "gate, up and down, of all experts"
    parts = [job.decodes[one.decode].sizes for one in decodings for _ in range(one.times)]
    assert sum(a for a, b in parts if b == 2048) == 4400 and sum(b == 2048 for _, b in parts) > 4
    most = scratch.numel() - TABLES
    for one in decodings:
        _, factors, places = job.decodes[one.decode].room
        assert one.places + one.times * places <= most and one.factors + one.times * factors <= most

    class Wide(Memory):
        def __init__(self, where: torch.device, trays: int = 3, size: int = 0, slots: int = 3) -> None:
            super().__init__(where, 3, size, slots)
            self.trays = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(3)]
            self.there = [*there, scratch]

        def send(self, tray: int, size: int, slot: int, at: int) -> None:
            self.there[slot][at : at + size].copy_(self.trays[tray][:size])

    wanted = {name: torch.full_like(t, 7) for name, t in into.items()}
    booked = run_plan(plan, wanted, root=str(folder))
    assert device.run_on_device(plan, into, root=str(folder), stamps={}, threads=2, lane=Wide) == booked
    assert all(torch.equal(bits(into[name]), bits(t)) for name, t in wanted.items())


def by_address(table: torch.Tensor, what: Launch) -> None:
    """What the kernel does, row by row, in memory that ctypes opens."""
    word = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32}[what.width]
    for begin, to, rows, cols, step, far in table.tolist():
        source = np.ctypeslib.as_array((word * ((rows - 1) * step + cols)).from_address(begin))
        target = np.ctypeslib.as_array((word * ((cols - 1) * far + rows)).from_address(to))
        for row in range(rows):
            target[row::far][:cols] = source[row * step : row * step + cols]


def with_plain_layer(folder: Path) -> Path:
    """Experts in codes, and after them a layer of plain ones."""
    stored, values = fp8_split(2, 131, 70)
    left = {**fp8_config(), "modules_to_not_convert": ["model.layers.1"]}
    about = config(left, 2, 131, 70, num_hidden_layers=2)
    for name in ("mlp.gate.weight", "input_layernorm.weight"):
        stored[f"model.layers.1.{name}"] = stored[f"model.layers.0.{name}"].clone()
    plain = {name: value for name, value in values.items() if ".experts." in name}
    stored |= {name.replace("layers.0", "layers.1"): value.bfloat16() for name, value in plain.items()}
    return write(folder, stored, about)


@pytest.mark.parametrize("kind", ["fp8 and plain", "nvfp4", "int4_packed"])
def test_transposes_go_by_one_table_a_slot(tmp_path: Path, kind: str, monkeypatch: Any) -> None:
    """Plain ones from the slots, decoded ones from the scratch."""
    mixed = kind not in FORMATS
    folder = with_plain_layer(tmp_path) if mixed else build(tmp_path, FORMATS[kind])[0]
    launched: list[tuple[Launch, int]] = []

    def launch(table: torch.Tensor, what: Launch) -> None:
        assert len(table) == what.last - what.first
        launched.append((what, table.data_ptr()))
        by_address(table, what)

    defaults = slotwork.prepared.__defaults__
    assert defaults is not None
    monkeypatch.setattr(slotwork.prepared, "__defaults__", (0, *defaults[1:]))  # always worth it
    monkeypatch.setattr(slotwork, "usable", lambda *_: True)
    monkeypatch.setattr(pump, "launch", launch)
    for dtype, shard in ((torch.bfloat16, None), (torch.float32, ("f", 1, 3)), (torch.bfloat16, ("d", 4, 7))):
        plan = restow.plan(folder, layout="grouped", shard=restow.Shard(*shard) if shard else None)
        before = len(launched)
        same(plan, blank(plan, dtype), folder)
        assert len(launched) > before + (mixed and dtype == torch.bfloat16), "of both kinds of slots"
    assert [what.first for what, _ in launched].count(0) == 3, "rows are numbered through all slots"


def test_what_no_device_decodes_goes_the_other_way(tmp_path: Path, monkeypatch: Any) -> None:
    """Values in float64 here: the threads take them, the pump takes the rest, and both together are the plan."""
    folder, _, _ = build(tmp_path, FORMATS["nvfp4"])
    into = blank(restow.plan(folder, layout="grouped"), torch.bfloat16)
    into[OUT] = into[OUT].double()
    plan = restow.plan(folder, into)
    ours, left = decodable(plan, into, (1 << 20, 1 << 20))
    assert left is not None
    assert {plan.targets[copy.target].name for copy in left.copies} == {OUT}
    assert len(ours.copies) + len(left.copies) == len(plan.copies)
    assert decodable(plan, into, (ROOM // 100, 1 << 20))[0] == parted(plan)[0], "what is too large for a slot"
    pumped: list[Plan] = []

    def pumping(plan: Plan, *args: Any, **more: Any) -> Any:
        pumped.append(plan)
        return device.run_on_device(plan, *args, **more, lane=Larger)

    monkeypatch.setattr(executes, "run_on_device", pumping)
    monkeypatch.setattr(executes, "on_one_device", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    told: list[tuple[int, int]] = []
    report = restow.load(folder, into, progress=lambda *now: told.append(now))
    assert pumped == [ours] and report.bytes_read == plan.bytes
    assert told == sorted(told) and told[-1] == (plan.bytes, plan.bytes)
    wanted = {name: torch.full_like(t, 7) for name, t in into.items()}
    assert run_plan(plan, wanted, root=str(folder)).bytes_written == report.bytes_written
    assert all(torch.equal(bits(into[name]), bits(t)) for name, t in wanted.items())


@pytest.mark.parametrize(("element", "apart", "hows", "dtype"), [
    ("nf4", 1, ("multiply",), torch.bfloat16),
    ("e2m1", 8, ("multiply",), torch.bfloat16),
    ("e2m1", 1, ("coded", "table", "nested", "offset"), torch.bfloat16),
    ("e2m1", 1, ("coded",), torch.bfloat16),
    ("e2m1", 1, ("multiply",), torch.float64),
    ("e2m1", 1, ("multiply", "multiply"), torch.bfloat16),
])  # fmt: skip
def test_what_is_left_to_the_threads(
    element: str, apart: int, hows: tuple[str, ...], dtype: torch.dtype
) -> None:
    grids = tuple(Grid(how, (4, 1), (Term(0, 1, 4, 1, 0, 1),)) for how in hows)
    coding = Coding("", element, 4, (4, 8), (0, 0), grids, apart)
    into = (dtype, (8, 1), (1 << 16, 1 << 16))
    assert coded_jobs(coding, (0, (4, 8), (8, 1)), ("F32",) * len(hows), *into) is None
    plain = coding._replace(element="e2m1", apart=1, grids=grids[:1])._replace(
        grids=(Grid("multiply", (4, 1), (Term(0, 1, 4, 1, 0, 1),)),)
    )
    assert coded_jobs(plain, (0, (4, 8), (8, 1)), ("F32",), torch.bfloat16, *into[1:]) is not None
