"""Headers: the rules of the format one by one, and safetensors itself as a second opinion."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import restow
from corpus_bytes import WIDTH, blob, fill, table
from restow import errors
from restow.errors import RestowError
from restow.files import IOV_MAX, open_source
from restow.header import Header, parse_header, read_header
from restow.jsontext import JsonFault, parse, too_deep
from restow.limits import Limits

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

T = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SIX_BITS = {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}


def judge(raw: bytes, size: int | None = None, limits: Limits | None = None) -> Header:
    """The header's text `raw`, in a file that is as long as one F32 pair needs."""
    return parse_header(raw, 16 + len(raw) if size is None else size, "/x/a", "a", (), limits or Limits())


def text(**tensors: Any) -> bytes:
    return json.dumps(tensors).encode()


def test_columns() -> None:
    shard = {"b": fill("F32", (2, 3), 1), "a": fill("BF16", (), 2), "e": fill("I64", (0, 5), 3)}
    raw = blob(*table(shard, {"k": "v"}))
    length = struct.unpack("<Q", raw[:8])[0]
    header = judge(raw[8 : 8 + length], len(raw))
    assert header.names == ("b", "a", "e")
    assert header.dtypes == ("F32", "BF16", "I64")
    assert header.shapes == ((2, 3), (), (0, 5))
    assert list(header.begins) == [8 + length, 32 + length, 34 + length]
    assert list(header.ends) == [32 + length, 34 + length, 34 + length]
    assert (dict(header.metadata), header.length, header.data_bytes) == ({"k": "v"}, length, 26)


