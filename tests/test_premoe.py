"""PreMoe's score: TCESS against plain loops over raw logits, its identities, biases, negative logits, mixing."""

# T tokens, E experts, D domains

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.methods import get_method
from coterie.errors import UsageError
from coterie.profiling.contribution import confident, tcess, tcess_name
from coterie.profiling.observe import unique
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FAMILIES, FEW, saved, tiny, token_file, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

PARAMETERS = [(1, -1.0, "none"), (3, -1.0, "none"), (3, 0.3, "none"), (2, -1.0, "mean"), (2, 0.55, "logsumexp")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root))


def padded(seed, rows=3, length=16):
    """Rows of 16, 11 and 6 real tokens of domains 0, 1, 0."""
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        mask[row, length - 5 * row :] = False
    return Batch(tokens(rows, length, seed), mask, torch.arange(rows) % 2)


def profiled(folder, batches, observers, domains=("one", "two")):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    data = TokenData(list(batches), list(domains), "x", {d: sum(b.tokens for b in batches) for d in domains})
    return profile_model(streamed, data, observers, model="tiny")


def raw_logits(model, batch):
    """{layer: [(domain, logits [E]) of every real token]}: router inputs times the router's own weight."""
    found = {}
    for layer in moe_layers(model):
        seen = {}
        hook = layer.router.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(x=a[0]))
        weight = next(p for p in layer.router.parameters() if p.dim() == 2)
        bias = getattr(layer.router, "bias", None)
        rows = found[layer.index] = []
        for ids, mask, domain in zip(batch.ids_BL, batch.mask_BL, batch.domain_B):
            with torch.no_grad():
                model(input_ids=ids[mask][None], use_cache=False)
                z_TE = F.linear(seen["x"].reshape(-1, weight.shape[1]).float(), weight.float(), bias)
            rows += [(int(domain), z_E.double()) for z_E in z_TE]
        hook.remove()
    return found


def by_loops(rows, candidates, threshold, shift):
    """Sums [D, E] of one layer's tokens."""
    sum_DE = torch.zeros(2, len(rows[0][1]), dtype=torch.float64)
    for domain, z_E in rows:
        chosen = sorted(range(len(z_E)), key=lambda i: -float(z_E[i]))[:candidates]
        local = {i: float(torch.exp(z_E[i]) / sum(torch.exp(z_E[j]) for j in chosen)) for i in chosen}
        for i in chosen:
            if local[i] >= threshold:
                value = z_E[i]
                value = value - z_E.mean() if shift == "mean" else value
                value = torch.exp(z_E[i]) / torch.exp(z_E).sum() if shift == "logsumexp" else value
                sum_DE[domain, i] += value
    return sum_DE


@pytest.mark.parametrize("family", FAMILIES)
def test_tcess_is_the_papers_formula_on_raw_logits(family, tmp_path):
    model = tiny(family)
    model.save_pretrained(tmp_path / "m")
    observers = [tcess(*p) for p in (PARAMETERS if family in FEW else PARAMETERS[:1])]
    layers = profiled(tmp_path / "m", [padded(0)], observers).layers
    rows = raw_logits(model, padded(0))
    assert layers.keys() == rows.keys()
    for index, layer in layers.items():
        assert layer.tokens_D.tolist() == [22, 11]
        for p in PARAMETERS[: len(observers)]:
            expected_DE = by_loops(rows[index], *p)
            found_DE = layer.stats[tcess_name(*p)]
            assert torch.allclose(found_DE, expected_DE, atol=1e-4 * float(expected_DE.abs().max())), (index, p)


@pytest.mark.parametrize("family", FEW)
def test_scores_of_two_texts_add_up_whatever_the_batches_and_padding(family, checkpoint):
    observers = [tcess(*p) for p in PARAMETERS]
    a, b = padded(0), padded(7)
    together = profiled(checkpoint(family), [a, b], observers)
    merged = profiled(checkpoint(family), [a], observers).merge(profiled(checkpoint(family), [b], observers))
    rows = [Batch(i[m][None], None, d[None]) for x in (a, b) for i, m, d in zip(x.ids_BL, x.mask_BL, x.domain_B)]
    alone = profiled(checkpoint(family), rows, observers)
    for index, layer in together.layers.items():
        for name, value in layer.stats.items():
            for other in (merged, alone):
                assert torch.allclose(value.double(), other.layers[index].stats[name].double(), atol=1e-5), name


def test_several_parameters_live_in_one_profile_file(checkpoint, tmp_path):
    profile = profiled(checkpoint("mixtral"), [padded(0)], [tcess(*p) for p in PARAMETERS])
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert {tcess_name(*p) for p in PARAMETERS} <= loaded.layers[0].stats.keys()
    assert set(loaded.merge(profile).layers[0].stats) == set(profile.layers[0].stats)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 6))
