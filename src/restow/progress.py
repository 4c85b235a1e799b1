"""A progress bar in the terminal, as a callable that takes bytes done and bytes in all. Rejects nothing."""

from __future__ import annotations

from collections.abc import Callable


def bar(what: str) -> Callable[[int, int], None]:
    """A bar that begins at the first call and ends when all bytes are done."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    shown = Progress(TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), transient=True)
    task = shown.add_task(what)

    def advance(done: int, total: int) -> None:
        shown.start()
        shown.update(task, completed=done, total=total or 1)
        if done >= total:
            shown.stop()

    return advance
