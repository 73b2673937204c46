"""The rules of auxiliary-loss-free balancing: a bias per expert that only the selection sees (arXiv:2408.15664).

After each optimizer step the bias of an overloaded expert falls and that of an underloaded one rises, by a fixed rule
and without a gradient. With c_i assignments to expert i over the whole global batch and cbar_i its target:

    selected_t = top-K_i (s_it + b_i)                 weights of the mixture come from s alone
    e_i        = cbar_i - c_i                         positive = underloaded
    sign            b_i += u sign(e_i)                init 0
    proportional    b_i += u e_i                      init 0, e in assignments
    multiplicative  b_i += u sign(e_i)                init 1, selected on s_it b_i
    centred         b_i += u (sign(e_i) - mean sign)  init 0, the mean of b stays (Moonlight, torchtitan)

u may fall with the number n of the update: u, u/n, u/sqrt(n); which of them has which regret is told by
arXiv:2512.03915 (`assignment`, `online`). Pure functions on tensors: who counts, sums over ranks and calls them once
per optimizer step is not known here. bfloat16 is refused: at values near 1 a step of 0.001 would vanish in it.
"""

# Shapes: T tokens, E experts

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from coterie.balancing.loads import target_loads
from coterie.errors import UsageError

Rule = Literal["sign", "proportional", "multiplicative", "centred"]
Schedule = Literal["constant", "1/n", "1/sqrt(n)"]

RULES: tuple[Rule, ...] = get_args(Rule)
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def initial(experts: int, rule: Rule = "sign", dtype: torch.dtype = torch.float32) -> Tensor:
    """The bias before the first update: it leaves every selection as it is. Shape [E]."""
    return torch.full((experts,), 1.0 if _known(rule) == "multiplicative" else 0.0, dtype=dtype)


def biased(score_TE: Tensor, bias_E: Tensor, rule: Rule = "sign") -> Tensor:
    """What the selection ranks; never a mixture weight. Shape as the scores."""
    return score_TE * bias_E if _known(rule) == "multiplicative" else score_TE + bias_E


def size(u: float, schedule: Schedule = "constant", iteration: int = 1) -> float:
    """Step size of update number `iteration`, counted from 1."""
    if schedule not in SCHEDULES:
        raise UsageError(f"unknown schedule {schedule!r} of the step size", f"Choose one of {', '.join(SCHEDULES)}.")
    if iteration < 1:
        raise UsageError(f"updates are counted from 1, not {iteration}")
    return u if schedule == "constant" else u / iteration if schedule == "1/n" else u / iteration**0.5


def step(
    bias_E: Tensor,
    load_E: Tensor,
    rule: Rule = "sign",
    u: float = 1e-3,
    target_E: Tensor | None = None,
    *,
    schedule: Schedule = "constant",
    iteration: int = 1,
) -> Tensor:
    """The bias after one update; the old one is left alone. Shape as `bias_E`, its dtype.

    Parameters
    ----------
    bias_E : float32 or float64, [E] or [..., E] (layers, runs).
    load_E : assignments that the old bias led to, over the whole global batch, same shape.
    rule : see above.
    u : step size, in units of the scores ("proportional": of the scores per assignment).
    target_E : wanted loads at any scale; all equal where None.
    schedule, iteration : how u falls, and the number of this update, from 1.

    Raises UsageError for unknown names and for a bias of low precision.
    """
    if bias_E.dtype not in (torch.float32, torch.float64):
        raise UsageError(f"a selection bias in {bias_E.dtype} would lose its updates", "Keep it in float32.")
    error_E = target_loads(load_E, target_E) - load_E.double()
    move_E = error_E if _known(rule) == "proportional" else error_E.sign()
    if rule == "centred":
        move_E = move_E - move_E.mean(-1, keepdim=True)
    return bias_E + (size(u, schedule, iteration) * move_E).to(bias_E)


def _known(rule: Rule) -> Rule:
    if rule not in RULES:
        raise UsageError(f"unknown balancing rule {rule!r}", f"Choose one of {', '.join(RULES)}.")
    return rule
