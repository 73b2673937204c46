"""A router whose temperature means something: an activation between linear layer and softmax (arXiv:2401.13875).

    z = (sigma(W x) + b) / tau          P = softmax(z)          dense while tau is high, sparse as it falls

With a linear layer alone, W and tau enter only as W / tau: the pair cannot be told apart, and estimates of both
converge slower than any polynomial in the number of samples. With a sigma that is not homogeneous (sigmoid, tanh, GELU,
SiLU, softplus; ReLU would not do) they can. `bias_inside` has sigma(W x + b) instead.

A bounded sigma bounds the logits: with sigmoid and b = 0 no weight exceeds e^(1/tau) / (e^(1/tau) + E - 1), 0.15 for 16
experts at tau = 1, 0.999 at 0.1. So tau has to end near 0.1 for sigmoid and 0.2 for tanh. tau is fixed, dialled by a
schedule, or learned as log tau, in which case the setting is where it starts.

Then experts are picked: the k likeliest, or those above a threshold (the likeliest always), or all. There is no exact
start from a trained linear router, except without an activation; for small logits sigma is close to its tangent at 0,
and W becomes the router's rows times tau over the tangent's slope.
"""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.errors import UsageError
from coterie.routing.base import Router, RouterSettings, Routing, combined, linear, router
from coterie.routing.record import Here
from coterie.routing.sets import at, slots

# name -> the function and its slope at 0
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "none": (lambda z: z, 1.0),
    "sigmoid": (torch.sigmoid, 0.25),
    "tanh": (torch.tanh, 1.0),
    "gelu": (F.gelu, 0.5),
    "silu": (F.silu, 0.5),
    "softplus": (F.softplus, 0.5),
}


@router("activation", paper="arXiv:2401.13875")
class DenseToSparse(Router):
    """Softmax with a temperature over activated logits."""

    class Settings(RouterSettings):
        """Parameters of the activation dense-to-sparse router.

        Parameters
        ----------
        top_k : int
            Experts per token, of sparsify "top-k" alone.
        activation : str
            sigma: "none", "sigmoid", "tanh", "gelu", "silu" or "softplus".
        tau : float, > 0
            Temperature, or its start if it is learned.
        learn_tau : bool
            Learn log tau. Keep it out of weight decay.
        bias, bias_inside : bool
            Have b, and add it before sigma.
        sparsify : str
            "top-k"; "threshold": experts with P above `threshold`; "dense": all.
        threshold : float, 0 to 1
            Least probability of experts that run.
        scale : float
            Times all weights.
        """

        activation: Literal["none", "sigmoid", "tanh", "gelu", "silu", "softplus"] = "tanh"
        tau: float = Field(default=1.0, gt=0)
        learn_tau: bool = False
        bias: bool = True
        bias_inside: bool = False
        sparsify: Literal["top-k", "threshold", "dense"] = "top-k"
        threshold: float = Field(default=0.01, ge=0, lt=1)
        scale: float = Field(default=1.0, gt=0)

    rowless = ("log_tau",)

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Parameter(torch.empty(experts, hidden, **self.how))
        self.bias = nn.Parameter(torch.empty(experts, **self.how)) if self.settings.bias else None
        if self.settings.learn_tau:
            self.log_tau = nn.Parameter(torch.empty((), **self.how))

    @property
    def tau(self) -> Tensor | float:
        """The temperature now."""
        return self.log_tau.float().exp() if self.settings.learn_tau else float(self.settings.tau)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        told, E = self.settings, self.num_experts
        sigma, _ = ACTIVATIONS[told.activation]
        outside_E = None if self.bias is None or told.bias_inside else self.bias
        score_TE = sigma(linear(x_TH, self.weight, self.bias if told.bias_inside else None))
        if outside_E is not None:
            score_TE = score_TE + outside_E.float()
        logits_TE = score_TE / self.tau
        probability_TE = logits_TE.softmax(-1)
        if told.sparsify == "top-k":
            index_TK = logits_TE.detach().topk(self.top_k, dim=-1).indices
        else:
            chosen_TE = probability_TE > (told.threshold if told.sparsify == "threshold" else -1.0)
            chosen_TE.scatter_(-1, logits_TE.argmax(-1, keepdim=True), True)
            index_TK = slots(chosen_TE, logits_TE)
        weight_TK = combined(at(probability_TE, index_TK), told.combine, index_TK < E) * told.scale
        return Routing(logits_TE, probability_TE, index_TK, weight_TK, E, told.combine)

    def dial(self, **values: Any) -> None:
        if fixed := {"learn_tau", "bias"} & set(values):
            raise UsageError(f"activation: {', '.join(sorted(fixed))} cannot change once a router is made")
        if self.settings.learn_tau and "tau" in values:
            raise UsageError(
                "activation: tau is learned, nothing else can set it", "Make the router without learn_tau."
            )
        super().dial(**values)

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        """Fresh weights, wide enough for z of unit variance on normalised inputs; std is not used."""
        self.weight.normal_(0.0, 1 / math.sqrt(self.hidden_dim))
        if self.bias is not None:
            self.bias.zero_()
        if self.settings.learn_tau:
            self.log_tau.fill_(math.log(self.settings.tau))

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        _, slope = ACTIVATIONS[self.settings.activation]
        self.weight.copy_(weight_EH.float() * (self.settings.tau / slope))
        return True
