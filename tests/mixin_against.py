"""One process of the comparison with NeMo AutoModel: its adapters, the same re-based on our mixin, and our
own.

`python tests/mixin_against.py VERSION` on plain tensors; `on_mesh` in every process of a mesh. Which release
is imported is PYTHONPATH's to say; the version is checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nemo_automodel
import torch
from nemo_automodel.components.checkpoint.state_dict_adapter import StateDictAdapter
from nemo_automodel.components.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from nemo_automodel.components.models.nemotron_v3.state_dict_adapter import NemotronV3StateDictAdapter
from nemo_automodel.components.models.qwen3_moe.state_dict_adapter import Qwen3MoeStateDictAdapter
from nemo_automodel.components.moe.state_dict_mixin import MoESplitExpertsStateDictMixin as Theirs
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mixin_host import Host, Tensors, expected, lora, moe_config, numbered, same
from restow.state_dict_mixin import MoESplitExpertsStateDictMixin as Ours
from restow.torch.adapters import DeepSeekV3Adapter, NemotronHAdapter, Qwen3MoeAdapter
from restow.torch.storage import runs_at

E, D, F, R = 8, 12, 10, 3


def rebased(original: type) -> type:
    """The adapter's own class statement, with our mixin as its base."""
    body = {
        n: v for n, v in vars(original).items() if n not in ("__dict__", "__weakref__") and n[:5] != "_abc_"
    }
    body.pop("__abstractmethods__", None)
    return type(original.__name__, (Ours, StateDictAdapter), body)


def qwen3() -> Tensors:
    out: Tensors = {
        "model.embed_tokens.weight": numbered(7, D),
        "model.norm.weight": numbered(D),
        "lm_head.weight": numbered(7, D),
    }
    for layer in range(2):
        at = f"model.layers.{layer}"
        out[f"{at}.input_layernorm.weight"] = numbered(D, start=layer)
        out[f"{at}.mlp.gate.weight"] = numbered(E, D, start=layer)
        out[f"{at}.mlp.experts.gate_and_up_projs"] = numbered(E, D, 2 * F, start=10 + layer)
        out[f"{at}.mlp.experts.down_projs"] = numbered(E, F, D, start=20 + layer)
    return out


def deepseek() -> Tensors:
    out = qwen3()
    out["model.layers.0.mlp.gate.e_score_correction_bias"] = numbered(E)
    for word, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        out[f"model.layers.1.mlp.shared_experts.{word}_proj.weight"] = numbered(*shape)
    return out


def nemotron() -> Tensors:
    out: Tensors = {
        "model.embed_tokens.weight": numbered(7, D),
        "model.norm.weight": numbered(D),
        "lm_head.weight": numbered(7, D),
        "model.layers.0.norm.weight": numbered(D, start=3),
        "model.layers.0.mixer._fp32_params.A_log": numbered(5),
        "model.layers.0.mixer._fp32_params.D": numbered(5, start=1),
        "model.layers.0.mixer.in_proj.weight": numbered(5, D),
    }
    for at in ("model.layers.1.mixer", "mtp.layers.0.mixer"):
        out[f"{at}.gate.weight"] = numbered(E, D)
        out[f"{at}.experts.gate_and_up_projs"] = numbered(E, D, F, start=len(at))
        out[f"{at}.experts.down_projs"] = numbered(E, F, D, start=1 + len(at))
    return out


CASES: dict[str, tuple[type, type, Callable[[], Tensors]]] = {
    "qwen3_moe": (Qwen3MoeStateDictAdapter, Qwen3MoeAdapter, qwen3),
    "deepseek_v3": (DeepSeekV3StateDictAdapter, DeepSeekV3Adapter, deepseek),
    "nemotron_v3": (NemotronV3StateDictAdapter, NemotronHAdapter, nemotron),
}


