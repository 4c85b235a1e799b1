"""The gloo processes of the mixin's tests: every check of one mesh, each rank on its own part.

`python tests/mixin_ranks.py RENDEZVOUS WORLD CHECK FOLDER SIZES` forks the ranks, with sizes by mesh dim, e.g.
ep=4,ep_shard=1, and prints their exit codes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from datetime import timedelta
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mixin_host import Host, Tensors, equal, expected, lora, native, numbered, same
from restow.state_dict_mixin import materialized

DIMS = {"ep_replicate": Replicate(), "ep_shard": Shard(1), "ep": Shard(0)}


def placed(state: Tensors, mesh: DeviceMesh) -> Tensors:
    """Grouped tensors as DTensors of `mesh`, by torch's own hands; all else as it is."""
    names = tuple(mesh.mesh_dim_names or ())
    kept = tuple(n for n in names if n == "ep" or any(mesh[m].size() > 1 for m in names if m != "ep"))
    on = mesh[kept]
    return {
        name: distribute_tensor(tensor.clone(), on, [DIMS[n] for n in kept])
        if ".experts." in name
        else tensor
        for name, tensor in state.items()
    }


def mine(mesh: DeviceMesh, e: int) -> range:
    """This rank's experts, as torch.chunk gives them."""
    ep = mesh["ep"]
    chunks = torch.arange(e).chunk(ep.size())
    rank = ep.get_local_rank()
    return range(int(chunks[rank][0]), int(chunks[rank][-1]) + 1) if rank < len(chunks) else range(0)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def roundtrip(mesh: DeviceMesh, folder: Path, e: int, gated: bool = True) -> None:
    """Both directions for one number of experts."""
    d, f, host = 8, 6, Host(e, 6, gated)
    whole = native(e, d, f, gated)
    state = placed(whole, mesh)
    plain_split = all(mesh[n].size() == 1 for n in mesh.mesh_dim_names or () if n != "ep")
    hf = host._to_hf_w_split_experts(state)
    here = expected(whole, f, gated, mine(mesh, e))
    assert list(hf) == list(here) or sorted(hf) == sorted(here), (list(hf), list(here))
    for name, value in hf.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        assert torch.equal(full, here[name]), name
        if ".experts." in name:
            assert isinstance(value, DTensor) != plain_split, name
            assert local(value).is_contiguous() != plain_split, name
            assert (
                "ep" not in (value.device_mesh.mesh_dim_names or ()) if isinstance(value, DTensor) else True
            )

    # A fresh dict of whole tensors, though the names are registered: nothing of the save above is left.
    fresh = {name: value.clone() for name, value in expected(whole, f, gated).items()}
    back = host._from_hf_w_merged_experts(fresh, mesh)
    assert same(back, state) == [], same(back, state)
    assert fresh == {}
    assert host.view_loaded_native_keys == set()

    # What a loader does: zeros, to_hf, a read into what it gave, from_hf.
    empty = {name: torch.zeros_like(t) if ".experts." in name else t for name, t in state.items()}
    hf = host._to_hf_w_split_experts(empty)
    wanted = host._to_hf_w_split_experts(state)
    for name in hf:
        if ".experts." in name:
            local(hf[name]).copy_(local(wanted[name]))
    back = host._from_hf_w_merged_experts(dict(hf), mesh)
    grouped = {name for name in state if ".experts." in name}
    if plain_split or not mine(mesh, e):  # where no expert is, nothing is to be loaded
        assert host.view_loaded_native_keys == grouped
        assert not grouped & back.keys()
        assert same(empty, state) == []
    else:
        assert host.view_loaded_native_keys == set()
        assert same(back, state) == []

    # A cast between: the views were read into other memory, so the tensors must be made.
    hf = {n: v.to(torch.float64) for n, v in host._to_hf_w_split_experts(state).items()}
    back = host._from_hf_w_merged_experts(hf, mesh)
    if len(mine(mesh, e)):
        assert grouped <= back.keys()
        assert same({n: back[n] for n in grouped}, {n: state[n] for n in grouped}) == []

    views = host._to_hf_w_split_experts(state)
    assert all(local(v).is_contiguous() for v in materialized(views).values())
    quantised = host._to_hf_w_split_experts(state, quantization=True)
    assert all(local(v).is_contiguous() for v in quantised.values())


def rows(mesh: DeviceMesh, folder: Path) -> None:
    for e in (8, 10, 5, 9, 4, 1):
        roundtrip(mesh, folder, e)
    roundtrip(mesh, folder, 6, gated=False)


