"""Similarity-aware routing: tokens that are alike decide together (arXiv:2505.00792; see `token_graph`).

    S_ij = softmax over i's peers j of u_i^T W u_j / tau             u what the router receives

W is learned: `full` [H, H] as in the paper, `low-rank` Q^T K, or the `identity`, which has no parameters. "dot"
products are divided by sqrt(H) too, so that tau means the same at any width; "cosine" compares directions only. W
starts as the identity (low-rank: Q = K, whose Q^T Q is the identity on average): tokens first look for tokens like
themselves. With tau near 0, or in a space so wide that a token is far more like itself than like others, S is the
identity and the router the plain one; a larger tau looks further.

With a key-value cache the gates and W u_j of earlier tokens are kept beside it.
"""

# B batch, L sequence of this call, S tokens so far, R rows of a piece, H hidden, D compared numbers

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.routing.base import RouterSettings, linear, router
from coterie.routing.record import Here
from coterie.routing.token_graph import GraphSettings, Piece, TokenGraph, Weights, stochastic


@router("similarity", paper="arXiv:2505.00792")
class Similarity(TokenGraph):
    """Gates averaged over tokens that are alike."""

    class Settings(GraphSettings):
        """Parameters of the similarity-aware router.

        Parameters
        ----------
        tau : float, > 0
            Temperature; of dot products in units of sqrt(H).
        form : str
            W: "full", "low-rank" or "identity".
        rank : int, >= 1
            Of "low-rank".
        metric : str
            "dot" or "cosine".
        """

        tau: float = Field(default=1.0, gt=0)
        form: Literal["full", "low-rank", "identity"] = "full"
        rank: int = Field(default=32, ge=1)
        metric: Literal["dot", "cosine"] = "dot"

    rowless = ("peer_weight", "peer_query", "peer_key")

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        if self.settings.form == "full":
            self.peer_weight = nn.Parameter(torch.empty(hidden, hidden, **self.how))
        elif self.settings.form == "low-rank":
            self.peer_query = nn.Parameter(torch.empty(self.settings.rank, hidden, **self.how))
            self.peer_key = nn.Parameter(torch.empty(self.settings.rank, hidden, **self.how))

    def compared(self, x_BLH: Tensor) -> tuple[Tensor, Tensor]:
        """What is compared, of tokens that look for peers and of those that are looked at: [B, L, D] each."""
        query_BLD, key_BLD = x_BLH.float(), x_BLH.float()
        if self.settings.form == "full":
            key_BLD = linear(x_BLH, self.peer_weight)
        elif self.settings.form == "low-rank":
            query_BLD, key_BLD = linear(x_BLH, self.peer_query), linear(x_BLH, self.peer_key)
        if self.settings.metric == "cosine":
            return F.normalize(query_BLD, dim=-1), F.normalize(key_BLD, dim=-1)
        return query_BLD / math.sqrt(self.hidden_dim), key_BLD

    def weights(self, x_BLH: Tensor, known: int, here: Here) -> tuple[Weights, int]:
        query_BLD, key_BLD = self.compared(x_BLH)
        query_BLD = query_BLD / self.settings.tau
        key_BSD = here.growing("key", key_BLD)

        def rows(piece: Piece) -> Tensor:
            return stochastic(query_BLD[:, piece.rows] @ key_BSD.mT, piece, finite=True)

        return rows, known

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        super().reset(std)
        if self.settings.form == "full":
            self.peer_weight.copy_(torch.eye(self.hidden_dim))
        elif self.settings.form == "low-rank":
            self.peer_query.normal_(0.0, self.settings.rank**-0.5)
            self.peer_key.copy_(self.peer_query)
