"""Healing by distillation: what learns, what stays, caches, resuming, several processes, recipes, bad requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback

import coterie
from coterie.anatomy import moe_layers
from coterie.api.runtime import Runtime
from coterie.errors import DataError, ModelError, UsageError
from coterie.streaming.lockstep import Batch
from coterie.text import TokenData, held_out, load_tokens, sample_key
from coterie.training import heal as heal_module
from coterie.training.distillation import top_k
from coterie.training.heal import Distillation, choose, distil
from coterie.training.teacher import TeacherCache, write_cache
from coterie.training.trainer import Rows, Rule, expert_parameters, processes, router_parameters, write_trained
from families import FAMILIES, FEW, each_tensor, edit_json, resident, saved, tiny, token_file, tokens
from inprocess import cli, copy_of, fingerprint, start, until

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"batch_size": 4, "steps": 6, "rate": 1e-3, "top": 16}


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    """Sequences that count: there is something to learn."""
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"input_ids": (torch.arange(24)[None] + 7 * torch.arange(32)[:, None]) % 40}, file)
    return str(file)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, ids):
    """A tiny model that has learnt to count."""
    folder = tmp_path_factory.mktemp("teacher")
    source = saved("qwen3-moe", folder)
    coterie.finetune(str(source), str(folder / "trained"), tokens=ids, router_steps=0, steps=80, rate=3e-3)
    return str(folder / "trained")


@pytest.fixture(scope="module")
def student(tmp_path_factory, teacher, ids):
    """The same with half of its experts."""
    out = tmp_path_factory.mktemp("student") / "small"
    coterie.compress(teacher, str(out), method="frequency", keep=0.5, tokens=ids)
    return str(out)


def changed(before, after):
    one, two = each_tensor(before), each_tensor(after)
    assert {n: (t.dtype, t.shape) for n, t in one.items()} == {n: (t.dtype, t.shape) for n, t in two.items()}
    return {name for name in one if not torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8))}


def names_on_disk(folder, which):
    """Checkpoint keys of the parameters that `which` names in the model."""
    streamed = Runtime().open(str(folder))
    return set(streamed.keys_of(which(resident(folder))))


# -- what learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", ["all", "routers", "experts", "lora"])
def test_healing_brings_a_pruned_model_nearer_to_its_teacher(train, teacher, student, ids, tmp_path):
    done = coterie.heal(
        student, str(tmp_path / "out"), teacher=teacher, train=train, tokens=ids, steps=40, batch_size=8, rate=3e-3
    )
    before, after = done.losses["before"], done.losses["after"]
    assert before["kd"] > 0.02
    assert after["kd"] < (0.85 if train == "routers" else 0.6) * before["kd"]
    assert abs(after["loss"] - done.losses["teacher"]) < abs(before["loss"] - done.losses["teacher"])
    again = coterie.evaluate([teacher, student, str(tmp_path / "out")], tokens=ids)
    assert again[2].mean_kl < again[1].mean_kl


@pytest.mark.parametrize("family", FEW)
def test_all_but_the_routers_stays_byte_for_byte(family, ids, tmp_path):
    source = saved(family, tmp_path, shard="100KB")
    coterie.heal(
        str(source),
        str(tmp_path / "out"),
        teacher=str(source),
        train="routers",
        tokens=ids,
        loss="cross-entropy",
        **SHORT,
    )
    moved = changed(source, tmp_path / "out")
    assert moved
    assert moved <= names_on_disk(source, router_parameters)
    assert (tmp_path / "out/config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_tensors_stored_wider_than_the_rest_stay_so(ids, tmp_path):
    source = saved("deepseek-v3", tmp_path)
    tensors = each_tensor(source)
    wide = {n: t.float() + 1e-6 for n, t in tensors.items() if "norm" in n or "mlp.gate" in n}
    save_file(tensors | wide, source / "model.safetensors", {"format": "pt"})
    coterie.heal(
        str(source),
        str(tmp_path / "out"),
        teacher=str(source),
        train="routers",
        tokens=ids,
        loss="cross-entropy",
        **SHORT,
    )
    assert changed(source, tmp_path / "out") <= names_on_disk(source, router_parameters)


@pytest.mark.parametrize("family", ["deepseek-v3", "gpt-oss"])
def test_with_experts_only_routed_experts_change(family, ids, tmp_path):
    source = saved(family, tmp_path)
    coterie.heal(
        str(source),
        str(tmp_path / "out"),
        teacher=str(source),
        train="experts",
        tokens=ids,
        loss="cross-entropy",
        **SHORT,
    )
    moved = changed(source, tmp_path / "out")
    assert moved
    assert moved <= names_on_disk(source, expert_parameters)


@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "gpt-oss"])
def test_lora_ends_as_a_plain_checkpoint_with_linear_layers_and_experts_changed(family, ids, tmp_path):
    source = saved(family, tmp_path, torch.float32)
    coterie.heal(
        str(source), str(tmp_path / "out"), teacher=str(source), train="lora", tokens=ids, loss="cross-entropy", **SHORT
    )
    moved = changed(source, tmp_path / "out")
    assert any("experts" in n and "shared" not in n for n in moved)
    assert any("attn" in n for n in moved)
    dense = {
        "qwen3-moe": "layers.1.mlp.up_proj",
        "deepseek-v3": "shared_experts.down_proj",
    }  # of the same names as experts
    assert family not in dense or any(dense[family] in n for n in moved)
    assert not moved & names_on_disk(source, router_parameters)
    assert not any("norm" in n or "embed" in n or "lm_head" in n for n in moved)


def test_what_is_saved_is_what_was_trained(teacher, student, ids, tmp_path):
    done = coterie.heal(student, str(tmp_path / "out"), teacher=teacher, tokens=ids, **{**SHORT, "top": 512})
    test, _ = held_out(load_tokens(Path(ids)), 8)  # what a quarter of the rows is
    save_file({"input_ids": test.batches[0].ids_BL.clone()}, tmp_path / "test.safetensors")
    found = coterie.evaluate([teacher, str(tmp_path / "out")], tokens=str(tmp_path / "test.safetensors"))
    assert found[0].mean_loss == pytest.approx(done.losses["teacher"], abs=1e-4)
    assert found[1].mean_loss == pytest.approx(done.losses["after"]["loss"], abs=5e-3)  # rounded to bfloat16
    assert found[1].mean_kl == pytest.approx(done.losses["after"]["kd"], rel=0.1)


def test_a_checkpoint_with_layers_of_different_sizes_is_healed_and_stays_so(teacher, ids, tmp_path):
    small = tmp_path / "small"
    coterie.compress(teacher, str(small), method="frequency", keep=0.5, exclude_layers="2", tokens=ids)
    edit_json(small / "config.json", lambda c: c.update(output_router_logits=True))  # its loss cannot join such layers
    for train in ("all", "lora"):
        out = tmp_path / train
        done = coterie.heal(str(small), str(out), teacher=teacher, train=train, tokens=ids, **SHORT)
        assert done.losses["after"]["kd"] < done.losses["before"]["kd"]
        assert [layer.num_experts for layer in moe_layers(resident(out))] == [4, 8]


@pytest.mark.parametrize(
    "asked", [{"output_router_logits": True, "router_aux_loss_coef": 100.0}, {"attention_dropout": 0.9}]
)
def test_balancing_and_dropout_that_the_config_asks_for_play_no_part(asked, kept, teacher, student, ids, tmp_path):
    other = copy_of(Path(student), tmp_path / "other")
    edit_json(other / "config.json", lambda c: c.update(asked))
    coterie.heal(str(other), str(tmp_path / "out"), teacher=teacher, tokens=ids, cache=str(kept), **SHORT)
    assert changed(kept.parent / "out", tmp_path / "out") == set()
    assert json.loads((tmp_path / "out/config.json").read_text()).items() >= asked.items()


def test_nothing_predicts_padding_nor_from_padding():
    mask_BL = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    data = TokenData([Batch(torch.arange(10).view(2, 5), mask_BL)], ["text"], "", {"text": 6})
    labels = [row["labels"].tolist() for row in Rows(data).rows]
    assert labels == [[-100, 1, 2, -100, -100], [-100, -100, -100, 8, 9]]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_written_back_under_the_names_it_had(family, tmp_path):
    source = saved(family, tmp_path)
    model, names = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.01)
            names.add(name)
    (tmp_path / "out").mkdir()
    write_trained(model, names, Runtime().open(str(source)), tmp_path / "out")
    assert len(changed(source, tmp_path / "out")) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    expected = model.state_dict()
    assert again.keys() == expected.keys()
    for name in names:
        torch.testing.assert_close(again[name], expected[name], atol=0, rtol=2**-8)


def test_embeddings_that_are_also_the_head_are_written_once(ids, tmp_path):
    source = saved("qwen3-moe", tmp_path, tie_word_embeddings=True)
    text = {"tokens": ids, "teacher": str(source), "loss": "cross-entropy"}
    coterie.heal(str(source), str(tmp_path / "out"), **text, **SHORT)
    assert "model.embed_tokens.weight" in changed(source, tmp_path / "out")


# -- the teacher ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FEW)
def test_a_cache_holds_what_the_teacher_says(family, tmp_path):
    source = saved(family, tmp_path)
    data = load_tokens(token_file(tmp_path / "ids.safetensors", padded=True), 2)
    cache = write_cache(Runtime().open(str(source)), data, tmp_path / "cache", k=5, temperature=2.0)
    model, row = resident(source), 0
    for batch in data.batches:
        with torch.no_grad():
            logits = model(
                batch.ids_BL, attention_mask=batch.mask_BL.long() if batch.mask_BL is not None else None
            ).logits
        for number, ids_L in enumerate(batch.ids_BL):
            mask_L = batch.mask_BL[number] if batch.mask_BL is not None else torch.ones_like(ids_L).bool()
            real = logits[number][mask_L]
            told, expected = cache.take(sample_key(ids_L, mask_L), 5), top_k(real, 5, 2.0)
            torch.testing.assert_close(told["log_p"], expected.log_p_TK, atol=5e-3, rtol=0)
            torch.testing.assert_close(told["tail"], expected.tail_T, atol=1e-3, rtol=0)
            own = (real / 2).log_softmax(-1).gather(1, told["ids"])
            torch.testing.assert_close(own, expected.log_p_TK, atol=5e-3, rtol=0)  # near ties may change places
            following = real.log_softmax(-1)[:-1].gather(1, ids_L[mask_L][1:, None])[:, 0]
            torch.testing.assert_close(told["next"][:-1], following, atol=1e-3, rtol=0)
            row += 1
    assert row == data.samples


def test_samples_are_found_however_they_are_batched_and_padded(tmp_path):
    source = saved("mixtral", tmp_path)
    file = token_file(tmp_path / "ids.safetensors", padded=True)
    write_cache(Runtime().open(str(source)), load_tokens(file, 2), tmp_path / "cache", k=4)
    cache = TeacherCache(tmp_path / "cache")
    rows = Rows(load_tokens(file, 3), cache, 4)
    assert len(rows) == 4
    wider = torch.nn.functional.pad(rows.rows[1]["input_ids"], (0, 5))
    real = torch.nn.functional.pad(rows.rows[1]["attention_mask"], (0, 5)).bool()
    told = cache.take(sample_key(wider, real), 4)
    assert torch.equal(rows[1]["teacher_ids"][rows.rows[1]["attention_mask"].bool()], told["ids"])


def test_fewer_tokens_of_a_larger_cache_are_the_same_as_a_smaller_cache(tmp_path):
    source = saved("mixtral", tmp_path)
    data = load_tokens(token_file(tmp_path / "ids.safetensors"))
    large = write_cache(Runtime().open(str(source)), data, tmp_path / "large", k=20)
    small = write_cache(Runtime().open(str(source)), data, tmp_path / "small", k=4)
    for key in large.places:
        one, two = large.take(key, 4), small.take(key, 4)
        assert torch.equal(one["ids"], two["ids"])
        torch.testing.assert_close(one["tail"], two["tail"], atol=1e-3, rtol=0)


def test_training_on_a_cache_of_all_tokens_equals_training_with_the_teacher_at_hand(teacher, student, ids, tmp_path):
    options = {**SHORT, "teacher": teacher, "tokens": ids, "rate": 3e-3}
    cached = coterie.heal(student, str(tmp_path / "a"), logits="cached", **options | {"top": 512})
    online = coterie.heal(student, str(tmp_path / "b"), logits="online", **options)
    assert online.record["recipe"]["parameters"]["loss"] == "full"
    for when in ("before", "after"):
        assert cached.losses[when]["kd"] == pytest.approx(online.losses[when]["kd"], rel=2e-3, abs=2e-5)
        assert cached.losses[when]["loss"] == pytest.approx(online.losses[when]["loss"], abs=2e-3)
    assert cached.losses["teacher"] == pytest.approx(online.losses["teacher"], abs=1e-4)


def test_one_step_on_a_cache_of_all_tokens_has_the_gradient_of_a_step_with_the_teacher_at_hand(
    teacher, student, ids, tmp_path
):
    data, found = load_tokens(Path(ids), 16), []
    cache = write_cache(Runtime().open(teacher), data, tmp_path / "cache", k=512)

    class Seen(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.append({n: p.grad.clone() for n, p in model.named_parameters()})

    for number, (asked, loss) in enumerate([(cache, "tail"), (resident(Path(teacher)), "full")]):
        model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
        options = Distillation(steps=1, batch_size=16, rate=1e-5, loss=loss, top=512)
        distil(model, data, asked, options, folder=tmp_path / str(number), callbacks=[Seen()])
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], atol=2e-3 * float(grad.abs().max()) + 1e-7, rtol=0)


def test_a_kept_cache_is_used_again_and_the_teacher_not_read(kept, teacher, student, ids, tmp_path, monkeypatch):
    before = fingerprint(kept)
    monkeypatch.setattr(heal_module, "write_cache", lambda *a, **k: pytest.fail("the teacher was read again"))
    coterie.heal(student, str(tmp_path / "out"), teacher=teacher, tokens=ids, cache=str(kept), **SHORT)
    assert fingerprint(kept) == before
    assert changed(kept.parent / "out", tmp_path / "out") == set()
    assert not (tmp_path / "out/cache").exists()


@pytest.fixture(scope="module")
def kept(teacher, student, ids, tmp_path_factory):
    """The cache of a run."""
    folder = tmp_path_factory.mktemp("kept")
    coterie.heal(student, str(folder / "out"), teacher=teacher, tokens=ids, cache=str(folder / "cache"), **SHORT)
    return folder / "cache"


def refused(error, says, folder, *given, **options):
    with pytest.raises(error, match=says):
        coterie.heal(given[0], str(folder / "refused"), teacher=given[-1], **{**SHORT, **options})
    assert not (folder / "refused").exists()
    assert not (folder / "refused.partial").exists()


def test_a_cache_of_other_text_is_refused(kept, teacher, student, tmp_path):
    save_file({"input_ids": tokens(16, 24, 9).clone()}, tmp_path / "other.safetensors")
    text = {"tokens": str(tmp_path / "other.safetensors"), "cache": str(kept)}
    refused(DataError, "made from other text", tmp_path, student, teacher, **text)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"top": 17}, "holds the top 16 tokens, not 17"), ({"temperature": 2.0}, "has temperature 1, not 2")],
)
def test_a_cache_that_holds_too_little_is_refused(change, says, kept, teacher, student, ids, tmp_path):
    refused(UsageError, says, tmp_path, student, teacher, tokens=ids, cache=str(kept), **change)
    with pytest.raises(UsageError, match=says):
        distil(
            tiny("mixtral"),
            load_tokens(Path(ids)),
            TeacherCache(kept),
            Distillation(**{**SHORT, **change}),
            folder=tmp_path,
        )


def test_a_cache_of_another_teacher_or_vocabulary_is_refused(kept, student, ids, tmp_path):
    refused(UsageError, "by another teacher", tmp_path, student, student, tokens=ids, cache=str(kept))
    other = str(saved("qwen3-moe", tmp_path, vocab_size=600))
    refused(UsageError, "over 512 tokens, the student knows 600", tmp_path, other, other, tokens=ids, cache=str(kept))


def test_a_damaged_cache_is_refused(kept, teacher, student, ids, tmp_path):
    cache = copy_of(kept, tmp_path / "cache")
    (cache / "000000.safetensors").write_bytes(b"not a tensor")
    refused(DataError, "safetensors is damaged", tmp_path, student, teacher, tokens=ids, cache=str(cache))
    (cache / "cache.json").write_text("{")
    refused(DataError, r"cache\.json is damaged", tmp_path, student, teacher, tokens=ids, cache=str(cache))


def test_a_sweep_for_a_cache_that_was_killed_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    from coterie.training import teacher as module

    source = str(saved("qwen3-moe", tmp_path))
    data = load_tokens(token_file(tmp_path / "ids.safetensors", rows=6), 2)
    write_cache(Runtime().open(source), data, tmp_path / "whole", k=4)
    real, seen = module._score, []

    def dying(*given):
        seen.append(given)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "_score", dying)
    with pytest.raises(KeyboardInterrupt):
        write_cache(Runtime().open(source), data, tmp_path / "cache", k=4)
    assert not (tmp_path / "cache").exists()
    streamed = Runtime().open(source)
    read: list[int] = []
    monkeypatch.setattr(streamed, "load_layer", lambda i, f=streamed.load_layer: (read.append(i), f(i))[1])
    write_cache(streamed, data, tmp_path / "cache", k=4)
    assert read == [2]  # only the last layer
    assert len(seen) == 4  # one batch was there already
    assert fingerprint(tmp_path / "cache") == fingerprint(tmp_path / "whole")


def test_a_run_interrupted_while_the_teacher_is_read_goes_on_there(teacher, student, ids, tmp_path, monkeypatch):
    from coterie.training import teacher as module

    real = module._score
    monkeypatch.setattr(module, "_score", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        coterie.heal(student, str(tmp_path / "out"), teacher=teacher, tokens=ids, **SHORT)
    assert (tmp_path / "out.partial/cache.partial/states/after-0001").is_dir()
    monkeypatch.setattr(module, "_score", real)
    coterie.heal(student, str(tmp_path / "out"), teacher=teacher, tokens=ids, **SHORT)
    assert not (tmp_path / "out.partial").exists()


def test_a_second_device_is_refused_because_the_trainer_would_not_take_it():
    with pytest.raises(UsageError, match="CUDA_VISIBLE_DEVICES=1"):
        processes("cuda:1")


# -- training ---------------------------------------------------------------------------------------------------------


def test_batches_of_a_step_weigh_their_tokens_alike(teacher, student, tmp_path):
    file = tmp_path / "ids.safetensors"
    mask = (torch.arange(24)[None] < torch.tensor([24, 4, 20, 5, 24, 6, 24, 7])[:, None]).long()
    save_file({"input_ids": tokens(8, 24).clone(), "attention_mask": mask}, file)
    options = {"teacher": teacher, "tokens": str(file), "steps": 3, "rate": 1e-3}
    one = coterie.heal(student, str(tmp_path / "a"), batch_size=6, **options)
    two = coterie.heal(student, str(tmp_path / "b"), batch_size=2, accumulate=3, **options)
    assert one.losses["after"]["kd"] == pytest.approx(two.losses["after"]["kd"], rel=1e-3)


def heal_until_killed(student, out, teacher, ids):
    coterie.heal(student, out, teacher=teacher, tokens=ids, **LONG)


LONG = {"steps": 40, "batch_size": 4, "rate": 1e-3, "top": 16}


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(teacher, student, ids, tmp_path):
    out = tmp_path / "out"
    coterie.heal(student, str(tmp_path / "whole"), teacher=teacher, tokens=ids, **LONG)
    process = start(heal_until_killed, student, str(out), teacher, ids)
    until(lambda: (tmp_path / "out.partial/training/checkpoint-10/.whole").exists())
    process.kill()
    process.join()
    assert not out.exists()
    first: list[int] = []
    original = heal_module.Kept.on_save

    def told(self, args, state, control, **kwargs):
        first.append(state.global_step)
        original(self, args, state, control, **kwargs)

    heal_module.Kept.on_save = told
    try:
        coterie.heal(student, str(out), teacher=teacher, tokens=ids, **LONG)
    finally:
        heal_module.Kept.on_save = original
    assert first
    assert first[0] > 10
    assert changed(tmp_path / "whole", out) == set()
    assert not (tmp_path / "out.partial").exists()


def test_mixed_precision_learns_too(teacher, student, ids, tmp_path):
    done = coterie.heal(student, str(tmp_path / "out"), teacher=teacher, tokens=ids, precision="bfloat16", **SHORT)
    assert done.losses["after"]["kd"] < done.losses["before"]["kd"]


def test_other_methods_bring_callbacks_and_rates(ids, tmp_path):
    data, model = load_tokens(Path(ids), 16), tiny("mixtral")
    gate = "model.layers.0.mlp.gate.weight"
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    norms: list[float] = []

    class Zeroing(TrainerCallback):
        """As structured pruning does: read gradients before the step, cut weights after it."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            norms.append(float(model.get_parameter("model.layers.1.mlp.experts.down_proj").grad.norm()))

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_parameter("model.layers.1.mlp.experts.down_proj")[:, 0] = 0

    choose(model, "all")
    rules = [Rule(r".*\.gate\.weight", rate=0.0), Rule(r".*embed_tokens.*", rate=0.0, weight_decay=0.0)]
    options = Distillation(steps=3, batch_size=8, rate=1e-3, weight_decay=0.5)
    done = distil(
        model,
        data,
        tiny("mixtral", seed=1),
        options,
        folder=tmp_path,
        held_out=data,
        callbacks=[Zeroing()],
        rules=rules,
    )
    assert len(norms) == 3
    assert min(norms) > 0
    after = dict(model.named_parameters())
    assert not after["model.layers.1.mlp.experts.down_proj"][:, 0].any()
    assert torch.equal(after[gate], before[gate])
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    assert done.after["kd"] < done.before["kd"]


