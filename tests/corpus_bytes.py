"""A tiny Qwen3-MoE checkpoint, and safetensors bytes by a few lines of our own, so that they can be wrong.

Two layers, 12 experts (so that text order shows), hidden 16, expert inner 8, three shards. Every value
follows from the tensor's number and the element's: never zero, and equal in no two neighbours.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

S1, S2, S3 = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
INDEX = "model.safetensors.index.json"
EXPERTS = "model.layers.1.mlp.experts"
E7 = f"{EXPERTS}.7.gate_proj.weight"
E8 = f"{EXPERTS}.8.gate_proj.weight"
HIDDEN, INNER, COUNT, VOCAB = 16, 8, 12, 32
WIDTH = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "BOOL": 1, "I64": 8, "I8": 1}

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": INNER,
    "num_experts": COUNT,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": VOCAB,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


Shard = dict[str, Tensor]
Shards = dict[str, Shard]


def fill(dtype: str, shape: tuple[int, ...], number: int) -> Tensor:
    """A tensor whose values tell its number and their place; small integers, exact in every dtype."""
    count = 1
    for size in shape:
        count *= size
    values = [1 + (number * 37 + i * 5) % 113 for i in range(count)]
    if dtype == "BF16":
        data = b"".join(struct.pack("<f", value)[2:] for value in values)
    elif dtype == "BOOL":
        data = bytes(value & 1 for value in values)
    else:
        form = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I8": "b", "F8_E4M3": "B"}[dtype]
        data = struct.pack(f"<{count}{form}", *values)
    return Tensor(dtype, shape, data)


def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """Names and shapes by shard: embeddings and layer 0, layer 1, norm and head."""

    def layer(i: int) -> dict[str, tuple[int, ...]]:
        at = f"model.layers.{i}."
        found: dict[str, tuple[int, ...]] = {
            at + "input_layernorm.weight": (HIDDEN,),
            at + "post_attention_layernorm.weight": (HIDDEN,),
            at + "self_attn.q_proj.weight": (16, HIDDEN),
            at + "self_attn.k_proj.weight": (8, HIDDEN),
            at + "self_attn.v_proj.weight": (8, HIDDEN),
            at + "self_attn.o_proj.weight": (HIDDEN, 16),
            at + "self_attn.q_norm.weight": (8,),
            at + "self_attn.k_norm.weight": (8,),
            at + "mlp.gate.weight": (COUNT, HIDDEN),
        }
        for e in range(COUNT):
            found[f"{at}mlp.experts.{e}.gate_proj.weight"] = (INNER, HIDDEN)
            found[f"{at}mlp.experts.{e}.up_proj.weight"] = (INNER, HIDDEN)
            found[f"{at}mlp.experts.{e}.down_proj.weight"] = (HIDDEN, INNER)
        return found

    return {
        S1: {"model.embed_tokens.weight": (VOCAB, HIDDEN), **layer(0)},
        S2: layer(1),
        S3: {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)},
    }


def good(dtype: str = "BF16") -> Shards:
    """The tensors of the good checkpoint, by shard."""
    number = 0
    found: Shards = {}
    for shard, tensors in shapes().items():
        found[shard] = {}
        for name, shape in tensors.items():
            number += 1
            found[shard][name] = fill(dtype, shape, number)
    return found


def table(
    shard: Mapping[str, Tensor], metadata: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], bytes]:
    """A header as a dict, and the data behind it."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in shard.items():
        offsets = [len(data), len(data) + len(tensor.data)]
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.data
    return header, data


def blob(
    header: Mapping[str, Any] | bytes, data: bytes = b"", *, length: int | None = None, align: int = 8
) -> bytes:
    """The bytes of a file; `header` may be raw text, `length` a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    if not isinstance(header, bytes):
        text += b" " * (-len(text) % align)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def split(path: Path) -> tuple[bytes, bytes]:
    """The header's text and the data of a good file."""
    raw = path.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    return raw[8:end], raw[end:]


def index_of(shards: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(len(t.data) for shard in shards.values() for t in shard.values())},
        "weight_map": {name: shard for shard, tensors in shards.items() for name in tensors},
    }


def write(root: Path, shards: Shards, *, config: Any = CONFIG, index: Any = None) -> None:
    """A checkpoint of many shards with its index and config."""
    root.mkdir(parents=True, exist_ok=True)
    for name, shard in shards.items():
        (root / name).write_bytes(blob(*table(shard, {"format": "pt"})))
    (root / INDEX).write_text(json.dumps(index if index is not None else index_of(shards), indent=2))
    (root / "config.json").write_text(json.dumps(config, indent=2))


def edit(root: Path, change: Callable[[dict[str, Any]], object], *, data: bytes | None = None) -> None:
    """Rewrite S2 after a change to its header, its data untouched unless given."""
    text, old = split(root / S2)
    header = json.loads(text)
    change(header)
    (root / S2).write_bytes(blob(header, old if data is None else data))


def retext(root: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite S2 after a change to its header's text."""
    text, data = split(root / S2)
    (root / S2).write_bytes(blob(change(text), data))


def reindex(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the index after a change to it."""
    index = json.loads((root / INDEX).read_text())
    change(index)
    (root / INDEX).write_text(json.dumps(index, indent=2))
