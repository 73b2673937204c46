"""Hash layers: a token's experts are looked up by its id, in a random table that never changes (arXiv:2106.04426).

    picked: row (id mod V) of the table, K distinct experts          weights: 1 ("unit")

There is nothing to learn and nothing to balance; each layer has a table of its own. It is the baseline that a learned
router has to beat. The table is drawn from torch's generator and saved with the model. "raw" and "renormalised" both
weigh with 1 / K.

Differs from the paper: several experts per token; its balanced and clustered tables are not offered.
"""

# T tokens, V rows of the table, E experts, K experts per token

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.errors import UsageError
from coterie.routing.base import Combine, Router, RouterSettings, Routing, combined, router
from coterie.routing.record import Here


@router("hash", paper="arXiv:2106.04426")
class Hash(Router):
    """A fixed table from token ids to experts."""

    class Settings(RouterSettings):
        """Parameters of the hash router.

        Parameters
        ----------
        vocabulary : int
            Rows of the table; larger ids start again at its top. Put into a model, it is the model's vocabulary.
        """

        combine: Combine = "unit"
        vocabulary: int = Field(default=32768, ge=1)

    unsliceable = "looks experts up in a table, by their number"

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        size = (self.settings.vocabulary, self.settings.top_k)
        self.table = nn.Buffer(torch.zeros(size, dtype=torch.int32, device=self.how["device"]))

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        index_TK = self.table[here.ids_T % self.table.shape[0], : self.top_k].long()
        chosen_TE = F.one_hot(index_TK, self.num_experts).sum(1).float()
        probability_TE = chosen_TE / self.top_k
        weight_TK = combined(probability_TE.gather(-1, index_TK), self.settings.combine)
        return Routing(chosen_TE, probability_TE, index_TK, weight_TK, self.num_experts, self.settings.combine)

    def dial(self, **values: Any) -> None:
        V, K = self.table.shape
        if values.get("top_k", 1) > K or values.get("vocabulary", V) != V:
            raise UsageError(f"the table of a hash router was made for {V} ids and {K} experts each")
        super().dial(**values)

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        V, K = self.table.shape
        self.table.copy_(torch.rand(V, self.num_experts).topk(K, dim=-1).indices)
