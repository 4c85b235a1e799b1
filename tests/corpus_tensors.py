"""The corpus's tensor and config levels: good files that do not make a good checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import Builder, case
from corpus_bytes import CONFIG, E7, EXPERTS, S1, S2, S3, Shards, Tensor, fill, good, write
from restow import errors
from restow.errors import RestowError

LAYER0 = "model.layers.0.mlp.experts"
ROUTER = "model.layers.1.mlp.gate.weight"
NORM = "model.norm.weight"


def tensors(
    *holds: str, error: type[RestowError], **more: Any
) -> Callable[[Callable[[Shards], object]], Builder]:
    """A case whose builder changes the good checkpoint's tensors, and may give another config."""

    def register(change: Callable[[Shards], object]) -> Builder:
        def build(root: Path) -> None:
            shards = good()
            config = change(shards)
            write(root, shards, config=CONFIG if config is None else config)

        build.__name__ = change.__name__
        return case(error, *holds, **more)(build)

    return register


def config(
    *holds: str, error: type[RestowError], **more: Any
) -> Callable[[Callable[[dict[str, Any]], object]], Builder]:
    """A case whose builder changes the good checkpoint's config."""

    def register(change: Callable[[dict[str, Any]], object]) -> Builder:
        def build(root: Path) -> None:
            values = json.loads(json.dumps(CONFIG))
            change(values)
            write(root, good(), config=values)

        build.__name__ = change.__name__
        return case(error, *holds, **more)(build)

    return register


def _drop(shards: Shards, keep: Callable[[str], bool]) -> None:
    for shard in shards.values():
        for name in [name for name in shard if not keep(name)]:
            del shard[name]


def _fused(shards: Shards, *, turned: bool = False, only: bool = True) -> None:
    """Layer 1's experts stacked, beside the split ones unless they are the only ones."""
    pairs = [shards[S2][f"{EXPERTS}.{e}.{p}_proj.weight"].data for e in range(12) for p in ("gate", "up")]
    down = [shards[S2][f"{EXPERTS}.{e}.down_proj.weight"].data for e in range(12)]
    if only:
        _drop(shards, lambda name: not name.startswith(f"{EXPERTS}."))
    shards[S2][f"{EXPERTS}.gate_up_proj"] = Tensor("BF16", (12, 16, 16), b"".join(pairs))
    shards[S2][f"{EXPERTS}.down_proj"] = Tensor(
        "BF16", (12, 8, 16) if turned else (12, 16, 8), b"".join(down)
    )


@tensors(E7, "expected 12 experts", "found 11", error=errors.MissingTensorError, tensor=E7)
def T01_part_of_expert(shards: Shards) -> None:
    del shards[S2][E7]


@tensors(f"{EXPERTS}.11.gate_proj.weight", "12", "found 11", error=errors.MissingTensorError)
def T02_expert_missing(shards: Shards) -> None:
    _drop(shards, lambda name: not name.startswith(f"{EXPERTS}.11."))


@tensors(f"{EXPERTS}.0.gate_proj.weight", "found none", error=errors.MissingTensorError)
def T03_layer_experts_missing(shards: Shards) -> None:
    _drop(shards, lambda name: not name.startswith(f"{EXPERTS}."))


@tensors(f"{EXPERTS}.0.gate_proj.weight", error=errors.MissingTensorError)
def T03_layer_block_missing(shards: Shards) -> None:
    _drop(shards, lambda name: not name.startswith("model.layers.1.mlp."))


@tensors(f"{EXPERTS}.12.gate_proj.weight", "12", "found 13", error=errors.UnexpectedTensorError)
def T04_extra_expert(shards: Shards) -> None:
    for p, shape in (("gate", (8, 16)), ("up", (8, 16)), ("down", (16, 8))):
        shards[S2][f"{EXPERTS}.12.{p}_proj.weight"] = fill("BF16", shape, 3)