def test_two_processes_share_the_batches_and_one_writes(teacher, student, ids, tmp_path):
    options = ["--teacher", teacher, "--tokens", ids, "--steps", 3, "--rate", 1e-3, "--top", 16]
    alone = cli("heal", student, tmp_path / "alone", "--batch-size", 8, "--json", *options).json()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--standalone",
            "-m",
            "coterie.cli.main",
        ]
        + ["heal", student, str(tmp_path / "two"), "--batch-size", "4", "--json", *map(str, options)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # the main process alone speaks
    assert told["phases"]["training"]["processes"] == 2
    assert told["losses"]["before"] == pytest.approx(alone["losses"]["before"], rel=1e-4)
    assert told["losses"]["after"] == pytest.approx(alone["losses"]["after"], rel=1e-3)
    assert not (tmp_path / "two.partial").exists()
    assert json.loads((tmp_path / "two/coterie.json").read_text())["losses"] == told["losses"]


# -- recipes ----------------------------------------------------------------------------------------------------------

RECIPE = """
steps:
  - method: frequency
    budget: {keep_experts: 6}
  - heal: {train: routers, steps: 4, batch_size: 4, top: 16}
  - method: frequency
    budget: {keep_experts: 4}
  - heal: {steps: 20, batch_size: 4, top: 16, rate: 1.0e-3}
"""


def recipe(folder, text=RECIPE):
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_recipe_prunes_and_heals_in_turn_with_the_first_model_as_teacher(teacher, ids, tmp_path):
    done = cli("compress", teacher, tmp_path / "out", "--recipe", recipe(tmp_path), "--tokens", ids)
    assert done.code == 0, done.err
    assert [f"step {n} of 4" in done.err for n in range(1, 5)] == [True] * 4
    assert done.out.count("on held-out text") == 2
    record = json.loads((tmp_path / "out/coterie.json").read_text())
    steps = [*record["earlier_steps"], record]
    assert [step["recipe"]["method"] for step in steps[-4:]] == ["frequency", "heal", "frequency", "heal"]
    assert {step["teacher_digest"] for step in steps if "teacher_digest" in step} == {steps[-4]["model_digest"]}
    assert steps[-1]["losses"]["after"]["kd"] < steps[-1]["losses"]["before"]["kd"]
    assert [layer.num_experts for layer in moe_layers(resident(tmp_path / "out"))] == [4, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "recipe.yaml"]


def test_a_recipe_killed_while_healing_goes_on_inside_that_step(teacher, ids, tmp_path, monkeypatch):
    file = recipe(tmp_path, RECIPE.replace("steps: 20", "steps: 40"))
    original, seen = heal_module.Kept.on_save, []

    def dying(self, args, state, control, **kwargs):
        original(self, args, state, control, **kwargs)
        seen.append((state.max_steps, state.global_step))
        if seen[-1] == (40, 20) and len(seen) < 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(heal_module.Kept, "on_save", dying)
    assert cli("compress", teacher, tmp_path / "out", "--recipe", file, "--tokens", ids).code == 130
    assert (tmp_path / "out.step3").is_dir()
    seen[:] = [(0, 0)] * 6
    monkeypatch.setattr(heal_module, "write_cache", lambda *a, **k: pytest.fail("the teacher was read again"))
    done = cli("compress", teacher, tmp_path / "out", "--recipe", file, "--tokens", ids)
    assert done.code == 0, done.err
    assert seen[6] == (40, 30)
    assert seen[-1] == (40, 40)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: [{heal: {}, method: reap}]", "steps.0: Value error, a step names a method or heal, one of them"),
        ("steps: [{propagate: true}]", "a step names a method or heal, one of them"),
        ("steps: [{heal: {}, budget: {keep: 0.5}}]", "a step that heals has no budget"),
        ("steps: [{heal: {stepps: 5}}]", "steps.0.heal.stepps"),
        ("steps: [{heal: {steps: 0}}]", "steps.0.heal.steps"),
        ("steps: [{heal: {train: heads}}]", "nothing called 'heads' to train"),
        ("steps: [{heal: {rate: -1}}]", "rate=-1.0 makes no sense"),
        ("steps: [{heal: {loss: full}}]", "needs all of the teacher's logits"),
        ("steps: [{method: frequency, budget: {keep: 0.5}}, {heal: {teacher: ./none}}]", "none"),
    ],
)
def test_a_mistake_in_a_step_that_heals_is_found_before_anything_is_done(text, says, teacher, ids, tmp_path):
    done = cli("compress", teacher, tmp_path / "out", "--recipe", recipe(tmp_path, text), "--tokens", ids)
    assert done.code == 2, done.err
    assert says in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_recipe_that_heals_without_text_is_refused_before_anything_is_done(teacher, tmp_path):
    done = cli("compress", teacher, tmp_path / "out", "--recipe", recipe(tmp_path, "steps: [{heal: {}}]"))
    assert done.code == 2
    assert "healing needs text" in done.err


