"""The problem that auxiliary-loss-free balancing solves: a balanced assignment, seen from its dual (arXiv:2512.03915).

For fixed scores g of a batch, balanced routing is a linear program, and the selection bias b its price:

    maximise sum_ti g_ti x_ti   with sum_i x_ti = K,  sum_t x_ti = L_i,  0 <= x <= 1
    D(b)     = sum_t TopKsum(g_t + b) - sum_i L_i b_i        convex, piecewise linear, min_b D(b) = the optimum above
    dD/db_i  = A_i - L_i                                     A_i: load of expert i under top-K of g + b

so selecting is the exact primal step, and the update of the bias a subgradient step on D. What follows from it:

    improvement  D(b+) - D(b) <= sum_i (A+_i - L_i)(b+_i - b_i): D falls unless an expert changed sides of L_i
    preference   a token that drops expert k for k' had g_k + b_k - g_k' - b_k' <= delta b_k' - delta b_k
    balance      at a minimum of D in general position at most E - 1 tokens are tied, whatever T is

`follow` runs a rule on one batch of scores and measures all of this. The bounds are derived here from the convexity of
D; the theorems of the paper may state other constants. Batches that change are the business of `online`.
"""

# Shapes: T tokens, E experts, K experts per token, S steps

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linprog
from scipy.sparse import coo_array
from torch import Tensor

from coterie.balancing.bias import Rule, Schedule, biased, initial, step
from coterie.balancing.loads import count, target_loads
from coterie.errors import UsageError


def top_k_of(score_TE: Tensor, bias_E: Tensor, k: int, rule: Rule = "sign") -> Tensor:
    """Selected experts of every token, best first. Shape [T, K] (leading dimensions are kept), int64."""
    return biased(score_TE, bias_E, rule).topk(k, dim=-1).indices


