"""What the benches share: the machine's line, GB/s, a table, a subprocess on chosen cores, sparse files, memory."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path


def machine() -> str:
    """One line that says where the numbers come from."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}, {versions}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table with aligned columns: the first left, the others right."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    wide = [max(len(row[i]) for row in cells) for i in range(len(head))]

    def line(row: Sequence[str]) -> str:
        rest = (cell.rjust(w) for cell, w in zip(row[1:], wide[1:], strict=True))
        return "| " + " | ".join([row[0].ljust(wide[0]), *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(wide)) + "|"
    return "\n".join([line(cells[0]), rule, *map(line, cells[1:])])


def verdicts(bars: Iterable[tuple[str, float, str, float]]) -> tuple[list[str], bool]:
    """Lines of (what, measured, ">=" or "<=" or "<", bar), and whether all hold."""
    lines, good = [], True
    for what, value, sign, bar in bars:
        holds = {">=": value >= bar, "<=": value <= bar, "<": value < bar}[sign]
        good = good and holds
        lines.append(f"{'pass' if holds else 'FAIL'}  {what}: {value:.3g} (bar: {sign} {bar:g})")
    return lines, good


def status(key: str) -> int:
    """Bytes of one line of this process's /proc status: VmRSS, VmHWM, RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def child(script: str, *arguments: object, env: Mapping[str, str] | None = None) -> dict[str, object]:
    """Run `python script arguments` and give back the JSON object on the last line that it prints."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed:\n{done.stdout}{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape


def sparse_checkpoint(
    folder: Path, tensors: Sequence[Tensor], shards: int, config: Mapping[str, object]
) -> int:
    """A checkpoint of true headers and an index over files that are one hole; the bytes that it claims to hold."""
    from math import prod

    width = {"BF16": 2, "F32": 4}
    folder.mkdir(parents=True, exist_ok=True)
    cuts = [i * len(tensors) // shards for i in range(shards + 1)]
    index: dict[str, str] = {}
    total = 0
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:06}.safetensors"
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, shape in tensors[cuts[number] : cuts[number + 1]]:
            begin, end = end, end + prod(shape) * width[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
            index[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        total += end
    listing = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2, sort_keys=True))
    (folder / "config.json").write_text(json.dumps(config))
    return total
