"""Adapters on experts: `convert` between folders, `relayout` in memory, `merge` into a base, `load`, `save`, `check`.

    restow.lora.convert("adapter/", "for-peft/", to="peft", base="base-model/")

`formats` lists what an adapter can be written as. Importing this module imports no torch.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

from restow.adapter_formats import FORMATS as _FORMATS

if _TYPE_CHECKING:
    from restow.torch.adapter_check import check as check
    from restow.torch.adapter_convert import LoraReport as LoraReport
    from restow.torch.adapter_convert import convert as convert
    from restow.torch.adapter_memory import load as load
    from restow.torch.adapter_memory import relayout as relayout
    from restow.torch.adapter_memory import save as save
    from restow.torch.adapter_merge import MergeReport as MergeReport
    from restow.torch.adapter_merge import merge as merge

formats = tuple(_FORMATS)

_PLACES = {
    "convert": "adapter_convert", "LoraReport": "adapter_convert", "relayout": "adapter_memory", "load": "adapter_memory",
    "save": "adapter_memory", "merge": "adapter_merge", "MergeReport": "adapter_merge", "check": "adapter_check",
}  # fmt: skip

__all__ = ["convert", "relayout", "merge", "load", "save", "check", "LoraReport", "MergeReport", "formats"]


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'restow.lora' has no attribute '{name}'")
    return getattr(_import_module(f"restow.torch.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
