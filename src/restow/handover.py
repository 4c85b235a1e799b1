"""A folder whose headers were read, as plain values for another process of the same machine, and back.

The other process judges nothing again: what is wrong with the files was found where they were read. It rejects nothing.
"""

from __future__ import annotations

import pickle
from dataclasses import fields
from types import MappingProxyType
from typing import Any

from restow.folder import Folder
from restow.header import Header


def handed_over(folder: Folder) -> bytes:
    """The folder as bytes, for a process that trusts this one."""
    headers = [
        {f.name: dict(h.metadata) if f.name == "metadata" else getattr(h, f.name) for f in fields(Header)}
        for h in folder.headers
    ]
    rest = (folder.root, folder.problems, folder.index, dict(folder.index_metadata), folder._config)
    return pickle.dumps((headers, folder.tensors.columns(), rest))


def taken_over(data: bytes) -> Folder:
    """The folder that `handed_over` gave."""
    from restow.tensors import Tensors

    held, (rows, sharded), (root, problems, index, index_metadata, config) = pickle.loads(data)
    headers = tuple(Header(**_frozen(values)) for values in held)
    tensors = Tensors(headers, rows, sharded)
    return Folder(root, headers, tensors, problems, index, MappingProxyType(index_metadata), config)


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    return values | {"metadata": MappingProxyType(values["metadata"])}
