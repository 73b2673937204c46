"""MWQ: one stored matrix that can be read at several widths, by reading more of it (D2MoE, arXiv:2504.15299).

The base is a group-wise grid of b_1 bits. Each level above adds one plane, a sign for every weight, with a scale for
every group:

    W_hat_1 = (Q_1 - z) s_1,    W_hat_k = W_hat_(k-1) + s_k Q_k,    Q_k = sign(R) in {-1, +1},  sign(0) = +1
    s_k = sum_j h_j |r_j| / sum_j h_j over the group, h = diag(X X^T):  the best for independent inputs

so that a level is the level below and one plane more. What a block of columns loses, later blocks make up for as in
GPTQ; columns inside of a block do not, which is what keeps the levels consistent.

Interpretation, where the paper leaves room. Above the base, whose codes are fixed, R is formed once against the
original weights and once against W^(k), the weights as level k itself has compensated them so far; each row keeps
whichever changes its outputs less, and a row that either would make worse gets a plane with scale 0. The paper divides
by the diagonal block of the Cholesky factor of H^-1; `gptq.feedback` solves with it.

Departure: a compensated base is better by itself, but its codes no longer lie around W, and planes repair that badly.
So "best", the default, also builds on a base that is only rounded, with and without compensated planes, and keeps the
chain whose errors have the smallest product over the levels. "paper" is the first alone.
"""

# O outputs and I inputs of a matrix, G groups of columns, N columns of one group

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from coterie.compression.quantizers.gptq import feedback, gptq, upper_factor
from coterie.compression.quantizers.grids import Spec, checked, parts, stored_scale
from coterie.compression.quantizers.measure import energy
from coterie.compression.quantizers.rtn import rtn
from coterie.errors import UsageError
from coterie.experts.nested import NestedCodes, Plane, with_plane
from coterie.experts.packing import Coded, coded_bytes

Compensate = Literal["best", "paper", "never"]


def nested_bytes(outputs: int, inputs: int, base_bits: int, planes: int, group: int, *, symmetric: bool) -> int:
    """Bytes of a base with so many planes, padding, scales and zeros included."""
    plane = coded_bytes(outputs, inputs, 1, group, symmetric=True)
    return coded_bytes(outputs, inputs, base_bits, group, symmetric=symmetric) + planes * plane


