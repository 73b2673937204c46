"""A router with a permutation of its experts that is searched for while training begins (arXiv:2306.02824).

COMET's local search, around any router: COMET+, DSelect-k+, top-k+, hash+. Routers and experts learn together, and a
bad first pairing of a region of tokens with an expert can stay for good. For the first steps a matrix P therefore
stands between what the router decides and the experts, and is learned with them:

    P = Sinkhorn(L / tau)                rows and columns of exp(L / tau) divided by their sums, so many times
    tau    from 1e-3 to 1e-7 (straight in log tau)     iterations from 20 to 150            over the T_p steps of search
    g'     = g P, times sum g / sum g P, for P is soft at first

So near a vertex of the doubly stochastic matrices, a gradient step on L moves from one permutation to a neighbour.
After T_p, and in every model in use, P is the permutation nearest to the last one in the search (assignment), L learns
no more, and nothing is left but another order of the experts: `fold` gives the inner router back, and that order. The
term "permutation" (balancing term "router", weight 1e-4 in the paper) pulls P to a vertex while it is searched for:

    H(P) + H(P, its rows divided by their sums),            H = sum of -P log(P + 1e-6)

The search needs to know the step: `at(step, steps)` before each, as `coterie train` does. How far it came, and the last
P, are saved with the model. A search that is over stays over until `reset`. While P is soft all experts run.

Differs from the authors' code: the gradient of L is taken times tau. It grows as 1 / tau and would have all others
clipped away; Adam, which they train L with, sees no difference. One P per router, none per tree. Everything here is
float64: below tau = 1e-5 float32 is far from doubly stochastic.
"""

# T tokens, E experts, N outputs of the inner router (E, and nulls behind them), K slots per token

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from coterie.errors import UsageError
from coterie.routing.base import Router, RouterSettings, Routing, checked, router, router_class
from coterie.routing.record import Here
from coterie.routing.sets import at, slots
from coterie.routing.trees import TINY

SPREAD = 0.05  # of a fresh L, evenly between minus and plus this


