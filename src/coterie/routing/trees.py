"""Binary decisions that end: the smooth step, and the leaves of soft trees and of binary codes (arXiv:2306.02824).

    S(t) = 0 for t <= -w/2,    -2 t^3 / w^3 + 3 t / (2 w) + 1/2 in between,    1 for t >= w/2

S is differentiable once, and outside of its band of width w it is 0 or 1 exactly, with a gradient that is 0 exactly: a
decision made there is final, and what lies behind it need not be computed. A sigmoid never gets so far.

A tree of n leaves has n - 1 inner nodes, numbered as in a heap (the children of q are 2q + 1 and 2q + 2). Any n does:
where n is no power of two the depths of leaves differ by one, and no leaf is out of reach. Leaves are counted from left
to right, so the deeper ones come first. A code of m bits has 2^m words, of which n are used: the others cannot be kept
from having probability (that is DSelect-k, arXiv:2106.03760).
"""

# T tokens, K trees or codes, Q inner nodes (n - 1), M bits, E leaves or words (n)

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-6  # what keeps the logarithm of a probability from minus infinity


def smooth_step(t: Tensor, width: float) -> Tensor:
    """S(t), of the same shape, never below 0 nor above 1."""
    u = (t / width + 0.5).clamp(0.0, 1.0)
    return u.square() * (3 - 2 * u)


def leaves(score_TKQ: Tensor, width: float) -> Tensor:
    """Probabilities [T, K, E] of the leaves of K trees of one shape, E = Q + 1 >= 2; S(score) is that of going left."""
    # 1 - S(t) is S(-t), which has all its digits where S(t) is close to 1
    left_TKQ, right_TKQ = smooth_step(score_TKQ, width), smooth_step(-score_TKQ, width)
    nodes, first = score_TKQ.shape[-1], 0
    mass = torch.ones_like(score_TKQ[..., :1])
    levels: list[Tensor] = []
    while mass.shape[-1]:
        inner = max(min(nodes - first, mass.shape[-1]), 0)  # of a level, inner nodes come before leaves
        levels.append(mass[..., inner:])
        here = slice(first, first + inner)
        both = torch.stack([mass[..., :inner] * left_TKQ[..., here], mass[..., :inner] * right_TKQ[..., here]], -1)
        first, mass = first + mass.shape[-1], both.flatten(-2)
    return torch.cat(levels[::-1], -1)


def words(score_TKM: Tensor, width: float, used: int) -> Tensor:
    """Probabilities [T, K, E] of the first `used` words of K codes; bit b of word j is bit b of the number j.

    Their sum is below 1 where words that are not used have probability.
    """
    one_TKM, zero_TKM = smooth_step(score_TKM, width), smooth_step(-score_TKM, width)
    number_E = torch.arange(used, device=score_TKM.device)
    probability = score_TKM.new_ones(*score_TKM.shape[:-1], used)
    for bit in range(score_TKM.shape[-1]):
        is_one_E = (number_E >> bit & 1).bool()
        probability = probability * torch.where(is_one_E, one_TKM[..., bit, None], zero_TKM[..., bit, None])
    return probability


def saturation(probability_TKE: Tensor) -> Tensor:
    """-sum p log(p + 1e-6) over trees and leaves, [T], in nats: about 0 once every tree has a single leaf left, K log E
    where all are as likely."""
    return -(probability_TKE * (probability_TKE + TINY).log()).sum((-2, -1))
