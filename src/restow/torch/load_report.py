"""What a load says it did: a value, and its text. It rejects nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from restow.errors import (
    show,
)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. Sizes are in bytes; `seconds` is the whole call.

    `in_place` names the tensors that were written in their own storage; `staged` maps a name to why it was not;
    `narrowed` maps a name to the cast that lost precision; `unused` are source tensors without a place that were
    allowed, `missing` destinations that were left as they were because that was allowed. `bytes_taken` came from other
    ranks of the group that was given; they are among those written.
    """

    bytes_read: int
    bytes_written: int
    in_place: tuple[str, ...]
    staged: Mapping[str, str]
    narrowed: Mapping[str, str]
    unused: tuple[str, ...]
    missing: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: float
    modules: tuple[tuple[str, str, str], ...] = field(default=(), repr=False)
    bytes_taken: int = 0

    def __str__(self) -> str:
        rate = self.bytes_read / self.seconds / 1e9 if self.seconds else 0.0
        lines = [
            f"{len(self.in_place):,} tensors filled in place: {self.bytes_read:,} bytes read, "
            f"{self.bytes_written:,} written, {self.seconds:.2f} s ({rate:.1f} GB/s)"
        ]
        if self.bytes_taken:
            lines.append(f"  {self.bytes_taken:,} of the bytes written were read by other ranks")
        for label, names in (("staged", self.staged), ("narrowed", self.narrowed)):
            lines += [f"  {label} {show(name)}: {why}" for name, why in list(names.items())[:3]]
            if len(names) > 3:
                lines.append(f"  ... {len(names) - 3} more {label}")
        for label, listed in (("unused", self.unused), ("missing", self.missing)):
            if listed:
                more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
                lines.append(f"  {label}: {', '.join(map(show, listed[:3]))}{more}")
        lines += [f"  warning: {text}" for text in self.warnings]
        return "\n".join(lines)
