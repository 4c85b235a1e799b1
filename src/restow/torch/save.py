"""`restow.save`: a sharded model to files that anyone can load; every rank writes its own bytes, nothing is gathered.

What the files will hold is laid out first, on every rank alike; the plan that would load this model from them is then
run the other way. It rejects state that has no place in the files, files that no rank fills, and what `publish`
rejects.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from restow.checkpoint import Checkpoint
from restow.encodings import encoding_of
from restow.errors import UsageError, show
from restow.family import Family
from restow.layout import Layout
from restow.naming import Rename, check_rename
from restow.opening import family_of
from restow.targets import Shard
from restow.torch.dtypes import dtype_name
from restow.torch.holdings import holding_of
from restow.torch.outline import Outline, config_bytes, like_opened, like_outline, like_path
from restow.torch.outline_new import new_outline
from restow.torch.peers import Peers
from restow.torch.read import Progress
from restow.torch.still import check_still, versions
from restow.torch.storage import Into, Slot, memory_of, slot_of, tensors_of
from restow.torch.together import Job, Saved, Union, save_together


@dataclass(frozen=True, slots=True)
class SaveReport:
    """What a save did. Sizes are in bytes; `bytes_written` is this rank's own, `bytes_total` all ranks'.

    `narrowed` maps a tensor of the state to the cast that lost precision in the files.
    """

    path: str
    files: int
    tensors: int
    bytes_written: int
    bytes_total: int
    narrowed: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes_total / self.seconds / 1e9 if self.seconds else 0.0
        text = (
            f"saved {self.tensors:,} tensors in {self.files} file{'s' if self.files != 1 else ''} at "
            f"{show(self.path)}: {self.bytes_total:,} bytes, "
            f"{self.bytes_written:,} of them from here, {self.seconds:.2f} s ({rate:.2f} GB/s)"
        )
        if self.narrowed:
            name, cast = next(iter(self.narrowed.items()))
            text += f"\n  narrowed {len(self.narrowed)} tensors, such as {show(name)}: {cast}"
        return "\n".join([text, *(f"  {note}" for note in self.notes)])


class SaveHandle:
    """A save that goes on while its caller trains: the state was copied before `save` returned.

    `buffers` are the copies, by name; give the handle to the next save (`reuse=`) and it copies into these again.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor]) -> None:
        self.buffers = MappingProxyType(dict(buffers))
        self._report: SaveReport | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def staged(self) -> bool:
        """Whether the state was copied, so that it may be changed; true once `save` has returned."""
        return True

    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._thread is not None and not self._thread.is_alive()

    def result(self, timeout: float | None = None) -> SaveReport:
        """The report, once published; raises what the save raised, `TimeoutError` after `timeout` seconds."""
        assert self._thread is not None
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the save was not done after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._report is not None
        return self._report


