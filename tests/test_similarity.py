"""Measures of how alike experts are: each against its definition, and what it does not depend on."""

# E experts, T tokens, H hidden

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from coterie.anatomy import moe_layers
from coterie.compression.alignment import reordered
from coterie.compression.clustering import hierarchical, k_means, kernel_k_means, members_of
from coterie.compression.similarity import SIMILARITIES, NeuronMatch
from coterie.profiling.observe import LayerObservation
from coterie.profiling.profile import LayerProfile
from coterie.profiling.run import profile_model, survey
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FEW, saved, tiny, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def layer_of(tmp_path_factory):
    """The first MoE layer's profile with all that any measure reads, once per family."""
    root = tmp_path_factory.mktemp("checkpoints")

    @functools.cache
    def measure(family):
        streamed = StreamedModel(Checkpoint.open(saved(family, root)), compute_dtype="float32")
        observers = list(dict.fromkeys(o for m in SIMILARITIES.values() for o in m.observes))
        data = TokenData([Batch(tokens(3, 20), None, torch.zeros(3).long())], ["text"], "", {"text": 60})
        return next(iter(profile_model(streamed, data, observers, model="tiny").layers.values()))

    return measure


@pytest.mark.parametrize("name", SIMILARITIES)
@pytest.mark.parametrize("family", FEW)
def test_every_measure_is_a_symmetric_matrix_with_its_diagonal(family, name, layer_of):
    layer, measure = layer_of(family), SIMILARITIES[name]
    between = measure.between(layer)
    assert between.dtype == torch.float64
    assert between.shape == (layer.experts, layer.experts)
    assert float(between.std()) > 0
    similarity, distance, gram = (read(layer) for read in (measure.similarity, measure.distance, measure.gram))
    for matrix in (similarity, distance, gram):
        torch.testing.assert_close(matrix, matrix.T, atol=1e-12, rtol=0)
    assert bool((similarity.diagonal() == 1).all())
    assert bool((distance.diagonal() == 0).all())
    assert -1 <= float(similarity.min()) <= float(similarity.max()) <= 1
    assert float(distance.min()) >= 0
    assert torch.equal(between, distance if measure.is_distance else similarity)
    upper = torch.triu_indices(layer.experts, layer.experts, 1)
    order = [m[upper[0], upper[1]].argsort(stable=True) for m in (similarity, -distance)]
    assert torch.equal(*order)  # the closer the more similar


def profile_of(E=6, tokens=50, **stats):
    return LayerProfile(0, "layer", E, 2, tokens, 1, stats)


def test_router_measures_are_cosines_of_logits_and_rows():
    g = torch.Generator().manual_seed(0)
    logits, rows = torch.randn(50, 6, generator=g).double() + 1, torch.randn(6, 9, generator=g)
    layer = profile_of(router_gram_EE=logits.T @ logits, router_sum_E=logits.sum(0), router_rows_EC=rows)
    for name, vectors in [
        ("router-logits", logits.T),
        ("router-logits-centred", (logits - logits.mean(0)).T),
        ("router-rows", rows.double()),
    ]:
        expected = F.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        torch.testing.assert_close(SIMILARITIES[name].similarity(layer), expected, atol=1e-9, rtol=0)


def test_output_measures_are_distances_and_cosines_of_means_and_means_of_cosines():
    y_ETH = torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(0)).double()
    unit = F.normalize(y_ETH, dim=-1).flatten(1)
    layer = profile_of(dense_output_sum_EH=y_ETH.sum(1), output_cosine_EE=unit @ unit.T)
    mean = y_ETH.mean(1)
    for i, j in itertools.combinations(range(6), 2):
        found = {name: float(SIMILARITIES[name].between(layer)[i, j]) for name in SIMILARITIES if "outputs" in name}
        assert found["mean-outputs"] == pytest.approx(float((mean[i] - mean[j]).norm()))
        assert found["mean-outputs-cosine"] == pytest.approx(float(F.cosine_similarity(mean[i], mean[j], dim=0)))
        assert found["outputs"] == pytest.approx(float(F.cosine_similarity(y_ETH[i], y_ETH[j], dim=-1).mean()))


