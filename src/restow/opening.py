"""`restow.open`: a path to a `Checkpoint`: headers, index and config, and the layout of every experts module. No data.

What makes it no checkpoint at all (files, index, pickles, ranks) is raised; what is wrong with its tensors, config or
quantisation is in `.problems`, so that `inspect` can show a broken checkpoint and `verify` compare one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from restow.checkpoint import Checkpoint, survey
from restow.codec import Announced, read_codec
from restow.errors import ConfigError, RestowError, UnsupportedFamilyError, UsageError, show
from restow.family import Family
from restow.folder import Folder, open_folder
from restow.judge import judge
from restow.known import FAMILIES
from restow.landing import layout_of
from restow.layout import Layout
from restow.located import located
from restow.problems import Problem
from restow.selection import ADAPTER
from restow.stated import stated_layout


def family_of(family: str | Family | None) -> Family | None:
    """A family by model type, or as it is. Raises `UnsupportedFamilyError` for a model type nobody told us about."""
    if family is None or isinstance(family, Family):
        return family
    if not isinstance(family, str):
        raise UsageError("a model type, or a restow.Family, as family=", type(family).__name__)
    if family not in FAMILIES:
        raise _unknown(family, {})
    return FAMILIES[family]


def open_checkpoint(
    path: str | os.PathLike[str], *, layout: str | Layout | None = None, family: str | Family | None = None
) -> Checkpoint:
    """Open a folder or a file. `layout` and `family` say what config.json does not, and win over it.

    Raises the file, index, pickle and rank errors of `restow.errors`; everything else is in `.problems`.
    """
    return read_as(open_folder(path), layout=layout, family=family)


def read_as(
    folder: Folder, *, layout: str | Layout | None = None, family: str | Family | None = None
) -> Checkpoint:
    """A folder whose headers were read as a checkpoint: see `open_checkpoint`."""
    problems = list(folder.problems)
    config: Mapping[str, Any] | None = None
    known = family_of(family)
    try:
        config = folder.config
    except ConfigError as error:
        problems.append(Problem(error, True))
    else:
        if known is None:
            known, doubt = by_config(config, folder.root)
            if config is None and [header.file for header in folder.headers] == [ADAPTER]:
                doubt = adapter_of(folder.root)
            if doubt is not None and layout is None:
                problems.append(Problem(doubt, True))
    given = family is not None or layout is not None
    codec: Announced | None = None
    try:
        codec = read_codec(config)
    except RestowError as error:
        problems.append(Problem(error, True))
    shared: dict[str, Any] = {
        "codec": codec,
        "path": folder.root,
        "given": given,
        "layout": layout_of(layout, known),
    }
    try:
        shared["stated"] = stated_layout(folder.metadata)
    except RestowError as error:
        problems.append(Problem(error, layout is None))
    shared["stamps"] = {header.file: header.stamp for header in folder.headers}
    try:
        found = survey(folder.tensors, family=known, config=config, problems=tuple(problems), **shared)
    except ConfigError as error:
        problems.append(Problem(error, True))
        found = survey(folder.tensors, family=known, config=None, problems=tuple(problems), **shared)
    dtypes = {n: d for header in folder.headers for n, d in zip(header.names, header.dtypes, strict=True)}
    told = (*found.problems, *judge(found, dtypes))
    return replace(found, problems=tuple(located(problem, found, folder.root) for problem in told))


def by_config(config: Mapping[str, Any] | None, root: str) -> tuple[Family | None, RestowError | None]:
    if config is None:
        return None, ConfigError(
            "config.json, which names the model family",
            "none",
            path=root,
            hint="download it, or say family= or layout= (on the command line --family, --layout)",
        )
    text = config.get("text_config")
    types = [config.get("model_type"), text.get("model_type") if isinstance(text, Mapping) else None]
    for model_type in types:
        if isinstance(model_type, str) and model_type in FAMILIES:
            return FAMILIES[model_type], None
    return None, _unknown(types[0], config)


def adapter_of(root: str) -> RestowError:
    """The error for an adapter where a checkpoint is wanted."""
    return ConfigError(
        "a checkpoint with a config.json",
        "an adapter",
        path=root,
        hint="restow lora writes it in another format, restow merge adds it to its base (in Python, restow.lora)",
    )


def _unknown(model_type: object, config: Mapping[str, Any]) -> UnsupportedFamilyError:
    remote = "; the code that the config names is never run" if "auto_map" in config else ""
    return UnsupportedFamilyError(
        "a model family that restow knows",
        f"model_type {show(repr(model_type))}{remote}",
        path="config.json" if config else None,
        hint="say family= or layout= (--family, --layout) if it stores its experts as a known one does",
    )


__all__ = ["Checkpoint", "family_of", "open_checkpoint", "read_as"]
