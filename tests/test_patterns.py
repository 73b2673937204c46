"""Pattern stores: building, finding a query's task without experts, loading and exchanging only what is needed."""

# T tokens, E experts, D tasks

import copy
import functools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.anatomy import moe_layers, select, slice_names
from coterie.assets import pocket
from coterie.compression.methods import get_method
from coterie.errors import CheckpointError, CoterieError, DataError, ModelError, UsageError
from coterie.patterns import loading
from coterie.patterns.demonstrations import generate_demonstrations
from coterie.patterns.loading import match_resident, of, switch
from coterie.patterns.retrieval import match, nearest, probe
from coterie.patterns.store import Key, PatternStore, build_store
from coterie.profiling.contribution import tcess_name
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData, load_tokenizer
from families import FAMILIES, FEW, edit_json, saved, tokens
from inprocess import cli
from test_easy_ep import logits, mask

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 4096  # the tokenizer's
TEXT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root, vocab_size=VOCABULARY))


@pytest.fixture(scope="module")
def stored(checkpoint):
    return functools.cache(lambda family, score="tcess": build(checkpoint(family), score=score))


def samples(name, seed, rows=3, length=16):
    ids = tokens(rows, length, seed)
    return TokenData([Batch(ids, None, torch.zeros(rows).long())], [name], str(seed), {name: ids.numel()})


def opened(folder):
    return StreamedModel(Checkpoint.open(folder), compute_dtype="float32")


def build(folder, **given):
    tasks = {"a": samples("a", 1), "b": samples("b", 2), "c": samples("c", 3)}
    return build_store(opened(folder), tasks, model="tiny", **given)


def loaded(folder, store, task="a", **given):
    return coterie.load(str(folder), pattern=store, task=task, **({"keep": 0.5} | given))[0]


@functools.cache
def expert_bytes(folder):
    """Bytes of all routed experts in a checkpoint."""
    streamed = opened(folder)
    names = [n for x in streamed.moe.values() for n in slice_names(x) if n.startswith(f"{x.experts_name}.")]
    return sum(streamed.checkpoint.tensors[key].nbytes for key in streamed.keys_of(names))


# -- the store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["tcess", "premoe", "easy-ep", "reap"])
def test_scores_come_from_any_method_and_keys_from_the_router(score, checkpoint, stored):
    store = stored("qwen3-moe", score)
    assert torch.equal(store.keys_DE, stored("qwen3-moe").keys_DE)
    assert (store.tasks, store.tokens) == (["a", "b", "c"], {"a": 48, "b": 48, "c": 48})
    profile = profile_model(
        opened(checkpoint("qwen3-moe")),
        samples("b", 2),
        get_method(store_method(score)).observes(),
        model="x",
    )
    for index, layer in profile.layers.items():
        expected_E = get_method(store_method(score)).score(layer).double()
        assert torch.allclose(store.scores(index, "b"), expected_E, rtol=1e-5)


def store_method(score):
    return "premoe" if score == "tcess" else score


def test_a_store_comes_back_from_its_folder_as_it_was(stored, tmp_path):
    store = stored("deepseek-v3", "easy-ep")
    store.save(tmp_path / "store")
    back = PatternStore.load(tmp_path / "store")
    assert back.describe() == store.describe()
    assert torch.equal(back.keys_DE, store.keys_DE)
    assert all(torch.equal(back.scores_DE[i], store.scores_DE[i]) for i in store.experts)


@pytest.mark.parametrize("family", FEW)
def test_kept_sets_are_nested_and_the_permutation_form_says_the_same(family, checkpoint, stored):
    """PreMoe's form: expert ranks of the first layer are mapped to those of layer l by a permutation."""
    store, streamed = stored(family), opened(checkpoint(family))
    for task in store.tasks:
        first = store.order(store.key.layer, task)
        for index, layer in streamed.moe.items():
            order = store.order(index, task)
            permutation = dict(zip(first, order))
            before = set()
            for count in range(layer.groups, layer.num_experts + 1, layer.groups):
                keep = store.keep(layer, task, count)
                assert before <= set(keep)
                assert keep == sorted(keep)
                assert len(keep) == count
                if layer.groups == 1:
                    assert set(keep) == {permutation[e] for e in first[:count]}
                before = set(keep)


