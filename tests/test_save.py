"""Saving from one process: transformers reads what was saved, files come back identical, nothing is left unsaid."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import restow
import tiny
from faults import ERRORS
from moe import AT, Model, Tensors, differing, numbers, same, write
from restow import errors, writing
from restow.torch.save import SaveHandle, SaveReport

MANIFEST = "checkpoint.manifest.json"
IDS = [pytest.param(name, marks=pytest.mark.slow if f.slow else ()) for name, f in tiny.FAMILIES.items()]
OTHER_FORM = {"qwen3_5_moe_text", "qwen3_5_moe", "qwen3_vl_moe"}  # transformers saves these in its own form
REFUSED = "step3p7"  # its vendor fuses and permutes the vision tower's q, k and v: no rename
GPT = Model(family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))


def files(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != MANIFEST}


def tensors(folder: Path) -> Tensors:
    return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}


def save(*args: Any, **words: Any) -> SaveReport:
    report = restow.save(*args, **words)
    assert isinstance(report, SaveReport)
    return report


def nothing_left(folder: Path) -> bool:
    """No staging folder, and no lock but the one that stays."""
    return not [p.name for p in folder.iterdir() if p.name.startswith(".") and not p.name.endswith(".lock")]


# Every family.


@pytest.mark.parametrize("family_id", IDS)
def test_transformers_reads_what_was_saved(family_id: str, tmp_path: Path) -> None:
    model = tiny.build(family_id)
    if family_id == REFUSED:
        with pytest.raises(errors.UnexpectedTensorError) as caught:
            restow.save(model, tmp_path / "out")
        text = str(caught.value)
        assert "found 6 that they hold in another form" in text
        assert "model.vision_model.layers.0.self_attn.q_proj.bias" in text
        assert not (tmp_path / "out").exists()
        return
    report = save(model, tmp_path / "out")
    again, info = tiny.reload(tmp_path / "out", family_id)
    assert not any(info.values()), info
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    held = tensors(tmp_path / "out")
    assert report.bytes_written == report.bytes_total == sum(t.nbytes for t in held.values())
    assert report.tensors == len(held)
    if family_id not in OTHER_FORM:
        assert differing(held, tensors(tiny.saved(family_id))) == []


@pytest.mark.parametrize("family_id", [i for i in tiny.FAMILIES if i not in (REFUSED, "deepseek_v3-deep")])
@pytest.mark.parametrize("form", [True, False], ids=["hub", "runtime"])
def test_like_gives_identical_files_back(family_id: str, form: bool, tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny.save(tiny.build(family_id), source, form, max_shard_size="60KB")
    (source / "tokenizer.json").write_text("{}")
    model = tiny.build(family_id)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    restow.load(source, model)
    save(model, tmp_path / "module", like=source)
    assert files(tmp_path / "module") == files(source)
    assert len([name for name in files(source) if name.endswith(".safetensors")]) > 1
    grouped = grouped_of(source)
    save(grouped, tmp_path / "grouped", like=source)
    assert files(tmp_path / "grouped") == files(source)


def grouped_of(folder: Path) -> Tensors:
    """A checkpoint's tensors with grouped experts."""
    plan = restow.plan(folder)
    dtypes = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}
    out = {t.name: torch.full(t.shape, 3, dtype=dtypes[t.dtype]) for t in plan.targets}
    restow.load(folder, out)
    return out


def test_the_comparison_can_fail(tmp_path: Path) -> None:
    source = tiny.saved("mixtral")
    grouped = grouped_of(source)
    name = next(n for n in grouped if n.endswith("down_projs"))
    grouped[name][3, 2, 1] += 1
    save(grouped, tmp_path / "out", like=source)
    assert files(tmp_path / "out") != files(source)
    first = next(p for p in sorted(source.iterdir()) if p.suffix == ".safetensors")
    wrong = differing(load_file(first), load_file(tmp_path / "out" / first.name))
    assert len(wrong) == 1
    assert ".3." in wrong[0]


# Layouts and names.


@pytest.mark.parametrize("layout", ["split", "fused", "grouped", "stacked"])
@pytest.mark.parametrize("model", [Model(), GPT], ids=["qwen3_moe", "gpt_oss"])
def test_any_layout(layout: str, model: Model, tmp_path: Path) -> None:
    if (model.family, layout) == ("gpt_oss", "stacked"):
        layout = "fused"
    save(model.spelled("grouped"), tmp_path / "out", layout=layout, family=model.family)
    found = tensors(tmp_path / "out")
    assert differing(found, model.spelled(layout)) == []


