"""The files that a save will write, as a checkpoint without data: the plan that would load from them is its plan.

Here those of a checkpoint to be like; `outline_new` makes new ones. Either is made alike on every rank. Rejected are
checkpoints with fatal findings, and tensors in codes that encoding does not make.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from restow.checkpoint import Checkpoint
from restow.coded import CodedWeights, value_dtype
from restow.constants import constants_of
from restow.decoded import decoded
from restow.entries import Entry, Piece
from restow.errors import (
    ConfigError,
    IntegrityError,
    QuantizationError,
    UsageError,
    show,
)
from restow.family import Family
from restow.files import open_source, read_all
from restow.opening import open_checkpoint
from restow.outfiles import OutFile, recorded_files
from restow.packing import packed_weights
from restow.prepare import raise_fatal
from restow.problems import merged
from restow.sidefiles import side_files


@dataclass(frozen=True)
class Outline:
    """`files` and `side` are what will be written; `checkpoint` is what `restow.open` will see in them."""

    files: tuple[OutFile, ...]
    side: Mapping[str, bytes]
    checkpoint: Checkpoint
    like: str | None = None
    constants: Mapping[str, bytes] = field(default_factory=dict)  # tensors that follow from a codec alone

    def digest(self) -> str:
        """One text for all that is written but the values: ranks compare it."""
        state = sha256()
        for file in self.files:
            state.update(file.name.encode() + file.head)
        for name, data in sorted(self.side.items()):
            state.update(name.encode() + data)
        return state.hexdigest()

    @property
    def size(self) -> int:
        """Bytes that will be written."""
        return sum(file.size for file in self.files) + sum(map(len, self.side.values()))

    @property
    def count(self) -> int:
        """Files that will be written, with room for one to tell ranks by."""
        return len(self.files) + len(self.side) + 1


def entries_of(files: Sequence[OutFile]) -> dict[str, Entry]:
    """The tensors of files as entries, in the order of their bytes."""
    return {
        t.name: Entry(t.dtype, t.shape, (Piece(tuple((0, n) for n in t.shape), file.name, t.begin, t.end),))
        for file in files
        for t in file.tensors
    }


def like_path(like: str | os.PathLike[str] | Checkpoint | None) -> str | None:
    """Where the checkpoint to be like lies. Raises `UsageError` for one in memory, which has no files."""
    if not isinstance(like, Checkpoint):
        return os.fspath(like) if like is not None else None
    if like.path is None:
        raise UsageError("a checkpoint in files as like=", "one in memory")
    return like.path


def like_opened(like: str | os.PathLike[str] | Checkpoint, family: Family | None) -> Checkpoint:
    """The checkpoint to be like: one that is open as it was opened, unless another family is said now."""
    if isinstance(like, Checkpoint) and family in (None, like.family):
        return like
    path = like_path(like)
    assert path is not None
    return open_checkpoint(path, family=family)


def like_outline(like: Checkpoint) -> Outline:
    """The very files of another checkpoint: heads, index, side files; in its codes.

    Raises what is fatal about it, and `IntegrityError` for a file that was written again since it was opened.
    """
    raise_fatal(like)
    fatal = [problem.error for problem in like.problems if problem.fatal]
    if fatal:
        raise merged(fatal)
    assert like.path is not None
    same = _constants(like)
    heads = {}
    for name in like.stamps:
        with open_source(Path(like.path) / name) as file:
            if file.stamp != like.stamps[name]:
                raise IntegrityError("a checkpoint that stays as it was", "another file", path=file.path)
            length = file.pread(0, 8)
            heads[name] = length + file.pread(8, int.from_bytes(length, "little"))
    side = dict(side_files(like.path).files)
    for index in sorted(Path(like.path).glob("*.safetensors.index.json")):
        side[index.name] = read_all(index, 1 << 29, what="an index", refuse=UsageError)
    return Outline(recorded_files(heads, like.path), side, like, like.path, same)


def _constants(like: Checkpoint) -> dict[str, bytes]:
    """The tensors of a checkpoint in codes that always hold the same. Raises for codes that encoding does not make."""
    view = decoded(like)
    if not isinstance(view.coded, CodedWeights):
        return {}
    weights = packed_weights(view).values()
    same = constants_of(like.modules, value_dtype(like.config))
    made = {name for one in weights for name in (one.codes, one.scale)} | same.keys()
    other = [name for name in view.coded.gone if name not in made]
    if other:
        raise QuantizationError(
            "a checkpoint of weights, codes and scales as like=",
            f"{len(other)} other tensors beside them",
            path=like.path,
            tensor=other[0],
            sections=[("tensors", map(show, sorted(other)))],
            hint="save without like=, or like a checkpoint that was decoded (restow.convert)",
        )
    return {name: one.data for name, one in same.items()}


def config_bytes(config: object) -> bytes | None:
    """The text of a config.json: of a config of transformers as it would write it, of a dict, or at a path."""
    text = getattr(config, "to_json_string", None)
    if callable(text):
        return str(text()).encode()
    if isinstance(config, Mapping):
        return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if isinstance(config, str | os.PathLike):
        return read_all(config, 1 << 24, what="a config.json", refuse=ConfigError)
    if config is not None:
        raise UsageError("config= as a config of transformers, a dict or a path", type(config).__name__)
    return None
