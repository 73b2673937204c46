"""Every statistic of a profile against plain loops over tokens; padding, batching, merging; the experts forward."""

# T tokens, H hidden, E experts, K experts per token, D domains

import copy
import functools
import itertools
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.methods import get_method
from coterie.errors import DataError, ModelError, UsageError
from coterie.experts.forward import NAME, observe
from coterie.profiling import dense
from coterie.profiling import observe as observe_module
from coterie.profiling.moments import InputSecondMoment, OutputSecondMoment
from coterie.profiling.observe import LayerObservation
from coterie.profiling.observers import (
    OBSERVERS,
    RATIO_BINS,
    DenseOutput,
    ExpertRows,
    LayerShape,
    MaxActivation,
    Observer,
    OutputCosine,
    OutputNorm,
    Routing,
    ScoreMass,
    SelectionCount,
    WeightedOutputNorm,
)
from coterie.profiling.pairs import CONFLICT, conflict
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import profile_model
from coterie.profiling.sample import input_sample, sample_names
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FAMILIES, FEW, resident, saved, tiny, token_file, tokens

ALL = tuple(OBSERVERS.values())
BRUTE = (*FEW, "phimoe", "ernie4.5-moe")
NORMALISED = ("mixtral", "qwen3-moe", "gpt-oss", "granite-moe", "glm4-moe", "ernie4.5-moe", "hunyuan-v1-moe")
SCORES = [("frequency", {}), ("soft-frequency", {}), ("reap", {}), ("reap", {"renormalise": False})]
SCORES += [("ean", {"reduce": "sum"}), ("ean", {"reduce": "mean"})]

# Sums of what routers and experts received: the same float32 numbers on both sides, added up in float64.
SAME = {"gate_mass_E", "gate_share_E", "router_gram_EE", "router_sum_E", "input_square_EH"}
# The others are products of matrices whose shape depends on how tokens are grouped: float32 kernels for one row, few
# rows and many rows add in different orders, which is worth some 1e-7 of the result each, more where terms cancel.
PRODUCT = 2e-5


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint folders by family, each made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root))


@pytest.fixture(scope="module")
def both(checkpoint):
    """(profile, the same by plain loops) on padded text of two domains, once per family."""

    def measure(family):
        batches = [padded(0), Batch(tokens(2, 11, seed=5), None, torch.tensor([1, 0]))]
        return profiled(checkpoint(family), batches, domains=("one", "two")), brute(checkpoint(family), batches, 2)

    return functools.cache(measure)


def padded(seed, rows=3, length=16):
    """Rows of 16, 11 and 6 real tokens of domains 0, 1, 0."""
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        mask[row, length - 5 * row :] = False
    return Batch(tokens(rows, length, seed), mask, torch.arange(rows) % 2)


def rows_of(batch):
    """Every row as a batch of its own, without its padding."""
    masks = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
    return [Batch(i[m][None], None, d[None]) for i, m, d in zip(batch.ids_BL, masks, batch.domain_B)]


def profiled(folder, batches, observers=ALL, domains=("one", "two")):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    sizes = {domain: sum(b.tokens for b in batches) for domain in domains}
    data = TokenData(list(batches), list(domains), "-".join(domains), sizes, sources=["text"])
    return profile_model(streamed, data, observers, model="tiny")


def written(model, folder):
    model.save_pretrained(folder)
    return folder


def close(found, expected, tolerance):
    """Equal up to `tolerance` of the largest entry."""
    if not found.is_floating_point():
        return torch.equal(found, expected)
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    return (
        found.shape == expected.shape and float((found.double() - expected.double()).abs().max()) <= tolerance * scale
    )


def assert_same(one, two, tolerance=PRODUCT):
    """Two profiles hold the same statistics: counts and channels exactly, sums within `tolerance`."""
    assert one.layers.keys() == two.layers.keys()
    for index, layer in one.layers.items():
        other = two.layers[index]
        assert (layer.tokens, layer.stats.keys()) == (other.tokens, other.stats.keys())
        for name, value in layer.stats.items():
            assert close(value, other.stats[name], tolerance), (index, name)


# -- the statistics in plain loops ------------------------------------------------------------------------------------


def expert_output(layer, expert, x_H):
    """One expert on one token, from its canonical weights in float32."""
    weights = layer.bank.read(expert, torch.float32)
    up = F.linear(x_H, weights.up_IH, weights.up_bias_I)
    gate = F.linear(x_H, weights.gate_IH, weights.gate_bias_I)
    fused = torch.cat((gate, up)) if layer.experts.is_concatenated else torch.stack((gate, up), -1).flatten()
    return F.linear(layer.experts._apply_gate(fused[None])[0], weights.down_HI, weights.down_bias_H)


