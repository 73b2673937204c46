"""Products with packed matrices of many experts in one call: one kernel for each kind of device, chosen here.

    y[r] = x[r] W_e^T        for the expert e that row r is sorted under

`cpu` is C for the processor at hand, `triton_grouped` is for GPUs, and `reference` is torch's own operations, which
also take over where the others cannot run. All give the same numbers up to the order of sums. Packed weights do not
learn; gradients pass through them.
"""

# R rows sorted by expert, I inputs, O outputs

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.experts.kernels import cpu

if TYPE_CHECKING:
    from coterie.experts.packed import Stack


def grouped(
    stack: Stack, x_RI: Tensor, counts: list[int], row_R: Tensor | None = None, out_RO: Tensor | None = None
) -> Tensor:
    """[R, I] -> [R, O]: rows sorted by expert, each with the matrix of its expert.

    counts : rows of each expert. row_R : which row of x_RI each sorted row is, int64, None for x_RI in order.
    out_RO : float32 in which to write, any strides; then no gradients. The result is float32 where a kernel made it,
    in which all sums are float32 whatever the inputs are, and else in the dtype of the inputs.
    """
    if out_RO is None and torch.is_grad_enabled() and x_RI.requires_grad:
        result: Tensor = _Grouped.apply(x_RI if row_R is None else x_RI[row_R], stack, counts)  # type: ignore[no-untyped-call]
        return result
    kernel = _kernel(stack, x_RI)
    if kernel is None:
        y_RO = reference(stack, x_RI if row_R is None else x_RI[row_R], counts)
        return y_RO if out_RO is None else out_RO.copy_(y_RO)
    if out_RO is None:
        out_RO = torch.empty(sum(counts), stack.shape[0], dtype=torch.float32, device=x_RI.device)
    kernel(stack, x_RI.detach(), counts, row_R, out_RO)
    return out_RO


def _kernel(stack: Stack, x_RI: Tensor) -> Callable[..., None] | None:
    """What multiplies these, or None for torch's operations."""
    if x_RI.device.type == "cpu":
        return cpu.grouped if cpu.usable(stack, x_RI) else None
    gpu = _triton() if x_RI.device.type == "cuda" else None
    return gpu.grouped if gpu is not None and gpu.usable(stack, x_RI) else None


@functools.cache
def _triton() -> ModuleType | None:
    """The kernel for GPUs, or None, which is said once."""
    try:
        from coterie.experts.kernels import triton_grouped
    except ImportError as error:
        warnings.warn(
            f"The GPU kernel for packed weights needs triton ({error}), so they are unpacked and multiplied by torch, "
            f"which is several times slower. Install triton; it comes with torch's CUDA builds.",
            stacklevel=2,
        )
        return None
    return triton_grouped


def reference(stack: Stack, x_RI: Tensor, counts: list[int]) -> Tensor:
    """The same with torch's operations, one expert after the other, its matrix in the dtype of the inputs."""
    parts = torch.split(x_RI, counts)
    return torch.cat(
        [F.linear(x, stack.dense(e).to(x.dtype)) for e, x in enumerate(parts) if len(x)]
        or [x_RI.new_empty(0, stack.shape[0])]
    )


class _Grouped(torch.autograd.Function):
    """The product with gradients for x: matrices are made again when they are needed, and never kept."""

    @staticmethod
    def forward(ctx: Any, x_RI: Tensor, stack: Stack, counts: list[int]) -> Tensor:
        ctx.stack, ctx.counts, ctx.dtype = stack, counts, x_RI.dtype
        return grouped(stack, x_RI, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_RO = grads[0].to(ctx.dtype)
        parts = torch.split(grad_RO, ctx.counts)
        dense = [g @ ctx.stack.dense(e).to(g.dtype) for e, g in enumerate(parts) if len(g)]
        return torch.cat(dense or [grad_RO.new_empty(0, ctx.stack.shape[1])]), None, None
