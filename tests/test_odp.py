"""ODP: the ratio rule with protected tokens. Importance against plain loops, its limits, padding, decoding."""

# B batch, L sequence, T tokens, K slots per token

import functools
import math
from contextlib import ExitStack

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import coterie
from coterie.anatomy import moe_layers
from coterie.decoding.importance import TokenWatch, importance, most_important, real_tokens
from coterie.decoding.skipping import betas, skip
from coterie.errors import ModelError, UsageError
from coterie.evaluation.compare import evaluate_models
from coterie.experts.forward import observe
from coterie.profiling.observers import GateRatio
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData
from families import FAMILIES, FEW, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = (*FEW, "olmoe", "qwen2-moe")
ATTENDING = tuple(f for f in FAMILIES if f not in ("qwen3-next", "lfm2-moe", "jamba"))  # in every MoE layer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root))


def padded(left=False):
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[1, 9:] = mask[3, 5:] = False
    ids = tokens(4, 16, seed=2).clone()
    if left:
        for row, size in ((1, 9), (3, 5)):
            ids[row] = ids[row].roll(16 - size)
            mask[row] = mask[row].roll(16 - size)
    return Batch(ids, mask, torch.zeros(4).long())


def profiled(folder, batch):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    data = TokenData([batch], ["text"], "digest", {"text": batch.tokens})
    return profile_model(streamed, data, [GateRatio], model="tiny")


def eager(family, **changes):
    model = tiny(family, **changes)
    model.set_experts_implementation("coterie")
    model.set_attn_implementation("eager")
    return model


def everywhere(model, beta):
    return {m.index: torch.full((m.top_k - 1,), beta, dtype=torch.float64) for m in moe_layers(model)}


class Ran:
    """The ids an experts module was handed."""

    def __init__(self):
        self.ids = []

    def routed(self, x_TH, index_TK, weight_TK):
        self.ids.append(index_TK.clone())
        return False

    def combined(self, sum_TH): ...


@torch.no_grad()
def ran(model, batch):
    """(logits, {layer: experts that ran, [B, L]})."""
    layers, taps = moe_layers(model), {}
    mask = None if batch.mask_BL is None else batch.mask_BL.long()
    with ExitStack() as stack:
        for layer in layers:
            taps[layer.index] = Ran()
            stack.enter_context(observe(layer.experts, taps[layer.index]))
        out = model(batch.ids_BL, attention_mask=mask, use_cache=False).logits
    shape = batch.ids_BL.shape
    return out, {m.index: (taps[m.index].ids[0] < m.num_experts).sum(-1).view(shape) for m in layers}


# -- importance -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_importance_is_the_equation_token_by_token(seed):
    g = torch.Generator().manual_seed(seed)
    B, L, H = 3, 7, 5
    t_BLH = torch.randn(B, L, H, generator=g)
    real_BL = torch.ones(B, L, dtype=torch.bool)
    real_BL[1, 4:] = real_BL[2, :3] = False
    A_BLL = torch.rand(B, L, L, generator=g).tril() * real_BL[:, None, :]
    A_BLL = A_BLL / A_BLL.sum(-1, keepdim=True).clamp(min=1e-9)
    found = importance(t_BLH, A_BLL, real_BL)
    for b in range(B):
        for j in range(L):
            if not real_BL[b, j]:
                assert float(found[b, j]) == 0
                continue
            queries = [i for i in range(j, L) if real_BL[b, i]]
            received = sum(float(A_BLL[b, i, j]) for i in queries) / len(queries)
            expected = float(t_BLH[b, j].abs().sum()) * received
            assert float(found[b, j]) == pytest.approx(expected, rel=1e-5)


def test_a_token_that_all_later_ones_attend_to_is_the_most_important():
    L, planted = 12, 4
    A_BLL = torch.zeros(1, L, L)
    for i in range(L):
        A_BLL[0, i, : i + 1] = 0.1 / (i + 1)
        A_BLL[0, i, planted if i >= planted else i] += 0.9
    real = torch.ones(1, L, dtype=torch.bool)
    found = importance(torch.ones(1, L, 3), A_BLL, real)[0, 1:-1]  # the first and last are always looked at
    rest = torch.cat([found[: planted - 1], found[planted:]])
    assert A_BLL.sum(2).allclose(torch.ones(1, L))  # what the authors' code takes instead says nothing
    assert float(found[planted - 1]) > 3 * float(rest[planted:].max())
    chosen = most_important(importance(torch.ones(1, L, 3), A_BLL, real), real, 0.2)
    assert bool(chosen[0, planted])


