"""Intervals for means over text: resample whole sequences, because tokens of one sequence are not independent."""

# S sequences, R resamples

from __future__ import annotations

import torch
from torch import Tensor


def interval(
    sum_S: Tensor, tokens_S: Tensor, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean per token with its bootstrap interval.

    Parameters
    ----------
    sum_S : sum of a quantity over each sequence; differences of two models give a paired interval.
    tokens_S : tokens of each sequence.

    Returns (mean, low, high). With a single sequence the interval is the mean itself.
    """
    sum_S, tokens_S = sum_S.double(), tokens_S.double()
    mean = float(sum_S.sum() / tokens_S.sum())
    if len(sum_S) < 2:
        return mean, mean, mean
    generator = torch.Generator().manual_seed(seed)
    pick_RS = torch.randint(len(sum_S), (resamples, len(sum_S)), generator=generator)
    mean_R = sum_S[pick_RS].sum(1) / tokens_S[pick_RS].sum(1)
    tail = (1 - level) / 2
    low, high = torch.quantile(mean_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return mean, low, high
