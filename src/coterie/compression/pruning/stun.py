"""STUN, first half: drop experts that the router treats alike, as many per layer as are redundant (arXiv:2409.06211).

The second half zeroes single weights of the survivors: `--method owl` or `wanda` with `total=`, as a second step.

Experts i and j of a layer, with router rows W_i (and the logit bias, if there is one) and co-selection counts a_ij:

    d_ij = ||W_i - W_j||  [/ ||W||]  -  mix * a_ij / mean|a|          (source: router, coactivation, or mixed)

Pairs are gone through from the closest on, and two clusters are joined if all their members are closer than t to the
pair that asked ("code": the authors' rule, see `code_merges`) or to each other (complete linkage). One t serves all
layers, so layers differ in how much they lose. Of each cluster stays the expert whose flattened weights are nearest to
the cluster's mean, with its router row as it is. A layer that is left with at most `merge_max_clusters` clusters keeps
instead the mean of the members' weights and of their rows.

No token passes for `source=router`; one sweep counts co-selections for the others, however many experts there are.

Differs from the authors' code: t is found by a search in the sorted distances of all layers instead of stepping a
real number, which ends at the same experts where theirs ends at the target, and meets the target also where one value
of t joins several clusters at once (the last layer then stops at the count). Their count need not fall as t grows (10
of 100 small random layers have such a rise); then several t meet the target and the two searches may end at different
ones. Pairs are those of all k selected experts, not of the first two. Every layer keeps what its router needs; of
routers with groups, clusters stay inside a group and each group joins as often as the one that joins least. Protected
experts stay alone.
"""

# E experts, C clusters, P pairs of experts

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.cluster.hierarchy import linkage as agglomerative
from scipy.spatial.distance import squareform
from torch import Tensor

from coterie.anatomy import ExpertBank, ExpertWeights, MoELayer
from coterie.anatomy.slicing import minimum_keep
from coterie.compression.methods import Method, Pick, method
from coterie.compression.plan import LayerPlan
from coterie.compression.selector import Budget, global_count
from coterie.errors import UsageError
from coterie.profiling.observers import CoActivation, Observer
from coterie.profiling.profile import LayerProfile
from coterie.profiling.weights import ExpertGram, Moments, RouterRows, distances_to_mean

Array = np.ndarray[Any, Any]