@given(st.integers(0, 1000), st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_of_every_sequence_its_share_of_real_tokens_is_chosen_and_they_are_the_largest(seed, share):
    g = torch.Generator().manual_seed(seed)
    real_BL = torch.rand(4, 9, generator=g) < 0.7
    value_BL = torch.rand(4, 9, generator=g).double() * real_BL
    chosen_BL = most_important(value_BL, real_BL, share)
    assert not (chosen_BL & ~real_BL).any()
    for value, real, chosen in zip(value_BL, real_BL, chosen_BL, strict=True):
        assert int(chosen.sum()) == math.ceil(share * int(real.sum()))
        if chosen.any() and (real & ~chosen).any():
            assert value[chosen].min() >= value[real & ~chosen].max()


def test_real_tokens_are_read_off_any_mask():
    real = padded().mask_BL
    assert real_tokens(None, 2, 5).all()
    assert torch.equal(real_tokens(real.long(), 4, 16), real)
    assert torch.equal(real_tokens(real.long(), 4, 3), real[:, -3:])
    seen = torch.ones(16, 16).tril().bool() & real[:, None, None, :]
    assert torch.equal(real_tokens(seen, 4, 16), real)
    assert torch.equal(real_tokens(torch.where(seen, 0.0, -1e30), 4, 16), real)
    assert torch.equal(real_tokens(torch.where(seen, 0.0, -1e30)[:, :, -3:], 4, 3), real[:, -3:])


@pytest.mark.parametrize("family", ATTENDING)
@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_padding_does_not_change_what_is_important(family, left):
    model = eager(family)
    layer = moe_layers(model)[0]

    def chosen(ids, mask):
        with TokenWatch(layer, 0.3) as watch:
            found, forward = [], layer.experts.forward

            def look(*given):
                found.append((watch.real_T, watch.important_T))
                return forward(*given)

            layer.experts.forward = look
            try:
                model(ids, attention_mask=mask, use_cache=False)
            finally:
                del layer.experts.forward
        return found[0]

    batch = padded(left)
    real_T, important_T = chosen(batch.ids_BL, batch.mask_BL.long())
    assert torch.equal(real_T.view(4, 16), batch.mask_BL)
    for row in range(4):
        mask = batch.mask_BL[row]
        _, alone = chosen(batch.ids_BL[row][mask][None], None)
        assert int(alone.sum()) == math.ceil(0.3 * int(mask.sum()))
        assert torch.equal(important_T.view(4, 16)[row][mask], alone)
        assert not important_T.view(4, 16)[row][~mask].any()


# -- the rule ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ATTENDING)
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_a_threshold_of_zero_changes_no_bit_whatever_is_protected(family, share):
    model = eager(family)
    before, _ = ran(model, padded())
    with skip(model, everywhere(model, 0.0), protect_tokens=share) as done:
        after, _ = ran(model, padded())
    assert torch.equal(before, after)
    assert done.share == 0
    assert sum(done.protected.values()) > 0


@pytest.mark.parametrize("family", SOME)
def test_protected_tokens_run_all_their_experts_and_the_others_one(family):
    model, batch = eager(family), padded()
    wanted = sum(math.ceil(0.2 * n) for n in batch.mask_BL.sum(1).tolist())
    with skip(model, everywhere(model, 1.01), protect_tokens=0.2) as done:
        _, counts = ran(model, batch)
    for layer in moe_layers(model):
        found = counts[layer.index][batch.mask_BL]
        assert sorted(set(found.tolist())) == [1, layer.top_k]
        assert int((found == layer.top_k).sum()) == done.protected[layer.index] == wanted
        assert done.tokens[layer.index] == batch.tokens  # padding counts nowhere
        assert done.slots[layer.index] == batch.tokens * layer.top_k
        assert done.skipped[layer.index] == (batch.tokens - wanted) * (layer.top_k - 1)


@pytest.mark.parametrize("family", SOME)
def test_nothing_protected_above_one_is_top_1_routing(family):
    model, batch = eager(family), padded()
    with skip(model, everywhere(model, 1.01), protect_tokens=0.0) as done:
        _, counts = ran(model, batch)
    assert all(set(found.flatten().tolist()) == {1} for found in counts.values())
    assert done.active == 1.0
    assert not any(done.protected.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_the_median_of_the_same_text_skips_half_of_the_unprotected_tokens(family, checkpoint):
    batch = Batch(tokens(6, 40, seed=5), None, torch.zeros(6).long())
    found = betas(profiled(checkpoint(family), batch))
    model = resident(checkpoint(family))
    first = min(found)
    for share in (0.0, 0.02):
        with skip(model, {first: found[first]}, protect_tokens=share) as done:
            ran(model, batch)
        unprotected = done.tokens[first] - done.protected[first]
        assert done.protected[first] == (6 if share else 0)
        assert done.skipped[first] / unprotected == pytest.approx(0.5, abs=0.04)
        assert done.share == pytest.approx(0.25, abs=0.02)  # of top-2 calls in the layer where it is active


@pytest.mark.parametrize("family", SOME)
def test_a_streamed_model_protects_the_tokens_a_resident_one_does(family, checkpoint):
    batch = padded()
    data = TokenData([batch, Batch(tokens(2, 12), None, torch.zeros(2).long())], ["text"], "digest", {"text": 1})
    found = betas(profiled(checkpoint(family), batch), 0.7)
    streamed = StreamedModel(Checkpoint.open(checkpoint(family)), compute_dtype="float32")
    with skip(streamed, found, protect_tokens=0.2) as done:
        evaluate_models([("skipping", streamed)], data)
    model = resident(checkpoint(family))
    before = model.config._attn_implementation
    with skip(model, found, protect_tokens=0.2) as there:
        assert model.config._attn_implementation == "eager"
        for part in data.batches:
            ran(model, part)
    assert done.describe() == there.describe()
    assert done.tokens[min(found)] == batch.tokens + 24
    assert model.config._attn_implementation == streamed.model.config._attn_implementation == before


@pytest.mark.parametrize("family", FEW)
def test_at_a_decoding_step_only_the_rule_is_left(family, checkpoint):
    model, prompt = resident(checkpoint(family)), tokens(2, 12, seed=8)
    settings_ = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 511}
    with skip(model, everywhere(model, 1.01), protect_tokens=0.2) as done, torch.no_grad():
        grown = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings_)
    for layer in moe_layers(model):
        assert done.protected[layer.index] == 2 * math.ceil(0.2 * 12)  # of the prompt
        assert done.tokens[layer.index] == 2 * (grown.shape[1] - 1)
        rest = done.tokens[layer.index] - done.protected[layer.index]
        assert done.skipped[layer.index] == rest * (layer.top_k - 1)


