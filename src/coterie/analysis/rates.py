"""How far a fitted mixture of experts is from the truth, and how fast that shrinks with the sample (arXiv:2401.13875).

Experts have no order, so errors need matched components. The Voronoi loss puts every fitted expert into the cell A_j of
the true expert it is closest to. With W = exp(beta_0 / tau), a star for the truth and d for a difference to it:

    D = |tau - tau*| + sum_j |sum_{i in A_j} W_i - W*_j|
      + sum_j sum_{i in A_j} W_i (|d beta_1|^p + |d a|^p + |d b|^r + |d nu|^(r/2))

with p = 1, r = 1 and |d nu| in a cell of one, p = 2 and r = 4 or 6 in a cell of two or three. The exponents of large
cells are reconstructed, not read in the paper. `errors` tells the parameters apart, for as many experts as there are.
"""

# Shapes: R repetitions, S sample sizes, B resamples, T points, D inputs, E experts (fitted or true)

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from coterie.analysis.gaussian_moe import GaussianMoE, generate
from coterie.errors import UsageError

ORDER = {1: 1.0, 2: 4.0, 3: 6.0}  # r, by fitted experts in a cell


def voronoi_loss(model: GaussianMoE, truth: GaussianMoE) -> Tensor:
    """Loss of each repetition against one true model. Shape [R], float64, 0 for the truth in any order of experts.

    Raises UsageError where more than three fitted experts share a cell: their exponents are not known.
    """
    away_REE = _apart(model, truth)
    experts = away_REE.shape[-1]
    cell_REE = torch.nn.functional.one_hot(away_REE.argmin(-1), experts).double()
    size_RE = (cell_REE @ cell_REE.sum(1).unsqueeze(-1)).squeeze(-1).long()
    if int(size_RE.max()) > max(ORDER):
        raise UsageError(f"{int(size_RE.max())} fitted experts are closest to one true expert", "Fit fewer experts.")
    mass_RE = (model.bias_RE / model.tau_R.unsqueeze(-1)).exp()
    true_E = (truth.bias_RE[0] / truth.tau_R[0]).exp()
    r_RE = torch.tensor([0.0, *ORDER.values()], dtype=torch.float64)[size_RE]
    p_RE = torch.where(size_RE == 1, 1.0, 2.0)
    nu_RE = torch.where(size_RE == 1, 1.0, r_RE / 2)

    def own(fitted: Tensor, true: Tensor) -> Tensor:
        """|difference| of every fitted expert to the true one of its cell. Shape [R, E]."""
        fitted, true = (tensor.view(len(tensor), tensor.shape[1], -1) for tensor in (fitted, true))
        return (fitted - cell_REE @ true[0]).square().sum(-1).sqrt()

    inside_RE = own(model.beta_RED, truth.beta_RED) ** p_RE + own(model.line_RED, truth.line_RED) ** p_RE
    inside_RE += own(model.offset_RE, truth.offset_RE) ** r_RE + own(model.variance_RE, truth.variance_RE) ** nu_RE
    outside_R = ((cell_REE.mT @ mass_RE.unsqueeze(-1)).squeeze(-1) - true_E).abs().sum(-1)
    return (model.tau_R - truth.tau_R).abs() + outside_R + (mass_RE * inside_RE).sum(-1)


def errors(model: GaussianMoE, truth: GaussianMoE) -> dict[str, Tensor]:
    """Errors by parameter, experts matched one to one. Each of shape [R], float64.

    "tau", "beta" (slopes of the gate), "gate" (both summed), "ratio" (slopes over tau), "experts" (a, b and nu summed).
    """
    if model.beta_RED.shape[1] != truth.beta_RED.shape[1]:
        raise UsageError(f"{model.beta_RED.shape[1]} fitted experts do not match {truth.beta_RED.shape[1]} one to one")
    away_REE = _apart(model, truth)
    order_RE = torch.from_numpy(np.stack([linear_sum_assignment(away.T)[1] for away in away_REE.numpy()]))
    row_R1 = torch.arange(len(order_RE)).unsqueeze(1)

    def off(fitted: Tensor, true: Tensor) -> Tensor:
        return (fitted[row_R1, order_RE] - true).abs().flatten(1).sum(-1)

    tau_R = (model.tau_R - truth.tau_R).abs()
    beta_R = off(model.beta_RED, truth.beta_RED)
    return {
        "tau": tau_R,
        "beta": beta_R,
        "gate": tau_R + beta_R,
        "ratio": off(model.beta_RED / model.tau_R[:, None, None], truth.beta_RED / truth.tau_R[:, None, None]),
        "experts": off(model.line_RED, truth.line_RED)
        + off(model.offset_RE, truth.offset_RE)
        + off(model.variance_RE, truth.variance_RE),
    }


def hellinger(model: GaussianMoE, truth: GaussianMoE, *, points: int = 20_000, seed: int = 0) -> Tensor:
    """Hellinger distance of the conditional densities, averaged over x. Shape [R].

    By Monte Carlo: H^2 = 1/2 E_truth (sqrt(p / p*) - 1)^2, which is never negative and has no noise where p = p*.
    """
    x_RDT, y_RT = generate(truth, points, repetitions=1, seed=seed)
    repetitions = len(model.tau_R)
    x_RDT, y_RT = x_RDT.expand(repetitions, -1, -1), y_RT.expand(repetitions, -1)
    ratio_RT = model.log_joint(x_RDT, y_RT).logsumexp(1) - truth.log_joint(x_RDT[:1], y_RT[:1]).logsumexp(1)
    return (((ratio_RT / 2).exp() - 1).square().mean(-1) / 2).sqrt()


def slope(
    sizes: Sequence[int], error_SR: Tensor, *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Log-log slope of the median error against the sample size, and its bootstrap interval over repetitions.

    error_SR : errors of every repetition at every size, all positive.
    """
    generator = torch.Generator().manual_seed(seed)
    n_S = torch.tensor(sizes, dtype=torch.float64).log()
    n_S = n_S - n_S.mean()

    def of(error_BSR: Tensor) -> Tensor:
        median_BS = error_BSR.quantile(0.5, dim=-1).log()
        return (median_BS @ n_S) / n_S.square().sum()

    sizes_, repetitions = error_SR.shape
    pick_BSR = torch.randint(repetitions, (resamples, sizes_, repetitions), generator=generator)
    drawn_B = of(error_SR.double().expand(resamples, -1, -1).gather(-1, pick_BSR))
    tail = (1 - level) / 2
    low, high = drawn_B.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return float(of(error_SR.double().unsqueeze(0))), low, high


def _apart(model: GaussianMoE, truth: GaussianMoE) -> Tensor:
    """Distance of fitted (rows) to true experts (columns) in (beta_1, a, b, nu). Shape [R, E, E]."""
    fitted, true = (
        torch.cat([m.beta_RED, m.line_RED, m.offset_RE.unsqueeze(-1), m.variance_RE.unsqueeze(-1)], -1)
        for m in (model, truth)
    )
    return torch.cdist(fitted, true.expand(len(fitted), -1, -1))