def test_stores_of_one_make_join_and_others_do_not(checkpoint, stored):
    store = stored("mixtral")
    other = build_store(opened(checkpoint("mixtral")), {"c": samples("c", 9), "d": samples("d", 4)}, model="tiny")
    both = store.joined(other)
    assert both.tasks == ["a", "b", "c", "d"]
    assert torch.equal(both.scores(0, "a"), store.scores(0, "a"))
    assert torch.equal(both.scores(0, "c"), other.scores(0, "c"))
    assert nearest(both, other.keys_DE[1], 1).task == "d"
    with pytest.raises(UsageError, match="made differently"):
        store.joined(stored("mixtral", "reap"))
    with pytest.raises(UsageError, match="different models"):
        store.joined(stored("qwen3-moe"))


@settings(deadline=None, max_examples=20)
@given(st.floats(1e-3, 1e3))
def test_a_generalist_does_not_depend_on_one_tasks_scale(scale):
    scores_DE = torch.rand(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    key = Key(0)
    make = functools.partial(
        PatternStore, "m", "d", {0: 6}, ["a", "b"], {"a": 1, "b": 1}, {"name": "x"}, key, scores_DE
    )
    scaled_DE = scores_DE * torch.tensor([[scale], [1.0]])
    one, two = make({0: scores_DE}), make({0: scaled_DE})
    assert torch.allclose(one.scores(0, ["a", "b"]), two.scores(0, ["a", "b"]))
    assert torch.equal(one.scores(0, "a"), scores_DE[0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": "random"}, "looks at no text"),
        ({"score": "nonsense"}, "no method 'nonsense'"),
        ({"candidates": 99}, "99 candidates per token of 8 experts"),
        ({"parameters": {"x": 1}}, "tcess takes its parameters from the key"),
    ],
)
def test_scores_that_cannot_be_are_refused(given, message, checkpoint):
    with pytest.raises(UsageError, match=message):
        build(checkpoint("mixtral"), **given)


def test_tasks_need_names_that_can_be_joined(checkpoint):
    for name in ("", "a+b"):
        with pytest.raises(UsageError, match="cannot be a task's name"):
            build_store(opened(checkpoint("mixtral")), {name: samples("a", 1)}, model="x")
    with pytest.raises(UsageError, match="at least one task"):
        build_store(opened(checkpoint("mixtral")), {}, model="x")


# -- retrieval --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_corpus_of_a_task_finds_it_at_distance_zero_and_no_expert_is_read(family, checkpoint, stored):
    store, streamed = stored(family), opened(checkpoint(family))
    read = set()
    streamed.on_read = lambda key, tensor: read.add(key)
    found = match(store, streamed, samples("query", 2))
    assert found.task == "b"
    assert found.distances["b"] == pytest.approx(0, abs=1e-5)
    assert min(found.distances["a"], found.distances["c"]) > 1e-3
    first = min(streamed.moe)
    later = {key for keys in streamed.layer_keys[first + 1 :] for key in keys}
    experts = set(
        streamed.keys_of(
            f"{streamed.moe[first].experts_name}.{n}" for n, _ in streamed.moe[first].experts.named_parameters()
        )
    )
    assert experts
    assert not read & (later | experts)
    assert streamed.checkpoint.bytes_read == sum(streamed.checkpoint.tensors[key].nbytes for key in read)


def test_a_probe_reads_nothing_ahead_that_it_will_not_load(checkpoint, stored, monkeypatch):
    key, ahead = stored("deepseek-v3").key, []
    monkeypatch.setattr(Checkpoint, "prefetch", lambda self, keys, stop: ahead.extend(keys))
    streamed = opened(checkpoint("deepseek-v3"))
    probe(streamed, samples("query", 2), key)
    first = min(streamed.moe)
    assert ahead
    assert all(name in streamed.layer_keys[first] and ".experts." not in name for name in ahead)


@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "gpt-oss"])
def test_a_probe_works_where_experts_are_ruined(family, checkpoint, stored, tmp_path):
    folder = shutil.copytree(checkpoint(family), tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if "experts." in name and "shared" not in name:
            tensors[name].fill_(float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    store = stored(family)
    key_E = probe(opened(folder), samples("query", 2), store.key)
    assert torch.allclose(key_E, store.keys_DE[1], atol=1e-6)


def test_the_model_can_be_used_after_a_probe(checkpoint, stored):
    streamed = opened(checkpoint("deepseek-v3"))
    one = probe(streamed, samples("query", 2), stored("deepseek-v3").key)
    store = build_store(streamed, {"b": samples("b", 2)}, model="tiny")
    assert torch.allclose(one, store.keys_DE[0])
    assert torch.allclose(store.scores(2, "b"), stored("deepseek-v3").scores(2, "b"))


def test_keys_take_all_their_parameters(checkpoint):
    given = {"candidates": 3, "threshold": 0.4, "shift": "mean"}
    store = build(checkpoint("mixtral"), **given)
    assert store.key.name == tcess_name(3, 0.4, "mean")
    assert match(store, opened(checkpoint("mixtral")), samples("q", 3)).distances["c"] < 1e-5
    assert not torch.allclose(store.keys_DE, build(checkpoint("mixtral")).keys_DE)


def test_beyond_the_threshold_no_task_matches(stored):
    store = stored("mixtral")
    far_E = store.keys_DE[0] + 1
    distance = 8**0.5
    assert nearest(store, far_E, 4).distances["a"] == pytest.approx(distance)
    assert nearest(store, far_E, 4, distance - 1e-6).task is None
    assert nearest(store, store.keys_DE[0], 4, 0.0).task == "a"


def test_a_store_of_another_model_is_refused(checkpoint, stored):
    with pytest.raises(UsageError, match="made of another model"):
        match(stored("mixtral"), opened(checkpoint("qwen3-moe")), samples("q", 1))
    with pytest.raises(UsageError, match="made of another model"):
        loaded(checkpoint("qwen3-moe"), stored("mixtral"))


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_pattern_is_the_sliced_model_bit_for_bit_and_reads_its_share(family, checkpoint, stored):
    model, _ = coterie.load(str(checkpoint(family)))
    full = logits(model)
    assert torch.equal(logits(loaded(checkpoint(family), stored(family), keep=1.0)), full)
    few = loaded(checkpoint(family), stored(family))
    state = of(few)
    for layer in moe_layers(model):
        select(layer, state.keep[layer.index])
    assert torch.equal(logits(few), logits(model))
    assert not torch.equal(logits(few), full)
    assert state.checkpoint.bytes_read * 2 == expert_bytes(checkpoint(family))
    assert state.whole == []
    assert not any(p.is_meta for p in few.parameters())
    for layer in moe_layers(few):
        whole = state.source.moe[layer.index]
        assert layer.num_experts * 2 == whole.num_experts
        assert state.keep[layer.index] == stored(family).keep(whole, "a", layer.num_experts)


@pytest.mark.parametrize("family", FEW)
def test_a_loaded_pattern_is_the_whole_model_with_the_others_masked(family, checkpoint, stored):
    few = loaded(checkpoint(family), stored(family), dtype="float32")
    whole, _ = coterie.load(str(checkpoint(family)), dtype="float32")
    assert torch.allclose(logits(few), logits(mask(whole, of(few).keep)), atol=2e-5)
    mixed_up = {i: sorted({*k[1:], *range(10 * 8)} - {k[0]})[: len(k)] for i, k in of(few).keep.items()}
    if family != "deepseek-v3":  # another mapping is noticed
        assert not torch.allclose(logits(few), logits(mask(whole, mixed_up)), atol=2e-5)


@pytest.mark.parametrize("family", FEW)
def test_switching_reads_the_difference_and_back_is_the_same_bits(family, checkpoint, stored):
    store, folder = stored(family), checkpoint(family)
    model = loaded(folder, store)
    state, ids = of(model), {id(p) for p in model.parameters()}
    first, keep_a, read = logits(model), state.keep, state.checkpoint.bytes_read
    keep_a = copy.deepcopy(keep_a)
    switch(model, "b")
    other = logits(model)
    assert torch.equal(other, logits(loaded(folder, store, "b")))
    assert not torch.equal(first, other)
    new = sum(len(set(state.keep[i]) - set(keep_a[i])) for i in keep_a)
    each = expert_bytes(folder) / sum(store.experts.values())
    assert state.checkpoint.bytes_read - read == new * each
    assert state.task == "b"
    switch(model, "a")
    assert torch.equal(logits(model), first)
    read = state.checkpoint.bytes_read
    switch(model, "a")
    assert state.checkpoint.bytes_read == read
    assert {id(p) for p in model.parameters()} == ids


def test_bytes_grow_with_the_number_of_experts(checkpoint, stored):
    read = [
        of(loaded(checkpoint("olmoe"), stored("olmoe"), keep=None, keep_experts=n)).checkpoint.bytes_read
        for n in (2, 4, 8)
    ]
    assert read == [expert_bytes(checkpoint("olmoe")) * n // 8 for n in (2, 4, 8)]


def test_groups_stay_or_are_switched_off(checkpoint, stored):
    """The same experts route differently in groups; both ways are what the config says."""
    folder, store = checkpoint("deepseek-v3"), stored("deepseek-v3")
    full = logits(coterie.load(str(folder))[0])
    kept, off = (loaded(folder, store, keep=1.0, groups=groups) for groups in (True, False))
    assert torch.equal(logits(kept), full)
    assert not torch.equal(logits(off), full)
    plain = AutoModelForCausalLM.from_pretrained(folder, n_group=1, topk_group=1, dtype="auto").eval()
    assert torch.equal(logits(off), logits(plain))
    any_experts = loaded(folder, store, keep=None, keep_experts=6, groups=False)
    assert {len(k) for k in of(any_experts).keep.values()} == {6}
    for index, keep in of(any_experts).keep.items():
        assert keep == sorted(store.order(index, "a")[:6])
    switch(any_experts, "b")
    for index, keep in of(any_experts).keep.items():
        assert keep == sorted(store.order(index, "b")[:6])
    with pytest.raises(UsageError, match="4 groups"):
        loaded(folder, store, keep=None, keep_experts=6)


@pytest.mark.parametrize("family", FEW)
def test_a_query_finds_the_same_task_streamed_and_in_memory(family, checkpoint, stored):
    folder, store = checkpoint(family), stored(family)
    model, tokenizer = coterie.load(str(folder), pattern=store, query=TEXT, keep=0.5, dtype="float32")
    found = of(model).match
    here = match_resident(model, TEXT, tokenizer)
    before = logits(model)
    assert here.task == found.task == of(model).task
    assert list(here.distances.values()) == pytest.approx(list(found.distances.values()), abs=1e-5)
    assert here.tokens == len(tokenizer(TEXT)["input_ids"]) + 1
    assert torch.equal(logits(model), before)
    for task in store.tasks:  # asked with another task's experts in memory
        switch(model, task)
        again = match_resident(model, TEXT, tokenizer)
        assert list(again.distances.values()) == pytest.approx(list(here.distances.values()), abs=1e-5)
    switch(model, query=TEXT, tokenizer=tokenizer)
    assert torch.equal(logits(model), before)


def test_a_query_near_no_task_gets_the_generalist(checkpoint, stored):
    folder, store = checkpoint("qwen3-moe"), stored("qwen3-moe")
    model, tokenizer = coterie.load(str(folder), pattern=store, query=TEXT, keep=0.5, threshold=0.0)
    assert of(model).match.task is None
    assert of(model).task == "a+b+c"
    assert torch.equal(logits(model), logits(loaded(folder, store, "a+b+c")))
    switch(model, "a")
    switch(model, query=TEXT, tokenizer=tokenizer, threshold=0.0)
    assert torch.equal(logits(model), logits(loaded(folder, store, ["a", "b", "c"])))


def test_a_loaded_model_generates_and_saves_as_a_plain_checkpoint(checkpoint, stored, tmp_path):
    for family in FEW:
        model = loaded(checkpoint(family), stored(family))
        model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False)
        model.save_pretrained(tmp_path / family)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype="auto").eval()
        assert torch.equal(logits(again), logits(model))


def test_an_order_or_a_plan_can_stand_for_a_store(checkpoint, stored, tmp_path):
    folder, store = checkpoint("mixtral"), stored("mixtral")
    order = {index: store.order(index, "a") for index in store.experts}
    expected = logits(loaded(folder, store))
    by_order = coterie.load(str(folder), pattern=order, keep=0.5)[0]
    assert torch.equal(logits(by_order), expected)
    short = {index: experts[:4] for index, experts in order.items()}
    assert torch.equal(logits(coterie.load(str(folder), pattern=short)[0]), expected)
    profile = profile_model(opened(folder), samples("a", 1), get_method("premoe").observes(), model="x")
    plan = coterie.plan(str(folder), profile, method="premoe", keep=0.5, out=str(tmp_path / "plan.json"))
    assert torch.equal(logits(coterie.load(str(folder), pattern=plan)[0]), expected)
    assert torch.equal(logits(coterie.load(str(folder), pattern=str(tmp_path / "plan.json"))[0]), expected)
    switch(by_order, order={index: store.order(index, "b") for index in store.experts})
    assert torch.equal(logits(by_order), logits(loaded(folder, store, "b")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda order: {**order, 1: [0, 1, 2, 8]}, "layer 1 names expert 8; the layer has experts 0 to 7"),
        (lambda order: {**order, 1: [0, 1, 2, -1]}, "layer 1 names expert -1"),
        (lambda order: {**order, 1: [0, 1, 2, 2]}, "layer 1 names an expert twice"),
        (lambda order: {**order, 1: [0, 1, 2, True]}, "layer 1 names expert True"),
        (lambda order: {0: order[0]}, "the order names layers"),
        (lambda order: {**order, 1: [0, 1, 2]}, "different numbers of experts"),
        (lambda order: {i: [0] for i in order}, "the router picks 2"),
    ],
)
def test_orders_that_cannot_be_are_refused_before_anything_is_loaded(change, message, checkpoint):
    order = {i: [0, 1, 2, 3] for i in range(3)}
    with pytest.raises((UsageError, ModelError), match=message):
        coterie.load(str(checkpoint("mixtral")), pattern=change(order))


