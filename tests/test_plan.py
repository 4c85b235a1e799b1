"""Plans: values in JSON both ways, exact for any layout, part and list of experts; what is left is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import restow
from moe import AT, Model, Tensors, numbers, painted, simulated, write
from restow.boxes import Run
from restow.errors import MissingTensorError, ShapeMismatchError, UsageError
from restow.landing import Wish
from restow.planning import make_plan
from restow.plans import Plan
from restow.targets import Shard, Target
from restow.torch.load import as_checkpoint

SMALL = Model(dtype=torch.float64)  # its elements are numbers of their own, which numpy can hold
FORMS = [
    "split",
    "fused",
    "grouped",
    "stacked",
    "torchtitan",
    "epfd",
    "megatron",
    "megatron_sequential",
    "mlx",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SMALL.written(tmp_path_factory.mktemp("small"))


def meta(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def cut(tensor: torch.Tensor, dim: int, part: Shard) -> torch.Tensor:
    """`torch.chunk`'s part of a rank, empty behind the last chunk."""
    chunks = tensor.chunk(part.of, dim)
    return chunks[part.rank] if part.rank < len(chunks) else tensor.narrow(dim, 0, 0)


def check(plan: Plan, sources: Tensors, wanted: Tensors) -> None:
    found = simulated(plan, sources)
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name].numpy(), err_msg=name)


# Exact.


@pytest.mark.parametrize("src", FORMS)
@pytest.mark.parametrize("dst", FORMS)
def test_every_form_to_every_other(src: str, dst: str) -> None:
    have, want = SMALL.spelled(src), SMALL.spelled(dst)
    plan = restow.plan(have, meta(want), family="qwen3_moe")
    check(plan, have, want)
    assert (plan.missing, plan.unused, plan.passed) == ((), (), ())
    assert plan.layouts == tuple((AT.format(i), *map(called, (src, dst))) for i in range(2))


def called(name: str) -> str:
    return "hf/split" if name == "split" else name


@settings(max_examples=40)
@given(
    axis=st.sampled_from(["e", "f", "d"]),
    of=st.integers(1, 12),
    data=st.data(),
    dst=st.sampled_from(["fused", "grouped", "stacked", "epfd"]),
)
def test_shards_along_any_axis_are_what_chunk_gives(
    axis: str, of: int, data: st.DataObject, dst: str
) -> None:
    part = Shard(axis, data.draw(st.integers(0, of - 1)), of)
    have = SMALL.spelled("split")
    want = {name: sharded(name, t, dst, part) for name, t in SMALL.spelled(dst).items()}
    plan = restow.plan(have, meta(want), family="qwen3_moe", shard=part)
    check(plan, have, want)
    again = restow.plan(have, layout=dst, family="qwen3_moe", shard=part)
    check(again, have, want)


def sharded(name: str, tensor: torch.Tensor, layout: str, part: Shard) -> torch.Tensor:
    """A rank's part of one tensor, by its row's dims; a grouped dim is taken apart first."""
    rows = {f"{AT.format(i)}.{key}": row for row in restow.layouts[layout].rows for i in range(2)
            for key in restow.Layout((row,)).keys({"e": 8, "p": 2, "f": 6, "d": 10})}  # fmt: skip
    if name not in rows or part.axis not in rows[name].axes:
        return tensor
    for dim, spec in enumerate(rows[name].dims):
        factors = [factor.axis for factor in spec.factors]
        if factors == [part.axis]:
            return cut(tensor, dim, part)
        if part.axis in factors:
            lengths = [{"p": 2, "f": 6}[axis] for axis in factors]
            open_dim = tensor.unflatten(dim, lengths)
            return cut(open_dim, dim + factors.index(part.axis), part).flatten(dim, dim + 1)
    raise AssertionError(name)


@pytest.mark.parametrize("of", [1, 3, 8, 11])
def test_ranks_together_read_every_expert_byte_once(folder: Path, of: int) -> None:
    source = restow.open(folder)
    bytes_of = {n: e.pieces[0] for n, e in source.tensors.items() if ".experts." in n}
    taken: list[tuple[str, int, int]] = []
    for rank in range(of):
        plan = restow.plan(source, shard=Shard("e", rank, of))
        experts = [(part.file, part.begin, part.end) for part in plan.parts if ".experts." in part.name]
        counted = sum(end - begin for _, begin, end in experts)
        others = sum(part.end - part.begin for part in plan.parts if ".experts." not in part.name)
        assert plan.bytes == counted + others
        taken += experts
    assert sorted(taken) == sorted((piece.file, piece.begin, piece.end) for piece in bytes_of.values())