def save(
    state: Into,
    path: str | os.PathLike[str],
    *,
    layout: str | Layout | None = None,
    family: str | Family | None = None,
    like: str | os.PathLike[str] | Checkpoint | None = None,
    rename: Rename = (),
    shard: Shard | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    config: object = None,
    max_shard_bytes: int = 5 * 2**30,
    replace: bool = False,
    group: dist.ProcessGroup | None = None,
    wait: bool = True,
    reuse: SaveHandle | None = None,
    page_bytes: int | None = None,
    threads: int | None = None,
    progress: Progress | bool | None = None,
) -> SaveReport | SaveHandle:
    """Write `state` (a module, a list of them, or names to tensors and DTensors) to a Hugging Face folder.

    `like` is a checkpoint whose layout, names, file map, headers, dtypes and side files are reproduced; without it the
    layout is `layout`, else what the family's vendor ships. `rename` is what a load from these files takes, applied
    backwards. `shard` says which part plain expert tensors hold. `dtype` is that of the files' floating tensors, rows
    that must stay exact apart; without `like` and `dtype` it is the state's. `quantize` encodes the experts' weights as
    `restow.convert` does; what a rank holds must be whole blocks. `config` is what becomes config.json: a
    config of transformers, a dict or a path; the state's own if it has one. Ranks with the same part write it once.
    `wait=False` copies the state to host memory and returns a `SaveHandle`; `reuse` is an earlier handle, done by now,
    whose buffers are taken again. `page_bytes` is the unit of a file that only one node may write, by the file system's
    type if None (0: none). `group` is that of all ranks that hold the model: the default one where DTensors are, else
    this process alone.

    Raises `IntegrityError` if the state was written to meanwhile, as far as torch counts that.
    Raises on every rank if any rank fails (`PeerFailedError`, `PeerTimeoutError` there); the old checkpoint is then as
    it was.
    """
    started = time.perf_counter()
    spread = (
        shard is not None or group is not None or any(isinstance(t, DTensor) for _, t, _ in tensors_of(state))
    )
    peers = Peers(group, alone=not spread)
    with ExitStack() as stack:
        stack.enter_context(peers.attempt())
        if like is not None and not (
            layout is None and dtype is None and config is None and quantize is None
        ):
            raise UsageError("like= alone", "layout=, dtype=, quantize= or config= with it")
        encoding = encoding_of(quantize) if quantize is not None else None
        check_rename(rename)
        known, model = family_of(family), like_path(like)
        buffers: Mapping[str, torch.Tensor] = {}
        slots = _slots(state)
        held = {name: slot.local for name, slot in slots.items()}
        before = versions(held)
        holding = holding_of(slots, shard, {
            "path": os.path.abspath(path),  # noqa: PTH100 - a text to compare, nothing to look up
            "like": model or "", "layout": str(layout or ""),
            "family": known.model_types[0] if known else "", "rename": repr(rename), "dtype": str(dtype or ""),
            "max_shard_bytes": str(max_shard_bytes), "replace": str(replace), "page_bytes": str(page_bytes),
            "quantize": str(quantize or ""),
        })  # fmt: skip
        if not wait:
            buffers = _copied(slots, reuse)
            check_still(held, before)
            held = {}
            slots = {name: slot._replace(local=buffers[name]) for name, slot in slots.items()}
        text = config_bytes(getattr(state, "config", None) if config is None and like is None else config)

        def lay_out(union: Union) -> Outline:
            if like is not None:
                return like_outline(like_opened(like, known))
            name = dtype_name(dtype) if dtype is not None else None
            return new_outline(
                union.tensors, union.tied, union.shard, layout, known, rename, name, max_shard_bytes, text,
                encoding,
            )  # fmt: skip

        bar = (
            _bar() if progress is True and peers.rank == 0 else None if progress is True else progress or None
        )
        still = partial(check_still, held, before if held else {})
        job = Job(slots, path, lay_out, rename, shard, replace, page_bytes, threads, bar, still)
        if wait:
            return _report(save_together(job, holding, peers), path, started)
        rest = stack.pop_all()
    handle = SaveHandle(buffers)

    def run() -> None:
        try:
            with rest:
                handle._report = _report(save_together(job, holding, peers), path, started)
        except BaseException as error:
            handle._error = error

    handle._thread = threading.Thread(target=run, name="restow save", daemon=False)
    handle._thread.start()
    return handle


def _slots(state: Into) -> dict[str, Slot]:
    """Every tensor that is saved, further names of the same memory included."""
    slots: dict[str, Slot] = {}
    for name, tensor, kept in tensors_of(state):
        if kept and name in slots:
            raise UsageError(f"one tensor by the name {show(name)}", "two in the state given")
        if kept:
            slots[name] = slot_of(name, tensor)
    return slots


def _copied(slots: Mapping[str, Slot], reuse: SaveHandle | None) -> dict[str, torch.Tensor]:
    """The local parts in host memory, each memory once, in the buffers of an earlier save where they fit."""
    if reuse is not None and not reuse.done():
        raise UsageError("reuse= of a save that is done", "one that still writes from its buffers")
    old = reuse.buffers if reuse is not None else {}
    out: dict[str, torch.Tensor] = {}
    seen: dict[object, str] = {}
    with torch.inference_mode(False):  # buffers made in it could not be taken again outside
        for name, slot in slots.items():
            memory = memory_of(slot.local)
            if memory is not None and seen.setdefault(memory, name) != name:
                out[name] = out[seen[memory]]
                continue
            kept = old.get(name)
            if kept is None or kept.shape != slot.local.shape or kept.dtype != slot.local.dtype:
                kept = torch.empty(slot.local.shape, dtype=slot.local.dtype, pin_memory=slot.local.is_cuda)
            out[name] = kept.copy_(slot.local)
    return out


def _report(saved: Saved, path: str | os.PathLike[str], started: float) -> SaveReport:
    return SaveReport(
        path=os.fspath(path),
        files=len(saved.outline.files),
        tensors=len(saved.outline.checkpoint.tensors),
        bytes_written=saved.written,
        bytes_total=sum(file.size - len(file.head) for file in saved.outline.files),
        narrowed=MappingProxyType(dict(saved.narrowed)),
        notes=saved.notes,
        seconds=time.perf_counter() - started,
    )


def _bar() -> Progress:
    from restow.progress import bar

    return bar("saving")
