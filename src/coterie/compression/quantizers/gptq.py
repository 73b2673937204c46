"""GPTQ: what one column loses to rounding, the columns after it make up for (arXiv:2210.17323).

With inputs X of the matrix, H = X X^T + lambda I, and codes chosen for columns 1 to k, the columns after k that keep
||W X - W_hat X|| smallest are known in closed form; GPTQ rounds column after column to the nearest code of what they
then are. A group's scale is fitted to its columns as they are when its first one is reached.

How it is computed here. The paper takes the Cholesky factor U of H^-1. We take H = R R^T with R upper triangular, so
R = U^-1 and nothing is inverted (QuIP, arXiv:2307.13304, theorem 6: the same codes). For any cut of the columns into
blocks the loss is a sum over blocks c of || (T_c - W_hat_c) R_cc ||^2, where

    T_c = W_c + sum_{b before c} (W_b - W_hat_b) R_bc R_cc^-1

are the compensated weights of block c. Each term is again such a problem, so the same step runs on blocks, on groups
inside of blocks, and on a few columns, and all but the last are matrix products. The cut does not change the result,
up to rounding.

An input that was never seen (H_jj = 0) keeps its weights, rounded to nearest; the paper's code sets them to 0.
`order="static"` rounds columns by falling H_jj, with scales fitted to the original weights, so that groups stay where
they are and no index has to be stored. `compensate_inside=False` is what MC's code does at 3 bits and fewer: only whole
blocks make up for earlier blocks. There we use T_c above, which is exact; the code divides by the diagonal of U.
"""

# E matrices of one shape, O outputs and I inputs, G groups of columns

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coterie.compression.quantizers.grids import Spec, checked, fit, nearest
from coterie.compression.quantizers.rtn import rtn
from coterie.errors import ModelError, UsageError
from coterie.experts.packing import Coded, groups, symmetric_zero

LEAF = 32  # columns that are rounded one by one between matrix products
_BLOCK = 128  # of the factorisation
_DOUBLINGS = 16

Order = Literal["natural", "static"]


def gptq(
    w_OI: Tensor,
    gram_II: Tensor,
    tokens: int,
    spec: Spec,
    *,
    damp: float = 0.01,
    block: int = 128,
    order: Order = "natural",
    compensate_inside: bool = True,
) -> Coded:
    """Quantize a matrix, or several of one shape, so that its outputs change least.

    Parameters
    ----------
    w_OI : [O, I], or [E, O, I] for several matrices with their own inputs. Any float type.
    gram_II : sum of x x^T over the inputs, [I, I] or [E, I, I]; its scale does not matter. Not modified.
    tokens : inputs in the sum. With none, weights are rounded to nearest.
    damp : lambda as a share of the mean of H_jj; doubled until the factorisation succeeds.
    block : columns between large matrix products; a multiple of the group is made of it. Changes the result only
        without `compensate_inside`.
    order : "natural", or "static" (falling H_jj, scales of the original weights).
    compensate_inside : False: no column makes up for another one of its block.

    Peak memory: twice H and four times W in float32; in static order three times H and five times W. Raises ModelError
    for weights or a Gram matrix that are not finite, and for a Gram matrix that is none.
    """
    if damp < 0 or block < 1:
        raise UsageError(f"damp {damp} and block {block} cannot be", "damp is at least 0, block at least 1.")
    w_OI = checked(w_OI)
    if tokens == 0:
        return rtn(w_OI, spec)
    lead, (O, I) = w_OI.shape[:-2], w_OI.shape[-2:]  # noqa: E741
    w_EOI, gram_EII = w_OI.reshape(-1, O, I), gram_II.reshape(-1, I, I)
    grid, order_EI = None, None
    if order == "static":
        grid = fit(w_EOI, spec)
        order_EI = gram_EII.diagonal(dim1=-2, dim2=-1).argsort(dim=-1, descending=True, stable=True)
        w_EOI = w_EOI.gather(2, order_EI[:, None].expand_as(w_EOI))
        gram_EII = torch.stack([gram[at][:, at] for gram, at in zip(gram_EII, order_EI)])
    sweep = _Sweep(w_EOI, upper_factor(gram_EII, damp), spec, grid, order_EI)
    sweep.block(
        0, I, w_EOI.transpose(1, 2), _cuts(I, spec.group, block, inside=compensate_inside, fitted=grid is not None)
    )
    codes_EIO = sweep.codes_EIO
    if order_EI is not None:
        codes_EIO = torch.empty_like(codes_EIO).scatter_(1, order_EI[..., None].expand_as(codes_EIO), codes_EIO)
    codes_OI, scale_OG, zero_OG = (
        part.transpose(1, 2).reshape(*lead, O, -1).contiguous()
        for part in (codes_EIO, sweep.scale_EGO.to(spec.scale_dtype), sweep.zero_EGO.to(spec.scale_dtype))
    )
    return Coded(codes_OI, spec.bits, spec.group, scale_OG, None if spec.symmetric else zero_OG)


