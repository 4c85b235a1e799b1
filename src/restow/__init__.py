"""restow re-stows the weights of Mixture-of-Experts models between the layout a checkpoint has on disk and the layout a
model has in memory: in place, exactly, both ways.

    report = restow.load("checkpoint/", model)        # any hub layout, into the model's own storage
    plan = restow.plan("checkpoint/", model)          # what that would read and write, without doing it

Importing this module imports neither torch nor numpy: names are looked up when they are first used.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from restow import errors as errors
    from restow.checkpoint import Checkpoint as Checkpoint
    from restow.family import Family as Family
    from restow.known import FAMILIES as families
    from restow.layout import Layout as Layout
    from restow.named import GENERAL as layouts
    from restow.opening import open_checkpoint as open
    from restow.plans import Plan as Plan
    from restow.targets import Shard as Shard
    from restow.torch.convert import convert as convert
    from restow.torch.convert_report import ConvertReport as ConvertReport
    from restow.torch.disk_order import empty_like_disk as empty_like_disk
    from restow.torch.fingerprint import fingerprint as fingerprint
    from restow.torch.load import load as load
    from restow.torch.load import plan as plan
    from restow.torch.load_report import LoadReport as LoadReport
    from restow.torch.relayout import relayout as relayout
    from restow.torch.save import SaveReport as SaveReport
    from restow.torch.save import save as save
    from restow.torch.verify import verify as verify
    from restow.torch.verify_report import VerifyReport as VerifyReport

_PLACES = {
    "Checkpoint": ("restow.checkpoint", "Checkpoint"),
    "ConvertReport": ("restow.torch.convert_report", "ConvertReport"),
    "Family": ("restow.family", "Family"),
    "Layout": ("restow.layout", "Layout"),
    "LoadReport": ("restow.torch.load_report", "LoadReport"),
    "Plan": ("restow.plans", "Plan"),
    "SaveReport": ("restow.torch.save", "SaveReport"),
    "Shard": ("restow.targets", "Shard"),
    "VerifyReport": ("restow.torch.verify_report", "VerifyReport"),
    "convert": ("restow.torch.convert", "convert"),
    "empty_like_disk": ("restow.torch.disk_order", "empty_like_disk"),
    "errors": ("restow.errors", ""),
    "families": ("restow.known", "FAMILIES"),
    "fingerprint": ("restow.torch.fingerprint", "fingerprint"),
    "layouts": ("restow.named", "GENERAL"),
    "dcp": ("restow.dcp", ""),
    "load": ("restow.torch.load", "load"),
    "lora": ("restow.lora", ""),
    "open": ("restow.opening", "open_checkpoint"),
    "plan": ("restow.torch.load", "plan"),
    "relayout": ("restow.torch.relayout", "relayout"),
    "save": ("restow.torch.save", "save"),
    "verify": ("restow.torch.verify", "verify"),
}

__all__ = [
    "open", "plan", "load", "save", "relayout", "convert", "verify", "fingerprint", "empty_like_disk", "lora", "dcp",
    "Checkpoint", "Plan", "LoadReport", "SaveReport", "ConvertReport", "VerifyReport", "Layout", "Family", "Shard",
    "layouts", "families", "errors",
]  # fmt: skip
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _PLACES:
        raise AttributeError(f"module 'restow' has no attribute '{name}'")
    module, attribute = _PLACES[name]
    found = _import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