def test_identities(seed, experts, T):
    z_TE = torch.randn(T, experts, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(confident(z_TE, experts).mean(0), z_TE.double().mean(0))
    assert float(confident(z_TE, 1).sum(1).mean()) == pytest.approx(float(z_TE.double().amax(1).mean()))
    assert not confident(z_TE, experts, 1.5).any()
    assert torch.equal(confident(z_TE, 1, 1.0), confident(z_TE, 1))  # one candidate's probability is 1
    for shift in ("mean", "logsumexp"):
        assert torch.allclose(confident(z_TE + 5, 2, 0.3, shift), confident(z_TE, 2, 0.3, shift), atol=1e-5)
    assert int((confident(z_TE, 2, -1, "logsumexp") > 0).sum()) == 2 * T


def test_a_bias_of_the_logit_counts_and_one_for_selection_only_does_not(tmp_path):
    """GPT-OSS's router bias is part of the logit; DeepSeek-V3's correction bias only chooses."""
    batch, found = padded(0), {}
    for family, name in (("gpt-oss", "bias"), ("deepseek-v3", "e_score_correction_bias")):
        for added in (0.0, 2.0):
            model = tiny(family)
            layer = moe_layers(model)[0]
            with torch.no_grad():
                getattr(layer.router, name)[3] += added
            folder = tmp_path / f"{family}{added}"
            model.save_pretrained(folder)
            E = layer.num_experts
            stats = profiled(folder, [batch], [tcess(E)]).layers[layer.index].stats
            found[family, added] = stats[tcess_name(E)].sum(0)
    moved = found["gpt-oss", 2.0] - found["gpt-oss", 0.0]
    assert float(moved[3]) == pytest.approx(2.0 * 33, rel=1e-4)
    assert float(moved.abs().sum() - moved[3].abs()) < 1e-3
    assert torch.equal(found["deepseek-v3", 2.0], found["deepseek-v3", 0.0])


def of(sum_DE, tokens_D, index=0):
    stats = {tcess_name(): torch.tensor(sum_DE).double(), "tokens_D": torch.tensor(tokens_D)}
    return LayerProfile(index, "l", len(sum_DE[0]), 2, sum(tokens_D), stats=stats)


def test_mixing_gives_domains_or_tokens_equal_say():
    layer = of([[10.0, 30.0, 0.0], [9.0, 0.0, 1.0]], [10, 1])
    assert get_method("premoe").score(layer).tolist() == pytest.approx([0.25 + 0.9, 0.75, 0.1])
    assert get_method("premoe", {"mix": "sum"}).score(layer).tolist() == pytest.approx([19 / 11, 30 / 11, 1 / 11])


def test_the_mean_of_all_tokens_is_the_score_of_the_union():
    a, b, union = of([[10.0, 4.0]], [10]), of([[2.0, 8.0]], [30]), of([[12.0, 12.0]], [40])
    score = get_method("premoe", {"mix": "sum"}).score
    assert torch.allclose((10 * score(a) + 30 * score(b)) / 40, score(union))


def test_negative_scores_are_written_into_the_plan(tmp_path):
    """A constant in the logits of a softmax router changes nothing it does, but turns raw TCESS over."""
    model = tiny("gpt-oss")
    plans = {}
    ids = token_file(tmp_path / "ids.safetensors")
    for added in (0.0, -50.0):
        with torch.no_grad():
            for layer in moe_layers(model):
                layer.router.bias.add_(added)
        model.save_pretrained(tmp_path / f"m{added}")
        for shift in ("none", "mean", "logsumexp"):
            out = tmp_path / f"{added}{shift}"
            done = coterie.compress(
                str(tmp_path / f"m{added}"),
                str(out),
                method="premoe",
                parameters={"shift": shift},
                keep=0.5,
                tokens=str(ids),
            )
            plans[added, shift] = done.plan.layers
    assert all("negative_scores" not in layer.extra for layer in plans[0.0, "mean"])
    assert all(layer.extra["negative_scores"] > 0 for layer in plans[-50.0, "none"])
    keep = {key: [layer.keep for layer in layers] for key, layers in plans.items()}
    assert keep[0.0, "none"] != keep[-50.0, "none"]
    for shift in ("mean", "logsumexp"):
        assert keep[0.0, shift] == keep[-50.0, shift]


@pytest.mark.parametrize("family", FEW)
def test_compressing_keeps_the_experts_of_largest_score(family, checkpoint, tmp_path):
    ids = token_file(tmp_path / "ids.safetensors")
    done = coterie.compress(str(checkpoint(family)), str(tmp_path / "out"), method="premoe", keep=0.5, tokens=str(ids))
    for plan in done.plan.layers:
        layer = next(x for x in moe_layers(tiny(family)) if x.index == plan.index)
        size = layer.num_experts // layer.groups
        for g in range(layer.groups):
            group = range(g * size, (g + 1) * size)
            inside = [plan.scores[e] for e in group if e in plan.keep]
            outside = [plan.scores[e] for e in group if e not in plan.keep]
            assert len(inside) == size // 2
            assert min(inside) >= max(outside)


def test_more_candidates_than_experts_are_refused(checkpoint):
    with pytest.raises(UsageError, match="9 candidates per token of 8 experts"):
        profiled(checkpoint("mixtral"), [padded(0)], [tcess(9)])
    with pytest.raises(UsageError, match="candidates"):
        get_method("premoe", {"candidates": 0})


def test_equal_parameters_are_one_statistic():
    assert unique([tcess(), tcess(1, -1.0), tcess(candidates=1, threshold=-1)]) == [tcess()]