def adapters(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    """The original, the re-based one and our own, made alike."""
    original, own, _ = CASES[name]
    gated = name != "nemotron_v3"
    config = SimpleNamespace(num_hidden_layers=2)
    backend = SimpleNamespace(experts="gmm", dispatcher="deepep")
    kinds = (original, rebased(original), own)
    return tuple(kind(config, moe_config(E, F, gated, dim=D), backend, dtype) for kind in kinds)  # type: ignore[return-value]


def agree(name: str, state: Tensors, mesh: DeviceMesh | None, *, own: bool = True, **kwargs: Any) -> None:
    """Both directions, as the original does them; `own` is whether our own adapter is compared too."""
    theirs, *ours = adapters(name)[: 2 + own]
    wanted = theirs.to_hf(dict(state), **kwargs)
    single = {
        k: v for fqn, t in state.items() for k, v in theirs.convert_single_tensor_to_hf(fqn, t, **kwargs)
    }
    for adapter in ours:
        found = adapter.to_hf(dict(state), **kwargs)
        assert list(found) == list(wanted), (list(found), list(wanted))
        assert same(found, wanted) == [], (name, same(found, wanted))
        one = {
            k: v for fqn, t in state.items() for k, v in adapter.convert_single_tensor_to_hf(fqn, t, **kwargs)
        }
        assert same(one, single) == []
    # fresh adapters: in the original, the calls above would be taken for a load
    theirs, *ours = adapters(name)[: 2 + own]

    def fresh() -> Tensors:
        return {n: v.clone() for n, v in wanted.items()}

    back = theirs.from_hf(fresh(), device_mesh=mesh)
    for adapter in ours:
        found = adapter.from_hf(fresh(), device_mesh=mesh)
        assert found.keys() == back.keys()
        assert same(found, back) == [], (name, same(found, back))
        assert all(adapter.view_loaded_native_keys == a.view_loaded_native_keys for a in (theirs, *ours))


def plain(version: str) -> None:
    assert nemo_automodel.__version__.split("+")[0] == version, (
        nemo_automodel.__version__
    )  # it adds a commit of the folder it runs in
    for name, (_, _, state) in CASES.items():
        agree(name, state(), None)
        agree(name, state(), None, exclude_key_regex=r".*norm")
        agree(name, {n: t.to(torch.bfloat16) for n, t in state().items()}, None)
        agree(name, {n.replace("model.layers", "layers"): t for n, t in state().items()}, None)
        gated = name != "nemotron_v3"
        at = "mlp.experts" if gated else "mixer.experts"
        adapter = {**state(), **lora(E, D, F, R, gated, at=at)}
        latest = (
            version == "0.7.0"
        )  # before, Nemotron-H's adapter named LoRA otherwise, and PEFT's form was 0.18's
        agree(name, adapter, None, own=latest, v4_compatible=True)
        if latest:
            agree(name, adapter, None)
            agree(name, adapter, None, legacy_paramwrapper_layout=True)
    differences()


def on_mesh(mesh: DeviceMesh, folder: Path) -> None:
    """DTensors: the same both ways, and a load through torch.distributed.checkpoint into their own
    storage.
    """
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    names = tuple(mesh.mesh_dim_names or ())
    on = mesh if any(mesh[n].size() > 1 for n in names if n != "ep") else mesh[("ep",)]
    placements = {"ep_replicate": Replicate(), "ep_shard": Shard(1), "ep": Shard(0)}
    where = [placements[n] for n in on.mesh_dim_names or ()]

    def place(state: Tensors) -> Tensors:
        return {n: distribute_tensor(t, on, where) if ".experts." in n else t for n, t in state.items()}

    for name, (_, _, make) in CASES.items():
        truth = place(make())
        agree(name, truth, mesh)
        agree(name, truth, mesh, for_checkpoint_load=True)
        saved, *ours = adapters(name)
        whole = {n: t.clone() for n, t in adapters(name)[0].to_hf(make()).items()}
        if on.ndim == 1:  # a save, then a load of other tensors: 0.6 takes its experts for loaded
            left = {n for n in truth if ".experts." in n and not n.startswith("mtp.")}
            for adapter in (saved, *ours):
                adapter.to_hf(dict(truth))
                there = left & adapter.from_hf(dict(whole), device_mesh=mesh).keys()
                assert there == (set() if adapter is saved and nemo_automodel.__version__ < "0.7" else left)
        for adapter in adapters(name)[1:]:
            model = {n: torch.zeros_like(t) for n, t in truth.items()}
            memory = {n: _local(t).data_ptr() for n, t in model.items()}
            hf = adapter.to_hf(dict(model), for_checkpoint_load=True)
            dcp.load(hf, storage_reader=HuggingFaceStorageReader(str(folder / name)))
            back = adapter.from_hf(dict(hf), device_mesh=mesh)
            experts = {n for n in model if ".experts." in n}
            loaded = adapter.view_loaded_native_keys
            if nemo_automodel.__version__ < "0.7":  # its Nemotron-H adapter leaves mtp. off
                loaded = {n if n in model else f"mtp.{n}" for n in loaded}
            assert loaded == (experts if on.ndim == 1 else set())
            assert not loaded & back.keys()
            assert back.keys() | loaded == model.keys()
            for n, value in back.items():
                _local(model[n]).copy_(_local(value))
            assert {n: _local(t).data_ptr() for n, t in model.items()} == memory
            assert same(model, truth) == [], (name, same(model, truth))


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Peer(Theirs):
    """The original class over what `Host` sets."""

    def __init__(self, *args: Any) -> None:
        self.__dict__.update(Host(*args).__dict__)
        self.backend = SimpleNamespace(experts="gmm", dispatcher="deepep")


class OneDim:
    """As much of a mesh as the peer's ranges ask for."""

    mesh_dim_names = ("ep",)

    def __init__(self, rank: int, size: int) -> None:
        self.get_local_rank, self.size = (lambda: rank), (lambda: size)

    def __getitem__(self, names: object) -> OneDim:
        return self


def differences() -> None:
    """Where we differ on purpose: what the original does, and that ours raises or does it right."""
    from restow.errors import AdapterError, MissingExpertsError, QuantizationError, UnexpectedTensorError

    state = qwen3()
    hf = expected(state, F)
    adapter = Host(E, F)._to_hf_w_split_experts(lora(E, D, F, R))
    up = next(n for n in adapter if n.endswith("up_proj.lora_A.weight"))

    distinct = {n: t + 1 if n == up else t for n, t in adapter.items()}
    assert up not in Peer(E, F)._recombine_lora_expert_keys(distinct)  # up's own A is gone
    refuses(AdapterError, lambda: Host(E, F)._recombine_lora_expert_keys(distinct), up, "restow.lora")

    partial = {n: t for n, t in adapter.items() if n != up}
    assert Peer(E, F)._recombine_lora_expert_keys(dict(partial)).keys() is not None
    refuses(MissingExpertsError, lambda: Host(E, F)._recombine_lora_expert_keys(partial), up)

    scaled = {**hf, "model.layers.0.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1, 1)}
    assert not any("scale" in n for n in Peer(E, F)._from_hf_w_merged_experts(dict(scaled)))  # dropped
    refuses(QuantizationError, lambda: Host(E, F)._from_hf_w_merged_experts(dict(scaled)), "weight_scale_inv")

    high = {**hf, f"model.layers.0.mlp.experts.{E}.up_proj.weight": torch.ones(F, D)}
    refuses(
        UnexpectedTensorError,
        lambda: Host(E, F)._from_hf_w_merged_experts(dict(high)),
        f"experts.{E}.up_proj",
    )

    from nemo_automodel.components.moe.state_dict_utils import get_expert_range_for_rank_from_mesh as ranges

    uneven = [ranges(OneDim(rank, 4), 10) for rank in range(4)]
    assert uneven == [(0, 3), (3, 6), (6, 8), (8, 10)]  # the last two are not what DTensor holds
    ours = [runs_at("experts", [Shard(0)], [4], [rank], [10]) for rank in range(4)]
    assert ours == [(((0, 3),),), (((3, 3),),), (((6, 3),),), (((9, 1),),)]

    other = {n.replace("model.", "tower."): t for n, t in hf.items()}
    assert not any("projs" in n for n in Peer(E, F)._from_hf_w_merged_experts(dict(other)))  # passed through
    wanted = {n.replace("model.", "tower."): t for n, t in state.items()}
    assert same(Host(E, F)._from_hf_w_merged_experts(dict(other)), wanted) == []


def refuses(kind: type[Exception], call: Callable[[], object], *words: str) -> None:
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


def write(folder: Path) -> None:
    """The Hugging Face folders that the meshes load."""
    from safetensors.torch import save_file

    for name, (_, _, make) in CASES.items():
        out = adapters(name)[0].to_hf(make())
        (folder / name).mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in out.items()}, folder / name / "model.safetensors")


if __name__ == "__main__":
    plain(sys.argv[1])
    write(Path(sys.argv[2]))
