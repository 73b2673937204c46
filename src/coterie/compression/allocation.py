"""Which of several things gets which of several widths, so that the sum of costs is smallest within a budget.

Every item takes exactly one option; option j of item i costs cost_IN[i, j] and weighs the same for all items. Widths
above the smallest may be asked to occur at least once (MC, arXiv:2410.06270). This is a multiple-choice knapsack:
`integer_program` hands it to scipy's HiGHS, `dynamic_program` solves it exactly without a solver, to check the other.

It does not know what is allocated.
"""

# I items, N options

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.optimize
from torch import Tensor

from coterie.errors import UsageError


def least_budget(items: int, widths: Sequence[int], *, each_occurs: bool) -> int:
    """The smallest budget that can be met."""
    smallest, *larger = sorted(widths)
    return items * smallest + (sum(width - smallest for width in larger) if each_occurs else 0)


def check_budget(items: int, widths: Sequence[int], budget: int, *, each_occurs: bool) -> None:
    """Raise UsageError for a budget that no choice meets."""
    if each_occurs and items < len(widths):
        raise UsageError(f"{items} experts cannot take each of {len(widths)} widths", "Allow fewer widths.")
    least = least_budget(items, widths, each_occurs=each_occurs)
    if budget < least:
        raise UsageError(
            f"{budget} bits for {items} experts are too few: widths {', '.join(map(str, widths))} take at least {least}"
            f" ({least / items:.3f} per expert)",
            "Raise the mean, or allow a smaller width.",
        )


def _occurs(items: int, widths: Sequence[int], budget: int, each_occurs: bool) -> list[int]:
    """Options that have to occur: none of them where everything can have the largest width."""
    if not each_occurs or budget >= items * max(widths):
        return []
    return [j for j, width in enumerate(widths) if width != min(widths)]


def integer_program(cost_IN: Tensor, widths: Sequence[int], budget: int, *, each_occurs: bool = False) -> list[int]:
    """The width of each item with the smallest total cost and at most `budget` in all, by scipy's milp.

    Raises UsageError for a budget that cannot be met.
    """
    items, options = cost_IN.shape
    check_budget(items, widths, budget, each_occurs=each_occurs)
    cost = cost_IN.double().numpy()
    scale = float(np.abs(cost).max()) or 1.0  # the solver's tolerances are absolute
    one_each = np.kron(np.eye(items), np.ones(options))
    rows = [scipy.optimize.LinearConstraint(one_each, 1, 1)]
    rows.append(scipy.optimize.LinearConstraint(np.tile(np.asarray(widths, float), items)[None], -np.inf, budget))
    for j in _occurs(items, widths, budget, each_occurs):
        picks = np.tile(np.eye(options)[j], items)[None]
        rows.append(scipy.optimize.LinearConstraint(picks, 1, np.inf))
    solved = scipy.optimize.milp(
        cost.ravel() / scale,
        constraints=rows,
        integrality=np.ones(items * options),
        bounds=scipy.optimize.Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RuntimeError(f"the integer program was not solved: {solved.message}")
    chosen = solved.x.reshape(items, options).argmax(1)
    return [widths[j] for j in chosen]


def dynamic_program(cost_IN: Tensor, widths: Sequence[int], budget: int, *, each_occurs: bool = False) -> list[int]:
    """As `integer_program`, by dynamic programming over (item, bits used, widths that have occurred).

    Takes items * budget * options * 2^(options - 1) steps. Of equal choices the one with narrower first items.
    """
    items, options = cost_IN.shape
    check_budget(items, widths, budget, each_occurs=each_occurs)
    cost = cost_IN.double().numpy()
    needed = _occurs(items, widths, budget, each_occurs)
    flag = {j: 1 << n for n, j in enumerate(needed)}
    states = 1 << len(needed)
    best = np.full((budget + 1, states), np.inf)
    best[0, 0] = 0.0
    came: list[np.ndarray] = []
    for i in range(items):
        after = np.full_like(best, np.inf)
        choice = np.zeros((budget + 1, states, 2), dtype=np.int64)  # option taken, and flags before it
        for j in sorted(range(options), key=lambda j: widths[j]):
            width = widths[j]
            if width > budget:
                continue
            for before in range(states):
                now = before | flag.get(j, 0)
                reached = best[: budget + 1 - width, before] + cost[i, j]
                better = reached < after[width:, now]
                after[width:, now][better] = reached[better]
                choice[width:, now][better] = (j, before)
        best = after
        came.append(choice)
    used, state = int(best[:, states - 1].argmin()), states - 1
    found: list[int] = []
    for choice in reversed(came):
        j, before = choice[used, state]
        found.append(widths[int(j)])
        used, state = used - widths[int(j)], int(before)
    return found[::-1]
