"""A whole MoE model, loaded by one line from what transformers saved, says what transformers' own model says.

Four gloo processes, each with a sequence of its own; experts are DTensors on an EP mesh, tokens travel by
all-to-all. Logits are compared in float32, to 1e-5.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import restow
import tiny
from moe_model import Config, MoEModel
from moe_ranks import mesh_of, one, run, sequence
from restow.torch.storage import runs_at

WORLD = 4
Folders = dict[tuple[int, str], Path]
FORMS = {"hub": True, "runtime": False}
# (experts, form, ranks of ep, fully_shard over the rest)
CASES = [
    (12, "hub", 1, False), (12, "hub", 2, False), (12, "hub", 4, False), (12, "hub", 2, True),
    (12, "hub", 1, True), (12, "hub", 4, True),
    (12, "runtime", 1, False), (12, "runtime", 2, False), (12, "runtime", 4, False), (12, "runtime", 2, True),
    (10, "hub", 4, False), (10, "hub", 2, True), (10, "runtime", 4, False), (10, "runtime", 2, True),
    (9, "hub", 4, False), (3, "hub", 4, False), (3, "hub", 2, True), (3, "runtime", 2, True),
]  # fmt: skip


def called(case: Sequence[object]) -> str:
    experts, form, ep, fsdp = case
    return f"{experts} experts, {form}, ep {ep}{', fsdp' if fsdp else ''}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """What transformers saved, by the number of experts and the form; those of 12 do not norm weights."""
    found = {}
    for experts in {case[0] for case in CASES}:
        config = tiny.config("qwen3_moe")
        config.num_experts = experts
        config.norm_topk_prob = experts != 12
        model = tiny.fill(transformers.Qwen3MoeForCausalLM._from_config(config, **tiny._EAGER).eval())
        for form, original in FORMS.items():
            found[experts, form] = tiny.save(model, tmp_path_factory.mktemp(f"{form}-{experts}"), original)
    return found


@pytest.fixture(scope="module")
def expected(folders: Folders) -> dict[int, torch.Tensor]:
    """Logits of transformers' model for every rank's sequence, by the number of experts."""
    out, tokens = {}, torch.cat([sequence(rank) for rank in range(WORLD)])
    for (experts, form), folder in folders.items():
        if form == "hub":
            model, info = tiny.reload(folder, "qwen3_moe")
            assert not any(info.values()), info
            with torch.no_grad():
                out[experts] = model(input_ids=tokens, use_cache=False).logits
    return out


@pytest.fixture(scope="module")
def ranks(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    cases = [
        {"name": called(case), "folder": str(folders[case[0], case[1]]), "ep": case[2], "fsdp": case[3]}
        for case in CASES
    ]
    return run(tmp_path_factory.mktemp("ranks"), cases, WORLD)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool(((found - wanted).abs() <= 1e-5).all())


@pytest.mark.parametrize("case", CASES, ids=called)
def test_logits_are_those_of_transformers(
    case: tuple[int, str, int, bool], ranks: list[dict[str, Any]], expected: dict[int, torch.Tensor]
) -> None:
    wanted = expected[case[0]]
    assert wanted.abs().max() > 0.5, "logits that say something"
    for rank in range(WORLD):
        found = ranks[rank][called(case)]
        assert close(found["logits"], wanted[rank : rank + 1]), rank
        assert found["graded"]


@pytest.mark.parametrize("case", CASES, ids=called)
def test_every_rank_reports_that_every_byte_landed(
    case: tuple[int, str, int, bool], ranks: list[dict[str, Any]], folders: Folders
) -> None:
    experts, form, ep, fsdp = case
    opened = restow.open(folders[experts, form])
    file = next(iter(opened.tensors.values())).pieces[0].file
    counts = torch.zeros((folders[experts, form] / file).stat().st_size, dtype=torch.int32)
    for rank in range(WORLD):
        found = ranks[rank][called(case)]
        empty = [name for name, shape in found["shapes"].items() if 0 in shape]
        assert sorted([*found["in_place"], *empty]) == sorted(found["names"])
        assert found["same memory"]
        assert found["staged"] == {}
        assert (found["missing"], found["unused"]) == ((), ())
        assert found["bytes_read"] == found["planned"] == sum(end - begin for _, begin, end in found["reads"])
        for _, begin, end in found["reads"]:
            counts[begin:end] += 1
    copies = 1 if fsdp else WORLD // ep
    for name in opened.expert_tensors:
        piece = opened.tensors[name].pieces[0]
        assert (counts[piece.begin : piece.end] == copies).all(), name


def test_ranks_hold_what_the_mesh_gives_them(ranks: list[dict[str, Any]]) -> None:
    """Uneven shards are uneven, and a rank may hold none."""
    name = "model.layers.1.mlp.experts.down_projs"

    def held(*case: object) -> list[int]:
        return [ranks[rank][called(case)]["shapes"][name][0] for rank in range(WORLD)]

    assert held(10, "hub", 4, False) == [3, 3, 3, 1]
    assert held(9, "hub", 4, False) == [3, 3, 3, 0]
    assert held(10, "hub", 2, True) == [3, 3, 2, 2]
    assert held(3, "hub", 2, True) == [1, 1, 1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_one_process(form: str, folders: Folders, expected: dict[int, torch.Tensor]) -> None:
    folder = folders[12, form]
    model = MoEModel(Config.read(json.loads((folder / "config.json").read_text())))
    report = restow.load(folder, model)
    assert sorted(report.in_place) == sorted(name for name, _ in model.named_parameters())
    with torch.no_grad():
        assert close(model(sequence(2)), expected[12][2:3])


@pytest.mark.parametrize(("experts", "dp", "ep"), [(12, 2, 2), (10, 2, 4), (7, 3, 2), (9, 4, 2), (3, 4, 4)])
def test_ranges_are_what_fully_shard_really_holds(experts: int, dp: int, ep: int) -> None:
    """7 experts on 3 x 2 ranks: DTensor's own reading of the placements would give two ranks other rows."""
    whole = torch.arange(experts * 2.0).view(experts, 2)
    seen: list[int] = []
    for rank in range(dp * ep):
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dp * ep)
        try:
            mesh = init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))
            cuts = [min(experts, i * -(-experts // ep)) for i in range(1, ep)]
            own = whole.tensor_split(cuts)[rank % ep].clone()
            sizes = {"shape": whole.shape, "stride": whole.stride(), "run_check": False}
            module = nn.Linear(2, experts, bias=False)
            module.weight = nn.Parameter(DTensor.from_local(own, mesh["ep"], [Shard(0)], **sizes))
            fully_shard(module, mesh=mesh["dp"])
        finally:
            distributed.destroy_process_group()
        local = module.weight.to_local().detach()
        place = tuple(module.weight.device_mesh.shape), divmod(rank, ep), (experts, 2)
        rows, cols = runs_at("weight", module.weight.placements, *place)
        mine = [row for start, length in rows for row in range(start, start + length)]
        assert torch.equal(whole[mine], local)
        assert cols == ((0, 2),)
        seen += mine
    assert sorted(seen) == list(range(experts))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process only."""
    met = f"file://{tmp_path / 'met'}"
    distributed.init_process_group("gloo", init_method=met, rank=0, world_size=1)
    yield
    mesh_of.cache_clear()
    distributed.destroy_process_group()


def test_the_check_can_fail(
    alone: None, folders: Folders, expected: dict[int, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up exchanged in one layer, or one expert in another's place, is seen in the logits."""
    case = {"folder": str(folders[12, "hub"]), "ep": 1, "fsdp": False}
    assert close(one(case, 0, 1)["logits"], expected[12][:1])
    load = restow.load

    def spoiled(folder: Path, model: MoEModel, spoil: Any) -> restow.LoadReport:
        report = load(folder, model)
        with torch.no_grad():
            spoil(model.model.layers[2].mlp.experts)
        return report

    def exchange(experts: Any) -> None:
        w = experts.gate_and_up_projs.to_local()
        w.copy_(w.roll(w.shape[2] // 2, 2))

    def misplace(experts: Any) -> None:
        w = experts.down_projs.to_local()
        w.copy_(w.roll(1, 0))

    for spoil in (exchange, misplace):
        monkeypatch.setattr(restow, "load", lambda folder, model, spoil=spoil: spoiled(folder, model, spoil))
        assert not close(one(case, 0, 1)["logits"], expected[12][:1])
