"""Comparing methods without writing checkpoints: on the fly must be what the written checkpoint is."""

from __future__ import annotations

import json

import pytest
import torch

import coterie
from coterie.comparison import Entry
from coterie.errors import DataError, UsageError
from coterie.evaluation.bootstrap import interval, stratified
from coterie.streaming.checkpoint import Checkpoint
from coterie.text import held_out
from families import FEW, saved, token_file
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ids")
    calibration = token_file(folder / "calibration.safetensors", padded=True)
    return calibration, token_file(folder / "evaluation.safetensors", rows=3, seed=1, padded=True)


def compared(source, ids, **options):
    asked = {"methods": ["reap", "dern"], "keep": [0.5], "tokens": str(ids[0]), "eval_tokens": str(ids[1]), **options}
    return coterie.compare(str(source), **asked)


@pytest.mark.parametrize("family", FEW)
def test_every_contender_is_what_its_written_checkpoint_is(family, ids, tmp_path):
    source = saved(family, tmp_path)
    methods = ["random:seed=3", "frequency", "reap", "dern"]
    found = compared(source, ids, methods=methods, keep=[0.5, 1.0], out=str(tmp_path / "cmp"))
    for number, contender in enumerate(found.contenders):
        out = tmp_path / f"out-{number}"
        written = coterie.compress(str(source), str(out), plan=contender.plan)
        _, measured = coterie.evaluate([str(source), str(out)], tokens=str(ids[1]))
        assert contender.quality is not None
        assert contender.quality.mean_loss == pytest.approx(measured.mean_loss, abs=1e-6)
        assert contender.quality.mean_kl == pytest.approx(measured.mean_kl, abs=1e-6)
        assert contender.size.describe() == written.after.describe()


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3"])
def test_layers_of_different_sizes_are_compared_too(family, ids, tmp_path):
    source = saved(family, tmp_path)
    (contender,) = compared(source, ids, methods=["reap"], keep=[0.75], scope="global").contenders
    written = coterie.compress(str(source), str(tmp_path / "out"), plan=contender.plan)
    _, measured = coterie.evaluate([str(source), str(tmp_path / "out")], tokens=str(ids[1]))
    assert contender.quality.mean_loss == pytest.approx(measured.mean_loss, abs=1e-6)
    assert contender.size.describe() == written.after.describe()


def test_the_number_of_contenders_costs_no_read(ids, tmp_path, monkeypatch):
    source = saved("qwen3-moe", tmp_path)
    reads: list[str] = []
    original = Checkpoint.read

    def counted(self, key, *rest, **options):
        reads.append(key)
        return original(self, key, *rest, **options)

    monkeypatch.setattr(Checkpoint, "read", counted)
    one = compared(source, ids, methods=["reap"])
    alone = len(reads)
    reads.clear()
    many = compared(source, ids, methods=["reap", "dern", "ean", "frequency", "random"], keep=[0.75, 0.5, 0.25])
    assert len(many.ran) == 15
    assert len(reads) == alone
    assert many.sweeps == one.sweeps == 2
    assert many.bytes_read == one.bytes_read
    layers = [key for key in reads if ".layers." in key]
    assert all(layers.count(key) == 2 for key in layers)


