"""Memory in the order of the files: loads into it are reads alone, and it trains as packed memory does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from torch.testing._internal.distributed.fake_pg import FakeStore

import restow
from moe import AT, Model, Tensors, differing, same, write
from restow.errors import AmbiguousLayoutError, UsageError
from restow.layout import Layout
from restow.notation import parse_row
from restow.torch import read
from restow.torch.disk_order import disk_order

SMALL = Model()
NAMES = [f"{AT.format(0)}.gate_and_up_projs", f"{AT.format(0)}.down_projs"]
STRAIGHT = ["fused", "stacked", "torchtitan", "epfd", "mlx"]  # contiguous, and what nearly all files are
FORMS = ["split", "fused", "grouped", *STRAIGHT[1:], "megatron", "megatron_sequential"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SMALL.written(tmp_path_factory.mktemp("small"))


@pytest.fixture
def tiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source tensors that went through a tile: any element that was not read straight into its place."""
    seen: list[str] = []
    before = read._Worker._from_file

    def watched(worker: Any, part: Any, *rest: Any) -> int:
        calls: list[int] = []
        inner = read._Worker._tiled

        def through(worker: Any, *rest: Any) -> int:
            calls.append(1)
            return inner(worker, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(read._Worker, "_tiled", through)
            done = before(worker, part, *rest)
        seen.extend([part.name] * bool(calls))
        return done

    rows = read._Worker._whole_rows

    def whole_rows(worker: Any, job: Any) -> int:
        done = rows(worker, job)
        copies = (*job.copies, *job.beside) if done else ()
        seen.extend(worker._plan.parts[copy.source].name for copy in copies)
        return done

    monkeypatch.setattr(read._Worker, "_from_file", watched)
    monkeypatch.setattr(read._Worker, "_whole_rows", whole_rows)
    return seen


def filled(source: Path, experts: Tensors, **options: Any) -> Tensors:
    """The experts, loaded; the other tensors take their part too, and are dropped."""
    others = {name: torch.empty_like(t) for name, t in SMALL.others.items()}
    report = restow.load(source, {**experts, **others}, threads=1, **options)
    assert set(report.in_place) == {*experts, *others}
    return experts


def wanted(layout: str) -> Tensors:
    return SMALL.spelled(layout, others=False)


# Straight.


@pytest.mark.parametrize("layout", FORMS)
def test_loads_are_reads_alone(folder: Path, layout: str, tiled: list[str]) -> None:
    into = restow.empty_like_disk(folder, layout=layout)
    assert differing(filled(folder, into), wanted(layout)) == []
    assert tiled == []


def test_grouped_is_a_transposed_view(folder: Path) -> None:
    into = restow.empty_like_disk(folder)
    assert {name: (t.shape, t.stride()) for name, t in into.items() if name in NAMES} == {
        NAMES[0]: ((8, 10, 12), (120, 1, 10)),
        NAMES[1]: ((8, 6, 10), (60, 1, 6)),
    }
    assert into[NAMES[0]].transpose(1, 2).is_contiguous()


def test_the_check_for_tiles_can_fail(folder: Path, tiled: list[str]) -> None:
    packed = {name: torch.empty_like(t) for name, t in wanted("grouped").items()}
    assert differing(filled(folder, packed), wanted("grouped")) == []
    assert len(tiled) == len(wanted("split"))


@pytest.mark.parametrize("layout", STRAIGHT)
def test_these_layouts_are_disk_order_as_they_stand(folder: Path, layout: str, tiled: list[str]) -> None:
    assert all(t.is_contiguous() for t in restow.empty_like_disk(folder, layout=layout).values())
    packed = {name: torch.empty_like(t) for name, t in wanted(layout).items()}
    assert differing(filled(folder, packed), wanted(layout)) == []
    assert tiled == []


@pytest.mark.parametrize("src", FORMS)
@pytest.mark.parametrize("dst", FORMS)
def test_strides_follow_from_the_rows_of_both_sides(src: str, dst: str, tmp_path: Path) -> None:
    source = SMALL.written(tmp_path, src)
    into = restow.empty_like_disk(source, layout=dst)
    assert {name: t.shape for name, t in into.items()} == {name: t.shape for name, t in wanted(dst).items()}
    for tensor in into.values():
        order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
        assert tensor.permute(order).is_contiguous(), "no gaps, no overlaps"
    assert differing(filled(source, into), wanted(dst)) == []
    if src in ("grouped", "fused") and dst in ("fused", "epfd"):
        assert all(tensor.is_contiguous() == (src == "fused") for tensor in into.values())


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_s_part(folder: Path, rank: int, tiled: list[str]) -> None:
    """8 experts on 3 ranks: 3, 3 and 2, all of them straight."""
    shard = restow.Shard("e", rank, 3)
    into = filled(folder, restow.empty_like_disk(folder, shard=shard), shard=shard)
    start, count = shard.run(8)
    assert differing(into, {n: t[start : start + count] for n, t in wanted("grouped").items()}) == []
    assert tiled == []


def test_experts_by_list(folder: Path, tiled: list[str]) -> None:
    chosen = [5, 0, 7]
    into = restow.empty_like_disk(folder, experts=chosen)
    others = {n: torch.empty(3, 10, dtype=t.dtype) if "gate" in n else torch.empty_like(t)
              for n, t in SMALL.others.items()}  # fmt: skip
    restow.load(folder, {**into, **others}, experts=chosen)
    assert differing(into, SMALL.spelled("grouped", others=False, take=chosen)) == []
    assert [name for name in tiled if ".experts." in name] == []


@pytest.mark.parametrize("axis", ["f", "d"])
def test_a_cut_inside_experts_is_right_too(folder: Path, axis: str) -> None:
    shard = restow.Shard(axis, 1, 2)
    into = filled(folder, restow.empty_like_disk(folder, shard=shard), shard=shard)
    both, down = (wanted("grouped")[name] for name in NAMES)
    parts = both.unflatten(2, (2, 6))
    expected = (parts[..., 3:].flatten(2), down[:, 3:]) if axis == "f" else (both[:, 5:], down[..., 5:])
    assert all(same(into[name], t.contiguous()) for name, t in zip(NAMES, expected, strict=True))


def test_other_dtypes_and_devices(folder: Path) -> None:
    wide = filled(folder, restow.empty_like_disk(folder, dtype=torch.float32))
    assert differing(wide, {name: t.float() for name, t in wanted("grouped").items()}) == []
    meta = restow.empty_like_disk(folder, device="meta")
    assert all(t.is_meta and t.stride() == wide[name].stride() for name, t in meta.items())


def test_interleaved_files(tmp_path: Path, tiled: list[str]) -> None:
    """gpt_oss: what its named layouts are is its own, in this order too."""
    model = SMALL.but(family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))
    source = model.written(tmp_path, "hf")
    into = restow.empty_like_disk(source)
    assert all(t.is_contiguous() for t in into.values()), "its files are grouped"
    restow.load(source, {**into, **{n: torch.empty_like(t) for n, t in model.others.items()}})
    assert differing(into, model.spelled("grouped", others=False)) == []
    assert tiled == []
    fused = restow.empty_like_disk(source, layout="fused")
    assert fused[f"{AT.format(0)}.gate_up_proj"].stride() == (120, 1, 12)


