"""Sub-MoE: cluster experts by what they put out, merge each cluster in a shared subspace (arXiv:2506.23266).

Training-free; layers whose experts are alike end with fewer of them. Every token goes through every expert:

    Sim(i, j) = mean_x cos(E_i(x), E_j(x))                    clusters by k-means on the token-wise unit outputs
    k_l       : sum k_l = K in windows of layers, each step taken from the layer whose objective J_l grows least by it
    [W_1 .. W_n] = U S [V_1 .. V_n],  W_m = U S sum_i f_i V_i / sum_i f_i       for gate, up and down on their own

Without truncation W_m is sum_i f_i W_i / sum_i f_i exactly, so that no decomposition is needed and none is made: then
this is frequency-weighted averaging under another clustering. Truncated to rank r it is U_r U_r^T times that average,
stored as two factors, and is Sub-MoE+ with `whiten`: the subspace is then that of the outputs on routed text,
U of [W_1 S_1 .. W_n S_n], S_i S_i^T = X_i X_i^T + damping.

How layers share a window is not in the paper (the marginal rule is ours), nor is damping. Reshaping V into blocks
instead of splitting it by columns scrambles them; a public re-implementation does, so its numbers say nothing of this.
"""

# E experts, K stored experts, O outputs and I inputs of a matrix, R rank

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from pydantic import Field
from torch import Tensor

from coterie.anatomy import ExpertBank, MoELayer
from coterie.anatomy.forms import projection_shapes
from coterie.compression.clustering import allocate, inertia_curve, kernel_k_means, members_of
from coterie.compression.merging.base import Merger, clusters_of
from coterie.compression.merging.operators import MATRIX, as_factors, moments_of, ranks_of, subspace
from coterie.compression.methods import Pick, method
from coterie.compression.plan import LayerPlan
from coterie.compression.selector import Budget, count_of
from coterie.compression.similarity import SIMILARITIES, Similarity
from coterie.errors import UsageError
from coterie.profiling.moments import InputSecondMoment, OutputSecondMoment
from coterie.profiling.observers import Observer, SelectionCount
from coterie.profiling.profile import LayerProfile


@method("sub-moe", kind="merging", paper="arXiv:2506.23266")
class SubMoe(Merger):
    """Merge experts with like outputs, layers sharing a budget, in a common subspace if truncated."""

    similarity: Similarity = Field("outputs", description="What is compared: the cosine of outputs, token by token.")
    window: int = Field(
        2, ge=0, description="Consecutive layers that share their budget; 1: every layer keeps as many, 0: all layers."
    )
    rank: int | None = Field(None, ge=1, description="Rank of the merged matrices, stored as factors. None: full.")
    save: float | None = Field(
        None, gt=0, lt=1, description="Instead of a rank: share of the numbers of each merged matrix that factors save."
    )
    whiten: bool = Field(
        False, description="Sub-MoE+: choose the subspace by the outputs on routed text; needs text while it writes."
    )
    damping: float = Field(0.01, ge=0, description="Added to whitening, in units of the mean input power.")
    restarts: int = Field(10, ge=1, description="Starts of k-means.")

    @property
    def allocates(self) -> bool:
        return self.window != 1

    @property
    def truncates(self) -> bool:
        return self.rank is not None or self.save is not None

    @property
    def sees_twice(self) -> bool:
        return super().sees_twice or (self.whiten and self.truncates)

    def observes(self) -> tuple[type[Observer], ...]:
        return tuple(dict.fromkeys((SelectionCount, *SIMILARITIES[self.similarity].observes)))

    def looks_again(self, plan: LayerPlan) -> tuple[type[Observer], ...]:
        more = (SelectionCount, InputSecondMoment, OutputSecondMoment) if self.whiten and self.truncates else ()
        return (*super().looks_again(plan), *more)

    # -- which experts belong together

    def clusters(
        self, layer: LayerProfile, experts: Sequence[int], count: int, alone: Collection[int]
    ) -> list[list[int]]:
        inside = list(experts)
        gram_EE = self._gram(layer)[inside][:, inside]
        alone = [inside.index(e) for e in alone]
        labels, _ = kernel_k_means(gram_EE, count, self.seed, self.restarts, alone=alone, max_size=self.max_size)
        return [[inside[i] for i in members] for members in members_of(labels)]

    def check_spread(self, moe: Mapping[int, MoELayer], budget: Budget) -> None:
        if self.window == 1:
            super().check_spread(moe, budget)
        if self.cuts and any(layer.groups > 1 for layer in moe.values()):
            raise UsageError(
                "with router=reduced every routing group must keep as many experts, which windows do not do",
                "Add --set window=1.",
            )
        for layer in moe.values():
            count_of(budget, layer)

    def pick_all(
        self, layers: Mapping[int, LayerProfile], moe: Mapping[int, MoELayer], budget: Budget
    ) -> dict[int, Pick]:
        merged = [i for i in moe if budget.prunes(i)]
        alone = {i: [e for index, e in budget.protect if index == i] for i in moe}
        curves = {
            i: inertia_curve(self._gram(layers[i]), self.seed, alone=alone[i], max_size=self.max_size) for i in merged
        }
        counts = {i: layer.num_experts for i, layer in moe.items()}
        counts |= allocate(
            curves,
            {i: count_of(budget, moe[i]) for i in merged},
            self.window or None,
            minimum=max(layer.top_k for layer in moe.values()) if self.cuts else 1,
        )
        return {i: self.pick(layers[i], moe[i], counts[i], budget) for i in moe}

    def _gram(self, layer: LayerProfile) -> Tensor:
        return SIMILARITIES[self.similarity].gram(layer)

    # -- the subspace

    def ranks(self, moe: MoELayer) -> dict[str, int] | None:
        return self._ranks(projection_shapes(moe.bank), moe.index) if self.truncates else None

    def _ranks(self, shapes: Mapping[str, tuple[int, int]], index: int) -> dict[str, int]:
        return ranks_of(shapes, self.rank, self.save, index)

    def factor(
        self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None
    ) -> dict[str, Tensor] | None:
        """A [K, O, R] and B [K, R, I] of every merged matrix. Peak memory: see `operators.subspace`."""
        if not self.truncates:
            return None
        shapes = projection_shapes(experts)
        ranks = self._ranks(shapes, plan.index)
        found: dict[str, list[Tensor]] = {f"factor_{p}_{part}": [] for p in shapes for part in "ab"}
        made: dict[int, dict[str, Tensor]] = {}
        dtype = experts.read(0).down_HI.dtype
        for leader, members in clusters_of(plan).items():
            merged = subspace(
                [experts.read(member) for member in members],
                [self.share(plan, leader, member) for member in members],
                rank={MATRIX[p]: ranks[p] for p in shapes},
                moments=moments_of(seen, members) if seen is not None and self.whiten else None,
                damping=self.damping,
            )
            own: dict[str, Tensor] = {}
            for p in shapes:
                left_OR, right_RI = as_factors(merged[MATRIX[p]])
                own |= {f"factor_{p}_a": left_OR.to(dtype), f"factor_{p}_b": right_RI.to(dtype)}
            made |= dict.fromkeys(members if self.router == "duplicated" else [leader], own)
        for expert in plan.keep:
            for name, tensors in found.items():
                tensors.append(made[expert][name])
        return {name: torch.stack(tensors) for name, tensors in found.items()}
