"""The cosine router of X-MoE (arXiv:2204.09179): experts are directions in a small space, not in the hidden one.

    z_e = cos(D x, v_e) / t         D [D, H] brings tokens down to few dimensions, t > 0 is learned

Lengths of tokens and of experts' rows do not count, so that no expert can win by the size of its row. With dim=0
there is no D: cosines in the hidden space itself. `Cosine` is the head alone, for routers that look at something else
than the hidden states.
"""

# T tokens, X what the head sees, D dimensions of the cosine, E experts

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.routing.base import Router, RouterSettings, Routing, linear, router
from coterie.routing.record import Here
from coterie.routing.scored import Scored, ScoredSettings


class Cosine(nn.Module):
    """Cosines to the experts, in float32. dim : D; 0: no projection. temperature : where t starts."""

    def __init__(self, columns: int, dim: int, temperature: float, how: dict[str, Any]) -> None:
        super().__init__()
        self.start = math.log(temperature)
        self.down = nn.Parameter(torch.empty(dim, columns, **how)) if dim else None
        self.log_temperature = nn.Parameter(torch.empty(1, **how))

    def forward(self, x_TX: Tensor, weight_ED: Tensor) -> Tensor:
        x_TD = x_TX.float() if self.down is None else linear(x_TX, self.down)
        cosine_TE = F.normalize(x_TD, dim=-1) @ F.normalize(weight_ED.float(), dim=-1).T
        return cosine_TE / self.log_temperature.float().exp()


@router("cosine", paper="arXiv:2204.09179")
class CosineRouter(Scored):
    """Cosines to expert directions in a small space."""

    class Settings(ScoredSettings):
        """Parameters of the cosine router.

        Parameters
        ----------
        dim : int, >= 0
            Dimensions of the space; 0: the hidden one.
        temperature : float, > 0
            Where the learned temperature starts.
        """

        dim: int = Field(default=16, ge=0)
        temperature: float = Field(default=0.3, gt=0)

    rowless = ("cosine.down", "cosine.log_temperature")
    adopt = Router.adopt

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.cosine = Cosine(hidden, self.settings.dim, self.settings.temperature, self.how)

    @property
    def columns(self) -> int:
        return int(self.settings.dim) or self.hidden_dim

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        logits_TE = self.cosine(x_TH, self.weight)
        return self.decide(logits_TE, self.score(logits_TE))

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        super().reset(std)
        self.cosine.log_temperature.fill_(self.cosine.start)
