"""Fine-tuning in two phases: routers alone, then everything."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import coterie
from coterie.anatomy import moe_layers, slice_names
from coterie.errors import UsageError
from coterie.training.trainer import router_parameters
from families import FAMILIES, FEW, each_tensor, resident, saved, tiny, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"batch_size": 4, "rate": 1e-3, "router_rate": 1e-2}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Sequences that count: there is something to learn."""
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": (torch.arange(24)[None] + 7 * torch.arange(16)[:, None]) % 40}, file)
    return file


def changed(before, after):
    one, two = each_tensor(before), each_tensor(after)
    assert one.keys() == two.keys()
    return {name for name in one if not torch.equal(one[name], two[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_found_and_nothing_else(family):
    model = tiny(family)
    names = set(router_parameters(model))
    expected = set()
    for layer in moe_layers(model):
        own = {n for n in slice_names(layer) if not n.startswith(f"{layer.experts_name}.")}
        expected |= own & dict(model.named_parameters()).keys()
        assert any(n.startswith(f"{layer.router_name}.") for n in names)
    assert expected <= names
    assert not any(".experts." in n or "shared" in n or "attn" in n for n in names)


@pytest.mark.parametrize("family", FEW)
def test_in_the_first_phase_only_routers_change(family, ids, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    coterie.finetune(str(source), str(tmp_path / "out"), tokens=str(ids), router_steps=3, steps=0, **SHORT)
    moved = changed(source, tmp_path / "out")
    assert moved
    assert all("gate.weight" in n or "router" in n for n in moved)


@pytest.mark.parametrize("family", FEW)
def test_then_everything_learns_and_the_result_is_a_plain_checkpoint(family, ids, tmp_path):
    source = saved(family, tmp_path)
    done = coterie.finetune(str(source), str(tmp_path / "out"), tokens=str(ids), router_steps=2, steps=8, **SHORT)
    assert done.losses["all"] < done.losses["before"]
    assert {t.dtype for t in each_tensor(tmp_path / "out").values()} == {t.dtype for t in each_tensor(source).values()}
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "out"))
    assert {k: v for k, v in before.items() if after.get(k) != v} == {}
    with torch.no_grad():
        assert torch.isfinite(resident(tmp_path / "out")(tokens()).logits).all()
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_pruned_checkpoint_with_layers_of_different_sizes_learns_too(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    coterie.compress(str(source), str(tmp_path / "small"), method="reap", keep=0.5, exclude_layers="1", tokens=str(ids))
    done = coterie.finetune(
        str(tmp_path / "small"), str(tmp_path / "out"), tokens=str(ids), router_steps=0, steps=8, **SHORT
    )
    assert done.losses["all"] < done.losses["before"]
    assert [layer.num_experts for layer in moe_layers(resident(tmp_path / "out"))] == [4, 8, 4]


def test_uncurl_recovers_through_its_two_phases(ids, tmp_path):
    source = saved("qwen3-moe", tmp_path)
    coterie.compress(str(source), str(tmp_path / "small"), method="uncurl", keep=0.5, tokens=str(ids))
    done = coterie.finetune(
        str(tmp_path / "small"), str(tmp_path / "out"), tokens=str(ids), router_steps=5, steps=10, **SHORT
    )
    assert list(done.losses) == ["before", "routers", "all"]
    assert done.losses["all"] < done.losses["before"]


@pytest.mark.parametrize("router_steps", [10, 0])
def test_a_killed_run_goes_on_and_ends_the_same(router_steps, ids, tmp_path, monkeypatch):
    from coterie.training import finetune as module

    source = saved("qwen3-moe", tmp_path)
    options = {"tokens": str(ids), "router_steps": router_steps, "steps": 30, **SHORT}
    whole = coterie.finetune(str(source), str(tmp_path / "whole"), **options)
    seen: list[tuple[str, int]] = []
    original = module.finetune

    class Killed(Exception):
        pass

    def dying(*arguments, **given):
        def log(phase, step, total, loss):
            seen.append((phase, step))
            if phase == "all" and step == 20 and len(seen) < 60:
                raise Killed

        return original(*arguments, **{**given, "on_log": log})

    monkeypatch.setattr(module, "finetune", dying)
    with pytest.raises(Killed):
        coterie.finetune(str(source), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
    first = len(seen)
    seen += [("", 0)] * 60
    resumed = coterie.finetune(str(source), str(tmp_path / "out"), **options)
    again = [entry for entry in seen[first:] if entry[0]]
    assert again[0][0] == "all"
    assert again[0][1] > 1
    assert math.isclose(resumed.losses["all"], whole.losses["all"], abs_tol=1e-3)


def test_the_command_line(ids, tmp_path):
    source = saved("mixtral", tmp_path)
    short = ("--router-steps", 2, "--steps", 2, "--batch-size", 4)
    done = cli("finetune", source, tmp_path / "out", "--tokens", ids, *short)
    assert done.code == 0, done.err
    assert "loss on held-out text" in done.out
    told = cli("finetune", source, tmp_path / "json", "--tokens", ids, *short, "--json").json()
    record = json.loads((tmp_path / "json" / "coterie.json").read_text())
    assert {k: told[k] for k in record} == record
    done = cli("finetune", source, tmp_path / "none", "--tokens", ids, "--router-steps", 0, "--steps", 0)
    assert done.code == 2
    assert "no steps to train" in done.err
    done = cli("finetune", source, tmp_path / "none")
    assert done.code == 2
    assert "fine-tuning needs text" in done.err


def test_without_text_nothing_starts(tmp_path):
    with pytest.raises(UsageError, match="needs text"):
        coterie.finetune(str(saved("mixtral", tmp_path)), str(tmp_path / "out"))
