"""Zeroing weights: which of them, layer after layer on pruned inputs; what is counted; kills; the command line."""

from __future__ import annotations

import itertools
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers
from coterie.compression.methods import get_method, methods
from coterie.compression.sparsify import sparse_bytes
from coterie.errors import CheckpointError, UsageError
from coterie.experts.forward import inner_activation
from families import FEW, each_tensor, edit_json, resident, saved, tiny, token_file, tokens
from inprocess import cli, fingerprint, start

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("magnitude", "wanda", "owl")


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("ids") / "ids.safetensors", padded=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("models")

    def model(family):
        if family not in made:
            made[family] = saved(family, folder)
        return made[family]

    return model


def sparsified(source, out, ids, method="wanda", **parameters):
    given = {} if method == "magnitude" else {"tokens": str(ids)}
    return coterie.compress(str(source), str(out), method=method, parameters=parameters, **given)


def matrices(model):
    """{name: [..., O, I] weights} of all that may be pruned, found by names alone."""
    found = {}
    for name, tensor in model.state_dict().items():
        inside = ".layers." in name and not any(part in name for part in ("norm", "router", "gate.weight", "bias"))
        if inside and tensor.dim() == 3:
            transposed = model.get_submodule(name.rpartition(".")[0]).is_transposed
            found[name] = tensor.mT if transposed else tensor
        elif inside and tensor.dim() == 2 and "shared_expert_gate" not in name:
            found[name] = tensor
    return found


def zeros_of(folder):
    return {name: weight == 0 for name, weight in matrices(AutoModelForCausalLM.from_pretrained(folder)).items()}


# -- what is zeroed ---------------------------------------------------------------------------------------------------


def wanda_by_hand(model, ids_BL, mask_BL, share):
    """Plain Wanda on a resident model: layer after layer, everything that a layer's matrices receive kept whole."""
    prefix = "model.layers"
    real_T = mask_BL.reshape(-1)
    for number, layer in enumerate(model.model.layers):
        inputs: dict[str, torch.Tensor] = {}
        routed: list[Any] = []
        hooks = []
        for path, module in layer.named_modules():
            if isinstance(module, nn.Linear):

                def keep(m, args, name=f"{prefix}.{number}.{path}.weight", inputs=inputs):
                    inputs[name] = args[0].reshape(-1, args[0].shape[-1])

                hooks.append(module.register_forward_pre_hook(keep))
        moe = next((m for m in moe_layers(model) if m.index == number), None)
        if moe is not None:
            hooks.append(moe.experts.register_forward_pre_hook(lambda m, args, routed=routed: routed.append(args)))
        with torch.no_grad():
            model(ids_BL, attention_mask=mask_BL.long(), use_cache=False)
        for hook in hooks:
            hook.remove()
        found = {n: w for n, w in matrices(model).items() if n.startswith(f"{prefix}.{number}.")}
        live = dict(model.named_parameters())
        with torch.no_grad():
            for name, weight in found.items():
                if weight.dim() == 2:
                    prune_by_hand(live[name], inputs[name][real_T], share)
            if moe is None:
                continue
            x_TH, index_TK, _ = routed[0]
            for expert in range(moe.num_experts):
                x_RH = x_TH[real_T & (index_TK == expert).any(1)]
                inner_RI = inner_activation(moe.experts, expert, x_RH) if len(x_RH) else x_RH[:, :0]
                for name, x in (("gate_up_proj", x_RH), ("down_proj", inner_RI)):
                    weight = live[f"{prefix}.{number}.mlp.experts.{name}"][expert]
                    prune_by_hand(weight.T if moe.experts.is_transposed else weight, x, share)
    return model


def prune_by_hand(weight_OI, x_TI, share):
    size = x_TI.double().square().mean(0).sqrt() if len(x_TI) else torch.ones(weight_OI.shape[1])
    for row in weight_OI:
        order = sorted(range(len(row)), key=lambda i: float(row[i].abs() * size[i]))
        for i in order[: math.floor(share * len(row))]:
            row[i] = 0.0


