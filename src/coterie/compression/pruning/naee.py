"""NAEE: keep the set of experts that reproduces the layer best (arXiv:2402.14800).

For the inputs X of a layer and Z = F(X) its routed output, every set C of n of its N experts is tried:

    keep = argmin_{|C| = n}  sum over batches of || Z - F_C(X) ||_Frobenius

F_C is the layer with the other experts' logits at -inf: the next best are picked, and the weights are what the router
makes of them. That is C(N, n) trials a layer: 70 to halve 8 experts, 4368 to keep 11 of 16, out of reach from some 20.
Above `MAX_SUBSETS` trials experts are removed one by one instead, each time the one whose removal costs least
(`search=greedy`). That is not the paper's search; it is named apart in the plan.

The layer is judged on the unpruned model's inputs (the paper's layer-wise form). With --propagate the inputs of a
layer come from the pruned layers before it, and so does its Z: each layer imitates itself on what it will see. The
paper's progressive form compares with Z of the unpruned model instead, which needs two models in one sweep; it is not
here. The inputs are a sample of `tokens` tokens where there are more.

CPU seconds for a layer of H = 2048 and I = 768 at 4096 tokens on one core (benchmarks/naee_search.py), all experts run
on all tokens + trials: 3 + 0.4 to halve 8 experts exactly, 25 + 18 for 64 greedily, 59 + 165 for 128.
"""

# E experts, C subsets

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.methods import Method, Pick, method
from coterie.compression.selector import Budget, select_layer
from coterie.errors import UsageError
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile
from coterie.profiling.reconstruction import (
    TOKENS,
    count_subsets,
    removal_curve,
    removal_names,
    subset_loss,
    subset_names,
    subsets,
)


