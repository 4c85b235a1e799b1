"""A small but whole MoE language model in plain PyTorch: Qwen3-MoE with grouped experts, EP and FSDP2.

Nothing of it is restow's or transformers': names follow Qwen3-MoE's but for the experts, two grouped tensors
per layer, `gate_and_up_projs [e, d, 2f]` and `down_projs [e, f, d]`. `parallelize` makes the experts DTensors
on a mesh dim and shards with `fully_shard`; tokens travel to their experts by all-to-all, and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.distributed import DeviceMesh
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, empty


@dataclass(frozen=True)
class Config:
    """What config.json says, by its own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    mlp_only_layers: tuple[int, ...]
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float

    @staticmethod
    def read(config: Mapping[str, Any]) -> Config:
        words = {name: config[name] for name in Config.__dataclass_fields__ if name in config}
        words["num_experts"] = config.get("num_experts") or config["num_local_experts"]
        words["mlp_only_layers"] = tuple(config["mlp_only_layers"])
        return Config(**{"rope_theta": (config.get("rope_parameters") or {}).get("rope_theta"), **words})


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


class Attention(nn.Module):
    """Grouped-query attention, a norm on every head of queries and keys, rotary positions."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        kv = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, kv, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm, self.k_norm = Norm(c.head_dim, c.rms_norm_eps), Norm(c.head_dim, c.rms_norm_eps)
        freq = c.rope_theta ** -(torch.arange(0, c.head_dim, 2).float() / c.head_dim)
        self.register_buffer("inv_freq", freq, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projs = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (proj(x).unflatten(-1, (-1, self.c.head_dim)) for proj in projs)
        q, k = self.turned(self.q_norm(q)).transpose(1, 2), self.turned(self.k_norm(k)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def turned(self, x: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(torch.arange(x.shape[1]).float(), self.inv_freq)[:, None]
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Dense(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """Every expert of a layer in two tensors; on an EP mesh those of this rank, as `Shard(0)` cuts them."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.count = c.num_experts
        e, d, f = c.num_experts, c.hidden_size, c.moe_intermediate_size
        self.gate_and_up_projs = nn.Parameter(torch.empty(e, d, 2 * f))
        self.down_projs = nn.Parameter(torch.empty(e, f, d))
        self.ep: DeviceMesh | None = None

    def shard(self, ep: DeviceMesh) -> None:
        """Make the parameters DTensors with `Shard(0)` on `ep`; their values are gone."""
        self.ep = ep
        for name, old in list(self.named_parameters()):
            new = empty(*old.shape, dtype=old.dtype, device_mesh=ep, placements=[Shard(0)])
            setattr(self, name, nn.Parameter(new))

    def forward(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """`x[i]` through expert `experts[i]`, for tokens in any order."""
        order = experts.argsort(stable=True)
        counts = experts.bincount(minlength=self.count)
        y = self.here(x[order], counts) if self.ep is None else self.there(x[order], counts, self.ep)
        return y[order.argsort()]

    def here(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Tokens in the order of the experts that lie here, `counts` of them each."""
        both = self.gate_and_up_projs, self.down_projs
        up, down = (w.to_local() if isinstance(w, DTensor) else w for w in both)
        if not len(x):  # no token here: still part of the graph, so that ranks agree on what has a gradient
            return x + 0 * (up.sum() + down.sum())
        ends = counts.cumsum(0).int()
        gate, value = F.grouped_mm(x, up, offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * value, down, offs=ends)

    def there(self, x: torch.Tensor, counts: torch.Tensor, ep: DeviceMesh) -> torch.Tensor:
        """Send tokens to the ranks of their experts, and their outputs back."""
        group, ranks = ep.get_group(), ep.size()
        each = -(-self.count // ranks)
        padded = F.pad(counts, (0, each * ranks - self.count)).view(ranks, each)  # [to rank, its expert]
        theirs = torch.empty_like(padded)
        distributed.all_to_all_single(theirs, padded, group=group)  # [from rank, my expert]
        out, into = padded.sum(1).tolist(), theirs.sum(1).tolist()
        arrived = all_to_all_single_autograd(x, into, out, group)
        mine = torch.arange(each).expand(ranks, each).flatten().repeat_interleave(theirs.flatten())
        order = mine.argsort(stable=True)
        held = min(each, max(0, self.count - each * ep.get_local_rank()))
        y = self.here(arrived[order], theirs.sum(0)[:held])
        return all_to_all_single_autograd(y[order.argsort()].contiguous(), out, into, group)


class Router(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        self.weight = nn.Parameter(torch.empty(c.num_experts, c.hidden_size))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chance, chosen = F.linear(x, self.weight).softmax(-1).topk(self.c.num_experts_per_tok)
        return chance / chance.sum(-1, keepdim=True) if self.c.norm_topk_prob else chance, chosen


class MoE(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate, self.experts = Router(c), Experts(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, -2)
        chance, chosen = self.gate(tokens)
        y = self.experts(tokens.repeat_interleave(chosen.shape[1], 0), chosen.flatten())
        return (y.view(*chosen.shape, -1) * chance[..., None]).sum(1).view_as(x)


class Layer(nn.Module):
    def __init__(self, c: Config, number: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = Norm(c.hidden_size, c.rms_norm_eps)
        self.mlp = Dense(c) if number in c.mlp_only_layers else MoE(c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class MoEModel(nn.Module):
    """Tokens [batch, length] to logits [batch, length, vocabulary]. Parameters are not initialised."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.model = Body(c)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(tokens))


def parallelize(model: MoEModel, mesh: DeviceMesh, *, fsdp: bool = False) -> MoEModel:
    """Experts over "ep" of a mesh ("dp", "ep"); with `fsdp` also over "dp", all else over the whole mesh."""
    moes = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, MoE)]
    for moe in moes:
        moe.experts.shard(mesh["ep"])
    if fsdp:
        for moe in moes:
            fully_shard(moe.experts, mesh=mesh["dp"])
        whole = mesh._flatten("whole")
        for layer in model.model.layers:
            fully_shard(layer, mesh=whole)
        fully_shard(model, mesh=whole)
    return model
