"""Groups of similar experts: from similarities, distances or Gram matrices to labels, and how many groups a layer gets.

All give one label per expert, numbered in the order of the clusters' first experts; `members_of` makes lists of them.
All take `alone`, experts that stay clusters of their own and count as such, and `max_size`, the most experts of a
cluster; what cannot be fulfilled is a UsageError. All are deterministic for a seed. Where similarity comes from is not
known here, nor what becomes of a cluster.

`kernel_k_means`, `inertia_curve` and `allocate` are the clustering of Sub-MoE (arXiv:2506.23266), `dominant_experts`
and `around` that of M-SMoE (arXiv:2310.01334), `hierarchical` that of HC-SMoE (arXiv:2410.08589).
"""

# E experts, C clusters, X features of a point

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from scipy.cluster.hierarchy import cut_tree
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from coterie.errors import UsageError

Linkage = Literal["average", "single", "complete", "ward"]
Array = np.ndarray[Any, np.dtype[Any]]
MAX_ROUNDS = 300  # of k-means; each lowers the objective, some ten are usual


def members_of(labels: Sequence[int]) -> list[list[int]]:
    """The experts of each cluster, ascending; clusters in the order of their labels."""
    clusters: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for expert, label in enumerate(labels):
        clusters[label].append(expert)
    return clusters


# -- agglomeration ------------------------------------------------------------------------------------------------


def hierarchical(
    distance_EE: Tensor,
    clusters: int,
    linkage: Linkage = "average",
    *,
    alone: Collection[int] = (),
    max_size: int | None = None,
) -> list[int]:
    """Labels by merging the closest two clusters until `clusters` are left.

    distance_EE : symmetric, diagonal 0; for ward Euclidean distances.
    linkage : distance of two clusters: the mean over pairs of their experts (average, UPGMA), the smallest (single),
        the largest (complete), or ward's growth of the squared error.
    With `max_size`, the closest two whose union is allowed: small enough, and of a size after which the rest can still
    be brought into `clusters` clusters.
    """
    others, wanted = _to_group(len(distance_EE), clusters, alone, max_size)
    distance = _array(distance_EE)[np.ix_(others, others)]
    if wanted == len(others):
        labels = np.arange(wanted)
    elif max_size is None or max_size > len(others) - wanted:
        tree = scipy_linkage(squareform(distance, checks=False), method=linkage)
        labels = cut_tree(tree, n_clusters=wanted)[:, 0]
    else:
        labels = _agglomerate(distance, wanted, linkage, max_size)
    return _joined(len(distance_EE), others, labels)


def _agglomerate(distance: Array, clusters: int, linkage: Linkage, max_size: int) -> Array:
    """Size-limited agglomeration, with the distances to a union by Lance and Williams."""
    count = len(distance)
    distance, size, labels = distance.copy(), np.ones(count, dtype=int), np.arange(count)
    np.fill_diagonal(distance, np.inf)
    bins = _packed([1] * count, clusters, max_size)  # how the clusters so far could end, by their sizes
    for _ in range(count - clusters):
        open_pairs, found, tried = distance.copy(), None, set()
        while found is None:  # some pair is always allowed: two that lie in one bin
            a, b = sorted(int(i) for i in np.unravel_index(open_pairs.argmin(), distance.shape))
            sizes = (int(size[a]), int(size[b]))
            assert bins is not None
            assert sizes not in tried
            tried |= {sizes, sizes[::-1]}
            found = _bins_after(bins, sizes, clusters, max_size)
            if found is None:
                of_these = (size[:, None] == sizes[0]) & (size == sizes[1])
                open_pairs[of_these | of_these.T] = np.inf
        bins = found
        union = _union(distance, size, a, b, linkage)
        distance[a], distance[:, a], distance[a, a] = union, union, np.inf
        distance[b], distance[:, b] = np.inf, np.inf
        size[a], size[b] = size[a] + size[b], 0
        labels[labels == b] = a
    return labels