def test_requests_that_contradict_themselves_are_refused(checkpoint, stored):
    folder, store = str(checkpoint("mixtral")), stored("mixtral")
    for request, message in [
        ({"pattern": store, "keep": 0.5}, "say which pattern"),
        ({"pattern": store, "keep": 0.5, "task": "a", "query": "x"}, "say which pattern"),
        ({"pattern": store, "keep": 0.5, "task": "d"}, "no task 'd'"),
        ({"pattern": store, "task": "a"}, "a budget is exactly one"),
        ({"pattern": store, "task": "a", "keep_experts": 1}, "the router picks 2"),
        ({"pattern": {0: [0, 1]}, "task": "a"}, "no tasks to choose from"),
        ({"task": "a"}, "there is no pattern"),
        ({"pattern": store, "task": "a", "keep": 0.5, "revision": "x"}, "no option 'revision'"),
    ]:
        with pytest.raises(UsageError, match=message):
            coterie.load(folder, **request)
    plain, _ = coterie.load(folder)
    with pytest.raises(UsageError, match="not loaded with a pattern"):
        switch(plain, "a")
    model = loaded(folder, store)
    before = logits(model)
    for request, message in [({}, "say what to switch to"), ({"task": "d"}, "no task 'd'")]:
        with pytest.raises(UsageError, match=message):
            switch(model, **request)
    assert torch.equal(logits(model), before)