@pytest.mark.parametrize("axis", ["e", "f", "d"])
def test_the_union_of_all_ranks_is_everything_once(axis: str) -> None:
    have, want = SMALL.spelled("split"), SMALL.spelled("grouped")
    dims = {"gate_and_up_projs": {"e": 0, "d": 1, "f": 3}, "down_projs": {"e": 0, "f": 1, "d": 2}}
    pieces: dict[str, list[np.ndarray]] = {}
    for rank in range(4):
        plan = restow.plan(have, family="qwen3_moe", shard=Shard(axis, rank, 4))
        for name, array in simulated(plan, have).items():
            if ".experts." in name:
                open_dims = array.reshape(*array.shape[:2], 2, -1) if "gate" in name else array
                pieces.setdefault(name, []).append(open_dims)
    assert len(pieces) == 4
    for name, parts in pieces.items():
        whole = np.concatenate(parts, axis=dims[name.rpartition(".")[2]][axis])
        np.testing.assert_array_equal(whole.reshape(want[name].shape), want[name].numpy())


def test_1024_ranks_of_an_expert_mesh() -> None:
    """64 ranks along e, 16 along the second dim: what `[Shard(0), Shard(1)]` on (64, 16) holds."""
    model = Model(e=64, f=2, d=32, layers=1, dtype=torch.float64)
    have, want = model.spelled("split", others=False), model.spelled("grouped", others=False)
    source = as_checkpoint(have, restow.families["qwen3_moe"])
    seen = {name: np.zeros(t.shape, np.int64) for name, t in want.items()}
    total = 0
    for rank in range(1024):
        a, b = divmod(rank, 16)
        targets = []
        for name, tensor in want.items():
            runs = tuple(
                chunk(n, *cut) for n, cut in zip(tensor.shape, [(a, 64), (b, 16), (0, 1)], strict=True)
            )
            targets.append(Target(name, tuple(tensor.shape), "F64", runs))
        plan = make_plan(source, targets, Wish())
        total += plan.bytes
        for target in plan.targets:
            place = tuple(slice(s, s + n) for ((s, n),) in target.runs) if all(target.runs) else None
            if place is not None:
                got = simulated(plan, have)[target.name]
                np.testing.assert_array_equal(got, want[target.name].numpy()[place])
                seen[target.name][place] += 1
    assert all((count == 1).all() for count in seen.values())
    assert total >= sum(t.nbytes for t in have.values())


def chunk(length: int, rank: int, of: int) -> tuple[Run, ...]:
    start, count = Shard("e", rank, of).run(length)
    return ((start, count),) if count else ()


# Lists of experts.


@pytest.mark.parametrize(
    "chosen", [[0, 1, 2], [7, 0, 3], [5], [2, 2, 2, 1], list(range(8))], ids=lambda c: ",".join(map(str, c))
)
def test_a_list_of_experts(chosen: list[int]) -> None:
    have = SMALL.spelled("split")
    want = {n: t for n, t in SMALL.spelled("grouped", take=chosen).items() if "mlp.gate" not in n}
    gates = {n: t[chosen] for n, t in have.items() if "mlp.gate" in n}
    plan = restow.plan(have, meta({**want, **gates}), family="qwen3_moe", experts=chosen)
    check(plan, have, {**want, **gates})


def test_experts_by_module() -> None:
    have = SMALL.spelled("split")
    lists = {AT.format(0): [3, 1], AT.format(1): [0, 6, 6]}
    want = {}
    for path, chosen in lists.items():
        whole = SMALL.spelled("grouped", take=chosen)
        want.update({n: t for n, t in whole.items() if n.startswith(path + ".")})
    plan = restow.plan(have, meta(want), family="qwen3_moe", experts=lists)
    check(plan, have, want)


def test_routers_keep_their_rows_where_e_is_the_same(folder: Path) -> None:
    order = [7, 6, 5, 4, 3, 2, 1, 0]
    have = SMALL.spelled("split")
    want = {**SMALL.spelled("grouped", take=order), **SMALL.others}
    plan = restow.plan(folder, meta(want), experts=order)
    check(plan, have, want)


