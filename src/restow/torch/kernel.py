"""The one Triton kernel: matrices named by a table, each moved to another address with its dims exchanged.

Importing this needs triton, so only `across` does it, and only where there is something to launch on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exchange(  # type: ignore[no-untyped-def]  # the compiler reads annotations, and knows only its own
    table, WIDTH: tl.constexpr, EVEN: tl.constexpr, SIDE: tl.constexpr
):
    """Program (b, n): block b of row n of the table (from, to, rows, cols, step, far).

    Addresses are in bytes, steps in elements: row r of the source begins at r * step, column c of the destination at
    c * far. `EVEN` bytes divide every address and every length of a line, so that words of that many can be moved.
    """
    row = table + tl.program_id(1) * 6
    begin = tl.load(row)
    to = tl.load(row + 1)
    rows = tl.load(row + 2)
    cols = tl.load(row + 3)
    step = tl.load(row + 4)
    far = tl.load(row + 5)
    if EVEN > WIDTH:
        begin = tl.multiple_of(begin, EVEN)
        to = tl.multiple_of(to, EVEN)
        rows = tl.multiple_of(rows, EVEN // WIDTH)
        cols = tl.multiple_of(cols, EVEN // WIDTH)
        step = tl.multiple_of(step, EVEN // WIDTH)
        far = tl.multiple_of(far, EVEN // WIDTH)
    word: tl.constexpr = (
        tl.int8 if WIDTH == 1 else (tl.int16 if WIDTH == 2 else (tl.int32 if WIDTH == 4 else tl.int64))
    )
    wide = tl.cdiv(cols, SIDE)
    first = tl.program_id(0) // wide * SIDE
    if first < rows:
        r = first + tl.arange(0, SIDE)
        c = tl.program_id(0) % wide * SIDE + tl.arange(0, SIDE)
        inside = (r < rows)[:, None] & (c < cols)[None, :]
        source = begin.to(tl.pointer_type(word)) + r[:, None] * step + c[None, :]
        target = to.to(tl.pointer_type(word)) + c[:, None] * far + r[None, :]
        block = tl.load(source, mask=inside)
        tl.store(target, tl.trans(block), mask=tl.trans(inside))