def watch_resident(folder, batches):
    """{layer: [(x_TH, logits_TE, index_TK, weight_TK) of each batch]} of the resident model, padding included."""
    model = resident(folder)
    layers, seen = moe_layers(model), {}
    for layer in layers:
        calls = seen.setdefault(layer.index, [])
        layer.router.register_forward_hook(lambda m, a, out, calls=calls: calls.append([out[0].flatten(0, -2)]))
        layer.experts.register_forward_pre_hook(lambda m, a, calls=calls: calls[-1].extend(t.clone() for t in a))
    with torch.no_grad():
        for batch in batches:
            mask = None if batch.mask_BL is None else batch.mask_BL.long()
            model(batch.ids_BL, attention_mask=mask, use_cache=False)
    return layers, {i: [(x, logits, index, w) for logits, x, index, w in calls] for i, calls in seen.items()}


@torch.no_grad()
def brute(folder, batches, D):
    """{layer: {name: tensor}}: all statistics, token by token."""
    layers, seen = watch_resident(folder, batches)
    result = {}
    for layer in layers:
        E, H = layer.num_experts, layer.bank.hidden_size
        s = {n: torch.zeros(E, dtype=torch.float64) for n in ("gate_mass_E", "gate_share_E", "score_mass_E")}
        s |= {n: torch.zeros(E, dtype=torch.float64) for n in ("output_norm_E", "weighted_norm_E", "shared_norm_E")}
        s |= {n: torch.zeros(E, H, dtype=torch.float64) for n in ("output_sum_EH", "input_square_EH")}
        s |= {"router_sum_E": torch.zeros(E, dtype=torch.float64), "count_E": torch.zeros(E).long()}
        s |= {"router_gram_EE": torch.zeros(E, E, dtype=torch.float64), "coactivation_EE": torch.zeros(E, E).long()}
        s |= {"count_DE": torch.zeros(D, E).long(), "tokens_D": torch.zeros(D).long()}
        s |= {"output_max_E": torch.zeros(E), "output_max_channel_E": torch.full((E,), -1)}
        s |= {"output_norm_max_E": torch.zeros(E)}
        s |= {"gate_ratio_RB": torch.zeros(layer.top_k - 1, RATIO_BINS).long()}
        s |= {"gate_ratio_sum_R": torch.zeros(layer.top_k - 1, dtype=torch.float64)}
        s |= {"dense_output_sum_EH": torch.zeros(E, H, dtype=torch.float64)}
        s |= {"output_cosine_EE": torch.zeros(E, E, dtype=torch.float64)}
        for batch, (x_TH, logits_TE, index_TK, weight_TK) in zip(batches, seen[layer.index], strict=True):
            L = batch.ids_BL.shape[1]
            for t in range(len(x_TH)):
                row, column = divmod(t, L)
                if batch.mask_BL is not None and not batch.mask_BL[row, column]:
                    continue
                domain, chosen = int(batch.domain_B[row]), index_TK[t].tolist()
                s["tokens_D"][domain] += 1
                logits = logits_TE[t].double()
                s["score_mass_E"] += logits.exp() / logits.exp().sum()
                s["router_sum_E"] += logits
                s["router_gram_EE"] += torch.outer(logits, logits)
                total = float(weight_TK[t].double().sum())
                first, *rest = sorted(weight_TK[t].double().tolist(), reverse=True)
                for rank, weight in enumerate(rest):
                    s["gate_ratio_RB"][rank, min(int(weight / first * RATIO_BINS), RATIO_BINS - 1)] += 1
                    s["gate_ratio_sum_R"][rank] += weight / first
                y_EH = torch.stack([expert_output(layer, e, x_TH[t]).double() for e in range(E)])
                s["dense_output_sum_EH"] += y_EH
                for a in range(E):
                    for b in range(E):
                        cosine = y_EH[a] @ y_EH[b] / (y_EH[a].norm() * y_EH[b].norm())
                        s["output_cosine_EE"][a, b] += cosine
                for a in chosen:
                    for b in chosen:
                        s["coactivation_EE"][a, b] += 1
                for e, g in zip(chosen, weight_TK[t].double().tolist()):
                    y_H = y_EH[e]
                    norm = float(y_H.square().sum().sqrt())
                    s["count_E"][e] += 1
                    s["count_DE"][domain, e] += 1
                    s["gate_mass_E"][e] += g
                    s["gate_share_E"][e] += g / total
                    s["output_norm_E"][e] += norm
                    s["output_norm_max_E"][e] = max(float(s["output_norm_max_E"][e]), norm)
                    s["weighted_norm_E"][e] += g * norm
                    s["shared_norm_E"][e] += g / total * norm
                    s["output_sum_EH"][e] += y_H
                    s["input_square_EH"][e] += x_TH[t].double().square()
                    peak = float(y_H.abs().max())
                    if peak > s["output_max_E"][e]:
                        s["output_max_E"][e] = peak
                        s["output_max_channel_E"][e] = int(y_H.abs().argmax())
        result[layer.index] = s
    return result


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("family", BRUTE)
def test_an_observer_equals_plain_loops_over_tokens(family, observer, both):
    profile, expected = both(family)
    assert profile.layers.keys() == expected.keys()
    for index, layer in profile.layers.items():
        for name in OBSERVERS[observer].fields:
            tolerance = 1e-9 if name in SAME else PRODUCT
            assert close(layer.stats[name], expected[index][name], tolerance), (index, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_routing_equals_resident_routing_token_by_token(family, checkpoint):
    class Recorder(Observer):
        def __init__(self, shape):
            super().__init__(shape)
            self.seen = []
            recorders.append(self)

        def see_routing(self, routing):
            self.seen.append((routing.index_TK.clone(), routing.weight_TK.clone()))

    recorders = []
    batches = [padded(3), Batch(tokens(2, 24), None, torch.zeros(2).long())]
    profile = profiled(checkpoint(family), batches, [Recorder])
    _, expected = watch_resident(checkpoint(family), batches)
    assert list(profile.layers) == list(expected)
    for recorder, calls in zip(recorders, expected.values(), strict=True):
        for batch, (index_TK, weight_TK), call in zip(batches, recorder.seen, calls, strict=True):
            real_T = slice(None) if batch.mask_BL is None else batch.mask_BL.flatten()
            assert torch.equal(index_TK, call[2][real_T])
            assert torch.equal(weight_TK, call[3][real_T])


# -- every expert on every token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_a_dense_pass_in_chunks_gives_each_expert_on_each_token_in_order(family, monkeypatch):
    layer, x_TH, _, _ = experts_and_routing(family)
    layer.experts.to(torch.bfloat16)
    expected_ETH = torch.stack(
        [torch.stack([expert_output(layer, e, x_H) for x_H in x_TH]) for e in range(layer.num_experts)]
    )
    monkeypatch.setattr(dense, "CHUNK_BYTES", 4 * layer.num_experts * x_TH.shape[1] * 4)  # four tokens
    parts = [(rows, y_ECH.clone()) for rows, y_ECH in dense.dense_outputs(layer, x_TH)]
    assert [(rows.start, rows.stop) for rows, _ in parts] == [(0, 4), (4, 8), (8, 11)]
    assert close(torch.cat([y_ECH for _, y_ECH in parts], 1), expected_ETH, PRODUCT)


def test_dense_outputs_are_made_once_for_all_observers_that_want_them(checkpoint, monkeypatch):
    calls = []
    real = observe_module.dense_outputs
    monkeypatch.setattr(observe_module, "dense_outputs", lambda *a: calls.append(1) or real(*a))
    profile = profiled(checkpoint("mixtral"), [padded(0), padded(1)], [DenseOutput, OutputCosine])
    assert len(calls) == 2 * len(profile.layers)
    profiled(checkpoint("mixtral"), [padded(0)], [SelectionCount, MaxActivation])
    assert len(calls) == 2 * len(profile.layers)


def test_similarity_of_outputs_ignores_the_scale_of_an_expert_and_finds_a_copy(tmp_path):
    model = tiny("mixtral")
    bank = moe_layers(model)[0].bank
    weights = copy.deepcopy(bank.read(2))
    weights.down_HI *= 4.0
    bank.write(6, weights)
    profile = profiled(written(model, tmp_path / "model"), [padded(0)], [OutputCosine])
    layer = profile.layers[0]
    cosine_EE = layer.output_cosine_EE / layer.tokens
    torch.testing.assert_close(cosine_EE.diagonal(), torch.ones(8).double(), atol=1e-12, rtol=0)
    assert cosine_EE[2, 6] == pytest.approx(1.0, abs=1e-9)
    assert float(cosine_EE.fill_diagonal_(0)[0].abs().max()) < 0.9
    torch.testing.assert_close(cosine_EE[2, :2], cosine_EE[6, :2], atol=1e-9, rtol=0)


def test_an_expert_that_answers_with_zeros_has_no_cosine():
    observer = OutputCosine(LayerShape(3, 1, 4, 1))
    y_ETH = torch.ones(3, 5, 4)
    y_ETH[1, 2:] = 0
    observer.see_dense(y_ETH)
    expected = torch.tensor([[5, 2, 5], [2, 2, 2], [5, 2, 5]]).double()
    torch.testing.assert_close(observer.output_cosine_EE, expected)


def test_what_costs_a_dense_pass_is_only_recorded_when_named(checkpoint, tmp_path):
    ids = token_file(tmp_path / "ids.safetensors")
    found = coterie.profile(str(checkpoint("mixtral")), tokens=str(ids)).layers[0].stats
    assert "count_E" in found
    assert not {"dense_output_sum_EH", "output_cosine_EE"} & found.keys()


# -- second looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
@torch.no_grad()
def test_second_moments_equal_plain_loops_over_tokens(family, checkpoint):
    batches = [padded(0), Batch(tokens(2, 11, seed=5), None, torch.tensor([1, 0]))]
    profile = profiled(checkpoint(family), batches, [InputSecondMoment, OutputSecondMoment])
    layers, seen = watch_resident(checkpoint(family), batches)
    for layer in layers[:2]:
        E, H = layer.num_experts, layer.bank.hidden_size
        inputs_EHH, outputs_EHH = (torch.zeros(E, H, H, dtype=torch.float64) for _ in range(2))
        for batch, (x_TH, _, index_TK, _) in zip(batches, seen[layer.index], strict=True):
            real_T = torch.ones(len(x_TH), dtype=torch.bool) if batch.mask_BL is None else batch.mask_BL.flatten()
            for t in real_T.nonzero().flatten().tolist():
                for e in index_TK[t].tolist():
                    y_H = expert_output(layer, e, x_TH[t]).double()
                    if layer.bank.has_bias:
                        y_H = y_H - layer.bank.read(e, torch.float64).down_bias_H
                    inputs_EHH[e] += torch.outer(x_TH[t], x_TH[t])
                    outputs_EHH[e] += torch.outer(y_H, y_H)
        stats = profile.layers[layer.index].stats
        assert close(stats["input_moment_EHH"], inputs_EHH, PRODUCT)
        assert close(stats["output_moment_EHH"], outputs_EHH, PRODUCT)


def test_a_sample_of_inputs_holds_real_tokens_with_the_experts_they_selected(checkpoint):
    batches = [padded(0), padded(1)]
    few = input_sample(20)
    input_name, index_name = sample_names(20)
    profile = profiled(checkpoint("mixtral"), batches, [few])
    layers, seen = watch_resident(checkpoint("mixtral"), batches)
    real = {}
    for number, (batch, (x_TH, _, index_TK, _)) in enumerate(zip(batches, seen[layers[0].index], strict=True)):
        for t in batch.mask_BL.flatten().nonzero().flatten().tolist():
            real[tuple(x_TH[t].tolist())] = (number, index_TK[t].tolist())
    stats = profile.layers[layers[0].index].stats
    assert len(stats[input_name]) == 20
    found = [real[tuple(x_H.tolist())] for x_H in stats[input_name]]
    assert [ids for _, ids in found] == stats[index_name].tolist()
    assert {number for number, _ in found} == {0, 1}
    everything = profiled(checkpoint("mixtral"), batches, [input_sample(1000)]).layers[layers[0].index]
    assert len(everything.stats[sample_names(1000)[0]]) == everything.tokens


@pytest.mark.parametrize("family", FEW)
@torch.no_grad()
def test_the_conflict_of_a_cluster_equals_plain_loops_over_tokens(family, checkpoint):
    batches = [padded(0), padded(1)]
    profile = profiled(checkpoint(family), batches, CONFLICT)
    (layer, *_), calls = watch_resident(checkpoint(family), batches)
    seen = calls[layer.index]
    members = [0, 1, 3]
    distance, share = {}, {}
    for batch, (x_TH, _, index_TK, weight_TK) in zip(batches, seen, strict=True):
        for t in batch.mask_BL.flatten().nonzero().flatten().tolist():
            gate = dict(zip(index_TK[t].tolist(), weight_TK[t].double().tolist(), strict=True))
            y = {e: expert_output(layer, e, x_TH[t]).double() for e in members}
            for i, j in itertools.combinations(members, 2):
                distance.setdefault((i, j), []).append(float((y[i] - y[j]).square().sum()))
                if i in gate or j in gate:
                    share.setdefault((i, j), []).append(gate.get(i, 0.0) / (gate.get(i, 0.0) + gate.get(j, 0.0)))
    assert any(0 < r < 1 for shares in share.values() for r in shares)
    found = conflict(profile.layers[layer.index], members)
    assert found.distance == pytest.approx(sum(map(statistics.fmean, distance.values())) / 3, rel=1e-5)
    variances = [statistics.pvariance(share[pair]) if pair in share else 0.0 for pair in distance]
    assert found.variance == pytest.approx(sum(variances) / 3, rel=1e-9)
    assert conflict(profile.layers[layer.index], [2]) == (0, 0)


# -- padding and batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BRUTE)
def test_padding_never_counts(family, checkpoint):
    assert_same(profiled(checkpoint(family), [padded(0)]), profiled(checkpoint(family), rows_of(padded(0))))


@pytest.mark.parametrize("family", BRUTE)
def test_a_profile_does_not_depend_on_batch_split_or_order(family, checkpoint):
    whole = Batch(tokens(5, 12), None, torch.tensor([0, 1, 0, 1, 1]))
    split = [Batch(whole.ids_BL[i], None, whole.domain_B[i]) for i in ([4, 1], [3], [0, 2])]
    assert_same(profiled(checkpoint(family), [whole]), profiled(checkpoint(family), split))


def routed_rows(seed, T=40, H=6, E=5, K=2):
    """Random routing with some sentinels, as observers see it, and a random output for every slot."""
    g = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(T, E, generator=g)
    index_TK = logits_TE.topk(K).indices
    weight_TK = torch.rand(T, K, generator=g) + 0.1
    none_TK = torch.rand(T, K, generator=g) < 0.2
    index_TK[none_TK], weight_TK[none_TK] = E, 0.0
    domain_T = torch.randint(0, 2, (T,), generator=g)
    x_TH, start_T = torch.randn(T, H, generator=g), torch.zeros(T, dtype=torch.bool)
    return Routing(x_TH, logits_TE, weight_TK, index_TK, domain_T, start_T), torch.randn(T, K, H, generator=g)


def dense_y(routing):
    """Some output of every expert for every token, [E, T, H]."""
    matrix_EHH = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0))
    return routing.x_TH @ matrix_EHH


