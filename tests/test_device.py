"""The pump of slots, on a lane of plain memory: what arrives, in whose turn, what is raised; the kernel, interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import restow
from moe import Model, Tensors, differing, painted
from restow.errors import IntegrityError, TruncatedFileError, UsageError
from restow.plans import Plan
from restow.torch import device, slotwork
from restow.torch.across import WORD, launches, matrix_of
from restow.torch.driver import driver
from restow.torch.packing import ALIGN, SHARE, Packed, Piece, packed
from restow.torch.pump import pump
from restow.torch.read import run_plan

ROOM = 4096  # bytes of data that a slot of these tests takes
TRAY = 2048  # and a tray
SMALL = Model(e=5, f=6, d=10)


class Memory:
    """Trays and slots in plain memory. A tray is spoilt as soon as it was sent, a device slot as soon as it was moved."""

    def __init__(self, where: torch.device, trays: int = 3, size: int = 0, slots: int = 3) -> None:
        self.trays = [torch.full((TRAY,), 0x7E, dtype=torch.uint8, device=where) for _ in range(trays)]
        room = slotwork.TABLE + ROOM
        self.there = [torch.full((room,), 0x7D, dtype=torch.uint8, device=where) for _ in range(slots)]
        self.moved, self.sent = [0] * slots, list[tuple[int, int, int]]()
        self.owners: dict[int, int] = {}  # of each tray its thread
        self.finished = 0

    def begin(self, tray: int) -> None:
        self.owners[tray] = threading.get_ident()

    def left(self, tray: int) -> None:
        assert self.owners[tray] == threading.get_ident()

    def send(self, tray: int, size: int, slot: int, at: int) -> None:
        assert at + size <= ROOM and self.owners[tray] == threading.get_ident()
        self.there[slot][at : at + size].copy_(self.trays[tray][:size])
        self.trays[tray].fill_(0x7E)
        self.sent.append((slot, self.moved[slot], at))

    def table(self, rows: torch.Tensor, slot: int) -> torch.Tensor:
        room = self.there[slot][-slotwork.TABLE :].view(torch.int64)
        return room[: rows.numel()].view(rows.shape).copy_(rows)

    def move(self, slot: int, work: Callable[[], None]) -> None:
        work()
        self.there[slot].fill_(0x7D)
        self.moved[slot] += 1

    def finish(self) -> None:
        self.finished += 1


def opened(folder: Path, src: str = "split", model: Model = SMALL) -> restow.Checkpoint:
    return restow.open(model.written(folder, src))


def blank(plan: Plan, dtype: torch.dtype) -> Tensors:
    return {
        t.name: torch.full(t.local_shape, -1, dtype=dtype if "experts" in t.name else torch.bfloat16)
        for t in plan.targets
    }


def both(plan: Plan, source: restow.Checkpoint, dtype: torch.dtype, threads: int = 3) -> tuple[Any, Any]:
    """(what the pump left and booked, what the plain executor left and booked)."""
    found, wanted = blank(plan, dtype), blank(plan, dtype)
    ours = device.run_on_device(
        plan, found, root=source.path, stamps=source.stamps, threads=threads, lane=Memory
    )
    plain = run_plan(plan, wanted, root=source.path, threads=1)
    return (found, ours), (wanted, plain)


@pytest.mark.parametrize("src", ["split", "fused", "grouped"])
@pytest.mark.parametrize("dst", ["split", "fused", "grouped", "stacked", "epfd"])
@pytest.mark.parametrize("shard", [None, ("e", 1, 2), ("f", 1, 2), ("d", 0, 3)], ids=str)
def test_every_byte_arrives(src: str, dst: str, shard: Any, tmp_path: Path) -> None:
    source = opened(tmp_path, src)
    plan = restow.plan(source, layout=dst, shard=restow.Shard(*shard) if shard else None)
    for dtype in (torch.bfloat16, torch.float32):
        (found, ours), (wanted, plain) = both(plan, source, dtype)
        assert differing(found, wanted) == []
        assert ours == plain


def test_experts_that_are_wanted_twice_are_read_once(tmp_path: Path) -> None:
    source = opened(tmp_path, "fused")
    experts = [3, 0, 3, 4, 3, 1, 0]
    like = {
        t.name: torch.empty(
            (len(experts), *t.shape[1:]) if "mlp" in t.name else t.shape, dtype=torch.bfloat16
        )
        for t in restow.plan(source, layout="grouped").targets
    }
    plan = restow.plan(source, like, experts=experts)
    assert len(list(plan.batches())) < len(plan.copies)
    (found, ours), (wanted, plain) = both(plan, source, torch.bfloat16)
    assert differing(found, wanted) == [] and ours == plain


def test_tensors_with_strides_and_offsets_of_their_own(tmp_path: Path) -> None:
    source = opened(tmp_path)
    plan = restow.plan(source)
    room: Tensors = {}
    for target in plan.targets:
        wide = [n + 1 for n in target.local_shape]
        whole = torch.full(wide, -1, dtype=torch.bfloat16)
        room[target.name] = whole[tuple(slice(1, None) for _ in wide)]
    device.run_on_device(plan, room, root=source.path, stamps={}, threads=2, lane=Memory)
    wanted = blank(plan, torch.bfloat16)
    run_plan(plan, wanted, root=source.path)
    assert differing({n: t.contiguous() for n, t in room.items()}, wanted) == []


@pytest.mark.parametrize("dst", ["grouped", "split"])
def test_experts_of_several_dtypes_are_each_read_in_their_own(dst: str, tmp_path: Path) -> None:
    """A checkpoint with such experts is warned of, not refused."""
    folder = SMALL.written(tmp_path, "split")
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        odd = [name for name in held if ".experts.1." in name or ".experts.3." in name]
        save_file({**held, **{name: held[name].float() for name in odd}}, file, {"format": "pt"})
    source = restow.open(folder)
    (problem,) = source.problems
    assert not problem.fatal and "experts of one module in one dtype" in str(problem.error)
    plan = restow.plan(source, layout=dst)
    for dtype in (torch.bfloat16, torch.float32):
        (found, ours), (wanted, plain) = both(plan, source, dtype)
        assert differing(found, wanted) == [] and ours == plain


# Packing.


def pieces_of(box: Packed) -> list[tuple[int, str, int, int, int]]:
    return [(share.slot, *piece) for share in box.shares for piece in share.pieces]


@pytest.mark.parametrize("dst", ["grouped", "fused"])
def test_neighbours_in_a_file_are_one_read_and_slots_are_full(dst: str, tmp_path: Path) -> None:
    model = Model(e=7, f=16, d=24, layers=3)
    source = opened(tmp_path, model=model)
    plan = restow.plan(source, layout=dst)
    tensors = blank(plan, torch.bfloat16)
    box = packed(plan, tensors, ROOM)
    assert [s.slot for s in box.shares] == sorted(s.slot for s in box.shares)
    runs = {file for _, file, *_ in pieces_of(box)}
    assert len(pieces_of(box)) <= len(box.slots) + len(runs), (
        "one read a slot, and one more where a file ends"
    )
    largest = model.f * model.d * 2
    assert all(slot.size > ROOM - largest - ALIGN for slot in box.slots[:-1])
    for _, file, begin, length, at in pieces_of(box):
        assert at % ALIGN == begin % ALIGN and at + length <= ROOM, file
    found = sorted((f, b, b + n) for _, f, b, n, _ in pieces_of(box))
    assert sum(e - b for _, b, e in found) == plan.bytes
    assert [slot.last for slot in box.slots[:-1]] == [slot.first for slot in box.slots[1:]]


def test_a_large_read_is_shared(tmp_path: Path) -> None:
    whole = {"model.embed_tokens.weight": torch.arange(5 * SHARE // 8).view(-1, 64)}
    save_file(whole, tmp_path / "model.safetensors")
    source = restow.open(tmp_path / "model.safetensors", family="qwen3_moe")
    into = {n: torch.empty_like(t) for n, t in whole.items()}
    box = packed(restow.plan(source, into), into, 4 * SHARE)
    sizes = [(share.slot, share.size) for share in box.shares]
    assert all(share.size == sum(length for _, _, length, _ in share.pieces) for share in box.shares)
    for (slot, size), (after, _) in pairwise(sizes):
        assert size == SHARE if slot == after else 0 < size <= SHARE
    assert sum(size for _, size in sizes) == 5 * SHARE and len(box.slots) == 2


def test_words_that_lie_askew_in_the_file_are_set_straight(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(40, dtype=torch.bfloat16), "b": torch.arange(30, dtype=torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    text = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(text[:8], "little")
    header = text[8 : 8 + length].rstrip() + b" "
    header += b" " * ((len(header) + 1) % 2)  # the data begins at an odd byte
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + text[8 + length :]
    )
    source = restow.open(tmp_path / "model.safetensors", family="qwen3_moe")
    plan = restow.plan(source, tensors)
    assert all(part.begin % 2 for part in plan.parts)
    found = painted(tensors)
    device.run_on_device(plan, found, root=source.path, stamps={}, threads=2, lane=Memory)
    assert differing(found, tensors) == []


# Turns.


def test_a_share_goes_only_into_a_slot_that_was_moved(tmp_path: Path) -> None:
    """The first share of all takes long: others come before it, some of them for the place that it still keeps busy."""
    source = opened(tmp_path, model=Model(e=8, f=12, d=16, layers=3))
    plan = restow.plan(source)
    tensors = blank(plan, torch.bfloat16)
    lane = Memory(torch.device("cpu"), trays=9, slots=2)
    job = slotwork.prepared(plan, tensors, lane.there, share=TRAY)
    shares = job.packed.shares
    assert len(job.packed.slots) > 6
    others, come = threading.Event(), count()

    def fill(pieces: Sequence[Piece], tray: memoryview) -> int:
        if pieces == shares[0].pieces:
            assert others.wait(10)
        elif next(come) == 7:
            others.set()
        return sum(length for _, _, length, _ in pieces)

    read, written = pump(job, lane, fill, threads=4)
    assert read == plan.bytes and sum(written.values()) * 2 == plan.written
    assert sorted(lane.sent) == sorted((one.slot % 2, one.slot // 2, one.at) for one in shares)
    assert shares[0].slot == 0 and lane.sent.index((0, 0, shares[0].at)) > 0
    assert sum(lane.moved) == len(job.packed.slots) and lane.finished == 1


def test_shares_fit_a_tray_with_the_gaps_between_their_pieces(tmp_path: Path) -> None:
    source = opened(tmp_path, model=Model(e=8, f=11, d=17, layers=3))
    plan = restow.plan(source, shard=restow.Shard("f", 1, 2))
    box = packed(plan, blank(plan, torch.bfloat16), ROOM, 600)
    assert any(len(share.pieces) > 1 for share in box.shares)
    for share in box.shares:
        first, last = share.pieces[0], share.pieces[-1]
        assert (share.at, share.size) == (first[3], last[3] + last[2] - first[3]) and share.size <= 600
    found = sorted((f, b, b + n) for share in box.shares for f, b, n, _ in share.pieces)
    assert sum(end - begin for _, begin, end in found) == plan.bytes


@pytest.mark.parametrize("threads", [1, 4])
def test_the_first_error_is_raised_and_all_threads_end(threads: int, tmp_path: Path) -> None:
    source = opened(tmp_path, model=Model(e=8, f=12, d=16, layers=3))
    plan = restow.plan(source)
    tensors = blank(plan, torch.bfloat16)
    lane = Memory(torch.device("cpu"))
    job = slotwork.prepared(plan, tensors, lane.there, share=TRAY)
    before = threading.active_count()

    def fill(pieces: Sequence[Piece], tray: memoryview) -> int:
        if pieces[0][1] == job.packed.shares[5].pieces[0][1]:
            raise OSError("the disk is gone")
        return sum(length for _, _, length, _ in pieces)

    with pytest.raises(OSError, match="the disk is gone"):
        pump(job, lane, fill, threads)
    assert threading.active_count() == before and lane.finished == 1


def test_an_error_while_sending_ends_the_readers_too(tmp_path: Path) -> None:
    source = opened(tmp_path, model=Model(e=8, f=12, d=16, layers=3))
    plan = restow.plan(source)
    tensors = blank(plan, torch.bfloat16)

    class Broken(Memory):
        def send(self, tray: int, size: int, slot: int, at: int) -> None:
            raise RuntimeError("no device")

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no device"):
        device.run_on_device(plan, tensors, root=source.path, stamps={}, threads=3, lane=Broken)
    assert threading.active_count() == before


def test_a_second_interrupt_does_not_leave_the_device_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots and tables may not be given back before the device has done with them."""
    source = opened(tmp_path, model=Model(e=8, f=12, d=16, layers=3))
    plan = restow.plan(source)
    lane = Memory(torch.device("cpu"))
    job = slotwork.prepared(plan, blank(plan, torch.bfloat16), lane.there, share=TRAY)
    pool: list[threading.Thread] = []

    def interrupted(thread: threading.Thread) -> None:
        pool.append(thread)
        raise KeyboardInterrupt

    def progress(done: int, whole: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pump(job, lane, lambda pieces, tray: sum(length for _, _, length, _ in pieces), 1, progress)
    monkeypatch.undo()
    assert lane.finished == 1 and len(pool) == 1
    pool[0].join(10)
    assert not pool[0].is_alive()


@pytest.mark.parametrize("threads", [0, -1, True])
def test_threads_are_judged_as_everywhere(
    threads: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = opened(tmp_path)
    into = blank(restow.plan(source), torch.bfloat16)
    monkeypatch.setattr(sys.modules["restow.torch.execute"], "on_one_device", lambda *_: True)
    with pytest.raises(UsageError) as caught:
        restow.load(source, into, threads=threads)
    assert str(caught.value) == f"expected threads as a whole number of at least 1, found {threads!r}"


def test_files_are_judged_as_everywhere(tmp_path: Path) -> None:
    source = opened(tmp_path)
    plan = restow.plan(source)
    file = tmp_path / plan.parts[0].file
    stamps = {plan.parts[0].file: (0, 0, file.stat().st_size, 0)}
    with pytest.raises(IntegrityError):
        device.run_on_device(
            plan, blank(plan, torch.bfloat16), root=source.path, stamps=stamps, threads=2, lane=Memory
        )
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(TruncatedFileError):
        device.run_on_device(
            plan, blank(plan, torch.bfloat16), root=source.path, stamps={}, threads=2, lane=Memory
        )


def test_progress_reaches_the_bytes_of_the_plan(tmp_path: Path) -> None:
    source = opened(tmp_path, model=Model(e=8, f=12, d=16, layers=3))
    plan = restow.plan(source)
    told: list[tuple[int, int]] = []
    device.run_on_device(
        plan, blank(plan, torch.bfloat16), root=source.path, stamps={}, threads=2, lane=Memory,
        progress=lambda done, whole: told.append((done, whole)),
    )  # fmt: skip
    assert told == sorted(told) and told[-1] == (plan.bytes, plan.bytes)


def test_a_plan_with_a_copy_left_out_is_found(tmp_path: Path) -> None:
    source = opened(tmp_path)
    plan = restow.plan(source)
    less = replace(plan, copies=plan.copies[1:])
    tensors = blank(plan, torch.bfloat16)
    lane = Memory(torch.device("cpu"))
    job = slotwork.prepared(less, tensors, lane.there, share=TRAY)
    _, written = pump(job, lane, lambda pieces, slot: 0, 1)
    assert sum(written.values()) * 2 < plan.written


# The table of transposes.


def test_launches_take_rows_of_one_slot_and_one_width() -> None:
    rows = np.array([[16 * i, 4096 + 32 * i, 8, 64, 64, 8] for i in range(5)], np.int64)
    rows[4, 0] += 2
    found = list(launches(rows, np.array([2, 2, 4, 2, 2]), np.array([0, 0, 0, 1, 1])))
    assert [(one.first, one.last, one.width, one.even) for one in found] == [
        (0, 2, 2, WORD), (2, 3, 4, WORD), (3, 5, 2, 2),
    ]  # fmt: skip
    assert [one.blocks for one in found] == [1, 1, 1]


def test_a_transpose_is_told_from_a_copy() -> None:
    assert matrix_of((3, 4), (4, 1), (4, 1)) is None
    assert matrix_of((12,), (1,), (1,)) is None
    found = matrix_of((2, 3, 4), (12, 4, 1), (100, 1, 5))
    assert found is not None and found[:4] == (3, 4, 4, 5) and found.places == [(0, 0), (12, 100)]


SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path[:0] = {paths!r}
import restow
from moe import Model, differing, painted
from restow.torch import device, slotwork
from restow.torch.across import usable
from restow.torch.on_device import moved_on_device
from restow.torch.pump import pump
import restow.torch.execute
executes = sys.modules['restow.torch.execute']
from restow.torch.read import run_plan
from test_device import TRAY, Memory, blank, opened

assert all(usable(torch.device("cpu"), width) for width in (1, 2, 4, 8))
launched = 0
for number, src in enumerate(("split", "fused", "grouped")):
    source = opened(Path({folder!r}) / src, src, Model(e=4, f=10, d=16, layers=1))
    for dst in ("grouped", "fused", "epfd"):
        for shard in (None, restow.Shard("d", 1, 2)):
            plan = restow.plan(source, layout=dst, shard=shard)
            found, wanted = blank(plan, torch.bfloat16), blank(plan, torch.bfloat16)
            lane = Memory(torch.device("cpu"))
            job = slotwork.prepared(plan, found, lane.there, 0, TRAY)
            with device.ExitStack() as stack:
                fill = device.filling(device.Files(stack, source.path, {{}}))
                read, written = pump(job, lane, fill, 2)
            run_plan(plan, wanted, root=source.path)
            assert differing(found, wanted) == [], (src, dst, shard)
            assert read == plan.bytes and sum(written.values()) * 2 == plan.written
            launched += sum(len(work.launches) for work in job.work)
            if (src, dst) == ("split", "grouped"):
                assert all(len(work.launches) == 1 for work in job.work[:-1]), "one launch a slot"
    if src == "split":  # one tensor per expert: no view says it
        state = {{n: t for n, t in Model(e=4, f=10, d=16, layers=1).spelled(src).items() if ".experts." in n}}
        wide = {{n: torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for n, t in state.items()}}
        wanted = restow.relayout(wide, dst="grouped", family="qwen3_moe")
        rest = []
        executes.moved_on_device = lambda *plan: rest.append(moved_on_device(*plan, 0)) or rest[-1]
        found = restow.relayout(wide, dst="grouped", family="qwen3_moe")
        assert differing(found, wanted) == [] and len(found) == 2
        assert [plan.copies for plan, _ in rest] == [()], "the kernel did all of it"
        into = painted(wanted)
        restow.load(wide, into, family="qwen3_moe", part=True)
        assert differing(into, wanted) == [] and rest[1][0].copies == (), "and of a load from memory"
print("launched", launched)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which torch for CUDA brings along")
def test_the_kernel_moves_what_torch_moves(tmp_path: Path) -> None:
    """In Triton's interpreter, in a process of its own: whether to interpret is settled when triton is imported."""
    paths = [str(Path(__file__).parent)]
    script = SCRIPT.format(paths=paths, folder=str(tmp_path))
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[-1]) > 10


def test_without_cuda_there_is_no_driver() -> None:
    driver.cache_clear()
    if torch.version.cuda is None:
        assert driver() is None
    else:
        assert driver() is None or all(call.restype is not None for call in driver() or ())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_driver_sends_what_torch_sends(tmp_path: Path) -> None:
    plan, found = restow.plan(opened(tmp_path, model=SMALL), layout="grouped"), []
    for lane in (device.Streams, device.streams):
        into = {name: tensor.cuda() for name, tensor in blank(plan, torch.bfloat16).items()}
        device.run_on_device(plan, into, root=str(tmp_path), stamps={}, threads=3, lane=lane)
        found.append({name: tensor.cpu() for name, tensor in into.items()})
    assert type(device.streams(torch.device("cuda", 0), 1, TRAY)) is device.Driven
    assert differing(*found) == []
    with pytest.raises(RuntimeError, match=r"^the CUDA driver says error \d+ to a copy to cuda:0$"):
        device.Driven(driver()._replace(copy=lambda *_: 1), torch.device("cuda", 0), 1, TRAY).send(0, 1, 0, 0)
