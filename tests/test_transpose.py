"""copy_transposed moves every bit to its place and nothing else, whichever kernel carries it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from restow.torch import transpose
from restow.torch.transpose import copy_transposed, is_exact, kernel_for, tile_shape, turn

DTYPES = (
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float16,
    torch.int16,
    torch.float32,
    torch.int32,
    torch.int64,
    torch.float64,
)
INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
KERNELS = (None, "simd", "shuffle", "plain")
SENTINEL = 0x5A
sides = st.one_of(st.integers(1, 70), st.sampled_from([1, 2, 3, 127, 128, 129, 257, 521]))


def noise(dtype: torch.dtype, shape: tuple[int, ...], offset: int, seed: int) -> torch.Tensor:
    """Random bits of `dtype`, `offset` elements into their storage."""
    count = offset + int(np.prod(shape))
    bits = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    if dtype == torch.bool:
        bits &= 1
    if not bits.size:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(bits).view(dtype)[offset:].view(shape)


@settings(max_examples=300, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=sides,
    cols=sides,
    pad=st.integers(0, 9),
    offsets=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    kernel=st.sampled_from(KERNELS),
    seed=st.integers(0, 2**32 - 1),
)
@example(torch.bfloat16, 40, 1030, 2048 - 40, (1, 3), "simd", 0)  # the aliasing stride: through a temporary
@example(torch.uint8, 300, 1031, 2048 - 300, (3, 1), "simd", 0)
@example(torch.float32, 33, 65, 512 - 33, (1, 0), "simd", 0)
@example(torch.bfloat16, 300, 1801, 4, (1, 1), "shuffle", 0)  # several blocks, odd columns, odd offset
@example(torch.float8_e4m3fn, 257, 3001, 4, (1, 1), "shuffle", 0)
@example(torch.float32, 300, 1001, 4, (1, 1), "shuffle", 0)
@example(torch.bfloat16, 2048, 130, 0, (0, 0), None, 0)
def test_exact(dtype, rows, cols, pad, offsets, kernel, seed):
    src = noise(dtype, (rows, cols), offsets[0], seed)
    before = src.clone()
    raw = INTS[dtype.itemsize]
    ld = rows + pad
    back = torch.full(((offsets[1] + cols * ld + 7) * dtype.itemsize,), SENTINEL, dtype=torch.uint8)
    wanted = back.clone()

    def view(store: torch.Tensor) -> torch.Tensor:
        return store.view(dtype).as_strided((rows, cols), (1, ld), offsets[1])

    copy_transposed(view(back), src, kernel=kernel)
    view(wanted).view(raw).copy_(src.view(raw))
    assert torch.equal(back, wanted)  # the whole storage: the memory around the view too
    assert torch.equal(src.view(raw), before.view(raw))
    assert np.array_equal(view(back).t().view(raw).numpy(), src.view(raw).numpy().T)


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    n=st.integers(0, 4),
    rows=sides,
    cols=sides,
    kernel=st.sampled_from(KERNELS),
)
def test_batch(dtype, n, rows, cols, kernel):
    src = noise(dtype, (n, rows, cols), 0, 1)
    back = noise(dtype, (n, cols, 2 * rows + 1), 0, 2)
    wanted = back.clone()
    raw = INTS[dtype.itemsize]
    copy_transposed(back[:, :, rows : 2 * rows].transpose(1, 2), src, kernel=kernel)
    wanted[:, :, rows : 2 * rows].view(raw).copy_(src.view(raw).transpose(1, 2))
    assert torch.equal(back.view(raw), wanted.view(raw))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern(dtype, kernel):
    """NaN payloads, signalling NaNs, signed zeros and subnormals."""
    src = torch.from_numpy(np.arange(1 << 16, dtype=np.uint16).view(np.int16)).view(dtype).view(128, 512)
    out = torch.zeros(512, 200, dtype=dtype)
    copy_transposed(out[:, 30:158].t(), src, kernel=kernel)
    assert np.array_equal(out.view(torch.int16).numpy()[:, 30:158], src.view(torch.int16).numpy().T)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("high", [0x7F80, 0xFF80, 0x7FC0, 0x0000, 0x8000])
def test_float32_specials(high, kernel):
    bits = (np.uint32(high) << 16 | np.arange(1 << 14, dtype=np.uint32)).view(np.int32)
    src = torch.from_numpy(bits).view(torch.float32).view(64, 256)
    out = torch.zeros(256, 99)
    copy_transposed(out[:, 1:65].t(), src, kernel=kernel)
    assert np.array_equal(out.view(torch.int32).numpy()[:, 1:65], bits.reshape(64, 256).T)


def test_other_strides():
    """Rows contiguous, rows apart, every third column, every fourth row of a transposed target."""
    src = noise(torch.bfloat16, (12, 10), 0, 3)
    for make in (
        lambda: torch.zeros(12, 10),
        lambda: torch.zeros(24, 10)[::2],
        lambda: torch.zeros(12, 33)[:, :30:3],
        lambda: torch.zeros(10, 50)[:, :48:4].t(),
    ):
        dst = make()
        store = torch.zeros(dst.untyped_storage().nbytes() // 4, dtype=torch.bfloat16)
        into = store.as_strided(dst.shape, dst.stride(), dst.storage_offset())
        copy_transposed(into, src)
        assert np.array_equal(into.view(torch.int16).numpy(), src.view(torch.int16).numpy())


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    rows=sides,
    cols=sides,
    apart=st.integers(0, 9),
    pad=st.sampled_from([0, 1, 2048 - 30]),
    kernel=st.sampled_from(KERNELS),
)
@example(torch.bfloat16, 65, 1200, 8, 2048 - 65, "simd")  # the aliasing stride, beyond the temporary
@example(torch.bfloat16, 800, 1500, 3, 5, "simd")  # more than a cache holds
def test_rows_apart(dtype, rows, cols, apart, pad, kernel):
    """A source that is part of every row of something wider: half of what holds gate and up."""
    src = noise(dtype, (rows, cols + apart), 0, 5)[:, apart // 2 : apart // 2 + cols]
    back = noise(dtype, (cols, rows + pad), 0, 6)
    raw = INTS[dtype.itemsize]
    wanted = back.view(raw).numpy().copy()
    wanted[:, :rows] = src.view(raw).numpy().T
    copy_transposed(back[:, :rows].t(), src, kernel=kernel)
    assert np.array_equal(back.view(raw).numpy(), wanted)
    other = np.zeros_like(wanted)
    turn(other[:, :rows], src.view(raw).numpy())
    assert np.array_equal(other[:, :rows], wanted[:, :rows])


def test_parameters_and_empty():
    into = torch.nn.Parameter(torch.zeros(8, 6))
    src = noise(torch.float32, (6, 8), 0, 4)
    copy_transposed(into.t(), src)
    assert torch.equal(into.detach().t().contiguous().view(torch.int32), src.view(torch.int32))
    for shape in ((0, 4), (4, 0), (0, 0)):
        copy_transposed(torch.zeros(shape[::-1]).t(), torch.zeros(shape))


def test_random_state_is_left_alone():
    kernel_for.cache_clear()
    state = torch.random.get_rng_state()
    kernel_for(2)
    assert torch.equal(state, torch.random.get_rng_state())


def test_rejects():
    good = torch.zeros(4, 3)
    for dst, src in (
        (good, torch.zeros(3, 4)),
        (good, torch.zeros(4, 3, dtype=torch.int32)),
        (good[0], good[0]),
        (torch.zeros(4, 3), torch.zeros(3, 4).t()),
        (torch.zeros(4, 3, dtype=torch.complex128), torch.zeros(4, 3, dtype=torch.complex128)),
        (torch.zeros(4, 3, device="meta"), good),
    ):
        with pytest.raises(ValueError, match="expected"):
            copy_transposed(dst, src)


def shifted(out, src):
    transpose.plain(out, src)
    out[-1, -1] ^= 1


def spills(out, src):
    transpose.plain(out, src)
    np.lib.stride_tricks.as_strided(out, (out.shape[0], out.shape[1] + 1))[0, -1] ^= 1


def only_square(out, src):
    transpose.plain(out[: src.shape[0] // 16 * 16], src[:, : src.shape[0] // 16 * 16])


def raises(out, src):
    raise RuntimeError("no such operator")


@pytest.mark.parametrize("wrong", [shifted, spills, only_square, raises])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_self_test_rejects_a_wrong_kernel(wrong, width, monkeypatch):
    assert not is_exact(wrong, width)
    assert is_exact(transpose.plain, width)
    monkeypatch.setattr(transpose, "_simd", lambda _: wrong)
    monkeypatch.setattr(transpose, "shuffle", wrong)
    monkeypatch.setattr(transpose, "_seconds", lambda kernel, _: float(kernel is transpose.plain))
    kernel_for.cache_clear()
    try:
        assert kernel_for(width) is transpose.plain
    finally:
        kernel_for.cache_clear()


def test_the_probe_takes_the_first_exact_and_faster_kernel(monkeypatch):
    monkeypatch.setattr(transpose, "_simd", lambda _: None)
    seconds = {transpose.shuffle: 1.0, transpose.plain: 2.0}
    monkeypatch.setattr(transpose, "_seconds", lambda kernel, _: seconds[kernel])
    kernel_for.cache_clear()
    assert kernel_for(2) is transpose.shuffle
    seconds[transpose.shuffle] = 3.0
    kernel_for.cache_clear()
    assert kernel_for(2) is transpose.plain
    kernel_for.cache_clear()


def test_big_endian_falls_back(monkeypatch):
    monkeypatch.setattr(transpose.sys, "byteorder", "big")
    kernel_for.cache_clear()
    assert [kernel_for(w) for w in (1, 2, 4, 8)] == [transpose.plain] * 4
    kernel_for.cache_clear()


def test_no_symbol(monkeypatch):
    for cached in (transpose._entry, transpose._simd, kernel_for):
        cached.cache_clear()
    monkeypatch.setattr(transpose.ctypes, "CDLL", lambda _: object())
    assert transpose._simd(2) is None
    assert transpose.entry_for(2) is None
    for cached in (transpose._entry, transpose._simd, kernel_for):
        cached.cache_clear()


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 1 << 17), st.integers(1, 1 << 21))
def test_tile_shape(itemsize, rows, cols):
    tall, wide = tile_shape(itemsize, rows, cols)
    assert 1 <= tall <= rows
    assert 1 <= wide <= cols
    assert tall * wide * itemsize <= transpose.TILE_BYTES
    if wide < cols:  # rows are cut only where a line's worth of them does not fit
        assert itemsize * cols * min(rows, transpose.LINE // itemsize) > transpose.TILE_BYTES
    elif tall < rows:
        assert tall * itemsize % transpose.LINE == 0


def test_tile_shapes_of_known_models():
    assert tile_shape(2, 768, 2048) == (256, 2048)
    assert tile_shape(2, 2048, 768) == (512, 768)
    assert tile_shape(2, 2048, 7168) == (64, 7168)
    assert tile_shape(4, 2048, 7168) == (32, 7168)
    assert tile_shape(1, 2048, 7168) == (128, 7168)
    assert tile_shape(2, 5, 7) == (5, 7)