@tensors(f"{EXPERTS}.6.gate_proj.weight", f"{EXPERTS}.12.up_proj.weight", error=errors.MissingTensorError)
def T05_number_gap(shards: Shards) -> None:
    for name in [name for name in shards[S2] if name.startswith(f"{EXPERTS}.")]:
        number = int(name.split(".")[5])
        if number >= 6:
            shards[S2][name.replace(f".{number}.", f".{number + 100}.")] = shards[S2].pop(name)
    for name in [
        name for name in shards[S2] if name.startswith(f"{EXPERTS}.1") and name.split(".")[5] > "100"
    ]:
        number = int(name.split(".")[5])
        shards[S2][name.replace(f".{number}.", f".{number - 99}.")] = shards[S2].pop(name)


@tensors(E7, "[8, 16]", "[6, 16]", error=errors.ShapeMismatchError, tensor=E7)
def T06_one_shape(shards: Shards) -> None:
    shards[S2][E7] = fill("BF16", (6, 16), 3)


@tensors(f"{EXPERTS}.7.down_proj.weight", "[16, 8]", "[8, 16]", error=errors.ShapeMismatchError)
def T07_transposed(shards: Shards) -> None:
    shards[S2][f"{EXPERTS}.7.down_proj.weight"] = fill("BF16", (8, 16), 3)


@tensors(E7, "F32", "BF16", error=errors.DtypeMismatchError, fatal=False, tensor=E7)
def T08_mixed_dtype(shards: Shards) -> None:
    shards[S2][E7] = fill("F32", (8, 16), 3)


@tensors("I8", "in 72 tensors", "quantization_config", error=errors.DtypeMismatchError)
def T09_int8_unannounced(shards: Shards) -> None:
    for shard in shards.values():
        for name in [name for name in shard if ".experts." in name]:
            shard[name] = fill("I8", shard[name].shape, 3)


@tensors(E7, "I8", "quantization_config", error=errors.DtypeMismatchError, tensor=E7)
def T09_one_int8(shards: Shards) -> None:
    shards[S2][E7] = fill("I8", (8, 16), 3)


