"""DSelect-k: k selectors, each a code of binary digits that become certain (arXiv:2106.03760). COMET's neighbour.

    b_im = S(z_im)          probability that digit m of selector i is 1, S the smooth step of `trees`
    r_ij                    that of expert j: the product over the digits of its number
    w    = softmax(v)       over selectors                              g_j = sum_i w_i r_ij

z and v are linear in the token, or free numbers, the same for all tokens (`per_token`: False). Once every digit is
certain a token has at most k experts. Two terms of its own (balancing term "router"): "entropy", mean over tokens of
sum_i sum_j -r_ij log(r_ij + 1e-6); and, where the number of experts is no power of two,

    "reachable"  mean over tokens of sum_i (1 + 1e-6) / (sum_j r_ij + 1e-6)

which is k while no selector spells the number of an expert that does not exist, and grows as they do (weight 1 in the
authors' later code). What they spell so is lost: weights then have a sum below 1.

Differs from the authors' code: means over tokens instead of sums, and the factor 1 + 1e-6, for k to be the least value.
"""

# T tokens, H hidden, K selectors, M digits, E experts

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from coterie.errors import UsageError
from coterie.routing.base import RouterSettings, Routing, linear, router
from coterie.routing.comet import CENTRE, SPREAD, Gated
from coterie.routing.record import Here
from coterie.routing.trees import TINY, saturation, words


@router("dselect-k", paper="arXiv:2106.03760")
class DSelectK(Gated):
    """Selectors that spell the number of an expert."""

    class Settings(RouterSettings):
        """Parameters of DSelect-k.

        Parameters
        ----------
        top_k : int, >= 1
            Selectors, and so the most experts of a token once all digits are certain.
        gamma : float, > 0
            Width of the band in which a digit is uncertain.
        per_token : bool
            Decide for each token; False: once for all of them, as for the tasks of a multi-task model.
        """

        gamma: float = Field(default=1.0, gt=0)
        per_token: bool = True

    unsliceable = "spells the number of an expert digit by digit"
    rowless = ("digit_weight", "digit_bias", "selector_weight", "selector_bias")

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        K, self.digits = self.top_k, max((experts - 1).bit_length(), 1)
        self.digit_bias = nn.Parameter(torch.empty(K * self.digits, **self.how))
        self.selector_bias = nn.Parameter(torch.empty(K, **self.how))
        if self.settings.per_token:
            self.digit_weight = nn.Parameter(torch.empty(K * self.digits, hidden, **self.how))
            self.selector_weight = nn.Parameter(torch.empty(K, hidden, **self.how))

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        if self.settings.per_token:
            z_TX = linear(x_TH, self.digit_weight, self.digit_bias)
            v_TK = linear(x_TH, self.selector_weight, self.selector_bias)
        else:
            z_TX = self.digit_bias.float().expand(len(x_TH), -1)
            v_TK = self.selector_bias.float().expand(len(x_TH), -1)
        r_TKE = words(z_TX.view(-1, self.top_k, self.digits), self.settings.gamma, self.num_experts)
        terms = {"entropy": self.mean(saturation(r_TKE), here)}
        if self.num_experts < 2**self.digits:
            terms["reachable"] = self.mean(((1 + TINY) / (r_TKE.sum(-1) + TINY)).sum(-1), here)
        return self.sparse((v_TK.softmax(-1)[..., None] * r_TKE).sum(-2), terms)

    def dial(self, **values: Any) -> None:
        for name, what in (("top_k", "the number of selectors"), ("per_token", "whether it decides for each token")):
            if values.get(name, getattr(self.settings, name)) != getattr(self.settings, name):
                raise UsageError(f"{what} is fixed once a router is made")
        super().dial(**values)

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        """Digits near the middle of their band, small selectors. `std` does not matter."""
        for name, parameter in self.named_parameters():
            limit = CENTRE * self.settings.gamma if name.startswith("digit") else SPREAD
            parameter.uniform_(-limit, limit)