@pytest.mark.parametrize("family", FEW)
def test_wanda_is_the_paper_by_hand(family, models, ids, tmp_path):
    from safetensors.torch import load_file

    source = models(family)
    given = load_file(ids)
    sparsified(source, tmp_path / "out", ids, sparsity=0.4)
    model = wanda_by_hand(resident(source), given["input_ids"], given["attention_mask"].bool(), 0.4)
    expected = {name: weight == 0 for name, weight in matrices(model).items()}
    found = zeros_of(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, zero in expected.items():  # two importances closer than rounding may change places
        assert float((found[name] != zero).double().mean()) < 2e-3, name


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("family", FEW)
def test_every_row_has_its_share_of_zeros_and_nothing_else_changes(family, method, models, ids, tmp_path):
    source = models(family)
    result = sparsified(source, tmp_path / "out", ids, method, sparsity=0.3)
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    pruned = zeros_of(tmp_path / "out")
    counted = 0
    for name, tensor in after.items():
        if name not in pruned:
            assert torch.equal(tensor, before[name]), name
            continue
        assert torch.equal(tensor[tensor != 0], before[name][tensor != 0]), name
        share = result.figures[int(name.split(".layers.")[1].split(".")[0])]["share"]
        zero = pruned[name]
        assert bool((zero.sum(-1) == math.floor(share * zero.shape[-1] + 1e-9)).all()), name
        counted += int(zero.sum())
    summary = result.record["sparsity"]
    assert summary["zeros"] == counted
    assert summary["weights"] == sum(zero.numel() for zero in pruned.values())
    assert summary["measured"] == counted / summary["weights"]
    assert sum(kind["zeros"] for kind in summary["by_kind"].values()) == counted
    weights = {index: f["weights"] for index, f in result.figures.items()}
    mean = sum(weights[i] * f["share"] for i, f in result.figures.items()) / sum(weights.values())
    assert mean == pytest.approx(0.3, abs=1e-9)
    assert 0.3 - 1 / 16 < summary["measured"] <= 0.3 + 1e-9


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("family", FEW)
def test_zeroing_nothing_changes_nothing(family, method, models, ids, tmp_path):
    sparsified(models(family), tmp_path / "out", ids, method, sparsity=0.0)
    before, after = each_tensor(models(family)), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].view(torch.uint8), after[k].view(torch.uint8)) for k in before)


@pytest.mark.parametrize("family", FEW)
def test_owl_without_lambda_is_wanda_and_with_it_is_not(family, models, ids, tmp_path):
    source = models(family)
    sparsified(source, tmp_path / "wanda", ids, sparsity=0.4)
    flat = sparsified(source, tmp_path / "flat", ids, "owl", sparsity=0.4, lam=0.0)
    owl = sparsified(source, tmp_path / "owl", ids, "owl", sparsity=0.4)
    wanda, same, other = (each_tensor(tmp_path / name) for name in ("wanda", "flat", "owl"))
    assert all(torch.equal(wanda[key], same[key]) for key in wanda)
    assert not all(torch.equal(wanda[key], other[key]) for key in wanda)
    assert flat.sweeps == owl.sweeps == 2
    shares = [f["share"] for f in owl.figures.values()]
    assert max(shares) - min(shares) == pytest.approx(2 * 0.08)
    ratios = {i: f["outlier_ratio"] for i, f in owl.figures.items()}
    assert min(ratios, key=ratios.get) == max(owl.figures, key=lambda i: owl.figures[i]["share"])


@settings(max_examples=80, deadline=None, derandomize=True)
@drawn(
    share=st.floats(0.0, 0.95),
    lam=st.floats(0.0, 0.5),
    layers=st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 50)), min_size=1, max_size=12),
)
def test_owl_shares_have_the_mean_that_was_asked_for(share, lam, layers):
    weights = {i: w for i, (w, _) in enumerate(layers)}
    ratios = {i: r for i, (_, r) in enumerate(layers)}
    found = get_method("owl", {"sparsity": share, "lam": lam}).layer_shares(share, weights, ratios)
    mean = sum(weights[i] * found[i] for i in weights) / sum(weights.values())
    assert mean == pytest.approx(share, abs=1e-6)
    assert all(0 <= s < 1 for s in found.values())
    ordered = sorted(found, key=lambda i: ratios[i])
    assert all(found[a] >= found[b] - 1e-9 for a, b in itertools.pairwise(ordered))


def test_owl_shares_are_the_papers_where_layers_are_equal():
    found = get_method("owl", {"lam": 0.1}).layer_shares(0.6, dict.fromkeys(range(3), 5), {0: 1.0, 1: 2.0, 2: 5.0})
    # r = 0, 0.05, 0.2, mean 0.0833; s = 1 - (r - mean + 0.4)
    assert [found[i] for i in range(3)] == pytest.approx([0.68333, 0.63333, 0.48333], abs=1e-5)


