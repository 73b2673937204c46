"""Products of runs of rows with plain matrices, one for each expert, and what lies between two of them.

    times : y[r] = x[row[r]] W_e                 for the expert e that row r is sorted under
    outer : D_e  = sum_r a[row[r]] b[row[r]]^T   over the rows of e, which is the gradient of W_e; 0 without rows

Any device, any dtypes, any strides of the matrices, so that a transposed weight or gradient is a view of it. Nothing
here is differentiated by autograd.
"""

# R rows sorted by expert, C inputs, O outputs, E experts, I half of the columns of gate and up

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F


def _runs(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Experts that have rows, and which."""
    first = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(first, first + count)
        first += count


def _taken(x: Tensor, row_R: Tensor | None, rows: slice) -> Tensor:
    return x[rows] if row_R is None else x.index_select(0, row_R[rows])


def times(x: Tensor, row_R: Tensor | None, w_ECO: Tensor, counts: list[int], out_RO: Tensor) -> None:
    """Write into out_RO, in the dtype of x. row_R : where in x each row lies; None for in order."""
    for expert, rows in _runs(counts):
        torch.mm(_taken(x, row_R, rows), w_ECO[expert].to(x.dtype), out=out_RO[rows])


def outer(
    a: Tensor, a_row_R: Tensor | None, b: Tensor, b_row_R: Tensor | None, counts: list[int], out_ECO: Tensor
) -> None:
    """Write every matrix of out_ECO; products are in the dtype of a and b."""
    for expert, count in enumerate(counts):
        if not count:
            out_ECO[expert].zero_()
    for expert, rows in _runs(counts):
        a_CR, b_RO = _taken(a, a_row_R, rows).T, _taken(b, b_row_R, rows)
        if out_ECO.dtype == a.dtype:
            torch.mm(a_CR, b_RO, out=out_ECO[expert])
        else:
            out_ECO[expert].copy_(a_CR @ b_RO)


def add_bias(y_RO: Tensor, bias_EO: Tensor, counts: list[int], factor_R: Tensor | None = None) -> None:
    """Add to each row the bias of its expert, times a factor."""
    for expert, rows in _runs(counts):
        bias_O = bias_EO[expert].to(y_RO.dtype)
        y_RO[rows] += bias_O if factor_R is None else (bias_O * factor_R[rows, None]).to(y_RO.dtype)


def silu_gate(up_RP: Tensor, factor_R: Tensor) -> Tensor:
    """silu(gate) * up * factor, gate and up side by side: [R, 2I] -> [R, I]."""
    gate_RI, up_RI = up_RP.chunk(2, -1)
    return F.silu(gate_RI).mul_(up_RI).mul_(factor_R[:, None])


def silu_gate_backward(up_RP: Tensor, factor_R: Tensor, grad_RI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up [R, 2I] and of the factor [R], the latter in at least float32; between them what
    `silu_gate` made."""
    gate_RI, up_RI = up_RP.chunk(2, -1)
    silu_RI = F.silu(gate_RI)
    inner_RI = silu_RI * up_RI
    wide = torch.promote_types(grad_RI.dtype, torch.float32)
    grad_R = torch.linalg.vecdot(grad_RI.to(wide), inner_RI.to(wide))
    factored_RI = grad_RI * factor_R[:, None].to(grad_RI.dtype)
    grad_RP = torch.empty_like(up_RP)
    grad_gate_RI, grad_up_RI = grad_RP.chunk(2, -1)
    torch.mul(factored_RI, silu_RI, out=grad_up_RI)
    grad_gate_RI.copy_(torch.ops.aten.silu_backward(factored_RI.mul_(up_RI), gate_RI))
    return grad_RP, inner_RI.mul_(factor_R[:, None].to(inner_RI.dtype)), grad_R
