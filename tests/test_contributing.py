"""The examples of CONTRIBUTING.md, taken out of the page and run: a method and a statistic in one file each."""

# E experts, H hidden

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.compression import methods
from coterie.errors import UsageError
from coterie.profiling.observers import MeanOutput, SelectionCount
from families import each_tensor, saved, token_file
from inprocess import cli

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"
METHOD, STATISTIC = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def imported(source, name, folder, monkeypatch):
    """A block of the page as a module of its own."""
    file = folder / f"{name}.py"
    file.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # pydantic looks annotations up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """The example, in a register that other tests do not see."""
    monkeypatch.setattr(methods, "_register", methods.methods())
    return imported(METHOD, "ean_ca", tmp_path, monkeypatch)


@pytest.fixture
def ids(tmp_path):
    return token_file(tmp_path / "ids.safetensors")


def test_the_example_is_listed_with_its_parameters(registered):
    entry = methods.methods()["ean-ca"]
    assert entry.cls is registered.EanCa
    assert entry.summary == "Keep the experts with the largest mean output."
    assert [p["name"] for p in entry.parameters()] == ["reduce"]
    shown = cli("methods", "ean-ca", "--json")
    assert shown.code == 0, shown.err
    assert shown.json()[0]["observes"] == ["SelectionCount", "MeanOutput"]
    with pytest.raises(UsageError, match="reduce = 'median'"):
        methods.get_method("ean-ca", {"reduce": "median"})


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_the_examples_score_is_its_definition(registered, reduce, tmp_path, ids):
    folder = saved("qwen3-moe", tmp_path)
    profile = coterie.profile(str(folder), tokens=str(ids), observers=[SelectionCount, MeanOutput])
    for layer in profile.layers.values():
        expected = []
        for expert in range(layer.experts):
            size = layer.output_sum_EH[expert].square().sum().sqrt()
            tokens = int(layer.count_E[expert]) if reduce == "mean" else 1
            expected.append(float(size) / max(tokens, 1))
        found_E = methods.get_method("ean-ca", {"reduce": reduce}).score(layer)
        torch.testing.assert_close(found_E, torch.tensor(expected))


def test_the_example_compresses_a_model_that_plain_transformers_loads(registered, tmp_path, ids):
    folder = saved("mixtral", tmp_path)
    out = tmp_path / "out"
    done = cli("compress", folder, out, "--method", "ean-ca", "--keep", 0.5, "--tokens", ids, "--no-report", "--json")
    assert done.code == 0, done.err
    plan = json.loads((out / "plan.json").read_text())
    for layer in plan["layers"]:
        ranked = sorted(range(layer["experts"]), key=lambda e: -layer["scores"][e])
        assert layer["keep"] == sorted(ranked[: layer["experts"] // 2])
    assert each_tensor(out).keys() < each_tensor(folder).keys()
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(12)[None]).logits).all()


def test_the_example_can_choose_the_experts_of_dern(registered):
    observed = methods.get_method("dern", {"selector": "ean-ca"}).observes()
    assert {SelectionCount, MeanOutput} <= set(observed)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3"])
def test_the_example_statistic_is_its_definition(family, tmp_path, monkeypatch, ids):
    from coterie.experts.forward import observe
    from coterie.streaming.checkpoint import Checkpoint
    from coterie.streaming.lockstep import sweep
    from coterie.streaming.model import StreamedModel
    from coterie.text import load_tokens

    folder = saved(family, tmp_path)
    cls = imported(STATISTIC, "gate_max", tmp_path, monkeypatch).GateMax
    profile = coterie.profile(str(folder), tokens=str(ids), observers=[cls])

    class Tap:
        """Every (expert, weight) that the experts module received."""

        def __init__(self):
            self.seen = []

        def routed(self, x_TH, index_TK, weight_TK):
            self.seen += zip(index_TK.reshape(-1).tolist(), weight_TK.float().reshape(-1).tolist(), strict=True)
            return False

        def expert(self, *rows):
            raise AssertionError("outputs were not asked for")

    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    for step in sweep(streamed, load_tokens(ids).batches):
        if step.index not in streamed.moe:
            step.run()
            continue
        layer, tap = streamed.moe[step.index], Tap()
        with observe(layer.experts, tap):
            step.run()
        largest = [max((w for e, w in tap.seen if e == expert), default=0.0) for expert in range(layer.num_experts)]
        torch.testing.assert_close(profile.layers[step.index].gate_max_E, torch.tensor(largest))
