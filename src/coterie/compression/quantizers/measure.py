"""What quantizing a matrix costs: the change of its weights, and of its outputs where the inputs' Gram matrix is known.

It does not know how the codes were found.
"""

# O outputs and I inputs of a matrix

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK = 256


@dataclass(frozen=True)
class Report:
    """How well a matrix was quantized.

    output_error : ||(W - W_hat) X||_F / ||W X||_F over the calibration inputs X; NaN where none are known, or where
        W X is 0. weight_error : ||W - W_hat||_F / ||W||_F, 0 for a matrix of zeros. fallback : rounded to nearest,
        because too few tokens were seen for what was asked. tokens : inputs that were seen.
    """

    output_error: float
    weight_error: float
    fallback: bool
    tokens: int


def energy(w_OI: Tensor, gram_II: Tensor) -> Tensor:
    """||w X||^2 of every row w, from gram = X X^T: float64 [O].

    Uses the symmetry of the Gram matrix, which halves the work: O I^2 multiplications and additions together.
    """
    total_O = w_OI.new_zeros(w_OI.shape[0], dtype=torch.float64)
    gram_II = gram_II.to(w_OI.dtype)
    for i in range(0, w_OI.shape[1], _BLOCK):
        here = slice(i, i + _BLOCK)
        product = w_OI[:, here] @ gram_II[here, here]
        if i:
            product += 2 * (w_OI[:, :i] @ gram_II[:i, here])
        total_O += (product * w_OI[:, here]).sum(1, dtype=torch.float64)
    return total_O.clamp(min=0)


def report(w_OI: Tensor, dense_OI: Tensor, gram_II: Tensor | None, *, fallback: bool, tokens: int) -> Report:
    """Compare a matrix with what its codes stand for."""
    w_OI = w_OI.detach().float()
    lost_OI = w_OI - dense_OI
    norm, lost = (float(x.double().norm()) for x in (w_OI, lost_OI))
    output = math.nan
    if gram_II is not None and (whole := float(energy(w_OI, gram_II).sum())) > 0:
        output = math.sqrt(float(energy(lost_OI, gram_II).sum()) / whole)
    return Report(output, lost / norm if norm else 0.0, fallback, tokens)
