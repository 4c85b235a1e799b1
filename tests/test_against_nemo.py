"""The grouped layout is NeMo AutoModel's: its own merge of split experts gives the same tensors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import restow
import tiny
from moe import Tensors, differing
from restow.torch.dtypes import torch_dtype

nemo = pytest.importorskip("nemo_automodel.components.moe.state_dict_mixin")

CASES = [
    ("qwen3_moe", "mlp.experts", True),
    ("deepseek_v3", "mlp.experts", True),
    ("nemotron_h", "mixer.experts", False),
]


class Adapter(nemo.MoESplitExpertsStateDictMixin):
    """The least that the merge asks for."""

    def __init__(self, segment: str, gated: bool, **inner: int) -> None:
        self.moe_config = SimpleNamespace(n_routed_experts=tiny.EXPERTS, expert_bias=False, **inner)
        self._segment, self._gated, self.dtype = segment, gated, torch.float32

    @property
    def _expert_path_segment(self) -> str:
        return self._segment

    @property
    def _is_gated_moe(self) -> bool:
        return self._gated


def merged(tensors: Tensors, segment: str, gated: bool, sizes: str = "plain") -> Tensors:
    inner = {"moe_inter_dim": tiny.SIZES[sizes]["f"], "dim": tiny.SIZES[sizes]["d"]}
    return Adapter(segment, gated, **inner)._from_hf_w_merged_experts(dict(tensors))


@pytest.mark.parametrize("sizes", tiny.SIZES)
@pytest.mark.parametrize(("family_id", "segment", "gated"), CASES, ids=[case[0] for case in CASES])
def test_grouped_tensors_are_nemo_s(family_id: str, segment: str, gated: bool, sizes: str) -> None:
    folder = tiny.saved(family_id, sizes=sizes)
    split = {n.removeprefix("backbone."): t for n, t in load_file(folder / "model.safetensors").items()}
    wanted = merged(split, segment, gated, sizes)
    assert any(name.endswith("gate_and_up_projs") for name in wanted)
    targets = restow.plan(folder).targets
    into = {t.name: torch.full(t.shape, -1, dtype=torch_dtype(t.dtype)) for t in targets}
    restow.load(folder, into)
    assert differing({n.removeprefix("backbone."): t for n, t in into.items()}, wanted) == []


def test_the_comparison_can_fail() -> None:
    split = load_file(tiny.saved("qwen3_moe") / "model.safetensors")
    swapped = {n.replace("gate_proj", "?").replace("up_proj", "gate_proj").replace("?", "up_proj")
               if ".experts." in n else n: t for n, t in split.items()}  # fmt: skip
    a, b = (merged(tensors, "mlp.experts", True) for tensors in (split, swapped))
    assert {name.rpartition(".")[2] for name in differing(a, b)} == {"gate_and_up_projs"}