@method("naee", kind="pruning", paper="arXiv:2402.14800")
class Naee(Method):
    """Keep the set of experts that reproduces the layer's output best; exact search for few experts."""

    search: Literal["auto", "exact", "greedy"] = Field(
        "auto",
        description="exact: try every set of experts, as the paper does. greedy: remove one expert after the other, "
        "for many experts; not the paper's search. auto: exact up to 5000 sets a layer, else greedy.",
    )
    tokens: int = Field(TOKENS, ge=1, description="Inputs of a layer that sets are tried on; above, a random sample.")

    def observes(self) -> tuple[type[Observer], ...]:
        return self.observes_for(None)

    def observes_for(self, counts: Mapping[int, int] | None) -> tuple[type[Observer], ...]:
        if self.search == "greedy":
            return (removal_curve(self.tokens),)
        keep = None if counts is None else tuple(sorted(counts.items()))
        return (subset_loss(keep, self.tokens, or_greedy=self.search == "auto"),)

    def score(self, layer: LayerProfile) -> Tensor:
        """What a ranking can say of it: the loss that comes with each expert's removal. Shape [E].

        Greedy: the loss once it is gone and all removed before it. Exact: the smallest loss of a set without it, of
        sets of the largest number recorded. `pick` does not go by these, but by sets.
        """
        exact = self._recorded(layer)
        if exact is None:
            return self._removal(layer)[1].float()
        count, loss_C = max(((n, loss_C) for n, loss_C in exact.items() if n < layer.experts), default=(0, None))
        return torch.zeros(layer.experts) if loss_C is None else _without(layer, count, loss_C).float()

    def pick(self, layer: LayerProfile, moe: MoELayer, count: int, budget: Budget) -> Pick:
        """The best set; the plan says which search found it, and its loss where that set was measured."""
        if count == layer.experts:
            return Pick(list(range(count)), torch.zeros(0))
        exact = self._recorded(layer)
        if exact is None:
            order_E, loss_E = self._removal(layer)
            rank_E = torch.empty(len(order_E), dtype=torch.float64)
            rank_E[order_E] = torch.arange(len(order_E), dtype=torch.float64)
            keep = select_layer(rank_E, count, moe, budget)
            extra: dict[str, Any] = {"search": "greedy"}
            if set(order_E[-count:].tolist()) == set(keep):  # not so where others went instead of protected experts
                extra["loss"] = float(layer.stats[removal_names(self.tokens)[1]][-count - 1])
            return Pick(keep, loss_E, extra)
        if count not in exact:
            raise UsageError(f"the profile of layer {layer.index} has no losses of sets of {count} experts", _AGAIN)
        held = {expert for index, expert in budget.protect if index == layer.index}
        loss_C = exact[count]
        sets = zip(loss_C.tolist(), subsets(layer.experts, count, layer.groups), strict=True)
        loss, best = min((loss, kept) for loss, kept in sets if held <= set(kept))  # ties go to the lower indices
        return Pick(list(best), _without(layer, count, loss_C), {"search": "exact", "loss": loss})

    def _recorded(self, layer: LayerProfile) -> dict[int, Tensor] | None:
        """Losses by number of experts; None where the search was greedy. Raises UsageError where there is neither."""
        found: dict[int, Tensor] = {}
        sizes_name, loss_name = subset_names(self.tokens)
        if self.search != "greedy" and sizes_name in layer.stats:
            sizes = layer.stats[sizes_name].tolist()
            numbers = [count_subsets(layer.experts, n, layer.groups) for n in sizes]
            found = dict(zip(sizes, torch.split(layer.stats[loss_name], numbers), strict=True))
        for loss_C in found.values():
            if not torch.isfinite(loss_C).all():
                raise _not_finite(layer)
        if not found and removal_names(self.tokens)[0] not in layer.stats:
            raise UsageError(f"the profile of layer {layer.index} has no losses of sets of experts", _AGAIN)
        return found or None

    def _removal(self, layer: LayerProfile) -> tuple[Tensor, Tensor]:
        """Order of removal [E], and by expert [E] the largest loss up to its removal, so that it grows with the order.

        Experts of one round, one of each routing group, share a loss. Those that the router needs are set above all.
        """
        order_name, loss_name = removal_names(self.tokens)
        if order_name not in layer.stats or int(layer.stats[order_name].min()) < 0:
            raise UsageError(f"the profile of layer {layer.index} has no order of removal", _AGAIN)
        losses, E = layer.stats[loss_name].tolist(), layer.experts
        if any(map(math.isnan, losses)):
            raise _not_finite(layer)
        removed = max((i + 1 for i, loss in enumerate(losses) if loss < math.inf), default=0)
        for i in reversed(range(removed - 1)):
            losses[i] = losses[i + 1] if losses[i] == math.inf else losses[i]
        losses[:removed] = itertools.accumulate(losses[:removed], max)
        top = losses[removed - 1] if removed else 1.0
        losses[removed:] = [top * (1 + (i + 1) / E) for i in range(E - removed)]
        loss_E = torch.empty(E, dtype=torch.float64)
        loss_E[layer.stats[order_name]] = torch.tensor(losses, dtype=torch.float64)
        return layer.stats[order_name], loss_E


_AGAIN = "Profile again with --method naee, with the same parameters."


def _not_finite(layer: LayerProfile) -> UsageError:
    return UsageError(
        f"layer {layer.index}: losses of sets of experts are no finite numbers",
        "Weights or activations that are no finite numbers do this; a damaged profile does, too.",
    )


def _without(layer: LayerProfile, count: int, loss_C: Tensor) -> Tensor:
    """The smallest loss of a set without each expert, [E]."""
    best_E = torch.full((layer.experts,), math.inf, dtype=torch.float64)
    for loss, keep in zip(loss_C.tolist(), subsets(layer.experts, count, layer.groups), strict=True):
        absent = torch.ones(layer.experts, dtype=torch.bool)
        absent[list(keep)] = False
        best_E[absent] = best_E[absent].clamp(max=loss)
    return best_E
