"""An adapter's folder: its config, the header of its tensors, and single tensors read when they are asked for.

Rejects what `adapter_open` rejects.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from restow.adapter_config import AdapterConfig
from restow.adapter_open import open_adapter
from restow.adapter_stamp import Stamp, read_stamp
from restow.errors import IntegrityError
from restow.files import SourceFile, open_source
from restow.header import Header, read_header
from restow.torch.dtypes import torch_dtype

ORIGINALS = "restow_unscaled.safetensors"


class AdapterFile:
    """An open adapter: `with AdapterFile(folder) as file: file.get(name)`."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._stack = ExitStack()
        self._head = self._stack.enter_context(open_adapter(folder))
        self.root = self._head.root
        self.config: AdapterConfig = self._head.config
        self.header: Header = self._head.header
        self._source = self._head.source
        self._kept: dict[str, torch.Tensor] | None = None
        self._rows = {name: i for i, name in enumerate(self.header.names)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._head.shapes

    @property
    def dtypes(self) -> dict[str, str]:
        return dict(zip(self.header.names, self.header.dtypes, strict=True))

    @property
    def stamp(self) -> Stamp:
        return read_stamp(self.header.metadata)

    @property
    def stamps(self) -> list[object]:
        """What tells this adapter's tensors from another's: the file's identity."""
        return list(self._source.stamp)

    @property
    def size(self) -> int:
        return self.header.size

    def get(self, name: str) -> torch.Tensor:
        """One tensor, read now."""
        return _tensor(self._source, self.header, self._rows[name])

    def original(self, key: str) -> torch.Tensor | None:
        """B as it was before a scale was multiplied into it, where a conversion kept it beside the adapter."""
        path = Path(self.root) / ORIGINALS
        if self._kept is None:
            self._kept = {}
            if path.is_file() and self.stamp.folded:
                with open_source(path) as source:
                    header = read_header(source)
                    for row, name in enumerate(header.names):
                        self._kept[name] = _tensor(source, header, row)
        return self._kept.get(key)

    def check(self) -> None:
        """Raise `IntegrityError` if the file has changed since it was opened."""
        if self._source.changed():
            raise IntegrityError("an adapter that stays as it was", "another file", path=self._source.path)


def _tensor(source: SourceFile, header: Header, row: int) -> torch.Tensor:
    tensor = torch.empty(header.shapes[row], dtype=torch_dtype(header.dtypes[row]))
    if tensor.numel():
        source.preadv(header.begins[row], [bytes_of(tensor)])
    return tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    view: object = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(view)  # type: ignore[arg-type]
