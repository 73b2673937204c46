"""Dynamic skipping: ratios and thresholds against plain loops, the limits beta = 0 and beta > 1, generation, counts."""

# T tokens, E experts, K experts per token, R ranks below the first

import copy
import functools
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coterie
from coterie.anatomy import moe_layers, narrowed
from coterie.decoding.skipping import betas, skip
from coterie.errors import UsageError
from coterie.evaluation.compare import evaluate_models
from coterie.experts.forward import NAME, observe, rerouted
from coterie.profiling.observers import RATIO_BINS as BINS
from coterie.profiling.observers import GateRatio, SelectionCount
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FAMILIES, FEW, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = (*FEW, "qwen2-moe")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root))


def padded():
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 9:] = mask[3, 2:] = False
    return Batch(tokens(4, 16, seed=2), mask, torch.zeros(4).long())


def profiled(folder, parts, observers=(GateRatio,)):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    sizes = {"text": sum(b.tokens for b in parts)}
    return profile_model(streamed, TokenData(list(parts), ["text"], "digest", sizes), observers, model="tiny")


@pytest.fixture(scope="module")
def calibrated(checkpoint):
    return functools.cache(lambda family: profiled(checkpoint(family), [padded(), Batch(tokens(3, 20))]))


class Rows:
    """Counts the rows that experts computed, and keeps what they were handed."""

    def __init__(self):
        self.rows, self.routings = 0, []

    def routed(self, x_TH, index_TK, weight_TK):
        self.routings.append((index_TK.clone(), weight_TK.clone()))
        return True

    def expert(self, expert, row_R, x_RH, y_RH):
        self.rows += len(row_R)

    def combined(self, sum_TH): ...


@torch.no_grad()
def watched(model, ids):
    """(logits, {layer: (index_TK, weight_TK)} as the experts ran them, rows computed)."""
    layers, taps = moe_layers(model), {}
    with ExitStack() as stack:
        for layer in layers:
            taps[layer.index] = Rows()
            stack.enter_context(observe(layer.experts, taps[layer.index]))
        logits = model(ids, use_cache=False).logits
    return logits, {i: tap.routings[0] for i, tap in taps.items()}, sum(tap.rows for tap in taps.values())


def everywhere(model, beta):
    return {m.index: torch.full((m.top_k - 1,), beta, dtype=torch.float64) for m in moe_layers(model)}


# -- ratios and thresholds --------------------------------------------------------------------------------------------


def ratios(folder, parts):
    """{layer: [tokens, R] ratios of the resident model's weights, padding left out}."""
    model, found = resident(folder), {}
    for batch in parts:
        mask = None if batch.mask_BL is None else batch.mask_BL.long()
        layers = moe_layers(model)
        taps = {m.index: Rows() for m in layers}
        with ExitStack() as stack, torch.no_grad():
            for m in layers:
                stack.enter_context(observe(m.experts, taps[m.index]))
            model(batch.ids_BL, attention_mask=mask, use_cache=False)
        for index, tap in taps.items():
            for t, weights in enumerate(tap.routings[0][1].double().tolist()):
                row, column = divmod(t, batch.ids_BL.shape[1])
                if batch.mask_BL is None or batch.mask_BL[row, column]:
                    first, *others = sorted(weights, reverse=True)
                    found.setdefault(index, []).append([w / first for w in others])
    return {index: torch.tensor(rows, dtype=torch.float64) for index, rows in found.items()}


@pytest.mark.parametrize("family", SOME)
def test_ratios_and_their_quantiles_are_those_of_the_applied_weights(family, checkpoint, calibrated):
    profile = calibrated(family)
    for index, ratio_TR in ratios(checkpoint(family), [padded(), Batch(tokens(3, 20))]).items():
        layer = profile.layers[index]
        assert layer.gate_ratio_RB.sum(1).tolist() == [layer.tokens] * (layer.top_k - 1)
        torch.testing.assert_close(layer.gate_ratio_sum_R, ratio_TR.sum(0), rtol=1e-6, atol=1e-6)
        mean_R = betas(profile, statistic="mean")[index]
        torch.testing.assert_close(mean_R, ratio_TR.mean(0), rtol=1e-6, atol=1e-6)
        for quantile in (0.1, 0.5, 0.9):
            below_R = (ratio_TR < betas(profile, quantile)[index]).double().mean(0)
            edge = 1.5 * float((layer.gate_ratio_RB.max() + 1) / layer.tokens)  # tokens that share a bin
            assert (below_R - quantile).abs().max() < edge
        assert betas(profile, 0.0)[index].tolist() == [0.0] * (layer.top_k - 1)