def test_a_layout_of_the_callers_own(tmp_path: Path) -> None:
    rows = restow.Layout.parse("in w.{e}.{p:a|b} d f\nout v.{e} f d")
    model = Model()
    save(model.spelled("grouped"), tmp_path / "out", layout=rows)
    assert differing(tensors(tmp_path / "out"), model.spelled(rows)) == []


def test_a_split_state_goes_to_the_vendors_form(tmp_path: Path) -> None:
    model = Model(family="llama4_text", at="model.layers.{}.feed_forward.experts")
    save(model.spelled("split"), tmp_path / "out", family="llama4_text")
    assert differing(tensors(tmp_path / "out"), model.spelled("hf")) == []


def renamed_model(model: Model) -> tuple[Tensors, list[tuple[str, str]]]:
    rename = [("model.layers", "blocks"), ("model.embed_tokens", "embed"), ("model.norm", "final")]
    state = {}
    for name, tensor in model.spelled("grouped").items():
        for old, new in rename:
            name = name.replace(old, new)
        state[name] = tensor
    return state, rename


@pytest.mark.parametrize("like", [True, False])
def test_renames_are_applied_backwards(like: bool, tmp_path: Path) -> None:
    model = Model()
    state, rename = renamed_model(model)
    source = model.written(tmp_path / "source")
    words: dict[str, Any] = {"like": source} if like else {"family": model.family}
    save(state, tmp_path / "out", rename=rename, **words)
    assert differing(tensors(tmp_path / "out"), model.spelled("split")) == []
    again = {name: torch.zeros_like(t) for name, t in state.items()}
    restow.load(restow.open(tmp_path / "out", family=model.family), again, rename=rename)
    assert differing(again, state) == []


@pytest.mark.parametrize("like", [True, False])
def test_a_table_with_braces_is_applied_backwards(like: bool, tmp_path: Path) -> None:
    """As torchtitan's `from_hf_map` says it: one name with {} for several experts, None for what is not there."""
    table = {
        "model.layers.{}.mlp.experts.{}.gate_proj.weight": "layers.{}.moe.experts.w1",
        "model.layers.{}.mlp.experts.{}.up_proj.weight": "layers.{}.moe.experts.w3",
        "model.layers.{}.mlp.experts.{}.down_proj.weight": "layers.{}.moe.experts.w2",
        "model.layers.{}.mlp.gate.weight": "layers.{}.moe.router.gate.weight",
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "output.weight",
        "model.layers.{}.self_attn.rotary_emb.inv_freq": None,
    }
    model = Model()
    source = model.written(tmp_path / "source")
    state = {}
    for name, tensor in model.spelled("stacked").items():
        name = name.replace("model.layers", "layers").replace("mlp.experts", "moe.experts")
        name = name.replace("mlp.gate", "moe.router.gate").replace("model.embed_tokens", "tok_embeddings")
        state[name.replace("model.norm", "norm").replace("lm_head", "output")] = tensor
    words: dict[str, Any] = {"like": source} if like else {"family": model.family}
    save(state, tmp_path / "out", rename=table, **words)
    assert differing(tensors(tmp_path / "out"), model.spelled("split")) == []


