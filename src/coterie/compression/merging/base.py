"""What methods that merge whole experts share: clusters in a plan, merging in place, and three ways to write it down.

A method says which experts of a layer belong together (`clusters`); here they are averaged and told to the router:

- `router=map`, as the papers do: the router keeps all its outputs, an expert map behind it says which stored expert
  stands for each. One copy of the weights; loads after `import coterie`.
- `router=reduced`: the router is cut to one row for each cluster. A plain checkpoint; not the same function, since a
  token can no longer add up several members of a cluster, and the others' logits are gone.
- `router=duplicated`: every member is written with the merged weights. A plain checkpoint that saves nothing, for
  reference: the same function as `map`.

Plans name clusters by their leader, the member whose place the merged expert takes. Where similarity comes from and
how layers share a budget is the methods' business.
"""

# T tokens, E experts, K stored experts (in index_TK slots per token), H hidden, I expert intermediate

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from coterie.anatomy import ExpertBank, MoELayer
from coterie.compression.alignment import aligned, reordered
from coterie.compression.merging.operators import weighted_mean
from coterie.compression.methods import Method, Pick
from coterie.compression.plan import LayerPlan
from coterie.compression.selector import Budget, equal_groups
from coterie.errors import UsageError
from coterie.experts.forward import inner_activation
from coterie.profiling.observers import Observer
from coterie.profiling.profile import LayerProfile
from coterie.profiling.sample import input_sample, sample_names

SAMPLE = 512  # tokens on which activations are matched


