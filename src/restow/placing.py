"""The names of a publication: the rename that publishes, and the rule that puts a killed one right.

Three names can hold a checkpoint: the destination, the staging folder and, where names cannot be exchanged,
the old one. `settle` knows what each combination means and leaves only the destination. Rejects a staging
name that is no folder, and an old one that holds files that are not ours.
"""

from __future__ import annotations

import os
from pathlib import Path

from restow import manifest, writing
from restow.destination import Place
from restow.errors import DestinationExistsError, show


def move(place: Place) -> str:
    """Publish where nothing is. Returned, here and below: what the user should be told, or nothing."""
    try:
        writing.rename_new(place.staging, place.path)
    except OSError as error:
        if error.errno not in writing.UNSUPPORTED:
            raise writing.refusal(error, "publish", place.path) from error
        # What appears after this look is replaced only if it is an empty folder: rename knows no other way.
        if os.path.lexists(place.path):
            found = "something that was not there at the start"
            raise DestinationExistsError("nothing at the destination", found, path=place.path) from error
        with writing.failures("publish", place.path):
            writing.rename(place.staging, place.path)
    return ""


def swap(place: Place) -> str:
    """Publish in exchange for what is there, which is then found at the staging name or the old one."""
    try:
        writing.exchange(place.staging, place.path)
    except OSError as error:
        if error.errno not in writing.UNSUPPORTED:
            raise writing.refusal(error, "publish", place.path) from error
    else:
        return ""
    with writing.failures("set aside", place.path):
        writing.rename(place.path, place.old)
    with writing.failures("publish", place.path):
        writing.rename(place.staging, place.path)
    return f"names cannot be exchanged here: {show(place.name)} was replaced by two renames"


def settle(place: Place) -> tuple[str, ...]:
    """Leave only the destination: give back what was set aside, remove the rest. Only under the lock."""
    notes = []
    _judge(place)
    if os.path.lexists(place.old) and not os.path.lexists(place.path):
        with writing.failures("give back", place.path):
            writing.rename(place.old, place.path)
        notes.append(f"gave {show(place.name)} back what an interrupted replacement had set aside")
    if leftovers(place):
        # One of them may be the replaced checkpoint: it goes once the rename that replaced it is on the disk.
        with writing.failures("sync", place.parent):
            writing.sync_folder(place.parent)
    return (*notes, *sweep(place))


def sweep(place: Place) -> tuple[str, ...]:
    """Remove what lies at the two hidden names."""
    notes = []
    for folder in leftovers(place):
        count = _remove(folder)
        notes.append(f"removed {show(folder.name)}, left by an earlier run ({count} files)")
    return tuple(notes)


def leftovers(place: Place) -> list[Path]:
    """Which of the two hidden names are taken."""
    return [folder for folder in (place.staging, place.old) if os.path.lexists(folder)]


def _judge(place: Place) -> None:
    hint = "restow keeps this name for itself: move it away"
    for folder in leftovers(place):
        if folder.is_symlink() or not folder.is_dir():
            raise DestinationExistsError("a folder there", "something else", path=folder, hint=hint)
    # The staging name says enough; `.old` is a name that others use too.
    if os.path.lexists(place.old) and (strangers := manifest.foreign(place.old)):
        lines = [("not ours", [show(name) for name in strangers])]
        found = "files that restow did not write"
        raise DestinationExistsError("nothing there", found, path=place.old, sections=lines, hint=hint)


def remove(path: Path) -> None:
    """Remove one thing of a staging folder."""
    if path.is_dir() and not path.is_symlink():
        _remove(path)
        return
    with writing.failures("remove", path):
        writing.unlink(path)


def _remove(folder: Path) -> int:
    # The manifest last: as long as a file is there, it says whose it is.
    count = 0
    with writing.failures("look into", folder):
        entries = sorted(folder.iterdir(), key=lambda path: (path.name == manifest.MANIFEST, path.name))
    for path in entries:
        if path.is_dir() and not path.is_symlink():
            count += _remove(path)
            continue
        with writing.failures("remove", path):
            writing.unlink(path)
        count += 1
    with writing.failures("remove", folder):
        writing.rmdir(folder)
    return count
