"""M-SMoE: merge experts along hints from the router, around the most used ones (arXiv:2310.01334).

For one task, with a recovery by distillation behind it (`coterie heal`); without any, or on many small experts, others
lose less. A_i is how often expert i is selected, normalised within its layer; H are the router's raw logits:

1. neurons:   P_i = argmax_P <W_in^r, P W_in^i> + <W_out^r, W_out^i P^T>     matched to expert r = 0 (`reference`)
2. dominant:  the K * L experts of all layers with the largest A_i, the first of each layer in any case (`ratio`)
3. groups:    Q(i) = argmax_{j dominant} cos(H_:i, H_:j)
4. merged:    E_Q = sum_{i in Q} A_i P_i E_i / sum_{i in Q} A_i
5. redirect:  the router keeps its outputs; all members of a group point at the one merged expert.

The compression behind it (the C of MC-SMoE) is `mc-smoe`. Differs from the authors' code: exactly K * L experts stay
(their threshold keeps fewer where frequencies tie), a group nobody used becomes the plain mean instead of zeros,
padding is not counted, and experts with a gate are aligned too. Router logits of one batch become those of the text.
"""

# E experts

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

from pydantic import Field
from torch import Tensor

from coterie.anatomy import MoELayer
from coterie.compression.clustering import around, dominant_experts, members_of
from coterie.compression.merging.base import Merger
from coterie.compression.methods import Pick, method
from coterie.compression.selector import Budget, count_of
from coterie.compression.similarity import SIMILARITIES, Similarity
from coterie.errors import UsageError
from coterie.profiling.observers import Observer, SelectionCount
from coterie.profiling.profile import LayerProfile


@method("m-smoe", kind="merging", paper="arXiv:2310.01334")
class MSmoe(Merger):
    """Merge experts around the most used ones, by router logits, neurons aligned; to be healed."""

    ratio: Literal["adaptive", "uniform"] = Field(
        "adaptive",
        description="adaptive: the most used experts of all layers stay, so that layers differ. uniform: as many in"
        " every layer.",
    )
    similarity: Similarity = Field("router-logits", description="What a group has in common.")
    align: Literal["none", "weights", "activations"] = Field(
        "weights", description="Match neurons to the reference before merging."
    )
    reference: Literal["leader", "first"] = Field(
        "first", description="Whose neurons the others are matched to: expert 0's as in the paper, or the leader's."
    )

    @property
    def allocates(self) -> bool:
        return self.ratio == "adaptive"

    def observes(self) -> tuple[type[Observer], ...]:
        return tuple(dict.fromkeys((SelectionCount, *SIMILARITIES[self.similarity].observes)))

    def check_spread(self, moe: Mapping[int, MoELayer], budget: Budget) -> None:
        if self.ratio == "uniform":
            super().check_spread(moe, budget)
        if self.cuts and any(layer.groups > 1 for layer in moe.values()):
            raise UsageError(
                "with router=reduced every routing group must keep as many experts, which ratio=adaptive does not do",
                "Add --set ratio=uniform.",
            )
        self._wanted(moe, budget)

    def pick_all(
        self, layers: Mapping[int, LayerProfile], moe: Mapping[int, MoELayer], budget: Budget
    ) -> dict[int, Pick]:
        protected = {i: [e for index, e in budget.protect if index == i] for i in moe}
        dominant = dominant_experts(
            {i: layers[i].count_E for i in moe},
            self._wanted(moe, budget),
            excluded=[i for i in moe if not budget.prunes(i)],
            protected=protected,
            minimum=max(layer.top_k for layer in moe.values()) if self.cuts else 1,
        )
        return {i: self.picked(layers[i], self._around(layers[i], dominant[i], protected[i])) for i in moe}

    def clusters(
        self, layer: LayerProfile, experts: Sequence[int], count: int, alone: Collection[int]
    ) -> list[list[int]]:
        protected = {0: [list(experts).index(e) for e in alone]}
        chosen = dominant_experts({0: layer.count_E[list(experts)]}, {0: count}, scope="uniform", protected=protected)
        return self._around(layer, [experts[i] for i in chosen[0]], alone, experts)

    def _around(
        self, layer: LayerProfile, dominant: Sequence[int], alone: Collection[int], experts: Sequence[int] | None = None
    ) -> list[list[int]]:
        """The groups that form around the dominant experts."""
        inside = list(range(layer.experts)) if experts is None else list(experts)
        similarity_EE: Tensor = SIMILARITIES[self.similarity].similarity(layer)[inside][:, inside]
        labels = around(
            similarity_EE,
            [inside.index(e) for e in dominant],
            alone=[inside.index(e) for e in alone],
            max_size=self.max_size,
        )
        return [[inside[i] for i in members] for members in members_of(labels)]

    def _wanted(self, moe: Mapping[int, MoELayer], budget: Budget) -> dict[int, int]:
        """How many experts each layer adds to the common budget."""
        return {i: count_of(budget, layer) if budget.prunes(i) else layer.num_experts for i, layer in moe.items()}