@tensors(f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.0.gate_proj.weight", error=errors.AmbiguousTensorError)
def T14_fused_and_split(shards: Shards) -> None:
    _fused(shards, only=False)


@tensors(f"{EXPERTS}.gate_up_proj", error=errors.ShapeMismatchError)
def T15_fused_transposed(shards: Shards) -> None:
    _fused(shards, turned=True)


@tensors(f"{EXPERTS}.07.gate_proj.weight", error=errors.AmbiguousTensorError)
def T16_leading_zero(shards: Shards) -> None:
    shards[S2][f"{EXPERTS}.07.gate_proj.weight"] = fill("BF16", (8, 16), 3)


def _renamed(shards: Shards, change: Callable[[str], str]) -> None:
    for file, shard in shards.items():
        shards[file] = {change(name): tensor for name, tensor in shard.items()}


@tensors(NORM, "begin with model.", error=errors.MissingTensorError, fatal=False, tensor=NORM)
def T17_no_prefix(shards: Shards) -> None:
    del shards[S3]["lm_head.weight"]
    _renamed(shards, lambda name: name.removeprefix("model."))


@tensors(NORM, "model.model.norm.weight", error=errors.MissingTensorError)
def T18_double_prefix(shards: Shards) -> None:
    _renamed(shards, lambda name: f"model.{name}" if name.startswith("model.") else name)


@tensors(E7, "0", error=errors.ShapeMismatchError, tensor=E7)
def T19_empty_tensor(shards: Shards) -> None:
    shards[S2][E7] = Tensor("BF16", (0, 16), b"")


@tensors(NORM, "[16]", "[]", error=errors.ShapeMismatchError, tensor=NORM)
def T20_scalar(shards: Shards) -> None:
    shards[S3][NORM] = fill("BF16", (), 3)


@tensors("model.layers.2.", "num_hidden_layers", error=errors.UnexpectedTensorError)
def T21_extra_layer(shards: Shards) -> None:
    shards[S3] |= {n.replace("layers.1.", "layers.2."): t for n, t in shards[S2].items()}


@tensors("lm_head.weight", "tie_word_embeddings", error=errors.MissingTensorError, tensor="lm_head.weight")
def T22_head_missing(shards: Shards) -> None:
    del shards[S3]["lm_head.weight"]


@tensors(
    "lm_head.weight", "model.embed_tokens.weight", "F32", error=errors.AmbiguousTensorError, fatal=False,
    tensor="lm_head.weight",
)  # fmt: skip
def T23_tied_but_wider(shards: Shards) -> dict[str, Any]:
    shards[S3]["lm_head.weight"] = fill("F32", (32, 16), 3)
    return {**CONFIG, "tie_word_embeddings": True}


@tensors(ROUTER, error=errors.MissingTensorError, tensor=ROUTER)
def T24_router_missing(shards: Shards) -> None:
    del shards[S2][ROUTER]


@tensors("[12, 16]", "[11, 16]", error=errors.ShapeMismatchError, tensor=ROUTER)
def T24_router_of_fewer(shards: Shards) -> None:
    shards[S2][ROUTER] = fill("BF16", (11, 16), 3)


@tensors(
    "model.layers.1.self_attn.q_norm.weight", "like model.layers.0", error=errors.MissingTensorError,
    tensor="model.layers.1.self_attn.q_norm.weight",
)  # fmt: skip
def T25_unlike_its_like(shards: Shards) -> None:
    del shards[S2]["model.layers.1.self_attn.q_norm.weight"]


@case(errors.ConfigError, "config.json")
def C01_no_config(root: Path) -> None:
    write(root, good())
    (root / "config.json").unlink()


@case(errors.ConfigError, "config.json")
def C02_config_not_json(root: Path) -> None:
    write(root, good())
    (root / "config.json").write_bytes((root / "config.json").read_bytes()[:100])


@config("made_up_moe", error=errors.UnsupportedFamilyError)
def C03_unknown_family(values: dict[str, Any]) -> None:
    values["model_type"] = "made_up_moe"


@config("16", "12", f"{LAYER0}.12.gate_proj.weight", error=errors.MissingTensorError)
def C04_more_experts(values: dict[str, Any]) -> None:
    values["num_experts"] = 16


@config("8 experts", "found 12", error=errors.UnexpectedTensorError)
def C05_fewer_experts(values: dict[str, Any]) -> None:
    values["num_experts"] = 8


@config("model.layers.2.", "num_hidden_layers", error=errors.MissingTensorError)
def C06_more_layers(values: dict[str, Any]) -> None:
    values["num_hidden_layers"] = 3


@config("[8, 32]", "[8, 16]", error=errors.ShapeMismatchError)
def C07_hidden_size(values: dict[str, Any]) -> None:
    values["hidden_size"] = 32


@config("mixtral", f"{LAYER0}.0.gate_proj.weight", error=errors.MissingTensorError)
def C08_family_disagrees(values: dict[str, Any]) -> None:
    values |= {"model_type": "mixtral", "num_local_experts": 12}


@config("code", error=errors.UnsupportedFamilyError)
def C09_remote_code(values: dict[str, Any]) -> None:
    values |= {"model_type": "made_up_moe", "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}


@config("num_experts", "-1", error=errors.ConfigError)
def C10_experts_negative(values: dict[str, Any]) -> None:
    values["num_experts"] = -1


@config("num_experts", "'12'", error=errors.ConfigError)
def C11_experts_text(values: dict[str, Any]) -> None:
    values["num_experts"] = "12"


@config("num_experts", "1000000000000", error=errors.ConfigError)
def C12_experts_huge(values: dict[str, Any]) -> None:
    values["num_experts"] = 10**12


@case()
def C13_known_code_is_not_needed(root: Path) -> None:
    """A known family whose config also names code: that is passed over."""
    write(root, good(), config={**CONFIG, "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}})
    (root / "modeling.py").write_text("raise SystemExit('this was run')\n")
    assert S1
