"""What `restow.convert` says it did: a frozen value, and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from restow.errors import show


@dataclass(frozen=True, slots=True)
class ConvertReport:
    """What a conversion did: sizes in bytes, `seconds` for the whole call, the disk's sync included.

    `narrowed` maps a tensor to the cast that lost precision; `left_behind` are files of the source that were not
    taken along; `notes` is what the user should be told.
    """

    target: str
    layout: str
    files: int
    tensors: int
    bytes_read: int
    bytes_written: int
    narrowed: Mapping[str, str]
    left_behind: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    seconds: float

    def __str__(self) -> str:
        rate = self.bytes_written / self.seconds / 1e9 if self.seconds else 0.0
        lines = [
            f"converted to {self.layout}: {self.tensors:,} tensors, {self.bytes_written:,} bytes in "
            f"{self.files} file{'s' if self.files != 1 else ''} at {show(self.target)}, {self.seconds:.1f} s ({rate:.2f} GB/s)"
        ]
        if self.narrowed:
            name, cast = next(iter(self.narrowed.items()))
            lines.append(f"  narrowed {len(self.narrowed)} tensors, such as {show(name)}: {cast}")
        if self.left_behind:
            lines.append(f"  left behind: {', '.join(map(show, self.left_behind))}")
        lines += [f"  warning: {text}" for text in self.warnings]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)