def mwq(
    w_OI: Tensor,
    gram_II: Tensor | None,
    *,
    base_bits: int,
    planes: int,
    spec: Spec,
    block: int = 128,
    damp: float = 0.01,
    compensate: Compensate = "best",
) -> NestedCodes:
    """Quantize a matrix to `base_bits` and `planes` further bits, each width a prefix of the next.

    Parameters
    ----------
    w_OI : [O, I], any float type. Not modified.
    gram_II : sum of x x^T over the inputs; None or zeros: nothing is weighted or compensated.
    spec : the grid of the base (its bits are ignored), its groups and 16-bit type, which the planes share. Real zeros
        and a range search make every level better.
    block : columns that do not make up for each other; a multiple of the group, or one group, is made of it.
    damp : as in `gptq`.
    compensate : "paper": the base, and planes where that is better. "never": nothing is compensated; the Gram matrix
        only weights the scales. "best": the best of both, and of a rounded base with compensated planes.

    Peak memory: 3.5 times the Gram matrix and 15 times W, float32. Raises UsageError for a negative number of planes,
    ModelError for weights or a Gram matrix that are not finite.
    """
    if planes < 0:
        raise UsageError(f"{planes} planes cannot be added", "Give 0 or more.")
    w_OI = checked(w_OI)
    spec = replace(spec, bits=base_bits)
    block = max(block // spec.group * spec.group, spec.group)
    rounded = rtn(w_OI, spec)
    if gram_II is None or not gram_II.any():
        ones_I = torch.ones_like(w_OI[0])
        nested, below_OI = NestedCodes(rounded, []), rounded.dense()
        for _ in range(planes):
            nested.planes.append(_signs(w_OI - below_OI, ones_I, spec))
            below_OI = with_plane(below_OI, *nested.planes[-1], spec.group)
        return nested
    gram_II = gram_II.float()
    factor_II = upper_factor(gram_II[None], damp)[0] if planes and compensate != "never" else None
    if compensate == "never":
        return _chain(w_OI, rounded, planes, gram_II, None, spec, block)[1]
    blocks = gptq(w_OI, gram_II, 1, spec, block=block, damp=damp, compensate_inside=False)
    chains = [_chain(w_OI, blocks, planes, gram_II, factor_II, spec, block)]
    if compensate == "best":
        chains.append(_chain(w_OI, rounded, planes, gram_II, factor_II, spec, block))
        chains.append(_chain(w_OI, rounded, planes, gram_II, None, spec, block))
    return min(chains, key=lambda chain: chain[0])[1]


def _chain(
    w_OI: Tensor, base: Coded, planes: int, gram_II: Tensor, factor_II: Tensor | None, spec: Spec, block: int
) -> tuple[float, NestedCodes]:
    """The base and its planes, each found from what is below it; and the logarithms of the levels' errors, added up.

    Every width counts, each against its own size. Planes are each row's better one of two, or the only one without a
    factor, where that is any better than none.
    """
    nested, below_OI = NestedCodes(base, []), base.dense()
    weight_I = gram_II.diagonal()
    lowest_O = energy(w_OI - below_OI, gram_II)
    total = _log(lowest_O)
    for _ in range(planes):
        ways = [_signs(w_OI - below_OI, weight_I, spec)]
        if factor_II is not None:
            ways.append(_compensated(w_OI, below_OI, weight_I, factor_II, spec, block))
        best_OI, best_OG = ways[0][0], torch.zeros_like(ways[0][1])
        for sign_OI, scale_OG in ways:
            cost_O = energy(w_OI - with_plane(below_OI, sign_OI, scale_OG, spec.group), gram_II)
            better_O1 = (cost_O < lowest_O)[:, None]
            best_OI, best_OG = torch.where(better_O1, sign_OI, best_OI), torch.where(better_O1, scale_OG, best_OG)
            lowest_O = torch.minimum(cost_O, lowest_O)
        nested.planes.append((best_OI, best_OG))
        below_OI = with_plane(below_OI, best_OI, best_OG, spec.group)
        total += _log(lowest_O)
    return total, nested


def _log(cost_O: Tensor) -> float:
    return math.log(float(cost_O.sum()) + 1e-30)


def _signs(r_OI: Tensor, weight_I: Tensor, spec: Spec) -> Plane:
    """Q and s of a residual."""
    scales = []
    for size_OGN, weight_GN in zip(parts(r_OI.abs(), spec.group), parts(weight_I, spec.group)):
        total_G1 = weight_GN.sum(-1, keepdim=True)
        weight_GN = torch.where(total_G1 > 0, weight_GN / total_G1, 1 / weight_GN.shape[-1])
        scales.append((size_OGN * weight_GN).sum(-1))
    return (r_OI >= 0).to(torch.uint8), stored_scale(torch.cat(scales, dim=-1), spec.scale_dtype)


def _compensated(w_OI: Tensor, below_OI: Tensor, weight_I: Tensor, factor_II: Tensor, spec: Spec, block: int) -> Plane:
    """Q and s of the residual against W^(k), block after block."""
    signs, scales = [], []
    error_OI = torch.empty_like(w_OI)
    for i in range(0, w_OI.shape[1], block):
        here = slice(i, i + block)
        j = min(i + block, w_OI.shape[1])
        t_OI = w_OI[:, here]
        if i:
            t_OI = t_OI + error_OI[:, :i] @ feedback(factor_II[None], i, j, 0)[0]
        sign_OI, scale_OG = _signs(t_OI - below_OI[:, here], weight_I[here], spec)
        error_OI[:, here] = w_OI[:, here] - with_plane(below_OI[:, here], sign_OI, scale_OG, spec.group)
        signs.append(sign_OI)
        scales.append(scale_OG)
    return torch.cat(signs, dim=1), torch.cat(scales, dim=1)