def _union(distance: Array, size: Array, a: int, b: int, linkage: Linkage) -> Array:
    """Distance of every cluster to the union of a and b."""
    to_a, to_b = distance[a], distance[b]
    grown = (size[a] + size) * to_a**2 + (size[b] + size) * to_b**2 - size * distance[a, b] ** 2
    unions: dict[Linkage, Array] = {
        "single": np.minimum(to_a, to_b),
        "complete": np.maximum(to_a, to_b),
        "average": (size[a] * to_a + size[b] * to_b) / (size[a] + size[b]),
        "ward": np.sqrt(np.maximum(grown, 0) / (size[a] + size[b] + size)),
    }
    return unions[linkage]


def _packed(sizes: Sequence[int], bins: int, capacity: int) -> list[list[int]] | None:
    """Sizes in at most `bins` bins, largest first, each where it fits best; None where that finds no place."""
    by_room: dict[int, list[list[int]]] = {capacity: [[] for _ in range(bins)]}
    for size in sorted(sizes, reverse=True):
        room = next((r for r in range(size, capacity + 1) if by_room.get(r)), None)
        if room is None:
            return None
        chosen = by_room[room].pop()
        chosen.append(size)
        by_room.setdefault(room - size, []).append(chosen)
    return [b for several in by_room.values() for b in several]


def _bins_after(bins: list[list[int]], sizes: tuple[int, int], count: int, capacity: int) -> list[list[int]] | None:
    """The bins once two clusters of these sizes are one; None if no place was found for the union."""
    if sum(sizes) > capacity:
        return None

    def without(every: list[int]) -> list[int] | None:
        rest = list(every)
        for size in sizes:
            if size not in rest:
                return None
            rest.remove(size)
        return [*rest, sum(sizes)]

    for number, own in enumerate(bins):
        if (joined := without(own)) is not None:
            return [*bins[:number], joined, *bins[number + 1 :]]
    every = without([size for own in bins for size in own])
    assert every is not None
    return _packed(every, count, capacity)


# -- k-means ------------------------------------------------------------------------------------------------------


def spectral_embedding(similarity_EE: Tensor, dimensions: int) -> Tensor:
    """The eigenvectors of the symmetric normalised Laplacian with the smallest eigenvalues. Shape [E, dimensions].

    similarity_EE : symmetric, not negative. The Laplacian is 1 - D^(-1/2) S D^(-1/2) with the row sums D.
    """
    similarity_EE = similarity_EE.double()
    scale_E = similarity_EE.sum(1).clamp(min=1e-12).rsqrt()
    laplacian_EE = torch.eye(len(similarity_EE), dtype=torch.float64) - scale_E[:, None] * similarity_EE * scale_E
    _, vectors_EE = torch.linalg.eigh((laplacian_EE + laplacian_EE.T) / 2)
    chosen: Tensor = vectors_EE[:, :dimensions]
    return chosen


def k_means(
    points_EX: Tensor, clusters: int, seed: int, *, alone: Collection[int] = (), max_size: int | None = None
) -> list[int]:
    """Labels of the points, every cluster used; the best of ten starts.

    Points that coincide can leave a cluster empty: it then takes the point farthest from its own centre.
    """
    count = len(points_EX)
    others, wanted = _to_group(count, clusters, alone, max_size)
    points_EX = points_EX.double()[others]
    if wanted == len(others):
        labels = torch.arange(wanted)
    elif max_size is not None:
        labels = torch.as_tensor(kernel_k_means(points_EX @ points_EX.T, wanted, seed, max_size=max_size)[0])
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters: handled below
            found = KMeans(wanted, n_init=10, random_state=seed).fit(points_EX.numpy())
        labels = torch.as_tensor(found.labels_).long()
        centres_CX = torch.as_tensor(found.cluster_centers_)
        for empty in sorted(set(range(wanted)) - set(labels.tolist())):
            distance_E = (points_EX - centres_CX[labels]).norm(dim=1)
            single_E = torch.bincount(labels, minlength=wanted)[labels] == 1
            labels[int(distance_E.masked_fill(single_E, -1.0).argmax())] = empty
    return _joined(count, others, labels.numpy())