class PermutedSettings(RouterSettings):
    """Parameters of a router whose experts' order is searched for.

    Parameters
    ----------
    inner : dict
        The router that decides: its `kind` and its settings. It picks `top_k`, unless it says so itself; how weights
        are combined is its business.
    search : float, >= 0
        How long: up to 1 a share of the training, above so many steps; 0: P is a fixed one. The paper searches for 1 to
        10 of 100 epochs.
    tau_first, tau_last : float, > 0
        Temperatures at the begin and the end of the search.
    iterations_first, iterations_last : int, >= 1
        Iterations of Sinkhorn's algorithm.
    noise_factor : float, >= 0
        Times Gumbel noise that is added to L while searching.
    """

    inner: dict[str, Any] = {"kind": "top-k"}
    search: float = Field(default=0.1, ge=0)
    tau_first: float = Field(default=1e-3, gt=0)
    tau_last: float = Field(default=1e-7, gt=0)
    iterations_first: int = Field(default=20, ge=1)
    iterations_last: int = Field(default=150, ge=1)
    noise_factor: float = Field(default=0.0, ge=0)

    @field_validator("inner")
    @classmethod
    def _named(cls, inner: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(inner.get("kind"), str) or inner["kind"] == "permuted":
            raise ValueError("say the kind of the router whose experts are permuted")
        if "capacity" in inner:
            raise ValueError("a capacity is set beside inner, not in it")
        return inner

    @model_validator(mode="after")
    def _one_place(self) -> PermutedSettings:
        if self.combine != "raw":
            raise ValueError("how weights are combined is said in inner")
        return self

    def steps_of(self, steps: int) -> int:
        """T_p in a training of `steps`. Raises UsageError for a search without a step, or a longer one."""
        found = math.floor(self.search * steps) if self.search <= 1 else round(self.search)
        if self.search and not found:
            raise UsageError(
                f"permuted: search={self.search:g} of a training of {steps} steps is not one step",
                f"Set search to at least {1 / steps:.2g}, or to a number of steps, or to 0.",
            )
        if found > steps:
            raise UsageError(f"permuted: a search of {found} steps in a training of {steps}", "Give a share of it.")
        return found


class Permutation(nn.Module):
    """P of one set of experts. Routers of several tasks that share their experts share it too."""

    def __init__(self, experts: int, settings: PermutedSettings, **how: Any) -> None:
        super().__init__()
        self.settings = settings
        self.logits = nn.Parameter(torch.empty(experts, experts, **how))
        device = how.get("device")
        self.soft = nn.Buffer(torch.eye(experts, dtype=torch.float64, device=device))  # the last P of the search
        self.order = nn.Buffer(torch.arange(experts, device=device))  # expert of each output, once that is over
        self.clock = nn.Buffer(torch.zeros(2, dtype=torch.long, device=device))  # step, of how many; 0: not told
        self.over = nn.Buffer(torch.zeros((), dtype=torch.bool, device=device))

    @torch.no_grad()
    def reset(self) -> None:
        """A fresh L, and the search yet to come."""
        self.logits.uniform_(-SPREAD, SPREAD)
        self.clock.zero_()
        self.over.fill_(False)
        self.soft.copy_(self.now())

    def at(self, step: int, steps: int) -> None:
        """The step that comes. Raises UsageError for a search without a step."""
        length = self.settings.steps_of(steps)
        if bool(self.over):
            return
        self.clock.copy_(torch.tensor([step, steps]))
        if step >= length:
            self.order.copy_(self.nearest())
            self.over.fill_(True)

    @property
    def searching(self) -> bool:
        """A model in training would learn P now. Warns if that is not so for want of being told the step."""
        if bool(self.over) or not self.settings.search:
            return False
        if not int(self.clock[1]):
            warnings.warn(
                "a permuted router trains and was not told at which step: it searches nothing. Call its"
                " at(step, steps) before every step.",
                stacklevel=2,
            )
            return False
        return True

    def schedule(self) -> tuple[float, int]:
        """(tau, iterations) of this step."""
        told, (step, steps) = self.settings, self.clock.tolist()
        last = self.settings.steps_of(steps) - 1 if steps else 0
        s = min(step / last, 1.0) if last > 0 else 0.0
        tau = told.tau_first * (told.tau_last / told.tau_first) ** s
        return tau, round(told.iterations_first + s * (told.iterations_last - told.iterations_first))

    def now(self) -> Tensor:
        """The soft P of this step, [E, E], float64: row l says which experts stand in for output l."""
        tau, iterations = self.schedule()
        logits_EE = self.logits.double()
        if self.settings.noise_factor and self.training:
            gumbel_EE = -torch.empty_like(logits_EE).exponential_().log()
            logits_EE = logits_EE + self.settings.noise_factor * gumbel_EE
        # the value is L / tau, the gradient as if it were L
        return sinkhorn(logits_EE + (logits_EE / tau - logits_EE).detach(), iterations)

    def nearest(self) -> Tensor:
        """The expert of each output, [E], int64, in the permutation that has most of the last P."""
        if bool(self.over):
            return self.order
        _, expert = linear_sum_assignment(self.soft.cpu().numpy(), maximize=True)
        return torch.as_tensor(expert, device=self.soft.device)


def sinkhorn(logits_EE: Tensor, iterations: int) -> Tensor:
    """exp(logits), its rows and then its columns divided by their sums, so many times; in logarithms."""
    for _ in range(iterations):
        logits_EE = logits_EE - logits_EE.logsumexp(1, keepdim=True)
        logits_EE = logits_EE - logits_EE.logsumexp(0, keepdim=True)
    return logits_EE.exp()


def unevenness(P_EE: Tensor) -> Tensor:
    """H(P) + H(P with rows of sum 1): 0 at a permutation."""
    both = torch.stack([P_EE, P_EE / P_EE.sum(1, keepdim=True)])
    return -(both * (both + TINY).log()).sum()


@router("permuted", paper="arXiv:2306.02824")
class Permuted(Router):
    """Any router, and in which order it sees the experts."""

    Settings = PermutedSettings

    def __init__(self, hidden: int, experts: int, settings: RouterSettings, **more: Any) -> None:
        super().__init__(hidden, experts, settings, **more)
        cls, told = _inner(self.settings)
        if cls.needs_attention:
            raise UsageError(f"the {cls.kind} router looks at attention and cannot stand in a permuted one")
        self.inner = cls(hidden, experts, told, **more)
        self.permutation = Permutation(experts, self.settings, **self.how)
        self.unsliceable = "sees the experts in another order"  # type: ignore[misc]
        self.looks_ahead = cls.looks_ahead  # type: ignore[misc]
        owned = [n for n, _ in [*self.named_parameters(), *self.named_buffers()] if not n.startswith("inner.")]
        self.rowless = (*owned, *(f"inner.{n}" for n in cls.rowless))  # type: ignore[misc]

    @classmethod
    def shared_module(cls, hidden: int, settings: Any, **how: Any) -> nn.Module | None:
        inner, told = _inner(settings)
        return inner.shared_module(hidden, told, **how)

    @property
    def num_outputs(self) -> int:
        return self.inner.num_outputs if hasattr(self, "inner") else self.num_experts

    @property
    def top_k(self) -> int:
        return self.inner.top_k if hasattr(self, "inner") else int(self.settings.top_k)

    @property
    def carries_state(self) -> bool:
        return self.inner.carries_state

    def at(self, step: int, steps: int) -> None:
        self.inner.at(step, steps)
        self.permutation.at(step, steps)

    def route(self, x_TH: Tensor, here: Here) -> Routing:
        routing = self.inner.route(x_TH, here)
        if self.training and self.permutation.searching:
            P_EE = self.permutation.now()
            if torch.is_grad_enabled():
                self.permutation.soft.copy_(P_EE.detach())
                routing.terms["permutation"] = unevenness(P_EE).float()
            return softly(routing, P_EE.float())
        return reordered(routing, self.permutation.nearest())

    def dial(self, **values: Any) -> None:
        """Settings of the inner router can be changed too."""
        own = {n: v for n, v in values.items() if n in PermutedSettings.model_fields}
        inner = {n: v for n, v in values.items() if n not in own or n in ("top_k", "combine")}
        if inner:
            self.inner.dial(**inner)
            own["inner"] = {**self.settings.inner, **inner}
            own.pop("combine", None)
        super().dial(**own)
        self.permutation.settings = self.settings

    @torch.no_grad()
    def reset(self, std: float = 0.02) -> None:
        self.inner.reset(std)
        self.permutation.reset()

    def fold(self) -> tuple[Router, list[int]]:
        """The router without its permutation, and which of the experts has to stand at each of its outputs.

        Putting the experts in that order is all there is to do, see `anatomy.routers.fold_permutations`. Before the
        search is over it is the permutation that a model in use has now.
        """
        inner = self.inner
        inner.watch = self.watch
        inner.settings = inner.settings.model_copy(update={"capacity": self.settings.capacity})
        return inner, self.permutation.nearest().tolist()


def _inner(settings: PermutedSettings) -> tuple[type[Router], Any]:
    told = {**settings.inner}
    cls = router_class(str(told.pop("kind")))
    return cls, checked(cls.kind, cls.Settings, {"top_k": settings.top_k, **told})


def reordered(routing: Routing, order: Tensor | Sequence[int]) -> Routing:
    """The same decisions, output l being expert order[l]. Null experts and "none" stay where they are."""
    E, N = routing.experts, routing.outputs
    order_E = torch.as_tensor(order, device=routing.index_TK.device)
    order_N = torch.cat([order_E, torch.arange(E, N + 1, device=order_E.device)])
    back_N = order_N[:N].argsort()
    routing.index_TK = order_N[routing.index_TK]
    routing.logits_TN, routing.probability_TN = routing.logits_TN[:, back_N], routing.probability_TN[:, back_N]
    return routing


def softly(routing: Routing, P_EE: Tensor) -> Routing:
    """The decisions spread by a soft P: all experts that get a weight run. A token's sum of weights stays."""
    E, N = routing.experts, routing.outputs
    dense_TN = F.pad(torch.zeros_like(routing.probability_TN), (0, 1))
    dense_TN = dense_TN.scatter_add(-1, routing.index_TK, routing.weight_TK)[:, :N]
    weight_TN, probability_TN = (_spread(value_TN, P_EE) for value_TN in (dense_TN, routing.probability_TN))
    null_TN = dense_TN.new_zeros(dense_TN.shape, dtype=torch.bool)
    null_TN[:, E:] = routing.chosen_TN()[:, E:] > 0
    index_TK = slots((weight_TN > 0) | null_TN, weight_TN)
    logits_TN = probability_TN.clamp(min=torch.finfo(torch.float32).tiny).log()
    return Routing(
        logits_TN, probability_TN, index_TK, at(weight_TN, index_TK), E, routing.combine, terms=routing.terms
    )


def _spread(value_TN: Tensor, P_EE: Tensor) -> Tensor:
    """The first E columns times P, their sum as before."""
    E = len(P_EE)
    moved_TE = value_TN[:, :E] @ P_EE
    before_T1, after_T1 = (t.sum(-1, keepdim=True) for t in (value_TN[:, :E], moved_TE))
    moved_TE = moved_TE * (before_T1 / torch.where(after_T1 > 0, after_T1, 1.0))
    return torch.cat([moved_TE, value_TN[:, E:]], -1)
