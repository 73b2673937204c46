"""MC-SMoE's compression: exact at the start, rows go by one threshold, what is stored is what stayed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.factorizing.mc_smoe import McSmoe, staying
from coterie.errors import UsageError
from coterie.training import factorize
from coterie.training.trainer import router_parameters
from families import FEW, each_tensor, resident, saved, tiny, token_file, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")
SOME = (*FEW, "olmoe")
SHORT = {"rank": 4, "steps": 6, "rows": 0.2, "batch_size": 2, "rate": 1e-3}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return str(token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", rows=8, padded=True))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def factored_model(family, rank=4):
    model = tiny(family)
    ranks = dict.fromkeys(("gate", "up", "down"), rank)
    factorize.factor_experts(model, {layer.index: ranks for layer in moe_layers(model)})
    return model


# -- the equations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_low_rank_plus_all_rows_is_the_expert_it_was(family):
    torch.testing.assert_close(logits(factored_model(family)), logits(tiny(family)), atol=1e-4, rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.floats(0, 0.45), st.floats(0, 0.45), st.floats(0, 1), st.integers(0, 5001))
def test_the_schedule_starts_at_one_never_rises_and_ends_at_the_share(steps, initial, final, rows, at):
    method = McSmoe(steps=steps, initial=initial, final=final, rows=rows)
    assert method.share(steps) == pytest.approx(rows)
    if initial * steps > 1:
        assert method.share(0) == 1.0
    assert rows - 1e-12 <= method.share(at + 1) <= method.share(at) + 1e-12 <= 1 + 2e-12


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 2**31))
def test_exactly_the_share_of_all_rows_stays_and_they_are_the_largest(sizes, share, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {str(i): torch.rand(n, generator=generator) for i, n in enumerate(sizes)}
    kept = staying(scores, share)
    every, stays = torch.cat(list(scores.values())), torch.cat(list(kept.values()))
    assert int(stays.sum()) == round(share * sum(sizes))
    if 0 < int(stays.sum()) < len(every):
        assert every[stays].min() >= every[~stays].max()


def test_the_threshold_is_one_for_all_experts_and_layers():
    kept = staying({"0.up": torch.tensor([5.0, 6.0]), "1.up": torch.tensor([1.0, 2.0])}, 0.5)
    assert kept["0.up"].tolist() == [True, True]
    assert kept["1.up"].tolist() == [False, False]


@pytest.mark.parametrize("family", SOME)
def test_a_rows_score_is_the_mean_of_weight_times_gradient_smoothed(family):
    model = factored_model(family)
    pruning = factorize.RowPruning(model, McSmoe(rank=4, steps=10, beta=0.5))
    seen = []
    for seed in (0, 1):
        model.zero_grad()
        model(tokens(seed=seed), labels=tokens(seed=seed)).loss.backward()
        pruning.on_pre_optimizer_step(None, None, None)
        seen.append({k: (p.detach() * p.grad).abs().mean(1) for k, p in factorize.rows_of(model, "sparse_{p}").items()})
    for key, score in factorize.rows_of(model, "sparse_{p}_score").items():
        torch.testing.assert_close(score, 0.25 * seen[0][key] + 0.5 * seen[1][key])


@pytest.mark.parametrize("family", SOME)
def test_dropping_zero_rows_changes_no_output(family):
    model = factored_model(family)
    generator = torch.Generator().manual_seed(0)
    for score in factorize.rows_of(model, "sparse_{p}_score").values():
        score.copy_(torch.rand(score.shape, generator=generator))
    factorize.clear_rows(model, 0.3)
    zeroed = logits(model)
    total = sum(len(rows) for rows in factorize.rows_of(model, "sparse_{p}").values())
    figures = factorize.drop_rows(model, 0.3)
    left = sum(len(rows) for rows in factorize.rows_of(model, "sparse_{p}").values())
    assert left == round(0.3 * total)
    torch.testing.assert_close(logits(model), zeroed, atol=1e-6, rtol=1e-5)
    assert 0 <= min(f["rows_kept"] for f in figures.values()) <= max(f["rows_kept"] for f in figures.values()) <= 1


# -- the job -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_the_checkpoint_holds_factors_and_rows_and_weighs_what_it_says(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    result = coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, method="mc-smoe", parameters=SHORT)
    after = each_tensor(tmp_path / "out")
    assert result.after.bytes == sum(t.nbytes for t in after.values())
    assert result.after.bytes < result.before.bytes
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    rows = {k: len(v) for k, v in factorize.rows_of(model, "sparse_{p}").items()}
    of_all = {
        f"{layer.index}.{p}": layer.num_experts * getattr(layer.experts, f"factor_{p}_a").shape[1]
        for layer in moe_layers(model)
        for p in ("gate", "up", "down")
    }
    assert sum(rows.values()) == round(0.2 * sum(of_all.values()))
    assert torch.isfinite(logits(model)).all()
    done = cli("evaluate", tmp_path / "out", "--tokens", ids, "--json")
    assert done.code == 0, done.err


@pytest.mark.parametrize("family", FEW)
def test_routers_are_frozen_byte_for_byte_and_all_else_learns(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    coterie.compress(str(folder), str(tmp_path / "out"), tokens=ids, method="mc-smoe", parameters=SHORT)
    before, after = resident(folder, torch.bfloat16), resident(tmp_path / "out", torch.bfloat16)
    frozen, old = set(router_parameters(before)), dict(before.named_parameters())
    changed = set()
    for name, parameter in after.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, old[name]), name
        elif name in old and not torch.equal(parameter, old[name]):
            changed.add(name.split(".")[-2])
    assert changed


def test_zero_shot_trains_nothing_and_still_drops_rows(tmp_path, ids):
    folder = saved("mixtral", tmp_path, torch.float32)
    coterie.compress(
        str(folder), str(tmp_path / "out"), tokens=ids, method="mc-smoe", parameters={**SHORT, "steps": 0, "rows": 1.0}
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(model), logits(resident(folder)), atol=1e-4, rtol=1e-3)
    coterie.compress(
        str(folder), str(tmp_path / "less"), tokens=ids, method="mc-smoe", parameters={**SHORT, "steps": 0}
    )
    less = each_tensor(tmp_path / "less")
    assert torch.equal(less["model.embed_tokens.weight"], each_tensor(folder)["model.embed_tokens.weight"])
    assert sum(len(t) for k, t in less.items() if "sparse_up" in k and "row" not in k) < 8 * 48 * 3


@pytest.mark.parametrize("family", FEW)
def test_an_expert_map_goes_on_to_the_factored_experts(family, tmp_path, ids):
    folder = saved(family, tmp_path)
    coterie.compress(str(folder), str(tmp_path / "merged"), tokens=ids, method="m-smoe", keep=0.5)
    coterie.compress(str(tmp_path / "merged"), str(tmp_path / "out"), tokens=ids, method="mc-smoe", parameters=SHORT)
    merged, model = resident(tmp_path / "merged"), resident(tmp_path / "out")
    for one, two in zip(moe_layers(merged), moe_layers(model), strict=True):
        assert one.router_size == two.router_size
        assert one.num_experts == two.num_experts
    assert torch.isfinite(logits(model)).all()


def test_the_same_seed_gives_the_same_bytes(tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    for name in ("a", "b"):
        coterie.compress(str(folder), str(tmp_path / name), tokens=ids, method="mc-smoe", parameters=SHORT, seed=3)
    one, two = each_tensor(tmp_path / "a"), each_tensor(tmp_path / "b")
    assert all(torch.equal(one[k], two[k]) for k in one)


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--set", "rank=49"], "above the full rank"),
        (["--set", "rank=0"], "rank"),
        (["--set", "rows=1.5"], "rows"),
        (["--set", "initial=0.6", "--set", "final=0.5"], "no steps"),
        (["--keep", "0.5"], "would be ignored"),
        (["--set", "teacher=/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_is_refused(options, said, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    done = cli("compress", folder, tmp_path / "out", "--tokens", ids, "--method", "mc-smoe", *options)
    assert done.code == 2, done.out + done.err
    assert said in done.err


def test_factored_experts_are_not_factored_again(tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    coterie.compress(str(folder), str(tmp_path / "low"), method="low-rank", parameters={"rank": 8})
    for method, budget in (("mc-smoe", {}), ("low-rank", {}), ("hc-smoe", {"keep": 0.5})):
        with pytest.raises(UsageError, match="factor"):
            coterie.compress(str(tmp_path / "low"), str(tmp_path / "out"), tokens=ids, method=method, **budget)