@pytest.mark.parametrize(
    ("raw", "error", "words"),
    [
        (text(a={**T, "shape": [True, 2]}), errors.HeaderError, "true"),
        (text(b=T, a={**T, "shape": [2, True], "data_offsets": [0, 8]}), errors.HeaderError, "true"),
        (text(a={**T, "data_offsets": [False, 8]}), errors.HeaderError, "false"),
        (text(a={**T, "shape": "2"}), errors.HeaderError, "the text '2'"),
        (text(a={**T, "shape": [[2]]}), errors.HeaderError, "a list"),
        (text(a={**T, "dtype": ["F32"]}), errors.HeaderError, "a list"),
        (text(a={**T, "data_offsets": [0, 8, 8]}), errors.HeaderError, "a list of 3"),
        (text(a={**T, "data_offsets": {"0": 0, "8": 8}}), errors.HeaderError, "an object"),
        (text(a={**T, "data_offsets": [0, 10**40]}), errors.LayoutError, "1000000"),
        (text(a={"dtype": "F32", "shape": [2]}), errors.HeaderError, "no data_offsets"),
        (text(a=5), errors.HeaderError, "the number 5"),
        (text(a=None), errors.HeaderError, "null"),
        (text(a={**T, "dtype": "F4", "shape": [17]}), errors.HeaderError, "whole bytes"),
        (text(a={**T, "shape": [1] * 17}), errors.HeaderError, "17 dims"),
        (text(a={**T, "shape": [2**40, 2**40, 0]}), errors.HeaderError, "2\\*\\*63"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', errors.HeaderError, "-0"),
        (text(a=T).replace(b'"dtype"', b'"shape":[],"dtype"'), errors.HeaderError, "shape twice"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}', errors.HeaderError, "NaN"),
        (text(a=T).replace(b"8", b"9" * 5000), errors.HeaderError, "digits"),
        (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', errors.HeaderError, "ud800"),
        (text(a=T, b={**T, "data_offsets": [16, 24]}), errors.LayoutError, "8 bytes before this"),
        (text(a={**T, "data_offsets": [4, 12]}), errors.LayoutError, "4 bytes before this"),
        (text(a={**T, "shape": [0], "data_offsets": [4, 4]}, b=T), errors.LayoutError, "share no byte"),
        (b"{}", errors.LayoutError, "8 bytes after it"),
        (text(**{"n" * 4097: T}), errors.HeaderError, "4097 bytes"),
        (text(__metadata__=[], a=T), errors.HeaderError, "__metadata__"),
    ],
)  # fmt: skip
def test_refused(raw: bytes, error: type[RestowError], words: str) -> None:
    with pytest.raises(error) as caught:
        judge(raw)
    assert re.search(words, str(caught.value)), str(caught.value)
    assert caught.value.path == "/x/a"


@pytest.mark.parametrize("raw", [b'{"model_type": "x"}', b" [1, 2, 3, 4, 5]", b'{\n  "weight_map": {'])
def test_json_text_is_told_by_its_name(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(errors.NotSafetensorsError) as caught:
        restow.open(tmp_path / "config.json")
    assert str(caught.value) == (
        "expected a safetensors file, found JSON text\n"
        f"  in        {tmp_path}/config.json\n"
        "  try       open the folder, or the file that ends in .safetensors"
    )


@pytest.mark.parametrize("length", [0x5B, 0x7B])
def test_a_small_length_word_is_no_json(length: int, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(length.to_bytes(8, "little") + b'{"a":')
    with pytest.raises(errors.TruncatedFileError, match=f"a header of {length} bytes"):
        restow.open(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "raw",
    [
        text(a=T),
        text(__metadata__=None, a=T),
        text(a={**T, "dtype": "F4", "shape": [16]}),
        text(a=SIX_BITS, b={"dtype": "U8", "shape": [5], "data_offsets": [3, 8]}),
        text(z={**T, "shape": [0], "data_offsets": [8, 8]}, a=T),
        text(true_=T),
        text(**{"bert/encoder/kernel:0": T}),
        text(x=T).replace(b"x", "\u00e9".encode(), 1),
    ],
)  # fmt: skip
def test_accepted(raw: bytes) -> None:
    assert not judge(raw).problems


def test_limits_can_be_raised_and_lowered() -> None:
    raw = text(a=T, b={**T, "shape": [0], "data_offsets": [8, 8]})
    with pytest.raises(errors.HeaderError, match="at most 1 tensors"):
        judge(raw, limits=Limits(tensors=1))
    (problem,) = judge(raw, limits=Limits(empty=0)).problems
    assert problem.error.tensor == "b" and not problem.fatal
    judge(text(**{"n" * 5000: T}), limits=Limits(name=5000))


def test_many_faults_are_listed_and_counted() -> None:
    tensors = {f"t{i}": {**T, "dtype": "F17"} for i in range(25)} | {"s": {**T, "shape": [-1]}}
    with pytest.raises(errors.HeaderError) as caught:
        judge(text(**tensors))
    lines = [f"            t{i}: F17" for i in range(1, 20)]
    assert str(caught.value).splitlines() == [
        "expected a dtype of the safetensors format, found F17",
        "  tensors   t0: F17",
        *lines,
        "            ... 5 more",
        "  also      HeaderError: expected a shape of non-negative integers with a product below 2**63 bits, "
        "in whole bytes, found [-1]: -1 is negative (s, /x/a)",
        "  in        /x/a",
        "  try       fetch the file again; if it comes the same, it was written wrong",
    ]


@given(st.text('[]{}"\\a', max_size=40), st.integers(0, 6))
@settings(max_examples=300, deadline=None)
def test_depth_is_that_of_the_parsed_value(text: str, limit: int) -> None:
    def depth(value: Any) -> int:
        if isinstance(value, dict):
            return 1 + max(map(depth, value.values()), default=0)
        return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0

    for raw in (text, json.dumps([text, [text]]), json.dumps({text: [[text], {}]})):
        try:
            value = json.loads(raw)
        except ValueError:
            continue
        assert too_deep(raw.encode(), limit) == (depth(value) > limit)


@pytest.mark.parametrize("levels", [3, 8, 9, 10, 64, 65, 66])
def test_depth_at_the_limit(levels: int) -> None:
    raw = b'[{"a":' * (levels // 2) + b"[" * (levels % 2) + b"]" * (levels % 2) + b"}]" * (levels // 2)
    if levels % 2 == 0:
        raw = raw.replace(b":}", b":0}")
    assert too_deep(raw, levels - 1)
    assert not too_deep(raw, levels)
    assert too_deep(raw, 64) == (levels > 64)


def test_a_deep_bomb_is_linear() -> None:
    assert too_deep(b"[" * 5_000_000, 64)
    assert not too_deep(b"[[]]" * 500_000, 64)
    with pytest.raises(JsonFault, match="depth"):
        parse(b"[" * 5_000_000, 64)


# Files.


def test_preadv_fills_more_buffers_than_one_call_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(i * 7 % 251 for i in range(3 * IOV_MAX * 2))
    (tmp_path / "a").write_bytes(data)
    calls = []
    real = os.preadv

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(len(buffers))
        return real(
            fd, [buffers[0][: max(1, len(buffers[0]) // 2)]] if len(calls) % 3 == 0 else buffers, offset
        )

    monkeypatch.setattr("restow.files.os.preadv", short)
    buffers = [bytearray(i % 4) for i in range(3 * IOV_MAX)]
    with open_source(tmp_path / "a") as source:
        assert source.preadv(5, buffers) == sum(map(len, buffers))
        assert b"".join(buffers) == data[5 : 5 + sum(map(len, buffers))]
        assert max(calls) <= IOV_MAX and len(calls) > 2
        with pytest.raises(errors.TruncatedFileError, match="3: 7 bytes are missing") as caught:
            source.preadv(len(data) - 3, [bytearray(4), bytearray(6)])
        assert caught.value.path == str(tmp_path / "a")
        with pytest.raises(errors.TruncatedFileError, match="4 bytes are missing"):
            source.pread(len(data) - 1, 5)
        assert source.pread(1, 3) == data[1:4]


def test_a_file_that_changes_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345678")
    with open_source(tmp_path / "a") as source:
        assert not source.changed()
        os.truncate(tmp_path / "a", 4)
        assert source.changed()
        with pytest.raises(errors.TruncatedFileError, match="the file became shorter"):
            source.pread(0, 8)
    source.close()
    assert source.fd == -1


def test_imports_are_light() -> None:
    code = (
        "import sys, restow.folder; print([m for m in ('torch', 'numpy', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# The second opinion.

NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=6)
STRICTER = (  # what we refuse and safetensors accepts, by the words of our error
    "twice in one object",  # names
    "begins with {",  # a leading space
    "without control characters",  # hostile names
    "more than 16 dims",
    "__metadata__",  # a list or an object that serde also takes for it
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """A valid file of a few small tensors, from safetensors' own writer."""
    tensors = {}
    for i, name in enumerate(
        draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), unique=True, max_size=5))
    ):
        dtype = draw(st.sampled_from(sorted(WIDTH)))
        shape = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
        tensors[name] = fill(dtype, shape, i)
    names = {
        "F64": "float64",
        "F32": "float32",
        "BF16": "bfloat16",
        "F16": "float16",
        "F8_E4M3": "float8_e4m3fn",
        "BOOL": "bool",
        "I64": "int64",
        "I8": "int8",
    }
    real = {
        name: torch.tensor(list(t.data), dtype=torch.uint8)
        .view(getattr(torch, names[t.dtype]))
        .reshape(t.shape)
        for name, t in tensors.items()
    }
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    # safetensors 0.8 writes no JSON for no tensors and empty metadata, and does not read it either.
    written: bytes = safetensors_torch.save(real, metadata if real else None)
    return written


@st.composite
def mutants(draw: st.DrawFn) -> bytes:
    """A valid file with a few bytes of it changed, put in or taken out, mostly where they mean something."""
    raw = bytearray(draw(files()))
    length = struct.unpack("<Q", raw[:8])[0]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(
            st.integers(0, 8 + length - 1) | st.integers(8, 8 + length - 1) | st.integers(0, len(raw) - 1)
        )
        at = min(at, len(raw) - 1)
        new = draw(
            st.sampled_from(
                [b"0", b"1", b"8", b"-", b".", b"[", b"]", b'"', b",", b" ", b"\\", b"\xff", b"e"]
            )
        )
        how = draw(st.sampled_from(["put", "set", "cut"]))
        raw[at : at + (how != "put")] = b"" if how == "cut" else new
        if draw(st.booleans()) and at >= 8 and at < 8 + length and how != "set":
            length += (
                1 if how == "put" else -1
            )  # keep the length word true, so that what follows is looked at
            raw[:8] = struct.pack("<Q", max(length, 0))
    return bytes(raw)


def theirs(raw: bytes) -> dict[str, tuple[str, list[int]]] | None:
    try:
        return {name: (info["dtype"], list(info["shape"])) for name, info in safetensors.deserialize(raw)}
    except safetensors.SafetensorError:
        return None


def ours(raw: bytes, folder: Path) -> Header | RestowError:
    (folder / "a.safetensors").write_bytes(raw)
    try:
        with open_source(folder / "a.safetensors") as source:
            return read_header(source)
    except RestowError as error:
        return error


def agree(raw: bytes, folder: Path) -> bool:
    """Whether both accept or both refuse, but for the rules in which we are stricter."""
    mine, other = ours(raw, folder), theirs(raw)
    if isinstance(mine, RestowError):
        return other is None or any(words in str(mine) for words in STRICTER)
    if other is None:
        return False
    return {n: (d, list(s)) for n, d, s in zip(mine.names, mine.dtypes, mine.shapes, strict=True)} == other


BOUNDED = settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(raw=files())
@settings(BOUNDED, max_examples=100)
def test_what_safetensors_writes_we_read(raw: bytes, tmp_path: Path) -> None:
    header = ours(raw, tmp_path)
    assert isinstance(header, Header), str(header)
    data = {name: bytes(info["data"]) for name, info in safetensors.deserialize(raw)}
    assert set(data) == set(header.names)
    for name, begin, end in zip(header.names, header.begins, header.ends, strict=True):
        assert raw[begin:end] == data[name]


@given(raw=mutants())
@BOUNDED
def test_mutants_fare_alike(raw: bytes, tmp_path: Path) -> None:
    assert agree(raw, tmp_path), (raw, str(ours(raw, tmp_path)), theirs(raw))


def test_the_second_opinion_can_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = blob(*table({"a": fill("F32", (2,), 1)}))
    assert agree(raw, tmp_path)
    monkeypatch.setattr("restow.header.faults.of_places", lambda *_: [])
    assert not agree(raw + b"tail", tmp_path), "a reader without the check of places must be caught"
    monkeypatch.undo()
    monkeypatch.setitem(__import__("restow.entries").entries.DTYPE_BITS, "F32", 64)
    assert not agree(raw, tmp_path)


@given(raw=files(), spaces=st.integers(1, 9))
@settings(BOUNDED, max_examples=30)
def test_padding_is_free(raw: bytes, spaces: int, tmp_path: Path) -> None:
    length = struct.unpack("<Q", raw[:8])[0]
    assume(length)
    padded = struct.pack("<Q", length + spaces) + raw[8 : 8 + length] + b" " * spaces + raw[8 + length :]
    assert isinstance(ours(padded, tmp_path), Header)
    assert agree(padded, tmp_path)
