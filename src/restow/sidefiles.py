"""The files beside the weights that a conversion takes along: by an allow list, regular files only, never code.

It rejects nothing: what is left behind is named, so that the report can say it.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from restow.errors import RestowError
from restow.files import names, read_all
from restow.manifest import MANIFEST

ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".vocab", ".bpe", ".md")
NAMES = ("LICENSE", "NOTICE", "merges", "vocab")
LIMIT = 1 << 30  # bytes of one side file
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


class SideFiles(NamedTuple):
    """Contents by name, and the names left behind (code, other weights, folders, links to nowhere)."""

    files: dict[str, bytes]
    left: tuple[str, ...]


def side_files(root: str, weights: Collection[str] = ()) -> SideFiles:
    """What lies beside the `weights` of a checkpoint's folder; their index is no side file and comes with them."""
    folder = Path(root)
    kept: dict[str, bytes] = {}
    left: list[str] = []
    if not folder.is_dir():
        return SideFiles({}, ())
    for name in names(folder):
        if name == MANIFEST or name in weights or name.endswith(".safetensors.index.json"):
            continue
        path = folder / name
        allowed = name.endswith(ENDINGS) or name.split(".")[0] in NAMES
        allowed = allowed and not name.endswith((".index.json", *WEIGHTS))
        if not allowed or not path.is_file():
            left.append(name)
            continue
        try:
            kept[name] = read_all(path, LIMIT, what="a side file", refuse=RestowError)
        except RestowError:
            left.append(name)
    return SideFiles(kept, tuple(left))
