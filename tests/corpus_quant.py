"""The corpus's quantisation level: the good block-FP8 checkpoint with something wrong about its scales or its config."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import CASES, Builder, case
from corpus_bytes import CONFIG, E7, S1, S2, Shards, Tensor, fill, good, index_of, write
from restow import errors
from restow.errors import RestowError

SCALE7 = f"{E7}_scale_inv"
FP8: dict[str, Any] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
BY_DATA: dict[
    str, tuple[type[RestowError], tuple[str, ...], bool]
] = {}  # what only values show: wanted of `verify`


def good_fp8() -> Shards:
    """The good checkpoint with its experts in FP8, a float32 scale for every block of 8 x 8."""
    shards = good()
    for shard in (S1, S2):
        for name, tensor in list(shards[shard].items()):
            if ".mlp.experts." in name:
                rows, columns = tensor.shape
                shards[shard][name] = fill("F8_E4M3", tensor.shape, len(name))
                grid = (-(-rows // 8), -(-columns // 8))
                shards[shard][name + "_scale_inv"] = fill("F32", grid, len(name) + 1)
    return shards


def quant(
    *holds: str, error: type[RestowError] | None, **more: Any
) -> Callable[[Callable[[Shards, dict[str, Any]], object]], Builder]:
    """A case whose builder changes the tensors of the good FP8 checkpoint, or its config."""

    def register(change: Callable[[Shards, dict[str, Any]], object]) -> Builder:
        def build(root: Path) -> None:
            shards, config = good_fp8(), json.loads(json.dumps({**CONFIG, "quantization_config": FP8}))
            change(shards, config)
            write(root, shards, config=config, index=index_of(shards))

        build.__name__ = change.__name__
        return case(error, *holds, **more)(build)

    return register


def by_data(
    *holds: str, error: type[RestowError], fatal: bool
) -> Callable[[Callable[[Shards, dict[str, Any]], object]], Builder]:
    """A case that names, dtypes and shapes do not show: `open` finds nothing, `verify` reads it."""

    def register(change: Callable[[Shards, dict[str, Any]], object]) -> Builder:
        BY_DATA[change.__name__] = (error, holds, fatal)
        return quant(error=None)(change)

    return register


Config = dict[str, Any]


@quant(E7, SCALE7, error=errors.QuantizationError, tensor=SCALE7)
def Q01_scale_missing(shards: Shards, config: Config) -> None:
    del shards[S2][SCALE7]


@quant(SCALE7, "[1, 2]", "[2, 1]", error=errors.QuantizationError, tensor=SCALE7)
def Q02_scale_transposed(shards: Shards, config: Config) -> None:
    shards[S2][SCALE7] = fill("F32", (2, 1), 3)


@quant(SCALE7, "[1, 2]", "[1]", error=errors.QuantizationError, tensor=SCALE7)
def Q03_scale_per_tensor(shards: Shards, config: Config) -> None:
    shards[S2][SCALE7] = fill("F32", (1,), 3)


@by_data(SCALE7, "NaN", error=errors.QuantizationError, fatal=True)
def Q04_scale_nan(shards: Shards, config: Config) -> None:
    shards[S2][SCALE7] = Tensor("F32", (1, 2), struct.pack("<ff", 1.0, float("nan")))


@by_data(SCALE7, "0", error=errors.QuantizationError, fatal=False)
def Q05_scale_zero(shards: Shards, config: Config) -> None:
    shards[S2][SCALE7] = Tensor("F32", (1, 2), struct.pack("<ff", 1.0, 0.0))


@quant("quantization_config", "F8_E4M3", "in 72 tensors", error=errors.QuantizationError)
def Q06_fp8_unannounced(shards: Shards, config: Config) -> None:
    del config["quantization_config"]


@quant("BF16", "F8_E4M3", "in 72 tensors", error=errors.QuantizationError)
def Q07_announced_not_done(shards: Shards, config: Config) -> None:
    shards.clear()
    shards.update(good())


@quant("weight_block_size", "[0, 0]", error=errors.ConfigError)
def Q08_block_zero(shards: Shards, config: Config) -> None:
    config["quantization_config"]["weight_block_size"] = [0, 0]


@quant("weight_block_size", "[4, 4]", error=errors.QuantizationError)
def Q09_block_other(shards: Shards, config: Config) -> None:
    config["quantization_config"]["weight_block_size"] = [4, 4]


@quant(E7, error=errors.MissingTensorError, tensor=E7)
def Q10_scale_orphan(shards: Shards, config: Config) -> None:
    del shards[S2][E7]


@quant(E7, "F8_E5M2", "F8_E4M3", error=errors.QuantizationError, tensor=E7)
def Q11_e5m2_among_e4m3(shards: Shards, config: Config) -> None:
    shards[S2][E7] = shards[S2][E7]._replace(dtype="F8_E5M2")


@by_data(E7, "NaN", error=errors.NonFiniteError, fatal=False)
def Q12_fp8_nan_bytes(shards: Shards, config: Config) -> None:
    data = shards[S2][E7].data
    shards[S2][E7] = shards[S2][E7]._replace(data=data[:5] + b"\x7f" + data[6:])


@quant("made_up_q", error=errors.QuantizationError)
def Q13_unknown_method(shards: Shards, config: Config) -> None:
    config["quantization_config"] = {"quant_method": "made_up_q", "bits": 3}


Q_SCALE = "model.layers.1.self_attn.q_proj.weight_scale_inv"


@quant(Q_SCALE, error=errors.QuantizationError, tensor=Q_SCALE)
def Q14_scale_missing_outside(shards: Shards, config: Config) -> None:
    """A weight outside the experts, in FP8 and without a scale."""
    shards[S2][Q_SCALE.removesuffix("_scale_inv")] = fill("F8_E4M3", (16, 16), 3)


@quant(Q_SCALE, "[2, 2]", "[1, 2]", error=errors.QuantizationError, tensor=Q_SCALE)
def Q15_grid_outside(shards: Shards, config: Config) -> None:
    shards[S2][Q_SCALE.removesuffix("_scale_inv")] = fill("F8_E4M3", (16, 16), 3)
    shards[S2][Q_SCALE] = fill("F32", (1, 2), 3)


@quant(error=None)
def Q16_attention_in_fp8(shards: Shards, config: Config) -> None:
    """Whole: attention in FP8 with its scales, and one layer left as it is by the config."""
    shards[S2][Q_SCALE.removesuffix("_scale_inv")] = fill("F8_E4M3", (16, 16), 3)
    shards[S2][Q_SCALE] = fill("F32", (2, 2), 3)
    config["quantization_config"]["modules_to_not_convert"] = ["model.layers.0.mlp.experts", "lm_head"]
    shards[S1] = good()[S1]


assert "G06_fp8" in CASES