# What no strides can do.


def test_a_layout_that_no_strides_bring_into_order_is_refused(tmp_path: Path) -> None:
    model = SMALL.but(family="gpt_oss", roles=("in", "out", "in.bias", "out.bias"))
    source = model.written(tmp_path, "hf")
    with pytest.raises(UsageError) as caught:
        restow.empty_like_disk(source, layout=Layout.parse("in w e d (p f)\nout v e f d"))
    assert str(caught.value) == (
        "expected a layout of role 'in' whose memory can be in the order of the files, "
        "found one in which 'p', the fastest axis there, is not the last of its dim\n"
        "  source    in gate_up_proj e d (f p)\n"
        "  target    in w e d (p f)\n"
        "  try       take packed tensors of this layout: their values are put in order on the way"
    )


def test_a_source_without_experts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AmbiguousLayoutError) as caught:
        restow.empty_like_disk({"model.norm.weight": torch.ones(3)})
    assert str(caught.value) == (
        "expected experts in a layout that restow knows, found none among 1 tensors\n"
        "  try       restow.open(path, layout=...) says what they are in"
    )
    with pytest.raises(restow.errors.MissingTensorError, match="experts of a qwen3_moe model, found none"):
        restow.empty_like_disk(write(tmp_path, {"model.norm.weight": torch.ones(3)}, SMALL.config))