def spherical_k_means(
    points_EX: Tensor,
    clusters: int,
    seed: int,
    restarts: int = 10,
    *,
    alone: Collection[int] = (),
    max_size: int | None = None,
) -> list[int]:
    """Labels by direction: centres are directions too, and the sum of cosines to them is maximised."""
    unit_EX = torch.nn.functional.normalize(points_EX.double(), dim=1, eps=1e-300)
    return _best_of(unit_EX @ unit_EX.T, _to_direction, clusters, seed, restarts, alone, max_size)[0]


def kernel_k_means(
    gram_EE: Tensor,
    clusters: int,
    seed: int,
    restarts: int = 10,
    *,
    alone: Collection[int] = (),
    max_size: int | None = None,
) -> tuple[list[int], float]:
    """K-means of points known by their inner products alone. Labels, and J, the sum of squared distances to centres.

    gram_EE : inner products, positive semidefinite; for Sub-MoE the mean token-wise cosines of the experts' outputs.
    The squared distance of j to the centre of Q is G_jj - 2/|Q| sum_i G_ji + 1/|Q|^2 sum_ii' G_ii'. Starts are drawn as
    k-means++ does; a cluster left empty takes the point farthest from its own centre; the lowest J wins.
    """
    return _best_of(gram_EE, _to_mean, clusters, seed, restarts, alone, max_size)


Cost = Callable[[Array, Array, Array], Array]  # (gram, labels, sizes) -> cost of each point in each cluster, [E, C]


def _cluster_sums(gram: Array, labels: Array, sizes: Array) -> tuple[Array, Array]:
    """sum_{i in Q} G_ji [E, C] and sum_{i, i' in Q} G_ii' [C]; no cluster is empty."""
    order, first = labels.argsort(kind="stable"), np.cumsum(sizes) - sizes
    sums = np.add.reduceat(gram[:, order], first, axis=1)
    return sums, np.add.reduceat(sums[order, labels[order]], first)


def _to_mean(gram: Array, labels: Array, sizes: Array) -> Array:
    sums, inner = _cluster_sums(gram, labels, sizes)
    cost: Array = np.maximum(gram.diagonal()[:, None] - 2 / sizes * sums + inner / sizes**2, 0)
    return cost


def _to_direction(gram: Array, labels: Array, sizes: Array) -> Array:
    sums, inner = _cluster_sums(gram, labels, sizes)
    length = np.sqrt(np.maximum(inner, 0))
    cost: Array = 1 - np.divide(sums, length, out=np.zeros_like(sums), where=length > 0)
    return cost


def _best_of(
    gram_EE: Tensor,
    cost: Cost,
    clusters: int,
    seed: int,
    restarts: int,
    alone: Collection[int],
    max_size: int | None,
) -> tuple[list[int], float]:
    others, wanted = _to_group(len(gram_EE), clusters, alone, max_size)
    gram, random = _array(gram_EE)[np.ix_(others, others)], np.random.default_rng(seed)
    if wanted == len(others):
        return list(range(len(gram_EE))), 0.0
    runs = [lloyd(gram, _start(gram, wanted, random, max_size), wanted, cost, max_size) for _ in range(restarts)]
    labels, history = min(runs, key=lambda run: run[1][-1])
    return _joined(len(gram_EE), others, labels), history[-1]


def _start(gram: Array, clusters: int, random: np.random.Generator, max_size: int | None) -> Array:
    """Labels by the nearest of points that k-means++ draws, each with a chance that grows with its squared distance."""
    norm = gram.diagonal()
    chosen, nearest = [int(random.integers(len(gram)))], np.full(len(gram), np.inf)
    while len(chosen) < clusters:
        new = chosen[-1]
        nearest = np.minimum(nearest, np.maximum(norm - 2 * gram[new] + norm[new], 0))
        chance = nearest.copy()
        chance[chosen] = 0
        if not chance.sum() > 0:  # all others coincide with a chosen one
            chance = np.ones(len(gram))
            chance[chosen] = 0
        chosen.append(int(random.choice(len(gram), p=chance / chance.sum())))
    distance = norm[:, None] - 2 * gram[:, chosen] + norm[chosen]
    distance[chosen] = np.inf
    distance[chosen, np.arange(clusters)] = -1.0  # each in a cluster of its own, also where two coincide
    return _assigned(distance, None, max_size)


