"""Conversions on disk: any layout to any layout and back to the byte, experts chosen, values cast, or nothing at all."""

from __future__ import annotations

import errno
import filecmp
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import restow
import tiny
from moe import AT, Model, differing, raw
from restow.errors import (
    ConfigError,
    DestinationError,
    DestinationExistsError,
    HeaderError,
    IndexFileError,
    IntegrityError,
    MissingShardError,
    MissingTensorError,
    RestowError,
    RolesError,
    SamePathError,
    TruncatedFileError,
    UnexpectedTensorError,
    UnsupportedFamilyError,
    UsageError,
)
from restow.torch import convert as module

MANIFEST = "checkpoint.manifest.json"
IDS = [
    pytest.param(family_id, marks=pytest.mark.slow if family.slow else ())
    for family_id, family in tiny.FAMILIES.items()
]
CUSTOM = restow.Layout.parse("in wide e p f d\nout narrow f e d")
BIASED = restow.Layout.parse("in wide e p f d\nout narrow f e d\nin.bias wide_b p e f\nout.bias narrow_b e d")
LAYOUTS = ["grouped", "fused", "split", "stacked", "epfd", "custom"]
SMALL = Model()

Tensors = dict[str, torch.Tensor]


def layout(name: str, family_id: str) -> str | restow.Layout:
    return name if name != "custom" else BIASED if family_id == "gpt_oss" else CUSTOM


