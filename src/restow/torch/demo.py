"""`restow demo`: a checkpoint made on the spot, loaded whole and on two ranks, all checked, and one refusal.

A story for those who meet restow for the first time, told with nothing but the public verbs. It needs no
network, no port and about 1 GB of memory, and leaves nothing behind unless asked. Raises `IntegrityError` if
a value is wrong, `DestinationExistsError` rather than write over what is there.
"""

from __future__ import annotations

import json
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
from restow.errors import (
    DestinationExistsError,
    IntegrityError,
    PeerFailedError,
    PeerTimeoutError,
    RestowError,
    show,
)
from restow.layout import rows_text
from restow.named import GENERAL
from restow.opening import open_checkpoint
from restow.terminal import Answer, Line, failure, failure_text
from restow.torch import demo_model as m
from restow.torch.load import load, plan
from restow.torch.load_report import LoadReport
from restow.torch.threads import default_threads
from restow.wording import MARGIN, amount, field

WORLD = 2
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
            raise DestinationExistsError("none of the demo's files there", taken[0], path=keep, hint=hint)
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
    size = m.write_checkpoint(folder)
    opened = open_checkpoint(folder)
    module = next(iter(opened.modules.values()))
    data["checkpoint"] = {
        "bytes": size, "tensors": len(opened.tensors), "files": m.FILES, "layout": module.names[-1]
    }  # fmt: skip
    made = f"A Qwen3-MoE of {m.LAYERS} layers x {m.EXPERTS} experts, {amount(size)} in bfloat16"
    yield Line(f"{made}; every value follows from its name and place", "head")
    yield Line()
    text = f"{len(opened.tensors)} tensors in {m.FILES} files, one per expert and projection: the layout"
    yield field("on disk", f"{text} '{module.names[-1]}'")
    yield from _rows(rows_text(module.layout), (m.INNER, m.WIDTH), (m.WIDTH, m.INNER))
    text = f"{len(m.loaded_shapes())} tensors, two per layer for all its experts: the layout 'grouped'"
    yield field("in memory", text)
    shapes = (m.EXPERTS, m.WIDTH, 2 * m.INNER), (m.EXPERTS, m.INNER, m.WIDTH)
    yield from _rows(rows_text(GENERAL["grouped"]), *shapes)


def _rows(rows: tuple[str, ...], *shapes: tuple[int, ...]) -> Iterator[Line]:
    wide = max(map(len, rows))
    for row, shape in zip(rows, shapes, strict=True):
        yield Line(f"{MARGIN}{row:<{wide}}   {list(shape)}")


def _one_process(work: Path, keep: bool, data: dict[str, Any]) -> Iterator[Line]:
    model = _zeros("grouped")
    started = time.perf_counter()
    opened = open_checkpoint(work / "checkpoint")
    made = plan(opened, model)
    planned = time.perf_counter() - started
    yield Line()
    yield Line("restow.load(checkpoint, model), in one process", "head")
    text = f"{made.bytes:,} bytes in {len(made.reads)} reads; every element written once: proved"
    yield field("plan", f"{text} from the headers in {planned:.3f} s")
    seconds, report = _timed(opened, model)
    memcpy = _memcpy_seconds(report.bytes_written)
    yield field("loaded", _rate(report.bytes_read, seconds, memcpy))
    yield _checked(m.compared(model))
    if keep:
        save_file(model, work / "single.safetensors")
    del model
    fused = _zeros("fused")
    straight, _ = _timed(opened, fused)
    yield field("fused", _rate(report.bytes_read, straight, memcpy) + ", in the files' own order")
    yield _checked(m.compared(fused))
    how = f"best of {m.TIMES}, {default_threads()} threads; files in the page cache, memory touched before"
    yield field("measured", how)
    data["single"] = {
        "planned_bytes": made.bytes, "reads": len(made.reads), "read_bytes": report.bytes_read,
        "written_bytes": report.bytes_written, "in_place": len(report.in_place), "seconds": seconds,
        "fused_seconds": straight, "memcpy_seconds": memcpy, "plan_seconds": planned,
        "checked": sum(tensor.numel() for tensor in fused.values()),
    }  # fmt: skip


def _zeros(layout: str) -> dict[str, torch.Tensor]:
    return {n: torch.zeros(shape, dtype=torch.bfloat16) for n, shape in m.loaded_shapes(layout).items()}


