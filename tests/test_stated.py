"""Layouts that names and shapes do not tell are written into the files: what was converted can be read again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import restow
from moe import Model, differing, write
from restow.errors import HeaderError

SMALL = Model()
DENSE = {  # names that a layout of stacked linears spells too
    f"model.layers.{layer}.mlp.{where}{word}_proj.weight": torch.ones(7, 3, dtype=torch.bfloat16)
    for layer in (0, 1)
    for where in ("", "shared_expert.")
    for word in ("gate", "up", "down")
}
LOOKALIKE = restow.Layout.parse(
    "in gate_up_proj e (f p) d\nout down_proj e d f"
)  # fused has these names and shapes
STRANGE = restow.Layout.parse("in up_proj e d (f p)\nout down_proj f e d")
BY_NAME = ["interleaved", "stacked_linear", "fused_in_major", "flat"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def stated(folder: Path) -> set[str | None]:
    found = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found.add(opened.metadata().get("restow.layout"))
    return found


@pytest.mark.parametrize("to", [*BY_NAME, LOOKALIKE, STRANGE], ids=[*BY_NAME, "lookalike", "strange"])
def test_any_layout_is_read_again(to: str | restow.Layout, tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source", **DENSE)
    there = tmp_path / "there"
    restow.convert(source, there, to=to, max_shard_bytes=2000)
    layout = to if isinstance(to, restow.Layout) else restow.families["qwen3_moe"].form(to)
    assert stated(there) == {"\n".join(map(str, layout.rows))}
    assert differing(tensors(there), {**SMALL.spelled(layout), **DENSE}) == []
    opened = restow.open(there)
    assert set(opened.layouts.values()) == {layout}
    assert opened.problems == restow.open(source).problems
    assert restow.verify(source, there).equal
    restow.convert(there, tmp_path / "grouped", to="grouped")
    assert differing(tensors(tmp_path / "grouped"), {**SMALL.spelled("grouped"), **DENSE}) == []
    assert stated(tmp_path / "grouped") == {None}
    restow.convert(there, tmp_path / "back", to="source")
    for file in source.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_a_saved_layout_is_read_again(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    state = {name: t.clone() for name, t in SMALL.spelled("grouped").items()}
    restow.save(state, tmp_path / "saved", layout=LOOKALIKE, config=SMALL.config)
    assert differing(tensors(tmp_path / "saved"), SMALL.spelled(LOOKALIKE)) == []
    assert restow.verify(source, tmp_path / "saved").equal


def test_a_layout_said_by_the_caller_counts(tmp_path: Path) -> None:
    there = tmp_path / "there"
    restow.convert(SMALL.written(tmp_path / "source"), there, to=LOOKALIKE)
    assert set(restow.open(there, layout="fused").layouts.values()) == {
        restow.families["qwen3_moe"].form("fused")
    }


def state_of(folder: Path, *texts: str) -> Path:
    """A checkpoint of as many files as there are texts, each of which states one."""
    split = [{}, {}] if len(texts) > 1 else [{}]
    for i, (name, tensor) in enumerate(SMALL.spelled("fused").items()):
        split[i % len(texts)][name] = tensor
    folder.mkdir()
    for i, (held, text) in enumerate(zip(split, texts, strict=True)):
        save_file(held, folder / f"model-{i + 1:05}-of-{len(texts):05}.safetensors", {"restow.layout": text})
    (folder / "config.json").write_text(json.dumps(SMALL.config))
    return folder


def test_files_that_state_two_layouts(tmp_path: Path) -> None:
    folder = state_of(tmp_path / "two", "in gate_up_proj e (f p) d\nout down_proj e d f", "in a e\nout b e")
    with pytest.raises(HeaderError) as caught:
        restow.plan(folder)
    assert str(caught.value) == (
        "expected one layout in the metadata (restow.layout) of all files, found 2\n"
        "  files     model-00001-of-00002.safetensors\n"
        "            model-00002-of-00002.safetensors\n"
        f"  in        {folder}\n"
        "  try       keep the files of one conversion in a folder, or say layout= (--layout)"
    )
    assert restow.plan(restow.open(folder, layout="fused")).bytes


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("in gate_up_proj e ((", "text that is none: "),
        ("in w e f d\n" * 2000, "22000 characters"),
        ("", "text that is none: "),
    ],
)
def test_text_that_is_no_layout(text: str, found: str, tmp_path: Path) -> None:
    folder = state_of(tmp_path / "bad", text)
    with pytest.raises(HeaderError, match=r"rows of a layout in the metadata \(restow.layout\)") as caught:
        restow.plan(folder)
    assert caught.value.found.startswith(found)
    assert caught.value.path == str(folder / "model-00001-of-00001.safetensors")


def test_a_form_with_a_container_of_its_own_goes_there(tmp_path: Path) -> None:
    granite = SMALL.but(family="granitemoe", at="model.layers.{}.block_sparse_moe.experts")
    renamed = {
        name.replace("mlp.gate", "block_sparse_moe.router.layer"): t
        for name, t in granite.spelled("fused").items()
    }
    source = write(tmp_path / "runtime", renamed, granite.config)
    restow.convert(source, tmp_path / "hub", to="hf")
    assert {n for n in tensors(tmp_path / "hub") if "linear" in n} == {
        f"model.layers.{i}.block_sparse_moe.{word}_linear.weight"
        for i in (0, 1)
        for word in ("input", "output")
    }
    assert restow.verify(source, tmp_path / "hub").equal
    restow.convert(tmp_path / "hub", tmp_path / "back", to="source")
    assert differing(tensors(tmp_path / "back"), renamed) == []
