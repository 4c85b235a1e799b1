"""What a call may not mean: refused by name, all of it at once, before a byte is touched."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

import restow
import tiny
from moe import AT, Model, differing
from restow.cli import app
from restow.errors import IntegrityError, MissingTensorError, PrecisionError, ShapeMismatchError, UsageError

SMALL = Model()


class Wrapped(torch.Tensor):
    """A subclass that hides its storage."""


def empty(layout: str = "fused") -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(t) for name, t in SMALL.spelled(layout).items()}


def test_every_meta_tensor_is_named(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    meta = {name: t.to("meta") for name, t in empty().items()}
    with pytest.raises(UsageError) as caught:
        restow.load(source, meta)
    lines = "\n".join(f"            {name}" for name in list(meta)[1:])
    assert str(caught.value) == (
        "expected memory behind model.embed_tokens.weight, and the like for 8 more, found a meta tensor\n"
        f"  tensors   model.embed_tokens.weight\n{lines}\n"
        "  try       materialise the model first, e.g. model.to_empty(device=...)"
    )


def test_every_tensor_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    into = empty()
    into["lm_head.weight"] = into["lm_head.weight"].as_subclass(Wrapped)
    into["model.norm.weight"] = torch.zeros(1, dtype=torch.bfloat16).expand(10)
    with pytest.raises(UsageError) as caught:
        restow.load(SMALL.written(tmp_path / "source"), into)
    assert str(caught.value).splitlines()[1:3] == [
        "  tensors   model.norm.weight",
        "            lm_head.weight: Wrapped",
    ]


def test_every_wrong_shape_is_named(tmp_path: Path) -> None:
    into = empty()
    into["lm_head.weight"], into["model.norm.weight"] = torch.zeros(3, 3), torch.zeros(3)
    with pytest.raises(ShapeMismatchError, match=r"(?s)model.norm.weight.*lm_head.weight"):
        restow.load(SMALL.written(tmp_path / "source"), into)


def test_exact_rows_are_narrowed_only_where_they_are_named() -> None:
    source = tiny.saved("deepseek_v3")
    into = {k: v.to(torch.bfloat16) for k, v in tiny.build("deepseek_v3").state_dict().items()}
    exact = [name for name in into if name.endswith("e_score_correction_bias")]
    assert len(exact) == 2
    with pytest.raises(PrecisionError) as caught:
        restow.load(source, into)
    assert all(name in str(caught.value) for name in exact)
    with pytest.raises(PrecisionError, match=exact[1]) as caught:
        restow.load(source, into, allow_narrowed=[exact[0]])
    assert exact[0] not in str(caught.value)
    with pytest.raises(UsageError, match="allow_narrowed patterns that match something, found 'nothing'"):
        restow.load(source, into, allow_narrowed=["*bias", "nothing"])
    report = restow.load(source, into, allow_narrowed=["*.e_score_correction_bias"])
    assert {report.narrowed[name] for name in exact} == {"F32 -> BF16"}


def test_experts_of_a_module_that_is_not_there(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    for call in (restow.plan, lambda path, **words: restow.load(path, empty(), **words)):
        with pytest.raises(UsageError) as caught:
            call(source, experts={"model.layers.9.mlp.experts": [1]})
        assert str(caught.value).splitlines()[0] == (
            f"expected experts by module, such as {AT.format(0)}, {AT.format(1)}, found model.layers.9.mlp.experts"
        )


def test_shards_of_what_is_no_axis_of_the_experts(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    with pytest.raises(UsageError, match="one of d, e, f, p, found 'L'"):
        restow.plan(source, shard=restow.Shard("L", rank=0, of=2))
    for rank, of in ((0.5, 2), (True, 2), (0, 2.0)):
        with pytest.raises(UsageError, match="a rank from 0 to of - 1"):
            restow.Shard("e", rank=rank, of=of)  # type: ignore[arg-type]


@pytest.mark.parametrize("rename", [[("a",)], "ab", [("", "x")]])
def test_renames_that_are_none(rename: object, tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    for into in (None, empty()):
        with pytest.raises(UsageError, match="rename as pairs"):
            restow.plan(source, into, rename=rename)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="rename as pairs"):
        restow.load(source, empty(), rename=rename)  # type: ignore[arg-type]


def test_a_plan_without_a_destination_is_renamed_too(tmp_path: Path) -> None:
    rename = [("model.layers", "blocks"), ("lm_head", "head")]
    source = SMALL.written(tmp_path / "source")
    plan = restow.plan(source, rename=rename)
    into = {t.name: torch.zeros(t.shape, dtype=torch.bfloat16) for t in plan.targets}
    assert not plan.missing and not plan.unused
    wanted = {
        name.replace("model.layers", "blocks").replace("lm_head", "head"): t
        for name, t in SMALL.spelled("grouped").items()
    }
    assert restow.load(source, into, rename=rename).bytes_read == plan.bytes
    assert differing(into, wanted) == []


def test_flattened_experts_in_memory_are_counted_by_their_routers() -> None:
    model, other = tiny.build("dbrx"), tiny.build("dbrx")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    report = restow.load(state, other, family="dbrx")
    assert not report.missing and not report.unused
    assert differing(dict(other.state_dict()), state) == []
    grouped = restow.relayout(state, dst="grouped", family="dbrx")
    assert differing(restow.relayout(grouped, dst="hf", family="dbrx"), state) == []


def test_a_conversion_says_a_check_that_can_succeed(tmp_path: Path) -> None:
    source = SMALL.written(tmp_path / "source")
    (tmp_path / "keep.json").write_text("[1, 2]")
    for number, (words, against) in enumerate((
        ([], f"{source} {tmp_path / '0'}"),
        (["--keep-experts", str(tmp_path / "keep.json")], f"{tmp_path / '1'}    (the source holds other values)"),
        (["--dtype", "f16"], f"{tmp_path / '2'}    (the source holds other values)"),
        (["--dtype", "f32"], f"{source} {tmp_path / '3'}"),
    )):  # fmt: skip
        made = tmp_path / str(number)
        done = CliRunner().invoke(app, ["convert", str(source), str(made), "--to", "fused", *words])
        assert done.exit_code == 0
        assert f"check it with: restow verify {against}\n" in done.stdout
        checked = against.partition("    ")[0].split()
        assert CliRunner().invoke(app, ["verify", *checked]).exit_code == 0


@pytest.mark.parametrize("code", ["utf-8", "ascii"])
def test_a_path_with_spaces_and_other_letters(code: str, tmp_path: Path) -> None:
    """What is said to check a conversion can be pasted; a stream that lacks a letter gets it escaped, and no traceback."""
    source, made = SMALL.written(tmp_path / "das Modell"), tmp_path / "gr\xf6\xdfer \udcff"
    done = CliRunner(charset=code).invoke(app, ["convert", str(source), str(made), "--to", "fused"])
    assert (done.exit_code, done.stderr) == (0, "")
    said = done.stdout.partition("check it with: ")[2].rstrip("\n")
    spelled = str(made).encode(code, "backslashreplace").decode(code)
    assert said == f"restow verify '{source}' '{spelled}'"
    assert made.is_dir()
    assert CliRunner(charset=code).invoke(app, ["verify", str(source), str(made)]).exit_code == 0


def test_a_model_that_lacks_a_tensor_of_its_experts_is_not_a_broken_download(tmp_path: Path) -> None:
    into = {name: t for name, t in empty().items() if name != f"{AT.format(1)}.down_proj"}
    with pytest.raises(MissingTensorError) as caught:
        restow.load(SMALL.written(tmp_path / "source"), into, part=True)
    assert str(caught.value) == (
        "expected 8 experts in model.layers.1.mlp.experts, found 0\n"
        "  missing   model.layers.1.mlp.experts.down_proj\n"
        "  try       give the destination all tensors of these experts, or say with experts= or shard= which it holds"
    )


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"layout": ["grouped"]}, "expected a layout's name, or a restow.Layout, found list"),
        ({"family": 3}, "expected a model type, or a restow.Family, as family=, found int"),
        ({"shard": ("e", 0, 2)}, "expected a restow.Shard as shard=, found tuple"),
    ],
)
def test_words_of_another_kind(words: dict[str, object], text: str, tmp_path: Path) -> None:
    source, into = SMALL.written(tmp_path / "source"), empty()
    with pytest.raises(UsageError) as caught:
        restow.load(source, into, **words)  # type: ignore[arg-type]
    assert str(caught.value) == text
    assert not any(tensor.any() for tensor in into.values())


def test_a_conversion_to_no_layout(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        restow.convert(SMALL.written(tmp_path / "source"), tmp_path / "target", to=None)  # type: ignore[arg-type]
    assert str(caught.value) == "expected a layout's name, or a restow.Layout, as to=, found NoneType"
    assert not (tmp_path / "target").exists()


def test_a_save_like_a_checkpoint_that_is_open(tmp_path: Path) -> None:
    opened = SMALL.opened(tmp_path / "source")
    restow.save(SMALL.spelled("grouped"), tmp_path / "saved", like=opened, family="qwen3_moe")
    for file in sorted((tmp_path / "source").glob("*.safetensors")):
        assert (tmp_path / "saved" / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(UsageError) as caught:
        restow.save(SMALL.spelled("grouped"), tmp_path / "other", like=replace(opened, path=None))
    assert str(caught.value) == "expected a checkpoint in files as like=, found one in memory"


@pytest.mark.parametrize("said", [{"family": "qwen3_moe"}, {"layout": "split"}])
def test_a_save_like_a_checkpoint_that_was_said_to_be_of_a_kind(said: dict[str, str], tmp_path: Path) -> None:
    """Without a config what its opener said is all that is known of it."""
    source = SMALL.written(tmp_path / "source")
    (source / "config.json").unlink(missing_ok=True)
    opened = restow.open(source, **said)  # type: ignore[arg-type]
    state = SMALL.spelled("split")
    restow.save(state, tmp_path / "saved", like=opened)
    with pytest.warns(UserWarning, match="in a single process"):
        dcp.save(state, storage_writer=restow.dcp.Writer(tmp_path / "dcp", like=opened))
    for file in sorted(source.glob("*.safetensors")):
        for folder in ("saved", "dcp"):
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes()


def test_a_save_like_a_checkpoint_that_was_written_again(tmp_path: Path) -> None:
    opened = SMALL.opened(tmp_path / "source")
    file = sorted((tmp_path / "source").glob("*.safetensors"))[0]
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        restow.save(SMALL.spelled("split"), tmp_path / "saved", like=opened)
    assert str(caught.value) == (
        f"expected a checkpoint that stays as it was, found another file\n  in        {file}"
    )
    assert not (tmp_path / "saved").exists()