def test_a_family_stored_in_a_way_of_its_own_is_read_whole_and_says_so(checkpoint, stored, monkeypatch):
    folder, store = checkpoint("gpt-oss"), stored("gpt-oss")
    expected = [logits(loaded(folder, store, task)) for task in ("a", "b")]
    names = [n for x in opened(folder).moe.values() for n in slice_names(x) if n.startswith(x.experts_name)]
    monkeypatch.setattr(loading, "_expert_files", lambda streamed: ({i: {} for i in streamed.moe}, names))
    model = loaded(folder, store)
    assert of(model).whole == names
    assert torch.equal(logits(model), expected[0])
    switch(model, "b")
    assert torch.equal(logits(model), expected[1])


@pytest.mark.parametrize("family", ["mixtral", "gpt-oss"])
def test_damaged_experts_are_found_when_they_are_read(family, checkpoint, stored, tmp_path):
    """Only then: an expert that is not selected is not looked at."""
    folder = shutil.copytree(checkpoint(family), tmp_path / "m")
    store = copy.deepcopy(stored(family))
    streamed = opened(folder)
    keep = store.keep(streamed.moe[1], "a", 4)
    inside, outside = keep[0], next(e for e in range(8) if e not in keep)
    files, _ = loading._expert_files(streamed)
    store.model_digest = streamed.checkpoint.digest()
    for expert, fails in ((outside, False), (inside, True)):
        info = next(iter(files[1].values())).parts[expert][0]
        with info.file.open("r+b") as stream:
            stream.seek(info.begin)
            stream.write(b"\xff\xff" * 4)  # NaN in bfloat16
        store.model_digest = opened(folder).checkpoint.digest()
        if fails:
            with pytest.raises(CheckpointError, match="holds NaN or Inf"):
                loaded(folder, store)
        else:
            loaded(folder, store)


