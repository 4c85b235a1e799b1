"""Reports of the verbs that read or write data, as the command line says them: their own text, and their fields."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from restow.problems import Problem
from restow.terminal import DIFFERENT, DONE, Answer, Line, finding

if TYPE_CHECKING:
    from restow.torch.adapter_check import CheckReport
    from restow.torch.adapter_convert import LoraReport
    from restow.torch.adapter_merge import MergeReport
    from restow.torch.convert_report import ConvertReport
    from restow.torch.verify_report import VerifyReport


def converted(report: ConvertReport, source: str, *, like: bool) -> Answer:
    """What a conversion did, and how to check it: against its source if that holds the same values."""
    lines = _lines(str(report))
    paths = map(shlex.quote, (source, report.target) if like else (report.target,))
    against = " ".join(paths) + ("" if like else "    (the source holds other values)")
    lines.append(Line(f"check it with: restow verify {against}"))
    return Answer(plain(report), lines)


def verified(report: VerifyReport) -> Answer:
    """What a comparison found; exit code 4 where something differs."""
    text = str(report).splitlines()
    lines = [Line(text[0], "good" if report.equal else "bad"), *map(Line, text[1:])]
    return Answer(plain(report), lines, DONE if report.equal else DIFFERENT)


def adapted(report: LoraReport | MergeReport) -> Answer:
    """What a conversion of an adapter, or a merge, did."""
    return Answer(plain(report), _lines(str(report)))


def checked(report: CheckReport) -> Answer:
    """What PEFT makes of an adapter; exit code 4 where it is not what the file means."""
    text = str(report).splitlines()
    lines = [Line(text[0], "good" if report.ok else "bad"), *map(Line, text[1:])]
    return Answer({**plain(report), "ok": report.ok}, lines, DONE if report.ok else DIFFERENT)


def _lines(text: str) -> list[Line]:
    head, *rest = text.splitlines()
    return [Line(head, "good"), *(Line(line, "warn" if "warning" in line else "") for line in rest)]


def plain(report: Any) -> dict[str, Any]:
    """A report's fields as values that JSON has."""
    return {item.name: _value(getattr(report, item.name)) for item in dataclasses.fields(report)}


def _value(value: Any) -> Any:
    if isinstance(value, Problem):
        return finding(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {str(key): _value(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_value(item) for item in value]
    return value
