"""Fingerprints: fixed numbers, a second implementation, what they must see, and that parts add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.tensor import Replicate, init_device_mesh

import restow
import tiny
from moe import AT, Model, Tensors, spell
from restow.layout import Layout
from restow.torch.sums import bilinear
from test_load_ranks import FOUR, THREE, Case, distributed, module_of, on_ranks

MASK = 2**64 - 1
SMALL = Model(e=12, f=6, d=10, layers=1)
LAYOUTS = ["split", "fused", "grouped", "stacked"]

# A second implementation, in plain Python, by the text of restow.torch.sums.


def mix(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def plainly(matrix: torch.Tensor) -> int:
    """The number of one leaf, [rows, cols]."""
    total = 0
    for r in range(matrix.shape[0]):
        data = bytes(matrix[r].contiguous().view(torch.uint8).tolist())
        for q in range(-(-len(data) // 8)):
            word = int.from_bytes(data[8 * q : 8 * q + 8], "little")
            total += word * (mix(2 * r) | 1) * (mix(2 * q + 1) | 1)
    return total & MASK


def ours(matrix: torch.Tensor) -> int:
    return bilinear(matrix, torch.arange(matrix.shape[0]), torch.arange(matrix.shape[1]))


# Published test vectors: bytes 0, 1, 2 ... modulo 251 as a matrix, by dtype and shape.
VECTORS = {
    ("uint8", (1, 1)): 0,
    ("uint8", (3, 5)): 0x87F41BC33607D6B9,
    ("bfloat16", (2, 3)): 0x94BEA13B709A5C5A,
    ("bfloat16", (12, 16)): 0xE5021054D98190C0,
    ("float32", (4, 7)): 0xFF7149F12DF03080,
    ("float64", (3, 3)): 0xD8DCDAF5C579A210,
}


def counted(dtype: str, shape: Sequence[int]) -> torch.Tensor:
    kind = getattr(torch, dtype)
    size = shape[0] * shape[1] * kind.itemsize
    return (torch.arange(size) % 251).to(torch.uint8).view(kind).reshape(tuple(shape))


@pytest.mark.parametrize(("case", "number"), VECTORS.items(), ids=str)
def test_vectors(case: tuple[str, tuple[int, int]], number: int) -> None:
    matrix = counted(*case)
    assert ours(matrix) == number
    assert plainly(matrix) == number


def test_splitmix_is_the_published_one() -> None:
    """The first outputs of SplitMix64 from seed 1234567, as published with it."""
    state, found = 1234567, []
    for _ in range(3):
        found.append(mix(state))
        state = (state + 0x9E3779B97F4A7C15) & MASK
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


KINDS = [
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.int64,
]


@given(st.data())
def test_second_implementation(data: st.DataObject) -> None:
    """Any shape, dtype, strides, and any cut into parts, which then add up."""
    kind = data.draw(st.sampled_from(KINDS))
    rows, cols = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 21))
    seed = data.draw(st.integers(0, 99))
    raw = torch.randint(0, 256, (rows * cols * kind.itemsize,), generator=torch.Generator().manual_seed(seed))
    raw = raw % 2 if kind == torch.bool else raw
    whole = raw.to(torch.uint8).view(kind).reshape(rows, cols)
    wanted = plainly(whole)
    turned = torch.empty(cols, rows, dtype=kind)
    turned.t().copy_(whole)
    assert _same_bits(turned.t(), whole)
    wide = torch.zeros(rows, 2 * cols, dtype=kind)
    wide[:, ::2] = whole
    for view in (whole, turned.t(), wide[:, ::2]):
        assert ours(view) == wanted
    r, c = data.draw(st.integers(0, rows)), data.draw(st.integers(0, cols))
    parts = 0
    for a, b in ((0, r), (r, rows)):
        for x, y in ((0, c), (c, cols)):
            if b > a and y > x:
                parts += bilinear(whole[a:b, x:y], torch.arange(a, b), torch.arange(x, y))
    assert parts & MASK == wanted
    even, odd = torch.arange(0, cols, 2), torch.arange(1, cols, 2)
    strided = sum(bilinear(whole[:, i], torch.arange(rows), i) for i in (even, odd) if len(i))
    assert strided & MASK == wanted


@pytest.mark.parametrize("kind", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "cols"), [(4099, 1161), (33, 9001), (5000, 8), (1, 900)])
def test_columns_in_memory_by_blocks(rows: int, cols: int, kind: torch.dtype) -> None:
    """More rows and more words than one block has, and columns that belong to another leaf between them."""
    seeded = torch.Generator().manual_seed(rows)
    data = torch.randint(0, 256, (cols, 2 * rows * kind.itemsize), dtype=torch.uint8, generator=seeded).view(
        kind
    )
    for half in (data[:, :rows], data[:, rows:]):
        packed = half.t().contiguous()
        assert not half.t().is_contiguous() or rows == 1
        assert ours(half.t()) == ours(packed)
        assert bilinear(half.t()[:, 3:], torch.arange(rows), torch.arange(3, cols)) == bilinear(
            packed[:, 3:], range(rows), range(3, cols)
        )
    assert ours(packed[:9]) == plainly(packed[:9])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    one, other = (t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(one, other)


# What must be seen.


def changed(state: Tensors, change: Any) -> list[str]:
    """The keys whose number is another after a change to a copy of the state."""
    copy = {name: tensor.clone() for name, tensor in state.items()}
    change(copy)
    before, after = (restow.fingerprint(s, family="qwen3_moe") for s in (state, copy))
    assert before.keys() == after.keys()
    return sorted(key for key in before if before[key] != after[key])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_exchanged_is_seen(layout: str) -> None:
    state = SMALL.spelled(layout)
    at = "model.layers.0"

    def exchanged(*pairs: tuple[str, tuple[int, int]], leaf: str) -> Any:
        """The state with leaves of the model exchanged before it is spelled."""
        weights = {role: SMALL.weight(role, 0).clone() for role in ("in", "out")}
        if leaf == "p":
            weights["in"][7] = weights["in"][7].flip(0)
        elif leaf == "e":
            weights["in"][[2, 10]] = weights["in"][[10, 2]]
        elif leaf == "rows":
            weights["in"][3, 0, [1, 4]] = weights["in"][3, 0, [4, 1]]
        elif leaf == "cols":
            weights["out"][3][:, [1, 4]] = weights["out"][3][:, [4, 1]]
        form = restow.families["qwen3_moe"].form(layout)

        def change(copy: Tensors) -> None:
            for row in form.rows:
                axes = {"in": "e p f d", "out": "e f d"}[row.role]
                copy.update(
                    {f"{AT.format(0)}.{n}": t for n, t in spell(row, axes, weights[row.role]).items()}
                )

        return change

    assert changed(state, exchanged(leaf="p")) == [f"{at}.experts.7.gate", f"{at}.experts.7.up"]
    experts = [f"{at}.experts.{e}.{p}" for e in (10, 2) for p in ("gate", "up")]
    assert changed(state, exchanged(leaf="e")) == experts
    assert changed(state, exchanged(leaf="rows")) == [f"{at}.experts.3.gate"]
    assert changed(state, exchanged(leaf="cols")) == [f"{at}.experts.3.down"]
    assert changed(state, exchanged(leaf="")) == []


def test_any_one_bit_is_seen() -> None:
    matrix = counted("bfloat16", (3, 5))
    wanted = ours(matrix)
    bits = matrix.view(torch.int16)
    for r in range(3):
        for c in range(5):
            for bit in range(16):
                bits[r, c] ^= torch.tensor(1 << bit, dtype=torch.int32).to(torch.int16)
                assert ours(matrix) != wanted
                bits[r, c] ^= torch.tensor(1 << bit, dtype=torch.int32).to(torch.int16)
    assert ours(matrix) == wanted


# The same in every layout, prefix and place.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_every_layout_on_disk_and_in_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model = SMALL.but(dtype=dtype, f=5)
    wanted = {key: plainly(leaf) for key, leaf in leaves(model).items()}
    for layout in LAYOUTS:
        folder = model.written(tmp_path / layout, layout)
        assert dict(restow.fingerprint(folder)) == wanted
        state = model.spelled(layout)
        assert dict(restow.fingerprint(state, family="qwen3_moe")) == wanted
        assert dict(restow.fingerprint(module_of(state), family="qwen3_moe")) == wanted
        restow.convert(folder, tmp_path / f"{layout}-", to="grouped")
        assert dict(restow.fingerprint(tmp_path / f"{layout}-")) == wanted


def leaves(model: Model) -> dict[str, torch.Tensor]:
    """Every leaf of a model, [rows, cols], by key."""
    out = {name: t.reshape(-1, t.shape[-1]) for name, t in model.others.items()}
    for layer in range(model.layers):
        for e in range(model.e):
            at = f"model.layers.{layer}.experts.{e}"
            pair = model.weight("in", layer)[e]
            out |= {
                f"{at}.gate": pair[0],
                f"{at}.up": pair[1],
                f"{at}.down": model.weight("out", layer)[e].t(),
            }
    return out


def test_a_named_layout_of_ones_own(tmp_path: Path) -> None:
    mine = Layout.parse("in w.{p:gate|up} d (e f)\nout v.{e} f d")
    model = SMALL.but(e=4)
    state = model.spelled(mine)
    found = restow.fingerprint(state, family="qwen3_moe", layout=mine)
    assert dict(found) == {key: plainly(leaf) for key, leaf in leaves(model).items()}


IDS = [n for n, family in tiny.FAMILIES.items() if not family.slow]


@pytest.mark.parametrize("family_id", IDS)
def test_every_family_on_the_hub_and_at_run_time(family_id: str) -> None:
    model = tiny.build(family_id)
    memory = restow.fingerprint(model)
    hub, runtime = (restow.fingerprint(tiny.saved(family_id, form)) for form in (True, False))
    assert sum(".experts" in key for key in memory) >= 12
    for disk in (hub, runtime):  # a vision tower may be spelled otherwise there; experts and text are not
        both = disk.keys() & memory.keys()
        assert {key: disk[key] for key in both} == {key: memory[key] for key in both}
        assert {
            key for key in disk.keys() ^ memory.keys() if "vision" not in key and key != "lm_head.weight"
        } == set()
    with torch.no_grad():
        name = next(n for n, p in model.named_parameters() if ".experts" in n and p.dim() > 1)
        model.get_parameter(name).view(-1)[3] += 1
    after = restow.fingerprint(model)
    assert sum(after[key] != memory[key] for key in memory) == 1


# Shards add up.


def of_rank(rank: int, cases: Sequence[Case]) -> list[tuple[bool, dict[str, int]]]:
    """Fingerprints of what this rank holds, and whether it is the first of its replicas."""
    out = []
    for _, model, layout, shape, placements in cases:
        mesh = init_device_mesh("cpu", tuple(shape))
        state = distributed(model.spelled(layout, others=False), mesh, placements)
        where = mesh.get_coordinate()
        assert where is not None
        first = all(i == 0 for i, p in zip(where, placements, strict=True) if isinstance(p, Replicate))
        own = restow.families["qwen3_moe"] if layout != "epfd" else None
        numbers = restow.fingerprint(state, family=own, layout=None if own else restow.layouts[layout])
        out.append((first, dict(numbers)))
    return out


@pytest.mark.parametrize(("world", "cases"), [(4, FOUR), (3, THREE)], ids=["4 ranks", "3 ranks"])
def test_ranks_add_up(world: int, cases: Sequence[Case], tmp_path: Path) -> None:
    cases = [case for case in cases if case[2] in restow.layouts and case[2] != "epfd"]
    ranks = on_ranks(world, tmp_path, of_rank, cases)
    for i, (name, model, *_) in enumerate(cases):
        total: dict[str, int] = {}
        for rank in ranks:
            first, numbers = rank[i]
            for key, number in numbers.items() if first else ():
                total[key] = (total.get(key, 0) + number) & MASK
        wanted = {key: plainly(leaf) for key, leaf in leaves(model).items() if ".experts" in key}
        assert total == wanted, name


# A load that proves itself.


def flipping(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """What a bad memory would do: a change to the destination after it was filled."""
    from restow.torch import load as module

    real = module.execute

    def execute(plan: Any, tensors: Mapping[str, torch.Tensor], **more: Any) -> Any:
        booked = real(plan, tensors, **more)
        change(tensors)
        return booked

    monkeypatch.setattr(module, "execute", execute)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_flipped_bit_in_memory_is_named(
    layout: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SMALL.written(tmp_path / "m", "split")
    state = {name: torch.zeros_like(t, dtype=dtype) for name, t in SMALL.spelled(layout).items()}
    assert restow.load(folder, state, check=True).in_place

    def flip(tensors: Mapping[str, torch.Tensor]) -> None:
        name = next(n for n in tensors if ".experts" in n)
        tensors[name].view(-1).view(torch.int16 if dtype.itemsize == 2 else torch.int32)[1] ^= 2

    flipping(monkeypatch, flip)
    restow.load(folder, state)  # nobody looks
    with pytest.raises(restow.errors.IntegrityError) as caught:
        restow.load(folder, state, check=True)
    assert ".experts" in str(caught.value)
    assert caught.value.found == "1 leaves with other values"


def test_other_tensors_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SMALL.written(tmp_path / "m", "fused")
    state = {name: torch.zeros_like(t) for name, t in SMALL.spelled("grouped").items()}
    flipping(monkeypatch, lambda tensors: tensors["model.norm.weight"].view(torch.int16)[9].add_(1))
    with pytest.raises(restow.errors.IntegrityError) as caught:
        restow.load(folder, state, check=True)
    assert caught.value.tensor == "model.norm.weight"


@pytest.mark.parametrize("experts", [[3, 3, 0], list(range(11, -1, -1))])
def test_chosen_experts_are_checked(
    experts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SMALL.written(tmp_path / "m", "split")
    state = {name: torch.zeros_like(t) for name, t in SMALL.spelled("grouped", take=experts).items()}
    gate = "model.layers.0.mlp.gate.weight"
    state[gate] = torch.zeros(len(experts), SMALL.d, dtype=torch.bfloat16)
    restow.load(folder, state, experts=experts, check=True)
    flipping(monkeypatch, lambda tensors: tensors[f"{AT.format(0)}.down_projs"][1, 2].mul_(-1))
    with pytest.raises(restow.errors.IntegrityError) as caught:
        restow.load(folder, state, experts=experts, check=True)
    assert "experts.1.down" in str(caught.value)


def test_memory_to_memory_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SMALL.spelled("split")
    state = {name: torch.zeros_like(t) for name, t in SMALL.spelled("grouped").items()}
    restow.load(source, state, family="qwen3_moe", check=True)
    flipping(monkeypatch, lambda tensors: tensors[f"{AT.format(0)}.down_projs"][5].zero_())
    with pytest.raises(restow.errors.IntegrityError):
        restow.load(source, state, family="qwen3_moe", check=True)


def checked_on_rank(rank: int, folder: Path, cases: Sequence[Case], bad: int) -> list[str]:
    """Loads that prove themselves; on rank `bad` one element is changed behind their back."""
    from restow.torch import load as module

    real = module.execute

    def execute(plan: Any, tensors: Mapping[str, torch.Tensor], **more: Any) -> Any:
        booked = real(plan, tensors, **more)
        for name, tensor in tensors.items():
            if rank == bad and ".experts" in name and tensor.numel():
                tensor.view(-1)[-1:].view(torch.int16).bitwise_xor_(1)
                break
        return booked

    module.execute = execute
    out = []
    for _, model, layout, shape, placements in cases:
        mesh = init_device_mesh("cpu", tuple(shape))
        full = {n: torch.zeros_like(t) for n, t in model.spelled(layout).items()}
        into = distributed(full, mesh, placements)
        try:
            restow.load(folder / str(model.e), into, check=True)
            out.append("")
        except restow.errors.IntegrityError as error:
            out.append(str(error.found))
    return out


def test_every_rank_proves_its_own_part(tmp_path: Path) -> None:
    cases = [case for case in FOUR if case[2] in restow.layouts]
    for model in {case[1] for case in cases}:
        model.written(tmp_path / "m" / str(model.e))
    good = on_ranks(4, tmp_path, checked_on_rank, tmp_path / "m", cases, -1)
    assert good == [[""] * len(cases)] * 4
    found = on_ranks(4, tmp_path, checked_on_rank, tmp_path / "m", cases, 2)
    assert [rank for i, rank in enumerate(found) if i != 2] == [[""] * len(cases)] * 3
    held = [case[0] != "empty" for case in cases]
    assert [bool(text) for text, some in zip(found[2], held, strict=True) if some] == [True] * sum(held)


def test_a_module_with_a_config_needs_no_family() -> None:
    class Config:
        def to_dict(self) -> dict[str, object]:
            return dict(SMALL.config)

    module = module_of(SMALL.spelled("fused"))
    module.config = Config()  # type: ignore[assignment]
    assert isinstance(module, nn.Module)
    assert restow.fingerprint(module) == restow.fingerprint(SMALL.spelled("fused"), family="qwen3_moe")
