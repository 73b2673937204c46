"""Products of runs of rows with plain matrices, one for each expert, and what lies between two of them.

    times : y[r] = x[row[r]] W_e                 for the expert e that row r is sorted under
    outer : D_e  = sum_r a[row[r]] b[row[r]]^T   over the rows of e, which is the gradient of W_e; 0 without rows

Any device, any dtypes, any strides of the matrices, so that a transposed weight or gradient is a view of it. Nothing
here is differentiated by autograd.

On a CPU float32 is multiplied by a C kernel of ours (dense.c), which is compiled at its first use, as the one for
packed weights is. All experts are one call, which leaves threads to share out experts instead of halves of small
products; rows are gathered on their way into the cache; a SiLU gate and its gradients are one pass. Everything else,
and float32 where there is no compiler, are torch's products, one expert after the other: the same up to rounding.
"""

# R rows sorted by expert, C inputs, O outputs, E experts, I half of the columns of gate and up

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.experts.kernels import build


class _Product(ctypes.Structure):
    """`Product` of dense.c."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_row", "b_row")),
        *((name, ctypes.c_int64) for name in ("a_stride", "b_stride", "b_expert", "b_k", "b_column")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_expert", "out_stride", "experts")),
        ("count", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("height", "width", "depth", "outer", "threads")),
    ]


@functools.cache
def kernel() -> ctypes.CDLL | None:
    """The compiled kernel, or None, which is said once."""
    try:
        lib = build.library(source=build.DENSE)
    except build.BuildError as error:
        warnings.warn(
            f"The kernel that trains experts cannot be compiled, so torch multiplies, which is slower: {error}. "
            f"Install a C compiler (Debian: apt-get install gcc) or name one in CC.",
            stacklevel=2,
        )
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    lib.coterie_product.argtypes = [ctypes.POINTER(_Product)]
    lib.coterie_silu_gate.argtypes = [pointer] * 3 + [number] * 3
    lib.coterie_silu_gate_backward.argtypes = [pointer] * 6 + [number] * 3
    return lib


def _usable(*tensors: Tensor) -> ctypes.CDLL | None:
    """The kernel, if it can multiply these."""
    return kernel() if all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors) else None


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _run(lib: ctypes.CDLL, counts: list[int], **fields: int | None) -> None:
    count = (ctypes.c_int64 * len(counts))(*counts)
    job = _Product(experts=len(counts), count=ctypes.addressof(count), threads=torch.get_num_threads(), **fields)
    if lib.coterie_product(ctypes.byref(job)):
        raise MemoryError("no memory for the rows of one expert")


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
    single = sum(counts) < 2 * sum(count > 0 for count in counts)  # one row is read with its matrix, not multiplied
    if single and row_R is not None:
        x, row_R = x.index_select(0, row_R), None
    if not single and (lib := _usable(x, w_ECO, out_RO)) is not None and out_RO.stride(1) == 1:
        x, w_ECO = _rows(x), w_ECO if 1 in w_ECO.stride()[1:] else w_ECO.contiguous()
        by_expert, by_input, by_output = w_ECO.stride()
        _run(
            lib, counts, a=x.data_ptr(), a_row=_pointer(row_R), a_stride=x.stride(0),
            b=w_ECO.data_ptr(), b_expert=by_expert, b_k=by_input, b_column=by_output,
            out=out_RO.data_ptr(), out_stride=out_RO.stride(0), width=w_ECO.shape[2], depth=w_ECO.shape[1],
        )  # fmt: skip
        return
    for expert, rows in _runs(counts):
        torch.mm(_taken(x, row_R, rows), w_ECO[expert].to(x.dtype), out=out_RO[rows])


def outer(
    a: Tensor, a_row_R: Tensor | None, b: Tensor, b_row_R: Tensor | None, counts: list[int], out_ECO: Tensor
) -> None:
    """Write every matrix of out_ECO; products are in the dtype of a and b."""
    if out_ECO.stride(2) != 1 and out_ECO.stride(1) == 1:
        a, a_row_R, b, b_row_R, out_ECO = b, b_row_R, a, a_row_R, out_ECO.transpose(1, 2)
    if (lib := _usable(a, b, out_ECO)) is not None and out_ECO.stride(2) == 1:
        a, b = _rows(a), _rows(b)
        _run(
            lib, counts, a=a.data_ptr(), a_row=_pointer(a_row_R), a_stride=a.stride(0),
            b=b.data_ptr(), b_row=_pointer(b_row_R), b_stride=b.stride(0), outer=1,
            out=out_ECO.data_ptr(), out_expert=out_ECO.stride(0), out_stride=out_ECO.stride(1),
            height=out_ECO.shape[1], width=out_ECO.shape[2],
        )  # fmt: skip
        return
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


def silu_gate(up_RP: Tensor, factor_R: Tensor, out_RI: Tensor) -> None:
    """Write silu(gate) * up * factor, gate and up side by side: [R, 2I] -> [R, I]."""
    if (lib := _usable(up_RP, factor_R, out_RI)) is not None and up_RP.is_contiguous() and out_RI.is_contiguous():
        given = (up_RP, factor_R.contiguous(), out_RI)
        lib.coterie_silu_gate(*map(_pointer, given), *out_RI.shape, torch.get_num_threads())
        return
    gate_RI, up_RI = up_RP.chunk(2, -1)
    out_RI.copy_((F.silu(gate_RI) * up_RI).mul_(factor_R[:, None]))


def silu_gate_backward(up_RP: Tensor, factor_R: Tensor, grad_RI: Tensor, out_RI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up [R, 2I] and of the factor [R], the latter in at least float32. out_RI gets again what
    `silu_gate` wrote."""
    tensors = (up_RP, factor_R, grad_RI, out_RI)
    if (lib := _usable(*tensors)) is not None and all(t.is_contiguous() for t in (up_RP, grad_RI, out_RI)):
        grad_RP, grad_R = torch.empty_like(up_RP), torch.empty(len(up_RP))
        given = (up_RP, factor_R.contiguous(), grad_RI, grad_RP, out_RI, grad_R)
        lib.coterie_silu_gate_backward(*map(_pointer, given), *grad_RI.shape, torch.get_num_threads())
        return grad_RP, grad_R
    gate_RI, up_RI = up_RP.chunk(2, -1)
    silu_RI, factor_R1 = F.silu(gate_RI), factor_R[:, None].to(grad_RI.dtype)
    inner_RI = silu_RI * up_RI
    wide = torch.promote_types(grad_RI.dtype, torch.float32)
    grad_R = torch.linalg.vecdot(grad_RI.to(wide), inner_RI.to(wide))
    scaled_RI = grad_RI * factor_R1
    torch.mul(inner_RI, factor_R1, out=out_RI)
    return torch.cat([torch.ops.aten.silu_backward(scaled_RI * up_RI, gate_RI), scaled_RI * silu_RI], -1), grad_R