def test_only_the_layers_named_skip(checkpoint, tmp_path):
    folder, ids = checkpoint("qwen3-moe"), token_file(tmp_path / "ids.safetensors")
    profile = coterie.profile(str(folder), tokens=str(ids), observers=[GateRatio])
    model = resident(folder)
    with coterie.skipping(model, profile, protect_tokens=0.02, layers="2") as done, torch.no_grad():
        model(tokens(), use_cache=False)
    assert list(done.skipped) == [2]
    assert done.skipped[2] > 0
    with pytest.raises(UsageError, match="--layers 1 is no MoE layer"), coterie.skipping(model, profile, layers="1"):
        pass


def test_layers_without_attention_cannot_protect_tokens_and_say_so():
    model = tiny("lfm2-moe")  # layer 1 attends, layer 2 is a convolution
    attending = {1: everywhere(model, 0.9)[1]}
    with (
        skip(model, everywhere(model, 0.9), protect_tokens=0.02),
        pytest.raises(ModelError, match="layer 2 has no attention that shows its probabilities"),
    ):
        model(tokens(), use_cache=False)
    for thresholds, share in ((everywhere(model, 0.9), 0.0), (attending, 0.02)):
        with skip(model, thresholds, protect_tokens=share) as done, torch.no_grad():
            model(tokens(), use_cache=False)
        assert done.share > 0


def test_what_cannot_be_is_refused(checkpoint, tmp_path):
    model = tiny("mixtral")
    with pytest.raises(UsageError, match="layers alone"), skip(moe_layers(model), {}, protect_tokens=0.02):
        pass
    for share in (-0.1, 1.5):
        with (
            pytest.raises(UsageError, match="is no share of tokens"),
            skip(model, everywhere(model, 0.5), protect_tokens=share),
        ):
            pass
    assert model.config._attn_implementation != "eager"
    ids = token_file(tmp_path / "ids.safetensors")
    done = cli("evaluate", checkpoint("mixtral"), "--tokens", ids, "--skip-tokens", "0.02")
    assert done.code == 2
    assert "--skip" in done.err


def test_evaluate_measures_a_model_that_skips_but_for_protected_tokens(checkpoint, tmp_path):
    folder, ids = checkpoint("mixtral"), token_file(tmp_path / "ids.safetensors", padded=True)
    coterie.profile(str(folder), tokens=str(ids), observers=[GateRatio], out=str(tmp_path / "profile"))

    def active(*options):
        options = ("--skip", tmp_path / "profile", "--skip-quantile", "1", *options)
        done = cli("evaluate", folder, "--tokens", ids, *options, "--json")
        assert done.code == 0, done.err
        return float(done.json()[1]["model"].split("(")[1].split()[0])

    assert active() == pytest.approx(1.0, abs=0.01)
    assert active("--skip-tokens", "0.5") == pytest.approx(1.5, abs=0.03)
    assert active("--skip-layers", "0") == pytest.approx(1.0, abs=0.01)  # of the layers that skip
