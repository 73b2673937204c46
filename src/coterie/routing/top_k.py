"""Softmax top-k routers: the experts with the highest probability, plain, noisy or jittered, in groups, with a bias.

    z = W x            p = softmax(z) over all E experts            picked: the k largest of p + b
    weights            "raw" p (Switch, GShard as DeepSeekMoE defines it, OLMoE, DeepSeek-V2), or "renormalised" p over
                       the picked ones (Mixtral, Qwen3-MoE), times `scale`

Sources: Shazeer et al. (arXiv:1701.06538) with its softplus noise, Switch (arXiv:2101.03961) with its jitter of the
input, DeepSeek-V2's device-limited routing (arXiv:2405.04434): only experts of each token's best groups can be picked,
a group being as good as its best expert. The bias b serves balancing alone (arXiv:2408.15664, see
`balancing.controllers`): it decides what is picked and never enters a weight. Noise and jitter are for training.
"""

# T tokens, H hidden, E experts, K experts per token

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.routing.base import Router, RouterSettings, Routing, combined, grouped, linear, router
from coterie.routing.record import Here


class Grouped(RouterSettings):
    """Of routers that pick from groups and can be balanced by a bias.

    Parameters
    ----------
    scale : float
        Times all weights.
    groups, groups_used : int
        Experts stand in so many equal groups, and a token picks from so many of them; 1, 1: from all.
    bias : bool
        Keep a bias per expert that a controller changes to balance loads.
    bias_times : bool
        The bias multiplies scores instead of being added; it starts at 1.
    """

    scale: float = Field(default=1.0, gt=0)
    groups: int = Field(default=1, ge=1)
    groups_used: int = Field(default=1, ge=1)
    bias: bool = False
    bias_times: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Any:
        if self.groups_used > self.groups:
            raise ValueError(f"{self.groups_used} of {self.groups} groups cannot be used")
        return self


class Linear(Router):
    """What routers with one row of weights per expert share: `weight` [E, H], and perhaps a selection bias [E]."""

    Settings = Grouped
    group_best = 1  # experts whose scores make a group's

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.weight = nn.Parameter(torch.empty(experts, hidden, **self.how))
        if getattr(settings, "bias", False):
            start = float(settings.bias_times)  # type: ignore[attr-defined]
            self.e_score_correction_bias = nn.Buffer(torch.full((experts,), start, device=self.how["device"]))

    @property
    def num_group(self) -> int:
        return int(getattr(self.settings, "groups", 1))

    @property
    def topk_group(self) -> int:
        return int(getattr(self.settings, "groups_used", 1))

    def picked(self, score_TE: Tensor) -> Tensor:
        """The top-k experts of each token, [T, K], by score and bias, within its groups."""
        score_TE = score_TE.detach()
        if hasattr(self, "e_score_correction_bias"):
            bias_E = self.e_score_correction_bias.float()
            score_TE = score_TE * bias_E if self.settings.bias_times else score_TE + bias_E
        if self.num_group > 1:
            score_TE = grouped(score_TE, self.num_group, self.topk_group, self.group_best)
        return score_TE.topk(self.top_k, dim=-1).indices

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        super().reset(std)
        if hasattr(self, "e_score_correction_bias"):
            self.e_score_correction_bias.fill_(float(self.settings.bias_times))

    @torch.no_grad()
    def adopt(self, weight_EH: Tensor) -> bool:
        self.weight.copy_(weight_EH)
        return True


@router("top-k", paper="arXiv:1701.06538")
class TopK(Linear):
    """Softmax over all experts, the k likeliest run."""

    class Settings(Grouped):
        """Parameters of the softmax top-k router.

        Parameters
        ----------
        noise : bool
            Learned Gaussian noise on the logits in training (Shazeer et al.): z + normal * softplus(W_noise x).
        jitter : float, 0 to 1
            In training the router's input is multiplied with numbers drawn from 1 - jitter to 1 + jitter (Switch).
        """

        noise: bool = False
        jitter: float = Field(default=0.0, ge=0, lt=1)

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        if self.settings.noise:
            self.noise_weight = nn.Parameter(torch.empty(experts, hidden, **self.how))

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        x_TH = x_TH.float()
        if self.training and self.settings.jitter:
            spread = self.settings.jitter
            x_TH = x_TH * torch.empty_like(x_TH).uniform_(1 - spread, 1 + spread)
        logits_TE = linear(x_TH, self.weight)
        if self.training and self.settings.noise:
            logits_TE = logits_TE + torch.randn_like(logits_TE) * F.softplus(linear(x_TH, self.noise_weight))
        probability_TE = logits_TE.softmax(-1)
        index_TK = self.picked(probability_TE)
        weight_TK = combined(probability_TE.gather(-1, index_TK), self.settings.combine) * self.settings.scale
        return Routing(logits_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine)

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        super().reset(std)
        if self.settings.noise:
            self.noise_weight.zero_()