def too_few(tokens: int, calibration_tokens: int, *, share: float = 0.005, rows: int = 32) -> bool:
    """Whether an expert saw too little text for GPTQ: fewer than `rows` tokens, or than this share of all of them."""
    return tokens < max(rows, share * calibration_tokens)


def upper_factor(gram_EII: Tensor, damp: float) -> Tensor:
    """R, upper triangular with R R^T = H, float32 [E, I, I]; H is the damped Gram matrix.

    Inputs that were never seen get the mean of the others on the diagonal, and touch no other column.
    """
    h_EII = gram_EII.to(torch.float32, copy=True)
    diagonal_EI = h_EII.diagonal(dim1=-2, dim2=-1)
    if not torch.isfinite(h_EII.sum()):
        raise ModelError("the Gram matrix of the inputs is not finite", "Activations overflowed: calibrate in float32.")
    seen_EI = diagonal_EI > 0
    mean_E1 = diagonal_EI.sum(-1, keepdim=True) / seen_EI.sum(-1, keepdim=True).clamp(min=1)
    mean_E1 = torch.where(mean_E1 > 0, mean_E1, 1.0)
    diagonal_EI += torch.where(seen_EI, 0.0, mean_E1)
    share_E1 = torch.full_like(mean_E1, damp)
    added_E1 = torch.zeros_like(mean_E1)
    for _ in range(_DOUBLINGS):
        diagonal_EI += share_E1 * mean_E1 - added_E1
        added_E1 = share_E1 * mean_E1
        factor_EII, failed_E = _factor(h_EII)
        if not failed_E.any():
            return factor_EII
        share_E1 = torch.where(failed_E[:, None], (2 * share_E1).clamp(min=1e-4), share_E1)
    raise ModelError(
        f"the Gram matrix of the inputs has no Cholesky factor, not even with {float(share_E1.max()):.2g} times its "
        "mean diagonal added",
        "It is not a sum of x x^T: calibrate again.",
    )


