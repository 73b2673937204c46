"""Clusters of experts: agglomeration, k-means on Gram matrices, budgets shared by layers, dominant experts."""

# E experts, C clusters

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import KMeans

from coterie.compression import clustering
from coterie.compression.clustering import (
    allocate,
    around,
    dominant_experts,
    hierarchical,
    inertia_curve,
    k_means,
    kernel_k_means,
    lloyd,
    members_of,
    spherical_k_means,
)
from coterie.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
LINKAGES = ("average", "single", "complete", "ward")


def points(count, seed=0, features=5):
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distances(points_EX):
    return torch.cdist(points_EX, points_EX, compute_mode="donot_use_mm_for_euclid_dist")


def planted(groups, members, seed, noise=0.01):
    """Points around far centres in a shuffled order, and the clusters they belong to."""
    generator = torch.Generator().manual_seed(seed)
    owner = torch.randperm(groups * members, generator=generator) % groups
    centres = 10 * torch.eye(groups, dtype=torch.float64)
    noise_EX = noise * torch.randn(len(owner), groups, generator=generator, dtype=torch.float64)
    return centres[owner] + noise_EX, {tuple((owner == g).nonzero().flatten().tolist()) for g in range(groups)}


def as_set(labels):
    return {tuple(members) for members in members_of(labels)}


def inertia(points_EX, labels):
    clusters = [points_EX[members] for members in members_of(labels)]
    return sum(float((own - own.mean(0)).square().sum()) for own in clusters)


EVERY = {
    **{name: lambda x, k, name=name, **o: hierarchical(distances(x), k, name, **o) for name in LINKAGES},
    "k-means": lambda x, k, **o: k_means(x, k, 0, **o),
    "spherical": lambda x, k, **o: spherical_k_means(x, k, 0, **o),
    "kernel": lambda x, k, **o: kernel_k_means(x @ x.T, k, 0, **o)[0],
}


