"""Intervals for means over text: resample whole sequences, because tokens of one sequence are not independent."""

# S sequences, R resamples

from __future__ import annotations

from collections.abc import Sequence

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
    return stratified([(sum_S, tokens_S)], resamples=resamples, level=level, seed=seed)


def stratified(
    strata: Sequence[tuple[Tensor, Tensor]], *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean over strata (domains) of the mean per token, every stratum resampled by itself: (mean, low, high).

    strata : (sum_S, tokens_S) of each, as in `interval`.
    """
    generator = torch.Generator().manual_seed(seed)
    means, draws = [], []
    for sum_S, tokens_S in strata:
        sum_S, tokens_S = sum_S.double(), tokens_S.double()
        means.append(float(sum_S.sum() / tokens_S.sum()))
        pick_RS = torch.randint(len(sum_S), (resamples, len(sum_S)), generator=generator)
        draws.append(sum_S[pick_RS].sum(1) / tokens_S[pick_RS].sum(1))
    mean = sum(means) / len(means)
    if all(len(sum_S) < 2 for sum_S, _ in strata):
        return mean, mean, mean
    mean_R = torch.stack(draws).mean(0)
    tail = (1 - level) / 2
    low, high = torch.quantile(mean_R, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return mean, low, high
