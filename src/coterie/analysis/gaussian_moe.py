"""Gaussian mixture of experts with a temperature in its gate: draw from it, and fit it by EM (arXiv:2401.13875).

The model in which the paper asks how fast the parameters of a router can be learned, many repetitions at once:

    p(y | x) = sum_i w_i(x) N(y | a_i . x + b_i, nu_i)
    w_i(x)   = softmax_i((sigma(beta_1i . x) + beta_0i) / tau)      sigma = identity: the linear dense-to-sparse gate

`fit` is EM in float64. The experts' M-step is weighted least squares. The gate's is one step of Fisher scoring on
Q = sum_ti r_ti log w_ti, in (beta_1, beta_0, log tau), halved until Q does not fall: with an activation Q is not
concave, and a full step may overshoot. So the likelihood never falls, and tau stays positive.

The gate of the last expert is fixed at beta_1 = beta_0 = 0, as in simulations of softmax-gated experts. For a linear
router that loses nothing, since the softmax sees no common shift; with an activation it is part of the model studied.
Along its flat direction, (c beta, c tau), the linear gate has no gradient, and the fit stays where it started.
What errors mean and how fast they fall is told by `rates`.
"""

# Shapes: R repetitions, T points, D inputs, E experts, P free parameters of the gate; points come last, they are many

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from coterie.analysis.identifiability import Activation, value_and_slope
from coterie.errors import UsageError

HALVINGS = 30
RIDGE = 1e-9  # of the mean curvature: keeps the flat direction of a linear gate solvable
LEAST_VARIANCE = 1e-8


@dataclass(frozen=True)
class GaussianMoE:
    """R models of one shape. All tensors float64; fits leave the last expert's slope and bias in the gate alone.

    beta_RED, bias_RE, tau_R : the gate (beta_1, beta_0, tau).
    line_RED, offset_RE, variance_RE : the experts (a, b, nu).
    """

    activation: Activation
    beta_RED: Tensor
    bias_RE: Tensor
    tau_R: Tensor
    line_RED: Tensor
    offset_RE: Tensor
    variance_RE: Tensor

    def log_weights(self, x_RDT: Tensor) -> Tensor:
        """log w_i(x). Shape [R, E, T]."""
        return self.logits(x_RDT).log_softmax(1)

    def logits(self, x_RDT: Tensor) -> Tensor:
        """What the softmax of the gate sees. Shape [R, E, T]."""
        z_RET = self.beta_RED @ x_RDT
        return (self.activation(z_RET) + self.bias_RE.unsqueeze(-1)) / self.tau_R[:, None, None]

    def log_joint(self, x_RDT: Tensor, y_RT: Tensor) -> Tensor:
        """log of w_i(x) N(y | expert i). Shape [R, E, T]."""
        off_RET = y_RT.unsqueeze(1) - self.line_RED @ x_RDT - self.offset_RE.unsqueeze(-1)
        nu_RE1 = self.variance_RE.unsqueeze(-1)
        return self.log_weights(x_RDT) - 0.5 * (off_RET.square() / nu_RE1 + (2 * math.pi * nu_RE1).log())

    def log_likelihood(self, x_RDT: Tensor, y_RT: Tensor) -> Tensor:
        """Mean log p(y | x) over the points. Shape [R]."""
        return self.log_joint(x_RDT, y_RT).logsumexp(1).mean(-1)

    def only(self, which_R: Tensor) -> GaussianMoE:
        """Some of the repetitions, by index or mask."""
        return replace(self, **{f: getattr(self, f)[which_R] for f in TENSORS})


TENSORS = tuple(f.name for f in fields(GaussianMoE) if f.name != "activation")


