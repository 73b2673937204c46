"""A router of two layers: z = W gelu(V x). More parameters and no memory, the baseline of recurrent routers.

In the experiments of arXiv:2408.06793 it is not better than a linear router; that is what it is here to show.
"""

# T tokens, H hidden, P inner size, E experts

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.routing.base import Router, RouterSettings, Routing, linear, router
from coterie.routing.record import Here
from coterie.routing.scored import Scored, ScoredSettings


@router("mlp", paper="arXiv:2408.06793")
class MLPRouter(Scored):
    """Two layers with a GELU between them."""

    class Settings(ScoredSettings):
        """Parameters of the two-layer router.

        Parameters
        ----------
        size : int, >= 1
            Inner size P.
        """

        size: int = Field(default=128, ge=1)

    rowless = ("projection",)
    adopt = Router.adopt

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        self.projection = nn.Parameter(torch.empty(self.settings.size, hidden, **self.how))

    @property
    def columns(self) -> int:
        return int(self.settings.size)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        logits_TE = linear(F.gelu(linear(x_TH, self.projection)), self.weight)
        return self.decide(logits_TE, self.score(logits_TE))
