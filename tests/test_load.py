"""Loading: every byte that should be written is, none beside it, and everything else is said by name."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import restow
from moe import AT, Model, Tensors, differing, painted, raw, same, write
from restow.errors import (
    DtypeMismatchError,
    IntegrityError,
    MissingTensorError,
    PrecisionError,
    TruncatedFileError,
    UnexpectedTensorError,
    UsageError,
)
from restow.targets import Shard
from restow.torch.dtypes import narrows

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
SMALL = Model()
PAINTS = (0x5A, 0xA5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SMALL.written(tmp_path_factory.mktemp("small"))


class Place:
    """A view inside a larger storage: what lies around it must stay as it was."""

    def __init__(self, like: torch.Tensor, kind: str) -> None:
        shape = list(like.shape)
        if kind == "transposed" and shape:
            self.whole = torch.empty(shape[::-1], dtype=like.dtype)
            self.cut: Callable[[torch.Tensor], torch.Tensor] = lambda t: t.permute(*reversed(range(t.dim())))
        elif kind == "swapped" and len(shape) > 1:
            self.whole = torch.empty([*shape[:-2], shape[-1], shape[-2]], dtype=like.dtype)
            self.cut = lambda t: t.transpose(-1, -2)
        elif kind == "padded":
            self.whole = torch.empty([n + 3 for n in shape], dtype=like.dtype)
            self.cut = lambda t: t[tuple(slice(1, n + 1) for n in shape)]
        elif kind == "every other":
            self.whole = torch.empty([2 * n + 1 for n in shape], dtype=like.dtype)
            self.cut = lambda t: t[tuple(slice(1, None, 2) for _ in shape)]
        else:
            self.whole = torch.empty(shape, dtype=like.dtype)
            self.cut = lambda t: t
        self.view = self.cut(self.whole)
        assert self.view.shape == like.shape
        outside = torch.ones(self.whole.shape, dtype=torch.bool)
        self.cut(outside).fill_(False)
        self.outside = outside.view(-1)

    def paint(self, byte: int) -> None:
        raw(self.whole).fill_(byte)

    def clean(self, byte: int) -> bool:
        return bool((raw(self.whole).view(-1, self.whole.element_size())[self.outside] == byte).all())


KINDS = ["packed", "transposed", "swapped", "padded", "every other"]


def check_places(source: object, wanted: Tensors, kind: str, **options: object) -> None:
    """Load over two paints: the views hold what is wanted, and not a byte around them moved."""
    places = {name: Place(tensor, kind) for name, tensor in wanted.items()}
    for byte in PAINTS:
        for place in places.values():
            place.paint(byte)
        restow.load(source, {name: place.view for name, place in places.items()}, **options)  # type: ignore[arg-type]
        assert differing({name: place.view for name, place in places.items()}, wanted) == []
        assert [name for name, place in places.items() if not place.clean(byte)] == []


def test_the_check_for_places_can_fail() -> None:
    place = Place(torch.zeros(2, 3), "padded")
    place.paint(0x5A)
    assert place.clean(0x5A)
    place.whole[0, 0] = 0
    assert not place.clean(0x5A)
    assert not same(torch.zeros(2), -torch.zeros(2)), "signs of zero count"
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


# Every byte, in place.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dst", FORMS)
def test_every_form_into_any_strides(folder: Path, dst: str, kind: str) -> None:
    check_places(folder, SMALL.spelled(dst), kind)


@pytest.mark.parametrize("src", FORMS)
@pytest.mark.parametrize("dst", ["split", "grouped", "epfd"])
def test_every_form_of_source(src: str, dst: str, tmp_path: Path) -> None:
    model = SMALL.but(e=11, f=5, d=7)
    check_places(model.written(tmp_path, src, files=3), model.spelled(dst), "packed")
    check_places(model.spelled(src), model.spelled(dst), "swapped", family="qwen3_moe")


DTYPES = [
    torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.uint8,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 3])
def test_every_dtype(dtype: torch.dtype, threads: int, tmp_path: Path) -> None:
    model = SMALL.but(dtype=dtype, f=7, d=9)
    source = model.opened(tmp_path)
    for dst, kind in (("grouped", "packed"), ("fused", "swapped"), ("stacked", "padded")):
        check_places(source, model.spelled(dst), kind, threads=threads)


BIG = [
    pytest.param(Model(e=3, f=701, d=513, layers=1), id="odd, several tiles"),
    pytest.param(Model(e=2, f=512, d=1024, layers=1, dtype=torch.float32), id="powers of two"),
    pytest.param(Model(e=2, f=1, d=70_001, layers=1), id="one row"),
    pytest.param(Model(e=2, f=70_001, d=1, layers=1), id="one column"),
    pytest.param(Model(e=300, f=3, d=5, layers=1), id="many experts"),
    pytest.param(Model(e=2, f=1027, d=1031, layers=1, dtype=torch.float8_e4m3fn), id="one byte, primes"),
    pytest.param(Model(e=1, f=515, d=2047, layers=1, dtype=torch.int64), id="rows of 16 KiB"),
]


@pytest.mark.parametrize("model", BIG)
@pytest.mark.parametrize("src", ["split", "fused"])
def test_sizes_across_tiles(model: Model, src: str, tmp_path: Path) -> None:
    source = model.opened(tmp_path, src)
    for dst in ("grouped", "split" if src == "fused" else "fused"):
        check_places(source, model.spelled(dst), "packed", threads=2)
    check_places(source, model.spelled("grouped"), "swapped")


@pytest.mark.parametrize("part", [("f", 1, 3), ("d", 2, 3), ("e", 1, 2), ("f", 3, 4)], ids=str)
def test_parts_of_larger_experts(part: tuple[str, int, int], tmp_path: Path) -> None:
    """Runs around the length below which gaps are read through."""
    model = Model(e=2, f=1100, d=2300, layers=1)
    source = model.written(tmp_path)
    shard = Shard(*part)
    plan = restow.plan(source, shard=shard)
    start, n = shard.run(getattr(model, part[0]))
    dims = {
        "gate_and_up_projs": {"e": (0,), "d": (1,), "f": (3,)},
        "down_projs": {"e": (0,), "f": (1,), "d": (2,)},
    }
    wanted = {}
    for name, tensor in model.spelled("grouped").items():
        axis = dims.get(name.rpartition(".")[2], {}).get(part[0])
        if axis is not None:
            tensor = tensor.unflatten(-1, (2, -1)) if "gate_and" in name else tensor
            tensor = tensor.narrow(axis[0], start, n)
            tensor = (tensor.flatten(-2) if "gate_and" in name else tensor).contiguous()
        wanted[name] = tensor
    check_places(source, wanted, "packed", shard=shard)
    into = painted(wanted)
    assert restow.load(source, into, shard=shard).bytes_read == plan.bytes


def test_a_rank_without_experts_reads_none(folder: Path) -> None:
    shard = Shard("e", 11, 12)
    into = {
        t.name: torch.empty(t.local_shape, dtype=torch.bfloat16)
        for t in restow.plan(folder, shard=shard).targets
    }
    assert all(t.numel() == 0 for name, t in into.items() if ".experts." in name)
    report = restow.load(folder, into, shard=shard)
    assert report.bytes_read == sum(t.nbytes for t in SMALL.others.values())


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    odd = {"model.a": torch.tensor(3.5), "model.b": torch.empty(0, 5), "model.c": torch.empty(2, 0, 3),
           "model.d": torch.tensor([[7]]), "model.e": torch.tensor(True)}  # fmt: skip
    source = SMALL.written(tmp_path, **odd)
    check_places(source, {**SMALL.spelled("grouped"), **odd}, "packed")
    check_places(
        {**SMALL.spelled("fused"), **odd}, {**SMALL.spelled("grouped"), **odd}, "padded", family="qwen3_moe"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sources_in_memory_may_have_any_strides(kind: str) -> None:
    have = {}
    for name, tensor in SMALL.spelled("fused").items():
        place = Place(tensor, kind)
        place.view.copy_(tensor)
        have[name] = place.view
    check_places(have, SMALL.spelled("grouped"), "packed", family="qwen3_moe")
    check_places(have, SMALL.spelled("split"), "swapped", family="qwen3_moe")


def test_sources_in_memory_may_be_views_of_one_tensor_and_expanded() -> None:
    have = SMALL.spelled("grouped")
    wanted = SMALL.spelled("fused")
    for name in [n for n in have if "gate_and_up" in n]:
        have[name] = have[name][:1].expand(8, -1, -1)
        other = name.replace("gate_and_up_projs", "gate_up_proj")
        wanted[other] = wanted[other][:1].expand(8, -1, -1).contiguous()
    check_places(have, wanted, "packed", family="qwen3_moe")


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    model = SMALL.but(e=2, f=160, d=205, layers=1)
    tensors = model.spelled("split")
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    name = f"{AT.format(0)}.0.gate_proj.weight"
    tensors[name] = bits[: 160 * 205].view(torch.bfloat16).reshape(160, 205).contiguous()
    up = name.replace("gate", "up")
    tensors[up] = bits[-160 * 205 :].clone().view(torch.bfloat16).reshape(160, 205)
    source = write(tmp_path, tensors, model.config)
    into = painted(model.spelled("grouped"))
    restow.load(source, into)
    found = into[f"{AT.format(0)}.gate_and_up_projs"][0]
    assert same(found[:, :160].t().contiguous(), tensors[name])
    assert same(found[:, 160:].t().contiguous(), tensors[up])


# Precision.


def test_a_wider_destination_holds_the_same_values(folder: Path) -> None:
    wanted = {name: t.float() for name, t in SMALL.spelled("grouped").items()}
    check_places(folder, wanted, "packed")
    report = restow.load(folder, painted(wanted))
    assert report.narrowed == {}
    assert report.bytes_written == 2 * report.bytes_read


def test_a_narrower_destination_is_reported(tmp_path: Path) -> None:
    model = SMALL.but(dtype=torch.float32)
    values = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(i))
              for i, (n, t) in enumerate(model.spelled("split").items())}  # fmt: skip
    write(tmp_path, values, model.config)
    exact = {name: torch.empty_like(t) for name, t in model.spelled("grouped").items()}
    restow.load(tmp_path, exact)
    wanted = {name: t.bfloat16() for name, t in exact.items()}
    check_places(tmp_path, wanted, "packed")
    report = restow.load(tmp_path, painted(wanted))
    assert dict(report.narrowed) == dict.fromkeys(wanted, "F32 -> BF16")
    assert "narrowed model.embed_tokens.weight: F32 -> BF16" in str(report)


@pytest.mark.parametrize(
    ("source", "target", "loses"),
    [
        ("F32", "F32", False), ("BF16", "F32", False), ("F16", "F32", False), ("F32", "F64", False),
        ("F8_E4M3", "BF16", False), ("F8_E5M2", "F16", False), ("F32", "BF16", True), ("BF16", "F16", True),
        ("F16", "BF16", True), ("F8_E5M2", "F8_E4M3", True), ("F64", "F32", True), ("I64", "F32", True),
        ("F32", "I64", True), ("I32", "I64", True),
    ],
)  # fmt: skip
def test_which_casts_lose_something(source: str, target: str, loses: bool) -> None:
    assert narrows(source, target) == loses


INTEGERS = """\
expected floats for model.layers.0.mlp.gate.weight, which is BF16, and the like for 1 more, found I32
  tensors   model.layers.0.mlp.gate.weight
            model.layers.1.mlp.gate.weight
  in        {0}
  try       get the checkpoint again, or its config.json if these are codes; allow_narrowed= casts them"""


def test_integers_are_no_weights_and_floats_no_integers(tmp_path: Path) -> None:
    """Routers in I32 that nothing announces are codes, or garbage: their numbers are not cast into the model."""
    gates = {f"model.layers.{i}.mlp.gate.weight": torch.ones(8, 10, dtype=torch.int32) for i in (0, 1)}
    path = SMALL.written(tmp_path / "a", **gates)
    state = painted(SMALL.spelled("grouped"))
    with pytest.raises(DtypeMismatchError) as caught:
        restow.load(path, state)
    assert str(caught.value) == INTEGERS.format(path)
    assert differing(state, painted(SMALL.spelled("grouped"))) == []
    restow.load(path, state, allow_narrowed=["*.mlp.gate.weight"])
    assert bool((state["model.layers.1.mlp.gate.weight"] == 1).all())
    whole = {**SMALL.spelled("grouped"), "model.norm.weight": torch.zeros(10, dtype=torch.int64)}
    with pytest.raises(
        DtypeMismatchError, match=r"^expected integers for model\.norm\.weight, which is I64, found BF16"
    ):
        restow.load(SMALL.written(tmp_path / "b"), whole)


def test_an_exact_row_is_not_narrowed(tmp_path: Path) -> None:
    model = SMALL.but(family="deepseek_v3")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = torch.linspace(0, 1, 8)
    source = model.written(tmp_path, **{name: bias})
    into = {**painted(model.spelled("grouped")), name: torch.full((8,), -1.0)}
    restow.load(source, into)
    assert same(into[name], bias)
    into = {**painted(model.spelled("grouped")), name: torch.full((8,), -1.0).bfloat16()}
    before = {n: t.clone() for n, t in into.items()}
    with pytest.raises(PrecisionError) as caught:
        restow.load(source, into)
    assert str(caught.value) == (
        f"expected {name} in F32, as {name} is and must stay, found BF16\n"
        f"  tensor    {name}\n"
        "  row       router.bias mlp.gate.e_score_correction_bias e exact\n"
        "  try       keep this tensor in its precision in the model: its family selects experts by it"
    )
    assert differing(into, before) == []


# Said by name.


def into_grouped() -> Tensors:
    return painted(SMALL.spelled("grouped"))


def test_a_destination_that_nothing_fills_is_refused_and_nothing_touched(folder: Path) -> None:
    into = {**into_grouped(), "model.extra.weight": torch.ones(3), "model.more": torch.ones(1)}
    before = {n: t.clone() for n, t in into.items()}
    with pytest.raises(MissingTensorError) as caught:
        restow.load(folder, into)
    assert str(caught.value) == (
        "expected every tensor of the destination in the source, found 2 that it does not hold\n"
        "  missing   model.extra.weight\n"
        "            model.more\n"
        "  looked in model-00001-of-00002.safetensors\n"
        "            model-00002-of-00002.safetensors\n"
        f"  in        {folder}\n"
        "  try       rename= says how names differ; allow_missing= leaves a tensor as it is"
    )
    assert differing(into, before) == []


def test_a_source_tensor_without_a_place_is_refused_and_nothing_touched(folder: Path) -> None:
    into = into_grouped()
    del into["model.norm.weight"]
    before = {n: t.clone() for n, t in into.items()}
    with pytest.raises(UnexpectedTensorError) as caught:
        restow.load(folder, into)
    assert str(caught.value) == (
        "expected a place for every tensor of the source, found 1 without one\n"
        "  unused    model.norm.weight\n"
        f"  in        {folder}\n"
        "  try       rename= says how names differ, part=True that this is a piece, "
        "allow_unused= leaves them out"
    )
    assert differing(into, before) == []


@pytest.mark.parametrize(
    "patterns", [["model.norm.weight"], ["*.norm.*"], ["model.[mn]orm.weight", "*norm*"]], ids=str
)
def test_patterns_that_allow(folder: Path, patterns: list[str]) -> None:
    into = into_grouped()
    del into["model.norm.weight"]
    into["other.norm.w"] = torch.ones(2)
    report = restow.load(folder, into, allow_unused=patterns, allow_missing=["other.*"])
    assert report.unused == ("model.norm.weight",)
    assert report.missing == ("other.norm.w",)
    assert torch.equal(into["other.norm.w"], torch.ones(2))
    assert report.in_place == tuple(n for n in into if n != "other.norm.w")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"allow_missing": ["*.lora"]},
            "expected allow_missing patterns that match something, found '*.lora', which matches nothing",
        ),
        (
            {"allow_unused": ["Model.*"]},
            "expected allow_unused patterns that match something, found 'Model.*', which matches nothing",
        ),
        (
            {"allow_unused": "model.*"},
            "expected allow_unused as a list of patterns, found the text 'model.*'",
        ),
    ],
)  # fmt: skip
def test_patterns_that_match_nothing_are_refused(
    folder: Path, options: dict[str, list[str]], text: str
) -> None:
    into = into_grouped()
    with pytest.raises(UsageError) as caught:
        restow.load(folder, into, **options)
    assert str(caught.value) == text
    assert differing(into, into_grouped()) == []


def test_a_missing_expert_touches_nothing(tmp_path: Path) -> None:
    tensors = SMALL.spelled("split")
    gone = [f"{AT.format(1)}.5.{word}_proj.weight" for word in ("gate", "up")]
    for name in gone:
        del tensors[name]
    write(tmp_path, tensors, SMALL.config)
    into = into_grouped()
    with pytest.raises(MissingTensorError) as caught:
        restow.load(tmp_path, into)
    assert all(name in str(caught.value) for name in gone)
    assert differing(into, into_grouped()) == []


def test_an_expert_that_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    tensors = SMALL.spelled("split")
    del tensors[f"{AT.format(1)}.5.up_proj.weight"]
    write(tmp_path, tensors, SMALL.config)
    into = {n: t for n, t in painted(SMALL.spelled("grouped", take=[1, 2])).items() if "gate.weight" not in n}
    report = restow.load(tmp_path, into, experts=[1, 2], allow_unused=["*.gate.weight"])
    assert len(report.in_place) == len(into)
    wanted = SMALL.spelled("grouped", take=[1, 2])
    assert differing(into, {n: wanted[n] for n in into}) == []


# Modules.


class Experts(nn.Module):
    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(
                name, nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point())
            )


def module_of(tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """A module whose state dict is these tensors."""
    root = nn.Module()
    for name, tensor in tensors.items():
        at = root
        *path, leaf = name.split(".")
        for word in path:
            if word not in at._modules:
                at.add_module(word, nn.Module())
            at = at._modules[word]
        at.register_parameter(leaf, nn.Parameter(tensor.clone()))
    return root


def state(module: nn.Module) -> Tensors:
    return {name: t.detach() for name, t in module.state_dict().items()}


def test_a_module_is_filled_in_its_own_storage(folder: Path) -> None:
    wanted = SMALL.spelled("grouped")
    module = module_of(painted(wanted))
    before = {name: (p, p.data_ptr(), p.requires_grad) for name, p in module.named_parameters()}
    report = restow.load(folder, module)
    assert differing(state(module), wanted) == []
    for name, p in module.named_parameters():
        assert (p, p.data_ptr(), p.requires_grad) == before[name]
        assert p.grad_fn is None
    assert report.staged == {}
    assert report.warnings == ()


def test_tied_weights_are_filled_once(tmp_path: Path) -> None:
    wanted = SMALL.spelled("grouped")
    module = module_of(painted(wanted))
    module.lm_head.weight = module.model.embed_tokens.weight
    tensors = SMALL.spelled("split")
    del tensors["lm_head.weight"]
    report = restow.load(write(tmp_path / "tied", tensors, SMALL.config), module)
    assert same(module.lm_head.weight, wanted["model.embed_tokens.weight"])
    assert "lm_head.weight" not in report.missing
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    report = restow.load(write(tmp_path / "both", both, SMALL.config), module)
    assert report.unused == ()


def test_wrappers_are_passed_over(folder: Path) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wanted = SMALL.spelled("grouped")
    module = module_of(painted(wanted))
    layers = module.model.layers
    layers._modules["0"] = checkpoint_wrapper(layers._modules["0"])
    layers._modules["1"].mlp = torch.compile(layers._modules["1"].mlp)
    whole = torch.compile(module)
    assert any("_checkpoint_wrapped_module" in name for name, _ in whole.named_parameters())
    assert any("_orig_mod" in name for name, _ in whole.named_parameters())
    report = restow.load(folder, whole)
    assert sorted(report.in_place) == sorted(wanted)
    found = {restow_name(name): p for name, p in whole.named_parameters()}
    assert differing(found, wanted) == []


def restow_name(name: str) -> str:
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def halves() -> tuple[Tensors, Tensors]:
    wanted = SMALL.spelled("grouped")
    first = {n: t for n, t in wanted.items() if ".layers.0." in n or "embed" in n}
    return first, {n: t for n, t in wanted.items() if n not in first}


def test_the_parts_of_a_pipeline_are_a_list(folder: Path) -> None:
    parts = [module_of(painted(half)) for half in halves()]
    restow.load(folder, parts)
    for part, half in zip(parts, halves(), strict=True):
        assert differing(state(part), half) == []


def test_one_part_of_a_pipeline(folder: Path) -> None:
    first, second = halves()
    part = module_of(painted(first))
    with pytest.raises(UnexpectedTensorError, match=r"model\.norm\.weight"):
        restow.load(folder, part)
    report = restow.load(folder, part, part=True)
    assert differing(state(part), first) == []
    assert set(report.unused) == {n for n in SMALL.spelled("split") if ".layers.1." in n or n in second}


def test_a_part_must_hold_whole_experts_modules(folder: Path) -> None:
    first = halves()[0]
    into = {n: t for n, t in painted(first).items() if "down_projs" not in n}
    with pytest.raises(restow.errors.RestowError) as caught:
        restow.load(folder, into, part=True)
    assert f"{AT.format(0)}." in str(caught.value)
    assert "down_proj" in str(caught.value)


def test_two_parts_with_one_name_are_refused(folder: Path) -> None:
    parts = [module_of(painted(halves()[0])), module_of(painted(halves()[0]))]
    with pytest.raises(UsageError) as caught:
        restow.load(folder, parts)
    assert str(caught.value) == (
        "expected one tensor by the name model.embed_tokens.weight, found two in the modules given"
    )


def test_buffers_that_no_checkpoint_holds_are_named(folder: Path) -> None:
    module = module_of(into_grouped())
    module.model.register_buffer("inv_freq", torch.ones(2), persistent=False)
    module.model.norm.register_buffer("mask", torch.ones(2), persistent=False)
    report = restow.load(folder, module)
    assert report.warnings == (
        "not filled, since no checkpoint holds them: buffers model.inv_freq, model.norm.mask",
    )
    assert torch.equal(module.model.inv_freq, torch.ones(2))


def test_persistent_buffers_are_filled(folder: Path) -> None:
    module = module_of(into_grouped())
    norm = module.model.norm
    del norm._parameters["weight"]
    norm.register_buffer("weight", torch.zeros(10, dtype=torch.bfloat16))
    restow.load(folder, module)
    assert same(norm.weight, SMALL.others["model.norm.weight"])


class Odd(torch.Tensor):
    """A tensor subclass that restow knows nothing of."""


REFUSED_TENSORS = [
    pytest.param(lambda: torch.empty(10, device="meta"), "meta", id="meta"),
    pytest.param(lambda: torch.empty(10).as_subclass(Odd), "Odd", id="subclass"),
    pytest.param(lambda: torch.empty(10).to_sparse(), "sparse", id="sparse"),
    pytest.param(lambda: torch.empty(1).expand(10), "expand", id="expanded"),
    pytest.param(lambda: torch.empty(10, dtype=torch.complex128), "complex128", id="a dtype that files lack"),
    pytest.param(lambda: [0.0] * 10, "list", id="no tensor"),
]


@pytest.mark.parametrize(("make", "word"), REFUSED_TENSORS)
def test_tensors_that_cannot_be_written_in_place_are_refused_by_name(
    folder: Path, make: Callable[[], torch.Tensor], word: str
) -> None:
    into = {**into_grouped(), "model.norm.weight": make()}
    with pytest.raises(restow.errors.RestowError) as caught:
        restow.load(folder, into)
    assert "model.norm.weight" in str(caught.value)
    assert word in str(caught.value)


# Sources that change.


def test_a_source_that_was_cut_after_it_was_opened(tmp_path: Path) -> None:
    source = restow.open(SMALL.written(tmp_path))
    file = tmp_path / "model-00001-of-00002.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 100)
    with pytest.raises(TruncatedFileError) as caught:
        restow.load(source, into_grouped())
    assert f"{size} bytes" in str(caught.value)
    assert f"{size - 100}" in str(caught.value)


def test_a_source_that_was_replaced_after_it_was_opened(tmp_path: Path) -> None:
    source = restow.open(SMALL.written(tmp_path))
    file = tmp_path / "model-00001-of-00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    with pytest.raises(IntegrityError) as caught:
        restow.load(source, into_grouped())
    assert str(caught.value) == (
        "expected a source that stays as it was when its header was read, found another file, "
        "size or time of change\n"
        f"  in        {file}\n"
        "  try       run again once nobody writes to the checkpoint; what was loaded may be a mix"
    )


def test_a_source_that_is_cut_behind_what_was_read(tmp_path: Path) -> None:  # X06
    """No read meets the end: the check after the last one does."""
    model = SMALL.but(e=4, f=700, d=2000, layers=1)
    source = model.written(tmp_path)
    file = tmp_path / "model-00001-of-00002.safetensors"
    size = file.stat().st_size
    into = painted(model.spelled("grouped"))

    def cut(done: int, total: int) -> None:
        if done == total:
            os.truncate(file, size - 5)

    with pytest.raises(TruncatedFileError) as caught:
        restow.load(source, into, threads=1, progress=cut)
    assert str(caught.value) == (
        f"expected {size} bytes, as when its header was read, found {size - 5}\n"
        f"  in        {file}\n  try       fetch the file again"
    )


def test_a_source_that_changes_while_it_is_read(tmp_path: Path) -> None:
    model = SMALL.but(e=4, f=700, d=2000, layers=1)  # long enough to be told of before it is done
    source = model.written(tmp_path)
    file = tmp_path / "model-00001-of-00002.safetensors"
    with pytest.raises(IntegrityError):
        into = painted(model.spelled("grouped"))
        restow.load(source, into, threads=1, progress=lambda done, total: os.utime(file, ns=(1, 1)))


def test_a_source_that_vanished(tmp_path: Path) -> None:
    source = restow.open(SMALL.written(tmp_path))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(restow.errors.MissingShardError):
        restow.load(source, into_grouped())


# Progress and reports.


@pytest.mark.parametrize("threads", [1, 3])
def test_progress_is_told_by_the_calling_thread_and_grows(folder: Path, threads: int) -> None:
    told: list[tuple[int, int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total, threading.get_ident()))

    report = restow.load(folder, into_grouped(), threads=threads, progress=tell)
    assert {who for *_, who in told} == {threading.get_ident()}
    assert [done for done, *_ in told] == sorted(done for done, *_ in told)
    assert told[-1][:2] == (report.bytes_read, report.bytes_read)
    assert {total for _, total, _ in told} == {report.bytes_read}


def test_an_error_in_progress_stops_the_load(folder: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        restow.load(folder, into_grouped(), progress=stop, threads=3)
    assert threading.active_count() == before


def test_threads_of_torch_stay_as_they_were(folder: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        restow.load(folder, into_grouped(), threads=2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2"])
def test_threads_that_are_no_number_are_refused(folder: Path, threads: object) -> None:
    with pytest.raises(UsageError) as caught:
        restow.load(folder, into_grouped(), threads=threads)  # type: ignore[arg-type]
    assert str(caught.value) == f"expected threads as a whole number of at least 1, found {threads!r}"


def test_a_report_tells_itself(folder: Path) -> None:
    into = into_grouped()
    del into["model.norm.weight"]
    report = restow.load(folder, into, allow_unused=["model.norm.weight"])
    text = re.sub(r"[\d.]+ s \([\d.]+ GB/s\)", "T", str(report))
    count = f"{report.bytes_read:,}"
    assert text == (
        f"{len(into)} tensors filled in place: {count} bytes read, {count} written, T\n"
        "  unused: model.norm.weight"
    )
    assert report.bytes_read == sum(
        t.nbytes for n, t in SMALL.spelled("split").items() if n != "model.norm.weight"
    )


def test_no_file_is_written_and_none_stays_open(folder: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    names = sorted(folder.iterdir())
    restow.load(folder, into_grouped())
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert sorted(folder.iterdir()) == names