@pytest.mark.parametrize(
    ("experts", "found"),
    [([8], "8"), ([-1], "-1"), ([True], "True"), (["1"], "'1'"), ([0, 99], "99")],
)
def test_experts_that_are_not_there_are_refused(folder: Path, experts: list[int], found: str) -> None:
    with pytest.raises(UsageError) as caught:
        restow.plan(folder, experts=experts)
    assert str(caught.value) == f"expected expert numbers from 0 to 7 for {AT.format(0)}, found {found}"


# Names.


def test_what_is_left_is_told_by_name(folder: Path) -> None:
    want = meta(SMALL.spelled("grouped"))
    del want["model.norm.weight"]
    want["model.extra.weight"] = torch.empty(3, device="meta")
    plan = restow.plan(folder, want)
    assert plan.missing == ("model.extra.weight",)
    assert plan.unused == ("model.norm.weight",)


def test_a_module_that_is_not_wanted_is_unused_by_name(folder: Path) -> None:
    want = {n: t for n, t in meta(SMALL.spelled("grouped")).items() if ".layers.1." not in n}
    plan = restow.plan(folder, want)
    assert set(plan.unused) == {n for n in SMALL.spelled("split") if ".layers.1." in n}
    assert plan.missing == ()


def test_what_the_family_excuses_is_passed(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    SMALL.written(tmp_path, **{name: torch.ones(2)})
    plan = restow.plan(tmp_path, meta(SMALL.spelled("grouped")))
    assert (plan.unused, plan.passed) == ((), (name,))


def test_pairs_of_renames(folder: Path) -> None:
    want = {
        name.replace("model.layers.", "decoder.blocks.").replace(".mlp.", ".moe."): tensor
        for name, tensor in SMALL.spelled("grouped").items()
    }
    have = SMALL.spelled("split")
    renames = [(f"model.layers.{i}.mlp", f"decoder.blocks.{i}.moe") for i in range(2)]
    plan = restow.plan(folder, meta(want), rename=renames)
    check(plan, have, want)
    assert (plan.missing, plan.unused) == ((), ())


def test_the_first_rename_that_matches_is_applied_once(folder: Path) -> None:
    want = {"a.norm.weight": SMALL.others["model.norm.weight"].to("meta")}
    plan = restow.plan(folder, want, rename=[("model.norm", "a.norm"), ("a.norm", "b.norm"), ("norm", "c")])
    assert plan.missing == ()


def test_a_table_with_braces() -> None:
    """torchtitan's `from_hf_map`: one line per kind of name, None for what has no place."""
    table = {
        "model.embed_tokens.weight": "tok_embeddings.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": None,
        "model.layers.{}.mlp.gate.weight": "layers.{}.moe.router.gate.weight",
        "model.layers.{}.mlp.experts.{}.gate_proj.weight": "layers.{}.moe.experts.w1",
        "model.layers.{}.mlp.experts.{}.up_proj.weight": "layers.{}.moe.experts.w3",
        "model.layers.{}.mlp.experts.{}.down_proj.weight": "layers.{}.moe.experts.w2",
    }
    have = SMALL.spelled("split")
    want = {}
    for name, tensor in SMALL.spelled("stacked").items():
        to = name.replace("model.layers.", "layers.").replace("mlp.experts", "moe.experts")
        to = to.replace("mlp.gate", "moe.router.gate").replace("model.embed_tokens", "tok_embeddings")
        want[to.replace("model.norm", "norm")] = tensor
    want.pop("lm_head.weight")
    plan = restow.plan(have, meta(want), family="qwen3_moe", rename=table)
    check(plan, have, want)
    assert (plan.missing, plan.unused) == ((), ())


@pytest.mark.parametrize("rename", [[("a",)], ["ab"], {"a": 3}, [("", "b")]], ids=repr)
def test_renames_that_are_none_are_refused(folder: Path, rename: object) -> None:
    with pytest.raises(
        UsageError, match=r"rename as pairs \(old run, new run\), or a dict of names with \{\}"
    ):
        restow.plan(folder, meta(SMALL.spelled("grouped")), rename=rename)  # type: ignore[arg-type]


def test_hub_names_fill_runtime_names() -> None:
    hub = SMALL.but(family="mixtral", at="model.layers.{}.block_sparse_moe.experts")
    runtime = SMALL.but(family="mixtral")
    have = {name.replace("mlp.gate", "block_sparse_moe.gate"): t for name, t in hub.spelled("split").items()}
    want = runtime.spelled("fused")
    assert "model.layers.1.block_sparse_moe.experts.7.w3.weight" in have
    plan = restow.plan(have, meta(want), family="mixtral")
    check(plan, have, want)
    assert (plan.missing, plan.unused) == ((), ())


# Refused.


def test_a_shape_that_is_not_the_source_s_is_refused(folder: Path) -> None:
    want = meta(SMALL.spelled("grouped"))
    want["model.norm.weight"] = torch.empty(11, device="meta")
    with pytest.raises(ShapeMismatchError) as caught:
        restow.plan(folder, want)
    assert str(caught.value) == (
        "expected shape [10] for model.norm.weight, as the source's model.norm.weight has, found [11]\n"
        "  tensor    model.norm.weight\n"
        "  try       only expert weights may be held in part as plain tensors; use a DTensor for others"
    )


def test_experts_of_other_sizes_are_refused(folder: Path) -> None:
    want = meta(SMALL.but(e=7).spelled("grouped"))
    with pytest.raises(ShapeMismatchError, match=r"shape \[8, 10, 12\]"):
        restow.plan(folder, want)


def test_a_missing_expert_is_named_in_full(tmp_path: Path) -> None:
    tensors = SMALL.spelled("split")
    gone = f"{AT.format(1)}.5.up_proj.weight"
    del tensors[gone]
    write(tmp_path, tensors, SMALL.config)
    with pytest.raises(MissingTensorError) as caught:
        restow.plan(tmp_path, meta(SMALL.spelled("grouped")))
    assert gone in str(caught.value)


# Values.


@pytest.mark.parametrize(
    "options",
    [{}, {"shard": Shard("f", 1, 4)}, {"experts": [3, 3, 0]}, {"layout": "split"}, {"layout": "epfd"}],
    ids=["whole", "sharded", "experts", "split", "epfd"],
)
def test_a_plan_is_its_json(folder: Path, options: dict[str, object]) -> None:
    plan = restow.plan(folder, **options)  # type: ignore[arg-type]
    again = Plan.from_json(plan.to_json())
    assert again == plan
    assert (again.bytes, again.reads, again.written) == (plan.bytes, plan.reads, plan.written)
    assert again.to_json() == plan.to_json()
    assert str(again) == str(plan)


def test_plans_that_differ_are_not_equal(folder: Path) -> None:
    assert restow.plan(folder) == restow.plan(folder)
    assert restow.plan(folder) != restow.plan(folder, experts=[0])


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"restow_plan": 99}', '{"restow_plan": 1}', "3", '{"restow_plan":1,"parts":[[1]]}'],
)
def test_text_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        Plan.from_json(text)