def _factor(h_EII: Tensor) -> tuple[Tensor, Tensor]:
    """R, and which matrices have none.

    LAPACK knows lower factors only, and torch turns its result around twice more: block by block from the last column
    to the first takes half the time of that on a CPU.
    """
    E, I, _ = h_EII.shape  # noqa: E741
    factor_EII = torch.zeros_like(h_EII)
    failed_E = torch.zeros(E, dtype=torch.bool, device=h_EII.device)
    for i in range((I - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):
        j = min(i + _BLOCK, I)
        left_EII = h_EII[:, :j, i:j]
        if j < I:
            left_EII = torch.baddbmm(left_EII, factor_EII[:, :j, j:], factor_EII[:, i:j, j:].transpose(1, 2), alpha=-1)
        lower_EII, failures_E = torch.linalg.cholesky_ex(left_EII[:, i:j].flip(-1, -2))
        failed_E |= failures_E > 0
        own_EII = lower_EII.flip(-1, -2)
        factor_EII[:, i:j, i:j] = own_EII
        if i:
            factor_EII[:, :i, i:j] = torch.linalg.solve_triangular(
                own_EII.transpose(1, 2), left_EII[:, :i], upper=False, left=False
            )
    return factor_EII, failed_E


def feedback(factor_EII: Tensor, i: int, j: int, begin: int) -> Tensor:
    """R_bc R_cc^-1 for the columns c = [i, j) and all b = [begin, i): what errors in b ask of c, [E, b, c]."""
    within_EII, before_EII = factor_EII[:, i:j, i:j], factor_EII[:, begin:i, i:j]
    share_EII: Tensor = torch.linalg.solve_triangular(within_EII, before_EII, upper=True, left=False)
    return share_EII


@dataclass(frozen=True)
class _Cut:
    """Blocks of this many columns make up for each other; `fits`: scales are fitted to them as they then are."""

    columns: int
    fits: bool = False


SINGLY = _Cut(1)  # the last cut, done without the matrix products of the others


def _cuts(columns: int, group: int, block: int, *, inside: bool, fitted: bool) -> list[_Cut]:
    """How the columns are cut, from the coarsest to the finest."""
    group = min(group, columns)
    if fitted:
        cuts = [_Cut(block)]
    elif group >= block:
        cuts = [_Cut(group, fits=True), _Cut(block)]
    elif inside:
        cuts = [_Cut(block // group * group), _Cut(group, fits=True)]
    else:
        cuts = [_Cut(block // group * group, fits=True)]
    if inside:
        cuts += [_Cut(LEAF), SINGLY]
    return cuts


class _Sweep:
    """One pass over the columns of E matrices. Weights lie transposed, so that a column is contiguous."""

    def __init__(
        self,
        w_EOI: Tensor,
        factor_EII: Tensor,
        spec: Spec,
        grid: tuple[Tensor, Tensor | None] | None,
        order_EI: Tensor | None,
    ) -> None:
        E, O, I = w_EOI.shape  # noqa: E741
        self.spec, self.factor_EII = spec, factor_EII
        shape = (E, groups(I, spec.group), O)
        self.codes_EIO = w_EOI.new_empty(E, I, O, dtype=torch.uint8)
        self.scale_EGO = w_EOI.new_empty(shape)
        self.zero_EGO = w_EOI.new_full(shape, symmetric_zero(spec.bits))
        if grid is not None:
            self._keep(0, *grid)
        columns = torch.arange(I, device=w_EOI.device) if order_EI is None else order_EI
        self.group_EI = (columns // spec.group).expand(E, I)

    def _keep(self, first: int, scale_EOG: Tensor, zero_EOG: Tensor | None) -> None:
        last = first + scale_EOG.shape[-1]
        self.scale_EGO[:, first:last] = scale_EOG.transpose(1, 2)
        if zero_EOG is not None:
            self.zero_EGO[:, first:last] = zero_EOG.transpose(1, 2)

    def block(self, begin: int, end: int, target_EIO: Tensor, cuts: list[_Cut]) -> Tensor:
        """Choose codes for the columns [begin, end), whose compensated weights are given. Returns target - W_hat."""
        if not cuts:
            return self._round(begin, end, target_EIO)
        cut, finer = cuts[0], cuts[1:]
        if cut is SINGLY:
            return self._columns(begin, end, target_EIO)
        error_EIO = torch.empty_like(target_EIO, memory_format=torch.contiguous_format)
        for i in range(begin, end, cut.columns):
            j = min(i + cut.columns, end)
            here = slice(i - begin, j - begin)
            t_EIO = own_EIO = target_EIO[:, here]
            if i > begin:
                before_EII = feedback(self.factor_EII, i, j, begin)
                t_EIO = torch.baddbmm(own_EIO, before_EII.transpose(1, 2), error_EIO[:, : i - begin])
            if cut.fits:
                self._keep(i // self.spec.group, *fit(t_EIO.transpose(1, 2), self.spec))
            error_EIO[:, here] = self.block(i, j, t_EIO, finer) + (own_EIO - t_EIO)
        return error_EIO

    def _grid(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Scale and zero of each of these columns, [E, I, O]."""
        at_EIO = self.group_EI[:, begin:end, None].expand(-1, -1, self.scale_EGO.shape[-1])
        return self.scale_EGO.gather(1, at_EIO), self.zero_EGO.gather(1, at_EIO)

    def _round(self, begin: int, end: int, target_EIO: Tensor) -> Tensor:
        """All columns to nearest, at once."""
        scale_EIO, zero_EIO = self._grid(begin, end)
        code_EIO = nearest(target_EIO, scale_EIO, zero_EIO, self.spec)
        self.codes_EIO[:, begin:end] = code_EIO.to(torch.uint8)
        return target_EIO - code_EIO.sub_(zero_EIO).mul_(scale_EIO)

    def _columns(self, begin: int, end: int, target_EIO: Tensor) -> Tensor:
        """Column after column to nearest. What is left of the target here, of the columns not yet rounded, moves."""
        scale_EIO, zero_EIO = self._grid(begin, end)
        factor_EII = self.factor_EII[:, begin:end, begin:end]
        share_EII = factor_EII / factor_EII.diagonal(dim1=-2, dim2=-1)[:, None]
        left_EIO = target_EIO.clone(memory_format=torch.contiguous_format)
        code_EIO = torch.empty_like(left_EIO)
        error_EIO = torch.empty_like(left_EIO)
        for k in range(end - begin):
            scale_EO, zero_EO = scale_EIO[:, k], zero_EIO[:, k]
            code_EO = nearest(left_EIO[:, k], scale_EO, zero_EO, self.spec)
            code_EIO[:, k] = code_EO
            error_EO = torch.addcmul(target_EIO[:, k], code_EO.sub_(zero_EO), scale_EO, value=-1)
            error_EIO[:, k] = error_EO
            left_EIO[:, k + 1 :].addcmul_(share_EII[:, k, k + 1 :, None], error_EO[:, None])
        self.codes_EIO[:, begin:end] = code_EIO.to(torch.uint8)
        return error_EIO
