"""HQQ: move each group's zero until errors are few and large instead of many and small (Mobius Labs 2023).

Scales are those of the plain range; zeros are real. The zero that makes ||W - W_hat||_p^p small, p < 1, is approached
by half-quadratic splitting: with E in the place of the error,

    E = shrink(W - W_hat),  shrink(x) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z = mean over the group of  q - (W - E) / s,   beta grows by kappa each time

until mean |W - W_hat| stops falling. Needs no text.

Differs from the authors' code (mobiusml/hqq): every zero is rounded as it will be stored before it is judged, and each
group keeps the best it has seen, so that no group ends worse than the plain grid. At 1 bit the format has no zero to
move: rounds to nearest.
"""

# O outputs and I inputs of a matrix, G groups of columns, N columns of one group

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coterie.compression.quantizers.grids import Spec, checked, encode, fit, nearest, parts
from coterie.compression.quantizers.rtn import rtn
from coterie.errors import UsageError
from coterie.experts.packing import Coded


def hqq(
    w_OI: Tensor, spec: Spec, *, p: float = 0.7, beta: float = 10.0, kappa: float = 1.01, iterations: int = 20
) -> Coded:
    """Quantize a matrix without data, [..., O, I] of any float type.

    Raises UsageError for a symmetric grid, which has no zero to move, and ModelError for NaN or infinite weights.
    Peak memory: about six times the weights in float32.
    """
    if spec.symmetric:
        raise UsageError("HQQ chooses zeros, and a symmetric grid has none", "Quantize asymmetrically, or with rtn.")
    if p <= 0 or beta <= 0 or kappa <= 0 or iterations < 1:
        raise UsageError(f"p {p}, beta {beta}, kappa {kappa}, {iterations} iterations cannot be", "All are positive.")
    if spec.bits == 1:
        return rtn(w_OI, spec)
    spec = replace(spec, float_zero=True)
    w_OI = checked(w_OI)
    scale_OG, zero_OG = fit(w_OI, spec)
    assert zero_OG is not None
    moved, first = [], 0
    for w_OGN in parts(w_OI, spec.group):
        last = first + w_OGN.shape[-2]
        moved.append(
            _moved(w_OGN, scale_OG[..., first:last], zero_OG[..., first:last], spec, p, beta, kappa, iterations)
        )
        first = last
    zero_OG = torch.cat(moved, dim=-1)
    return Coded(encode(w_OI, scale_OG, zero_OG, spec), spec.bits, spec.group, scale_OG, zero_OG)


def _moved(
    w_OGN: Tensor, scale_OG: Tensor, zero_OG: Tensor, spec: Spec, p: float, beta: float, kappa: float, iterations: int
) -> Tensor:
    """The zeros where they are best, in the dtype they are stored in."""
    scale = scale_OG.float()[..., None]
    best_OG, lowest_OG, before = zero_OG, torch.full_like(zero_OG, torch.inf, dtype=torch.float32), torch.inf
    for _ in range(iterations + 1):  # the first looks at the plain grid
        zero = zero_OG.float()[..., None]
        q_OGN = nearest(w_OGN, scale, zero, spec)
        error_OGN = w_OGN - (q_OGN - zero) * scale
        cost_OG = error_OGN.abs().mean(-1)
        best_OG = torch.where(cost_OG < lowest_OG, zero_OG, best_OG)
        lowest_OG = torch.minimum(cost_OG, lowest_OG)
        cost = float(cost_OG.mean())
        if not cost < before:
            break
        before = cost
        size_OGN = error_OGN.abs()
        error_OGN = error_OGN.sign() * (size_OGN - size_OGN.pow(p - 1) / beta).relu()
        zero_OG = (q_OGN - (w_OGN - error_OGN) / scale).mean(-1).to(zero_OG.dtype)
        beta *= kappa
    return best_OG