def generate(
    truth: GaussianMoE,
    points: int,
    *,
    repetitions: int,
    seed: int,
    inputs: Literal["uniform", "normal"] = "uniform",
    reach: float = 3.0,
) -> tuple[Tensor, Tensor]:
    """Independent samples of one model (R = 1): x [R, D, T] and y [R, T], float64.

    inputs : uniform on [-reach, reach] in each dimension, or standard normal.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (repetitions, truth.beta_RED.shape[-1], points)
    x_RDT = torch.empty(shape, dtype=torch.float64)
    x_RDT = (
        x_RDT.uniform_(-reach, reach, generator=generator)
        if inputs == "uniform"
        else x_RDT.normal_(generator=generator)
    )
    weight_RET = truth.log_weights(x_RDT).exp()
    chance_RT = torch.rand(repetitions, points, generator=generator, dtype=torch.float64)
    past_RT = (chance_RT.unsqueeze(1) >= weight_RET.cumsum(1)).sum(1)
    expert_R1T = past_RT.clamp(max=weight_RET.shape[1] - 1).unsqueeze(1)
    mean_RET = truth.line_RED @ x_RDT + truth.offset_RE.unsqueeze(-1)
    noise_RT = torch.randn(repetitions, points, generator=generator, dtype=torch.float64)
    return x_RDT, mean_RET.gather(1, expert_R1T)[:, 0] + truth.variance_RE[0].sqrt()[expert_R1T[:, 0]] * noise_RT


def near(
    truth: GaussianMoE, *, repetitions: int, noise: float = 0.1, experts: int | None = None, seed: int
) -> GaussianMoE:
    """Where fits start: the truth plus Gaussian noise on every free parameter, on tau and nu in the logarithm.

    experts : more than the truth has splits its experts at random over the others (over-specified).
    """
    have = truth.beta_RED.shape[1]
    experts = experts or have
    if experts < have:
        raise UsageError(f"{experts} experts cannot start near {have}", f"Fit {have} or more.")
    generator = torch.Generator().manual_seed(seed)
    extra = torch.randint(have, (repetitions, experts - have), generator=generator)
    # the last expert stays last: its gate is the fixed one
    source_RE = torch.cat([extra, torch.arange(have).expand(repetitions, have)], 1)

    def shaken(tensor: Tensor, fixed: bool = False) -> Tensor:
        drawn = noise * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if fixed:
            drawn[:, -1] = 0
        return tensor + drawn

    return GaussianMoE(
        truth.activation,
        shaken(truth.beta_RED[0][source_RE], fixed=True),
        shaken(truth.bias_RE[0][source_RE], fixed=True),
        shaken(truth.tau_R.log().expand(repetitions)).exp(),
        shaken(truth.line_RED[0][source_RE]),
        shaken(truth.offset_RE[0][source_RE]),
        shaken(truth.variance_RE[0][source_RE].log()).exp(),
    )


@dataclass(frozen=True)
class Fit:
    """model : the estimate; likelihood_NR : mean log-likelihood before each iteration, nan after the end of a
    repetition; converged_R : whether the last iteration gained less than the tolerance.
    """

    model: GaussianMoE
    likelihood_NR: Tensor
    converged_R: Tensor


def fit(start: GaussianMoE, x_RDT: Tensor, y_RT: Tensor, *, iterations: int = 2000, tolerance: float = 1e-11) -> Fit:
    """Maximum likelihood by EM. A repetition ends when an iteration gains less than `tolerance` per point.

    tolerance : keep it small; a fit that ends early imitates a slow rate.
    """
    repetitions = len(y_RT)
    done = {f: getattr(start, f).clone() for f in TENSORS}
    converged_R, active_R = torch.zeros(repetitions, dtype=torch.bool), torch.arange(repetitions)
    model, before_R, history = start, torch.full((repetitions,), -torch.inf, dtype=torch.float64), []
    for _ in range(iterations):
        log_RET = model.log_joint(x_RDT, y_RT)
        total_RT = log_RET.logsumexp(1)
        now_R = total_RT.mean(-1)
        history.append(torch.full((repetitions,), torch.nan, dtype=torch.float64).index_copy(0, active_R, now_R))
        going_R = now_R - before_R >= tolerance
        if not bool(going_R.all()):
            ended_R = active_R[~going_R]
            converged_R[ended_R] = True
            for f in TENSORS:
                done[f][ended_R] = getattr(model, f)[~going_R]
            active_R, model, now_R = active_R[going_R], model.only(going_R), now_R[going_R]
            x_RDT, y_RT, log_RET, total_RT = x_RDT[going_R], y_RT[going_R], log_RET[going_R], total_RT[going_R]
            if not len(active_R):
                break
        share_RET = (log_RET - total_RT.unsqueeze(1)).exp()
        model, before_R = _gate_step(_experts_step(model, share_RET, x_RDT, y_RT), share_RET, x_RDT), now_R
    for f in TENSORS:
        done[f][active_R] = getattr(model, f)
    return Fit(GaussianMoE(start.activation, **done), torch.stack(history), converged_R)


def _experts_step(model: GaussianMoE, share_RET: Tensor, x_RDT: Tensor, y_RT: Tensor) -> GaussianMoE:
    """Weighted least squares and variance of every expert, in closed form."""
    x_RDT = torch.cat([x_RDT, torch.ones_like(x_RDT[:, :1])], 1)
    weighted_REDT = share_RET.unsqueeze(2) * x_RDT.unsqueeze(1)
    square_REDD, side_RED = weighted_REDT @ x_RDT.mT.unsqueeze(1), (weighted_REDT @ y_RT[:, None, :, None]).squeeze(-1)
    # a pseudo-inverse, because an expert may have lost all its points
    line_RED = (torch.linalg.pinv(square_REDD, hermitian=True) @ side_RED.unsqueeze(-1)).squeeze(-1)
    off_RET = y_RT.unsqueeze(1) - line_RED @ x_RDT
    variance_RE = (share_RET * off_RET.square()).sum(-1) / share_RET.sum(-1).clamp(min=1e-300)
    variance_RE = variance_RE.clamp(min=LEAST_VARIANCE)
    return replace(model, line_RED=line_RED[..., :-1], offset_RE=line_RED[..., -1], variance_RE=variance_RE)


def _gate_step(model: GaussianMoE, share_RET: Tensor, x_RDT: Tensor) -> GaussianMoE:
    """One scoring step on sum r log w, halved until it does not fall."""
    gradient_RP, curvature_RPP = scores(model, share_RET, x_RDT)
    ridge_R = RIDGE * curvature_RPP.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-300)
    curvature_RPP = curvature_RPP + ridge_R[:, None, None] * torch.eye(gradient_RP.shape[-1], dtype=torch.float64)
    direction_RP = torch.linalg.solve(curvature_RPP, gradient_RP)
    before_R = (share_RET * model.log_weights(x_RDT)).sum((1, 2))
    length_R = torch.ones_like(before_R)
    for _ in range(HALVINGS):
        tried = moved(model, length_R.unsqueeze(-1) * direction_RP)
        after_R = (share_RET * tried.log_weights(x_RDT)).sum((1, 2))
        fell_R = ~(after_R >= before_R)  # a value that is not finite counts as a fall
        if not bool(fell_R.any()):
            return tried
        length_R = torch.where(fell_R, length_R / 2, length_R)
    return moved(model, torch.where(fell_R, 0.0, length_R).unsqueeze(-1) * direction_RP)


def moved(model: GaussianMoE, delta_RP: Tensor) -> GaussianMoE:
    """The gate moved in its free parameters: (slope, bias) of each expert but the last, then log tau."""
    repetitions, experts, inputs = model.beta_RED.shape
    own_RED = delta_RP[:, :-1].view(repetitions, experts - 1, inputs + 1)
    beta_RED, bias_RE = model.beta_RED.clone(), model.bias_RE.clone()
    beta_RED[:, :-1] += own_RED[..., :-1]
    bias_RE[:, :-1] += own_RED[..., -1]
    return replace(model, beta_RED=beta_RED, bias_RE=bias_RE, tau_R=model.tau_R * delta_RP[:, -1].exp())


def scores(model: GaussianMoE, share_RET: Tensor, x_RDT: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient [R, P] of sum r log w in the free parameters of the gate (`moved`), and its Fisher information."""
    value_RET, slope_RET = value_and_slope(model.activation, model.beta_RED @ x_RDT)
    tau_R11 = model.tau_R[:, None, None]
    logit_RET = (value_RET + model.bias_RE.unsqueeze(-1)) / tau_R11
    weight_RET = logit_RET.softmax(1)
    rest_RET = share_RET - weight_RET
    # d logit_e in the slope and bias of expert e itself (the only ones it sees), and d log w_e in log tau
    slopes_REDT = slope_RET[:, :-1, None] * x_RDT.unsqueeze(1)
    own_REDT = torch.cat([slopes_REDT, torch.ones_like(slopes_REDT[:, :, :1])], 2) / tau_R11.unsqueeze(-1)
    heat_RET = (weight_RET * logit_RET).sum(1, keepdim=True) - logit_RET

    gradient_RED = (own_REDT @ rest_RET[:, :-1, :, None]).squeeze(-1)
    gradient_R1 = -(rest_RET * logit_RET).sum((1, 2)).unsqueeze(-1)

    pull_REDT = weight_RET[:, :-1, None] * own_REDT
    pull_RPT, own_block_REDD = pull_REDT.flatten(1, 2), pull_REDT @ own_REDT.mT
    curvature_RPP = -(pull_RPT @ pull_RPT.mT)
    for e, width in enumerate([own_REDT.shape[2]] * own_REDT.shape[1]):
        block = slice(e * width, (e + 1) * width)
        curvature_RPP[:, block, block] += own_block_REDD[:, e]
    side_RP1 = (pull_REDT @ heat_RET[:, :-1, :, None]).flatten(1).unsqueeze(-1)
    corner_R11 = (weight_RET * heat_RET.square()).sum((1, 2))[:, None, None]
    top_RPP, bottom_R1P = torch.cat([curvature_RPP, side_RP1], 2), torch.cat([side_RP1.mT, corner_R11], 2)
    return torch.cat([gradient_RED.flatten(1), gradient_R1], 1), torch.cat([top_RPP, bottom_R1P], 1)