def test_a_hand_made_histogram_gives_the_thresholds_worked_out_by_hand():
    count_RB = torch.zeros(2, BINS, dtype=torch.int64)
    count_RB[0, 400] = count_RB[0, 1000] = 10  # half of the tokens in [0.2, 0.2005), half in [0.5, 0.5005)
    stats = {"gate_ratio_RB": count_RB, "gate_ratio_sum_R": torch.tensor([7.0, 0.0], dtype=torch.float64)}
    layer = LayerProfile(3, "mlp", 8, 3, 20, stats=stats)
    profile = Profile("m", "d", "t", ["text"], {3: layer}, rules=GateRatio.fields)
    found = {q: betas(profile, q)[3].tolist() for q in (0.25, 0.5, 0.75, 1.0)}
    assert found[0.25] == pytest.approx([400.5 / BINS, 0.0])
    assert found[0.5] == pytest.approx([401 / BINS, 0.0])
    assert found[0.75] == pytest.approx([1000.5 / BINS, 0.0])
    assert found[1.0] == pytest.approx([1001 / BINS, 0.0])
    assert betas(profile, statistic="mean")[3].tolist() == pytest.approx([0.35, 0.0])
    doubled = profile.merge(profile)
    assert doubled.layers[3].gate_ratio_RB.sum(1).tolist() == [40, 0]
    assert betas(doubled, 0.25)[3].tolist() == pytest.approx(found[0.25])


@pytest.mark.parametrize("quantile", [-0.1, 1.1])
def test_a_quantile_that_is_no_share_is_refused(quantile, calibrated):
    with pytest.raises(UsageError, match="is no share of tokens"):
        betas(calibrated("mixtral"), quantile)


def test_a_saved_profile_gives_the_same_thresholds(calibrated, tmp_path):
    calibrated("deepseek-v3").save(tmp_path / "profile")
    loaded = betas(Profile.load(tmp_path / "profile"))
    assert all(torch.equal(beta_R, loaded[i]) for i, beta_R in betas(calibrated("deepseek-v3")).items())


# -- the rule ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.booleans(), st.sets(st.integers(0, 15), max_size=4))
def test_the_rule_is_the_papers_token_by_token(seed, renormalise, held):
    g = torch.Generator().manual_seed(seed)
    layer = RULE_LAYER
    T, E, K = 12, layer.num_experts, layer.top_k
    index_TK = torch.rand(T, E, generator=g).topk(K).indices
    weight_TK = torch.rand(T, K, generator=g) + 0.01
    none_TK = torch.rand(T, K, generator=g) < 0.15
    none_TK[0], none_TK[1] = False, True  # a token without any expert
    index_TK[none_TK], weight_TK[none_TK] = E, 0.0
    weight_TK[0] = weight_TK[0, 0].clone()  # a token whose weights are equal
    beta_R = torch.rand(K - 1, generator=g, dtype=torch.float64) * 1.3
    beta_R[seed % (K - 1)] = 1.0  # at which equal weights are not skipped
    protect = [(layer.index, e) for e in held] + [(layer.index + 7, e) for e in range(E)]
    with skip([layer], {layer.index: beta_R}, renormalise=renormalise, protect=protect) as done:
        new_index, new_weight = layer.experts._coterie_slots[0](index_TK, weight_TK)
    gone_in_all = 0
    for t in range(T):
        slots = [k for k in range(K) if index_TK[t, k] < E]
        ranked = sorted(slots, key=lambda k: (-float(weight_TK[t, k]), k))
        gone = [
            k
            for rank, k in enumerate(ranked)
            if rank
            and int(index_TK[t, k]) not in held
            and float(weight_TK[t, k]) < float(beta_R[rank - 1]) * float(weight_TK[t, ranked[0]])
        ]
        gone_in_all += len(gone)
        left = [k for k in slots if k not in gone]
        total = float(weight_TK[t].sum())
        scale = total / float(weight_TK[t, left].sum()) if renormalise and gone else 1.0
        for k in range(K):
            if k in left:
                assert int(new_index[t, k]) == int(index_TK[t, k])
                assert float(new_weight[t, k]) == pytest.approx(float(weight_TK[t, k]) * scale, rel=1e-5)
            else:
                assert int(new_index[t, k]) == E
                assert float(new_weight[t, k]) == 0
        if not gone:
            assert torch.equal(new_weight[t], weight_TK[t])
    assert done.tokens == {layer.index: T}
    assert done.slots == {layer.index: int((~none_TK).sum())}
    assert done.skipped == {layer.index: gone_in_all}


RULE_LAYER = moe_layers(tiny("deepseek-v3"))[0]  # 16 experts, 4 per token


@pytest.mark.parametrize("family", FAMILIES)
def test_beta_zero_changes_no_bit(family):
    model = tiny(family)
    model.set_experts_implementation(NAME)
    before, _, rows = watched(model, tokens())
    with skip(model, everywhere(model, 0.0)) as done:
        after, _, same = watched(model, tokens())
    assert torch.equal(before, after)
    assert (rows, done.share) == (same, 0.0)
    assert sum(done.slots.values()) == rows