@pytest.mark.parametrize("dst", FORMS)
@pytest.mark.parametrize("part", [None, Shard("e", 1, 3), Shard("f", 2, 4), Shard("d", 0, 3)], ids=str)
def test_the_plan_counts_the_bytes_that_are_read(folder: Path, dst: str, part: Shard | None) -> None:
    plan = restow.plan(folder, layout=dst, shard=part)
    into = painted({t.name: torch.empty(t.local_shape, dtype=torch.float64) for t in plan.targets})
    report = restow.load(folder, into, shard=part)
    assert report.bytes_read == plan.bytes
    assert report.bytes_written == plan.written
    assert sum(read.end - read.begin for read in plan.reads) == plan.bytes
    check(plan, SMALL.spelled("split"), into)


def test_a_plan_tells_itself(folder: Path) -> None:
    plan = restow.plan(folder)
    assert str(plan) == (
        f"{len(plan.copies)} copies from {len(plan.parts)} tensors in 2 files "
        f"into {len(plan.targets)} tensors: {plan.bytes:,} bytes to read, {plan.written:,} to write\n"
        "  model.layers.0.mlp.experts: hf/split -> grouped\n"
        "  model.layers.1.mlp.experts: hf/split -> grouped"
    )
    assert plan.bytes == plan.written == sum(t.nbytes for t in SMALL.spelled("split").values())


def test_an_expert_wanted_twice_is_read_once(folder: Path) -> None:
    once = restow.plan(folder, experts=[2])
    twice = restow.plan(folder, experts=[2, 2])
    assert twice.bytes == once.bytes
    assert twice.written > once.written


def test_numbers_are_of_their_own() -> None:
    assert numbers([3, 5], torch.int64, 2).unique().numel() == 15
    tensors = SMALL.spelled("split")
    assert len({t.numpy().tobytes() for t in tensors.values()}) == len(tensors)
