"""Statistics per domain for pruning to a domain: what tokens owe to experts, and which experts routers are sure of.

`TokenContribution` is EASY-EP's sum (arXiv:2504.06792), `tcess` makes PreMoe's (arXiv:2505.17639). Both are kept per
domain, so one profile holds all domains and mixing them later costs nothing.
"""

# T tokens, H hidden, E experts, K experts per token, A candidates, R rows routed to one expert, D domains

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from coterie.errors import UsageError
from coterie.profiling.observers import ExpertRows, LayerShape, Observer, Routing

ROWS = 2048  # tokens whose hidden states are widened to float64 at a time

Shift = Literal["none", "mean", "logsumexp"]


class TokenContribution(Observer):
    """contribution_DE: sum over a domain's tokens of s_t * g_te * ||f_e(x_t)||_2, of the experts each token selected.

    s_t = 1 - cos(h_t, h_t + m * sum_e g_te f_e(x_t)): how far the routed experts turn the hidden state h_t from before
    the norm. Shared experts are no part of the sum; m is the layer's residual multiplier, 1 for most families.
    """

    fields = {"contribution_DE": "sum"}
    watches_outputs = True
    watches_sum = True
    needs_residual = True

    def __init__(self, shape: LayerShape) -> None:
        super().__init__(shape)
        self.contribution_DE = torch.zeros(shape.domains, shape.experts, dtype=torch.float64)
        self._rows: list[tuple[int, Tensor, Tensor]] = []  # of the present batch: expert, tokens, gated norms

    def see_routing(self, routing: Routing) -> None:
        self._rows.clear()

    def see_outputs(self, rows: ExpertRows) -> None:
        gated_R = rows.weight_R.double() * rows.y_RH.float().norm(dim=-1).double()
        self._rows.append((rows.expert, rows.token_R, gated_R))

    def see_sum(self, routing: Routing, sum_TH: Tensor) -> None:
        assert routing.residual_TH is not None
        turned_T = turned(routing.residual_TH, sum_TH, self.shape.residual_multiplier)
        for expert, token_R, gated_R in self._rows:
            part_D = torch.bincount(
                routing.domain_T[token_R], weights=gated_R * turned_T[token_R], minlength=self.shape.domains
            )
            self.contribution_DE[:, expert] += part_D.cpu()
        self._rows.clear()


def turned(h_TH: Tensor, added_TH: Tensor, multiplier: float = 1.0) -> Tensor:
    """1 - cos(h, h + multiplier * added) per row, [T] float64, never negative.

    Computed as half the squared distance of the unit vectors: 1 - cos itself would lose its digits where cos is near 1.
    """
    parts = []
    for h, added in zip(torch.split(h_TH, ROWS), torch.split(added_TH, ROWS), strict=True):
        before, after = h.double(), h.double() + multiplier * added.double()
        unit, moved = (torch.nn.functional.normalize(v, dim=-1, eps=1e-300) for v in (before, after))
        parts.append((unit - moved).square().sum(-1) / 2)
    return torch.cat(parts)


def tcess(candidates: int = 1, threshold: float = -1.0, shift: Shift = "none") -> type[Observer]:
    """PreMoe's task-conditioned expected selection score, as an observer class.

    Parameters
    ----------
    candidates : the K_a largest logits of a token may count; at most E.
    threshold : r; only candidates with at least this probability among the candidates count. -1: all of them.
    shift : "none" for raw logits; "mean" subtracts the mean of all logits of the token; "logsumexp" takes
        exp(z - logsumexp(z)), the probability among all experts. The last two do not depend on a constant that a
        softmax router may add to all logits.
    """
    return _tcess(int(candidates), float(threshold), shift)


def tcess_name(candidates: int = 1, threshold: float = -1.0, shift: Shift = "none") -> str:
    """Name of the statistic that `tcess` of the same parameters records, [D, E]."""
    return f"tcess_{candidates}_{float(threshold)!r}_{shift}_DE"


@functools.cache
def _tcess(candidates: int, threshold: float, shift: Shift) -> type[Observer]:
    name = tcess_name(candidates, threshold, shift)

    class Tcess(Observer):
        """tcess_..._DE: sum over a domain's tokens of confident logits, 0 for all other experts. tokens_D: its tokens.

        A logit is confident if it is among the K_a largest of the token and has at least probability r among those.
        Logits are raw: before softmax or sigmoid, with a bias of the router but without one for selection only.
        """

        fields = {name: "sum", "tokens_D": "sum"}
        needs_logits = True

        def __init__(self, shape: LayerShape) -> None:
            super().__init__(shape)
            check_candidates(candidates, shape.experts)
            self.sum_DE = torch.zeros(shape.domains, shape.experts, dtype=torch.float64)
            self.tokens_D = torch.zeros(shape.domains, dtype=torch.int64)

        def see_routing(self, routing: Routing) -> None:
            if routing.logits_TE is None:
                return
            score_TE = confident(routing.logits_TE, candidates, threshold, shift)
            self.sum_DE += torch.zeros_like(self.sum_DE).index_add_(0, routing.domain_T.cpu(), score_TE.cpu())
            self.tokens_D += torch.bincount(routing.domain_T, minlength=self.shape.domains).cpu()

        def state(self) -> dict[str, Tensor]:
            return {name: self.sum_DE, "tokens_D": self.tokens_D}

    return Tcess


def check_candidates(candidates: int, experts: int) -> None:
    """Raise UsageError for more candidates than experts."""
    if not 1 <= candidates <= experts:
        raise UsageError(
            f"{candidates} candidates per token of {experts} experts", f"Use a number from 1 to {experts}."
        )


def confident(logits_TE: Tensor, candidates: int = 1, threshold: float = -1.0, shift: Shift = "none") -> Tensor:
    """What each expert counts for at each token, [T, E] float64: see `tcess`."""
    logits_TE = logits_TE.double()
    best_TA, index_TA = logits_TE.topk(candidates, dim=-1)
    sure_TA = best_TA.softmax(-1) >= threshold
    if shift == "mean":
        best_TA = best_TA - logits_TE.mean(-1, keepdim=True)
    elif shift == "logsumexp":
        best_TA = (best_TA - logits_TE.logsumexp(-1, keepdim=True)).exp()
    return torch.zeros_like(logits_TE).scatter_(1, index_TA, best_TA * sure_TA)
