"""`restow.lora.convert`: an adapter's folder into another format's folder, exactly, published at once.

What is not of the experts goes along as it is, tensors, config fields and files. It rejects the bad adapters that
`adapter_read` names, formats that nobody knows, and destinations that `publish` rejects; then nothing is written.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from restow.adapter_base import Base, BaseLike, base_of
from restow.adapter_config import CONFIG, MODEL, config_text
from restow.adapter_formats import FORMATS, Faces, Format, era_of, format_of
from restow.adapter_orient import Options
from restow.adapter_read import read_adapter
from restow.adapter_result import NEWEST
from restow.adapter_stamp import KEY
from restow.errors import show
from restow.family import Family
from restow.outfiles import new_files
from restow.publish import Staging
from restow.sidefiles import side_files
from restow.torch.adapter_file import ORIGINALS, AdapterFile, bytes_of
from restow.torch.adapter_job import Job, make_job
from restow.torch.dtypes import dtype_name


@dataclass(frozen=True, slots=True)
class LoraReport:
    """What a conversion of an adapter did.

    `format` is the format that was written, `reader` the PEFT version that reads it where that matters; `converted` and
    `passed` count source tensors, which together are all of them; `faces` maps an experts module to the side that its
    fused lora_A faced and what decided it; `rounded` names modules whose values could not stay exact.
    """

    target: str
    format: str
    reader: str
    modules: int
    converted: int
    passed: int
    tensors: int
    bytes_written: int
    faces: Mapping[str, tuple[str, str]]
    rounded: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        reader = f", for PEFT {self.reader}" if self.reader else ""
        lines = [
            f"converted to {self.format}{reader}: {self.modules} experts modules, {self.converted:,} tensors converted, "
            f"{self.passed:,} taken along, {self.tensors:,} written ({self.bytes_written:,} bytes) "
            f"in {self.seconds:.1f} s"
        ]
        decided = {why for _, why in self.faces.values()}
        if decided:
            lines.append(f"  which side lora_A faces was decided by {', '.join(sorted(decided))}")
        if self.rounded:
            some = ", ".join(map(show, self.rounded[:3]))
            lines.append(
                f"  rounded (kept exact beside, for the way back): {some} ({len(self.rounded)} in all)"
            )
        lines += [f"  {note}" for note in self.notes[:20]]
        if len(self.notes) > 20:
            lines.append(f"  ... {len(self.notes) - 20} more")
        return "\n".join(lines)


def resolve(to: str, base: Base) -> tuple[Format, str]:
    """The format that a name means here, and the PEFT version that reads it: for `peft`, the one that is installed."""
    fmt = format_of(to, base.family)
    if to != "peft":
        eras = {"0.18": "0.17 to 0.18.1", "0.19.0": "0.19.0", "0.19.1": "0.19.1 or later"}
        return fmt, eras.get(fmt.era, "") if fmt.peft else ""
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return FORMATS["peft-0.19.1"], "0.19.1 or later (none is installed)"
    era = era_of(version) or "0.19.1"
    return FORMATS[f"peft-{era}"], f"{version}, which is installed"


def version_of(to: str) -> str | None:
    """The PEFT that is installed, else the newest known, where the format is for it."""
    if to != "peft":
        return None
    try:
        return importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        return NEWEST


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: str,
    base: BaseLike | Base | None = None,
    family: str | Family | None = None,
    faces: Faces | None = None,
    outer: str = "out",
    expert_major: bool | None = None,
    replace: bool = False,
) -> LoraReport:
    """Write the adapter in the folder `source` to the folder `target` in the format `to`.

    `to`: one of `restow.lora.formats`. `base`: the base model's folder (headers are read, no weights) or its config's;
    without it `family`, and what only a base can tell is not checked. `faces` ("input" or "output") says which side
    lora_A of PEFT's fused tensors faces where nothing in the file does; `outer` ("in") that down_proj was registered
    first; `expert_major` that lora_B was folded as Unsloth did before its marker. Raises `AdapterError` for whatever is
    wrong with the adapter, `UsageError` for an unknown format, and `DestinationError`s; then nothing is written.
    """
    started = time.perf_counter()
    with AdapterFile(source) as file:
        known = base_of(base, family, file.config.raw.get("base_model_name_or_path"))
        fmt, reader = resolve(to, known)
        adapter = read_adapter(file.shapes, file.config, known, Options(faces, outer, expert_major))
        version = version_of(to)
        job = make_job(
            adapter, known, fmt, file.stamp, file.get, file.dtypes, file.shapes, version, file.original
        )
        written = write(job, target, root=file.root, size=file.size, replace=replace)
        file.check()
    passed = len(job.passed)
    return LoraReport(
        target=os.fspath(target),
        format=to,
        reader=reader,
        modules=len(adapter.modules),
        converted=len(file.shapes) - passed,
        passed=passed,
        tensors=len(job.specs),
        bytes_written=written,
        faces=dict(adapter.faces),
        rounded=job.rounded,
        notes=job.notes,
        seconds=time.perf_counter() - started,
    )


def write(
    job: Job, target: str | os.PathLike[str], *, root: str | None = None, size: int = 0, replace: bool = False
) -> int:
    """Publish a conversion's result; `root` is the source's folder, whose other files come along."""
    metadata = {"format": "pt", KEY: job.stamp.text()}
    outs = [(MODEL, new_files(job.specs, 1 << 62, metadata)[0], job.tensors)]
    kept = (
        sorted((key, dtype_name(t.dtype), tuple(t.shape)) for key, t in job.originals())
        if job.rounded
        else []
    )
    if kept:
        outs.append((ORIGINALS, new_files(kept, 1 << 62, {})[0], job.originals))
    small = dict(side_files(root).files) if root is not None else {}
    small[CONFIG] = config_text(job.config)
    room = sum(out.size for _, out, _ in outs) + sum(map(len, small.values()))
    sources = [root] if root is not None else []
    with Staging(target, size=room, count=len(small) + 3, sources=sources, replace=replace) as staging:
        for name, out, tensors in outs:
            places = {t.name: t.begin for t in out.tensors}
            staging.create(name, out.size)
            staging.write(name, 0, out.head)
            for key, tensor in tensors():
                if tensor.numel():
                    staging.write(name, places[key], bytes_of(tensor.contiguous()))
        for name, data in small.items():
            staging.add(name, data)
        staging.finish({"source": {MODEL: size}} if root is not None else None)
    return outs[0][1].size