def test_a_switch_that_fails_can_be_repeated(checkpoint, stored, monkeypatch):
    folder, store = checkpoint("mixtral"), stored("mixtral")
    model = loaded(folder, store)
    real, calls = loading._read_expert, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise CheckpointError("the disk is gone")
        real(*arguments)

    monkeypatch.setattr(loading, "_read_expert", failing)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        switch(model, "b")
    whole, _ = coterie.load(str(folder), dtype="auto")
    for layer in moe_layers(whole):
        select(layer, of(model).keep[layer.index])
    assert torch.equal(logits(model), logits(whole))  # every layer is one or the other
    switch(model, "b")
    assert torch.equal(logits(model), logits(loaded(folder, store, "b")))


# -- stores of strangers ----------------------------------------------------------------------------------------------


def meta(change):
    return lambda folder: edit_json(folder / "patterns.json", change)


def tensors(change):
    def edit(folder):
        found = load_file(folder / "patterns.safetensors")
        change(found)
        save_file(found, folder / "patterns.safetensors")

    return edit


HOSTILE = {
    "no json": lambda f: (f / "patterns.json").unlink(),
    "no tensors": lambda f: (f / "patterns.safetensors").unlink(),
    "cut tensors": lambda f: (f / "patterns.safetensors").write_bytes((f / "patterns.safetensors").read_bytes()[:200]),
    "no safetensors": lambda f: (f / "patterns.safetensors").write_bytes(b"\x80\x04pickle"),
    "cut json": lambda f: (f / "patterns.json").write_text("{"),
    "a list": lambda f: (f / "patterns.json").write_text("[1]"),
    "newer": meta(lambda m: m.update(format=2)),
    "no format": meta(lambda m: m.pop("format")),
    "format text": meta(lambda m: m.update(format="1")),
    "no tasks": meta(lambda m: m.update(tasks=[])),
    "task twice": meta(lambda m: m["tasks"].append(m["tasks"][0])),
    "task missing": meta(lambda m: m["tasks"].pop()),
    "task a number": meta(lambda m: m["tasks"][0].update(name=3)),
    "tokens negative": meta(lambda m: m["tasks"][0].update(tokens=-1)),
    "more experts": meta(lambda m: m["layers"][0].update(experts=9)),
    "experts text": meta(lambda m: m["layers"][0].update(experts="8")),
    "layer unknown": meta(lambda m: m["layers"].append({"index": 7, "experts": 8})),
    "key elsewhere": meta(lambda m: m["key"].update(layer=1)),
    "key of too many": meta(lambda m: m["key"].update(candidates=9)),
    "key unknown": meta(lambda m: m["key"].update(extra=1)),
    "shift unknown": meta(lambda m: m["key"].update(shift="exec")),
    "score nameless": meta(lambda m: m.update(score={})),
    "settings text": meta(lambda m: m.update(settings="x")),
    "wrong shape": tensors(lambda t: t.update({"0.score_DE": torch.zeros(3, 9).double()})),
    "wrong dtype": tensors(lambda t: t.update({"0.score_DE": torch.zeros(3, 8).int()})),
    "not finite": tensors(lambda t: t["1.score_DE"].fill_(float("nan"))),
    "key not finite": tensors(lambda t: t["key_DE"].fill_(float("inf"))),
    "layer lost": tensors(lambda t: t.pop("2.score_DE")),
    "another model": meta(lambda m: m.update(model_digest="0" * 64)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_stores_end_in_a_typed_error_before_loading(name, checkpoint, stored, tmp_path, monkeypatch):
    stored("mixtral").save(tmp_path / "store")
    HOSTILE[name](tmp_path / "store")
    monkeypatch.setattr(loading, "_assemble", None)  # nothing may come so far
    with pytest.raises((DataError, UsageError)):
        loaded(checkpoint("mixtral"), str(tmp_path / "store"))
    done = cli("patterns", "match", tmp_path / "store", checkpoint("mixtral"), "--text", TEXT)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert len(done.err) < 1200


# -- the command line -------------------------------------------------------------------------------------------------


def test_build_list_add_and_match_from_the_command_line(checkpoint, tmp_path):
    folder, store = checkpoint("mixtral"), tmp_path / "store"
    texts = {name: tmp_path / f"{name}.txt" for name in ("math", "code", "law")}
    for number, file in enumerate(texts.values()):
        file.write_text(f"{number} {TEXT} " * 60)
    how = ("--samples", 2, "--length", 32)
    given = ("patterns", "build", folder, "--out", store, *how)
    done = cli(*given, "--task", f"math={texts['math']}", "--task", f"code={texts['code']}", "--json")
    assert done.code == 0, done.err
    assert [t["name"] for t in done.json()["tasks"]] == ["math", "code"]
    assert cli(*given, "--task", f"law={texts['law']}").code == 1  # the store is there
    done = cli("--json", *given, "--task", f"law={texts['law']}", "--add")
    assert done.code == 0, done.err
    listed = cli("patterns", "list", store, "--json").json()
    assert [t["name"] for t in listed["tasks"]] == ["math", "code", "law"]
    assert listed["overlap_half"]["math"]["math"] == 1.0
    assert "law" in cli("patterns", "list", store).out
    found = cli("patterns", "match", store, folder, "--data", texts["law"], *how, "--json").json()
    assert found["task"] == "law"
    assert found["distances"]["law"] < 1e-6
    assert found["tokens"] == 64
    far = cli("patterns", "match", store, folder, "--text", "x", "--threshold", "0.0", "--json").json()
    assert far["task"] is None
    for wrong, code in [
        (("patterns", "match", store, folder), 2),
        (("patterns", "match", store, folder, "--text", ""), 2),
        ((*given, "--overwrite", "--task", "math"), 2),
        ((*given, "--overwrite", "--task", f"m={texts['law']}", "--shift", "up"), 2),
        ((*given, "--overwrite", "--task", f"m={texts['law']}", "--score", "reep"), 2),
        ((*given, "--overwrite", "--task", f"m={tmp_path / 'none.txt'}"), 2),
    ]:
        done = cli(*wrong)
        assert (done.code, "Traceback" in done.err) == (code, False), done.err


def test_demonstrations_build_a_store(checkpoint, tmp_path):
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps({"prompt": "q " * n, "answer": "a"}) + "\n" for n in range(1, 20)))
    done = cli(
        *("patterns", "build", checkpoint("mixtral"), "--out", tmp_path / "store", "--task", f"t={file}"),
        *("--score", "easy-ep", "--set", "mix=sum", "--demonstrations", 3, "--length", 100, "--json"),
    )
    assert done.code == 0, done.err
    assert done.json()["score"] == {"name": "easy-ep", "parameters": {"mix": "sum", "variant": "full"}}
    ids = load_tokenizer(pocket())("q " * 19 + "\n\na")["input_ids"]
    assert abs(done.json()["tasks"][0]["tokens"] - 3 * len(ids)) < 20


def test_a_model_writes_its_own_demonstrations(tmp_path):
    model, tokenizer = coterie.load(str(pocket()), dtype="float32")
    prompts = ["def add(a, b):", "El presidente"]
    file = generate_demonstrations(model, tokenizer, prompts, tmp_path / "d.jsonl", domain="x", max_new_tokens=8)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["answer"] and row["domain"] == "x" for row in rows)
    data = coterie.api.calibration(str(pocket()), [str(file)], demonstrations=2, length=64)
    assert data.samples == 2
    with pytest.raises(DataError, match="no prompt"):
        generate_demonstrations(model, tokenizer, [], tmp_path / "e.jsonl")
    with pytest.raises(CoterieError, match="cannot write"):
        generate_demonstrations(model, tokenizer, ["x"], tmp_path / "no" / "e.jsonl", max_new_tokens=1)
