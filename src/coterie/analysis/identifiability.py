"""Can the temperature and the weights of a router both be learned? A test of its activation (arXiv:2401.13875).

A dense-to-sparse gate divides its logits by a temperature tau. With a linear router only beta / tau matters, so neither
is estimable. With an activation sigma between the linear layer and the softmax both are, if for distinct beta_i

    { sigma(beta_i . x),  x_u sigma'(beta_i . x) :  u = 1..D, i = 1..E }    are linearly independent functions of x

`independence` measures that on random points: the smallest singular value of the matrix of these functions, columns of
length one. Every positively homogeneous sigma fails, by Euler's relation beta . x sigma'(beta . x) = p sigma(beta . x):
identity, ReLU, leaky ReLU, z^p. A bounded sigma bounds the sharpness of the gate (`largest_weight`).

The condition is the one for a known number of experts; the second-order one, for more experts fitted than there are, is
not tested. Its exact form is reconstructed, not read in the paper.
"""

# Shapes: T points, D inputs, E experts

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.errors import UsageError

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "silu": F.silu,
    "softplus": F.softplus,
    "elu": F.elu,
    "sin": torch.sin,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
}
# far above rounding (homogeneous activations measure 1e-16) and far below what independent ones measure (1e-2)
LEAST = 1e-6


def value_and_slope(activation: Activation, z: Tensor) -> tuple[Tensor, Tensor]:
    """sigma(z) and sigma'(z), element by element. Shapes as z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        value = activation(z)
        # an activation that ignores its input has slope 0 and no graph
        slope = torch.autograd.grad(value.sum(), z)[0] if value.requires_grad else torch.zeros_like(z)
    return value.detach(), slope


@dataclass(frozen=True)
class Independence:
    """singular : smallest singular value of the normalised functions; independent : whether it is clear of rounding."""

    singular: float
    independent: bool


def independence(
    activation: Activation, *, inputs: int = 3, experts: int = 3, points: int = 20_000, seed: int = 0
) -> Independence:
    """Test the first-order condition for an activation, on Gaussian points and random router rows, in float64.

    Raises UsageError where there are fewer points than functions, or values that are not finite.
    """
    functions = experts * (inputs + 1)
    if points < functions:
        raise UsageError(f"{points} points cannot tell {functions} functions apart", "Use thousands of points.")
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(points, inputs, generator=generator, dtype=torch.float64)
    beta_ED = torch.randn(experts, inputs, generator=generator, dtype=torch.float64)
    value_TE, slope_TE = value_and_slope(activation, x_TD @ beta_ED.T)
    columns = torch.cat([value_TE, (slope_TE.unsqueeze(-1) * x_TD.unsqueeze(1)).flatten(1)], 1)
    if not bool(columns.isfinite().all()):
        raise UsageError("the activation or its slope is not finite on random points")
    length = columns.norm(dim=0, keepdim=True)
    if bool((length == 0).any()):  # no slope anywhere: nothing depends on beta
        return Independence(0.0, False)
    singular = float(torch.linalg.svdvals(columns / length)[-1])
    return Independence(singular, singular > LEAST)


def largest_weight(width: float, tau: float, experts: int) -> float:
    """The largest weight a softmax gate without bias can give an expert: e^(w/tau) / (e^(w/tau) + E - 1).

    width : of the range of the activation, 1 for sigmoid and 2 for tanh; infinite where it is unbounded.

    Raises UsageError for a temperature that is not positive.
    """
    if tau <= 0 or experts < 1 or width < 0:
        raise UsageError(f"no gate has width {width:g}, temperature {tau:g} and {experts} experts")
    return 1 / (1 + (experts - 1) * math.exp(-width / tau))