def fed(cls, routing, y_TKH, parts):
    """State of an observer that saw the tokens in these parts."""
    _, K, H = y_TKH.shape
    observer = cls(LayerShape(5, K, H, 2))
    total_T = routing.weight_TK.sum(-1).clamp(min=1e-20)
    for part in parts:
        part = torch.tensor(part, dtype=torch.int64)
        fields = (routing.x_TH, routing.logits_TE, routing.weight_TK, routing.index_TK, routing.domain_T)
        observer.see_routing(Routing(*(f[part] for f in (*fields, routing.start_T))))
        if observer.watches_all and len(part):
            observer.see_dense(dense_y(routing)[:, part])
        for expert in range(5):
            at, slot = (routing.index_TK[part] == expert).nonzero(as_tuple=True)
            if observer.watches_outputs and len(at):
                token = part[at]
                weight_R = routing.weight_TK[token, slot]
                share_R = weight_R / total_T[token]
                observer.see_outputs(ExpertRows(expert, routing.x_TH[token], y_TKH[token, slot], weight_R, share_R, at))
    return observer.state()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.randoms(use_true_random=False), st.lists(st.integers(0, 40), max_size=6))
def test_equal_inputs_give_equal_sums_however_they_are_split_and_ordered(seed, random, cuts):
    routing, y_TKH = routed_rows(seed)
    order = list(range(40))
    random.shuffle(order)
    edges = [0, *sorted(cuts), 40]  # equal neighbours make empty batches, as fully padded ones are
    parts = [order[a:b] for a, b in itertools.pairwise(edges)]
    for cls in ALL:
        one, two = fed(cls, routing, y_TKH, [list(range(40))]), fed(cls, routing, y_TKH, parts)
        assert one.keys() == set(cls.fields) == two.keys()
        for name, value in one.items():
            assert close(two[name], value, 1e-9), name