def test_a_source_whose_experts_fit_nothing_is_refused(tmp_path: Path) -> None:
    broken = {name: t[:-1].contiguous() for name, t in SMALL.spelled("split").items()}
    with pytest.raises(restow.errors.ShapeMismatchError, match=r"expected shape \[6, 10\]"):
        restow.empty_like_disk(write(tmp_path, broken, SMALL.config))


SIZES = {"e": 8, "p": 2, "f": 6, "d": 10}


@pytest.mark.parametrize(
    ("target", "source", "order"),
    [
        ("e d (p f)", "{e}.{p:gate|up} f d", (0, 2, 1)),
        ("e d (p f)", "{p:1|3} e f d", (0, 2, 1)),
        ("e p f d", "{e} (p f) d", (0, 1, 2, 3)),
        ("d f p e", "x e (p f) d", (3, 2, 1, 0)),
        ("e (f p) d", "x e d (f p)", (0, 2, 1)),
        ("e d (p f)", "x e (f p) d", (0, 2, 1)),
        ("e (p f)/4 d/5", "{e} f/4 d/5", (0, 1, 2)),
    ],
)
def test_the_order_of_dims(target: str, source: str, order: tuple[int, ...]) -> None:
    name, _, dims = source.partition(" ")
    assert disk_order(parse_row(f"in w {target}"), parse_row(f"in {name} {dims}"), SIZES) == order


def test_axes_of_one_index_have_no_order() -> None:
    target, source = parse_row("in w e d (p f)"), parse_row("in x e d (f p)")
    assert disk_order(target, source, {**SIZES, "p": 1}) == (0, 1, 2)
    assert disk_order(target, source, {**SIZES, "f": 1}) == (0, 1, 2)


# Training.


def layer(both: torch.Tensor, down: torch.Tensor, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    gate, up = F.grouped_mm(x, both, offs=ends).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, down, offs=ends)


@pytest.mark.parametrize("foreach", [False, True])
def test_grouped_matmul_backward_and_adamw(tmp_path: Path, foreach: bool) -> None:
    """bfloat16, rows of a multiple of 16 bytes as grouped GEMM wants them: as on packed parameters."""
    model = Model(e=4, f=16, d=32, layers=1)
    noise = torch.Generator().manual_seed(0)
    values = {n: torch.randn(t.shape, generator=noise).bfloat16() for n, t in model.spelled("split").items()}
    source = write(tmp_path, values, model.config)
    at = [name for name in wanted("grouped") if ".0." in name]
    disk = restow.empty_like_disk(source)
    packed = {name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in disk.items()}
    steps = []
    for tensors in (disk, packed):
        restow.load(source, {**tensors, **{n: torch.empty_like(t) for n, t in model.others.items()}})
        parameters = [nn.Parameter(tensors[name]) for name in at]
        before = [p.stride() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, foreach=foreach)
        x = torch.linspace(-1, 1, 24 * 32).view(24, 32).bfloat16().requires_grad_()
        for _ in range(2):
            y = layer(*parameters, x, torch.tensor([5, 5, 16, 24], dtype=torch.int32))
            y.float().square().mean().backward()
            optimizer.step()
        assert [p.stride() for p in parameters] == before
        assert all(optimizer.state[p]["exp_avg"].stride() == p.stride() for p in parameters)
        assert x.grad is not None
        steps.append([y.detach(), x.grad, *(p.detach() for p in parameters), *(p.grad for p in parameters)])
    assert [t.is_contiguous() for t in steps[0][2:]] == [False] * 4
    for ours, theirs in zip(*steps, strict=True):
        assert torch.isfinite(ours).all()
        assert ours.count_nonzero() > 0
        torch.testing.assert_close(ours, theirs)


