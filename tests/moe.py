"""Small MoE checkpoints and their meaning, without restow: weights by role and axis, spelled by einops.

A `Model` knows its weights as arrays over (e, p, f, d); every element of every tensor is a number of its own.
`spelled` gives the tensors of any layout, by name; `written` puts them into a folder with a config.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path

import einops
import numpy as np
import torch
from safetensors.torch import save_file

import restow
from restow.layout import Layout
from restow.notation import Labels, Row
from restow.plans import Plan

AXES = {"in": "e p f d", "out": "e f d", "in.bias": "e p f", "out.bias": "e d"}
AT = "model.layers.{}.mlp.experts"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Model:
    """Sizes, dtype and the family that config.json names."""

    e: int = 8
    f: int = 6
    d: int = 10
    p: int = 2
    layers: int = 2
    dtype: torch.dtype = torch.bfloat16
    family: str = "qwen3_moe"
    at: str = AT
    roles: tuple[str, ...] = ("in", "out")

    @property
    def config(self) -> dict[str, object]:
        return {
            "model_type": self.family, "num_experts": self.e, "moe_intermediate_size": self.f,
            "intermediate_size": self.f, "num_local_experts": self.e, "n_routed_experts": self.e,
            "hidden_size": self.d, "num_hidden_layers": self.layers, "torch_dtype": str(self.dtype)[6:],
        }  # fmt: skip

    def weight(self, role: str, layer: int) -> torch.Tensor:
        """A role's values over its axes, in the order of `AXES`."""
        shape = [getattr(self, axis) for axis in AXES[role].split()]
        return numbers(shape, self.dtype, 1 + 7 * layer + 3 * list(AXES).index(role))

    @property
    def others(self) -> Tensors:
        """The tensors that are no expert weights."""
        out = {"model.embed_tokens.weight": numbers([13, self.d], self.dtype, 101)}
        for layer in range(self.layers):
            out[f"model.layers.{layer}.mlp.gate.weight"] = numbers([self.e, self.d], self.dtype, 200 + layer)
        out["model.norm.weight"] = numbers([self.d], self.dtype, 301)
        out["lm_head.weight"] = numbers([13, self.d], self.dtype, 302)
        return out

    def spelled(
        self, layout: str | Layout, *, others: bool = True, take: Sequence[int] | None = None
    ) -> Tensors:
        """Every tensor of the model with its experts in `layout`; `take` picks experts, in that order."""
        if isinstance(layout, str):
            layout = restow.families[self.family].form(layout)
        out = self.others if others else {}
        for layer in range(self.layers):
            for row in layout.rows:
                if row.role in self.roles:
                    whole = self.weight(row.role, layer)
                    whole = whole if take is None else whole[list(take)]
                    prefix = self.at.format(layer)
                    out.update({f"{prefix}.{n}": t for n, t in spell(row, AXES[row.role], whole).items()})
        return out

    def written(
        self, folder: Path, layout: str | Layout = "split", files: int = 2, **extra: torch.Tensor
    ) -> Path:
        """A folder with config, index and `files` shards."""
        return write(folder, {**self.spelled(layout), **extra}, self.config, files)

    def opened(self, folder: Path, layout: str | Layout = "split", files: int = 2) -> restow.Checkpoint:
        """The same without a config, for dtypes that a config would have to announce."""
        return restow.open(write(folder, self.spelled(layout), None, files), family=self.family)

    def but(self, **changes: object) -> Model:
        return replace(self, **changes)  # type: ignore[arg-type]


def numbers(shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A tensor whose bits count on from element to element; its values are finite."""
    count = prod(shape)
    if dtype in (torch.int64, torch.int32, torch.int16, torch.float32, torch.float64):
        return (
            (torch.arange(count, dtype=torch.float64) + 1 + seed * 100_003 % 30_011).to(dtype).reshape(shape)
        )
    bits = {2: torch.int16, 1: torch.uint8}[dtype.itemsize]
    top = {torch.bfloat16: 0x4000, torch.float16: 0x4000}.get(dtype, 0x70)
    return ((torch.arange(count) * 1 + seed * 977) % top).to(bits).view(dtype).reshape(shape)


def spell(row: Row, axes: str, whole: torch.Tensor) -> Tensors:
    """The stored tensors of one row, by name below the module: einops over the row's own text."""
    gone = [a for a in axes.split() if a not in row.axes]
    assert all(whole.shape[axes.split().index(a)] == 1 for a in gone), gone
    named = [f"{a}" for a in row.name_axes]
    dims = " ".join("(" + " ".join(str(f) for f in dim.factors) + ")" for dim in row.dims)
    bits = whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[whole.element_size()])
    if gone:
        bits = bits.squeeze(axes.split().index(gone[0]))
        axes = " ".join(a for a in axes.split() if a not in gone)
    stacked = einops.rearrange(bits, f"{axes} -> {' '.join(named)} {dims}").view(whole.dtype)
    out = {}
    for index in product(*(range(n) for n in stacked.shape[: len(named)])):
        places = iter(index)
        name = "".join(
            part if isinstance(part, str)
            else part.labels[next(places)] if isinstance(part, Labels)
            else str(next(places))
            for part in row.name
        )  # fmt: skip
        out[name] = stacked[index].clone(memory_format=torch.contiguous_format)
    return out


def write(
    folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, object] | None, files: int = 1
) -> Path:
    """Tensors as a folder of `files` shards, names dealt out in turn: every module lies in all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if files == 1:
        save_file({n: tensors[n].contiguous() for n in names}, folder / "model.safetensors")
        return folder
    shards = {f"model-{i + 1:05}-of-{files:05}.safetensors": names[i::files] for i in range(files)}
    for file, held in shards.items():
        save_file({n: tensors[n].contiguous() for n in held}, folder / file)
    index = {"metadata": {}, "weight_map": {n: file for file, held in shards.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def painted(like: Mapping[str, torch.Tensor], byte: int = 0xFF) -> Tensors:
    """Tensors of the same shapes and dtypes, every byte of them `byte`."""
    out = {}
    for name, tensor in like.items():
        out[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        raw(out[name]).fill_(byte)
    return out


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, the same memory."""
    return tensor.detach().view(-1).view(torch.uint8)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Equal shape, dtype and bits."""
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and torch.equal(raw(found.contiguous()), raw(wanted.contiguous()))
    )


def differing(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    """The names whose tensors are not the same, those that are on one side only included."""
    both = found.keys() & wanted.keys()
    return sorted((found.keys() ^ wanted.keys()) | {n for n in both if not same(found[n], wanted[n])})


def simulated(plan: Plan, sources: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What a plan does to int64 destinations of -1, from whole sources; writing a place twice fails."""
    out = {target.name: np.full(target.local_shape, -1, np.int64) for target in plan.targets}
    for copy in plan.copies:
        target, pattern = plan.targets[copy.target], plan.patterns[copy.pattern]
        flat = sources[plan.parts[copy.source].name].numpy().ravel()
        at = np.full(pattern.sizes, copy.at)
        to = [np.full(pattern.sizes, start) for start in copy.start]
        for axis, (n, step, (dim, stride)) in enumerate(zip(*pattern, strict=True)):
            grid = np.arange(n).reshape([n if i == axis else 1 for i in range(len(pattern.sizes))])
            at = at + grid * step
            to[dim] = to[dim] + grid * stride
        assert (out[target.name][tuple(to)] == -1).all(), f"{target.name} written twice"
        out[target.name][tuple(to)] = flat[at]
    return out


def named(tensors: Mapping[str, torch.Tensor], words: Iterable[str]) -> list[str]:
    return [name for name in tensors if any(word in name for word in words)]