def test_outlier_ratio_pools_all_matrices():
    parts = [torch.ones(2, 10), torch.full((1, 10), 1.0)]
    parts[1][0, 0] = 100.0  # mean 129 / 30 = 4.3, limit 12.9
    assert get_method("owl").outlier_ratio(lambda: parts) == pytest.approx(100 / 30)
    assert get_method("owl", {"multiple": 30.0}).outlier_ratio(lambda: parts) == 0.0


@pytest.mark.parametrize(("pattern", "n", "m"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_a_pattern_keeps_n_of_every_m_neighbours(pattern, n, m, models, ids, tmp_path):
    result = sparsified(models("mixtral"), tmp_path / "out", ids, pattern=pattern)
    for name, zero in zeros_of(tmp_path / "out").items():
        assert bool((zero.reshape(*zero.shape[:-1], -1, m).sum(-1) == m - n).all()), name
    assert result.record["sparsity"]["measured"] == 1 - n / m


def test_ties_are_broken_from_the_left():
    method = get_method("magnitude")
    assert method.dropped(torch.zeros(1, 4), 0.5).tolist() == [[True, True, False, False]]
    assert int(method.dropped(torch.rand(1, 100), 0.29).sum()) == 29  # not 28, whatever 0.29 * 100 is


@pytest.mark.parametrize("batch_size", [1, 2])
def test_padding_and_batches_change_nothing(batch_size, models, ids, tmp_path):
    source = models("deepseek-v3")
    sparsified(source, tmp_path / "a", ids, sparsity=0.4)
    given = {"parameters": {"sparsity": 0.4}, "tokens": str(ids), "batch_size": batch_size}
    coterie.compress(str(source), str(tmp_path / "b"), method="wanda", **given)
    a, b = zeros_of(tmp_path / "a"), zeros_of(tmp_path / "b")
    differ = sum(int((a[name] != b[name]).sum()) for name in a)
    assert differ < 1e-3 * sum(zero.numel() for zero in a.values())


def test_an_expert_no_token_reaches_is_pruned_by_magnitude_and_told(ids, tmp_path):
    model = tiny("gpt-oss")
    with torch.no_grad():
        for layer in moe_layers(model):
            layer.router.bias[5] = -1e4
    model.save_pretrained(tmp_path / "model")
    wanda = sparsified(tmp_path / "model", tmp_path / "wanda", ids, sparsity=0.5)
    sparsified(tmp_path / "model", tmp_path / "magnitude", ids, "magnitude", sparsity=0.5)
    assert wanda.record["sparsity"]["unreached_experts"] >= 3
    assert "received no calibration token" in wanda.warnings[0]
    one, two = zeros_of(tmp_path / "wanda"), zeros_of(tmp_path / "magnitude")
    for name in (n for n in one if "experts" in n):
        assert torch.equal(one[name][5], two[name][5])
    used = sum(int((one[n] != two[n]).sum()) for n in one)
    assert used > 0


def test_magnitude_runs_no_text(models, tmp_path, monkeypatch):
    from coterie.streaming import lockstep

    monkeypatch.setattr(lockstep.Step, "run", lambda *given, **options: pytest.fail("a token passed"))
    result = sparsified(models("mixtral"), tmp_path / "out", None, "magnitude", sparsity=0.5)
    assert result.sweeps == 1
    assert result.record["tokens"] == {}


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_size_is_told_honestly_and_kurtosis_falls(family, models, ids, tmp_path):
    source = models(family)
    result = sparsified(source, tmp_path / "out", ids, sparsity=0.5)
    summary = result.record["sparsity"]
    tensors = each_tensor(tmp_path / "out")
    assert summary["bytes_dense"] == sum(t.nbytes for t in tensors.values()) == result.before.bytes
    pruned = {k for k, t in tensors.items() if int((t == 0).sum()) > 0.2 * t.numel() and t.dim() > 1}
    expected = sum(
        t.nbytes if k not in pruned else int((t != 0).sum()) * 2 + t.numel() // 8 for k, t in tensors.items()
    )
    assert summary["bytes_if_stored_sparse"] == expected < summary["bytes_dense"]
    assert summary["kurtosis_before"] == pytest.approx(3, abs=0.3)
    assert summary["kurtosis_after"] < summary["kurtosis_before"] - 0.5
    assert sparse_bytes(9, 4, 2) == 2 + 10


# -- total sparsity ---------------------------------------------------------------------------------------------------


def counted(folder):
    """(nonzero, all) weights that may be pruned."""
    found = matrices(AutoModelForCausalLM.from_pretrained(folder)).values()
    return sum(int((w != 0).sum()) for w in found), sum(w.numel() for w in found)


@pytest.mark.parametrize("scope", ["uniform", "global"])
@pytest.mark.parametrize("family", FEW)
def test_total_sparsity_counts_the_experts_that_went_before(family, scope, models, ids, tmp_path):
    source = models(family)
    coterie.compress(str(source), str(tmp_path / "kept"), method="stun", keep=0.75, scope=scope)
    result = sparsified(tmp_path / "kept", tmp_path / "out", ids, "owl", total=0.6)
    _, everything = counted(source)
    left, present = counted(tmp_path / "out")
    summary = result.record["sparsity"]
    assert summary["weights_removed_before"] == everything - present
    assert summary["measured_total"] == pytest.approx(1 - left / everything)
    removed = 1 - present / everything
    assert summary["requested"] == pytest.approx((0.6 - removed) / (1 - removed))
    assert 0.6 - 1 / 16 < summary["measured_total"] <= 0.6 + 1e-9


RECIPE = """
steps:
  - method: stun
    budget: {keep: 0.75, scope: global}
  - method: frequency
    budget: {keep: 0.7, scope: global}
  - method: owl
    parameters: {total: 0.7}
"""


def test_a_recipe_of_three_steps_counts_from_the_first(models, ids, tmp_path):
    source = models("mixtral")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    done = cli("compress", source, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml", "--tokens", ids)
    assert done.code == 0, done.err
    record = json.loads((tmp_path / "out/coterie.json").read_text())
    assert [step["recipe"]["method"] for step in record["earlier_steps"]] == ["stun", "frequency"]
    _, everything = counted(source)
    left, present = counted(tmp_path / "out")
    assert record["sparsity"]["weights_removed_before"] == everything - present
    assert record["sparsity"]["measured_total"] == pytest.approx(1 - left / everything)
    assert record["sparsity"]["requested_total"] == 0.7


def test_weights_that_were_zeroed_before_stay_zero_when_experts_go_and_when_more_is_zeroed(models, ids, tmp_path):
    source = models("mixtral")
    sparsified(source, tmp_path / "first", ids, sparsity=0.3)
    again = sparsified(tmp_path / "first", tmp_path / "more", ids, total=0.5)
    first, more = zeros_of(tmp_path / "first"), zeros_of(tmp_path / "more")
    assert all(bool((more[name] | ~first[name]).all()) for name in first)
    assert again.record["sparsity"]["measured_total"] == pytest.approx(0.5, abs=1 / 16)
    coterie.compress(str(tmp_path / "first"), str(tmp_path / "fewer"), method="stun", keep=0.5)
    left, present = counted(tmp_path / "fewer")
    assert 1 - left / present == pytest.approx(0.3, abs=1 / 16)


# -- kills ------------------------------------------------------------------------------------------------------------

KILLED = 9


def run_and_die_behind_line(arguments: tuple[str, ...], lines: int, report: str = "") -> None:
    """Dies behind that many new lines of the journal; with -1 it ends, and tells its steps and the layers it read."""
    from coterie.streaming.checkpoint import Checkpoint
    from coterie.streaming.writer import Workspace

    record, written = Workspace.record, 0
    steps: list[Any] = []
    keys: list[str] = []
    read = Checkpoint.read

    def watched_read(self: Checkpoint, key: str, *rest: Any, **options: Any) -> Any:
        keys.append(key)
        return read(self, key, *rest, **options)

    Checkpoint.read = watched_read  # type: ignore[method-assign]

    def record_and_die(self: Workspace, step: dict[str, Any]) -> None:
        nonlocal written
        record(self, step)
        written += 1
        steps.append(("watched", step["watched"]) if "watched" in step else ("layer", step["layer"]))
        if written == lines:
            os._exit(KILLED)

    Workspace.record = record_and_die  # type: ignore[method-assign]
    code = cli(*arguments).code
    if report:
        layers = {int(key.split(".layers.")[1].split(".")[0]) for key in keys if ".layers." in key}
        Path(report).write_text(json.dumps({"steps": steps, "layers": sorted(layers)}))
    os._exit(code)


def ended(*given: Any) -> int:
    process = start(run_and_die_behind_line, *given)
    process.join(120)
    assert process.exitcode is not None
    return int(process.exitcode)


KILLS = [("qwen3-moe", "magnitude", (2,)), ("qwen3-moe", "wanda", (1, 3)), ("deepseek-v3", "owl", (2, 3, 5))]


@pytest.mark.parametrize(("family", "method", "moments"), KILLS)
def test_a_kill_behind_a_layer_changes_no_byte_and_costs_no_earlier_layer(
    family, method, moments, models, ids, tmp_path
):
    options = () if method == "magnitude" else ("--tokens", ids)
    options = (*options, "--method", method, "--set", "sparsity=0.4", "--no-report", "--shard-size", "200kB")

    def arguments(out: Path) -> tuple[str, ...]:
        return tuple(map(str, ("compress", models(family), out, *options)))

    assert ended(arguments(tmp_path / "plain"), -1) == 0
    plain = fingerprint(tmp_path / "plain")
    for lines in moments:
        out = tmp_path / f"out-{lines}"
        assert ended(arguments(out), lines) == KILLED
        assert not out.exists()
        journal = [json.loads(x) for x in (tmp_path / f"out-{lines}.partial/journal.jsonl").read_text().splitlines()]
        steps = [
            ("watched" if "watched" in line else "layer", line.get("watched", line.get("layer"))) for line in journal
        ]
        order = [("watched", i) for i in range(3)] if method == "owl" else []
        assert steps == [*order, *(("layer", i) for i in range(3))][:lines]
        again = method != "magnitude" and lines != len(order)  # a sweep that is not over runs its last layer again
        passed = lines - again
        report = tmp_path / f"report-{lines}"
        assert ended(arguments(out), -1, str(report)) == 0
        assert fingerprint(out) == plain
        told = json.loads(report.read_text())
        expected = [*order, *(("layer", i) for i in range(3))][passed:]
        assert told["steps"] == [list(step) for step in expected]
        assert told["layers"] == sorted({index for _, index in expected})


def test_a_run_killed_after_every_line_still_ends(models, ids, tmp_path):
    given = ("compress", models("mixtral"), tmp_path / "out", "--tokens", ids, "--method", "owl", "--no-report")
    given = tuple(map(str, (*given, "--set", "sparsity=0.4")))
    for _ in range(8):
        code = ended(given, 2)
        if code == 0:
            break
        assert code == KILLED
    assert code == 0 or ended(given, -1) == 0
    sparsified(models("mixtral"), tmp_path / "plain", ids, "owl", sparsity=0.4)
    one, two = each_tensor(tmp_path / "out"), each_tensor(tmp_path / "plain")
    assert all(torch.equal(one[key], two[key]) for key in two)


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(models, ids, tmp_path):
    source = models("qwen3-moe")
    given = ("--tokens", ids, "--method", "owl", "--set", "sparsity=0.4")
    done = cli("compress", source, tmp_path / "out", *given)
    assert done.code == 0, done.err
    assert "sparsity 3" in done.out + done.err
    assert "2 sweeps" in done.out + done.err
    assert (tmp_path / "out/report.html").is_file()
    assert "zeroed" in (tmp_path / "out/README.md").read_text()
    ahead = cli("compress", source, tmp_path / "ahead", *given, "--dry-run", "--json").json()
    assert ahead["sweeps"] == 2
    assert not (tmp_path / "ahead").exists()
    record = cli("compress", source, tmp_path / "json", *given, "--json").json()
    assert record["sparsity"]["requested"] == 0.4
    with torch.no_grad():
        assert torch.isfinite(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens()).logits).all()
    assert {n for n, e in methods().items() if e.kind == "sparsifying"} == set(NAMES)
    assert "pattern" in cli("methods", "wanda").out


WRONG: dict[str, tuple[tuple[Any, ...], list[str]]] = {
    "nothing said": ((), ["nothing says how many weights to zero", "sparsity=0.5"]),
    "all": (("--set", "sparsity=1.0"), ["wanda: sparsity = 1.0"]),
    "said twice": (("--set", "sparsity=0.5", "--set", "total=0.5"), ["two things say"]),
    "pattern": (("--set", "pattern=diagonal"), ["wanda: pattern = 'diagonal'", "as 2:4"]),
    "pattern order": (("--set", "pattern=4:2"), ["wanda: pattern =", "as 2:4"]),
    "pattern and share": (("--set", "pattern=2:4", "--set", "sparsity=0.3"), ["zeroes 0.5 of the weights", "0.3"]),
    "pattern and total": (("--set", "pattern=2:4", "--set", "total=0.6"), ["zeroes 0.5 of the weights", "total=0.6"]),
    "pattern and width": (("--set", "pattern=2:5"), ["has 64 inputs, no multiple of 5", "pattern=row"]),
    "owl and pattern": (("--method", "owl", "--set", "pattern=2:4"), ["owl gives every layer its own share"]),
    "budget": (("--set", "sparsity=0.5", "--keep", 0.5), ["removes no expert: --keep would be ignored"]),
    "scope": (("--set", "sparsity=0.5", "--scope", "global"), ["--scope would be ignored"]),
    "propagate": (("--set", "sparsity=0.5", "--propagate"), ["--propagate would be ignored"]),
    "no record": (("--set", "total=0.5"), ["has no coterie.json that accounts for its size", "sparsity="]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_requests_say_what_to_do(wrong, models, ids, tmp_path):
    options, says = WRONG[wrong]
    method = () if "--method" in options else ("--method", "wanda")
    done = cli("compress", models("mixtral"), tmp_path / "out", "--tokens", ids, *method, *options)
    assert done.code == 2, done.err
    told = " ".join(done.err.split())
    assert all(text in told for text in says), done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_text_is_asked_for(models, tmp_path):
    done = cli("compress", models("mixtral"), tmp_path / "out", "--method", "wanda", "--set", "sparsity=0.5")
    assert done.code == 2
    assert "no text was given" in done.err


def test_a_total_below_what_went_before_is_refused_with_the_share(models, ids, tmp_path):
    coterie.compress(str(models("mixtral")), str(tmp_path / "kept"), method="stun", keep=0.5)
    with pytest.raises(UsageError, match=r"total=0.3 is less than the 0\.4\d\d of the weights"):
        sparsified(tmp_path / "kept", tmp_path / "out", ids, total=0.3)


@pytest.mark.parametrize("change", ["parameters", "unknown step", "not there"])
def test_a_record_that_does_not_account_for_the_size_is_refused(change, models, ids, tmp_path):
    coterie.compress(str(models("mixtral")), str(tmp_path / "kept"), method="stun", keep=0.5)
    file = tmp_path / "kept/coterie.json"
    if change == "parameters":
        edit_json(file, lambda record: record["before"].update(parameters=10**9))
    elif change == "unknown step":
        edit_json(file, lambda record: record.update(earlier_steps=[{"padded": {}}]))
    else:
        file.unlink()
    with pytest.raises(UsageError, match=r"has no coterie.json that accounts for its size"):
        sparsified(tmp_path / "kept", tmp_path / "out", ids, total=0.9)


def test_a_damaged_record_is_told_before_anything_is_done(models, ids, tmp_path):
    coterie.compress(str(models("mixtral")), str(tmp_path / "kept"), method="stun", keep=0.5)
    (tmp_path / "kept/coterie.json").write_text("{")
    for method, given in (("wanda", {"parameters": {"sparsity": 0.5}}), ("reap", {"keep": 1.0})):
        with pytest.raises(CheckpointError, match=r"coterie.json is damaged"):
            coterie.compress(str(tmp_path / "kept"), str(tmp_path / "out"), method=method, tokens=str(ids), **given)
        assert not (tmp_path / "out.partial").exists()


def test_where_experts_are_to_be_chosen_it_is_refused(models, ids, tmp_path):
    source = models("mixtral")
    done = cli("compare", source, "--tokens", ids, "--eval-tokens", ids, "--methods", "reap,wanda", "--keep", 0.5)
    assert done.code == 2
    assert "wanda cannot be compared on the fly: it zeroes weights layer after layer" in done.err
    coterie.profile(str(source), tokens=str(ids), methods=["reap"], out=str(tmp_path / "profile"))
    done = cli(
        "plan", source, "--profile", tmp_path / "profile", "--out", tmp_path / "p", "--method", "wanda", "--keep", 0.5
    )
    assert done.code == 2
    assert "zeroes weights inside experts and removes none" in done.err
    sparsified(source, tmp_path / "out", ids, sparsity=0.5)
    done = cli("compress", source, tmp_path / "again", "--plan", tmp_path / "out/plan.json")
    assert done.code == 2
    assert "--plan would be ignored" in done.err
