"""Bad checkpoints, and good ones that must pass: small builders, each with the reaction that is wanted.

`CASES` maps an id to a `Case`. A builder writes a checkpoint into a new folder and may return the path
to open. Another level is another module: it imports `case`, decorates its builders, and they stand in
the same table.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpus_bytes import (
    CONFIG,
    E7,
    E8,
    INDEX,
    S1,
    S2,
    S3,
    Tensor,
    blob,
    edit,
    fill,
    good,
    index_of,
    reindex,
    retext,
    split,
    table,
    write,
)
from restow import errors
from restow.errors import RestowError

Builder = Callable[[Path], "Path | None"]


@dataclass(frozen=True)
class Case:
    """`error` None: must be accepted without a finding. `holds`: strings that the message must hold."""

    id: str
    build: Builder
    error: type[RestowError] | None
    holds: tuple[str, ...]
    fatal: bool
    tensor: str | None  # the error's field, where the case has one tensor at fault
    file: str | None  # the file that the error's path must end with
    options: Mapping[str, Any] = field(default_factory=dict)  # for open_folder


CASES: dict[str, Case] = {}


def says(text: str, part: str) -> bool:
    """Whether a text holds a part; what is a number, as a number of its own and not within another or a name."""
    if not re.fullmatch(r"-?\d+", part):
        return part in text
    return re.search(rf"(?<![\w.-]){part}(?![\w]|\.\w)", text) is not None


def case(
    error: type[RestowError] | None = None,
    *holds: str,
    fatal: bool = True,
    tensor: str | None = None,
    file: str | None = None,
    **options: Any,
) -> Callable[[Builder], Builder]:
    """Put a builder into the table, under its own name."""

    def register(build: Builder) -> Builder:
        name = build.__name__
        assert name not in CASES, name
        CASES[name] = Case(name, build, error, holds, fatal, tensor, file, options)
        return build

    return register


def shard2(*holds: str, error: type[RestowError], **more: Any) -> Callable[[Builder], Builder]:
    """A case whose second shard is at fault: the good checkpoint is there before the builder runs."""

    def register(build: Builder) -> Builder:
        def whole(root: Path) -> Path | None:
            write(root, good())
            return build(root)

        whole.__name__ = build.__name__
        return case(error, S2, *holds, **({"file": S2} | more))(whole)

    return register


def index(
    *holds: str, error: type[RestowError] = errors.IndexFileError, **more: Any
) -> Callable[[Builder], Builder]:
    """A case whose index is at fault."""

    def register(build: Builder) -> Builder:
        def whole(root: Path) -> Path | None:
            write(root, good())
            return build(root)

        whole.__name__ = build.__name__
        return case(error, *holds, **({"file": INDEX} | more))(whole)

    return register


# Files: S2 is at fault.


@shard2("0 bytes", error=errors.TruncatedFileError)
def F01_empty_file(root: Path) -> None:
    (root / S2).write_bytes(b"")


@shard2("7 bytes", error=errors.TruncatedFileError)
def F02_seven_bytes(root: Path) -> None:
    (root / S2).write_bytes(b"\x10" + bytes(6))


@shard2("LFS", error=errors.NotSafetensorsError)
def F03_lfs_pointer(root: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'ab' * 32}\nsize 4976698672\n"
    (root / S2).write_text(text)


@shard2("HTML", error=errors.NotSafetensorsError)
def F04_html_page(root: Path) -> None:
    (root / S2).write_text("\n<!DOCTYPE html><html><body>429 Too Many Requests</body></html>")


@shard2("9223372036854775808", error=errors.HeaderError)
def F05_header_2_63(root: Path) -> None:
    text, data = split(root / S2)
    (root / S2).write_bytes(blob(text, data, length=2**63))


@shard2("100000001", "100000000", error=errors.HeaderError)
def F06_header_over_limit(root: Path) -> None:
    with (root / S2).open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{")
        file.truncate(8 + 100_000_001)


@shard2(error=errors.TruncatedFileError)
def F07_header_past_end(root: Path) -> None:
    text, data = split(root / S2)
    (root / S2).write_bytes(blob(text, data, length=len(text) + len(data) + 1))


@shard2(error=errors.TruncatedFileError)
def F08_cut_in_header(root: Path) -> None:
    (root / S2).write_bytes((root / S2).read_bytes()[:500])


@shard2("100 bytes", error=errors.TruncatedFileError)
def F09_cut_in_data(root: Path) -> None:
    (root / S2).write_bytes((root / S2).read_bytes()[:-100])


@shard2("8 bytes", error=errors.LayoutError)
def F10_trailing_bytes(root: Path) -> None:
    (root / S2).write_bytes((root / S2).read_bytes() + b"trailing")


@shard2(error=errors.LayoutError)
def F11_polyglot_zip(root: Path) -> None:
    (root / S2).write_bytes((root / S2).read_bytes() + b"PK\x05\x06" + bytes(18))


@shard2("8 bytes", error=errors.LayoutError, tensor=E8)
def F14_hole(root: Path) -> None:
    text, data = split(root / S2)
    header = json.loads(text)
    at = header[E8]["data_offsets"][0]
    for info in header.values():
        if "data_offsets" in info and info["data_offsets"][0] >= at:
            info["data_offsets"] = [offset + 8 for offset in info["data_offsets"]]
    (root / S2).write_bytes(blob(header, data[:at] + b"\xee" * 8 + data[at:]))


@shard2(E7, E8, error=errors.LayoutError)
def F15_overlap(root: Path) -> None:
    edit(root, lambda header: header[E8].update(data_offsets=header[E7]["data_offsets"]))


@shard2(E7, error=errors.HeaderError, tensor=E7)
def F16_duplicate_key(root: Path) -> None:
    again = json.dumps({E7: {"dtype": "BF16", "shape": [16, 8], "data_offsets": [0, 256]}})[1:-1].encode()
    retext(root, lambda text: text.rstrip()[:-1] + b"," + again + b"}")


@shard2("UTF-8", error=errors.HeaderError)
def F17_bad_utf8(root: Path) -> None:
    retext(root, lambda text: text.replace(b"experts.7.gate", b"experts.\xff.gate"))


@shard2("{", error=errors.HeaderError)
def F18_leading_space(root: Path) -> None:
    retext(root, lambda text: b" " + text)


@shard2(error=errors.HeaderError)
def F19_header_is_list(root: Path) -> None:
    retext(root, lambda text: b"[" + text.rstrip() + b"]")


@shard2("depth", error=errors.HeaderError)
def F20_deep_json(root: Path) -> None:
    deep = b'"deep":' + b"[" * 100_000 + b"]" * 100_000
    retext(root, lambda text: text.replace(b'"shape"', deep + b',"shape"', 1))


@shard2("__metadata__", error=errors.HeaderError)
def F21_metadata_not_text(root: Path) -> None:
    edit(root, lambda header: header.update(__metadata__={"format": 1}))


@shard2(E7, "-8", error=errors.HeaderError, tensor=E7)
def F22_negative_shape(root: Path) -> None:
    edit(root, lambda header: header[E7].update(shape=[-8, -16]))


@shard2(E7, "1099511627776", error=errors.HeaderError, tensor=E7)
def F23_shape_overflow(root: Path) -> None:
    edit(root, lambda header: header[E7].update(shape=[2**40, 2**40]))


@shard2(E7, "256", "512", error=errors.LayoutError, tensor=E7)
def F24_size_mismatch(root: Path) -> None:
    edit(root, lambda header: header[E7].update(dtype="F32"))


@shard2(E7, "F17", error=errors.HeaderError, tensor=E7)
def F25_unknown_dtype(root: Path) -> None:
    edit(root, lambda header: header[E7].update(dtype="F17"))


@shard2(E7, error=errors.LayoutError, tensor=E7)
def F26_reversed_offsets(root: Path) -> None:
    edit(root, lambda header: header[E7]["data_offsets"].reverse())


@shard2(E7, "strides", error=errors.HeaderError, fatal=False, tensor=E7)
def F27_extra_field(root: Path) -> None:
    edit(root, lambda header: header[E7].update(strides=[1, 8]))


@shard2(error=errors.HeaderError)
def F28_nul_padding(root: Path) -> None:
    retext(root, lambda text: text + bytes(8))


@shard2(E7, "1.0e3", error=errors.HeaderError, tensor=E7)
def F29_float_offsets(root: Path) -> None:
    text, _ = split(root / S2)
    begin = json.loads(text)[E7]["data_offsets"][0]
    # Only E7's pair begins there: the tensors lie end to end.
    retext(root, lambda text: text.replace(b'"data_offsets":[%d,' % begin, b'"data_offsets":[1.0e3,', 1))


@shard2("pickle", error=errors.NotSafetensorsError)
def F30_torch_zip_renamed(root: Path) -> None:
    (root / S2).write_bytes(b"PK\x03\x04\x00\x00\x08\x08\x00\x00" + b"archive/data.pkl" + bytes(200))


@shard2("60000", error=errors.UnexpectedTensorError, fatal=False)
def F31_header_bomb(root: Path) -> None:
    shards = good()
    for i in range(60_000):
        shards[S2][f"empty.{i}"] = Tensor("F32", (0,), b"")
    write(root, shards)


@shard2("\\x1b", error=errors.HeaderError)
def F32_hostile_names(root: Path) -> None:
    shards = good()
    for name in ("\x1b[2J\x1b[31mgone", "two\nlines", "../../etc/passwd", "nul\0name", ""):
        shards[S2][name] = fill("F32", (2,), 7)
    write(root, shards)


@shard2(error=errors.AmbiguousTensorError, fatal=False)
def F33_twin_unicode_names(root: Path) -> None:
    shards = good()
    shards[S2]["caf\u00e9.weight"] = fill("F32", (2,), 1)
    shards[S2]["cafe\u0301.weight"] = fill("F32", (2,), 2)
    write(root, shards)


@shard2("director", error=errors.NotSafetensorsError)
def F35_shard_is_folder(root: Path) -> None:
    (root / S2).unlink()
    (root / S2).mkdir()


@shard2("regular file", error=errors.NotSafetensorsError)
def F36_shard_is_fifo(root: Path) -> None:
    (root / S2).unlink()
    os.mkfifo(root / S2)


@shard2("link", error=errors.UnsafePathError)
def F37_symlink_loop(root: Path) -> None:
    (root / S2).unlink()
    (root / S2).symlink_to(S2)


@shard2("link", error=errors.MissingShardError)
def F38_dangling_link(root: Path) -> None:
    (root / S2).unlink()
    (root / S2).symlink_to("../blobs/0123456789abcdef")


@shard2("regular file", error=errors.NotSafetensorsError)
def F39_link_to_device(root: Path) -> None:
    (root / S2).unlink()
    (root / S2).symlink_to("/dev/zero")


# Indexes.


@index(INDEX)
def I01_not_json(root: Path) -> None:
    (root / INDEX).write_bytes((root / INDEX).read_bytes()[:1000])


@index(INDEX)
def I02_empty(root: Path) -> None:
    (root / INDEX).write_bytes(b"")


@index(INDEX, "weight_map")
def I03_no_weight_map(root: Path) -> None:
    reindex(root, lambda value: value.pop("weight_map"))


@index(INDEX, "weight_map")
def I04_weight_map_list(root: Path) -> None:
    reindex(root, lambda value: value.update(weight_map=list(value["weight_map"])))


@index(INDEX, E7, tensor=E7)
def I05_value_not_text(root: Path) -> None:
    reindex(root, lambda value: value["weight_map"].update({E7: 2}))


@case()
def I06_no_metadata(root: Path) -> None:
    write(root, good(), index={"weight_map": index_of(good())["weight_map"]})


@index(S2, INDEX, error=errors.MissingShardError, file=S2)
def I07_shard_missing(root: Path) -> None:
    (root / S2).unlink()


@index(S2, error=errors.IndexMismatchError, file=S2)
def I08_all_of_a_shard_unnamed(root: Path) -> None:
    def change(value: dict[str, Any]) -> None:
        value["weight_map"] = {name: shard for name, shard in value["weight_map"].items() if shard != S2}

    reindex(root, change)


@index(E7, S1, error=errors.IndexMismatchError, tensor=E7)
def I09_tensor_not_in_shard(root: Path) -> None:
    reindex(root, lambda value: value["weight_map"].update({E7: S1}))


@index(E7, S2, error=errors.IndexMismatchError, tensor=E7)
def I10_tensor_unlisted(root: Path) -> None:
    reindex(root, lambda value: value["weight_map"].pop(E7))


@case(errors.AmbiguousTensorError, E7, S1, S2, tensor=E7)
def I11_two_shards_differ(root: Path) -> None:
    shards = good()
    listed = index_of(shards)
    shards[S1][E7] = fill("BF16", (8, 16), 999)
    write(root, shards, index=listed)


@case(errors.StrayShardError, "model-00001-of-00004.safetensors", fatal=False)
def I12_stale_shards(root: Path) -> None:
    write(root, good())
    for i in range(1, 5):
        stale = {f"model.layers.{i}.old.weight": fill("BF16", (4, 4), i)}
        (root / f"model-0000{i}-of-00004.safetensors").write_bytes(blob(*table(stale)))


@case(errors.AmbiguousSourceError, "model.safetensors", INDEX)
def I13_single_and_index(root: Path) -> None:
    write(root, good())
    every = {name: tensor for shard in good().values() for name, tensor in shard.items()}
    every[E7] = fill("BF16", (8, 16), 999)
    (root / "model.safetensors").write_bytes(blob(*table(every)))


def _outside(root: Path) -> Path:
    outside = root.parent / f"{root.name}.outside"
    outside.mkdir()
    (outside / "secret.safetensors").write_bytes(blob(*table({E7: fill("BF16", (8, 16), 999)})))
    return outside / "secret.safetensors"


@index("../I14_dotdot.outside/secret.safetensors", error=errors.UnsafePathError, tensor=E7)
def I14_dotdot(root: Path) -> None:
    secret = _outside(root)
    reindex(root, lambda value: value["weight_map"].update({E7: f"../{secret.parent.name}/{secret.name}"}))


@index("secret.safetensors", error=errors.UnsafePathError, tensor=E7)
def I15_absolute(root: Path) -> None:
    secret = _outside(root)
    reindex(root, lambda value: value["weight_map"].update({E7: str(secret)}))


@index(E7, INDEX, tensor=E7)
def I16_duplicate_json_key(root: Path) -> None:
    text = (root / INDEX).read_text()
    (root / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{\n    "{E7}": "{S1}",'))


@index("total_size", "1", error=errors.IndexMismatchError, fatal=False)
def I17_total_size(root: Path) -> None:
    reindex(root, lambda value: value["metadata"].update(total_size=1))


@index(INDEX)
def I18_deep_json(root: Path) -> None:
    text = (root / INDEX).read_text()
    deep = "[" * 100_000 + "]" * 100_000
    (root / INDEX).write_text(text.replace('"metadata"', f'"deep": {deep},\n  "metadata"'))


@index(INDEX, "UTF-8")
def I19_utf16(root: Path) -> None:
    (root / INDEX).write_bytes((root / INDEX).read_text().encode("utf-16"))


@index(
    "Model-00002-of-00003.safetensors",
    error=errors.MissingShardError,
    file="Model-00002-of-00003.safetensors",
)
def I20_case_differs(root: Path) -> None:
    text = (root / INDEX).read_text()
    (root / INDEX).write_text(text.replace(S2, S2.capitalize()))


@index(INDEX, E7, error=errors.UnsafePathError, tensor=E7)
def I21_nul_in_name(root: Path) -> None:
    reindex(root, lambda value: value["weight_map"].update({E7: "model\0.safetensors"}))


@index("config.json", E7, error=errors.UnsafePathError, tensor=E7)
def I22_not_a_shard(root: Path) -> None:
    reindex(root, lambda value: value["weight_map"].update({E7: "config.json"}))


# Pickles.


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@case(errors.UnsafePickleError, "pytorch_model.bin")
def P01_pickle_only(root: Path) -> None:
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(root / "canary")))


# Ranks: w is [32, 4] F32, rank r holds 8 rows from 8 * r on.


def rank_file(rank: int) -> str:
    return f"shard-{rank + 1:05}-model-00001-of-00001.safetensors"


def write_rank(root: Path, rank: int, start: int, rows: int, info: str | None = None) -> None:
    root.mkdir(parents=True, exist_ok=True)
    place = json.dumps({"w": {"saved_offsets": [start, 0]}}) if info is None else info
    metadata = {"DCP_SHARDING_INFO": place, "DCP_VERSION": "1.0", "format": "pt"}
    (root / rank_file(rank)).write_bytes(blob(*table({"w": fill("F32", (rows, 4), rank + 1)}, metadata)))


def _ranks(root: Path, *left_out: int) -> None:
    for rank in range(4):
        if rank not in left_out:
            write_rank(root, rank, 8 * rank, 8)


@case(errors.CoverageError, "w", "16", "24", tensor="w")
def R01_middle_rank_missing(root: Path) -> None:
    _ranks(root, 2)


# The files do not tell that there was a fourth rank: who opens them must say how large w is.
@case(errors.CoverageError, "w", "24", tensor="w", shapes={"w": (32, 4)})
def R02_last_rank_missing(root: Path) -> None:
    _ranks(root, 3)


@case(errors.CoverageError, "w", "8", "16", tensor="w")
def R03_overlap(root: Path) -> None:
    _ranks(root)
    write_rank(root, 2, 8, 8)


@case(errors.CoverageError, "w", tensor="w")
def R04_two_worlds(root: Path) -> None:
    _ranks(root)
    write_rank(root, 0, 0, 16)
    write_rank(root, 1, 16, 16)


@case(errors.HeaderError, "DCP_SHARDING_INFO", file=rank_file(1))
def R05_offsets_not_json(root: Path) -> None:
    _ranks(root)
    write_rank(root, 1, 8, 8, '{"w": {"saved_offsets": [8, ')


@case(errors.CoverageError, "w", "-8", tensor="w")
def R06_negative_offset(root: Path) -> None:
    _ranks(root)
    write_rank(root, 1, -8, 8)


@case(errors.TruncatedFileError, rank_file(1), file=rank_file(1))
def R07_rank_cut_short(root: Path) -> None:
    _ranks(root)
    (root / rank_file(1)).write_bytes((root / rank_file(1)).read_bytes()[:-40])


# Controls.


@case()
def G00_good(root: Path) -> None:
    write(root, good())


@case()
def G01_single_file(root: Path) -> None:
    write(root, {"model.safetensors": {n: t for shard in good().values() for n, t in shard.items()}})
    (root / INDEX).unlink()


@case()
def G02_cache_links(root: Path) -> Path:
    write(root / "blobs", good())
    (root / "snapshots" / "main").mkdir(parents=True)
    for name in (S1, S2, S3, INDEX, "config.json"):
        (root / "snapshots" / "main" / name).symlink_to(f"../../blobs/{name}")
    return root / "snapshots" / "main"


@case()
def G03_odd_header_length(root: Path) -> None:
    write(root, good())
    retext(root, lambda text: text.rstrip() + b" " * (1 + -len(text.rstrip()) % 2))


@case()
def G04_any_order(root: Path) -> None:
    write(root, good())
    retext(root, lambda text: json.dumps(dict(reversed(json.loads(text).items()))).encode())


@case()
def G05_fused(root: Path) -> None:
    shards = good()
    for shard, layer in ((S1, 0), (S2, 1)):
        at = f"model.layers.{layer}.mlp.experts"
        kept = {name: tensor for name, tensor in shards[shard].items() if not name.startswith(at)}
        pairs = [shards[shard][f"{at}.{e}.{p}_proj.weight"].data for e in range(12) for p in ("gate", "up")]
        down = [shards[shard][f"{at}.{e}.down_proj.weight"].data for e in range(12)]
        kept[f"{at}.gate_up_proj"] = Tensor("BF16", (12, 16, 16), b"".join(pairs))
        kept[f"{at}.down_proj"] = Tensor("BF16", (12, 16, 8), b"".join(down))
        shards[shard] = kept
    write(root, shards)


@case()
def G06_fp8(root: Path) -> None:
    shards = good()
    for shard in (S1, S2):
        for name, tensor in list(shards[shard].items()):
            if ".mlp.experts." in name:
                rows, columns = tensor.shape
                shards[shard][name] = fill("F8_E4M3", tensor.shape, len(name))
                grid = (-(-rows // 8), -(-columns // 8))
                shards[shard][name + "_scale_inv"] = fill("F32", grid, len(name) + 1)
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [8, 8]}
    write(root, shards, config={**CONFIG, "quantization_config": quantized})


@case()
def G07_dcp_shards(root: Path) -> None:
    _ranks(root)
