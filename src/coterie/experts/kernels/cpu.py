"""Grouped products with packed matrices on a CPU: the C kernel of this package, called with what torch holds.

The kernel is compiled at the first product, which takes some seconds once per machine. Where that cannot be done, this
is said once, and torch's own operations take over: the same numbers, but slower. Threads are torch's.
"""

# R rows sorted by expert, I inputs, O outputs, E experts

from __future__ import annotations

import ctypes
import functools
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from coterie.experts import packing
from coterie.experts.kernels.build import BuildError, library

if TYPE_CHECKING:
    from coterie.experts.packed import Stack

KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class _Job(ctypes.Structure):
    """`Job` of grouped.c."""

    _fields_ = [
        *((name, ctypes.c_void_p if name in ("x", "row", "y") else ctypes.c_int64)
          for name in ("x", "x_kind", "x_stride", "row", "y", "y_row", "y_column", "experts")),
        *((name, ctypes.c_void_p) for name in ("count", "bits", "start", "rank")),
        *((name, ctypes.c_int64) for name in ("outputs", "inputs", "group")),
        ("words", ctypes.c_void_p),
        ("total_words", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("scale_kind", ctypes.c_int64),
        ("plain", ctypes.c_void_p),
        ("plain_kind", ctypes.c_int64),
        ("threads", ctypes.c_int64),
    ]  # fmt: skip


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None, which is said once."""
    try:
        return library()
    except BuildError as error:
        warnings.warn(
            f"The kernel for packed weights cannot be compiled, so they are unpacked and multiplied by torch, which is "
            f"several times slower: {error}. Install a C compiler (Debian: apt-get install gcc) or name one in CC.",
            stacklevel=2,
        )
        return None


def usable(stack: Stack, x_RI: Tensor) -> bool:
    """Whether the kernel can multiply these; everything else is torch's."""
    kinds = (x_RI.dtype, stack.scale_QOG.dtype, stack.plain.dtype)
    return x_RI.device.type == "cpu" and all(kind in KINDS for kind in kinds) and kernel() is not None


class _Layout(NamedTuple):
    """Where each expert lies in a stack, as C reads it."""

    bits: ctypes.Array[ctypes.c_int64]
    start: ctypes.Array[ctypes.c_int64]
    rank: ctypes.Array[ctypes.c_int64]
    words: int
    quantized: int


@functools.lru_cache(maxsize=4096)
def _layout(bits: tuple[int, ...], shape: tuple[int, int]) -> _Layout:
    starts, ranks = packing.layout(bits, shape)
    Numbers = ctypes.c_int64 * len(bits)
    return _Layout(Numbers(*bits), Numbers(*starts[:-1]), Numbers(*ranks), starts[-1], sum(b <= 8 for b in bits))


def grouped(stack: Stack, x_RI: Tensor, counts: list[int], row_R: Tensor | None, y_RO: Tensor) -> None:
    """Write into y_RO, float32 with any strides, what rows of x make with the matrices of their experts.

    counts : rows of each expert, in order. row_R : where each of them lies in x_RI, int64; None for in order.
    Peak memory beside the results: the routed rows in float32, and 160 KB a thread.
    """
    lib = kernel()
    assert lib is not None
    if x_RI.stride(-1) != 1:
        x_RI = x_RI.contiguous()
    O, I = stack.shape  # noqa: E741
    layout, zero = _layout(stack.bits, stack.shape), stack.zero_QOG
    total, per_group = sum(counts), (layout.quantized, O, packing.groups(I, stack.group))
    fitting = (  # C reads and writes as far as it is told to
        stack.words.numel() == layout.words,
        stack.scale_QOG.shape == per_group,
        zero is None or (zero.shape == per_group and zero.dtype == stack.scale_QOG.dtype),
        stack.plain.shape[0] == len(stack.bits) - layout.quantized,
        len(counts) == len(stack.bits) and min(counts, default=0) >= 0,
        x_RI.shape[1] == I and total == (x_RI.shape[0] if row_R is None else row_R.numel()),
        row_R is None or (row_R.dtype == torch.int64 and row_R.is_contiguous()),
        y_RO.shape == (total, O) and y_RO.dtype == torch.float32,
    )
    if not all(fitting):
        raise ValueError(f"tensors do not fit a product of {total} rows with {len(stack.bits)} matrices {O} x {I}")
    held = [stack.words.contiguous(), stack.scale_QOG.contiguous(), stack.plain.contiguous()]
    held.append(held[1] if zero is None else zero.contiguous())
    count = (ctypes.c_int64 * len(counts))(*counts)
    job = _Job(
        x=x_RI.data_ptr(),
        x_kind=KINDS[x_RI.dtype],
        x_stride=x_RI.stride(0),
        row=None if row_R is None else row_R.data_ptr(),
        y=y_RO.data_ptr(),
        y_row=y_RO.stride(0),
        y_column=y_RO.stride(1),
        experts=len(counts),
        count=ctypes.addressof(count),
        bits=ctypes.addressof(layout.bits),
        start=ctypes.addressof(layout.start),
        rank=ctypes.addressof(layout.rank),
        outputs=O,
        inputs=I,
        group=stack.group,
        words=held[0].data_ptr(),
        total_words=layout.words,
        scale=held[1].data_ptr(),
        zero=None if zero is None else held[3].data_ptr(),
        scale_kind=KINDS[stack.scale_QOG.dtype],
        plain=held[2].data_ptr(),
        plain_kind=KINDS[stack.plain.dtype],
        threads=torch.get_num_threads(),
    )
    if lib.coterie_grouped(ctypes.byref(job)):
        raise MemoryError(f"no memory for {total} rows of {I} float32 numbers")