@pytest.mark.parametrize("family", FEW)
def test_weight_measures_are_those_of_flattened_experts(family):
    layer = moe_layers(tiny(family))[0]
    E = layer.num_experts
    flat = torch.stack(
        [
            torch.cat([w.flatten() for w in vars(layer.bank.read(e, torch.float64)).values() if w is not None])
            for e in range(E)
        ]
    )
    with LayerObservation(layer, SIMILARITIES["weights"].observes, 1) as watch:
        found = watch.result()
    torch.testing.assert_close(SIMILARITIES["weights"].between(found), torch.cdist(flat, flat), atol=1e-5, rtol=0)
    expected = F.cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(SIMILARITIES["weights-cosine"].between(found), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", FEW)
def test_matching_neurons_is_blind_to_their_order_where_flattened_weights_are_not(family):
    model = tiny(family)
    layer = moe_layers(model)[0]
    first = layer.bank.read(2, torch.float32)
    order = torch.randperm(first.up_IH.shape[0], generator=torch.Generator().manual_seed(0))
    layer.bank.write(5, reordered(first, order))
    with LayerObservation(layer, [NeuronMatch, *SIMILARITIES["weights"].observes], 1) as watch:
        found = watch.result()
    similar = SIMILARITIES["neurons"].similarity(found)
    assert similar[2, 5] == pytest.approx(1, abs=1e-6)
    assert float(similar.fill_diagonal_(0)[0].max()) < 0.9
    assert SIMILARITIES["weights-cosine"].similarity(found)[2, 5] < 0.5
    parts = []
    for e in (0, 1):
        expert = layer.bank.read(e, torch.float64)
        parts.append(F.normalize(torch.cat((expert.gate_IH, expert.up_IH, expert.down_HI.T), 1), dim=1))
    cosine = parts[0] @ parts[1].T
    expected = float(torch.cat((cosine.max(0).values, cosine.max(1).values)).mean())
    assert similar[0, 1] == pytest.approx(expected, abs=1e-6)


def test_what_is_of_the_weights_alone_needs_no_text(tmp_path):
    streamed = StreamedModel(Checkpoint.open(saved("mixtral", tmp_path)), compute_dtype="float32")
    names = ("router-rows", "weights", "neurons")
    layers = survey(streamed, [o for name in names for o in SIMILARITIES[name].observes])
    assert all(SIMILARITIES[name].similarity(layer).shape == (8, 8) for layer in layers.values() for name in names)


def test_a_distance_as_gram_matrix_gives_k_means_of_the_points():
    centre = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).double()
    y_EH = 5 * centre[torch.arange(12) % 4] + torch.randn(12, 8, generator=torch.Generator().manual_seed(2)).double()
    layer = profile_of(12, 1, dense_output_sum_EH=y_EH)
    measure = SIMILARITIES["mean-outputs"]
    centred_EH = y_EH - y_EH.mean(0)
    torch.testing.assert_close(measure.gram(layer), centred_EH @ centred_EH.T)
    labels, objective = kernel_k_means(measure.gram(layer), 4, 0)
    assert labels == k_means(y_EH, 4, 0)
    expected = sum(float((y_EH[own] - y_EH[own].mean(0)).square().sum()) for own in members_of(labels))
    assert objective == pytest.approx(expected)


def test_copies_have_distance_zero_and_are_merged_first():
    y_EH = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double()
    y_EH[6] = y_EH[1]
    layer = profile_of(8, 10, dense_output_sum_EH=y_EH)
    distance = SIMILARITIES["mean-outputs"].distance(layer)
    assert distance[1, 6] == 0
    assert [1, 6] in members_of(hierarchical(distance, 7))
