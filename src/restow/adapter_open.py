"""An adapter's folder without its tensors: its config and the header of its file, and both judged against a base.

Rejects what `header` and `adapter_read` reject, folders in the making, and folders without `adapter_config.json` or
`adapter_model.safetensors`, and factors that are no floats, by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from restow.adapter_base import Base, BaseLike, base_of
from restow.adapter_config import MODEL, AdapterConfig, read_adapter_config
from restow.adapter_orient import Options
from restow.adapter_read import read_adapter
from restow.adapter_scope import judge_factors
from restow.errors import AdapterError, RestowError
from restow.family import Family
from restow.files import SourceFile, open_source
from restow.header import Header, read_header
from restow.selection import judge_finished


class AdapterHead(NamedTuple):
    """What is known of an adapter before a tensor is read; `source` is its file, open."""

    root: str
    config: AdapterConfig
    source: SourceFile
    header: Header

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.header.names, self.header.shapes, strict=True))


@contextmanager
def open_adapter(folder: str | os.PathLike[str]) -> Iterator[AdapterHead]:
    """The config and the header of the adapter in `folder`; inside, its file stays open."""
    root = os.fspath(folder)
    config = read_adapter_config(root)
    judge_finished(root)
    try:
        source = open_source(Path(root) / MODEL)
    except RestowError as error:
        hint = "an adapter in another format (adapter_model.bin) is saved again with safetensors"
        raise AdapterError(MODEL, error.found, path=Path(root) / MODEL, hint=hint) from None
    with source:
        header = read_header(source)
        judge_factors(dict(zip(header.names, header.dtypes, strict=True)), source.path)
        yield AdapterHead(root, config, source, header)


def judge_adapter(
    folder: str | os.PathLike[str], base: BaseLike | None, family: str | Family | None, options: Options
) -> Base:
    """The base of an adapter that passes every judgement that needs no tensor; raises the first that does not."""
    with open_adapter(folder) as head:
        known = base_of(base, family, head.config.raw.get("base_model_name_or_path"))
        read_adapter(head.shapes, head.config, known, options)
    return known