class Merger(Method):
    """Base of methods that merge clusters of experts. `count_E` must be among what they observe."""

    router: Literal["map", "reduced", "duplicated"] = Field(
        "map",
        description="map: the router stays whole, an expert map behind it; coterie checkpoint. reduced: one router row"
        " for each cluster; plain checkpoint. duplicated: plain checkpoint of the old size, for reference.",
    )
    rows: Literal["leader", "mean"] = Field(
        "leader", description="With router=reduced: the row of the cluster's leader, or the mean of its members' rows."
    )
    weights: Literal["frequency", "uniform", "leader"] = Field(
        "frequency",
        description="What a member counts in the merged expert: how often it is selected, the same as all others, or"
        " nothing unless it leads.",
    )
    align: Literal["none", "weights", "activations"] = Field(
        "none",
        description="Match neurons to the reference before merging, by weights or by activations on routed text.",
    )
    reference: Literal["leader", "first"] = Field(
        "leader", description="Whose neurons the others are matched to: the cluster's leader's, or expert 0's."
    )
    max_size: int | None = Field(None, ge=1, description="Most experts of a cluster.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of what is drawn.")

    # -- what a method says

    def clusters(
        self, layer: LayerProfile, experts: Sequence[int], count: int, alone: Collection[int]
    ) -> list[list[int]]:
        """`count` groups of the given experts of a layer; `alone` stay by themselves and count as groups."""
        raise TypeError(f"{type(self).__name__} makes no clusters")

    # -- what the house asks

    @property
    def cuts(self) -> bool:
        return self.router == "reduced"

    @property
    def redirects(self) -> bool:
        return self.router == "map"

    @property
    def reroutes(self) -> bool:
        return self.cuts and self.rows == "mean"

    @property
    def sees_twice(self) -> bool:
        return self.align == "activations"

    def looks_again(self, plan: LayerPlan) -> tuple[type[Observer], ...]:
        return (input_sample(SAMPLE),) if self.align == "activations" else ()

    def stored(self, count: int, moe: MoELayer) -> int:
        return moe.num_experts if self.router == "duplicated" else count

    def pick(self, layer: LayerProfile, moe: MoELayer, count: int, budget: Budget) -> Pick:
        alone = {expert for index, expert in budget.protect if index == layer.index}
        found: list[list[int]] = []
        for experts, wanted in equal_groups(moe, count, self.cuts):
            inside = alone.intersection(experts)
            if wanted < len(experts) <= len(inside) or (wanted <= len(inside) < len(experts)):
                raise UsageError(
                    f"layer {layer.index}: {len(inside)} protected experts leave no room for the other"
                    f" {len(experts) - len(inside)}",
                    "Raise the budget or protect fewer experts.",
                )
            found += [[e] for e in experts] if wanted == len(experts) else self.clusters(layer, experts, wanted, inside)
        return self.picked(layer, found)

    def picked(self, layer: LayerProfile, clusters: Sequence[Sequence[int]]) -> Pick:
        """The decision that these experts are merged."""
        leaders = {max(c, key=lambda e: (int(layer.count_E[e]), -e)): sorted(c) for c in clusters}
        keep = list(range(layer.experts)) if self.router == "duplicated" else sorted(leaders)
        extra = {
            "clusters": {str(leader): leaders[leader] for leader in sorted(leaders)},
            "frequency": [int(n) for n in layer.count_E],
        }
        return Pick(keep, layer.count_E.float(), extra)

    def check_spread(self, moe: Mapping[int, MoELayer], budget: Budget) -> None:
        if budget.scope == "global":
            raise UsageError(
                "this method gives every layer the same number of experts, or shares them out by itself",
                "Leave out --scope global.",
            )

    def expert_map(self, plan: LayerPlan) -> list[int] | None:
        if self.router != "map":
            return None
        clusters = clusters_of(plan)
        place = {member: position for position, members in enumerate(clusters.values()) for member in members}
        if list(clusters) != plan.keep:
            raise UsageError(
                f"layer {plan.index}: the clusters in the plan do not belong to the experts it keeps",
                "Plan again with another budget instead of editing `keep`.",
            )
        return None if len(clusters) == plan.experts else [place[expert] for expert in range(plan.experts)]

    def rebuild(self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None) -> dict[str, float]:
        """Merge each cluster into its leader's place. Peak memory: one cluster of experts in float32."""
        reference = None
        if self.reference == "first" and self.align != "none":  # a copy: its place may be written to before the end
            reference = reordered(experts.read(0, torch.float32), torch.arange(experts.intermediate_size))
        acts = Activations(experts, seen) if self.align == "activations" else None
        first_TI = acts.of(0) if acts is not None and reference is not None else None
        merged = 0
        for leader, members in clusters_of(plan).items():
            if len(members) == 1:
                continue
            parts = [experts.read(member, torch.float32) for member in members]
            if self.align != "none" and self.weights != "leader":
                model = parts[members.index(leader)] if reference is None else reference
                model_TI = acts.of(leader) if acts is not None and first_TI is None else first_TI
                number = leader if reference is None else 0
                for place, member in enumerate(members):
                    if member != number:
                        sample = None if acts is None else acts.shared(number, model_TI, member)
                        parts[place] = aligned(model, parts[place], by=self._by, sample=sample)
            mean = weighted_mean(parts, [self.share(plan, leader, member) for member in members])
            for place in members if self.router == "duplicated" else [leader]:
                experts.write(place, mean)
            merged += len(members)
        return {"clusters": len(clusters_of(plan)), "merged": merged}

    @property
    def _by(self) -> Literal["weights", "activations"]:
        return "activations" if self.align == "activations" else "weights"

    def share(self, plan: LayerPlan, leader: int, member: int) -> float:
        """What a member counts in its cluster, before the shares are made to sum to one."""
        if self.weights == "leader":
            return float(member == leader)
        return float(plan.extra["frequency"][member]) if self.weights == "frequency" else 1.0

    def router_rows(self, rows: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        clusters = list(clusters_of(plan).values())
        means = {name: torch.stack([old[c].float().mean(0) for c in clusters]) for name, old in rows.items()}
        return {name: mean.to(rows[name].dtype) for name, mean in means.items()}

    def notes(self) -> list[str]:
        if self.router == "reduced":
            return ["the router was cut to one row for each cluster, which no merging paper does: coterie heal helps"]
        if self.router == "duplicated":
            return ["every member of a cluster was written: the checkpoint is as large as before"]
        return []


class Activations:
    """What the neurons of experts do on a sample of a layer's inputs, for as long as the experts are as they were."""

    def __init__(self, experts: ExpertBank, seen: LayerProfile | None) -> None:
        assert seen is not None
        inputs, ids = sample_names(SAMPLE)
        self.experts = experts
        self.x_TH, self.index_TK = seen.stats[inputs], seen.stats[ids]

    @torch.no_grad()
    def of(self, expert: int) -> Tensor:
        """[T, I], float32."""
        return inner_activation(self.experts.module, expert, self.x_TH.float()).float()

    def shared(self, one: int, one_TI: Tensor | None, other: int) -> tuple[Tensor, Tensor]:
        """Activations of both experts on the tokens that were routed to either."""
        assert one_TI is not None
        routed_T = ((self.index_TK == one) | (self.index_TK == other)).any(1)
        return one_TI[routed_T], self.of(other)[routed_T]


def clusters_of(plan: LayerPlan) -> dict[int, list[int]]:
    """{leader: members, ascending} in the order of the leaders. Raises UsageError for clusters that are none."""
    entry: Any = plan.extra.get("clusters")
    try:
        clusters = {int(leader): [int(m) for m in members] for leader, members in entry.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(f"layer {plan.index}: the plan has no clusters of experts") from error
    named = sorted(m for members in clusters.values() for m in members)
    if named != list(range(plan.experts)) or any(leader not in members for leader, members in clusters.items()):
        raise UsageError(
            f"layer {plan.index}: the clusters in the plan must name each of the {plan.experts} experts once, and every"
            " leader among its own"
        )
    return dict(sorted(clusters.items()))
