"""Grouped products with packed matrices on a GPU: one Triton kernel over experts of mixed widths.

A program computes BLOCK_R rows of one expert times BLOCK_O outputs. It reads the words of its codes, a width that it
learns at run time, makes W = (q - zero) * scale in float32, casts it to the dtype of x and multiplies in float32 sums.
Programs of experts with different widths stand beside each other in one launch; plain experts are among them.

Importing this needs `triton`, which comes with torch's CUDA builds. It does not know how rows were sorted.
"""

# R rows sorted by expert, I inputs, O outputs, E experts, G groups of columns, N words of a row, P programs

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.experts import packing

if TYPE_CHECKING:
    from coterie.experts.packed import Stack


@triton.jit  # type: ignore[untyped-decorator]
def _grouped(  # type: ignore[no-untyped-def]
    x, row, y, task, expert, words, scale, zero, plain,
    outputs, inputs, groups, x_row, y_row, y_column,
    GROUP: tl.constexpr, HAS_ROW: tl.constexpr, HAS_ZERO: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # task [P, 3]: expert, first row, rows. expert [E, 3]: width, first word, position among those of its kind.
    number = tl.program_id(0)
    e = tl.load(task + 3 * number)
    first = tl.load(task + 3 * number + 1)
    rows = tl.load(task + 3 * number + 2)
    bits = tl.load(expert + 3 * e).to(tl.int32)
    start = tl.load(expert + 3 * e + 1)
    rank = tl.load(expert + 3 * e + 2)

    r = tl.arange(0, BLOCK_R)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I)
    has_r, has_o = r < rows, o < outputs
    source = first + r
    if HAS_ROW:
        source = tl.load(row + source, mask=has_r, other=0)
    matrix_row = rank * outputs + o  # int64: [E, O] rows of long matrices pass 2^31 elements
    row_words = (inputs * bits + 31) // 32
    sum_RO = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    for begin in range(0, inputs, BLOCK_I):
        column = begin + i
        has_i = column < inputs
        x_RI = tl.load(x + source[:, None] * x_row + column[None, :], mask=has_r[:, None] & has_i[None, :], other=0.0)
        there = has_o[:, None] & has_i[None, :]
        if bits == 16:
            w_OI = tl.load(plain + matrix_row[:, None] * inputs + column[None, :], mask=there, other=0.0).to(tl.float32)
        else:
            bit = column * bits
            shift = bit & 31
            at = words + start + o[:, None].to(tl.int64) * row_words + (bit >> 5)[None, :]
            low = tl.load(at, mask=there, other=0).to(tl.uint32, bitcast=True)
            crosses = (shift + bits > 32)[None, :]
            high = tl.load(at + 1, mask=there & crosses, other=0).to(tl.uint32, bitcast=True)
            upper = high << ((32 - shift) & 31).to(tl.uint32)[None, :]
            code = ((low >> shift.to(tl.uint32)[None, :]) | tl.where(crosses, upper, 0)) & ((1 << bits) - 1)
            if GROUP % BLOCK_I == 0:  # all columns of the block share their scales
                grid = matrix_row * groups + begin // GROUP
                scale_OI = tl.load(scale + grid, mask=has_o, other=0.0).to(tl.float32)[:, None]
                if HAS_ZERO:
                    zero_OI = tl.load(zero + grid, mask=has_o, other=0.0).to(tl.float32)[:, None]
            else:
                grids = matrix_row[:, None] * groups + (column // GROUP)[None, :]
                scale_OI = tl.load(scale + grids, mask=there, other=0.0).to(tl.float32)
                if HAS_ZERO:
                    zero_OI = tl.load(zero + grids, mask=there, other=0.0).to(tl.float32)
            number_OI = code.to(tl.int32).to(tl.float32)
            if HAS_ZERO:
                w_OI = (number_OI - zero_OI) * scale_OI
            else:
                middle = tl.where(bits == 1, 0.5, (1 << (bits - 1)).to(tl.float32))
                w_OI = (number_OI - middle) * scale_OI
            w_OI = tl.where(there, w_OI, 0.0)
        w_OI = w_OI.to(x_RI.dtype)
        if WIDEN:
            x_RI, w_OI = x_RI.to(tl.float32), w_OI.to(tl.float32)
        sum_RO = tl.dot(x_RI, tl.trans(w_OI), sum_RO, input_precision="ieee")
    to = y + (first + r)[:, None] * y_row + o[None, :] * y_column
    tl.store(to, sum_RO, mask=has_r[:, None] & has_o[None, :])


def usable(stack: Stack, x_RI: Tensor) -> bool:
    """Whether the kernel can multiply these."""
    return x_RI.dtype in (torch.float32, torch.float16, torch.bfloat16)


def grouped(stack: Stack, x_RI: Tensor, counts: list[int], row_R: Tensor | None, y_RO: Tensor) -> None:
    """Write into y_RO, float32 with any strides, what rows of x make with the matrices of their experts.

    counts : rows of each expert, in order. row_R : where each of them lies in x_RI, int64; None for in order.
    """
    if not sum(counts):
        return
    O, I = stack.shape  # noqa: E741
    x_RI = x_RI if x_RI.stride(-1) == 1 else x_RI.contiguous()
    sizes = blocks(max(counts), I)
    task_P3 = torch.tensor(tasks(counts, sizes["BLOCK_R"]), dtype=torch.int64).to(x_RI.device)
    zero = stack.zero_QOG
    launch: Any = _grouped[(len(task_P3), triton.cdiv(O, sizes["BLOCK_O"]))]
    with torch.cuda.device_of(x_RI):  # type: ignore[no-untyped-call]  # nothing for tensors on a CPU, which the interpreter takes
        launch(
        x_RI, task_P3 if row_R is None else row_R, y_RO, task_P3, _experts(stack.bits, stack.shape, x_RI.device),
        stack.words, stack.scale_QOG, stack.scale_QOG if zero is None else zero, stack.plain,
        O, I, packing.groups(I, stack.group), x_RI.stride(0), y_RO.stride(0), y_RO.stride(1),
        GROUP=min(stack.group, triton.next_power_of_2(I)), HAS_ROW=row_R is not None, HAS_ZERO=zero is not None,
        WIDEN=x_RI.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,  # numpy has no bfloat16 to multiply
        **sizes,
    )  # fmt: skip


def blocks(rows: int, inputs: int) -> dict[str, int]:
    """Tile of one program: 16 rows is the least that matrix units take."""
    BLOCK_R = min(64, max(16, triton.next_power_of_2(rows)))
    return {"BLOCK_R": BLOCK_R, "BLOCK_O": 64, "BLOCK_I": min(64, max(16, triton.next_power_of_2(inputs)))}


def tasks(counts: list[int], most: int) -> list[tuple[int, int, int]]:
    """(expert, first row, rows) of each turn of at most `most` rows."""
    found, start = [], 0
    for e, count in enumerate(counts):
        found += [(e, start + k, min(most, count - k)) for k in range(0, count, most)]
        start += count
    return found


@functools.lru_cache(maxsize=4096)
def _experts(bits: tuple[int, ...], shape: tuple[int, int], device: torch.device) -> Tensor:
    """[E, 3]: width, first word, position among those of its kind."""
    starts, ranks = packing.layout(bits, shape)
    return torch.tensor(list(zip(bits, starts, ranks)), dtype=torch.int64).to(device)