def loads(score_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """A_i: assignments to each expert under this bias. Shape [E], int64."""
    return count(top_k_of(score_TE, bias_E, k), score_TE.shape[-1])


def dual_value(score_TE: Tensor, bias_E: Tensor, k: int, target_E: Tensor | None = None) -> Tensor:
    """D(b), the total best biased score less what the bias costs at balance. Scalar, float64."""
    bias_E = bias_E.double()
    best = (score_TE.double() + bias_E).topk(k, dim=-1).values.sum((-2, -1))
    return best - (_wanted(score_TE, k, target_E) * bias_E).sum(-1)


def subgradient(score_TE: Tensor, bias_E: Tensor, k: int, target_E: Tensor | None = None) -> Tensor:
    """A - L, a subgradient of D at b. Shape [E], float64; it sums to 0."""
    return loads(score_TE, bias_E, k).double() - _wanted(score_TE, k, target_E)


@dataclass(frozen=True)
class Optimum:
    """The balanced assignment: its value, the shares x [T, E], and prices b [E] that make top-K agree with it."""

    value: float
    share_TE: Tensor
    bias_E: Tensor


def optimum(score_TE: Tensor, k: int, target_E: Tensor | None = None) -> Optimum:
    """Solve the balanced assignment exactly (HiGHS). Thousands of tokens take seconds.

    Raises UsageError where no assignment has these loads: an expert wanted by more than all tokens.
    """
    tokens, experts = score_TE.shape
    wanted_E = _wanted(score_TE, k, target_E)
    if float(wanted_E.max()) > tokens:
        raise UsageError(f"an expert cannot get {float(wanted_E.max()):g} of {tokens} tokens", "Lower its target.")
    cell = np.arange(tokens * experts)
    rows = np.concatenate([cell // experts, tokens + cell % experts])
    sums = coo_array((np.ones(2 * len(cell)), (rows, np.concatenate([cell, cell]))), (tokens + experts, len(cell)))
    sides = np.concatenate([np.full(tokens, float(k)), wanted_E.numpy()])
    solved = linprog(-score_TE.double().flatten().numpy(), A_eq=sums.tocsc(), b_eq=sides, bounds=(0, 1))
    if solved.status != 0:
        raise UsageError(f"the balanced assignment was not solved: {solved.message}")
    return Optimum(
        value=-float(solved.fun),
        share_TE=torch.from_numpy(solved.x).view(tokens, experts),
        bias_E=torch.from_numpy(solved.eqlin.marginals[tokens:].copy()),
    )


def moves(before_TK: Tensor, after_TK: Tensor, experts: int) -> Tensor:
    """Tokens that dropped expert k and took expert k', for all pairs. Shape [E, E], k in rows, float64."""
    was_TE, is_TE = (
        torch.zeros(len(index), experts, dtype=torch.float64).scatter_(1, index, 1.0) for index in (before_TK, after_TK)
    )
    return (was_TE * (1 - is_TE)).T @ (is_TE * (1 - was_TE))


def disobedient(move_EE: Tensor, delta_E: Tensor) -> int:
    """Moves against the preference rule: to an expert whose bias rose less than that of the expert left.

    The rule is exact in real numbers; differences at the rounding of float64 biases do not count.
    """
    against_EE = delta_E[None, :] < delta_E[:, None] - 1e-12
    return int(move_EE[against_EE].sum())


def rise_bound(load_E: Tensor, wanted_E: Tensor, delta_E: Tensor) -> Tensor:
    """sum_i (A+_i - L_i) delta_i with the loads after the step: D cannot have risen by more. Scalar, float64."""
    return ((load_E.double() - wanted_E.double()) * delta_E.double()).sum(-1)


@dataclass(frozen=True)
class Trace:
    """What a rule did on one batch of scores. Entry s belongs to the bias after s updates; entry 0 to no bias.

    dual_S : D(b).
    max_vio_S : largest load over its target, minus 1.
    deviation_S : largest |A_i - L_i|, in assignments.
    rise_S : D now less D one update before (0 at entry 0); bound_S : what convexity allows it to be.
    flip_bound_S : the part of the bound due to experts that changed sides of their target, never negative.
    disobedient : moves against the preference rule, over all updates; moved : all moves.
    bias_E, load_E : the last ones.
    """

    dual_S: Tensor
    max_vio_S: Tensor
    deviation_S: Tensor
    rise_S: Tensor
    bound_S: Tensor
    flip_bound_S: Tensor
    disobedient: int
    moved: int
    bias_E: Tensor
    load_E: Tensor


def follow(
    score_TE: Tensor,
    k: int,
    rule: Rule = "sign",
    u: float = 1e-3,
    steps: int = 1000,
    *,
    target_E: Tensor | None = None,
    schedule: Schedule = "constant",
) -> Trace:
    """Run a rule on the same scores again and again, in float64, and keep every figure of the theory.

    Raises UsageError for the multiplicative rule: it is no subgradient step on D.
    """
    if rule == "multiplicative":
        raise UsageError("the multiplicative rule has no dual value", "Follow an additive rule: sign, proportional.")
    score_TE, experts = score_TE.double(), score_TE.shape[-1]
    wanted_E = _wanted(score_TE, k, target_E)
    none_E = bias_E = initial(experts, rule, torch.float64)
    index_TK = top_k_of(score_TE, bias_E, k)
    load_E, term_E = count(index_TK, experts), none_E
    rows, wrong, moved = [], 0, 0
    for n in range(steps + 1):
        if n:
            before_TK, before_E, before_load_E = index_TK, bias_E, load_E
            bias_E = step(before_E, before_load_E, rule, u, target_E, schedule=schedule, iteration=n)
            index_TK = top_k_of(score_TE, bias_E, k)
            load_E = count(index_TK, experts)
            # centring adds a constant to all biases, which costs nothing: the bound is that of the plain sign step
            plain: Rule = "sign" if rule == "centred" else rule
            delta_E = step(none_E, before_load_E, plain, u, target_E, schedule=schedule, iteration=n)
            term_E = (load_E - wanted_E) * delta_E
            if not torch.equal(index_TK, before_TK):
                move_EE = moves(before_TK, index_TK, experts)
                wrong, moved = wrong + disobedient(move_EE, bias_E - before_E), moved + int(move_EE.sum())
        vio, deviation = (load_E / wanted_E).max() - 1, (load_E - wanted_E).abs().max()
        dual = dual_value(score_TE, bias_E, k, target_E)
        rows.append(torch.stack([dual, vio, deviation, term_E.sum(), term_E.clamp(min=0).sum()]))
    dual_S, vio_S, deviation_S, bound_S, flip_S = torch.stack(rows).T
    rise_S = torch.cat([dual_S.new_zeros(1), dual_S.diff()])
    return Trace(dual_S, vio_S, deviation_S, rise_S, bound_S, flip_S, wrong, moved, bias_E, load_E)


def _wanted(score_TE: Tensor, k: int, target_E: Tensor | None) -> Tensor:
    """L, for the assignments of a batch. Shape [E], float64."""
    tokens, experts = score_TE.shape[-2:]
    return target_loads(torch.full((experts,), tokens * k / experts, dtype=torch.float64), target_E)
