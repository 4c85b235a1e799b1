"""`restow demo`: a checkpoint made on the spot, loaded whole and on two ranks, every value checked, and one refusal.

A story for those who meet restow for the first time, told with nothing but the public verbs. It needs no network, no
port and about 1 GB of memory, and leaves nothing behind unless asked. Raises `IntegrityError` if a value is wrong,
`DestinationExistsError` rather than write over what is there.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from restow.checkpoint import Checkpoint
from restow.errors import DestinationExistsError, IntegrityError, PeerFailedError, RestowError, show
from restow.layout import rows_text
from restow.opening import open_checkpoint
from restow.terminal import Answer, Line, failure, failure_text
from restow.torch import demo_model
from restow.torch.load import load, plan
from restow.torch.read import default_threads
from restow.wording import amount, field

WORLD = 2
TIMES = 3  # a load and a copy are timed so often, the best counts
PATIENCE = 150  # seconds for the ranks


def demonstrate(keep: Path | None = None) -> Answer:
    """The demo as an answer whose lines come as the work is done. `keep` is where its files stay."""
    data: dict[str, Any] = {}
    return Answer(data, _story(keep, data))


def _story(keep: Path | None, data: dict[str, Any]) -> Iterator[Line]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        taken = [name for name in _kept() if (keep / name).exists()]
        if taken:
            hint = "give --keep a new folder, or remove what an earlier demo left there"
            raise DestinationExistsError(
                "nothing by the names of the demo's files", taken[0], path=keep, hint=hint
            )
    with tempfile.TemporaryDirectory(prefix=".restow-demo-", dir=keep) as made:
        work = Path(made)
        yield from _on_disk(work / "checkpoint", data)
        yield from _one_process(work, keep is not None, data)
        yield from _two_ranks(work, keep is not None, data)
        yield from _one_refusal(work, data)
        if keep is not None:
            for name in _kept():
                (work / name).rename(keep / name)
            data["kept"] = [str(keep / name) for name in _kept()]
            yield Line()
            yield field("kept", f"{', '.join(_kept())} in {show(keep)}")


def _kept() -> list[str]:
    return ["checkpoint", "single.safetensors", *(f"rank-{i}.safetensors" for i in range(WORLD))]


def _on_disk(folder: Path, data: dict[str, Any]) -> Iterator[Line]:
    m = demo_model
    size = m.write_checkpoint(folder)
    opened = open_checkpoint(folder)
    module = next(iter(opened.modules.values()))
    data["checkpoint"] = {
        "bytes": size,
        "tensors": len(opened.tensors),
        "files": m.FILES,
        "layout": module.names,
    }
    yield Line(f"A Qwen3-MoE of {m.LAYERS} layers x {m.EXPERTS} experts, {amount(size)} in bfloat16. Every value follows "
               "from its name and place.", "head")  # fmt: skip
    yield Line()
    yield field("on disk", f"{len(opened.tensors)} tensors in {m.FILES} files, one per expert and projection: the layout "
                f"'{module.names[-1]}'")  # fmt: skip
    yield from _rows(rows_text(module.layout), (m.INNER, m.WIDTH), (m.WIDTH, m.INNER))


def _rows(rows: tuple[str, ...], *shapes: tuple[int, ...]) -> Iterator[Line]:
    wide = max(map(len, rows))
    for row, shape in zip(rows, shapes, strict=True):
        yield Line(f"{'':13}{row:<{wide}}   {list(shape)}")


def _one_process(work: Path, keep: bool, data: dict[str, Any]) -> Iterator[Line]:
    m = demo_model
    model = {n: torch.zeros(shape, dtype=torch.bfloat16) for n, shape in m.loaded_shapes().items()}
    started = time.perf_counter()
    opened = open_checkpoint(work / "checkpoint")
    made = plan(opened, model)
    planned = time.perf_counter() - started
    from restow.named import GENERAL

    yield field(
        "in memory", f"{len(model)} tensors, two per layer for all experts: the layout '{made.layouts[0][2]}'"
    )
    yield from _rows(
        rows_text(GENERAL["grouped"]), (m.EXPERTS, m.WIDTH, 2 * m.INNER), (m.EXPERTS, m.INNER, m.WIDTH)
    )
    yield Line()
    yield Line("restow.load(checkpoint, model): one process", "head")
    yield field("plan", f"{made.bytes:,} bytes in {len(made.reads)} reads, made in {planned:.3f} s from headers alone; each "
                "element once, proved")  # fmt: skip
    best, report = float("inf"), None
    for _ in range(TIMES):
        for tensor in model.values():
            tensor.zero_()
        started = time.perf_counter()
        report = load(opened, model)
        best = min(best, time.perf_counter() - started)
    assert report is not None
    memcpy = _memcpy_seconds(report.bytes_written)
    rate, copy_rate = report.bytes_read / best / 1e9, report.bytes_written / memcpy / 1e9
    yield field("loaded", f"{amount(report.bytes_read)} in {best:.3f} s: {rate:.2f} GB/s, {rate / copy_rate:.2f} of memcpy "
                f"({copy_rate:.2f} GB/s)")  # fmt: skip
    yield Line(
        f"{'':13}same run, {default_threads()} threads, best of {TIMES}; files in the page cache, memory touched before"
    )
    yield _checked(model, data)
    data["single"] = {
        "planned_bytes": made.bytes, "reads": len(made.reads), "read_bytes": report.bytes_read,
        "written_bytes": report.bytes_written, "in_place": len(report.in_place), "seconds": best,
        "gb_per_second": rate, "memcpy_gb_per_second": copy_rate,
    }  # fmt: skip
    if keep:
        save_file(model, work / "single.safetensors")


def _checked(model: Mapping[str, torch.Tensor], data: dict[str, Any]) -> Line:
    count, wrong = demo_model.compared(model)
    _judge(wrong)
    data["checked"] = count
    return Line(
        field("checked", f"{count:,} values, each against its own name and place: all right").text, "good"
    )


def _judge(wrong: list[str]) -> None:
    if wrong:
        hint = "this is a defect of restow: please report it"
        raise IntegrityError("values that follow from names and places", f"others in {len(wrong)} tensors",
                             tensor=wrong[0], sections=[("tensors", map(show, wrong))], hint=hint)  # fmt: skip


def _memcpy_seconds(size: int) -> float:
    """How long as many bytes take to be copied from memory to memory, by as many threads."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    before = torch.get_num_threads()
    best = float("inf")
    parts = list(zip(target.chunk(default_threads()), source.chunk(default_threads()), strict=True))

    def copy(to: torch.Tensor, of: torch.Tensor) -> None:
        torch.set_num_threads(1)
        to.copy_(of)

    for _ in range(TIMES):
        pool = [threading.Thread(target=copy, args=part) for part in parts]
        started = time.perf_counter()
        for thread in pool:
            thread.start()
        for thread in pool:
            thread.join()
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return best


