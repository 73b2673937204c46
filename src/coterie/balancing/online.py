"""Auxiliary-loss-free balancing when every batch is new: expected dual value and regret of a run (arXiv:2512.03915).

A training step sees a fresh batch, so a rule descends the expected dual D(b) = E D_batch(b), per token here. Where the
scores have a density near the threshold of the selection, D is strongly convex on {sum b = 0}, with some modulus mu,
and for steps b += eps_n (L - A) / T

    regret(n) = sum_{m <= n} D(b_m) - min D     O(log n) for eps_n = c/n with c large enough against 1/mu,
                                                O(sqrt n) for c/sqrt(n), and a linear share ~ u for constant eps = u

To measure regret without noise, D must be known exactly. `GumbelScores` draws s_i = location_i + Gumbel noise, for
which selecting is the Gumbel-max trick. With LSE = log sum exp and v = location + b, up to a constant that b leaves:

    E max = LSE(v)      E (first + second) = sum_i LSE(v without i) - (E - 2) LSE(v)      because sum_i max without i
                                                                                         = (E - 1) first + second
and by symmetry the minimum is at b = mean(location) - location.
"""

# Shapes: R independent runs, T tokens, E experts, K experts per token, N iterations

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.balancing.assignment import top_k_of
from coterie.balancing.bias import Rule, Schedule, initial, step
from coterie.balancing.loads import count
from coterie.errors import UsageError


@dataclass(frozen=True)
class GumbelScores:
    """Independent tokens whose scores have a density everywhere and an expected dual in closed form.

    location_E : float64, how much each expert is preferred; differences of 1 are a factor e in load at K = 1.
    k : experts per token, 1 or 2.
    """

    location_E: Tensor
    k: int = 1

    def __post_init__(self) -> None:
        if self.k not in (1, 2) or len(self.location_E) <= self.k:
            raise UsageError(f"the expected dual is known for 1 or 2 of more experts, not {self.k}")

    def draw(self, runs: int, tokens: int, generator: torch.Generator) -> Tensor:
        """A batch for each run. Shape [R, T, E], float64."""
        shape = (runs, tokens, len(self.location_E))
        noise = torch.empty(shape, dtype=torch.float64).exponential_(generator=generator)
        return self.location_E.double() - noise.log()

    def excess(self, bias_E: Tensor) -> Tensor:
        """D(b) - min D per token, for biases [..., E]. Shape [...], float64, 0 at the best bias."""
        return self._dual(bias_E) - self._dual(self.best())

    def best(self) -> Tensor:
        """The bias of balance, of mean 0. Shape [E]."""
        location_E = self.location_E.double()
        return location_E.mean() - location_E

    def modulus(self) -> float:
        """mu, the smallest curvature of D at its minimum among directions that change the selection."""
        hessian_EE = torch.func.hessian(self._dual)(self.best())
        return float(torch.linalg.eigvalsh(hessian_EE)[1])  # the first is 0: a constant added to all biases

    def _dual(self, bias_E: Tensor) -> Tensor:
        v_E, experts = self.location_E.double() + bias_E.double(), len(self.location_E)
        total = torch.logsumexp(v_E, -1)
        if self.k == 2:
            own_EE = torch.eye(experts, dtype=torch.bool)
            without_E = torch.logsumexp(v_E.unsqueeze(-2).masked_fill(own_EE, -torch.inf), -1)
            total = without_E.sum(-1) - (experts - 2) * total
        return total - self.k * bias_E.double().mean(-1)


def excess_of_runs(
    scores: GumbelScores,
    rule: Rule,
    u: float,
    iterations: int,
    *,
    tokens: int,
    runs: int = 1,
    schedule: Schedule = "constant",
    seed: int = 0,
) -> Tensor:
    """D(b_n) - min D before each update of an online run, every iteration on a new batch. Shape [R, N], float64.

    Parameters
    ----------
    u : step size; for the proportional rule of the load as a share of the tokens, so that c and `tokens` are free of
        each other.
    tokens : of each batch.
    runs : independent runs in one program.
    """
    if rule == "multiplicative":
        raise UsageError("the multiplicative rule has no dual value", "Follow an additive rule: sign, proportional.")
    generator, experts = torch.Generator().manual_seed(seed), len(scores.location_E)
    bias_RE = initial(experts, rule, torch.float64).expand(runs, experts)
    u = u / tokens if rule == "proportional" else u
    visited = []
    for n in range(1, iterations + 1):
        visited.append(bias_RE)
        index_RTK = top_k_of(scores.draw(runs, tokens, generator), bias_RE.unsqueeze(-2), scores.k)
        bias_RE = step(bias_RE, count(index_RTK, experts), rule, u, schedule=schedule, iteration=n)
    return scores.excess(torch.stack(visited, 1))


def regret(excess_RN: Tensor) -> Tensor:
    """Regret after each iteration. Shape as the excess."""
    return excess_RN.cumsum(-1)


def growth(regret_N: Tensor, first: int) -> float:
    """p of a regret that grows like n^p: 0 stands for log n, 1/2 for sqrt n, 1 for linear.

    What is added between n and 2n grows like n^p in all three cases (log n adds a constant), and does not see what the
    first iterations cost. p is the slope of its logarithm over the doublings from `first` on.
    """
    ends = [first * 2**i for i in range(64) if first * 2**i <= len(regret_N)]
    if len(ends) < 3:
        raise UsageError(f"{len(regret_N)} iterations are no two doublings of {first}", "Run longer or start earlier.")
    added = regret_N[torch.tensor(ends) - 1].double().diff().clamp(min=1e-300).log()
    n = torch.tensor(ends[:-1], dtype=torch.float64).log()
    return float(((n - n.mean()) * added).sum() / (n - n.mean()).square().sum())