@method("stun", kind="pruning + merging", paper="arXiv:2409.06211")
class Stun(Method):
    """Cluster experts the router treats alike, keep the one nearest to each cluster's mean."""

    source: Literal["router", "coactivation", "mixed"] = Field(
        "router",
        description="Distance of two experts: of their router rows (no text), how rarely they are selected together, or"
        " the sum of both.",
    )
    mix: float = Field(1.0, ge=0, description="Weight of co-selection beside rows, lambda2 / lambda1; for mixed.")
    division_by_norm: bool = Field(
        True, description="Divide distances of rows by the norm of the layer's router, so that layers compare."
    )
    linkage: Literal["code", "complete"] = Field(
        "code", description="The rule of the authors' code, or complete linkage (all members closer than t)."
    )
    merge_max_clusters: int = Field(
        2, ge=0, description="Layers left with at most so many clusters average them; kappa - 1. 0: never."
    )
    max_merges: int | None = Field(
        None, ge=0, description="Most experts a layer may lose; none: what its router needs."
    )

    def observes(self) -> tuple[type[Observer], ...]:
        rows: tuple[type[Observer], ...] = (RouterRows,) if self.source != "coactivation" else ()
        counts: tuple[type[Observer], ...] = (CoActivation,) if self.source != "router" else ()
        return (*rows, *counts, ExpertGram)

    def distances(self, layer: LayerProfile) -> Tensor:
        """d_ij, symmetric, [E, E] float64, infinite on the diagonal."""
        distance_EE = torch.zeros(layer.experts, layer.experts, dtype=torch.float64)
        if self.source != "coactivation":
            rows_EC = layer.router_rows_EC.double()
            rows_EE = torch.cdist(rows_EC, rows_EC, compute_mode="donot_use_mm_for_euclid_dist")
            distance_EE += rows_EE / (rows_EC.norm().clamp(min=1e-30) if self.division_by_norm else 1)
        if self.source != "router":
            together_EE = layer.coactivation_EE.double().clone().fill_diagonal_(0)
            mix = self.mix if self.source == "mixed" else 1.0
            distance_EE -= mix * together_EE / together_EE.mean().clamp(min=1e-30)
        return distance_EE.fill_diagonal_(torch.inf)

    def pick(self, layer: LayerProfile, moe: MoELayer, count: int, budget: Budget) -> Pick:
        found = self._joined({layer.index: layer}, {layer.index: moe}, budget, {layer.index: count}, count)
        return self._picked(layer, found[layer.index])

    def pick_all(
        self, layers: Mapping[int, LayerProfile], moe: Mapping[int, MoELayer], budget: Budget
    ) -> dict[int, Pick]:
        least = {}
        for index, layer in moe.items():
            E, groups = layer.num_experts, layer.groups
            floor = -(-max(minimum_keep(layer), min(budget.minimum, E)) // groups) * groups
            least[index] = floor if budget.prunes(index) else E
        wanted = global_count(budget, moe, sum(layer.num_experts for layer in moe.values()))
        found = self._joined(layers, moe, budget, least, wanted)
        return {index: self._picked(layers[index], found[index]) for index in moe}

    def _joined(
        self,
        layers: Mapping[int, LayerProfile],
        moe: Mapping[int, MoELayer],
        budget: Budget,
        least: Mapping[int, int],
        wanted: int,
    ) -> dict[int, list[list[int]]]:
        """Clusters of each layer, so that `wanted` are left in all and each layer has `least` at least.

        In layers with groups single clusters cannot be had: fewer than `wanted` are left if that is no such number.
        """
        parts: list[_Part] = []
        for index, layer in moe.items():
            E, groups = layer.num_experts, layer.groups
            alone = sorted(e for i, e in budget.protect if i == index)
            most = E - least[index] if self.max_merges is None else min(E - least[index], self.max_merges)
            if most // groups == 0:
                continue
            distance_EE = self.distances(layers[index]).numpy()
            distance_EE[alone, :] = distance_EE[:, alone] = np.inf
            size = E // groups
            inside = [slice(g * size, (g + 1) * size) for g in range(groups)]
            parts.append(_Part(index, size, [_Pairs(distance_EE[s, s]) for s in inside], most // groups, self.linkage))
        total = sum(layer.num_experts for layer in moe.values())
        merges = _choose(parts, total - wanted)
        clusters = {index: [[e] for e in range(layer.num_experts)] for index, layer in moe.items()}
        for part in parts:
            clusters[part.index] = merges[part.index]
        left = sum(len(c) for c in clusters.values())
        if left > wanted:
            raise UsageError(
                f"the budget keeps {wanted} of {total} experts, but at least {left} have to stay: top-k, routing"
                " groups, protected experts, excluded layers, --minimum or max_merges do not let more of them join",
                "Raise the budget or relax one of these.",
            )
        return clusters

    def _picked(self, layer: LayerProfile, clusters: list[list[int]]) -> Pick:
        best = {}
        for members in clusters:
            distance_C = distances_to_mean(layer.expert_gram_EE, members)
            best[members[int(distance_C.argmin())]] = members
        keep = sorted(best)
        merge = len(keep) < layer.experts and len(keep) <= self.merge_max_clusters
        return Pick(keep, torch.zeros(0), {"members": [best[e] for e in keep], "merge": merge})

    def rebuild(self, experts: ExpertBank, plan: LayerPlan, seen: LayerProfile | None = None) -> dict[str, float]:
        before = [_kurtosis(experts, e) for e in range(plan.experts)]
        clusters = _clusters_of(plan)
        if plan.extra["merge"]:
            for kept, members in clusters:
                if len(members) > 1:
                    read = [vars(experts.read(e, torch.float32)) for e in members]
                    names = [name for name, value in read[0].items() if value is not None]
                    mean = {name: torch.stack([r[name] for r in read]).mean(0) for name in names}
                    experts.write(kept, ExpertWeights(**mean))
        after = [_kurtosis(experts, e) for e in plan.keep]
        return {
            "clusters": len(clusters),
            "largest": max(len(members) for _, members in clusters),
            "merged": float(plan.extra["merge"]),
            "kurtosis_before": sum(before) / len(before),
            "kurtosis_after": sum(after) / len(after),
        }

    def router_rows(self, rows: dict[str, Tensor], plan: LayerPlan) -> dict[str, Tensor]:
        if not plan.extra["merge"]:
            return {}
        return {
            name: torch.stack([old[members].float().mean(0) for _, members in _clusters_of(plan)]).to(old.dtype)
            for name, old in rows.items()
        }


def _kurtosis(experts: ExpertBank, expert: int) -> float:
    weights, moments = experts.read(expert), Moments()
    for matrix in (weights.gate_IH, weights.up_IH, weights.down_HI):
        if matrix is not None:
            moments.add(matrix)
    return moments.kurtosis


def _clusters_of(plan: LayerPlan) -> list[tuple[int, list[int]]]:
    """(kept expert, members of its cluster) in the order of `plan.keep`."""
    members = plan.extra["members"]
    if len(members) != len(plan.keep) or any(e not in own for e, own in zip(plan.keep, members, strict=True)):
        raise UsageError(
            f"layer {plan.index}: the clusters in the plan do not belong to the experts it keeps",
            "Plan again with another budget instead of editing `keep`.",
        )
    return list(zip(plan.keep, members, strict=True))


# -- clustering -------------------------------------------------------------------------------------------------------


class _Pairs:
    """The pairs of some experts in the order in which they are gone through: by distance, ties by number.

    rank_EE : place of each pair, `none` on the diagonal. sum_P : u + v of each place. value_P : its distance.
    """

    def __init__(self, distance_EE: Array) -> None:
        E = len(distance_EE)
        first, second = np.triu_indices(E, 1)
        value = distance_EE[first, second]
        order = np.argsort(value, kind="stable")
        self.distance_EE = distance_EE
        self.value_P = value[order]
        self.first_P, self.second_P = first[order], second[order]
        self.none = len(order)
        self.sum_P = np.append(first[order] + second[order], 0)
        self.rank_EE = np.full((E, E), self.none)
        self.rank_EE[self.first_P, self.second_P] = self.rank_EE[self.second_P, self.first_P] = np.arange(len(order))


@dataclass(frozen=True)
class Joined:
    """What clustering with one threshold gave.

    merges : pairs (u, v) that joined their clusters, in order. above : the largest distance that was let pass; below :
    the smallest that was not. Every threshold in (above, below] gives the same.
    """

    merges: list[tuple[int, int]]
    above: float
    below: float


def code_merges(pairs: _Pairs, threshold: float, most: int) -> Joined:
    """The authors' agglomeration: at most `most` joins at one threshold.

    Their loop takes the closest pair (u, v) that has not been looked at, joins the clusters of u and v if all of
    d[w, v], w with u, and d[w, u], w with v, are below t, and sets what it looked at to infinity in either case. So at
    any time every pair closer than the present one is infinite, and (u, v) can only pass if u is the nearest to v in
    its own cluster and v the nearest to u in its: what is looked at again and again there is decided here once per pair
    of clusters and join. The results are the same.
    """
    E, none, sum_P = len(pairs.rank_EE), pairs.none, pairs.sum_P
    near_CE, far_CE = pairs.rank_EE.copy(), pairs.distance_EE.copy()  # cluster, expert: closest pair, farthest member
    members = {e: np.array([e]) for e in range(E)}
    open_CC = np.where((far_CE < threshold) & np.isfinite(far_CE), near_CE, none)  # first pair that could join these
    cluster_E = np.arange(E)
    alive_C = np.ones(E, dtype=bool)
    above = -np.inf
    below = float(far_CE[far_CE >= threshold].min(initial=np.inf))
    merges: list[tuple[int, int]] = []
    best_C = open_CC.min(1) if E else np.zeros(0, dtype=np.int64)
    while len(merges) < most:
        present = int(best_C.min(initial=none))
        if present == none:
            break
        u, v = int(pairs.first_P[present]), int(pairs.second_P[present])
        a, b = int(cluster_E[u]), int(cluster_E[v])
        above = max(above, float(far_CE[a, v]), float(far_CE[b, u]))
        merges.append((u, v))
        members[a] = np.concatenate([members[a], members.pop(b)])
        cluster_E[members[a]] = a
        near_CE[a] = np.minimum(near_CE[a], near_CE[b])
        far_CE[a] = np.maximum(far_CE[a], far_CE[b])
        alive_C[b] = False
        others = np.flatnonzero(alive_C)
        others = others[others != a]
        stale = best_C[others] if len(others) else others
        touched = others[(open_CC[others, a] == stale) | (open_CC[others, b] == stale)]
        open_CC[b, :] = open_CC[:, b] = open_CC[a, :] = open_CC[:, a] = none
        best_C[a] = best_C[b] = none
        if len(others):
            own = members[a]
            rank = near_CE[others[:, None], own[None, :]]  # [C, members]: the closest pair of each with each cluster
            partner = sum_P[rank] - own[None, :]
            mutual = near_CE[a, partner] == rank  # pairs passed before are never: clusters only grow
            reach = np.maximum(far_CE[others[:, None], own[None, :]], far_CE[a, partner])
            below = min(below, float(reach[mutual & (reach >= threshold)].min(initial=np.inf)))
            first = np.where(mutual & (reach < threshold), rank, none).min(1)
            open_CC[a, others] = open_CC[others, a] = first
            best_C[a] = first.min()
            best_C[touched] = open_CC[touched].min(1)
            best_C[others] = np.minimum(best_C[others], first)
    return Joined(merges, above, below)


def complete_merges(pairs: _Pairs) -> tuple[list[tuple[int, int]], list[float]]:
    """Complete linkage: all joins in order, as pairs of members, and their heights (largest distance inside)."""
    E = len(pairs.distance_EE)
    if E < 2:
        return [], []
    finite = np.where(np.isfinite(pairs.distance_EE), pairs.distance_EE, np.finfo(np.float64).max / 4)
    np.fill_diagonal(finite, 0.0)
    tree = agglomerative(squareform(finite, checks=False), method="complete")
    member = [*range(E), *([0] * (E - 1))]
    merges, heights = [], []
    for step, (a, b, height, _) in enumerate(tree.tolist()):
        member[E + step] = member[int(a)]
        if height >= np.finfo(np.float64).max / 8:  # a protected expert would lose its place
            break
        merges.append((member[int(a)], member[int(b)]))
        heights.append(float(height))
    return merges, heights


class _Part:
    """One layer: its groups are clustered apart and join equally often, at most `most` times each."""

    def __init__(self, index: int, size: int, groups: list[_Pairs], most: int, linkage: str) -> None:
        self.index, self.size, self.groups, self.most = index, size, groups, most
        self.trees = [complete_merges(pairs) for pairs in groups] if linkage == "complete" else None
        self._known: list[list[Joined]] = [[] for _ in groups]

    def values(self) -> Array:
        """All numbers at which a threshold can change something, one ascending array."""
        if self.trees is not None:
            return np.array([height for _, heights in self.trees for height in heights])
        return np.concatenate([pairs.value_P[np.isfinite(pairs.value_P)] for pairs in self.groups])

    def joins(self, threshold: float) -> int:
        """How often each group joins."""
        return min(len(merges) for merges in self._merges(threshold))

    def _merges(self, threshold: float) -> list[list[tuple[int, int]]]:
        if self.trees is not None:
            return [m[: min(self.most, int(np.searchsorted(h, threshold, "left")))] for m, h in self.trees]
        return [self._joined(g, threshold).merges for g in range(len(self.groups))]

    def _joined(self, group: int, threshold: float) -> Joined:
        for known in self._known[group]:
            if known.above < threshold <= known.below:
                return known
        found = code_merges(self.groups[group], threshold, self.most)
        self._known[group].append(found)
        return found

    def clusters(self, threshold: float, joins: int) -> list[list[int]]:
        """Experts of the layer after the first `joins` joins of every group, ascending."""
        label = list(range(self.size * len(self.groups)))
        for g, merges in enumerate(self._merges(threshold)):
            for u, v in merges[:joins]:
                a, b = label[g * self.size + u], label[g * self.size + v]
                label = [a if own == b else own for own in label]
        found: dict[int, list[int]] = {}
        for expert, own in enumerate(label):
            found.setdefault(own, []).append(expert)
        return list(found.values())


def _guess(parts: list[_Part], gone: int) -> float:
    """The threshold at which complete linkage removes about `gone` experts: where the search begins."""
    heights = [h for part in parts for pairs in part.groups for h in complete_merges(pairs)[1][: part.most]]
    return sorted(heights)[min(gone, len(heights)) - 1] if heights else np.inf


def _choose(parts: list[_Part], gone: int) -> dict[int, list[list[int]]]:
    """{layer: clusters} at the smallest threshold known to remove `gone` experts, and not one more.

    Narrows the sorted distances down between a threshold that removes too few and one that removes enough. Where the
    last distance alone makes the difference, layers are let past it one after the other, the last only so far.
    """
    if gone <= 0 or not parts:
        return {part.index: part.clusters(-np.inf, 0) for part in parts}
    values = np.unique(np.concatenate([part.values() for part in parts]))
    values = np.append(values, np.inf)

    def removed(threshold: float) -> int:
        return sum(part.joins(threshold) * len(part.groups) for part in parts)

    low, high = 0, len(values) - 1  # values[0] lets nothing pass (d < t), values[-1] everything
    guess, step, tries = int(np.searchsorted(values, _guess(parts, gone))), 0, 0
    fewer: int | None = None  # removed at values[low] and values[high], once tried
    more: int | None = None
    while high - low > 1:
        if fewer is not None and more is not None:  # by proportion, and every third time by half
            tries += 1
            share = (gone - fewer) / (more - fewer) if tries % 3 else 0.5
            middle = low + int((high - low) * share)
        else:  # from the guess away in growing steps, until one on either side was tried
            middle = low + step if fewer is not None else high - step if more is not None else guess
            step = 2 * step or guess // 16 + 1
        middle = min(max(middle, low + 1), high - 1)
        count = removed(float(values[middle]))
        if count < gone:
            low, fewer = middle, count
        else:
            high, more = middle, count
        if count == gone:
            break
    before, after = float(values[low]), float(values[high])
    enough, left = removed(after), gone - removed(before)
    chosen = {}
    for part in parts:
        less, more = part.joins(before), part.joins(after)
        if enough == gone:
            chosen[part.index] = part.clusters(after, more)
            continue
        step = max(min(more - less, -(-left // len(part.groups))), 0)
        left -= step * len(part.groups)
        chosen[part.index] = part.clusters(after, less + step) if step else part.clusters(before, less)
    return chosen
