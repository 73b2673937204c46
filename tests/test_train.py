"""`coterie train` and `coterie race`: schedules, controllers, resuming, and what must be refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from coterie import api
from coterie.anatomy.routers import placed_routers
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM
from coterie.assets import trainings, write_demo_texts
from coterie.balancing.base import Balance
from coterie.balancing.controllers import Bias, BiasSettings
from coterie.errors import CoterieError, DataError, ModelError, OutputError, UsageError
from coterie.routing.record import listening
from coterie.training import train as train_module
from coterie.training.dials import Dial, Turning
from coterie.training.flops import forward_flops
from coterie.training.pretrain import Load
from coterie.training.stream import Order, Windows, tokenized
from inprocess import cli


def run(*args: str) -> str:
    done = cli(*args)
    assert done.code == 0, done.err
    return done.out


MODEL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "router": {"kind": "sigmoid", "top_k": 2},
}
TRAINING: dict[str, Any] = {"steps": 6, "batch_size": 2, "length": 32, "evaluate_samples": 1, "evaluate_every": 0.5}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    calibration, evaluation = write_demo_texts(tmp_path_factory.mktemp("text"))
    return str(calibration / "prose.jsonl"), str(evaluation / "prose.jsonl")


def config(text: tuple[str, str], **changes: Any) -> dict[str, Any]:
    told = {"model": MODEL, "data": [text[0]], "evaluate": [text[1]], "training": TRAINING}
    return {**told, "controllers": [{"u": 0.01}], **changes}


# -- dials -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "middle"), [("linear", 12.0), ("cosine", 16 - 8 * 2**-0.5), ("saturating", 16 - 8 * 0.99**150)]
)
def test_schedules_of_smoe_dropout_have_their_closed_form(kind: Any, middle: float) -> None:
    dial = Dial(what="router.top_k", kind=kind, first=8, last=16)
    assert dial.at(0, 300) == 8
    assert dial.at(150, 300) == pytest.approx(middle)
    assert dial.at(300, 300) == pytest.approx(16, abs=0.4)


def test_schedules_of_evomoe_have_their_closed_form() -> None:
    linear = Dial(what="router.temperature", first=2.0, last=0.3, until=0.5)
    exponential = Dial(what="router.temperature", kind="exponential", first=2.0, last=0.3, until=0.5)
    for step in (0, 25, 50, 80):
        n = min(step, 50)
        assert linear.at(step, 100) == pytest.approx(2.0 - n * 1.7 / 50)
        assert exponential.at(step, 100) == pytest.approx(2.0 * (0.3 / 2.0) ** (n / 50))


def test_a_schedule_of_steps_ends_on_its_last_value() -> None:
    dial = Dial(what="router.top_k", kind="steps", values=[1, 2, 4])
    assert [dial.at(step, 9) for step in (0, 2, 3, 6, 9)] == [1, 1, 2, 4, 4]


@given(st.integers(0, 400), st.integers(0, 400), st.sampled_from(["linear", "cosine", "exponential", "saturating"]))
def test_rising_schedules_never_fall(a: int, b: int, kind: Any) -> None:
    dial = Dial(what="router.top_k", kind=kind, first=1, last=9)
    low, high = sorted((a, b))
    assert dial.at(low, 400) <= dial.at(high, 400) + 1e-9


def decoder(**changes: Any) -> Any:
    torch.manual_seed(0)
    return CoterieForCausalLM(CoterieConfig(**{**MODEL, **changes}))


def test_all_layers_turn_together_and_a_resumed_run_turns_to_the_same() -> None:
    model = decoder()
    turning = Turning([Dial(what="router.top_k", first=1, last=4)], model, None, 6)
    turning.turn(4)
    assert {router.top_k for router in placed_routers(model).values()} == {3}
    again = decoder()
    Turning([Dial(what="router.top_k", first=1, last=4)], again, None, 6).turn(4)
    assert {router.top_k for router in placed_routers(again).values()} == {3}


@pytest.mark.parametrize(
    ("dial", "named"),
    [
        ({"what": "router.heat"}, "heat"),
        ({"what": "balance.switch"}, "switch"),
        ({"what": "residual.mu"}, "residual"),
        ({"what": "router.top_k", "until": 7}, "step 0 to 7 in a training of 6"),
        ({"what": "router.top_k", "first": 2, "last": 9}, "cannot pick 9 of 4"),
    ],
)
def test_a_dial_that_turns_nothing_or_too_far_is_refused(dial: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Turning([Dial.model_validate(dial)], decoder(), None, 6).turn(6)


# -- controllers -------------------------------------------------------------------------------------------------------

IDS = torch.arange(40).reshape(2, 20) * 13 % 4096


def test_micro_batches_are_one_update_with_their_counts_summed() -> None:
    def bias(parts: list[torch.Tensor]) -> torch.Tensor:
        model = decoder().train()
        controller = Bias(BiasSettings(rule="proportional", u=0.01), model)
        with listening(model, controller.observe):
            for ids in parts:
                model(ids)
        controller.update(1, 10)
        return torch.stack([r.e_score_correction_bias for r in placed_routers(model).values()])

    whole = bias([IDS])
    assert whole.any()
    torch.testing.assert_close(bias([IDS[:1], IDS[1:]]), whole)


def test_gradient_checkpointing_counts_every_token_once() -> None:
    model = decoder().train()
    model.gradient_checkpointing_enable()
    controller = Bias(BiasSettings(), model)
    with listening(model, controller.observe):
        model(IDS, labels=IDS).loss.backward()
    assert {int(load.sum()) for load in controller.load.values()} == {2 * IDS.numel()}


def test_a_model_in_use_never_changes_its_bias() -> None:
    model = decoder().eval()
    controller = Bias(BiasSettings(), model)
    with listening(model, controller.observe), torch.no_grad():
        model(IDS)
    controller.update(1, 10)
    assert not any(router.e_score_correction_bias.any() for router in placed_routers(model).values())


def test_the_bias_stays_where_it_is_at_the_end() -> None:
    model = decoder().train()
    controller = Bias(BiasSettings(freeze=0.2), model)
    with listening(model, controller.observe):
        model(IDS)
        controller.update(9, 10)
    assert not any(router.e_score_correction_bias.any() for router in placed_routers(model).values())


def test_a_model_without_a_bias_has_nothing_to_control() -> None:
    with pytest.raises(UsageError, match="no router"):
        Bias(BiasSettings(), decoder(router={"kind": "top-k"}))


def test_the_bias_has_no_gradient_and_changes_no_weight() -> None:
    model = decoder(num_experts=4, router={"kind": "sigmoid", "top_k": 4}).eval()
    before = model(IDS).logits
    for router in placed_routers(model).values():
        assert "e_score_correction_bias" not in dict(router.named_parameters())
        router.e_score_correction_bias.normal_()
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-6, rtol=1e-5)  # all experts run: only weights count


# -- what experts do ---------------------------------------------------------------------------------------------------


def test_the_entropy_of_gates_is_not_that_of_loads() -> None:
    figures = Load(torch.full((4,), 6.0), experts=4, tokens=12, slots=24, entropy=12 * 0.5).figures()
    assert figures["entropy"] == pytest.approx(0.5)
    assert figures["load_entropy"] == pytest.approx(math.log(4))
    assert figures["experts_per_token"] == 2


def test_a_layer_whose_tokens_all_chose_null_experts_has_figures() -> None:
    figures = Load(torch.tensor([0.0, 0.0, 9.0]), experts=2, tokens=9).figures()
    assert figures["dead"] == 1
    assert figures["experts_per_token"] == 0


# -- text --------------------------------------------------------------------------------------------------------------


def test_text_is_tokenized_once_and_the_same_each_time(text: tuple[str, str], tmp_path: Path) -> None:
    tokenizer = train_module.load_tokenizer(api_pocket())
    one = tokenized([text[0]], tokenizer, tmp_path / "a", tokens=1500)
    two = tokenized([text[0]], tokenizer, tmp_path / "b", tokens=1500)
    assert one.digest == two.digest
    assert len(Windows(one, 100)) == one.tokens // 100
    assert tokenized(["nowhere.txt"], tokenizer, tmp_path / "a", tokens=1500).digest == one.digest


def api_pocket() -> Path:
    from coterie.assets import pocket

    return pocket()


def test_no_document_is_both_learned_and_measured(text: tuple[str, str], tmp_path: Path) -> None:
    source = tmp_path / "many.jsonl"
    source.write_text("".join(json.dumps({"text": f"document number {i} is about {i * i}"}) + "\n" for i in range(400)))
    tokenizer = train_module.load_tokenizer(api_pocket())
    stream = tokenized([str(source)], tokenizer, tmp_path / "t", tokens=10**6, held_out=10**6)
    learned = tokenizer.decode(Windows(stream, stream.tokens)[0]["input_ids"])
    held = [tokenizer.decode(ids) for ids in stream.held_out["many"]]
    assert held
    assert len(held) + stream.documents - len(held) == 400
    assert not [one for one in held if one.strip() in learned]


@pytest.mark.parametrize(("content", "named"), [("", "no text"), ('{"text": "only this one"}\n', "1 document")])
def test_a_corpus_without_enough_documents_is_refused(content: str, named: str, tmp_path: Path) -> None:
    source = tmp_path / "few.jsonl"
    source.write_text(content)
    with pytest.raises(DataError, match=named):
        api.train({"model": MODEL, "data": [str(source)], "training": TRAINING}, str(tmp_path / "out"))


# -- the verb ----------------------------------------------------------------------------------------------------------


def test_train_writes_a_model_that_transformers_loads_and_its_story(text: tuple[str, str], tmp_path: Path) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(config(text, dials=[{"what": "router.top_k", "first": 1, "last": 3}])))
    told = run("train", str(file), "-o", str(out), "--set", "training.rate=0.01")
    assert "held-out loss" in told
    assert len(next(line for line in told.splitlines() if line.startswith("all ")).split()) == 3  # before and after
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {router.top_k for router in placed_routers(model).values()} == {3}
    assert all(router.e_score_correction_bias.any() for router in placed_routers(model).values())
    record = json.loads((out / "coterie.json").read_text())
    assert record["steps"] == 6
    assert record["losses"]["all"] > 0
    entries = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"max_vio", "entropy", "experts_per_token"} <= set(entries[1]["layers"]["0"])
    assert "plotly" in (out / "experts.html").read_text()
    assert yaml.safe_load((out / "train.yaml").read_text())["training"]["rate"] == 0.01
    assert (out / "tokenizer.json").exists()


@pytest.mark.parametrize("name", trainings())
def test_a_config_that_ships_trains(name: str, text: tuple[str, str], tmp_path: Path) -> None:
    small = ["model.hidden_size=32", "model.num_attention_heads=2", "model.moe_intermediate_size=16"]
    training = [f"training.{k}={v}" for k, v in {**TRAINING, "steps": 5}.items()]
    trained = api.train(name, str(tmp_path / "out"), data=[text[0]], evaluate=[text[1]], settings=[*small, *training])
    assert trained.history.losses["all"] < 9


def test_a_config_that_is_nowhere_is_told_with_those_that_ship(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="deepseekmoe"):
        api.train("nothing", str(tmp_path / "out"))


def test_a_checkpoint_keeps_learning_with_another_router(text: tuple[str, str], tmp_path: Path) -> None:
    out, source = tmp_path / "run", tmp_path / "source"
    shutil.copytree(api_pocket(), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    api.train(
        None,
        str(out),
        init=str(source),
        data=[text[0]],
        evaluate=[text[1]],
        settings=["router.kind=sigmoid", *[f"training.{k}={v}" for k, v in {**TRAINING, "steps": 2}.items()]],
    )
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {router.kind for router in placed_routers(model).values()} == {"sigmoid"}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_router_that_looks_at_attention_is_trained_with_the_attention_it_needs(
    text: tuple[str, str], tmp_path: Path
) -> None:
    told = config(text, controllers=[], training={**TRAINING, "steps": 2})
    fresh = {**told, "model": {**MODEL, "router": {"kind": "attention", "heads": 2}}}
    first = api.train(fresh, str(tmp_path / "first"))
    assert first.history.losses["all"] > 0
    again = api.train({**told, "model": None, "init": str(tmp_path / "first")}, str(tmp_path / "again"))
    assert again.history.curve[0][2] == pytest.approx(first.history.losses["all"], rel=1e-5)


class _Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_killed_run_goes_on_as_if_nothing_had_been(
    text: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = config(text, training={**TRAINING, "steps": 10}, dials=[{"what": "router.top_k", "first": 1, "last": 3}])
    api.train(told, str(tmp_path / "whole"))
    plain = train_module._tensorboard

    class Kill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise _Killed

    monkeypatch.setattr(train_module, "_tensorboard", lambda folder: [Kill()])
    with pytest.raises(_Killed):
        api.train(told, str(tmp_path / "cut"))
    assert not (tmp_path / "cut").exists()
    with pytest.raises(OutputError, match="training"):
        api.train({**told, "training": {**told["training"], "rate": 0.5}}, str(tmp_path / "cut"))
    monkeypatch.setattr(train_module, "_tensorboard", plain)
    api.train(told, str(tmp_path / "cut"))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert sorted(steps) == steps


def test_a_run_killed_before_its_first_checkpoint_or_while_it_wrote_starts_its_journal_afresh(
    text: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, plain = config(text), train_module._tensorboard

    class Kill(TrainerCallback):
        def __init__(self, last: int) -> None:
            self.last = last

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == self.last:
                with (tmp_path / "out.partial" / "training" / "metrics.jsonl").open("a") as stream:
                    stream.write('{"step": 3, "lo')
                raise _Killed

    for last in (1, 5):
        monkeypatch.setattr(train_module, "_tensorboard", lambda folder, last=last: [Kill(last)])
        with pytest.raises(_Killed):
            api.train(told, str(tmp_path / "out"))
    monkeypatch.setattr(train_module, "_tensorboard", plain)
    api.train(told, str(tmp_path / "out"))
    entries = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "held_out" in entry] == [0, 3, 6]


def test_a_run_killed_behind_its_last_step_is_only_written(
    text: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, plain = config(text, grow={"share": 0.5}, dials=[]), train_module.write_run
    api.train(told, str(tmp_path / "whole"))

    def stop(*args: Any) -> Any:
        raise _Killed

    monkeypatch.setattr(train_module, "write_run", stop)
    with pytest.raises(_Killed):
        api.train(told, str(tmp_path / "cut"))
    monkeypatch.setattr(train_module, "write_run", plain)
    again = api.train(told, str(tmp_path / "cut"))
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert again.history.losses["all"] > 0


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(
    text: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 7:
                model.lm_head.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(train_module, "_tensorboard", lambda folder: [Poison()])
    with pytest.raises(ModelError, match="at step 8; the last good checkpoint is checkpoint-6"):
        api.train(config(text, training={**TRAINING, "steps": 10}), str(tmp_path / "out"))
    kept = load_file(tmp_path / "out.partial" / "training" / "checkpoint-6" / "trained.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in kept.values())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"training": {"steps": 0}}, "training.steps"),
        ({"training": {"steps": 3, "tokens": 9}}, "give one"),
        ({"model": {**MODEL, "wide": 3}}, "wide"),
        ({"model": {**MODEL, "router": {"kind": "top-k", "top_k": 9}}}, "9 of 4"),
        ({"router": {"kind": "top-k"}}, "go with init"),
        ({"balancing": [{"name": "fair"}]}, "fair"),
        ({"controllers": [{"rule": "random"}]}, "rule"),
        ({"training": {**TRAINING, "freeze": ["nothing"]}}, "nothing"),
        ({"training": {**TRAINING, "length": 10**6}, "evaluate": []}, "documents"),
        ({"data": []}, "no text"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    changes: dict[str, Any], named: str, text: tuple[str, str], tmp_path: Path
) -> None:
    with pytest.raises(CoterieError, match=named):
        api.train(config(text, **changes), str(tmp_path / "out"))


def test_a_balancing_term_reaches_the_loss_in_training_alone() -> None:
    from coterie.balancing.base import Term

    class Constant(Term):
        def of(self, routing: Any, record: Any) -> torch.Tensor:
            return torch.tensor(2.0)

    model = decoder()
    plain = model.train()(IDS, labels=IDS).loss
    Balance([Constant(weight=0.5)]).watch(model)
    torch.testing.assert_close(model(IDS, labels=IDS).loss, plain + 1)
    torch.testing.assert_close(model.eval()(IDS, labels=IDS).loss, plain)


def test_a_model_that_grows_goes_on_on_the_text_that_follows(text: tuple[str, str], tmp_path: Path) -> None:
    told = config(text, grow={"share": 0.5, "ratio": 0.25}, training={**TRAINING, "steps": 8})
    trained = api.train(told, str(tmp_path / "grown"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    assert {router.num_experts for router in placed_routers(model).values()} == {4}
    steps = [entry["step"] for entry in trained.history.entries if "loss" in entry]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [bool(entry["layers"]) for entry in trained.history.entries if "loss" in entry] == [False] * 4 + [True] * 4


def test_windows_come_in_one_order_whatever_the_phases(text: tuple[str, str], tmp_path: Path) -> None:
    windows = Windows(tokenized([text[0]], train_module.load_tokenizer(api_pocket()), tmp_path, tokens=2000), 64)
    whole = Order(windows, 70, seed=1).numbers
    assert torch.equal(
        torch.cat([Order(windows, 30, seed=1).numbers, Order(windows, 40, seed=1, skip=30).numbers]), whole
    )
    assert sorted(whole[: len(windows)].tolist()) == list(range(len(windows)))


# -- races -------------------------------------------------------------------------------------------------------------


def test_a_race_tells_losses_costs_and_spread_and_goes_on_when_killed(
    text: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, k in (("one", 1), ("two", 2)):
        told = config(text, model={**MODEL, "router": {"kind": "top-k", "top_k": k}}, controllers=[])
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(told))
    files = [str(tmp_path / "two.yaml"), str(tmp_path / "one.yaml")]
    seen: list[tuple[str, int]] = []

    def stop(name: str, seed: int, done: int, of: int) -> None:
        seen.append((name, seed))
        if done == 3:
            raise _Killed

    with pytest.raises(_Killed):
        api.race(files, str(tmp_path / "race"), seeds=2, on_run=stop)
    assert seen == [("two", 0), ("one", 0), ("two", 1), ("one", 1)]
    told = json.loads(run("race", *files, "-o", str(tmp_path / "race"), "--seeds", "2", "--json"))
    two, one = told["table"]
    assert (two["name"], one["name"]) == ("two", "one")
    assert two["difference"] == 0
    assert one["spread"] is not None
    assert one["flops_per_token"] < two["flops_per_token"]
    assert (two["experts_per_token"], one["experts_per_token"]) == (2, 1)
    assert 0 <= one["fluctuation"] <= 1
    assert (tmp_path / "race" / "race.html").exists()


def test_a_race_measures_more_often_than_it_logs(text: tuple[str, str]) -> None:
    often = {**TRAINING, "steps": 100, "batch_size": 1, "length": 8, "evaluate_every": 0.01}
    (run,) = api.race({"a": config(text, controllers=[], training=often)}, None, seeds=1).runs
    assert 0 <= run.fluctuation <= 1
    assert len(run.curve) == 101


def test_a_model_that_has_yet_to_grow_runs_one_expert_per_token(text: tuple[str, str]) -> None:
    told = config(text, grow={"share": 0.5}, controllers=[])
    race = api.race({"grown": told, "whole": {**told, "grow": None}}, None, seeds=1)
    grown, whole = race.runs
    expert = 3 * 2 * 2 * (3 * 32 * 16)  # of two layers
    assert whole.flops_per_token - grown.flops_per_token == pytest.approx(expert / 2)


def test_equal_operations_give_the_cheaper_config_more_tokens(text: tuple[str, str]) -> None:
    told = {
        str(k): config(text, model={**MODEL, "router": {"kind": "top-k", "top_k": k}}, controllers=[]) for k in (4, 1)
    }
    race = api.race(told, None, seeds=1, equal="flops", tokens=2000)
    dear, cheap = race.runs
    assert cheap.tokens > dear.tokens
    assert cheap.curve[-1][1] == pytest.approx(dear.curve[-1][1], rel=0.05)


def test_configs_with_other_text_cannot_race(text: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="differ in data"):
        api.race({"a": config(text), "b": config(text, data=[text[1]])}, None)


def test_operations_count_what_experts_ran() -> None:
    model = decoder()
    full, half = forward_flops(model, 32), forward_flops(model, 32, {0: 1.0, 1: 1.0})
    assert full - half == 2 * 2 * (3 * 32 * 16)