@pytest.mark.parametrize("family", SOME)
def test_beta_above_one_is_the_top_1_model_with_the_whole_weight(family):
    model = tiny(family)
    model.set_experts_implementation(NAME)

    def top_1(index_TK, weight_TK):
        first_T1 = weight_TK.argmax(-1, keepdim=True)
        return index_TK.gather(-1, first_T1), weight_TK.sum(-1, keepdim=True)

    with skip(model, everywhere(model, 1.01)) as done:
        found, routings, rows = watched(model, tokens())
    with ExitStack() as stack:
        for layer in moe_layers(model):
            stack.enter_context(rerouted(layer.experts, top_1))
        expected, _, _ = watched(model, tokens())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert rows == tokens().numel() * len(moe_layers(model))
    assert done.active == 1.0
    if family in ("mixtral", "qwen3-moe", "gpt-oss"):
        for _, weight_TK in routings.values():
            torch.testing.assert_close(weight_TK.amax(-1), torch.ones(len(weight_TK)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", SOME)
def test_the_median_skips_half_of_the_calibration_tokens_and_no_skipped_expert_runs(family, checkpoint, calibrated):
    model = resident(checkpoint(family))
    with skip(model, betas(calibrated(family), 0.5)) as done, torch.no_grad():
        model(tokens(4, 16, seed=2), attention_mask=padded().mask_BL.long(), use_cache=False)
        _, _, rows = watched(model, tokens(3, 20))
        counts = done.describe()["layers"]
    first, top_k = counts[0], moe_layers(model)[0].top_k
    rate = first["skipped"] / (first["tokens"] * (top_k - 1))
    assert 0.4 < rate < 0.6  # the first layer's inputs are those of the calibration, padding aside
    assert 0.3 < done.share * top_k / (top_k - 1) < 0.7
    assert done.active == pytest.approx(top_k * (1 - done.share))
    with skip(model, betas(calibrated(family), 0.5)) as again:
        _, _, rows = watched(model, tokens(3, 20))
    assert rows == sum(again.slots.values()) - sum(again.skipped.values())
    assert rows < sum(again.slots.values())


def test_a_larger_quantile_skips_more(checkpoint, calibrated):
    model, shares = resident(checkpoint("deepseek-v3")), []
    for quantile in (0.0, 0.25, 0.5, 0.75, 1.0):
        with skip(model, betas(calibrated("deepseek-v3"), quantile)) as done:
            watched(model, tokens())
        shares.append(done.share)
    assert shares[0] == 0
    assert shares == sorted(set(shares))


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_protected_experts_always_run(family):
    model = tiny(family)
    model.set_experts_implementation(NAME)
    _, plain, _ = watched(model, tokens())
    for layer in moe_layers(model):
        victim = int(plain[layer.index][0][:, -1].mode().values)  # the expert that is last most often
        for held in ([], [(layer.index, victim)]):
            with skip([layer], everywhere(model, 1.01), protect=held):
                _, found, _ = watched(model, tokens())
            ran = int((found[layer.index][0] == victim).sum())
            assert (ran == int((plain[layer.index][0] == victim).sum())) == bool(held)


@pytest.mark.parametrize("family", FEW)
def test_generation_with_a_cache_skips_as_without(family, checkpoint, calibrated):
    model = resident(checkpoint(family))
    prompt = tokens(1, 12, seed=8)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    with skip(model, betas(calibrated(family), 0.6)) as done, torch.no_grad():
        cached = model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)
        by_cache = dict(done.skipped)
        grown = prompt
        while grown.shape[1] < cached.shape[1]:
            logits = model(grown, use_cache=False).logits[:, -1]
            grown = torch.cat((grown, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(cached, grown)
    first = min(by_cache)
    assert done.tokens[first] > 2 * cached.shape[1]
    assert all(n > 0 for n in by_cache.values())


# -- where it can be attached -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_a_streamed_model_skips_as_a_resident_one(family, checkpoint, calibrated):
    ids = tokens(2, 16)
    data = TokenData([Batch(ids, None, torch.zeros(2).long())], ["text"], "digest", {"text": 32})
    opened = [StreamedModel(Checkpoint.open(checkpoint(family)), compute_dtype="float32") for _ in range(2)]
    with skip(opened[1].moe.values(), betas(calibrated(family))) as done:
        plain, skipped = evaluate_models([("plain", opened[0]), ("skipped", opened[1])], data)
    model = resident(checkpoint(family))
    with skip(model, betas(calibrated(family))) as there:
        logits, _, _ = watched(model, ids)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert skipped.mean_loss == pytest.approx(float(loss), rel=1e-5)
    assert skipped.mean_loss != pytest.approx(plain.mean_loss, rel=1e-7)
    assert done.skipped == there.skipped


def test_afterwards_the_model_is_as_it_was_also_after_an_error(checkpoint, calibrated):
    model = tiny("mixtral")
    before = model.get_experts_implementation()
    with torch.no_grad():
        logits = model(tokens(), use_cache=False).logits
    for broken in (False, True):
        try:
            with skip(model, everywhere(model, 1.0)) as done:
                with torch.no_grad():
                    assert not torch.equal(model(tokens(), use_cache=False).logits, logits)
                assert broken or done.share > 0
                if broken:
                    raise KeyError
        except KeyError:
            assert broken
        assert model.get_experts_implementation() == before
        with torch.no_grad():
            assert torch.equal(model(tokens(), use_cache=False).logits, logits)


@torch.no_grad()
def test_skipping_goes_together_with_a_narrowed_layer():
    model = tiny("mixtral")
    model.set_experts_implementation(NAME)
    layer, keep, tap = moe_layers(model)[0], [0, 2, 3, 5, 7], Rows()
    beta = everywhere(model, 1.01)
    for order in (0, 1):
        with ExitStack() as stack:
            inside = stack.enter_context(skip([layer], beta)) if order else None
            stack.enter_context(narrowed(layer, keep))
            done = inside or stack.enter_context(skip([layer], beta))
            stack.enter_context(observe(layer.experts, tap))
            model(tokens(), use_cache=False)
        assert done.share == 0.5
    (one, _), (two, _) = tap.routings
    assert torch.equal(one, two)
    assert set(one[one < 8].tolist()) <= set(keep)


# -- the function that users call -------------------------------------------------------------------------------------


def test_the_api_takes_a_folder_or_a_profile(checkpoint, tmp_path):
    folder, ids = checkpoint("qwen3-moe"), token_file(tmp_path / "ids.safetensors")
    coterie.profile(str(folder), tokens=str(ids), observers=[GateRatio], out=str(tmp_path / "profile"))
    model, shares = resident(folder), []
    for profile in (str(tmp_path / "profile"), Profile.load(tmp_path / "profile")):
        with coterie.skipping(model, profile, quantile=0.7) as done, torch.no_grad():
            model(tokens(), use_cache=False)
        shares.append(done.share)
    assert shares[0] == shares[1] > 0.2
    with coterie.skipping(model, str(tmp_path / "profile"), quantile=1.0, protect="0:1,2:3") as done, torch.no_grad():
        model(tokens(), use_cache=False)
    assert 0.3 < done.share < 0.5  # all but the protected ones


def test_profiles_that_do_not_fit_are_refused(checkpoint, calibrated):
    model = resident(checkpoint("mixtral"))
    with (
        pytest.raises(UsageError, match="layer 0 is missing, and here it has 8, 2 per token"),
        coterie.skipping(model, calibrated("deepseek-v3")),
    ):
        pass
    pruned = copy.deepcopy(calibrated("mixtral"))
    pruned.layers[1].experts = 6
    with pytest.raises(UsageError, match="layer 1 has 6 experts, 2 per token"), coterie.skipping(model, pruned):
        pass
    counts = profiled(checkpoint("mixtral"), [Batch(tokens())], [SelectionCount])
    with pytest.raises(UsageError, match="lacks GateRatio"), coterie.skipping(model, counts):
        pass
    with (
        pytest.raises(UsageError, match="layer 0: 2 thresholds for the 1 ranks below the first"),
        skip(model, {0: torch.zeros(2, dtype=torch.float64)}),
    ):
        pass
    assert not any(hasattr(m.experts, "_coterie_slots") and m.experts._coterie_slots for m in moe_layers(model))


def test_evaluate_measures_the_model_with_its_weak_experts_skipped(tmp_path):
    source = saved("mixtral", tmp_path)
    ids = token_file(tmp_path / "ids.safetensors", padded=True)
    coterie.profile(str(source), tokens=str(ids), observers=["GateRatio"], out=str(tmp_path / "seen"))
    whole = cli("evaluate", source, "--tokens", ids, "--skip", tmp_path / "seen", "--skip-quantile", 0, "--json").json()
    assert whole[1]["mean"]["loss"] == whole[0]["mean"]["loss"]
    assert whole[1]["model"].endswith("skipping (2.00 experts per token)")
    half = cli("evaluate", source, "--tokens", ids, "--skip", tmp_path / "seen", "--json").json()
    assert half[1]["mean"]["kl"] > 0
    assert 1.4 < float(half[1]["model"].split("(")[1].split()[0]) < 1.6
    done = cli("evaluate", saved("gpt-oss", tmp_path), "--tokens", ids, "--skip", tmp_path / "none")
    assert done.code == 2
    assert "is not a profile" in done.err