# -- what all have in common --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_cluster_is_used_protected_experts_are_alone_and_none_is_too_large(name, data):
    count = data.draw(st.integers(1, 14))
    distinct = data.draw(st.integers(1, count))
    alone = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    others = count - len(alone)
    clusters = len(alone) + (data.draw(st.integers(1, others)) if others else 0)
    wanted = clusters - len(alone)
    least = -(-others // wanted) if wanted else 1
    max_size = data.draw(st.none() | st.integers(least, count))
    x = points(count, data.draw(st.integers(0, 99)))[torch.arange(count) % distinct]  # some coincide
    labels = EVERY[name](x, clusters, alone=alone, max_size=max_size)
    found = members_of(labels)
    assert len(found) == clusters
    assert [own[0] for own in found] == sorted(own[0] for own in found)
    assert sorted(itertools.chain(*found)) == list(range(count))
    assert all(len(own) > 0 for own in found)
    assert all([e] in found for e in alone)
    assert max_size is None or all(len(own) <= max_size for own in found)
    assert labels == EVERY[name](x, clusters, alone=alone, max_size=max_size)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("limit", [False, True])
def test_planted_clusters_are_found(name, limit):
    for seed in range(5):
        x, expected = planted(4, 3, seed)
        assert as_set(EVERY[name](x, 4, max_size=3 if limit else None)) == expected


@pytest.mark.parametrize("name", EVERY)
def test_as_many_clusters_as_experts_are_the_experts(name):
    assert EVERY[name](points(6), 6) == list(range(6))


@pytest.mark.parametrize("name", EVERY)
def test_what_cannot_be_grouped_is_refused_with_the_numbers(name):
    x = points(10)
    with pytest.raises(UsageError, match="2 experts that stay alone leave no room for the other 8 in 2 clusters"):
        EVERY[name](x, 2, alone=[0, 1])
    with pytest.raises(UsageError, match="3 clusters of at most 3 experts cannot hold 10") as error:
        EVERY[name](x, 3, max_size=3)
    assert "Allow clusters of 4" in error.value.hint
    for wrong in (0, 11):
        with pytest.raises(UsageError, match=f"{wrong} clusters of 10 experts"):
            EVERY[name](x, wrong)


# -- agglomeration ------------------------------------------------------------------------------------------------


def naive(distance, clusters, between):
    """Agglomeration from its definition: the distance of clusters from all pairs of their experts."""
    groups = [[i] for i in range(len(distance))]
    while len(groups) > clusters:
        a, b = min(
            itertools.combinations(range(len(groups)), 2),
            key=lambda ab: between([float(distance[i, j]) for i in groups[ab[0]] for j in groups[ab[1]]]),
        )
        groups[a] += groups.pop(b)
    return {tuple(sorted(group)) for group in groups}


@pytest.mark.parametrize(
    ("name", "between"), [("average", lambda d: sum(d) / len(d)), ("single", min), ("complete", max)]
)
@pytest.mark.parametrize("limited", [False, True])
def test_linkages_are_those_of_the_definition(name, between, limited, monkeypatch):
    """The size-limited form too, with a limit that never binds."""
    for seed, clusters in itertools.product(range(6), (2, 4, 7)):
        distance = distances(points(13, seed))
        expected = naive(distance, clusters, between)
        if limited:
            labels = clustering._agglomerate(distance.numpy(), clusters, name, 13).tolist()
            found = {tuple(i for i, own in enumerate(labels) if own == label) for label in labels}
        else:
            found = as_set(hierarchical(distance, clusters, name))
        assert found == expected


@pytest.mark.parametrize("name", LINKAGES)
def test_clusters_equal_scipys_cut(name):
    for seed in range(5):
        distance = distances(points(20, seed))
        expected = fcluster(linkage(squareform(distance.numpy()), name), 6, "maxclust")
        labels = clustering._agglomerate(distance.numpy(), 6, name, 20)
        for found in (hierarchical(distance, 6, name), labels.tolist()):
            assert len(set(zip(found, expected.tolist()))) == 6


@pytest.mark.parametrize("name", LINKAGES)
def test_the_order_of_experts_has_no_influence(name):
    distance, order = distances(points(15, 3)), torch.randperm(15, generator=torch.Generator().manual_seed(0))
    for max_size in (None, 4):
        found = as_set(hierarchical(distance, 5, name, max_size=max_size))
        again = members_of(hierarchical(distance[order][:, order], 5, name, max_size=max_size))
        assert {tuple(sorted(int(order[e]) for e in own)) for own in again} == found


def test_a_size_limit_is_met_where_merging_the_closest_first_would_run_into_a_dead_end():
    """Three close pairs and two close experts, to be two clusters of four: pairs may not become a six."""
    position = torch.tensor([0.0, 0.1, 1.0, 1.1, 2.0, 2.1, 9.0, 9.5]).double()[:, None]
    found = hierarchical(distances(position), 2, "average", max_size=4)
    assert sorted(len(own) for own in members_of(found)) == [4, 4]
    tight = hierarchical(distances(points(24, 1)), 8, "single", max_size=3)
    assert {len(own) for own in members_of(tight)} == {3}


# -- k-means ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_kernel_k_means_is_k_means_of_the_points_themselves(seed):
    """The same start on stacked unit outputs, as Sub-MoE has them, and on their Gram matrix."""
    x = torch.nn.functional.normalize(points(16, seed, features=40), dim=1)
    start = np.arange(16) % 4
    labels, history = lloyd((x @ x.T).numpy(), start, 4)
    centres = np.stack([x.numpy()[start == c].mean(0) for c in range(4)])
    explicit = KMeans(4, init=centres, n_init=1, algorithm="lloyd", tol=0).fit(x.numpy())
    assert labels.tolist() == explicit.labels_.tolist()
    assert history[-1] == pytest.approx(explicit.inertia_, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.data())
def test_the_objective_never_grows_and_is_the_inertia(count, data):
    clusters = data.draw(st.integers(1, count))
    x = points(count, data.draw(st.integers(0, 99)))
    max_size = data.draw(st.none() | st.integers(-(-count // clusters), count))
    start = np.arange(count) % clusters
    for cost in (clustering._to_mean, clustering._to_direction):
        y = x if cost is clustering._to_mean else torch.nn.functional.normalize(x, dim=1)
        labels, history = lloyd((y @ y.T).numpy(), start, clusters, cost, max_size)
        assert all(b <= a for a, b in itertools.pairwise(history))
        assert set(labels.tolist()) == set(range(clusters))
        if cost is clustering._to_mean:
            assert history[-1] == pytest.approx(inertia(x, labels.tolist()), abs=1e-9)
        else:
            cosines = sum(float(y[own].sum(0).norm()) for own in members_of(labels.tolist()))
            assert history[-1] == pytest.approx(count - cosines, abs=1e-9)


@pytest.mark.parametrize("max_size", [None, 5])
def test_restarts_find_what_an_unlucky_start_misses(max_size):
    x, expected = planted(8, 5, 0, noise=1.0)
    gram = x @ x.T
    labels, objective = kernel_k_means(gram, 8, 0, 10, max_size=max_size)
    once = [kernel_k_means(gram, 8, seed, 1, max_size=max_size)[1] for seed in range(10)]
    assert as_set(labels) == expected
    assert objective == pytest.approx(inertia(x, labels))
    assert objective == pytest.approx(min(once))
    assert max(once) > 1.5 * objective or max_size is not None


def test_an_empty_cluster_takes_the_farthest_point():
    own_cost = np.array([0.1, 0.5, 0.2, 9.0])
    assert clustering._without_empty(np.array([0, 0, 0, 1]), own_cost, 3).tolist() == [0, 2, 0, 1]


def test_a_size_limit_gives_the_least_total_cost_not_the_first_come():
    cost = np.array([[0.0, 5.0], [0.0, 1.0], [0.0, 9.0]])
    assert clustering._assigned(cost, None, None).tolist() == [0, 0, 0]
    assert clustering._assigned(np.vstack([cost, [[0.5, 0.0]]]), None, 2).tolist() == [0, 1, 0, 1]


def test_spherical_k_means_sees_directions_only():
    direction, expected = planted(3, 4, 0)
    scaled = direction * torch.logspace(-3, 3, 12, dtype=torch.float64)[:, None]
    assert as_set(spherical_k_means(scaled, 3, 0)) == expected
    assert as_set(k_means(scaled, 3, 0)) != expected


# -- how many clusters --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 16), st.data())
def test_a_curve_never_grows_ends_at_zero_and_is_inf_where_nothing_is_possible(count, data):
    alone = data.draw(st.sets(st.integers(0, count - 1), max_size=count))
    max_size = data.draw(st.none() | st.integers(1, count))
    x = points(count, data.draw(st.integers(0, 99)))
    curve = inertia_curve(x @ x.T, 0, alone=alone, max_size=max_size).tolist()
    assert len(curve) == count
    others = count - len(alone)
    least = len(alone) + (-(-others // (max_size or count)))
    assert all(math.isinf(j) for j in curve[: least - 1])
    assert all(math.isfinite(j) for j in curve[least - 1 :])
    assert all(b <= a for a, b in itertools.pairwise(curve[least - 1 :]))
    assert curve[-1] == 0


def test_a_curve_is_what_k_means_reaches():
    x = points(24, 2)
    gram = x @ x.T
    curve = inertia_curve(gram, 0).tolist()
    assert curve[0] == pytest.approx(inertia(x, [0] * 24))
    for k in range(1, 25):
        assert curve[k - 1] <= 1.05 * kernel_k_means(gram, k, 0, 10)[1] + 1e-9


def test_a_protected_expert_moves_the_curve_by_one():
    x = points(9, 1)
    x = torch.cat([x, x[:1] + 50])  # the last is far from all
    free, protected = (inertia_curve(x @ x.T, 0, alone=alone).tolist() for alone in ([], [9]))
    assert math.isinf(protected[0])
    assert free[1:] == pytest.approx(protected[1:])


def test_two_copies_in_one_layer_are_merged_before_anything_in_the_next():
    copies, different = points(8, 0, 20), points(8, 1, 20)
    copies[5] = copies[2]
    curves = {3: inertia_curve(copies @ copies.T, 0), 7: inertia_curve(different @ different.T, 0)}
    assert allocate(curves, {3: 7, 7: 8}, window=2) == {3: 7, 7: 8}
    assert allocate({7: curves[3], 3: curves[7]}, {3: 7, 7: 8}, window=2) == {3: 8, 7: 7}


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.data())
def test_budgets_add_up_inside_every_window(layers, seed, data):
    random = np.random.default_rng(seed)
    curves = {2 * i: np.sort(random.random(8))[::-1].copy() for i in range(layers)}
    per_layer, window = data.draw(st.integers(1, 8)), data.draw(st.sampled_from([1, 2, 3, None]))
    found = allocate(curves, per_layer, window)
    order = sorted(curves)
    size = window or layers
    for start in range(0, layers, size):
        inside = order[start : start + size]
        assert sum(found[i] for i in inside) == per_layer * len(inside)
    assert all(1 <= k <= 8 for k in found.values())
    assert window != 1 or set(found.values()) == {per_layer}


def test_the_marginal_rule_is_followed_step_by_step():
    """From 4 + 4: increases of the first 1, 2, 9, of the second 3, 4, 1; its third is reached only past the others."""
    curves = {0: [12.0, 3.0, 1.0, 0.0], 1: [8.0, 7.0, 3.0, 0.0]}
    steps = [(4, 4), (3, 4), (2, 4), (2, 3), (2, 2), (2, 1), (1, 1)]
    for number, expected in enumerate(steps):
        budget = {0: 8 - number, 1: 0}
        assert tuple(allocate(curves, budget, window=2).values()) == expected


def test_bounds_hold_and_an_impossible_budget_is_refused():
    curves = {0: [9.0, 0.0, 0.0, 0.0], 1: [9.0, 8.0, 7.0, 0.0]}
    assert allocate(curves, 3, None) == {0: 2, 1: 4}
    assert allocate(curves, 3, None, minimum=3) == {0: 3, 1: 3}
    assert allocate(curves, 3, None, maximum=3) == {0: 3, 1: 3}
    with pytest.raises(UsageError, match=r"layers 0 to 1 cannot have 6 clusters together: .* 8 and can have 8"):
        allocate(curves, 3, None, minimum=4)
    with pytest.raises(UsageError, match="a window of 0 layers"):
        allocate(curves, 3, 0)
    limited = {0: [math.inf, 5.0, 1.0, 0.0], 1: curves[1]}
    with pytest.raises(UsageError, match="layers 0 to 0 cannot have 1 clusters"):
        allocate(limited, 1, 1)


# -- dominant experts ---------------------------------------------------------------------------------------------


def counts(*rows):
    return {layer: torch.tensor(row) for layer, row in enumerate(rows)}


def test_dominant_experts_are_the_most_frequent_of_all_layers():
    """Frequencies .6 .3 .1 0 and .4 .3 .2 .1: with four places in all, .6 and .4 by their layers, then .3 and .3."""
    two = counts([60, 30, 10, 0], [4, 3, 2, 1])
    assert dominant_experts(two, {0: 2, 1: 2}) == {0: [0, 1], 1: [0, 1]}
    assert dominant_experts(two, {0: 3, 1: 2}) == {0: [0, 1], 1: [0, 1, 2]}
    assert dominant_experts(two, {0: 3, 1: 2}, scope="uniform") == {0: [0, 1, 2], 1: [0, 1]}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=4), st.data())
def test_the_number_is_met_exactly_and_no_layer_is_left_empty(rows, data):
    """Small counts make many ties and layers without any token."""
    layers = counts(*rows)
    keep = {layer: data.draw(st.integers(1, 5)) for layer in layers}
    for scope in ("global", "uniform"):
        found = dominant_experts(layers, keep, scope=scope)
        assert sum(map(len, found.values())) == sum(keep.values())
        for layer, own in found.items():
            assert own
            assert int(layers[layer].argmax()) in own or layers[layer].max() == layers[layer][own].max()
            assert scope == "global" or len(own) == keep[layer]


def test_excluded_layers_keep_all_and_the_others_their_budget():
    found = dominant_experts(counts([9, 1, 0], [5, 3, 1], [1, 1, 8]), {0: 0, 1: 2, 2: 1}, excluded=[0])
    assert found[0] == [0, 1, 2]
    assert len(found[1]) + len(found[2]) == 3


def test_protected_experts_are_dominant_and_another_one_leads_the_rest():
    found = dominant_experts(counts([9, 8, 1, 0]), {0: 2}, protected={0: [3]})
    assert found == {0: [0, 3]}
    with pytest.raises(UsageError, match="layer 0: 2 experts to keep of 4, and 3 of them must stay"):
        dominant_experts(counts([9, 8, 1, 0]), {0: 2}, protected={0: [2, 3]}, scope="uniform")


def test_followers_join_the_most_similar_dominant_expert():
    s = torch.tensor([[1, 0.2, 0.9, 0.4, 0.5], [0.2, 1, 0.3, 0.8, 0.5], *[[0.0] * 5] * 3])
    s = torch.maximum(s, s.T)
    assert members_of(around(s, [0, 1])) == [[0, 2, 4], [1, 3]]  # a tie goes to the lowest
    assert members_of(around(s, [0, 1], max_size=3)) == [[0, 2, 4], [1, 3]]
    s[0, 3] = s[3, 0] = 0.85
    assert members_of(around(s, [0, 1])) == [[0, 2, 3, 4], [1]]
    assert members_of(around(s, [0, 1], max_size=3)) == [[0, 2, 3], [1, 4]]
    assert members_of(around(s, [0, 1], alone=[0])) == [[0], [1, 2, 3, 4]]
    with pytest.raises(UsageError, match="2 dominant experts with clusters of at most 2 have no room for the other 3"):
        around(s, [0, 1], max_size=2)
    with pytest.raises(UsageError, match="0 dominant experts have no room for the other 4 of 5"):
        around(s, [0], alone=[0])