@cache
def sharded(family_id: str, hub: bool = True, sizes: str = "plain") -> Path:
    """A saved tiny model in several files; read it, never write to it."""
    folder = tiny._scratch() / f"sharded-{family_id}-{hub}-{sizes}"
    tiny.save(tiny.build(family_id, sizes), folder, hub, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def read(folder: Path) -> Tensors:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def unlike(a: Path, b: Path) -> list[str]:
    """The files that are not the same in both folders, `b`'s manifest apart."""
    names = {path.name for path in (*a.iterdir(), *b.iterdir())} - {MANIFEST}
    both = {name for name in names if (a / name).is_file() and (b / name).is_file()}
    return sorted(names - both) + [n for n in sorted(both) if not filecmp.cmp(a / n, b / n, shallow=False)]


def tree(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything below a folder: names, sizes and times of change, inodes."""
    return {
        str(path.relative_to(folder)): (s.st_ino, s.st_size, s.st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        for s in [path.lstat()]
    }


def there_and_back(source: Path, folder: Path, to: str | restow.Layout, **options: object) -> Path:
    """Convert and undo it; the folder in the other layout."""
    restow.convert(source, folder / "there", to=to, max_shard_bytes=50_000, **options)  # type: ignore[arg-type]
    made = folder / "there"
    opened = restow.open(made, layout=to) if isinstance(to, restow.Layout) else restow.open(made)
    restow.convert(opened, folder / "back", to="source", **options)  # type: ignore[arg-type]
    assert unlike(source, folder / "back") == []
    return made


# Every family, both forms, every layout: there and back, to the byte.


EVERY = [(family_id, hub, to) for family_id in tiny.FAMILIES for hub in (True, False) for to in LAYOUTS]


@pytest.mark.parametrize(
    ("family_id", "hub", "to"),
    [
        # A third of them by default, so that every family, form and layout has its turn; the rest is slow.
        pytest.param(
            *case, marks=() if number % 5 in (0, 3) and not tiny.FAMILIES[case[0]].slow else pytest.mark.slow
        )
        for number, case in enumerate(EVERY)
    ],
)
def test_there_and_back_gives_identical_files(family_id: str, hub: bool, to: str, tmp_path: Path) -> None:
    source = sharded(family_id, hub)
    before = tree(source)
    there = there_and_back(source, tmp_path, layout(to, family_id))
    assert tree(source) == before
    wanted = layout(to, family_id)
    opened = restow.open(there, layout=wanted)
    if isinstance(wanted, str):
        wanted = restow.open(source).family.form(wanted)  # type: ignore[union-attr]
    assert {str(found) for found in opened.layouts.values()} == {str(wanted)}
    assert opened.layouts.keys() == restow.open(source).layouts.keys()
    assert {n for n in read(source) if n not in restow.open(source).expert_tensors} == set(opened.others)


SQUARE = [(f, s, to) for s in tiny.SIZES if s != "plain" for f in tiny.FAMILIES for to in LAYOUTS]


@pytest.mark.parametrize(
    ("family_id", "sizes", "to"),
    [pytest.param(*case, marks=() if i % 7 == 0 else pytest.mark.slow) for i, case in enumerate(SQUARE)],
)
def test_there_and_back_where_matrices_are_square(
    family_id: str, sizes: str, to: str, tmp_path: Path
) -> None:
    there_and_back(sharded(family_id, sizes=sizes), tmp_path, layout(to, family_id))


def test_every_family_form_and_layout_has_its_turn_by_default() -> None:
    turns = [case for number, case in enumerate(EVERY) if number % 5 in (0, 3)]
    quick = {family_id for family_id, family in tiny.FAMILIES.items() if not family.slow}
    assert quick <= {family_id for family_id, _, _ in turns}
    assert {(hub, to) for _, hub, to in turns} == {(hub, to) for hub in (True, False) for to in LAYOUTS}
    assert {(family_id, hub) for family_id, hub, _ in turns} >= {
        (f, hub) for f in quick for hub in (True, False)
    }


def test_the_comparison_of_folders_can_fail(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.json").write_bytes(b"1")
    assert unlike(tmp_path / "a", tmp_path / "b") == []
    (tmp_path / "b" / "x.json").write_bytes(b"2")
    (tmp_path / "a" / "y.json").write_bytes(b"")
    assert unlike(tmp_path / "a", tmp_path / "b") == ["y.json", "x.json"]


SAVED_OTHERWISE = {
    "qwen3_5_moe_text": "split",
    "qwen3_5_moe": "split",
    "qwen3_vl_moe": "fused",
}  # than the vendor


@pytest.mark.parametrize("family_id", IDS)
def test_the_hubs_layout_loads_in_transformers(family_id: str, tmp_path: Path) -> None:
    restow.convert(sharded(family_id), tmp_path / "a", to="grouped")
    to = SAVED_OTHERWISE.get(family_id, "hf")
    restow.convert(tmp_path / "a", tmp_path / "b", to=to, max_shard_bytes=50_000)
    assert differing(read(tmp_path / "b"), read(sharded(family_id))) == []
    model, info = tiny.reload(tmp_path / "b", family_id)
    assert not any(info.values()), info
    wanted = tiny.build(family_id)
    assert differing(model.state_dict(), wanted.state_dict()) == []
    assert torch.equal(tiny.logits(model), tiny.logits(wanted))


@pytest.mark.parametrize("family_id", ["qwen3_moe", "mixtral", "deepseek_v3", "nemotron_h", "jamba", "olmoe"])
def test_the_runtimes_layout_loads_in_transformers(family_id: str, tmp_path: Path) -> None:
    restow.convert(sharded(family_id, hub=False), tmp_path / "a", to="split")
    restow.convert(tmp_path / "a", tmp_path / "b", to="fused")
    assert differing(read(tmp_path / "b"), read(sharded(family_id, hub=False))) == []
    model, info = tiny.reload(tmp_path / "b", family_id)
    assert not any(info.values()), info
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.build(family_id)))


@pytest.mark.parametrize("family_id", ["qwen3_moe", "gpt_oss", "llama4", "dbrx", "nemotron_h", "step3p7"])
def test_a_chain_of_conversions_ends_where_one_does(family_id: str, tmp_path: Path) -> None:
    source = sharded(family_id)
    last, layouts = source, ["grouped", "fused", "mlx", "stacked", "megatron", "epfd", "hf"]
    for i, to in enumerate(layouts):
        restow.convert(last, tmp_path / str(i), to=to, max_shard_bytes=30_000 * (i + 1))
        last = tmp_path / str(i)
        assert restow.verify(source, last).equal
    assert differing(read(last), read(source)) == []
    for i in range(len(layouts) - 1, 0, -1):  # every one knows the one before it
        restow.convert(tmp_path / str(i), tmp_path / "undone", to="source", replace=i < len(layouts) - 1)
        assert unlike(tmp_path / str(i - 1), tmp_path / "undone") == []


@pytest.mark.parametrize("chunk", [2000, 8192])
@pytest.mark.parametrize("family_id", ["qwen3_moe", "gpt_oss", "dbrx", "aria"])
def test_chunks_of_any_size_give_the_same_files(
    family_id: str, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = sharded(family_id)
    restow.convert(source, tmp_path / "whole", to="grouped")
    monkeypatch.setattr(module, "CHUNK", chunk)
    restow.convert(source, tmp_path / "parts", to="grouped")
    assert unlike(tmp_path / "whole", tmp_path / "parts") == []
    whole, parts = (json.loads((tmp_path / name / MANIFEST).read_text()) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert {key: whole[key] for key in whole if key != "leaves"} == {
        key: parts[key] for key in parts if key != "leaves"
    }
    assert parts["leaves"].items() <= whole["leaves"].items(), (
        "a leaf cut in two may have no digest, never another"
    )
    restow.convert(tmp_path / "parts", tmp_path / "back", to="source")
    assert unlike(source, tmp_path / "back") == []


def test_equal_work_gives_equal_bytes_on_any_number_of_threads(tmp_path: Path) -> None:
    source = sharded("qwen3_moe")
    for threads in (1, 2, 5):
        restow.convert(source, tmp_path / str(threads), to="grouped", threads=threads, max_shard_bytes=40_000)
    for threads in (2, 5):
        assert unlike(tmp_path / "1", tmp_path / str(threads)) == []
        assert (tmp_path / "1" / MANIFEST).read_bytes() == (tmp_path / str(threads) / MANIFEST).read_bytes()


# Files: names, sizes, headers, what lies beside them.


def test_headers_come_back_as_they_were(tmp_path: Path) -> None:
    """Order of names, spaces, metadata, tensors of every kind: nobody else writes headers like that."""
    source = SMALL.written(tmp_path / "source", files=1)
    extra = {
        "model.scalar": torch.tensor(3.5), "model.empty": torch.empty(0, 4), "model.flags": torch.tensor([True, False]),
        "model.wide": torch.arange(5, dtype=torch.float64), "model.count": torch.tensor([2**62]),
        "model.byte": torch.arange(7).to(torch.uint8), "model.f8": torch.arange(9).float().to(torch.float8_e4m3fn),
        "model.nan": torch.tensor([0x7FC1, 0x7F81, -1], dtype=torch.int16).view(torch.bfloat16),
    }  # fmt: skip
    tensors = {**extra, **read(source)}
    at, table, body = 0, {}, b""
    for name in sorted(tensors, key=lambda name: (name[::-1], name)):
        data = bytes(raw(tensors[name].contiguous()).numpy())
        kind = restow.open(source).tensors[name].dtype if name in read(source) else ""
        kind = kind or {
            torch.float32: "F32", torch.bool: "BOOL", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8",
            torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16",
        }[tensors[name].dtype]  # fmt: skip
        table[name] = {
            "data_offsets": [at, at + len(data)],
            "dtype": kind,
            "shape": list(tensors[name].shape),
        }
        at, body = at + len(data), body + data
    table["__metadata__"] = {"made by": "hand", "format": "pt"}
    text = (json.dumps(table, indent=1) + " " * 37).encode()
    (source / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    there = there_and_back(source, tmp_path, "grouped")
    found = read(there)
    assert {n: t for n, t in found.items() if n in extra}.keys() == extra.keys()
    assert differing({n: found[n] for n in extra}, extra) == []
    for file in there.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_new_files_keep_to_the_limit_and_the_index_lists_them(tmp_path: Path) -> None:
    report = restow.convert(sharded("qwen3_moe"), tmp_path / "a", to="split", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert report.files == len(files) > 5
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    total = 0
    for file in files:
        held = load_file(tmp_path / "a" / file)
        size = sum(t.nbytes for t in held.values())
        assert size <= 20_000 or len(held) == 1
        assert all(index["weight_map"][name] == file for name in held)
        total += size
    assert index["metadata"]["total_size"] == total
    assert len(index["weight_map"]) == report.tensors == len(read(sharded("qwen3_moe")))
    restow.convert(sharded("qwen3_moe"), tmp_path / "one", to="split")
    assert [p.name for p in (tmp_path / "one").glob("*model*")] == ["model.safetensors"]


def test_one_file_and_an_open_checkpoint_are_sources_too(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source", files=1)
    restow.convert(source / "model.safetensors", tmp_path / "a", to="grouped")
    restow.convert(restow.open(source), tmp_path / "b", to="grouped")
    assert unlike(tmp_path / "a", tmp_path / "b") == []
    restow.convert(str(tmp_path / "a"), str(tmp_path / "c"), to="source")
    assert unlike(source, tmp_path / "c") == []


def test_side_files_come_along_and_code_and_other_weights_do_not(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    blob = tmp_path / "blob"
    blob.write_bytes(b'{"linked": 1}')
    kept = {
        "tokenizer.json": b'{"a": "\xc3\xa9"}\r\n', "vocab.txt": b"x\ny", "merges.txt": b"", "tokenizer.model": bytes(range(256)),
        "chat_template.jinja": b"{{ x }}", "README.md": b"# hi", "LICENSE": b"mine", "generation_config.json": b"{}",
        "special_tokens_map.json": b"{", "preprocessor_config.json": b"[]", "linked.json": blob.read_bytes(),
    }  # fmt: skip
    for name, data in kept.items():
        if name != "linked.json":
            (source / name).write_bytes(data)
    (source / "linked.json").symlink_to(blob)
    (source / "modeling_x.py").write_text("raise SystemExit")
    (source / "run.sh").write_text("exit 1")
    (source / "figure.png").write_bytes(b"")
    (source / "original").mkdir()
    (source / "original" / "params.json").write_text("{}")
    (source / "dangling.json").symlink_to(tmp_path / "nowhere")
    os.mkfifo(source / "pipe.json")
    (source / ".hidden").write_text("x")
    left = ("dangling.json", "figure.png", "modeling_x.py", "original", "pipe.json", "run.sh")
    report = restow.convert(source, tmp_path / "a", to="grouped")
    assert report.left_behind == left
    assert "left behind: dangling.json, figure.png, modeling_x.py, original, pipe.json, run.sh" in str(report)
    found = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert {name: found.get(name) for name in kept} == kept
    assert not any(path.is_symlink() for path in (tmp_path / "a").iterdir())
    assert found.keys() == {*kept, "config.json", "model.safetensors", MANIFEST}
    assert found["config.json"] == (source / "config.json").read_bytes()


def test_the_manifest_knows_every_file_and_tensor(tmp_path: Path) -> None:
    restow.convert(sharded("qwen3_moe"), tmp_path / "a", to="grouped", max_shard_bytes=50_000)
    made = json.loads((tmp_path / "a" / MANIFEST).read_text())
    files = {p.name: p.stat().st_size for p in (tmp_path / "a").iterdir() if p.name != MANIFEST}
    assert {name: entry["size"] for name, entry in made["files"].items()} == files
    assert {name for name, entry in made["files"].items() if "sha256" in entry} == {
        name for name in files if name.endswith(".json")
    }
    assert made["tensors"].keys() == read(tmp_path / "a").keys()
    assert made["source"] == {p.name: p.stat().st_size for p in sharded("qwen3_moe").glob("*.safetensors")}


# Choosing experts: the rows, their routers, their biases, the config.

KEPT = (9, 0, 11, 4, 3, 7, 2, 6)
PRUNED = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "nemotron_h"]


def cut_by_hand(family_id: str, experts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """The transformers model of fewer experts, filled with the rows of the whole one."""
    whole = tiny.build(family_id).state_dict()
    monkeypatch.setattr(tiny, "EXPERTS", len(experts))
    model = tiny.build(family_id)
    monkeypatch.undo()
    changed = 0
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            source = whole[name]
            if tensor.shape != source.shape:
                (dim,) = (
                    i for i, (a, b) in enumerate(zip(tensor.shape, source.shape, strict=True)) if a != b
                )
                assert source.shape[dim] % 12 == 0
                rows = source.unflatten(dim, (12, -1)).index_select(dim, torch.tensor(experts))
                source = rows.flatten(dim, dim + 1)
                changed += 1
            tensor.copy_(source)
    assert changed >= 3
    return model


@pytest.mark.parametrize(
    "family_id",
    [*PRUNED, *(pytest.param(i, marks=pytest.mark.slow) for i in tiny.FAMILIES if i not in PRUNED)],
)
def test_chosen_experts_equal_the_model_cut_by_hand(
    family_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = cut_by_hand(family_id, KEPT, monkeypatch)
    report = restow.convert(sharded(family_id), tmp_path / "a", to="hf", experts=KEPT)
    model, info = tiny.reload(tmp_path / "a", family_id)
    assert not any(info.values()), info
    assert differing(model.state_dict(), wanted.state_dict()) == []
    assert torch.equal(tiny.logits(model), tiny.logits(wanted))
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.build(family_id)), atol=1e-3)
    tiny.save(wanted, tmp_path / "hand")
    assert restow.verify(tmp_path / "hand", tmp_path / "a").equal
    assert report.narrowed == {}
    # In another layout, and from the runtime's form, the same experts.
    restow.convert(sharded(family_id, hub=False), tmp_path / "b", to="grouped", experts=list(KEPT))
    assert restow.verify(tmp_path / "a", tmp_path / "b", experts_only=True).equal


COUNTS = {
    "qwen3_moe": "num_local_experts", "gpt_oss": "num_local_experts", "deepseek_v3": "n_routed_experts",
    "dbrx": "ffn_config.moe_num_experts", "llama4": "text_config.num_local_experts",
    "step3p7": "text_config.n_routed_experts", "aria": "text_config.moe_num_experts",
}  # fmt: skip


@pytest.mark.parametrize("family_id", COUNTS)
def test_only_the_number_of_experts_changes_in_the_config(family_id: str, tmp_path: Path) -> None:
    source = sharded(family_id)
    restow.convert(source, tmp_path / "a", to="grouped", experts=KEPT)
    before, after = (flat(json.loads((f / "config.json").read_text())) for f in (source, tmp_path / "a"))
    assert before.keys() == after.keys()
    assert {path: (before[path], after[path]) for path in before if before[path] != after[path]} == {
        COUNTS[family_id]: (12, 8)
    }


def test_every_key_that_counts_experts_is_mended(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    config = {**SMALL.config, "num_local_experts": 8, "n_routed_experts": 8, "name": "caf\u00e9"}
    (source / "config.json").write_text(json.dumps(config))
    restow.convert(source, tmp_path / "a", to="grouped", experts=[7, 0, 3])
    made = json.loads((tmp_path / "a" / "config.json").read_text())
    assert made == {**config, "num_experts": 3, "num_local_experts": 3}  # what this family reads, and no more


def flat(config: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in config.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def test_experts_may_be_repeated_reordered_and_differ_by_module(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    take = [5, 5, 0, 7, 5]
    restow.convert(source, tmp_path / "a", to="grouped", experts=take)
    wanted = SMALL.spelled("grouped", take=take)
    for layer in range(SMALL.layers):
        name = f"model.layers.{layer}.mlp.gate.weight"
        wanted[name] = SMALL.others[name][take]
    assert differing(read(tmp_path / "a"), wanted) == []
    by_module = {AT.format(0): [1, 2, 3], AT.format(1): [3, 1, 6]}
    restow.convert(source, tmp_path / "b", to="split", experts=by_module)
    for layer, numbers in enumerate(by_module.values()):
        whole = SMALL.spelled("split", take=numbers)
        held = read(tmp_path / "b")
        names = [name for name in held if name.startswith(AT.format(layer) + ".")]
        assert len(names) == 9
        assert differing({n: held[n] for n in names}, {n: whole[n] for n in names}) == []
        gate = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(held[gate].view(torch.int16), SMALL.others[gate][numbers].view(torch.int16))
    restow.convert(source, tmp_path / "all", to="split", experts=range(8))
    assert differing(read(tmp_path / "all"), read(source)) == []


@pytest.mark.parametrize("family_id", ["zaya", "inkling_mm_model"])
def test_router_rows_past_the_experts_stay(family_id: str, tmp_path: Path) -> None:
    """Those of shared experts, or for tokens that skip them: no expert was left out that they belong to."""
    source = tiny.saved(family_id, True)
    restow.convert(source, tmp_path / "a", to="hf", experts=[7, 0, 3, 5])
    made, held = restow.open(tmp_path / "a"), read(source)
    assert made.problems == ()
    routers = [name for name in made.routers if held[name].shape[0] == 13 or family_id != "zaya"]
    extra = {name: list(range(12, len(held[name]))) for name in routers}
    assert sorted(set(map(len, extra.values()))) == ([1] if family_id == "zaya" else [0, 2])
    for name, tail in extra.items():
        assert torch.equal(read(tmp_path / "a")[name], held[name][[7, 0, 3, 5, *tail]]), name
    into = {name: torch.zeros_like(held[name][: 4 + len(tail)]) for name, tail in extra.items()}
    restow.load(source, into, part=True, experts=[7, 0, 3, 5], check=True)
    assert differing(into, {name: read(tmp_path / "a")[name] for name in into}) == []


def test_experts_that_do_nothing_may_be_left_out(tmp_path: Path) -> None:
    """LongCat's vendor ships the real experts alone, transformers writes rows for the others: both open, none is filled."""
    whole = tiny.saved("longcat_flash", True)
    state = read(whole)
    idle = [
        name
        for name in state
        if (n := name.split(".experts.")[-1].split(".")[0]).isdecimal() and int(n) >= 12
    ]
    real = tmp_path / "real"
    real.mkdir()
    save_file({n: t for n, t in state.items() if n not in idle}, real / "model.safetensors", {"format": "pt"})
    (real / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert idle
    assert restow.open(real).problems == ()
    restow.convert(real, tmp_path / "g", to="grouped")
    grouped = read(tmp_path / "g")
    first = next(name for name in grouped if name.endswith("gate_and_up_projs"))
    at = first.removesuffix(".gate_and_up_projs")
    want = [torch.cat([state[f"{at}.{e}.{k}_proj.weight"].T for k in ("gate", "up")], 1) for e in range(12)]
    assert torch.equal(grouped[first], torch.stack(want))
    restow.convert(tmp_path / "g", tmp_path / "back", to="hf")
    assert differing(read(tmp_path / "back"), read(real)) == []
    more = {
        first: torch.zeros(16, *grouped[first].shape[1:]),
        f"{at}.down_projs": grouped[f"{at}.down_projs"],
    }
    with pytest.raises(
        RestowError, match="expected 12 along axis 'e' of role 'in', as the source has, found 16"
    ):
        restow.load(real, more, part=True)
    last = f"{at}.11.up_proj.weight"
    save_file({n: t for n, t in state.items() if n not in idle and n != last}, real / "model.safetensors")
    assert last in str(restow.open(real).problems[0].error)


# Casts.


def test_narrowing_is_reported_and_exact_rows_stay(tmp_path: Path) -> None:
    source = sharded("deepseek_v3")
    report = restow.convert(source, tmp_path / "a", to="grouped", dtype=torch.bfloat16)
    made, plain = read(tmp_path / "a"), read(source)
    exact = {name for name in plain if name.endswith("e_score_correction_bias")}
    assert len(exact) == 2
    assert {name: t.dtype for name, t in made.items()} == {
        name: torch.float32 if name in exact else torch.bfloat16 for name in made
    }
    assert set(report.narrowed) == set(made) - exact
    assert set(report.narrowed.values()) == {"F32 -> BF16"}
    assert f"narrowed {len(report.narrowed)} tensors, such as " in str(report)
    for name in plain.keys() & made.keys():
        wanted = plain[name] if name in exact else plain[name].to(torch.bfloat16)
        assert torch.equal(made[name], wanted), name
    model = tiny.build("deepseek_v3", dtype=torch.bfloat16)
    tiny.save(model, tmp_path / "hand")
    assert restow.verify(tmp_path / "hand", tmp_path / "a").equal


def test_widening_changes_no_value(tmp_path: Path) -> None:
    source = tiny.saved("qwen3_moe", dtype=torch.bfloat16)
    report = restow.convert(source, tmp_path / "a", to="hf", dtype=torch.float32)
    assert report.narrowed == {}
    made, plain = read(tmp_path / "a"), read(source)
    assert differing(made, {name: t.float() for name, t in plain.items()}) == []
    restow.convert(tmp_path / "a", tmp_path / "b", to="hf", dtype=torch.bfloat16)
    assert differing(read(tmp_path / "b"), plain) == []
    assert restow.verify(source, tmp_path / "a").equal


def test_the_config_says_the_dtype_of_the_files(tmp_path: Path) -> None:
    config = {**SMALL.config, "dtype": "torch.bfloat16", "rope": {"dtype": "none of ours"},
              "text_config": {"dtype": "float32", "sub": {"torch_dtype": "bfloat16"}}}  # fmt: skip
    source = SMALL.written(tmp_path / "source")
    (source / "config.json").write_text(json.dumps(config))
    restow.convert(source, tmp_path / "a", to="fused", dtype=torch.float16)
    changed = {**config, "dtype": "float16", "torch_dtype": "float16",
               "text_config": {"dtype": "float16", "sub": {"torch_dtype": "float16"}}}  # fmt: skip
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == changed
    restow.convert(source, tmp_path / "b", to="fused")
    assert (tmp_path / "b" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    hub = tiny.saved("qwen3_moe", dtype=torch.bfloat16)
    restow.convert(hub, tmp_path / "c", to="hf", dtype=torch.float32, experts=list(range(8)))
    said = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (said["dtype"], said["num_local_experts"]) == ("float32", 8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_are_cast_to_floats_that_can_hold_them(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        restow.convert(SMALL.written(tmp_path / "source"), tmp_path / "a", to="fused", dtype=dtype)
    assert str(caught.value) == (
        f"expected dtype= as one of float64, float32, float16, bfloat16, found {str(dtype)[6:]}\n"
        "  try       codes of fewer bits need scales: a cast gives none"
    )
    assert not (tmp_path / "a").exists()


def test_casts_leave_integers_alone(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source", steps=torch.tensor([2**40]), mask=torch.tensor([True]))
    report = restow.convert(source, tmp_path / "a", to="grouped", dtype=torch.float16)
    made = read(tmp_path / "a")
    assert made["steps"].dtype == torch.int64 and made["mask"].dtype == torch.bool
    assert not {"steps", "mask"} & report.narrowed.keys()
    assert len(report.narrowed) == len(made) - 2


def test_a_module_that_mixes_dtypes_is_stacked_in_the_widest(tmp_path: Path) -> None:
    odd = f"{AT.format(1)}.3.down_proj.weight"
    wide = torch.linspace(-1, 1, 60).reshape(10, 6)
    source = SMALL.written(tmp_path / "source", **{odd: wide})
    report = restow.convert(source, tmp_path / "a", to="grouped")
    assert report.narrowed == {}
    assert "BF16" in report.warnings[0] and odd in report.warnings[0]
    made = read(tmp_path / "a")
    assert {n: t.dtype for n, t in made.items() if "down_projs" in n} == {
        f"{AT.format(0)}.down_projs": torch.bfloat16, f"{AT.format(1)}.down_projs": torch.float32
    }  # fmt: skip
    assert torch.equal(made[f"{AT.format(1)}.down_projs"][3], wide.t())
    assert restow.verify(source, tmp_path / "a").equal
    restow.convert(tmp_path / "a", tmp_path / "b", to="source")
    assert unlike(source, tmp_path / "b") == []


# Refused, and nothing written.


def spoiled(folder: Path, damage: Callable[[Path], object], files: int = 2) -> Path:
    source = SMALL.written(folder, files=files)
    damage(source)
    return source


def truncate(source: Path) -> None:
    path = sorted(source.glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-5])


def without(word: str) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        for path in source.glob("*.safetensors"):
            save_file({n: t for n, t in load_file(path).items() if word not in n}, path)
        (source / "model.safetensors.index.json").unlink()
        for i, path in enumerate(sorted(source.glob("*.safetensors"))):
            path.rename(source / ("model.safetensors" if i == 0 else "gone"))

    return damage


def configured(**changes: object) -> Callable[[Path], None]:
    def damage(source: Path) -> None:
        config = {**SMALL.config, **changes}
        (source / "config.json").write_text(json.dumps(config))

    return damage


BAD_EXPERTS = {
    "out of range": ("qwen3_moe", [0, 1, 2, 12], "expected expert numbers from 0 to 11 for model.layers.1.mlp.experts, found 12"),
    "negative": ("qwen3_moe", [-1, 0, 1, 2], "from 0 to 11 for model.layers.1.mlp.experts, found -1"),
    "no number": ("qwen3_moe", [True, 0, 1, 2], "from 0 to 11 for model.layers.1.mlp.experts, found True"),
    "none": ("qwen3_moe", [], "expected the numbers of the experts to keep, at least one, found []"),
    "text": ("qwen3_moe", "0123", "expected the numbers of the experts to keep, at least one, found '0123'"),
    "top k": ("qwen3_moe", [0, 1], "expected at least 3 experts, as many as each token takes (num_experts_per_tok), found 2"),
    "top k below": ("dbrx", [0, 1], "expected at least 3 experts, as many as each token takes (moe_top_k), found 2"),
    "top k of a text config": ("gemma4", [0, 1], "expected at least 3 experts, as many as each token takes (top_k_experts)"),
    "groups": ("deepseek_v3", [0, 1, 2, 3, 4], "expected a number of experts that 2 groups (n_group) divide, found 5"),
    "stranger": ("qwen3_moe", {"model.layers.0.mlp.experts": [0, 1, 2]}, "found model.layers.0.mlp.experts"),
    "two counts": (
        "qwen3_moe", {"model.layers.1.mlp.experts": [0, 1, 2]},
        "expected as many experts in every module, since the config has one number, found [3, 12]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_EXPERTS)
def test_experts_that_cannot_be_kept(case: str, tmp_path: Path) -> None:
    family_id, experts, text = BAD_EXPERTS[case]
    with pytest.raises(UsageError) as caught:
        restow.convert(sharded(family_id), tmp_path / "a", to="hf", experts=experts)
    assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


SOURCES: dict[str, tuple[Callable[[Path], object], type[RestowError], str]] = {
    "no folder": (lambda s: s.rename(s.parent / "away"), MissingShardError, ""),
    "a truncated file": (truncate, TruncatedFileError, "model-00001-of-00002.safetensors"),
    "no config": (lambda s: (s / "config.json").unlink(), ConfigError, "which names the model family, found none"),
    "a broken config": (lambda s: (s / "config.json").write_text("{"), ConfigError, ""),
    "an unknown family": (configured(model_type="nobody"), UnsupportedFamilyError, "model_type 'nobody'"),
    "an expert missing": (without(".3.down_proj"), RestowError, "3.down_proj.weight"),
    "too many experts": (configured(num_experts=9), RestowError, "expected 9 experts"),
    "the router missing": (without("gate.weight"), MissingTensorError, "mlp.gate.weight"),
    "no experts": (without("experts."), MissingTensorError, "none under its names"),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_a_source_that_is_not_whole(case: str, tmp_path: Path) -> None:
    damage, kind, text = SOURCES[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    source = spoiled(tmp_path / "in" / "source", damage)
    before = tree(tmp_path)
    with pytest.raises(kind) as caught:
        restow.convert(source, tmp_path / "out" / "a", to="grouped")
    assert text in str(caught.value)
    assert tree(tmp_path) == before


OPTIONS: dict[str, tuple[dict[str, object], type[RestowError], str]] = {
    "an unknown layout": ({"to": "no such"}, UsageError, "expected a layout name, one of hf, split, "),
    "source without a record": (
        {"to": "source"}, UsageError, "which knows its source, found one without such a record",
    ),
    "source and experts": ({"to": "source", "experts": [0, 1, 2]}, UsageError, 'expected to="source" alone'),
    "source and dtype": ({"to": "source", "dtype": torch.float32}, UsageError, 'expected to="source" alone'),
    "no room in a file": ({"to": "grouped", "max_shard_bytes": 0}, UsageError, "expected max_shard_bytes of at least 1, found 0"),
    "names twice": (
        {"to": restow.Layout.parse("in same e p f d\nout same e d f")}, RestowError, "same",
    ),
    "a role without a row": (
        {"to": restow.Layout.parse("in all e p f d")}, UnexpectedTensorError,
        "expected a place for every tensor of the source, found 16 without one",
    ),
    "other axes": ({"to": restow.Layout.parse("in all e f d\nout down e f d")}, RolesError, ""),
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
def test_wishes_that_cannot_be_met(case: str, tmp_path: Path) -> None:
    options, kind, text = OPTIONS[case]
    source = SMALL.written(tmp_path / "source")
    before = tree(tmp_path)
    with pytest.raises(kind) as caught:
        restow.convert(source, tmp_path / "a", **options)  # type: ignore[arg-type]
    assert text in str(caught.value)
    assert tree(tmp_path) == before


def test_biases_are_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(UnexpectedTensorError) as caught:
        restow.convert(sharded("gpt_oss"), tmp_path / "a", to=CUSTOM)
    assert "expected a place for every tensor of the source, found 4 without one" in str(caught.value)
    assert "model.layers.0.mlp.experts.down_proj_bias" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_layouts_name_may_not_be_that_of_another_tensor(tmp_path: Path) -> None:
    clash = restow.Layout.parse("in gate.weight e p f d\nout down e d f")
    with pytest.raises(UsageError) as caught:
        restow.convert(sharded("step3p7"), tmp_path / "a", to=clash)
    assert "expected a layout whose names are free, found model.layers.1.moe.gate.weight twice" in str(
        caught.value
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [({"experts": KEPT}, "experts were chosen"), ({"dtype": torch.bfloat16}, "values were cast")],
)
def test_what_was_changed_does_not_come_back(options: dict[str, object], why: str, tmp_path: Path) -> None:
    restow.convert(sharded("qwen3_moe"), tmp_path / "a", to="grouped", **options)  # type: ignore[arg-type]
    before = tree(tmp_path)
    with pytest.raises(UsageError) as caught:
        restow.convert(tmp_path / "a", tmp_path / "b", to="source")
    assert f"expected a conversion that can be undone, found {why}" in str(caught.value)
    assert tree(tmp_path) == before
    restow.convert(tmp_path / "a", tmp_path / "c", to="split")  # but the result is a source like any other
    restow.convert(tmp_path / "c", tmp_path / "d", to="source")
    assert unlike(tmp_path / "a", tmp_path / "d") == []


def test_a_converted_folder_that_lost_a_tensor_does_not_come_back(tmp_path: Path) -> None:
    restow.convert(sharded("qwen3_moe"), tmp_path / "a", to="grouped")
    file = tmp_path / "a" / "model.safetensors"
    held = load_file(file)
    for name, kind in (
        ("model.layers.1.input_layernorm.weight", MissingTensorError),
        ("", UnexpectedTensorError),
    ):
        changed = {n: t for n, t in held.items() if n != name} | (
            {} if name else {"model.new": torch.zeros(2)}
        )
        save_file(changed, file)
        with pytest.raises(kind) as caught:
            restow.convert(tmp_path / "a", tmp_path / "b", to="source")
        assert (name or "model.new") in str(caught.value)
        assert not (tmp_path / "b").exists()


RECORDS: dict[str, tuple[Callable[[dict[str, str]], object], type[RestowError]]] = {
    "no text": (lambda undo: undo.update({"head model.safetensors": 7}), IndexFileError),  # type: ignore[dict-item]
    "no base 85": (lambda undo: undo.update({"head model.safetensors": "\x7f"}), IndexFileError),
    "no zlib": (lambda undo: undo.update({"head model.safetensors": "VPRom"}), IndexFileError),
    "cut short": (lambda undo: undo.update({"head model.safetensors": undo["head model.safetensors"][:-10]}), IndexFileError),
    "no head": (lambda undo: undo.update({"head model.safetensors": packed(b"\x02" + bytes(7) + b"[]")}), HeaderError),
    "no offsets": (
        lambda undo: undo.update({"head model.safetensors": packed(b"\x0c" + bytes(7) + b'{"a": {"b":1}}')}), HeaderError,
    ),
    "a bomb": (lambda undo: undo.update({"head model.safetensors": packed(bytes(150_000_000))}), IndexFileError),
    "no layout": (lambda undo: undo.update({f"layout {AT.format(0)}": "in ("}), IndexFileError),
    "a path outside": (
        lambda undo: undo.update({"head ../out.safetensors": undo.pop("head model.safetensors")}), UsageError,
    ),
}  # fmt: skip


def packed(data: bytes) -> str:
    from restow.record import _pack

    return _pack(data)


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_lies(case: str, tmp_path: Path) -> None:
    damage, kind = RECORDS[case]
    restow.convert(SMALL.written(tmp_path / "s", files=1), tmp_path / "a", to="grouped")
    made = json.loads((tmp_path / "a" / MANIFEST).read_text())
    damage(made["undo"])
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(made))
    before = tree(tmp_path)
    with pytest.raises(kind):
        restow.convert(tmp_path / "a", tmp_path / "b", to="source")
    assert {n: f for n, f in tree(tmp_path).items() if n != "."} == before


def make_file(path: Path) -> None:
    path.write_bytes(b"x")


def make_folder(path: Path) -> None:
    path.mkdir()
    (path / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("make", "replace"),
    [(make_file, False), (make_file, True), (make_folder, False), (make_folder, True), (Path.mkdir, False)],
)
def test_a_destination_that_is_there_is_left_alone(
    make: Callable[[Path], None], replace: bool, tmp_path: Path
) -> None:
    source = SMALL.written(tmp_path / "source")
    make(tmp_path / "a")
    before = tree(tmp_path)
    with pytest.raises(DestinationExistsError):
        restow.convert(source, tmp_path / "a", to="grouped", replace=replace)
    assert tree(tmp_path) == before


def test_only_what_restow_wrote_is_replaced(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    restow.convert(source, tmp_path / "a", to="fused")
    before = tree(tmp_path)
    with pytest.raises(DestinationExistsError):
        restow.convert(source, tmp_path / "a", to="grouped")
    assert tree(tmp_path) == before
    restow.convert(source, tmp_path / "a", to="grouped", replace=True)
    assert differing(read(tmp_path / "a"), SMALL.spelled("grouped")) == []


@pytest.mark.parametrize("where", ["source", "source/.", "source/inside", "link", ".", "link/inside"])
def test_source_and_destination_apart(where: str, tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    before = tree(tmp_path)
    for replace in (True, False):
        with pytest.raises(SamePathError if where != "link" else DestinationError):
            restow.convert(source, f"{tmp_path}/{where}", to="grouped", replace=replace)
        assert tree(tmp_path) == before


def test_a_destination_without_a_parent(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    before = tree(tmp_path)
    with pytest.raises(DestinationError, match="a folder above the destination"):
        restow.convert(source, tmp_path / "x" / "y", to="grouped")
    assert tree(tmp_path) == before


# While it runs.

KILLED = """
import os, signal, sys
import restow, restow.writing as writing
name, at = sys.argv[3], int(sys.argv[4])
real, count = getattr(writing, name), 0
def stand_in(*args):
    global count
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
setattr(writing, name, stand_in)
restow.convert(sys.argv[1], sys.argv[2], to="grouped", max_shard_bytes=20_000)
"""


@pytest.mark.parametrize(("call", "at"), [("pwrite", 7), ("rename_new", 1)])
def test_killed_in_the_middle_it_leaves_no_destination(call: str, at: int, tmp_path: Path) -> None:
    source = sharded("qwen3_moe")
    before = tree(source)
    command = [sys.executable, "-c", KILLED, source, tmp_path / "a", call, str(at)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "a").exists()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".a.partial", ".a.lock"}
    report = restow.convert(source, tmp_path / "a", to="grouped", max_shard_bytes=20_000)
    assert "removed .a.partial, left by an earlier run" in report.notes[0]
    assert {path.name for path in tmp_path.iterdir()} == {"a"}
    assert restow.verify(tmp_path / "a").equal
    assert restow.verify(source, tmp_path / "a").equal
    assert tree(source) == before


@pytest.mark.parametrize("change", ["touched", "replaced", "cut"])
def test_a_source_that_changes_meanwhile(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = SMALL.written(tmp_path / "source")
    file = sorted(source.glob("*.safetensors"))[1]
    monkeypatch.setattr(module, "CHUNK", 512)
    calls = []

    def meddle(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) != 2:
            return
        if change == "touched":
            os.utime(file, ns=(0, 0))
        elif change == "replaced":
            (tmp_path / "twin").write_bytes(file.read_bytes())
            (tmp_path / "twin").rename(file)
        else:
            os.truncate(file, file.stat().st_size // 2)

    kind, text = (
        (TruncatedFileError, "as when its header was read")
        if change == "cut"
        else (IntegrityError, "expected a source that stays as it was when its header was read")
    )
    with pytest.raises(kind) as caught:
        restow.convert(source, tmp_path / "a", to="grouped", progress=meddle)
    assert text in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_failing_sync_ends_the_work_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # D19
    """Not after all the other files were written, too."""
    from restow import writing

    source = SMALL.written(tmp_path / "source", "split")
    monkeypatch.setattr(module, "CHUNK", 512)
    real, synced = writing.pwrite, list[int]()

    def fsync(fd: int) -> None:
        synced.append(fd)
        raise OSError(errno.EIO, "denied")

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if synced:
            time.sleep(0.01)  # for the thread that syncs
        return real(fd, data, offset)

    monkeypatch.setattr(writing, "fsync", fsync)
    monkeypatch.setattr(writing, "pwrite", pwrite)
    with pytest.raises(restow.errors.DestinationError) as caught:
        restow.convert(source, tmp_path / "a", to="split", max_shard_bytes=100, threads=1)
    name = Path(caught.value.path or "").name
    size = caught.value.expected.partition(" (")[2]
    assert str(caught.value) == (
        f"expected to sync {name} ({size}, found EIO\n"
        f"  in        {tmp_path}/.a.partial/{name}\n"
        "  try       look at the disk: the system's log says more"
    )
    monkeypatch.undo()
    files = restow.convert(source, tmp_path / "a", to="split", max_shard_bytes=100, threads=1).files
    assert len(synced) < files // 2
    assert {path.name for path in tmp_path.iterdir()} == {"source", "a"}


def test_a_failing_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from restow import writing

    source = SMALL.written(tmp_path / "source")
    for call in ("pwrite", "fsync", "allocate", "rename_new"):

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(writing, call, fail)
        with pytest.raises(RestowError, match="ENOSPC"):
            restow.convert(source, tmp_path / "a", to="grouped")
        monkeypatch.undo()
        assert {path.name for path in tmp_path.iterdir()} == {"source"}, call


@pytest.mark.parametrize(
    "options",
    [{"to": "grouped"}, {"to": "fused", "experts": [3, 1, 2]}, {"to": "hf", "dtype": torch.float32}],
)
def test_progress_grows_to_the_whole_in_the_calling_thread(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 512)
    calls, threads = [], set()

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        threads.add(threading.get_ident())

    report = restow.convert(SMALL.written(tmp_path / "s"), tmp_path / "a", progress=progress, **options)  # type: ignore[arg-type]
    written = sum(t.nbytes for t in read(tmp_path / "a").values())
    assert len(calls) > 5
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {written}
    assert calls[-1] == (written, written)
    assert threads == {threading.get_ident()}
    assert report.bytes_written == sum(p.stat().st_size for p in (tmp_path / "a").glob("*.safetensors"))


def test_the_report_says_what_was_done(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    report = restow.convert(source, tmp_path / "a", to="fused")
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    assert (report.files, report.tensors, report.layout) == (1, 9, "fused")
    assert report.bytes_read == sum(t.nbytes for t in read(source).values())
    assert report.bytes_written == size
    line = str(report).splitlines()[0]
    assert line.startswith(f"converted to fused: 9 tensors, {size:,} bytes in 1 file at {tmp_path}/a, ")
    assert str(restow.convert(tmp_path / "a", tmp_path / "b", to="source")).startswith(
        "converted to its source's layout"
    )
    assert str(restow.convert(source, tmp_path / "c", to=CUSTOM)).startswith("converted to the layout given")


def test_without_a_family_the_layout_must_be_said(tmp_path: Path) -> None:
    source = spoiled(tmp_path / "source", lambda s: (s / "config.json").unlink())
    there = tmp_path / "a"
    restow.convert(restow.open(source, layout="split"), there, to="grouped")
    assert differing(read(there), SMALL.spelled("grouped")) == []
    restow.convert(restow.open(there, layout="grouped"), tmp_path / "b", to="source")
    assert unlike(source, tmp_path / "b") == []
    with pytest.raises(ConfigError, match="whose number of experts can be mended"):
        restow.convert(restow.open(source, layout="split"), tmp_path / "c", to="grouped", experts=[0, 1, 2])
    with pytest.raises(UsageError, match="a layout name"):
        restow.convert(restow.open(source, layout="split"), tmp_path / "c", to="hf")
    assert not (tmp_path / "c").exists()


def test_warnings_are_told_and_strict_refuses_them(tmp_path: Path) -> None:
    odd = f"{AT.format(0)}.1.up_proj.weight"
    source = SMALL.written(tmp_path / "source", **{odd: torch.linspace(-1, 1, 60).reshape(6, 10)})
    assert len(restow.convert(source, tmp_path / "a", to="grouped").warnings) == 1
    with pytest.raises(RestowError, match="experts of one module in one dtype"):
        restow.convert(source, tmp_path / "b", to="grouped", strict=True)
    assert not (tmp_path / "b").exists()


PEAK = """
import sys, json, restow
restow.convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
status = open("/proc/self/status").read().splitlines()
print(next(line.split()[1] for line in status if line.startswith("VmHWM:")))
"""


@pytest.mark.slow
def test_memory_stays_below_a_gibibyte_whatever_the_size(tmp_path: Path) -> None:
    model = Model(e=64, f=768, d=2048, layers=2)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(model.config))
    noise = torch.arange(2048 * 768, dtype=torch.int32).to(torch.int16) & 0x3FFF
    for layer in range(2):
        held = {} if layer else model.others
        for e in range(64):
            for i, p in enumerate(("gate", "up", "down")):
                shape = (2048, 768) if p == "down" else (768, 2048)
                values = (noise + 3 * e + i).view(torch.bfloat16).reshape(shape)
                held[f"{AT.format(layer)}.{e}.{p}_proj.weight"] = values
        save_file(held, source / f"model-{layer + 1:05}-of-00002.safetensors")
    assert sum(p.stat().st_size for p in source.glob("*.safetensors")) > 1.2e9
    for name, (start, to) in {"a": ("source", "grouped"), "b": ("a", "source")}.items():
        command = [sys.executable, "-c", PEAK, tmp_path / start, tmp_path / name, to]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
        assert peak < 2**30, to
    assert unlike(source, tmp_path / "b") == []