def test_the_original_is_untouched_by_contenders_that_recombine(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    alone = coterie.evaluate([str(source)], tokens=str(ids[1]))[0]
    found = compared(source, ids, methods=["dern", "reap"], keep=[0.5, 1.0])
    assert found.original.mean_loss == alone.mean_loss
    whole = next(c for c in found.contenders if c.budget == "1" and c.method == "reap")
    assert whole.quality.mean_loss == alone.mean_loss
    assert whole.delta.mean == whole.delta.low == whole.delta.high == 0


def test_budgets_no_router_can_work_with_are_told_not_raised(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    found = compared(source, ids, methods=["reap"], keep=[0.5, 0.1])
    assert [bool(c.refused) for c in found.contenders] == [False, True]
    assert "the router picks 2 per token" in found.contenders[1].refused
    with pytest.raises(UsageError, match=r"nothing to compare: reap 0\.1: cannot keep 1 of 8"):
        compared(source, ids, methods=["reap"], keep=[0.1])


def test_pareto_and_behind_follow_from_the_losses(ids, tmp_path):
    found = compared(saved("qwen3-moe", tmp_path), ids, methods=["reap", "random", "ean"], keep=[0.75, 0.5])
    for budget in ("0.75", "0.5"):
        here = [c for c in found.ran if c.budget == budget]
        best = min(here, key=lambda c: c.delta.mean)
        assert best.behind.mean == 0
        for c in here:
            assert c.behind.mean == pytest.approx(c.delta.mean - best.delta.mean, abs=1e-9)
            assert c.behind.low <= c.behind.mean <= c.behind.high
            smaller = [o for o in found.ran if o.size.bytes <= c.size.bytes and o.delta.mean < c.delta.mean]
            assert c.pareto == (not smaller)


@pytest.mark.parametrize("options", [(), ("--domains",)])
def test_the_command_line(options, ids, tmp_path):
    source = saved("qwen3-moe", tmp_path)
    given = ("--tokens", ids[0], "--eval-tokens", ids[1], "--methods", "reap,random", "--keep", "0.75,0.5", *options)
    done = cli("compare", source, *given, "--methods", "dern:alpha=0.3,selector=frequency", "--out", tmp_path / "cmp")
    assert done.code == 0, done.err
    for text in ("original", "reap 0.75", "random 0.5", "dern:alpha=0.3", "2 sweeps", "6 contenders"):
        assert text in done.out + done.err
    assert ("rise of the loss in each domain" in done.out) == bool(options)
    entry = json.loads((tmp_path / "cmp" / "comparison.json").read_text())
    assert entry == cli("compare", source, *given, "--methods", "dern:alpha=0.3,selector=frequency", "--json").json()
    plans = sorted(p.name for p in (tmp_path / "cmp").glob("plan-*.json"))
    assert len(plans) == 6
    assert cli("compress", source, tmp_path / "out", "--plan", tmp_path / "cmp" / "plan-reap-0.5.json").code == 0


WRONG = {
    "no budget": ((), ["--keep 0.75,0.5,0.25"]),
    "budget text": (("--keep", "half"), ["cannot read --keep 'half'"]),
    "budget": (("--keep", "0.5,1.5"), ["--keep 1.5"]),
    "method": (("--keep", "0.5", "--methods", "reep"), ["no method 'reep'", "reap"]),
    "parameter": (("--keep", "0.5", "--methods", "dern:alfa=1"), ["no parameter 'alfa'", "alpha"]),
    "parameter text": (("--keep", "0.5", "--methods", "dern:alpha"), ["cannot read the method 'dern:alpha'"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_requests_say_what_to_do(wrong, ids, tmp_path):
    options, says = WRONG[wrong]
    given = () if "--methods" in options else ("--methods", "reap")
    done = cli("compare", saved("qwen3-moe", tmp_path), "--tokens", ids[0], *given, *options)
    assert done.code == 2
    assert all(text in done.err for text in says), done.err


def test_held_out_samples_share_no_sequence():
    from coterie.streaming.lockstep import Batch
    from coterie.text import TokenData

    ids = torch.arange(60).view(10, 6)
    domain = torch.tensor([0, 0, 0, 1, 1, 1, 1, 0, 0, 1])
    batches = [Batch(ids[:4], None, domain[:4]), Batch(ids[4:], None, domain[4:])]
    data = TokenData(batches, ["a", "b"], "digest", {"a": 30, "b": 30})
    first, second = held_out(data, 2)
    rows = [torch.cat([b.ids_BL for b in side.batches])[:, 0].tolist() for side in (first, second)]
    assert not set(rows[0]) & set(rows[1])
    assert sorted(rows[0] + rows[1]) == list(range(0, 60, 6))
    assert first.tokens == {"a": 12, "b": 12}
    assert second.tokens == {"a": 18, "b": 18}
    with pytest.raises(DataError, match="'a' gives 5 samples"):
        held_out(data, 5)


def test_a_single_stratum_is_an_interval():
    sums, tokens = torch.rand(20), torch.randint(1, 9, (20,))
    assert stratified([(sums, tokens)]) == interval(sums, tokens)


def test_a_method_with_parameters_is_read():
    assert Entry.parse("dern:alpha=0.3, selector=reap") == Entry("dern", {"alpha": 0.3, "selector": "reap"})
    assert Entry.parse("reap").label == "reap"


# -- merged, factored and finished contenders --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("hc-smoe", {}),
        ("hc-smoe", {"router": "reduced"}),
        ("m-smoe", {}),
        ("sub-moe", {"rank": 8, "window": 1}),
        ("low-rank", {"rank": 8}),
    ],
)
def test_a_merged_or_factored_contender_is_the_checkpoint_that_compress_writes(family, method, parameters, tmp_path):
    ids, held = token_file(tmp_path / "ids.safetensors"), token_file(tmp_path / "held.safetensors", seed=1)
    folder = saved(family, tmp_path, torch.float32)
    budget = {} if method == "low-rank" else {"keep": 0.5}
    coterie.compress(
        str(folder), str(tmp_path / "out"), tokens=str(ids), method=method, parameters=parameters, **budget
    )
    told = ",".join(f"{k}={v}" for k, v in parameters.items())
    found = coterie.compare(
        str(folder),
        methods=[f"{method}:{told}" if told else method],
        checkpoints=[str(tmp_path / "out")],
        keep=[0.5] if budget else [],
        tokens=str(ids),
        eval_tokens=str(held),
    )
    planned, finished = found.contenders
    assert finished.method == "checkpoint"
    assert planned.size.describe() == finished.size.describe()
    assert planned.quality.mean_loss == pytest.approx(finished.quality.mean_loss, abs=2e-4)
    assert found.sweeps == 3


def test_a_checkpoint_with_another_vocabulary_cannot_stand_beside(tmp_path):
    folder = saved("mixtral", tmp_path)
    other = saved("qwen3-moe", tmp_path, vocab_size=500)
    ids = token_file(tmp_path / "ids.safetensors")
    done = cli("compare", folder, "--checkpoint", other, "--tokens", ids, "--methods", "reap", "--keep", 0.5)
    assert done.code == 2
    assert "500 tokens" in done.err


def test_methods_that_train_say_how_to_be_compared(tmp_path):
    folder, ids = saved("mixtral", tmp_path), token_file(tmp_path / "ids.safetensors")
    for method in ("mc-smoe", "otp", "slimmoe:width=0.5", "wanda:sparsity=0.5"):
        done = cli("compare", folder, "--methods", method, "--tokens", ids)
        assert done.code == 2
        assert "--checkpoint" in done.err