class Block(nn.Module):
    """A module of experts at their place in a model."""

    def __init__(self, experts: Tensors) -> None:
        super().__init__()
        for name, tensor in experts.items():
            self.register_parameter(name.rpartition(".")[2], nn.Parameter(tensor))


def test_as_parameters_of_a_model(folder: Path, tiled: list[str]) -> None:
    """The parameters are the tensors: nothing is replaced when they are loaded."""
    root = nn.Module()
    tensors = {**restow.empty_like_disk(folder), **{n: torch.empty_like(t) for n, t in SMALL.others.items()}}
    for name, tensor in tensors.items():
        at = root
        *path, leaf = name.split(".")
        for word in path:
            if word not in at._modules:
                at.add_module(word, nn.Module())
            at = at.get_submodule(word)
        at.register_parameter(leaf, nn.Parameter(tensor))
    before = {name: p.data_ptr() for name, p in root.named_parameters()}
    report = restow.load(folder, root)
    assert sorted(report.in_place) == sorted(before)
    assert {name: p.data_ptr() for name, p in root.named_parameters()} == before
    found = {name: p.detach() for name, p in root.named_parameters()}
    assert differing(found, SMALL.spelled("grouped")) == []
    assert tiled == []


# Sharded models. No process answers: what is asked of others would hang, and nothing is.


@pytest.fixture
def second_of_two() -> Iterator[Any]:
    """A mesh of two ranks, seen by the second, without a first."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    distributed.destroy_process_group()


def test_a_dtensor_over_memory_in_disk_order(folder: Path, second_of_two: Any, tiled: list[str]) -> None:
    part = restow.empty_like_disk(folder, shard=restow.Shard("e", 1, 2))
    into = {name: DTensor.from_local(t, second_of_two, [Cut(0)], run_check=False) for name, t in part.items()}
    assert all(t.shape[0] == 8 for t in into.values())
    filled(folder, into)
    assert differing(part, {n: t[4:] for n, t in wanted("grouped").items()}) == []
    assert tiled == []


def test_fully_shard_refuses_memory_in_disk_order(folder: Path, second_of_two: Any) -> None:
    experts = restow.empty_like_disk(folder)
    with pytest.raises(NotImplementedError) as caught:
        fully_shard(Block({name: experts[name] for name in NAMES}), mesh=second_of_two)
    assert str(caught.value) == (
        "FSDP does not support non-contiguous parameters yet: "
        "param.shape=torch.Size([8, 10, 12]) param.stride()=(120, 1, 10)"
    )


@pytest.mark.parametrize("layout", STRAIGHT)
def test_fully_shard_takes_layouts_in_disk_order(
    folder: Path, layout: str, second_of_two: Any, tiled: list[str]
) -> None:
    """What to use instead: contiguous, sharded by `fully_shard`, and read straight."""
    names = [name for name in wanted(layout) if name.startswith(AT.format(0))]
    made = restow.empty_like_disk(folder, layout=layout)
    block = Block({name.replace("_proj.weight", "_weight"): made[name] for name in names})
    fully_shard(block, mesh=second_of_two)
    into = dict(zip(names, block.parameters(), strict=True))
    report = restow.load(folder, into, part=True)
    assert set(report.in_place) == set(names)
    local = {name: t.to_local().detach() for name, t in into.items()}
    assert differing(local, {name: wanted(layout)[name][4:] for name in names}) == []
    assert tiled == []