def test_modules_of_a_pipeline(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    first, second = nn.Module(), nn.Module()
    for part, keep in ((first, ("embed_tokens", "layers.0.")), (second, ("norm", "layers.1.", "lm_head"))):
        for name, parameter in model.named_parameters():
            if any(f"model.{word}" in name or name.startswith(word) for word in keep):
                graft(part, name, parameter)
    save([first, second], tmp_path / "out", like=tiny.saved("mixtral"))
    assert files(tmp_path / "out") == files(tiny.saved("mixtral"))
    with pytest.raises(errors.UsageError, match="two in the state given"):
        restow.save([first, first], tmp_path / "twice", like=tiny.saved("mixtral"))


def graft(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    *path, leaf = name.split(".")
    for word in path:
        if word not in root._modules:
            root.add_module(word, nn.Module())
        root = root._modules[word]  # type: ignore[assignment]
    root.register_parameter(leaf, parameter)


def test_tied_heads(tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe", tie=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    save(model, tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    again, info = tiny.reload(tmp_path / "out", "qwen3_moe")
    assert not any(info.values()), info
    assert torch.equal(tiny.logits(again), tiny.logits(model))
    save(model, tmp_path / "like", like=tmp_path / "out")
    assert files(tmp_path / "like") == files(tmp_path / "out")
    handle = restow.save(model, tmp_path / "later", like=tmp_path / "out", wait=False)
    assert isinstance(handle, SaveHandle)
    assert handle.buffers["lm_head.weight"] is handle.buffers["model.embed_tokens.weight"], "copied once"
    handle.result(60)
    assert files(tmp_path / "later") == files(tmp_path / "out")


def test_a_head_that_the_config_does_not_tie_is_written_though_the_memory_is_one(tmp_path: Path) -> None:
    model = tiny.build("qwen3_moe", tie=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    save(model, tmp_path / "out")
    held = tensors(tmp_path / "out")
    assert same(held["lm_head.weight"], held["model.embed_tokens.weight"])
    _, info = tiny.reload(tmp_path / "out", "qwen3_moe")
    assert not any(info.values()), info


def test_a_tied_head_that_comes_first_is_written_under_the_embeddings_name(tmp_path: Path) -> None:
    state = Model().spelled("grouped")
    head = {"lm_head.weight": state["model.embed_tokens.weight"]}
    tied = {**head, **{n: t for n, t in state.items() if n not in head}}
    save(tied, tmp_path / "out", family="qwen3_moe")
    assert sorted(n for n in tensors(tmp_path / "out") if "experts" not in n and "layers" not in n) == [
        "model.embed_tokens.weight", "model.norm.weight",
    ]  # fmt: skip


def test_both_of_a_tied_pair_are_filled_where_like_holds_both(tmp_path: Path) -> None:
    model = Model()
    state = model.spelled("grouped")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    source = model.written(tmp_path / "source")
    save(state, tmp_path / "out", like=source)
    held = tensors(tmp_path / "out")
    assert same(held["lm_head.weight"], state["lm_head.weight"])
    assert same(held["model.embed_tokens.weight"], state["lm_head.weight"])


# Dtypes.


def test_masters_in_float32_are_narrowed_but_for_exact_rows(tmp_path: Path) -> None:
    model = tiny.build("deepseek_v3")
    report = save(model, tmp_path / "out", dtype=torch.bfloat16)
    held = tensors(tmp_path / "out")
    exact = {name for name in held if name.endswith("e_score_correction_bias")}
    assert exact
    for name, tensor in held.items():
        assert tensor.dtype == (torch.float32 if name in exact else torch.bfloat16), name
    assert report.narrowed["lm_head.weight"] == "F32 -> BF16"
    assert set(report.narrowed) == {n for n in model.state_dict() if "e_score_correction_bias" not in n}
    assert f"narrowed {len(report.narrowed)} tensors" in str(report)
    source = tensors(tiny.saved("deepseek_v3"))
    assert differing(held, {n: t if n in exact else t.bfloat16() for n, t in source.items()}) == []


@pytest.mark.parametrize("family_id", ["deepseek_v3", "nemotron_h", "mixtral"])
def test_masters_in_float32_take_the_dtypes_of_like(family_id: str, tmp_path: Path) -> None:
    like = tiny.saved(family_id, dtype=torch.bfloat16)
    narrow = tiny.build(family_id, dtype=torch.bfloat16)
    master = tiny.build(family_id)
    report = save(master, tmp_path / "out", like=like)
    held, wanted = tensors(tmp_path / "out"), tensors(like)
    assert {n: t.dtype for n, t in held.items()} == {n: t.dtype for n, t in wanted.items()}
    assert differing(held, wanted) == []
    wide = {n for n, t in narrow.state_dict().items() if t.dtype == torch.float32}
    assert set(report.narrowed) == set(master.state_dict()) - wide


def test_an_exact_row_is_never_narrowed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(tiny.saved("deepseek_v3"), source)
    held = {n: t.bfloat16().contiguous() for n, t in tensors(source).items()}
    from safetensors.torch import save_file

    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(errors.PrecisionError) as caught:
        restow.save(tiny.build("deepseek_v3"), tmp_path / "out", like=source)
    assert "e_score_correction_bias in F32, as the state has it, found BF16" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_widening_is_no_loss(tmp_path: Path) -> None:
    report = save(Model().spelled("grouped"), tmp_path / "out", family="qwen3_moe", dtype=torch.float32)
    assert report.narrowed == {}
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.float32}


# Refusals, each before anything is written.


def test_state_without_a_place_is_refused_by_name(tmp_path: Path) -> None:
    model = Model()
    source = model.written(tmp_path / "source")
    state = {
        **model.spelled("grouped"),
        "model.extra.bias": torch.ones(3),
        "model.extra.weight": torch.ones(3),
    }
    with pytest.raises(errors.UnexpectedTensorError) as caught:
        restow.save(state, tmp_path / "out", like=source)
    assert str(caught.value) == (
        "expected a place in the files for every tensor of the state, found 2 without one\n"
        "  no place  model.extra.bias\n"
        "            model.extra.weight\n"
        "  try       rename= says how names differ; leave out of the state what is not to be saved"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_tensors_of_like_that_nobody_fills_are_refused_by_name(tmp_path: Path) -> None:
    model = Model()
    source = model.written(tmp_path / "source", more=torch.ones(2))
    state = model.spelled("grouped")
    del state["model.norm.weight"]
    with pytest.raises(errors.MissingTensorError) as caught:
        restow.save(state, tmp_path / "out", like=source)
    text = str(caught.value)
    assert text.startswith(
        "expected a tensor of the state for every tensor of the files, found 2 that no rank holds\n"
        "  missing   model.norm.weight\n"
        "            more\n"
    )
    del state[f"{AT.format(1)}.down_projs"]
    with pytest.raises(errors.MissingTensorError, match=r"layers\.1\.mlp\.experts\.down_projs"):
        restow.save(state, tmp_path / "out", like=source)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_missing_expert_is_refused_by_name(tmp_path: Path) -> None:
    model = Model()
    source = model.written(tmp_path / "source")
    state = model.spelled("split")
    del state[f"{AT.format(1)}.5.up_proj.weight"]
    with pytest.raises(errors.MissingTensorError, match=r"experts\.5\.up_proj\.weight"):
        restow.save(state, tmp_path / "out", like=source)
    with pytest.raises(errors.MissingTensorError, match=r"experts\.5\.up_proj\.weight"):
        restow.save(state, tmp_path / "out", family="qwen3_moe")


def test_what_is_no_place_to_write(tmp_path: Path) -> None:
    state, out = Model().spelled("grouped"), tmp_path / "out"
    report = save(state, out, family="qwen3_moe", config=Model().config)
    before = files(out)
    with pytest.raises(errors.DestinationExistsError):
        restow.save(state, out, family="qwen3_moe")
    assert files(out) == before
    state["model.norm.weight"] += 1
    assert save(state, out, family="qwen3_moe", replace=True).bytes_total == report.bytes_total
    assert same(tensors(out)["model.norm.weight"], state["model.norm.weight"])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(errors.DestinationExistsError):
        restow.save(state, out, family="qwen3_moe", replace=True)
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(errors.SamePathError):
        restow.save(state, out, like=out, family="qwen3_moe", replace=True)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({}, "expected a family, which says how its vendor ships experts, found none"),
        ({"family": "nobody"}, "nobody"),
        ({"layout": "sideways", "family": "qwen3_moe"}, "expected a layout name, one of"),
        (
            {"like": "here", "layout": "split"},
            "expected like= alone, found layout=, dtype=, quantize= or config= with it",
        ),
        ({"like": "nowhere"}, "nowhere"),
        ({"family": "qwen3_moe", "rename": "x"}, "rename"),
        (
            {"family": "qwen3_moe", "config": 3},
            "expected config= as a config of transformers, a dict or a path",
        ),
        ({"family": "qwen3_moe", "shard": restow.Shard("e", 0, 2)}, "expected the size of e with shard="),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_words_that_cannot_be_meant(words: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(errors.RestowError) as caught:
        restow.save(Model().spelled("grouped"), tmp_path / "out", **words)
    assert text in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_states_that_are_none(tmp_path: Path) -> None:
    for state, text in (
        ({"a": 3}, "a tensor as a"),
        ({"a": torch.empty(2, device="meta")}, "memory behind a"),
        ({"a": torch.eye(2).to_sparse()}, "a strided tensor as a"),
        ({"a": torch.zeros(2, dtype=torch.complex128)}, "a dtype that safetensors can hold"),
    ):
        with pytest.raises(errors.RestowError, match=text):
            restow.save(state, tmp_path / "out", family="qwen3_moe")


def test_like_that_is_no_folder_of_safetensors(tmp_path: Path) -> None:
    import torch.distributed.checkpoint as dcp

    state = Model().spelled("grouped")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(errors.RestowError, match="safetensors files"):
        restow.save(state, tmp_path / "out", like=tmp_path / "dcp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dcp"]


def test_like_one_file(tmp_path: Path) -> None:
    model = Model()
    source = model.written(tmp_path / "source", files=1)
    save(model.spelled("grouped"), tmp_path / "out", like=source / "model.safetensors", family="qwen3_moe")
    assert files(tmp_path / "out")["model.safetensors"] == files(source)["model.safetensors"]


# Files.


def test_shards_are_filled_up_to_the_limit(tmp_path: Path) -> None:
    model = Model()
    save(model.spelled("grouped"), tmp_path / "out", family="qwen3_moe", max_shard_bytes=2000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3
    total = 0
    for shard in shards:
        held = load_file(shard)
        total += sum(t.nbytes for t in held.values())
        assert sum(t.nbytes for t in held.values()) <= 2000 or len(held) == 1
        assert all(index["weight_map"][name] == shard.name for name in held)
    assert index["metadata"]["total_size"] == total
    assert differing(tensors(tmp_path / "out"), model.spelled("split")) == []


def test_a_saved_folder_is_a_checkpoint(tmp_path: Path) -> None:
    model = Model()
    save(model.spelled("grouped"), tmp_path / "out", family="qwen3_moe", config=model.config)
    opened = restow.open(tmp_path / "out")
    assert [p for p in opened.problems if p.fatal] == []
    assert restow.verify(tmp_path / "out").equal
    assert restow.verify(tmp_path / "out", model.written(tmp_path / "source")).equal


def test_threads_and_progress(tmp_path: Path) -> None:
    model = Model(e=16, f=32, d=64)
    state = model.spelled("grouped")
    seen: list[tuple[int, int]] = []
    one = save(state, tmp_path / "one", family="qwen3_moe", threads=1, progress=lambda *n: seen.append(n))
    save(state, tmp_path / "five", family="qwen3_moe", threads=5, progress=True)
    assert files(tmp_path / "one") == files(tmp_path / "five")
    assert seen[-1] == (one.bytes_total, one.bytes_total)
    assert [n for n, _ in seen] == sorted(n for n, _ in seen)


def test_views_that_are_not_contiguous(tmp_path: Path) -> None:
    """Transposed views, slices and expanded tensors give their values, whatever their memory."""
    model = Model()
    state = model.spelled("grouped")
    for name in [n for n in state if ".experts." in n]:
        state[name] = state[name].transpose(1, 2).contiguous().transpose(1, 2)
    wide = numbers([model.d, 2], torch.bfloat16, 5)
    state["model.norm.weight"] = wide[:, 1]
    state["lm_head.weight"] = torch.full((), 2.0, dtype=torch.bfloat16).expand(13, model.d)
    save(state, tmp_path / "out", family="qwen3_moe")
    wanted = model.spelled("split")
    wanted["model.norm.weight"] = wide[:, 1].contiguous()
    wanted["lm_head.weight"] = torch.full((13, model.d), 2.0, dtype=torch.bfloat16)
    assert differing(tensors(tmp_path / "out"), wanted) == []


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    state = {**Model().spelled("grouped"), "scale": torch.tensor(3.5), "none": torch.empty(0, 4)}
    save(state, tmp_path / "out", family="qwen3_moe")
    held = tensors(tmp_path / "out")
    assert held["scale"].item() == 3.5
    assert held["none"].shape == (0, 4)
    save(state, tmp_path / "again", like=tmp_path / "out", family="qwen3_moe")
    assert files(tmp_path / "again") == files(tmp_path / "out")


def test_the_report(tmp_path: Path) -> None:
    report = save(Model().spelled("grouped"), tmp_path / "out", family="qwen3_moe")
    text = str(report)
    assert text.startswith(f"saved {report.tensors} tensors in 1 file at {tmp_path / 'out'}: ")
    assert f"{report.bytes_total:,} bytes, {report.bytes_total:,} of them from here" in text
    with pytest.raises(AttributeError):
        report.files = 3  # type: ignore[misc]


# In the background.


def test_the_state_may_change_once_save_has_returned(tmp_path: Path) -> None:
    model = Model(e=16, f=64, d=128)
    state = model.spelled("grouped")
    handle = restow.save(state, tmp_path / "out", family="qwen3_moe", wait=False)
    assert isinstance(handle, SaveHandle)
    assert handle.staged()
    for tensor in state.values():
        tensor.zero_()
    report = handle.result(60)
    assert handle.done()
    assert differing(tensors(tmp_path / "out"), model.spelled("split")) == []
    assert report is handle.result()
    kept = {name: tensor.data_ptr() for name, tensor in handle.buffers.items()}
    again = restow.save(state, tmp_path / "zero", family="qwen3_moe", wait=False, reuse=handle)
    assert isinstance(again, SaveHandle)
    assert {name: tensor.data_ptr() for name, tensor in again.buffers.items()} == kept
    again.result(60)
    assert not any(t.any() for t in tensors(tmp_path / "zero").values())


@pytest.mark.parametrize("wait", [True, False])
def test_a_state_that_is_written_to_meanwhile_is_not_saved(
    wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # X13
    """Another thread trains: what would be saved is of two steps."""
    from restow.torch import save as module

    model = Model()
    state = model.spelled("grouped")
    real = module._copied

    def step(*_: object) -> None:
        with torch.no_grad():
            state["model.norm.weight"].add_(1)

    def copied(*words: Any) -> Any:
        step()
        return real(*words)

    monkeypatch.setattr(module, "_copied", copied)
    words: dict[str, Any] = {"layout": "split", "family": model.family, "config": model.config, "wait": wait}
    with pytest.raises(errors.IntegrityError) as caught:
        restow.save(state, tmp_path / "a", progress=step if wait else None, **words)
    assert str(caught.value) == (
        "expected a state that nobody writes to while it is saved, found 1 tensor written to meanwhile\n"
        "  tensors   model.norm.weight\n"
        "  try       save between two steps; with wait=False the next one may begin once save has returned"
    )
    assert list(tmp_path.iterdir()) == []
    with torch.inference_mode():
        uncounted = {name: tensor.clone() for name, tensor in state.items()}
    monkeypatch.undo()
    done = restow.save(uncounted, tmp_path / "b", **words)
    assert (done if isinstance(done, SaveReport) else done.result()).files == 1


def test_buffers_of_a_save_in_inference_mode_are_taken_outside_it(tmp_path: Path) -> None:
    model = Model()
    state = model.spelled("grouped")
    with torch.inference_mode():
        first = restow.save(state, tmp_path / "a", family=model.family, layout="split", wait=False)
    assert isinstance(first, SaveHandle)
    first.result(60)
    kept = {name: tensor.data_ptr() for name, tensor in first.buffers.items()}
    again = restow.save(state, tmp_path / "b", family=model.family, layout="split", wait=False, reuse=first)
    assert isinstance(again, SaveHandle)
    again.result(60)
    assert {name: tensor.data_ptr() for name, tensor in again.buffers.items()} == kept
    assert differing(tensors(tmp_path / "b"), model.spelled("split")) == []


def test_buffers_in_use_are_not_taken(tmp_path: Path, held_up: Callable[[], None]) -> None:
    state = Model().spelled("grouped")
    handle = restow.save(state, tmp_path / "out", family="qwen3_moe", wait=False)
    assert isinstance(handle, SaveHandle)
    with pytest.raises(errors.UsageError, match="one that still writes from its buffers"):
        restow.save(state, tmp_path / "more", family="qwen3_moe", wait=False, reuse=handle)
    with pytest.raises(TimeoutError, match=r"not done after 0\.05 s"):
        handle.result(0.05)
    assert not handle.done()
    held_up()
    handle.result(60)


@pytest.fixture
def held_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Writing waits until what this gives is called."""
    from threading import Event

    gate, pwrite = Event(), writing.pwrite

    def slow(*args: Any) -> int:
        gate.wait(60)
        return pwrite(*args)

    monkeypatch.setattr(writing, "pwrite", slow)
    yield gate.set
    gate.set()


def test_errors_in_the_background_come_with_the_result(tmp_path: Path) -> None:
    state = Model().spelled("grouped")
    save(state, tmp_path / "out", family="qwen3_moe")
    handle = restow.save(state, tmp_path / "out", family="qwen3_moe", wait=False)
    assert isinstance(handle, SaveHandle)
    for _ in range(2):
        with pytest.raises(errors.DestinationExistsError):
            handle.result(60)
    with pytest.raises(errors.UsageError):
        restow.save({"a": 1}, tmp_path / "b", wait=False)  # type: ignore[dict-item]


# Failures.


@pytest.mark.parametrize(
    ("call", "at"),
    [("create", 2), ("allocate", 1), ("pwrite", 3), ("fsync", 1), ("fsync", 2), ("close", 1), ("sync_folder", 1),
     ("mkdir", 1), ("exchange", 1)],
)  # fmt: skip
def test_a_failing_disk_leaves_the_old_checkpoint(
    call: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call in turn; `test_publish` breaks each single one. Here: that the verb comes through to it."""
    state, out = Model().spelled("grouped"), tmp_path / "out"
    save(state, out, family="qwen3_moe")
    before = files(out)
    state["model.norm.weight"] += 1
    count = 0

    def fail(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(ERRORS["ENOSPC"], "planted")
        return real(*args)

    real = getattr(writing, call)
    monkeypatch.setattr(writing, call, fail)
    with pytest.raises(errors.DestinationError):
        restow.save(state, out, family="qwen3_moe", replace=True)
    monkeypatch.setattr(writing, call, real)
    assert files(out) == before
    assert nothing_left(tmp_path)
    save(state, out, family="qwen3_moe", replace=True)
    assert same(tensors(out)["model.norm.weight"], state["model.norm.weight"])


def test_a_callers_error_ends_the_writing(tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise Enough

    with pytest.raises(Enough):
        restow.save(Model().spelled("grouped"), tmp_path / "out", family="qwen3_moe", progress=stop)
    assert not (tmp_path / "out").exists()
    assert nothing_left(tmp_path)


def test_buffers_that_no_checkpoint_holds_are_left_out(tmp_path: Path) -> None:
    """Non-persistent buffers (rotary frequencies) are no state; persistent ones are."""
    module = nn.Module()
    for name, tensor in Model().spelled("grouped").items():
        graft(module, name, nn.Parameter(tensor, requires_grad=False))
    module.model.register_buffer("inv_freq", torch.ones(3), persistent=False)  # type: ignore[union-attr,operator]
    module.model.register_buffer("kept", torch.ones(3))  # type: ignore[union-attr,operator]
    save(module, tmp_path / "out", family="qwen3_moe")
    assert "model.inv_freq" not in tensors(tmp_path / "out")
    assert "model.kept" in tensors(tmp_path / "out")


@pytest.mark.parametrize("wrapper", ["_orig_mod", "_checkpoint_wrapped_module"])
def test_wrappers_are_passed_over(wrapper: str, tmp_path: Path) -> None:
    model = Model()
    state = {f"{wrapper}.{name}": tensor for name, tensor in model.spelled("grouped").items()}
    save(state, tmp_path / "out", family="qwen3_moe")
    assert differing(tensors(tmp_path / "out"), model.spelled("split")) == []


def test_like_a_quantised_checkpoint(tmp_path: Path) -> None:
    """Its names, codes and files, and the values of the state; the same as a conversion of the state encodes."""
    model = Model(e=4, f=128, d=192, layers=1)
    plain = model.written(tmp_path / "plain", "split")
    restow.convert(plain, tmp_path / "source", to="split", quantize="fp8", max_shard_bytes=60_000)
    restow.save(model.spelled("grouped"), tmp_path / "out", like=tmp_path / "source")
    before, after = (tensors(tmp_path / name) for name in ("source", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        tmp_path / "source" / "config.json"
    ).read_bytes()


def test_like_codes_that_are_not_made_is_refused(tmp_path: Path) -> None:
    model = Model(e=4, f=128, d=128, layers=1)
    coded: Tensors = {}
    for name, tensor in model.spelled("split").items():
        coded[name] = tensor
        if ".experts." in name:
            coded[name] = torch.ones(tensor.shape[0], tensor.shape[1] // 2, dtype=torch.uint8)
            coded[f"{name}_scale"] = torch.ones(tensor.shape[0], tensor.shape[1] // 16).to(
                torch.float8_e4m3fn
            )
            coded[f"{name}_scale_2"] = torch.tensor(1.0)
    said = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    source = write(tmp_path / "source", coded, {**model.config, "quantization_config": said})
    with pytest.raises(errors.QuantizationError) as caught:
        restow.save(model.spelled("grouped"), tmp_path / "out", like=source)
    assert "expected codes with one scale, which encoding makes, found 2 (nvfp4)" in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
