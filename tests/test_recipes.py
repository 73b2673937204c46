"""The recipes that ship: each is carried out on a tiny model, with few steps, as a user would."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from coterie.assets import pocket, recipes, write_demo_texts
from families import saved, tokens
from inprocess import cli

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder, _ = write_demo_texts(tmp_path_factory.mktemp("text"))
    return folder / "prose.jsonl"


def shortened(name, folder):
    """The recipe with as few steps as possible; nothing else is changed."""
    recipe = yaml.safe_load(recipes()[name].read_text())
    for step in recipe["steps"]:
        if "heal" in step:
            step["heal"] |= {"steps": 2, "samples": 8, "held_out_samples": 2, "length": 32}
        elif step["method"] == "mc-smoe":
            step["parameters"] |= {"steps": 2, "rank": 4}
        elif step["method"] == "slimmoe":
            step["parameters"] |= {"multiple_of": 4}
    file = folder / f"{name}-short.yaml"
    file.write_text(yaml.safe_dump({**recipe, "samples": 4, "length": 32}))
    return file


def test_five_recipes_ship():
    assert set(recipes()) == {
        "prune-heal",
        "prune-quantize",
        "merge-heal",
        "merge-factorize",
        "slim-heal-slim-heal",
    }


@pytest.mark.parametrize("name", list(recipes()))
@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_a_shipped_recipe_runs_to_a_checkpoint_that_loads(name, family, text, tmp_path):
    folder = saved(family, tmp_path, vocab_size=4096)
    done = cli("compress", folder, tmp_path / "out", "--recipe", shortened(name, tmp_path), "--data", text, "--json")
    assert done.code == 0, done.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        assert torch.isfinite(model(tokens()).logits).all()
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    steps = yaml.safe_load(recipes()[name].read_text())["steps"]
    wanted = ["heal" if "heal" in step else step["method"] for step in steps]
    assert [*(r["recipe"]["method"] for r in record["earlier_steps"]), record["recipe"]["method"]] == wanted
    assert not list(tmp_path.glob("out.step*"))


def test_every_later_teacher_is_the_model_the_recipe_began_with(text, tmp_path):
    folder = saved("mixtral", tmp_path, vocab_size=4096)
    file = shortened("slim-heal-slim-heal", tmp_path)
    assert cli("compress", folder, tmp_path / "out", "--recipe", file, "--data", text, "--json").code == 0
    record = json.loads((tmp_path / "out" / "coterie.json").read_text())
    told = [r["recipe"].get("teacher") or r["recipe"]["parameters"]["teacher"] for r in record["earlier_steps"][1:]]
    assert {*told, record["recipe"]["teacher"]} == {str(folder)}


def test_a_recipe_that_ships_is_found_by_name_and_needs_text(tmp_path):
    done = cli("compress", pocket(), tmp_path / "out", "--recipe", "prune-heal")
    assert done.code == 2
    assert "--data" in done.err
    done = cli("compress", pocket(), tmp_path / "out", "--recipe", "prune-hael")
    assert done.code == 2
    assert "slim-heal-slim-heal" in done.err


def test_text_beside_a_recipe_that_names_its_own_is_refused(text, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(f"data: [{text}]\nsteps: [{{method: reap, budget: {{keep: 0.5}}}}]\n")
    done = cli("compress", pocket(), tmp_path / "out", "--recipe", file, "--data", text)
    assert done.code == 2
    assert "names its text already" in done.err