# -- sums that must come out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_sum_to_k_times_tokens(family, checkpoint):
    profile = profiled(checkpoint(family), [padded(1)], [SelectionCount])
    assert {layer.tokens for layer in profile.layers.values()} == {16 + 11 + 6}
    assert all(int(layer.count_E.sum()) == layer.top_k * layer.tokens for layer in profile.layers.values())


@pytest.mark.parametrize("family", NORMALISED)
def test_soft_counts_sum_to_tokens_where_gates_are_normalised(family, checkpoint):
    profile = profiled(checkpoint(family), [padded(1)], [OBSERVERS["GateMass"]])
    for layer in profile.layers.values():
        assert float(layer.gate_mass_E.sum()) == pytest.approx(layer.tokens, rel=1e-6)


def test_soft_counts_carry_the_scaling_factor_that_the_model_applies(checkpoint):
    for layer in profiled(checkpoint("deepseek-v3"), [padded(1)], [OBSERVERS["GateMass"]]).layers.values():
        assert float(layer.gate_mass_E.sum()) == pytest.approx(2.5 * layer.tokens, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_renormalised_shares_sum_to_tokens(family, checkpoint):
    for layer in profiled(checkpoint(family), [padded(1)], [OBSERVERS["GateMass"]]).layers.values():
        assert float(layer.gate_share_E.sum()) == pytest.approx(layer.tokens, rel=1e-12)


# -- the profile as a thing -------------------------------------------------------------------------------------------


def test_a_saved_profile_is_loaded_as_it_was(both, tmp_path):
    profile, _ = both("deepseek-v3")
    profile.save(tmp_path / "profile")
    loaded = Profile.load(tmp_path / "profile")
    assert_same(loaded, profile, 0.0)
    for name in ("model", "model_digest", "data_digest", "domains", "settings"):
        assert getattr(loaded, name) == getattr(profile, name)
    for index, layer in profile.layers.items():
        for name in ("index", "name", "experts", "top_k", "tokens", "groups"):
            assert getattr(loaded.layers[index], name) == getattr(layer, name)
        assert all(layer.stats[n].dtype == t.dtype for n, t in loaded.layers[index].stats.items())


@pytest.mark.parametrize("name", ["profile.json", "profile.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty"])
def test_a_damaged_profile_is_refused_with_its_name(name, damage, both, tmp_path):
    both("mixtral")[0].save(tmp_path / "profile")
    if damage == "missing":
        (tmp_path / "profile" / name).unlink()
    else:
        (tmp_path / "profile" / name).write_bytes(b"")
    with pytest.raises(DataError, match=str(tmp_path / "profile")):
        Profile.load(tmp_path / "profile")


@pytest.mark.parametrize("family", FEW)
def test_merging_equals_profiling_both_texts_together(family, checkpoint):
    """The second text has one domain in common with the first, and one of its own."""
    first, second = padded(0), padded(7)
    one = profiled(checkpoint(family), [first], domains=("a", "b"))
    two = profiled(checkpoint(family), [second], domains=("b", "c"))
    shifted = Batch(second.ids_BL, second.mask_BL, second.domain_B + 1)
    together = profiled(checkpoint(family), [first, shifted], domains=("a", "b", "c"))
    merged = one.merge(two)
    assert merged.domains == together.domains
    assert_same(merged, together, 1e-9)  # the same batches, so the same float32 numbers


def test_merging_does_not_depend_on_the_side(checkpoint):
    one = profiled(checkpoint("mixtral"), [padded(0)], domains=("a", "b"))
    two = profiled(checkpoint("mixtral"), [padded(7)], domains=("a", "b"))
    left, right = one.merge(two), two.merge(one)
    assert_same(left, right, 1e-12)
    assert left.data_digest == right.data_digest


def test_a_merged_profile_says_what_both_were_measured_on(checkpoint):
    one = profiled(checkpoint("mixtral"), [padded(0)], [SelectionCount], domains=("a", "b"))
    two = profiled(checkpoint("mixtral"), [padded(7), padded(8)], [SelectionCount], domains=("b", "c"))
    merged = one.merge(two).settings
    assert merged["samples"] == one.settings["samples"] + two.settings["samples"] == 9
    assert merged["tokens"] == {"a": 33, "b": 33 + 66, "c": 66}


def test_profiles_of_different_models_are_not_merged(both):
    with pytest.raises(UsageError, match="different models"):
        both("mixtral")[0].merge(both("qwen3-moe")[0])


def test_profiles_with_different_statistics_are_not_merged(checkpoint):
    one, two = (profiled(checkpoint("mixtral"), [padded(0)], [cls]) for cls in (SelectionCount, OutputNorm))
    with pytest.raises(UsageError, match="count_E, output_norm_E"):
        one.merge(two)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_only_the_statistics_asked_for_are_present(observer, checkpoint):
    profile = profiled(checkpoint("qwen3-moe"), [padded(0)], [OBSERVERS[observer]])
    assert all(layer.stats.keys() == OBSERVERS[observer].fields.keys() for layer in profile.layers.values())


def test_a_missing_statistic_is_an_error_that_names_its_observer(checkpoint):
    profile = profiled(checkpoint("qwen3-moe"), [padded(0)], [SelectionCount])
    with pytest.raises(UsageError, match="--observe WeightedOutputNorm"):
        profile.require([SelectionCount, WeightedOutputNorm])
    with pytest.raises(UsageError, match="--observe WeightedOutputNorm"):
        get_method("reap").score(profile.layers[0])
    profile.require([SelectionCount])


def test_a_layer_that_was_never_seen_is_an_error_not_zeros():
    layer = moe_layers(tiny("mixtral"))[0]
    with LayerObservation(layer, ALL, 1) as watch, pytest.raises(ModelError, match="layer 0 was never seen"):
        watch.result()


def test_statistics_of_logits_are_absent_not_zero_where_the_router_shows_none(checkpoint):
    """Such routers exist: one output more than there are experts, for "skip"."""
    streamed = StreamedModel(Checkpoint.open(checkpoint("mixtral")), compute_dtype="float32")
    streamed.moe[1].router.register_forward_hook(lambda m, a, out: (F.pad(out[0], (0, 1)), *out[1:]))
    profile = profile_model(streamed, TokenData([padded(0)], ["one", "two"], "", {}), ALL, model="tiny")
    missing = {"score_mass_E", "router_gram_EE", "router_sum_E"}
    assert profile.layers[0].stats.keys() - profile.layers[1].stats.keys() == missing
    with pytest.raises(UsageError, match="ScoreMass"):
        profile.require([ScoreMass])


# -- what the statistics mean -----------------------------------------------------------------------------------------


def scaled(model, layer_number, expert, factor):
    """Multiply what one expert puts out."""
    bank = moe_layers(model)[layer_number].bank
    weights = copy.deepcopy(bank.read(expert))
    weights.down_HI *= factor
    if weights.down_bias_H is not None:
        weights.down_bias_H *= factor
    bank.write(expert, weights)
    return model


@pytest.mark.parametrize(("method", "parameters"), [entry for entry in SCORES if entry[0] in ("reap", "ean")])
@pytest.mark.parametrize("family", FEW)
def test_doubling_an_expert_doubles_its_norm_scores_and_not_its_frequency(family, method, parameters, tmp_path):
    model = tiny(family, torch.bfloat16)
    before = profiled(written(model, tmp_path / "before"), [padded(0)])
    after = profiled(written(scaled(model, 0, 3, 2.0), tmp_path / "after"), [padded(0)])
    first = min(before.layers)  # what follows the first MoE layer sees other inputs
    one, two = before.layers[first], after.layers[first]
    expected_E = get_method(method, parameters).score(one)
    assert expected_E[3] > 0
    expected_E[3] *= 2
    assert torch.equal(get_method(method, parameters).score(two), expected_E)
    assert torch.equal(one.count_E, two.count_E)


@pytest.mark.parametrize("family", FEW)
def test_a_planted_massive_activation_is_found_with_its_channel(family, tmp_path):
    """Times 1024: as large as times 1000, and exact in bfloat16."""
    model = tiny(family, torch.bfloat16)
    before = profiled(written(model, tmp_path / "before"), [padded(0)], [MaxActivation])
    after = profiled(written(scaled(model, 0, 5, 1024.0), tmp_path / "after"), [padded(0)], [MaxActivation])
    first = min(after.layers)
    every = torch.stack([layer.output_max_E for layer in after.layers.values()])
    assert divmod(int(every.argmax()), every.shape[1]) == (0, 5)
    assert after.layers[first].output_max_E[5] == 1024 * before.layers[first].output_max_E[5]
    assert after.layers[first].output_max_channel_E[5] == before.layers[first].output_max_channel_E[5] >= 0


@pytest.mark.parametrize(("method", "parameters"), SCORES)
@pytest.mark.parametrize("family", ["gpt-oss", "deepseek-v3"])
def test_an_expert_without_tokens_scores_zero(family, method, parameters, tmp_path):
    model = tiny(family, torch.bfloat16)
    for layer in moe_layers(model):
        bias_E = layer.router.bias if family == "gpt-oss" else layer.router.e_score_correction_bias
        bias_E.data[2] = -1e4
    profile = profiled(written(model, tmp_path / "model"), [padded(0)])
    for layer in profile.layers.values():
        assert layer.count_E[2] == 0
        assert layer.output_max_channel_E[2] == -1
        scores_E = get_method(method, parameters).score(layer)
        assert scores_E[2] == 0
        assert torch.isfinite(scores_E).all()
        assert scores_E.shape == (layer.experts,)
        assert float(scores_E.max()) > 0


def layer_profile(E=4, tokens=10, **stats):
    return LayerProfile(0, "mlp", E, 2, tokens, 1, {n: torch.tensor(v, dtype=torch.float64) for n, v in stats.items()})


def test_scores_are_the_papers_formulas():
    layer = layer_profile(
        count_E=[4.0, 0.0, 2.0, 14.0],
        gate_mass_E=[1.0, 0.0, 3.0, 6.0],
        output_norm_E=[8.0, 0.0, 5.0, 7.0],
        weighted_norm_E=[2.0, 0.0, 3.0, 7.0],
        shared_norm_E=[4.0, 0.0, 1.0, 3.5],
    )
    expected = {
        "frequency": [4, 0, 2, 14],
        "soft-frequency": [0.1, 0, 0.3, 0.6],
        "reap": [1, 0, 0.5, 0.25],
        "reap raw": [0.5, 0, 1.5, 0.5],
        "ean": [8, 0, 5, 7],
        "ean mean": [2, 0, 2.5, 0.5],
    }
    cases = dict(zip(expected, [SCORES[0], SCORES[1], SCORES[2], SCORES[3], SCORES[4], SCORES[5]]))
    for name, (method, parameters) in cases.items():
        torch.testing.assert_close(get_method(method, parameters).score(layer), torch.tensor(expected[name]).float())


# -- the experts forward ----------------------------------------------------------------------------------------------


def experts_and_routing(family, T=11, seed=0):
    """An experts module of the family and random routing with distinct experts per token."""
    layer = moe_layers(tiny(family))[0]
    g = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(T, layer.num_experts, generator=g).topk(layer.top_k).indices
    weight_TK = torch.rand(T, layer.top_k, generator=g) + 0.1
    return layer, torch.randn(T, layer.bank.hidden_size, generator=g), index_TK, weight_TK


def run(model_or_layer, implementation, *inputs):
    module = model_or_layer.experts
    before, module.config._experts_implementation = module.config._experts_implementation, implementation
    try:
        with torch.no_grad():
            return module(*inputs)
    finally:
        module.config._experts_implementation = before


class Counter:
    """A tap that counts the rows each expert computed, and keeps their weighted sum."""

    def __init__(self):
        self.rows = {}

    def combined(self, sum_TH):
        self.sum_TH = sum_TH.clone()

    def routed(self, x_TH, index_TK, weight_TK):
        return True

    def expert(self, expert, row_R, x_RH, y_RH):
        self.rows[expert] = self.rows.get(expert, 0) + len(y_RH)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_forward_equals_the_eager_one(family):
    layer, *inputs = experts_and_routing(family)
    torch.testing.assert_close(run(layer, NAME, *inputs), run(layer, "eager", *inputs), atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sentinel_costs_nothing_and_adds_nothing(family):
    layer, x_TH, index_TK, weight_TK = experts_and_routing(family)
    E = layer.num_experts
    some_TK = torch.rand(index_TK.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    some_TK[3] = True  # a token that no expert sees
    with_none_TK = index_TK.masked_fill(some_TK, E)
    counter = Counter()
    with observe(layer.experts, counter):
        found_TH = run(layer, NAME, x_TH, with_none_TK, weight_TK)
    assert torch.equal(counter.sum_TH, found_TH)
    expected_TH = run(layer, "eager", x_TH, index_TK, weight_TK.masked_fill(some_TK, 0.0))
    torch.testing.assert_close(found_TH, expected_TH, atol=2e-6, rtol=2e-5)
    assert torch.equal(found_TH[3], torch.zeros_like(found_TH[3]))
    assert sum(counter.rows.values()) == int((~some_TK).sum())
    assert E not in counter.rows


@pytest.mark.parametrize("family", FEW)
def test_rows_of_sentinels_alone_give_zeros_without_running_an_expert(family):
    layer, x_TH, index_TK, weight_TK = experts_and_routing(family)
    counter = Counter()
    with observe(layer.experts, counter):
        found_TH = run(layer, NAME, x_TH, torch.full_like(index_TK, layer.num_experts), weight_TK)
    assert torch.equal(found_TH, torch.zeros_like(x_TH))
    assert counter.rows == {}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_the_sentinel_is_in_no_statistic_of_the_selected(observer):
    """Beside the scores of all experts, every statistic is that of the tokens' real slots."""
    routing, y_TKH = routed_rows(4)
    state = fed(OBSERVERS[observer], routing, y_TKH, [list(range(40))])
    real_TK = routing.index_TK < 5
    totals = {
        "count_E": real_TK.sum(),
        "count_DE": real_TK.sum(),
        "coactivation_EE": (real_TK.sum(1) ** 2).sum(),
        "gate_mass_E": routing.weight_TK.double().sum(),
        "gate_share_E": real_TK.any(1).sum(),
        "output_norm_E": y_TKH.double().norm(dim=-1)[real_TK].sum(),
        "output_sum_EH": y_TKH.double()[real_TK].sum(),
        "input_square_EH": (routing.x_TH.double().square().sum(1) * real_TK.sum(1)).sum(),
        "gate_ratio_RB": (real_TK.sum(1) == 2).sum(),
    }
    for name, value in state.items():
        assert value.shape[0] in ((1,) if name.startswith("gate_ratio") else (2, 5))
        if name in totals:
            assert float(value.sum()) == pytest.approx(float(totals[name]), rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_narrow_weights_give_exactly_what_widened_ones_give(family):
    layer, *inputs = experts_and_routing(family)
    layer.experts.to(torch.bfloat16)
    narrow = run(layer, NAME, *inputs)
    assert narrow.dtype == torch.float32
    layer.experts.to(torch.float32)
    assert torch.equal(narrow, run(layer, NAME, *inputs))


def test_taps_see_raw_outputs_before_the_weight():
    layer, x_TH, index_TK, weight_TK = experts_and_routing("gpt-oss")
    seen = {}

    class Keep(Counter):
        def expert(self, expert, row_R, x_RH, y_RH):
            seen[expert] = (row_R.clone(), x_RH.clone(), y_RH.clone())

    with observe(layer.experts, Keep()):
        run(layer, NAME, x_TH, index_TK, weight_TK)
    assert sum(len(rows) for rows, _, _ in seen.values()) == index_TK.numel()
    for expert, (row_R, x_RH, y_RH) in seen.items():
        assert (index_TK.flatten()[row_R] == expert).all()
        assert torch.equal(x_RH, x_TH[row_R // layer.top_k])
        for x_H, y_H in zip(x_RH, y_RH):
            assert close(y_H, expert_output(layer, expert, x_H), PRODUCT)
