"""What a user reads when something is wrong: whole texts, in one form, ASCII, with every name in full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import restow
from moe import AT, Model, Tensors, painted, write
from restow.errors import LISTED, NAME_LIMIT, RestowError, section, show
from restow.plans import Plan

SMALL = Model(e=3, f=4, d=6, layers=2)
A, B = AT.format(0), AT.format(1)


def changed(
    folder: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: object
) -> Path:
    """The small model with some of its tensors or of its config changed."""
    tensors = SMALL.spelled("split")
    change(tensors)
    return write(folder / "m", tensors, {**SMALL.config, **config})


def drop(*names: str) -> Callable[[Tensors], object]:
    return lambda tensors: [tensors.pop(name) for name in names]


def move(old: str, new: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def second_gone(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(B)]:
        del tensors[name]


def twice(tensors: Tensors) -> None:
    tensors.update({name: t for name, t in SMALL.spelled("fused").items() if name.startswith(A)})


def grouped(**changes: int) -> Tensors:
    return painted(SMALL.but(**changes).spelled("grouped"))


def without_experts() -> Tensors:
    return {name: t for name, t in grouped().items() if ".experts." not in name}


TEXTS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no such path": (
        lambda at: restow.open(at / "nowhere"),
        "MissingShardError",
        "expected a folder or a safetensors file, found no file\n"
        "  in        {at}/nowhere\n"
        "  try       check the path; restow fetches nothing: for a repository of the hub, hf download does, "
        "and prints the path",
    ),
    "an empty folder": (
        lambda at: restow.open(at),
        "MissingShardError",
        "expected safetensors files, found none in this folder\n"
        "  in        {at}\n"
        "  try       check the path; fetch the weights",
    ),
    "a family that nobody knows": (
        lambda at: restow.plan(changed(at, model_type="qwen9", auto_map={"AutoConfig": "x.Y"})),
        "UnsupportedFamilyError",
        "expected a model family that restow knows, found model_type 'qwen9'; the code that the config "
        "names is never run\n"
        "  in        {at}/m/config.json\n"
        "  try       say family= or layout= (--family, --layout) if it stores its experts "
        "as a known one does",
    ),
    "no config": (
        lambda at: restow.plan(write(at / "m", SMALL.spelled("split"), None)),
        "ConfigError",
        "expected config.json, which names the model family, found none\n"
        "  in        {at}/m\n"
        "  try       download it, or say family= or layout= (on the command line --family, --layout)",
    ),
    "a config's number that is none": (
        lambda at: restow.plan(changed(at, num_experts="8")),
        "ConfigError",
        "expected num_experts as a whole number from 1 to 65536, found '8'\n"
        "  in        {at}/m/config.json\n"
        "  try       get the config.json that belongs to these files",
    ),
    "experts that are missing": (
        lambda at: restow.plan(changed(at, drop(f"{A}.1.gate_proj.weight", f"{A}.1.up_proj.weight"))),
        "MissingTensorError",
        "expected 3 experts in model.layers.0.mlp.experts, found 2\n"
        "  missing   model.layers.0.mlp.experts.1.gate_proj.weight\n"
        "            model.layers.0.mlp.experts.1.up_proj.weight\n"
        "  looked in model.safetensors\n"
        "  in        {at}/m\n"
        "  try       get the checkpoint again: nothing is filled in their place",
    ),
    "more experts than the config says": (
        lambda at: restow.plan(changed(at, num_experts=2)),
        "UnexpectedTensorError",
        "expected 2 experts in model.layers.0.mlp.experts, found 3\n"
        "  extra     model.layers.0.mlp.experts.2.gate_proj.weight\n"
        "            model.layers.0.mlp.experts.2.up_proj.weight\n"
        "            model.layers.0.mlp.experts.2.down_proj.weight\n"
        "            model.layers.1.mlp.experts.2.gate_proj.weight\n"
        "            model.layers.1.mlp.experts.2.up_proj.weight\n"
        "            model.layers.1.mlp.experts.2.down_proj.weight\n"
        "  and in    model.layers.1.mlp.experts\n"
        "  in        {at}/m/model.safetensors\n"
        "  try       check the number of experts in config.json against the files",
    ),
    "a leading zero": (
        lambda at: restow.plan(changed(at, move(f"{A}.1.up_proj.weight", f"{A}.01.up_proj.weight"))),
        "AmbiguousTensorError",
        "expected expert numbers without leading zeros in model.layers.0.mlp.experts, found 1 with\n"
        "  tensors   model.layers.0.mlp.experts.01.up_proj.weight\n"
        "  in        {at}/m/model.safetensors\n"
        "  try       rename or drop them: an expert may have one number only",
    ),
    "a stranger among the experts": (
        lambda at: restow.plan(changed(at, lambda t: t.update({f"{A}.1.up_proj.lora": torch.ones(1)}))),
        "UnexpectedTensorError",
        "expected only expert weights below model.layers.0.mlp.experts, found 1 other tensors\n"
        "  extra     model.layers.0.mlp.experts.1.up_proj.lora\n"
        "  layout    in   {{e}}.{{p:gate|up}}_proj.weight  f d\n"
        "            out  {{e}}.down_proj.weight         d f\n"
        "  in        {at}/m/model.safetensors\n"
        "  try       if they belong there, the family's table must say so",
    ),
    "experts in two layouts": (
        lambda at: restow.plan(changed(at, twice)),
        "AmbiguousTensorError",
        "expected the experts of model.layers.0.mlp.experts in one layout, found in parts of 2\n"
        "  layouts   hf/split: 9 tensors, such as model.layers.0.mlp.experts.0.down_proj.weight\n"
        "            fused: 2 tensors, such as model.layers.0.mlp.experts.down_proj\n"
        "  in        {at}/m/model.safetensors\n"
        "  try       keep one of them: which values count is not for a reader to decide",
    ),
    "a model of other sizes": (
        lambda at: restow.load(changed(at), grouped(e=4)),
        "ShapeMismatchError",
        "expected shape [3, 6, 8] for model.layers.0.mlp.experts.gate_and_up_projs, found [4, 6, 8]\n"
        "  tensors   model.layers.0.mlp.experts.gate_and_up_projs [4, 6, 8], expected [3, 6, 8]\n"
        "            model.layers.0.mlp.experts.down_projs [4, 4, 6], expected [3, 4, 6]\n"
        "            model.layers.1.mlp.experts.gate_and_up_projs [4, 6, 8], expected [3, 6, 8]\n"
        "            model.layers.1.mlp.experts.down_projs [4, 4, 6], expected [3, 4, 6]\n"
        "  layout    in   gate_and_up_projs  e d (p f)\n"
        "            out  down_projs         e f d\n"
        "  sizes     d = 6, e = 3, f = 4, p = 2\n"
        "  and in    model.layers.1.mlp.experts\n"
        "  try       check config.json against the files: sizes come from the config first, "
        "shapes must agree",
    ),
    "a layer without experts": (
        lambda at: restow.load(
            changed(at, lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp.experts" in n]), grouped()
        ),
        "MissingTensorError",
        "expected every tensor of the destination in the source, found 2 that it does not hold\n"
        "  missing   model.layers.1.mlp.experts.gate_and_up_projs\n"
        "            model.layers.1.mlp.experts.down_projs\n"
        "  looked in model.safetensors\n"
        "  also      MissingTensorError: expected 3 experts in model.layers.1.mlp.experts, found none "
        "(model.layers.1.mlp.experts.0.gate_proj.weight, {at}/m)\n"
        "  in        {at}/m\n"
        "  try       rename= says how names differ; allow_missing= leaves a tensor as it is",
    ),
    "a layout that is none": (
        lambda at: restow.plan(SMALL.spelled("split"), layout="gruped"),
        "UsageError",
        f"expected a layout name, one of {', '.join(restow.layouts)}, found 'gruped'",
    ),
    "a rank that is none": (
        lambda at: restow.Shard("e", 8, 8),
        "UsageError",
        "expected a rank from 0 to of - 1, found rank 8 of 8",
    ),
    "an axis that is none": (
        lambda at: restow.plan(changed(at), shard=restow.Shard("x", 0, 2)),
        "UsageError",
        "expected an axis whose size the source gives, one of d, e, f, p, found 'x'",
    ),
    "a plan that is none": (
        lambda at: Plan.from_json('{"restow_plan": 99}'),
        "UsageError",
        "expected a plan of version 3, found version 99",
    ),
    "a destination that is none": (
        lambda at: restow.load(changed(at), 3),  # type: ignore[arg-type]
        "UsageError",
        "expected an nn.Module, a list of them, or a mapping of tensors, found int",
    ),
    "a tensor that is none": (
        lambda at: restow.load(changed(at), {"model.norm.weight": [1.0]}),  # type: ignore[dict-item]
        "UsageError",
        "expected a tensor as model.norm.weight, found list\n  tensor    model.norm.weight",
    ),
    "a model without experts": (
        lambda at: restow.load(changed(at, second_gone), without_experts()),
        "UnexpectedTensorError",
        "expected a place for every tensor of the source, found 9 without one\n"
        "  unused    model.layers.0.mlp.experts.0.gate_proj.weight\n"
        "            model.layers.0.mlp.experts.0.up_proj.weight\n"
        "            model.layers.0.mlp.experts.1.gate_proj.weight\n"
        "            model.layers.0.mlp.experts.1.up_proj.weight\n"
        "            model.layers.0.mlp.experts.2.gate_proj.weight\n"
        "            model.layers.0.mlp.experts.2.up_proj.weight\n"
        "            model.layers.0.mlp.experts.0.down_proj.weight\n"
        "            model.layers.0.mlp.experts.1.down_proj.weight\n"
        "            model.layers.0.mlp.experts.2.down_proj.weight\n"
        "  in        {at}/m\n"
        "  try       rename= says how names differ, part=True that this is a piece, "
        "allow_unused= leaves them out",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("act", "kind", "text"), TEXTS.values(), ids=TEXTS)
def test_the_whole_text(act: Callable[[Path], object], kind: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(RestowError) as caught:
        act(tmp_path)
    assert type(caught.value).__name__ == kind
    assert str(caught.value) == text.format(at=tmp_path)
    assert str(caught.value).isascii()


def test_more_names_than_fit_are_counted() -> None:
    names = [f"t.{i}" for i in range(LISTED + 3)]
    lines = section("missing", names).splitlines()
    assert lines[0] == "  missing   t.0"
    assert lines[-1] == "            ... 3 more"
    assert len(lines) == LISTED + 1
    assert section("missing", names[:LISTED]).splitlines()[-1] == f"            t.{LISTED - 1}"


def test_hostile_names_are_escaped_and_cut() -> None:
    assert show("a\x1b[2J\n\u202e\u00e9") == "a\\x1b[2J\\n\\u202e\\xe9"
    long = show("x" * 1000)
    assert len(long) == NAME_LIMIT
    assert long.endswith("...")


def test_the_parts_of_an_error() -> None:
    error = RestowError(
        "this",
        "that",
        path="/a/b",
        tensor="t",
        sections=[("also", ["x", "y"]), ("none", [])],
        hint="h",
        rank=3,
    )
    assert str(error) == (
        "expected this, found that\n"
        "  also      x\n"
        "            y\n"
        "  in        /a/b\n"
        "  rank      3\n"
        "  try       h"
    )
    assert str(RestowError("this", "that", tensor="t")) == "expected this, found that\n  tensor    t"
    assert error.args == ("this", "that")