def _assigned(cost: Array, before: Array | None, max_size: int | None) -> Array:
    """The cheapest labels; with `max_size` those of the least total cost. Ties stay where they were."""
    count, clusters = cost.shape
    if max_size is None or max_size > count - clusters:
        labels: Array = cost.argmin(1)
        if before is not None:
            every = np.arange(count)
            labels = np.where(cost[every, before] <= cost[every, labels], before, labels)
        return labels
    finite = np.where(np.isfinite(cost), cost, 1 + 2 * count * np.abs(cost[np.isfinite(cost)]).max())
    _, place = linear_sum_assignment(np.repeat(finite, max_size, axis=1))
    labels = place // max_size
    if before is not None:
        every = np.arange(count)
        if cost[every, before].sum() <= cost[every, labels].sum():
            return before
    return labels


def lloyd(
    gram: Array, labels: Array, clusters: int, cost: Cost = _to_mean, max_size: int | None = None
) -> tuple[Array, list[float]]:
    """K-means from given labels on a Gram matrix: labels that are stable, and J of the labels of every round.

    J never grows. `labels` use every cluster and fit `max_size`.
    """
    every = np.arange(len(gram))
    cost_EC = cost(gram, labels, np.bincount(labels))
    history = [float(cost_EC[every, labels].sum())]
    for _ in range(MAX_ROUNDS):
        new = _assigned(cost_EC, labels, max_size)
        new = _without_empty(new, cost_EC[every, new], clusters)
        cost_EC = cost(gram, new, np.bincount(new))
        if not (objective := float(cost_EC[every, new].sum())) < history[-1]:
            break  # stable; or equal but for rounding, which may let labels alternate
        labels = new
        history.append(objective)
    return labels, history


def _without_empty(labels: Array, own_cost: Array, clusters: int) -> Array:
    """Each empty cluster takes the point farthest from its own centre, of clusters of more than one."""
    labels, own_cost = labels.copy(), own_cost.copy()
    sizes = np.bincount(labels, minlength=clusters)
    for empty in (sizes == 0).nonzero()[0]:
        farthest = int(np.where(sizes[labels] > 1, own_cost, -np.inf).argmax())
        sizes[labels[farthest]] -= 1
        labels[farthest], sizes[empty], own_cost[farthest] = empty, 1, 0.0
    return labels


# -- how many clusters --------------------------------------------------------------------------------------------