def _timed(opened: Checkpoint, model: Mapping[str, torch.Tensor]) -> tuple[float, LoadReport]:
    best, report = float("inf"), None
    for _ in range(m.TIMES):
        for tensor in model.values():
            tensor.zero_()
        started = time.perf_counter()
        report = load(opened, model)
        best = min(best, time.perf_counter() - started)
    assert report is not None
    return best, report


def _rate(count: int, seconds: float, memcpy: float) -> str:
    rate = f"{amount(count)} in {seconds:.3f} s, {count / seconds / 1e9:.2f} GB/s"
    return f"{rate}: {memcpy / seconds:.2f} of memcpy ({count / memcpy / 1e9:.2f} GB/s)"


def _checked(result: tuple[int, list[str]]) -> Line:
    count, wrong = result
    _judge(wrong)
    text = f"{count:,} values, each against its own name and place: all right"
    return Line(field("checked", text).text, "good")


def _judge(wrong: list[str]) -> None:
    if wrong:
        raise IntegrityError(
            "values that follow from names and places",
            f"others in {len(wrong)} tensors",
            tensor=wrong[0],
            sections=[("tensors", map(show, wrong))],
            hint="this is a defect of restow: please report it",
        )


def _memcpy_seconds(size: int) -> float:
    """How long as many bytes take to be copied from memory to memory, by as many threads."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    before = torch.get_num_threads()
    best = float("inf")
    parts = list(zip(target.chunk(default_threads()), source.chunk(default_threads()), strict=True))

    def copy(to: torch.Tensor, of: torch.Tensor) -> None:
        torch.set_num_threads(1)
        to.copy_(of)

    for _ in range(m.TIMES):
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
    yield Line(f"the same call on {WORLD} ranks: experts are DTensors, Shard(0) on a mesh of {WORLD}", "head")
    ranks = _run_ranks(work, keep)
    for rank in ranks:
        _judge(rank["wrong"])
        first, last = rank["experts"]
        rate = rank["read_bytes"] / rank["seconds"] / 1e9
        text = f"experts {first}-{last}: {rank['read_bytes']:,} bytes in {rank['reads']} reads"
        yield field(f"rank {rank['rank']}", f"{text}, {rate:.2f} GB/s on one thread")
    experts = " + ".join(amount(rank["expert_bytes"]) for rank in ranks)
    yield field("read", f"{experts} of experts, each by one rank; all else by both; nothing was sent")
    yield _checked((sum(rank["checked"] for rank in ranks), []))
    data["ranks"] = ranks


def _run_ranks(work: Path, keep: bool) -> list[dict[str, Any]]:
    words = [sys.executable, "-m", "restow.torch.demo_rank", str(work / "checkpoint")]
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    processes: list[subprocess.Popen[str]] = []
    try:
        for i in range(WORLD):
            target = [str(work / f"rank-{i}.safetensors")] if keep else []
            argv = [*words, str(i), str(WORLD), str(work / "rendezvous"), *target]
            processes.append(subprocess.Popen(argv, stdin=null, stdout=pipe, stderr=pipe, text=True))
        ends = time.monotonic() + PATIENCE
        answers = [process.communicate(timeout=max(1.0, ends - time.monotonic())) for process in processes]
    except subprocess.TimeoutExpired as error:
        raise PeerTimeoutError(f"both ranks done in {PATIENCE} s", "one that is not") from error
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    for i, (process, (_, err)) in enumerate(zip(processes, answers, strict=True)):
        if process.returncode:
            said = err.splitlines()[-10:]
            found = f"exit code {process.returncode}"
            raise PeerFailedError("a rank that ends well", found, sections=[("stderr", said)], rank=i)
    return [json.loads(out.splitlines()[-1]) for out, _ in answers]


def _one_refusal(work: Path, data: dict[str, Any]) -> Iterator[Line]:
    yield Line()
    yield Line("and where one tensor is missing: before the first byte is read", "head")
    m.copy_headers(work / "checkpoint", work / "broken", m.LOST)
    broken = open_checkpoint(work / "broken")
    try:
        load(broken, _zeros("grouped"))
    except RestowError as error:
        data["refused"] = failure(error)
        for line in failure_text(error).splitlines():
            yield Line("  " + line, "warn")
    else:
        raise IntegrityError("an error for a missing tensor", "none", tensor=m.LOST)