def _two_ranks(work: Path, keep: bool, data: dict[str, Any]) -> Iterator[Line]:
    yield Line()
    yield Line(f"the same call on {WORLD} ranks: experts as DTensors, Shard(0) on a mesh of {WORLD}", "head")
    ranks = _run_ranks(work, keep)
    for rank in ranks:
        _judge(rank["wrong"])
        rate = rank["read_bytes"] / rank["seconds"] / 1e9
        yield field(f"rank {rank['rank']}", f"experts {rank['experts'][0]}-{rank['experts'][1]}: {rank['read_bytes']:,} bytes in "
                    f"{rank['reads']} reads, {rate:.2f} GB/s on one thread")  # fmt: skip
    count = sum(rank["checked"] for rank in ranks)
    experts = [rank["expert_bytes"] for rank in ranks]
    yield field("read", f"{' + '.join(amount(n) for n in experts)} of experts: every expert by one rank, all else by both; "
                "nothing was sent")  # fmt: skip
    yield Line(field("checked", f"{count:,} values on the ranks: all right").text, "good")
    data["ranks"] = ranks


def _run_ranks(work: Path, keep: bool) -> list[dict[str, Any]]:
    import json

    words = [sys.executable, "-m", "restow.torch.demo_rank", str(work / "checkpoint")]
    processes: list[subprocess.Popen[str]] = []
    try:
        for i in range(WORLD):
            target = [str(work / f"rank-{i}.safetensors")] if keep else []
            argv = [*words, str(i), str(WORLD), str(work / "rendezvous"), *target]
            processes.append(
                subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        ends = time.monotonic() + PATIENCE
        answers = [process.communicate(timeout=max(1.0, ends - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    for i, (process, (out, err)) in enumerate(zip(processes, answers, strict=True)):
        if process.returncode:
            raise PeerFailedError("a rank that ends well", f"exit code {process.returncode}", rank=i,
                                  sections=[("stderr", err.splitlines()[-10:])])  # fmt: skip
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def _one_refusal(work: Path, data: dict[str, Any]) -> Iterator[Line]:
    yield Line()
    yield Line("and where one tensor is missing: before the first byte is read", "head")
    demo_model.copy_headers(work / "checkpoint", work / "broken", demo_model.LOST)
    broken: Checkpoint = open_checkpoint(work / "broken")
    model = {n: torch.empty(shape, dtype=torch.bfloat16) for n, shape in demo_model.loaded_shapes().items()}
    try:
        load(broken, model)
    except RestowError as error:
        data["refused"] = failure(error)
        for line in failure_text(error).splitlines():
            yield Line("  " + line, "warn")
    else:
        raise IntegrityError("an error for a missing tensor", "none", tensor=demo_model.LOST)
