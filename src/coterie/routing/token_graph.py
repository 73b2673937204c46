"""What routers that let tokens decide together share: averages of gates over a graph of tokens (arXiv:2505.00792).

A token's expert is the one that a random peer would take. With g the gate and S_ij the chance that j is i's peer:

    G~_i = w G_i + (1 - w) sum_j S_ij G_j      rows of S sum to one, j = i is a peer; w = `self_weight`, 0 in the paper

and then the k largest of G~_i are picked. Experts receive the token's own hidden state; only selection and weights are
averaged. Where S comes from is the business of `similarity` and `attention_aware`. Here is who can be a peer:

    causal      no later token; otherwise a model cannot generate
    padding     never, on either side; padding itself has only itself
    packed      only tokens of the same sequence
    `peers`     "all", or "lower_entropy": only tokens at least as sure, H(G_j) <= H(G_i), for which the paper proves
                that averages over the nearest (tau or sigma to 0) are not less sure than the token was

Entropy, in any case: sum_j S_ij H(G_j) <= H(G~_i) <= sum_j S_ij H(G_j) + H(S_i).

S is made in pieces of `rows` tokens; in training pieces are made again for their gradients instead of kept, so that
memory grows with rows * S, not with L * S.
"""

# B batch, L sequence of this call, S tokens so far (with those in the cache), R rows of a piece, E experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coterie.routing.base import Routing, entropy, linear
from coterie.routing.record import Here
from coterie.routing.scored import Scored, ScoredSettings


@dataclass
class Piece:
    """Tokens start .. stop of this call. allowed_BRS : who can be a peer; own_RS : the token itself, always allowed."""

    start: int
    stop: int
    allowed_BRS: Tensor
    own_RS: Tensor

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


Weights = Callable[[Piece], Tensor]  # S_BRS of these tokens


class GraphSettings(ScoredSettings):
    """Of routers that average over tokens.

    Parameters
    ----------
    peers : str
        "all" or "lower_entropy".
    self_weight : float, 0 to 1
        Share of a token's own gate besides its place among the peers; 1 is the plain router.
    rows : int, >= 1
        Tokens whose peers are weighed at once.
    """

    peers: Literal["all", "lower_entropy"] = "all"
    self_weight: float = Field(default=0.0, ge=0, le=1)
    rows: int = Field(default=512, ge=1)


@dataclass
class Peers:
    """Who can be a peer of whom. The last L of the S tokens are those of this call.

    mask_BS : which tokens are no padding. segment_BS : which sequence they are of. pairs_BLS : which see which, where a
    call says it pair by pair. entropy_BS : of their gates, where only those at least as sure count. None: no limit.
    """

    length: int
    mask_BS: Tensor | None = None
    segment_BS: Tensor | None = None
    entropy_BS: Tensor | None = None
    causal: bool = True
    pairs_BLS: Tensor | None = None

    @classmethod
    def of(cls, here: Here, B: int, L: int, S: int) -> Peers:
        """As the call says: S >= L tokens are known."""
        record = here.record
        assert record is not None
        mask_BS, segment_BS = record.mask_BS, record.segment_BL
        if segment_BS is not None and S > L:  # earlier tokens are of the sequence that goes on
            segment_BS = torch.cat([segment_BS.new_zeros(B, S - L), segment_BS], 1)
        return cls(L, mask_BS, segment_BS, pairs_BLS=record.pairs_BLS)

    def last(self, S: int) -> Peers:
        """Of only the last S tokens: those that a window of attention sees."""
        told = (self.mask_BS, self.segment_BS, self.entropy_BS, self.pairs_BLS)
        mask_BS, segment_BS, entropy_BS, pairs_BLS = (None if each is None else each[..., -S:] for each in told)
        return Peers(self.length, mask_BS, segment_BS, entropy_BS, self.causal, pairs_BLS)

    def piece(self, start: int, stop: int, S: int, device: torch.device) -> Piece:
        """This call's tokens start .. stop, with S tokens to choose from."""
        own_R = torch.arange(S - self.length + start, S - self.length + stop, device=device)
        key_S = torch.arange(S, device=device)
        allowed = (key_S <= own_R[:, None] if self.causal else key_S.expand(len(own_R), S) >= 0)[None]
        if self.mask_BS is not None:
            allowed = allowed & self.mask_BS[:, None, :] & self.mask_BS[:, own_R, None]
        if self.pairs_BLS is not None:
            allowed = allowed & self.pairs_BLS[:, start:stop]
        if self.segment_BS is not None:
            allowed = allowed & (self.segment_BS[:, None, :] == self.segment_BS[:, own_R, None])
        if self.entropy_BS is not None:
            allowed = allowed & (self.entropy_BS[:, None, :] <= self.entropy_BS[:, own_R, None])
        own_RS = key_S == own_R[:, None]
        return Piece(start, stop, allowed | own_RS, own_RS)


def stochastic(log_BRS: Tensor, piece: Piece, *, finite: bool = False) -> Tensor:
    """Rows that sum to one, from logarithms of weights; a token for whom nobody has a weight is its own only peer.

    Several heads may stand between B and R. finite : all weights are above 0, so that each token has a peer: itself.
    """
    allowed = piece.allowed_BRS if log_BRS.dim() == 3 else piece.allowed_BRS[:, None]
    log_BRS = log_BRS.masked_fill(~allowed, -torch.inf)
    if finite:
        return log_BRS.softmax(-1)
    nobody = log_BRS.detach().amax(-1, keepdim=True) == -torch.inf
    return log_BRS.masked_fill(nobody & piece.own_RS, 0.0).softmax(-1)


def averaged(value_BSE: Tensor, weights: Weights, peers: Peers, rows: int) -> Tensor:
    """S times the values, [B, L, E], piece by piece."""
    S, L = value_BSE.shape[1], peers.length

    def piece(start: int, stop: int) -> Tensor:
        return weights(peers.piece(start, stop, S, value_BSE.device)) @ value_BSE

    if rows >= L:
        return piece(0, L)
    bounds = [(start, min(start + rows, L)) for start in range(0, L, rows)]
    if torch.is_grad_enabled():
        return torch.cat([checkpoint(piece, *bound, use_reentrant=False) for bound in bounds], 1)
    return torch.cat([piece(*bound) for bound in bounds], 1)


class TokenGraph(Scored):
    """Base of these routers: `weights` is what they are."""

    Settings = GraphSettings

    def weights(self, x_BLH: Tensor, known: int, here: Here) -> tuple[Weights, int]:
        """S by rows, and of how many of the last `known` tokens it has columns."""
        raise NotImplementedError

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        B, L = here.rows(x_TH.shape[0])
        logits_TE = linear(x_TH, self.weight)
        score_TE = self.score(logits_TE)
        value_BSE = here.growing("score", score_TE.view(B, L, -1))
        peers = Peers.of(here, B, L, value_BSE.shape[1])
        if self.settings.peers == "lower_entropy":
            peers.entropy_BS = entropy(value_BSE / value_BSE.sum(-1, keepdim=True)).detach()
        weights, columns = self.weights(x_TH.view(B, L, -1), value_BSE.shape[1], here)
        if columns < value_BSE.shape[1]:
            value_BSE, peers = value_BSE[:, -columns:], peers.last(columns)
        mixed_TE = averaged(value_BSE, weights, peers, self.settings.rows).reshape(score_TE.shape)
        own = self.settings.self_weight
        return self.decide(logits_TE, own * score_TE + (1 - own) * mixed_TE if own else mixed_TE)