def members(mesh: DeviceMesh, folder: Path) -> None:
    """Ranges, rank-local validation, two namespaces, LoRA: on a mesh of ep alone."""
    host, e, d, f = Host(10, 6), 10, 8, 6
    here = mine(mesh, e)
    whole = numbered(e, 3, 2)
    parts = host._split_experts_weights(distribute_tensor(whole, mesh["ep"], [Shard(0)]), e)
    assert [p.tolist() for p in parts] == [whole[i].tolist() for i in here]

    hf = expected(native(e, d, f, layers=1), f)
    mine_only = {n: v for n, v in hf.items() if ".experts." not in n or int(n.split(".")[5]) in here}
    host._validate_expert_availability(mine_only, e, mesh)
    lost = f"model.layers.0.mlp.experts.{here[0]}.up_proj.weight" if here else ""
    if here:
        try:
            host._validate_expert_availability({n: v for n, v in hf.items() if n != lost}, e, mesh)
        except RuntimeError as error:
            assert lost in str(error)
            assert f"rank {distributed.get_rank()}" in str(error)
        else:
            raise AssertionError("a missing expert of this rank was not missed")

    # Backbone, then MTP with its prefix off, in one load.
    state = placed(native(e, d, f, layers=1), mesh)
    mtp = {n.replace("model.", "mtp."): t.clone() for n, t in state.items() if ".experts." in n}
    given = host._to_hf_w_split_experts(state)
    other = [p for n, t in mtp.items() for p in host._convert_single_merged_expert_to_hf_split_experts(
        n, t, prefix_override="mtp.")]  # fmt: skip
    assert all(name.startswith("mtp.layers.0.") for name, _ in other)
    first = host._from_hf_w_merged_experts(dict(given), mesh)
    names = {n for n in state if ".experts." in n}
    assert host.view_loaded_native_keys == names
    second = host._from_hf_w_merged_experts(
        {n.removeprefix("mtp."): v for n, v in other}, mesh, reset_view_loaded_keys=False
    )
    assert host.view_loaded_native_keys == names | {n.removeprefix("mtp.") for n in mtp}
    assert second == {}
    assert not names & first.keys()
    host._from_hf_w_merged_experts({}, mesh)
    assert host.view_loaded_native_keys == set()

    # The same as FSDP without ep: no mesh is passed, and the rank's own experts are enough.
    flat = init_device_mesh("cpu", (distributed.get_world_size(),), mesh_dim_names=("dp_shard_cp",))
    state = {
        n: distribute_tensor(t, flat, [Shard(0)])
        for n, t in native(e, d, f, layers=1).items()
        if ".experts." in n
    }
    assert host._from_hf_w_merged_experts(host._to_hf_w_split_experts(state)) == {}
    assert host.view_loaded_native_keys == set(state)
    state = {
        n: distribute_tensor(t, flat, [Shard(1)])
        for n, t in native(e, d, f, layers=1).items()
        if ".experts." in n
    }
    out = host._to_hf_w_split_experts(state)
    wanted = expected(native(e, d, f, layers=1), f)
    assert all(isinstance(v, DTensor) and torch.equal(v.full_tensor(), wanted[n]) for n, v in out.items())

    adapters = {n: distribute_tensor(t, mesh["ep"], [Shard(0)]) for n, t in lora(e, d, f, 3).items()}
    out = host._to_hf_w_split_experts(adapters)
    alone = host._to_hf_w_split_experts(lora(e, d, f, 3))
    assert set(out) == {n for n in alone if int(n.split(".")[7]) in here}
    assert all(equal(v, alone[n]) and v.is_contiguous() for n, v in out.items())


def two_shards(mesh: DeviceMesh, folder: Path) -> None:
    """Experts over two mesh dims at once: rows that are not one run, as DTensor itself splits them."""
    e, d, f, host = 8, 4, 6, Host(8, 6)
    on = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "ep"))
    whole = native(e, d, f, layers=1)
    state = {n: distribute_tensor(t, on, [Shard(0), Shard(0)]) for n, t in whole.items() if ".experts." in n}
    out = host._to_hf_w_split_experts(state)
    wanted = expected(whole, f)
    assert len(out) == 6
    assert all(torch.equal(v, wanted[n]) and not isinstance(v, DTensor) for n, v in out.items())
    cut = distribute_tensor(whole["model.layers.0.mlp.experts.gate_and_up_projs"], on, [Shard(2), Shard(0)])
    try:
        host._convert_single_merged_expert_to_hf_split_experts(
            "model.layers.0.mlp.experts.gate_and_up_projs", cut
        )
    except Exception as error:
        assert "whole dims" in str(error), error
    else:
        raise AssertionError("a cut through (p f) went through")


CHECKS = {"rows": rows, "members": members, "two_shards": two_shards}


def main(rendezvous: str, rank: int, world: int, check: str, folder: str, sizes: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=120)
    )
    by_name = {n: int(s) for n, s in (one.split("=") for one in sizes.split(","))}
    mesh = init_device_mesh("cpu", tuple(by_name.values()), mesh_dim_names=tuple(by_name))
    checks: Mapping[str, Any] = CHECKS
    if check == "against":
        import mixin_against

        mixin_against.on_mesh(mesh, Path(folder))
    else:
        checks[check](mesh, Path(folder))
    distributed.barrier()
    distributed.destroy_process_group()


def fork_ranks(rendezvous: str, world: int, check: str, folder: str, sizes: str) -> list[int]:
    """Every rank as a fork of this process, which has imported all there is to import; their exit codes."""
    if check == "against":
        import mixin_against  # noqa: F401
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            log = os.open(Path(folder) / f"{check}-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            main(rendezvous, rank, world, check, folder, sizes)
            code = 0
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(check: str, folder: Path, env: Mapping[str, str] | None = None, **sizes: int) -> None:
    """Run one check on all ranks, each a process of its own; fails with their last words."""
    world = prod(sizes.values())
    text = ",".join(f"{name}={size}" for name, size in sizes.items())
    rendezvous = f"file://{folder / f'rendezvous-{check}'}"
    done = subprocess.run(
        [sys.executable, __file__, rendezvous, str(world), check, str(folder), text],
        capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False,
    )  # fmt: skip
    logs = [folder / f"{check}-{rank}.log" for rank in range(world)]
    said = [log.read_text()[-3000:] if log.exists() else "" for log in logs]
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == [0] * world, "\n".join(f"rank {r}: {t}" for r, t in enumerate(said))


if __name__ == "__main__":
    print(json.dumps(fork_ranks(sys.argv[1], int(sys.argv[2]), *sys.argv[3:6])))
