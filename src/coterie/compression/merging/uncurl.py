"""UNCURL: for one task, cluster each layer's experts by their router logits and merge each cluster (arXiv:2409.01483).

For somebody who will fine-tune on the task anyway: every layer ends with exactly D of its Z experts, and with a new
router that has to be trained (`coterie finetune` warms it up alone, then tunes everything). Logits are taken before any
softmax, over the tokens of the task:

    S_ij  = (1 + cos(H_:i, H_:j)) / 2           from the streamed Gram matrix H^T H
    F     = D eigenvectors of the normalised Laplacian of S with the smallest eigenvalues; k-means on its rows
    J_c   = the member of cluster c that is selected most often
    E'_c  = sum_y f_y P_y E_y / sum_y f_y        neurons P_y matched to J_c's, f_y = how often y is selected
    W'    = random

The choice of Laplacian, the k-means restarts and the scale of the new router are not in the paper. Of routers with
groups, clusters stay inside a group, as many in each. `router="mean"` (mean of the members' rows) is no part of the
method; it shows what the random router costs before any tuning.
"""

# E experts, H hidden

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.anatomy import ExpertBank, MoELayer
from coterie.compression.alignment import aligned
from coterie.compression.clustering import k_means, members_of, spectral_embedding
from coterie.compression.merging.operators import weighted_mean
from coterie.compression.methods import Method, Pick, method
from coterie.compression.plan import LayerPlan
from coterie.compression.selector import Budget
from coterie.compression.similarity import router_logits
from coterie.errors import UsageError
from coterie.profiling.observers import Observer, RouterGram, SelectionCount
from coterie.profiling.profile import LayerProfile


@method("uncurl", kind="merging", paper="arXiv:2409.01483")
class Uncurl(Method):
    """Cluster experts by router logits, merge each cluster, renew the router; to be fine-tuned."""

    router: Literal["random", "mean", "keep"] = Field(
        "random",
        description="The new router's rows: random as in the paper, the mean of the members' rows, or the most used"
        " member's own.",
    )
    init_std: float = Field(0.02, gt=0, description="Standard deviation of random rows.")
    align: bool = Field(True, description="Match neurons to the cluster's most used member before averaging.")
    center: bool = Field(False, description="Subtract each expert's mean logit first; the paper does not.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of k-means and of random rows.")

    def observes(self) -> tuple[type[Observer], ...]:
        return (SelectionCount, RouterGram)

    def pick(self, layer: LayerProfile, moe: MoELayer, count: int, budget: Budget) -> Pick:
        members = self.clusters(layer, count, {e for i, e in budget.protect if i == layer.index})
        extra = {"members": [members[j] for j in sorted(members)], "frequency": [int(n) for n in layer.count_E]}
        return Pick(sorted(members), layer.count_E.float(), extra)

    def pick_all(self, *args: object) -> dict[int, Pick]:
        raise UsageError("uncurl gives every layer the same number of experts", "Leave out --scope global.")

    def clusters(self, layer: LayerProfile, count: int, protected: Collection[int] = ()) -> dict[int, list[int]]:
        """{most used member: all members, ascending}; protected experts stay alone."""
        found: dict[int, list[int]] = {}
        similarity_EE = self.similarity(layer)
        size, per_group = layer.experts // layer.groups, count // layer.groups
        for group in range(layer.groups):
            experts = range(group * size, (group + 1) * size)
            alone = [e for e in experts if e in protected]
            others = torch.tensor([e for e in experts if e not in protected])
            found |= {e: [e] for e in alone}
            wanted = per_group - len(alone)
            if wanted < min(len(others), 1):
                raise UsageError(
                    f"layer {layer.index}: {len(alone)} protected experts leave no room for the other {len(others)}",
                    "Raise the budget or protect fewer experts.",
                )
            inside_EE = similarity_EE[others][:, others]
            for own in members_of(k_means(spectral_embedding(inside_EE, wanted), wanted, self.seed)):
                members = [int(e) for e in others[own]]
                found[max(members, key=lambda e: (int(layer.count_E[e]), -e))] = members
        return found

    def similarity(self, layer: LayerProfile) -> Tensor:
        """S [E, E] in [0, 1]: 1 for proportional logits, 0 for opposite ones."""
        return (1 + router_logits(layer, centred=self.center)) / 2

    def rebuild(self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None) -> dict[str, float]:
        merged = 0
        for first, members in _clusters_of(plan):
            if len(members) == 1:
                continue
            reference = experts.read(first, torch.float32)
            parts = []
            for member in members:
                expert = experts.read(member, torch.float32)
                parts.append(aligned(reference, expert) if self.align and member != first else expert)
            experts.write(first, weighted_mean(parts, [plan.extra["frequency"][m] for m in members]))
            merged += len(members)
        return {"clusters": len(plan.keep), "merged": merged}

    def router_rows(self, rows: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        if self.router == "keep":
            return {}
        made = {}
        for number, (name, old) in enumerate(sorted(rows.items())):
            new = torch.zeros((len(plan.keep), *old.shape[1:]), dtype=torch.float32)
            vector = old[0].numel() > 1  # a row of weights; biases of a renewed router begin at zero
            if self.router == "mean":
                new = torch.stack([old[members].float().mean(0) for _, members in _clusters_of(plan)])
            elif vector:
                generator = torch.Generator().manual_seed((self.seed * 100_003 + plan.index) * 7 + number)
                new.normal_(0.0, self.init_std, generator=generator)
            made[name] = new.to(old.dtype)
        return made

    def notes(self) -> list[str]:
        if self.router != "random":
            return ["UNCURL renews the router at random and trains it; this one was kept from the old rows instead"]
        return ["the routers are random and have to be trained: coterie finetune"]


def _clusters_of(plan: LayerPlan) -> list[tuple[int, list[int]]]:
    """(kept expert, members of its cluster) in the order of `plan.keep`."""
    members = plan.extra["members"]
    if len(members) != len(plan.keep) or any(j not in own for j, own in zip(plan.keep, members, strict=True)):
        raise UsageError(
            f"layer {plan.index}: the clusters in the plan do not belong to the experts it keeps",
            "Plan again with another budget instead of editing `keep`.",
        )
    return list(zip(plan.keep, members, strict=True))
