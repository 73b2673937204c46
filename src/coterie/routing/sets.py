"""From sets of experts, one per token and of any size, to the slots that the router contract speaks of."""

# T tokens, N router outputs, K slots per token

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def slots(chosen_TN: Tensor, by_TN: Tensor) -> Tensor:
    """The chosen outputs of each token as [T, K], the best by `by_TN` first, empty slots N.

    K is the size of the largest set, at least 1.
    """
    N = chosen_TN.shape[-1]
    K = max(int(chosen_TN.sum(-1).max()), 1)
    index_TK = by_TN.detach().masked_fill(~chosen_TN, -torch.inf).topk(K, dim=-1).indices
    return index_TK.masked_fill(~chosen_TN.gather(-1, index_TK), N)


def at(value_TN: Tensor, index_TK: Tensor) -> Tensor:
    """The values in the slots; 0 in empty ones."""
    return F.pad(value_TN, (0, 1)).gather(-1, index_TK)
