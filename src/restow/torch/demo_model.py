"""The demo's checkpoint, a Qwen3-MoE, and the value that each element must have. Needs no transformers.

A value follows from its tensor's name and its index alone, never zero and never NaN, so that a misplaced
element cannot pass for the right one. `wanted` says what a loaded tensor must hold from names and indices:
nothing of what it checks is used to compute it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

LAYERS, EXPERTS, WIDTH, INNER, VOCAB = 12, 16, 512, 320, 2048  # L e d f: two digits, "10" sorts before "2"
HEADS, KV_HEADS, HEAD = 8, 2, 64
FILES = 4
TIMES = 5  # a load and a copy are timed so often, the best counts
LOST = "model.layers.7.mlp.experts.11.up_proj.weight"

CONFIG: Mapping[str, Any] = { "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
"torch_dtype": "bfloat16", "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "moe_intermediate_size":
INNER, "num_experts": EXPERTS, "num_experts_per_tok": 4, "num_hidden_layers": LAYERS, "num_attention_heads":
HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD, "vocab_size": VOCAB, "tie_word_embeddings": False,
"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "hidden_act": "silu",
"max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, }  # fmt: skip

Bits = NDArray[np.uint16]


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the checkpoint, in the order of the files."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, shape in (
            ("input_layernorm", (WIDTH,)),
            ("self_attn.q_proj", (HEADS * HEAD, WIDTH)),
            ("self_attn.k_proj", (KV_HEADS * HEAD, WIDTH)),
            ("self_attn.v_proj", (KV_HEADS * HEAD, WIDTH)),
            ("self_attn.o_proj", (WIDTH, HEADS * HEAD)),
            ("self_attn.q_norm", (HEAD,)),
            ("self_attn.k_norm", (HEAD,)),
            ("post_attention_layernorm", (WIDTH,)),
            ("mlp.gate", (EXPERTS, WIDTH)),
        ):
            found[f"{at}.{name}.weight"] = shape
        for e in range(EXPERTS):
            found[f"{at}.mlp.experts.{e}.gate_proj.weight"] = (INNER, WIDTH)
            found[f"{at}.mlp.experts.{e}.up_proj.weight"] = (INNER, WIDTH)
            found[f"{at}.mlp.experts.{e}.down_proj.weight"] = (WIDTH, INNER)
    return {**found, "model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def loaded_shapes(layout: str = "grouped") -> dict[str, tuple[int, ...]]:
    """Every tensor of the model: the experts of a layer in two, all else as the checkpoint has it."""
    rows = {
        "grouped": (("gate_and_up_projs", (WIDTH, 2 * INNER)), ("down_projs", (INNER, WIDTH))),
        "fused": (("gate_up_proj", (2 * INNER, WIDTH)), ("down_proj", (WIDTH, INNER))),
    }[layout]
    found = {name: shape for name, shape in shapes().items() if ".experts." not in name}
    for layer in range(LAYERS):
        for word, shape in rows:
            found[f"model.layers.{layer}.mlp.experts.{word}"] = (EXPERTS, *shape)
    return found


def bits(name: str, index: NDArray[np.uint32]) -> Bits:
    """The bfloat16 bits of elements of a tensor, by their flat index: finite, of all signs, 2^-15 to 2^17."""
    x = index * np.uint32(0x9E3779B1) + np.uint32(zlib.crc32(name.encode()))
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    sign_and_fraction = ((x & np.uint32(1)) << np.uint32(15)) | ((x >> np.uint32(6)) & np.uint32(0x7F))
    exponent = np.uint32(112) + ((x >> np.uint32(1)) & np.uint32(31))
    found: Bits = (sign_and_fraction | (exponent << np.uint32(7))).astype(np.uint16)
    return found


def flat(*sizes: int) -> NDArray[np.uint32]:
    """The flat index of every place of a shape."""
    return np.arange(int(np.prod(sizes)), dtype=np.uint32).reshape(sizes)


def wanted(name: str, shape: tuple[int, ...], first: int = 0) -> Iterator[tuple[Any, Bits]]:
    """What a loaded tensor must hold: (part of it, bits). `first` is the number of its first expert."""
    path, _, word = name.rpartition(".")
    if ".experts." not in name:
        yield slice(None), bits(name, flat(*shape))
        return
    turned = word in ("gate_and_up_projs", "down_projs")
    for e in range(first, first + shape[0]):
        if "down" in word:  # down_projs[e, j, i] is down_proj[i, j] of expert e
            index = flat(WIDTH, INNER)
            yield e - first, bits(f"{path}.{e}.down_proj.weight", index.T if turned else index)
            continue
        index = flat(INNER, WIDTH)
        # gate_and_up_projs[e, i, p f + j] is gate_proj[j, i] for p = 0, up_proj[j, i] for p = 1
        for p, half in enumerate(("gate", "up")):
            channels = slice(p * INNER, (p + 1) * INNER)
            part: Any = (e - first, slice(None), channels) if turned else (e - first, channels)
            yield part, bits(f"{path}.{e}.{half}_proj.weight", index.T if turned else index)


def compared(state: Mapping[str, torch.Tensor], first: int = 0) -> tuple[int, list[str]]:
    """How many elements of loaded tensors were compared, and which tensors hold a wrong one."""

    def one(item: tuple[str, torch.Tensor]) -> tuple[int, bool]:
        name, tensor = item
        found, seen, right = tensor.view(torch.uint16).numpy(), 0, True
        for part, expected in wanted(name, tuple(tensor.shape), first):
            seen += expected.size
            right = right and np.array_equal(found[part], expected)
        return seen, right and seen == tensor.numel()

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(one, state.items()))
    return sum(seen for seen, _ in results), [
        name for name, (_, right) in zip(state, results, strict=True) if not right
    ]


def write_checkpoint(folder: Path) -> int:
    """Write the checkpoint as a hub folder: config, shards, index. The bytes of its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    whole = sum(2 * int(np.prod(shape)) for shape in shapes().values())
    held: list[dict[str, torch.Tensor]] = [{}]
    weight_map: dict[str, str] = {}
    size = 0
    with ThreadPoolExecutor() as pool:
        for name, values in zip(shapes(), pool.map(_values, shapes().items()), strict=True):
            if size >= whole * len(held) // FILES:
                _write_shard(folder, held)
                held.append({})
            held[-1][name] = torch.from_numpy(values).view(torch.bfloat16)
            weight_map[name] = _shard(len(held))
            size += values.nbytes
    _write_shard(folder, held)
    index = {"metadata": {"total_size": whole}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return whole


def _values(item: tuple[str, tuple[int, ...]]) -> Bits:
    return bits(item[0], flat(*item[1]))


def _write_shard(folder: Path, held: list[dict[str, torch.Tensor]]) -> None:
    save_file(held[-1], folder / _shard(len(held)), metadata={"format": "pt"})
    held[-1] = {}


def _shard(number: int) -> str:
    return f"model-{number:05d}-of-{FILES:05d}.safetensors"


def copy_headers(source: Path, folder: Path, without: str) -> None:
    """A checkpoint of the same headers without one tensor; its files have their length and no data."""
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    index = json.loads((source / "model.safetensors.index.json").read_text())
    del index["weight_map"][without]
    del index["metadata"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        at = 0
        header.pop(without, None)
        for entry in (entry for name, entry in header.items() if name != "__metadata__"):
            begin, end = entry["data_offsets"]
            entry["data_offsets"] = [at, at + end - begin]
            at += end - begin
        text = json.dumps(header).encode()
        with (folder / path.name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