def inertia_curve(
    gram_EE: Tensor, seed: int, *, restarts: int = 10, alone: Collection[int] = (), max_size: int | None = None
) -> Tensor:
    """J of k-means with 1, 2, ..., E clusters, never growing. Shape [E], float64; inf where k cannot be fulfilled.

    The first has `restarts` starts. Each further k takes the best of three: the clusters before, with the point that
    is farthest from its centre made a cluster; ward's clusters; a start of k-means++.
    """
    count, alone = len(gram_EE), set(alone)
    curve_E = torch.full((count,), math.inf, dtype=torch.float64)
    others = [e for e in range(count) if e not in alone]
    gram = _array(gram_EE)[np.ix_(others, others)]
    if not others:
        curve_E[-1] = 0
        return curve_E
    least = 1 if max_size is None else -(-len(others) // max_size)
    norm = gram.diagonal()
    distance = np.sqrt(np.maximum(norm[:, None] - 2 * gram + norm, 0))
    np.fill_diagonal(distance, 0)
    tree = None
    if max_size is None and len(others) > 1:
        tree = cut_tree(scipy_linkage(squareform(distance, checks=False), method="ward"))
    random, every = np.random.default_rng(seed), np.arange(len(others))
    labels = every
    for k in range(least, len(others) + 1):
        if k == len(others):
            best = 0.0
        else:
            if k == least:
                starts = [_start(gram, k, random, max_size) for _ in range(restarts)]
            else:
                own_cost = _to_mean(gram, labels, np.bincount(labels))[every, labels]
                starts = [_without_empty(labels, own_cost, k), _start(gram, k, random, max_size)]
            if tree is not None:
                starts.append(tree[:, len(others) - k])
            runs = [lloyd(gram, start, k, _to_mean, max_size) for start in starts]
            labels, history = min(runs, key=lambda run: run[1][-1])
            best = min(history[-1], float(curve_E[k + len(alone) - 2]) if k > least else math.inf)
        curve_E[k + len(alone) - 1] = best
    return curve_E


def allocate(
    curves: Mapping[int, Sequence[float] | Tensor],
    per_layer: int | Mapping[int, int],
    window: int | None = 2,
    *,
    minimum: int = 1,
    maximum: int | None = None,
) -> dict[int, int]:
    """Clusters of each layer: consecutive layers share a budget, and the more alike a layer's experts the fewer.

    Parameters
    ----------
    curves : {layer: J of 1, 2, ..., E clusters}, see `inertia_curve`.
    per_layer : clusters a layer has on average, or for each layer what it adds to its window's budget.
    window : how many consecutive layers share; 1 gives each its own, None lets all share. The last may be smaller.
    minimum, maximum : clusters of a layer.

    From `maximum` in all layers, the layer whose J grows least by it loses a cluster, until the budget is met; of equal
    ones the layer that has more. Raises UsageError where the bounds leave no way.
    """
    order, chosen = sorted(curves), dict[int, int]()
    share = {layer: per_layer if isinstance(per_layer, int) else per_layer[layer] for layer in order}
    size = len(order) if window is None else window
    if window is not None and window < 1:
        raise UsageError(f"a window of {window} layers", "Use 1 or more, or all.")
    for start in range(0, len(order), max(size, 1)):
        layers = order[start : start + size]
        curve = {layer: [float(j) for j in curves[layer]] for layer in layers}
        least = {}
        for layer in layers:
            possible = next(k for k, j in enumerate(curve[layer], start=1) if math.isfinite(j))
            least[layer] = max(minimum, possible)
        have = {layer: min(maximum or len(curve[layer]), len(curve[layer])) for layer in layers}
        total = sum(share[layer] for layer in layers)
        if not sum(least.values()) <= total <= sum(have.values()) or any(have[i] < least[i] for i in layers):
            raise UsageError(
                f"layers {layers[0]} to {layers[-1]} cannot have {total} clusters together: they need at least"
                f" {sum(least.values())} and can have {sum(have.values())}",
                "Change the budget, the window or the bounds.",
            )
        while sum(have.values()) > total:
            free = [i for i in layers if have[i] > least[i]]
            loser = min(free, key=lambda i: (curve[i][have[i] - 2] - curve[i][have[i] - 1], -have[i], i))
            have[loser] -= 1
        chosen |= have
    return chosen


# -- dominant experts ---------------------------------------------------------------------------------------------


def dominant_experts(
    counts: Mapping[int, Tensor],
    keep: Mapping[int, int],
    *,
    scope: Literal["global", "uniform"] = "global",
    excluded: Collection[int] = (),
    protected: Mapping[int, Collection[int]] = {},
    minimum: int = 1,
) -> dict[int, list[int]]:
    """The experts of each layer around which the others gather, ascending.

    Parameters
    ----------
    counts : {layer: how many tokens selected each expert}; frequencies are normalised inside each layer.
    keep : {layer: experts that remain}. With scope "global" only their sum matters: the most frequent experts of all
        layers are dominant. With "uniform" each layer keeps its own number.
    excluded : layers where every expert is dominant.
    protected : {layer: experts that are dominant whatever their frequency}.
    minimum : the most used experts of each layer that are dominant in any case, protected ones not counted.

    Of equal frequencies the lower layer and expert come first, so the number is met exactly, where M-SMoE's code, with
    a threshold, falls short of it. Raises UsageError where what must be dominant exceeds the number.
    """
    order = sorted(counts)
    forced: dict[int, set[int]] = {}
    ranked: list[tuple[float, int, int]] = []
    for layer in order:
        count_E = counts[layer].double()
        share = (count_E / count_E.sum().clamp(min=1e-300)).tolist()
        by_use = sorted(range(len(share)), key=lambda e: -share[e])
        own = set(protected.get(layer, ()))
        forced[layer] = set(by_use) if layer in excluded else own | set([e for e in by_use if e not in own][:minimum])
        ranked += [(-share[e], layer, e) for e in range(len(share)) if e not in forced[layer]]
    total = {layer: len(counts[layer]) if layer in excluded else keep[layer] for layer in order}
    ranked.sort(key=lambda entry: entry[0])
    dominant = {layer: set(own) for layer, own in forced.items()}
    for group in [order] if scope == "global" else [[layer] for layer in order]:
        room = sum(total[layer] - len(forced[layer]) for layer in group)
        inside = [entry for entry in ranked if entry[1] in group]
        if not 0 <= room <= len(inside):
            where = f"layer {group[0]}" if len(group) == 1 else f"{len(group)} layers"
            raise UsageError(
                f"{where}: {sum(total[i] for i in group)} experts to keep of {sum(len(counts[i]) for i in group)}, and"
                f" {sum(len(forced[i]) for i in group)} of them must stay",
                "Change the budget or protect fewer experts.",
            )
        for _, layer, expert in inside[:room]:
            dominant[layer].add(expert)
    return {layer: sorted(own) for layer, own in dominant.items()}


def around(
    similarity_EE: Tensor, dominants: Collection[int], *, alone: Collection[int] = (), max_size: int | None = None
) -> list[int]:
    """Labels by the most similar dominant expert; a tie goes to the lowest.

    alone : dominant experts that nobody joins.
    With `max_size` the most similar pairs come first, and a dominant expert whose cluster is full takes no more.
    """
    count, leaders = len(similarity_EE), sorted({*dominants} - {*alone})
    followers = [e for e in range(count) if e not in leaders and e not in alone]
    room = len(leaders) * ((max_size or count) - 1)
    if len(followers) > room:
        raise UsageError(
            f"{len(leaders)} dominant experts"
            + (f" with clusters of at most {max_size}" if max_size and leaders else "")
            + f" have no room for the other {len(followers)} of {count} experts",
            "Keep more experts" + (" or allow larger clusters." if max_size and leaders else "."),
        )
    home = np.arange(count)
    similarity = _array(similarity_EE)[np.ix_(followers, leaders)]
    taken, free = dict.fromkeys(leaders, 1), set(followers)
    for pair in np.argsort(-similarity, axis=None, kind="stable"):
        follower, leader = followers[pair // len(leaders)], leaders[pair % len(leaders)]
        if follower in free and taken[leader] < (max_size or count):
            free.remove(follower)
            taken[leader] += 1
            home[follower] = leader
    return _joined(count, list(range(count)), home)


# -- what all share -----------------------------------------------------------------------------------------------


def _array(matrix: Tensor) -> Array:
    found: Array = matrix.detach().cpu().double().numpy()
    return found


def _to_group(count: int, clusters: int, alone: Collection[int], max_size: int | None) -> tuple[list[int], int]:
    """The experts that are not alone, and how many clusters are left for them. Raises UsageError where that fails."""
    others = [e for e in range(count) if e not in alone]
    wanted = clusters - (count - len(others))
    if not min(count, 1) <= clusters <= count:
        raise UsageError(f"{clusters} clusters of {count} experts", f"Use 1 to {count}.")
    if wanted < min(len(others), 1):
        raise UsageError(
            f"{count - len(others)} experts that stay alone leave no room for the other {len(others)} in"
            f" {clusters} clusters",
            "Raise the budget or protect fewer experts.",
        )
    if max_size is not None and wanted * max_size < len(others):
        raise UsageError(
            f"{wanted} clusters of at most {max_size} experts cannot hold {len(others)}",
            f"Allow clusters of {-(-len(others) // wanted)}, or raise the budget.",
        )
    return others, wanted


def _joined(count: int, others: Sequence[int], labels: Array) -> list[int]:
    """Labels of all experts, those not in `others` alone, numbered in the order of the clusters' first experts."""
    raw = [(1, expert) for expert in range(count)]
    for expert, label in zip(others, labels, strict=True):
        raw[expert] = (0, int(label))
    number = {label: position for position, label in enumerate(dict.fromkeys(raw))}
    return [number[label] for label in raw]