# -- the command line and bad requests --------------------------------------------------------------------------------


def test_the_command_line(teacher, student, ids, tmp_path):
    options = ("--teacher", teacher, "--tokens", ids, "--steps", 2, "--batch-size", 4, "--top", 8)
    done = cli("heal", student, tmp_path / "out", *options, "--train", "routers")
    assert done.code == 0, done.err
    assert "on held-out text" in done.out
    told = cli("heal", student, tmp_path / "json", *options, "--json").json()
    record = json.loads((tmp_path / "json/coterie.json").read_text())
    assert {k: told[k] for k in record} == record
    assert [step["recipe"]["method"] for step in record["earlier_steps"][-1:]] == ["frequency"]
    assert set(record["phases"]) == {"teacher", "training"}
    assert "Healed with Coterie" in (tmp_path / "json/README.md").read_text()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps=0 makes no sense"),
        ({"rate": 0.0}, "rate=0.0 makes no sense"),
        ({"rate": float("nan")}, "rate=nan makes no sense"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"warmup": 1.5}, "warmup=1.5"),
        ({"kd_weight": 0.0}, "nothing to learn"),
        ({"lm_weight": -1.0}, "lm_weight=-1.0"),
        ({"train": "heads"}, "nothing called 'heads'"),
        ({"logits": "guessed"}, "no way 'guessed'"),
        ({"loss": "mse"}, "no loss 'mse'"),
        ({"loss": "full"}, "needs all of the teacher's logits"),
        ({"schedule": "square"}, "no schedule 'square'"),
        ({"precision": "int8"}, "no precision 'int8'"),
        ({"train": "lora", "lora_rank": 0}, "lora_rank=0"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_before_anything_is_read(options, says, tmp_path):
    with pytest.raises(UsageError, match=says):
        coterie.heal("nowhere", str(tmp_path / "out"), teacher="nowhere", tokens="none", **options)


def test_float16_on_a_cpu_is_refused_before_the_teacher_is_read(teacher, student, ids, tmp_path):
    refused(UsageError, "float16 needs an accelerator", tmp_path, student, teacher, tokens=ids, precision="float16")


def test_without_text_nothing_starts(teacher, student, tmp_path):
    with pytest.raises(UsageError, match="healing needs text"):
        coterie.heal(student, str(tmp_path / "out"), teacher=teacher)
    assert not (tmp_path / "out.partial").exists()
    (tmp_path / "empty.txt").write_text(" ")
    with pytest.raises(DataError, match="no text in"):
        coterie.heal(student, str(tmp_path / "out"), [str(tmp_path / "empty.txt")], teacher=teacher)


def test_models_of_different_vocabularies_are_refused(student, ids, tmp_path):
    other = saved("mixtral", tmp_path, vocab_size=600)
    with pytest.raises(UsageError, match="512 and 600 tokens"):
        coterie.heal(student, str(tmp_path / "out"), teacher=str(other), tokens=ids)


def test_tokenizers_that_number_tokens_otherwise_are_refused(teacher, student, ids, tmp_path):
    other = copy_of(Path(teacher), tmp_path / "other")

    def swap(tokenizer):
        words = tokenizer["model"]["vocab"]
        a, b = [w for w, n in words.items() if n in (300, 301)]
        words[a], words[b] = words[b], words[a]

    edit_json(other / "tokenizer.json", swap)
    with pytest.raises(UsageError, match="differ in 2 tokens"):
        coterie.heal(student, str(tmp_path / "out"), teacher=str(other), tokens=ids)


def test_the_student_and_the_teacher_are_never_written_over(teacher, student, ids, tmp_path):
    before = fingerprint(Path(student)), fingerprint(Path(teacher))
    for place in (student, teacher, f"{student}/inside"):
        with pytest.raises(UsageError, match="would overwrite"):
            coterie.heal(student, place, teacher=teacher, tokens=ids, overwrite=True)
    with pytest.raises(UsageError, match="would overwrite"):
        coterie.heal(student, str(tmp_path / "out"), teacher=teacher, tokens=ids, cache=f"{teacher}/cache")
    assert before == (fingerprint(Path(student)), fingerprint(Path(teacher)))


def test_a_loss_that_is_no_number_ends_the_run(teacher, student, ids, tmp_path):
    with pytest.raises(ModelError, match=r"the loss is (nan|inf)"):
        coterie.heal(
            student, str(tmp_path / "out"), teacher=teacher, tokens=ids, **{**SHORT, "rate": 1e30, "warmup": 0.0}
        )
    assert not (tmp_path / "out").exists()


def test_lora_without_peft_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match="pip install 'coterie\\[heal\\]'"):
        coterie.heal("nowhere", str(tmp_path / "out"), teacher="nowhere", tokens="none", train="lora")
