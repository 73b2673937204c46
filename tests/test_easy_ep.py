"""EASY-EP: its score against plain loops, what it may not depend on, masks and slices, demonstrations as text."""

# T tokens, H hidden, E experts, K experts per token, D domains

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import coterie
from coterie import api
from coterie.anatomy import moe_layers, narrowed, select
from coterie.assets import pocket
from coterie.compression.methods import get_method
from coterie.compression.selector import Budget, select_layer
from coterie.errors import DataError, UsageError
from coterie.experts.forward import NAME, observe
from coterie.profiling.contribution import TokenContribution, turned
from coterie.profiling.observers import ExpertRows, GateMass, LayerShape, Routing, WeightedOutputNorm
from coterie.profiling.profile import LayerProfile
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData, from_text, load_data, load_tokenizer
from families import FEW, each_tensor, saved, tiny, token_file, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family: saved(family, root))


def padded(seed, rows=3, length=16):
    """Rows of 16, 11 and 6 real tokens of domains 0, 1, 0."""
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        mask[row, length - 5 * row :] = False
    return Batch(tokens(rows, length, seed), mask, torch.arange(rows) % 2)


def profiled(folder, batches, observers=(TokenContribution,), domains=("one", "two")):
    streamed = StreamedModel(Checkpoint.open(folder), compute_dtype="float32")
    data = TokenData(list(batches), list(domains), "x", {d: sum(b.tokens for b in batches) for d in domains})
    return profile_model(streamed, data, observers, model="tiny")


def written(model, folder):
    model.save_pretrained(folder)
    return folder


def by_loops(model, batch, domains=2):
    """{layer: I[d, e]} one sequence and one expert at a time, in float64, by transformers' own experts.

    The hidden state h is what the decoder layer puts out less what its MoE block does: no norm is looked for.
    """
    model = model.double()
    model.set_experts_implementation("eager")
    found = {}
    for layer in moe_layers(model):
        seen = {}
        hooks = [
            layer.experts.register_forward_pre_hook(lambda m, a, seen=seen: seen.update(experts=a)),
            layer.block.register_forward_hook(lambda m, a, o, seen=seen: seen.update(block=o)),
            layer.decoder.register_forward_hook(lambda m, a, o, seen=seen: seen.update(out=o)),
        ]
        I_DE = torch.zeros(domains, layer.num_experts, dtype=torch.float64)
        m = getattr(layer.decoder, "residual_multiplier", 1.0)
        for ids, mask, domain in zip(batch.ids_BL, batch.mask_BL, batch.domain_B):
            with torch.no_grad():
                model(input_ids=ids[mask][None], use_cache=False)
            x_TH, index_TK, weight_TK = seen["experts"][:3]
            block, out = (v[0] if isinstance(v, tuple) else v for v in (seen["block"], seen["out"]))
            H = x_TH.shape[-1]
            h_TH = out.reshape(-1, H) - m * block.reshape(-1, H)
            for t in range(len(x_TH)):
                y_KH = []
                for e in index_TK[t]:
                    one = torch.tensor([[int(e)]])
                    with torch.no_grad():
                        y_KH.append(layer.experts(x_TH[t : t + 1], one, torch.ones(1, 1, dtype=torch.float64))[0])
                added_H = sum(g * y for g, y in zip(weight_TK[t], y_KH))
                s = max(1 - torch.cosine_similarity(h_TH[t], h_TH[t] + m * added_H, dim=0), torch.tensor(0.0))
                for e, g, y in zip(index_TK[t], weight_TK[t], y_KH):
                    I_DE[domain, e] += s * g * y.norm()
        for hook in hooks:
            hook.remove()
        found[layer.index] = I_DE
    return found


@pytest.mark.parametrize(
    ("family", "changes"), [*((f, {}) for f in FEW), ("granite-moe", {"residual_multiplier": 0.22}), ("qwen2-moe", {})]
)
def test_the_score_is_the_papers_formula_token_by_token(family, changes, tmp_path):
    model = tiny(family, **changes)
    folder = written(model, tmp_path / "model")
    layers = profiled(folder, [padded(0)]).layers
    expected = by_loops(model, padded(0))
    assert layers.keys() == expected.keys()
    for index, I_DE in expected.items():
        found_DE = layers[index].contribution_DE
        assert float((found_DE - I_DE).abs().max()) < 2e-4 * float(I_DE.max()), (family, index)
        assert float(I_DE.max()) > 0


@pytest.mark.parametrize("family", FEW)
def test_scores_add_up_over_sequences_whatever_the_batches_and_padding(family, checkpoint):
    a, b = padded(0), padded(7)
    together = profiled(checkpoint(family), [a, b])
    merged = profiled(checkpoint(family), [a]).merge(profiled(checkpoint(family), [b]))
    rows = [Batch(i[m][None], None, d[None]) for x in (a, b) for i, m, d in zip(x.ids_BL, x.mask_BL, x.domain_B)]
    alone = profiled(checkpoint(family), rows)
    for index, layer in together.layers.items():
        value_DE = layer.contribution_DE
        assert bool((value_DE >= 0).all())
        for other in (merged, alone):
            assert torch.allclose(value_DE, other.layers[index].contribution_DE, rtol=2e-5)
        never = profiled_counts(checkpoint(family), [a, b], index) == 0
        assert bool((value_DE.sum(0)[never] == 0).all())


def profiled_counts(folder, batches, index):
    from coterie.profiling.observers import SelectionCount

    return profiled(folder, batches, [SelectionCount]).layers[index].count_E


@pytest.mark.parametrize("family", FEW)
def test_an_expert_that_puts_out_nothing_scores_nothing(family, tmp_path):
    model = tiny(family)
    layer = moe_layers(model)[0]
    with torch.no_grad():
        layer.experts.down_proj[1] = 0
        if layer.bank.has_bias:
            layer.experts.down_proj_bias[1] = 0
    found = profiled(written(model, tmp_path / "m"), [padded(0)]).layers[layer.index].contribution_DE.sum(0)
    assert float(found[1]) == 0
    assert float(found.sum()) > 0


def test_tokens_that_routed_experts_do_not_move_contribute_nothing():
    h_TH = torch.randn(5, 8)
    added_TH = torch.randn(5, 8)
    added_TH[2], added_TH[3] = 0, 3 * h_TH[3]
    s_T = turned(h_TH, added_TH)
    assert s_T[2] < 1e-15
    assert s_T[3] < 1e-13  # longer, not turned
    expected_T = 1 - torch.cosine_similarity(h_TH.double(), (h_TH + added_TH).double())
    assert torch.allclose(s_T, expected_T, atol=1e-7)
    assert torch.allclose(turned(h_TH, added_TH, 0.5), turned(h_TH, added_TH / 2))


def test_small_turns_keep_their_digits():
    """1 - cos of float32 numbers would be 0 here."""
    h = torch.tensor([[1.0, 0.0]])
    s = turned(h, torch.tensor([[0.0, 1e-5]]))
    assert float(s) == pytest.approx(0.5e-10, rel=1e-6)


@pytest.mark.parametrize("family", ["deepseek-v3", "qwen2-moe"])
def test_shared_experts_of_the_last_layer_do_not_change_its_scores(family, tmp_path):
    before, after = tiny(family), tiny(family)
    last = moe_layers(after)[-1]
    assert last.shared
    with torch.no_grad():
        for path in last.shared:
            for parameter in after.get_submodule(path).parameters():
                parameter.mul_(-3.0)
    scores = [
        profiled(written(m, tmp_path / n), [padded(0)]).layers[last.index].contribution_DE
        for m, n in ((before, "a"), (after, "b"))
    ]
    assert torch.equal(*scores)


def test_with_one_expert_of_gate_one_the_score_is_norm_times_turn():
    shape = LayerShape(experts=3, top_k=1, hidden=4, domains=2)
    observer = TokenContribution(shape)
    index_TK = torch.tensor([[0], [2], [0], [2]])
    h_TH, y_TH = torch.randn(4, 4), torch.randn(4, 4)
    domain_T = torch.tensor([0, 0, 1, 1])
    routing = Routing(h_TH, None, torch.ones(4, 1), index_TK, domain_T, domain_T == 0, h_TH)
    observer.see_routing(routing)
    for e in (0, 2):
        row_R = (index_TK[:, 0] == e).nonzero()[:, 0]
        one_R = torch.ones(len(row_R))
        observer.see_outputs(ExpertRows(e, h_TH[row_R], y_TH[row_R], one_R, one_R, row_R))
    observer.see_sum(routing, y_TH)
    value_T = y_TH.norm(dim=1).double() * turned(h_TH, y_TH)
    expected_DE = torch.tensor([[value_T[0], 0, value_T[1]], [value_T[2], 0, value_T[3]]])
    assert torch.allclose(observer.contribution_DE, expected_DE)


@pytest.mark.parametrize("family", FEW)
def test_every_layer_keeps_as_many_and_tokens_get_distinct_survivors(family, checkpoint):
    method, folder = get_method("easy-ep"), checkpoint(family)
    profile = profiled(folder, [padded(0)])
    model = tiny(family).float()
    model.set_experts_implementation(NAME)
    for layer in moe_layers(model):
        scores_E = method.score(profile.layers[layer.index])
        keep = select_layer(scores_E, layer.num_experts // 2, layer, Budget(keep=0.5))
        assert len(keep) == layer.num_experts // 2

        class Tap:
            def routed(self, x_TH, index_TK, weight_TK, keep=keep, layer=layer):
                assert all(len(set(row)) == layer.top_k and set(row) <= set(keep) for row in index_TK.tolist())
                self.seen = True
                return False

        tap = Tap()
        with narrowed(layer, keep), observe(layer.experts, tap), torch.no_grad():
            model(input_ids=tokens())
        assert tap.seen


# -- masks and slices -------------------------------------------------------------------------------------------------


def masked_router(layer, keep):
    """The router of a whole layer with the dropped experts at -inf, written down from the four families' papers."""
    router, E = layer.router, layer.num_experts
    gone_E = torch.ones(E, dtype=torch.bool)
    gone_E[list(keep)] = False
    bias_E = getattr(router, "e_score_correction_bias", None)

    def forward(hidden_states):
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        z_TE = nn.functional.linear(x_TH.float(), router.weight.float(), getattr(router, "bias", None))
        if bias_E is not None:  # DeepSeek-V3
            score_TE = z_TE.sigmoid()
            choice_TE = (score_TE + bias_E).masked_fill(gone_E, -torch.inf)
            best_TG = choice_TE.view(len(x_TH), layer.groups, -1).topk(2, dim=-1)[0].sum(-1)
            used_TG = torch.zeros_like(best_TG).scatter_(1, best_TG.topk(layer.groups_used)[1], 1).bool()
            used_TE = used_TG[:, :, None].expand(-1, -1, E // layer.groups).reshape(-1, E)
            index_TK = choice_TE.masked_fill(~used_TE, -torch.inf).topk(layer.top_k)[1]
            weight_TK = score_TE.gather(1, index_TK)
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20) * router.routed_scaling_factor
        else:  # softmax over the kept, renormalised over the chosen
            weight_TK, index_TK = z_TE.masked_fill(gone_E, -torch.inf).softmax(-1).topk(layer.top_k)
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return z_TE, weight_TK, index_TK

    return forward


def mask(model, keeps):
    """Let a resident model choose among the kept experts only; all weights stay."""
    for layer in moe_layers(model):
        layer.router.forward = masked_router(layer, keeps[layer.index])
    return model


def logits(model, ids=None):
    with torch.no_grad():
        return model(input_ids=tokens(2, 20, 3) if ids is None else ids).logits


def some(layer, share, seed=0):
    """Random experts of a layer, the same number in every routing group."""
    size = layer.num_experts // layer.groups
    generator = torch.Generator().manual_seed(seed + layer.index)
    picks = [torch.randperm(size, generator=generator)[: int(size * share)] + g * size for g in range(layer.groups)]
    return sorted(torch.cat(picks).tolist())


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("share", [0.5, 0.75, 1.0])
def test_mask_and_slice_are_the_same_model(family, share):
    keeps = {layer.index: some(layer, share) for layer in moe_layers(tiny(family))}
    expected = logits(mask(tiny(family), keeps))
    sliced = tiny(family)
    for layer in moe_layers(sliced):
        select(layer, keeps[layer.index])
    assert torch.allclose(logits(sliced), expected, atol=2e-5)
    if share == 1.0:
        assert torch.equal(logits(sliced), logits(tiny(family)))
    else:
        assert not torch.allclose(expected, logits(tiny(family)), atol=1e-3)


@pytest.mark.parametrize("family", FEW)
def test_compressing_writes_the_masked_model(family, checkpoint, tmp_path):
    out = tmp_path / "out"
    ids = token_file(tmp_path / "ids.safetensors")
    result = coterie.compress(str(checkpoint(family)), str(out), method="easy-ep", keep=0.5, tokens=str(ids))
    keeps = {layer.index: layer.keep for layer in result.plan.layers}
    small, _ = coterie.load(str(out), dtype="float32")
    whole, _ = coterie.load(str(checkpoint(family)), dtype="float32")
    assert torch.allclose(logits(small), logits(mask(whole, keeps)), atol=2e-5)


def test_keeping_all_writes_the_same_tensors(checkpoint, tmp_path):
    ids = token_file(tmp_path / "ids.safetensors")
    coterie.compress(str(checkpoint("mixtral")), str(tmp_path / "out"), method="easy-ep", keep=1.0, tokens=str(ids))
    before, after = each_tensor(checkpoint("mixtral")), each_tensor(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


# -- mixing and ablations ---------------------------------------------------------------------------------------------


def of(contribution_DE):
    return LayerProfile(0, "l", contribution_DE.shape[1], 2, 10, stats={"contribution_DE": contribution_DE.double()})


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-6, 1e6), st.integers(0, 2))
def test_the_mix_does_not_depend_on_one_domains_scale(seed, scale, domain):
    I_DE = torch.rand(3, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scaled_DE = I_DE.clone()
    scaled_DE[domain] *= scale
    equal, plain = get_method("easy-ep"), get_method("easy-ep", {"mix": "sum"})
    assert torch.allclose(equal.score(of(I_DE)), equal.score(of(scaled_DE)))
    assert torch.allclose(plain.score(of(I_DE)), I_DE.sum(0))


def test_of_one_domain_the_mix_is_its_own_ranking():
    I_DE = torch.tensor([[3.0, 0.0, 7.0, 1.0]])
    score_E = get_method("easy-ep").score(of(I_DE))
    assert score_E.tolist() == pytest.approx([3 / 11, 0, 7 / 11, 1 / 11])
    assert torch.equal(get_method("easy-ep").score(of(torch.zeros(1, 4))), torch.zeros(4).double())


def test_ablations_read_what_other_methods_read(checkpoint):
    layers = profiled(checkpoint("qwen3-moe"), [padded(0)], [GateMass, WeightedOutputNorm]).layers
    for layer in layers.values():
        assert torch.equal(get_method("easy-ep", {"variant": "gate"}).score(layer), layer.gate_mass_E)
        assert torch.equal(get_method("easy-ep", {"variant": "gate-norm"}).score(layer), layer.weighted_norm_E)
    assert get_method("easy-ep", {"variant": "gate"}).observes() == (GateMass,)


# -- demonstrations ---------------------------------------------------------------------------------------------------


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def said(data, tokenizer):
    return [
        tokenizer.decode(ids[m] if data.batches[b].mask_BL is not None else ids)
        for b, batch in enumerate(data.batches)
        for ids, m in zip(batch.ids_BL, batch.mask_BL if batch.mask_BL is not None else batch.ids_BL >= 0)
    ]


@pytest.fixture
def tokenizer():
    return load_tokenizer(pocket())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "two and two"}, {"role": "assistant", "content": "is four"}]},
        {"prompt": "two and two", "answer": "is four"},
    ],
)
def test_dialogues_go_through_the_chat_template(row, tmp_path, tokenizer):
    file = jsonl(tmp_path / "d.jsonl", [row])
    tokenizer.chat_template = TEMPLATE
    data = load_data([file], tokenizer, samples=1, length=64, pack=False)
    assert said(data, tokenizer) == ["<user>two and two<assistant>is four"]
    assert data.warnings == []
    tokenizer.chat_template = None
    data = load_data([file], tokenizer, samples=1, length=64, pack=False)
    assert said(data, tokenizer)[0].endswith("two and two\n\nis four")
    assert "no chat template" in data.warnings[0]


def test_special_tokens_are_the_templates_business():
    class Adds:
        """A tokenizer that puts a start token before a text unless told not to."""

        chat_template, bos_token_id, eos_token_id, cls_token_id = TEMPLATE, 1, 2, None

        def apply_chat_template(self, dialogue, tokenize):
            return "".join(turn["content"] for turn in dialogue)

        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": [1] * add_special_tokens + [10 + len(text)]}

    dialogue = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert from_text(dialogue, Adds()).batches[0].ids_BL.tolist() == [[13]]
    assert from_text("abc", Adds()).batches[0].ids_BL.tolist() == [[1, 13]]


def test_the_longest_demonstrations_come_first_whole_and_unpacked(tmp_path, tokenizer):
    rows = [{"prompt": "q" * n, "answer": "a", "domain": d} for n in range(1, 30) for d in ("one", "two")]
    file = jsonl(tmp_path / "d.jsonl", rows)
    given = {"tokenizer": str(pocket()), "demonstrations": 3, "length": 64}
    data = api.calibration(str(pocket()), [file], seed=1, **given)
    lengths = sorted(text.count("q") for text in said(data, tokenizer))
    assert lengths == [27, 27, 28, 28, 29, 29]
    assert data.domains == ["one", "two"]
    with pytest.raises(UsageError, match="0 demonstrations"):
        api.calibration(str(pocket()), [file], **{**given, "demonstrations": 0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "line 2: `messages` must be"),
        ({"messages": [{"role": "user"}]}, "line 2: `messages` must be"),
        ({"messages": "hello"}, "line 2: `messages` must be"),
        ({"prompt": "hello"}, "line 2: `prompt` needs an `answer`"),
        ({"prompt": "hello", "answer": 3}, "line 2: `prompt` needs an `answer`"),
        ({"title": "hello"}, "line 2 has no `text`"),
    ],
)
def test_broken_demonstrations_are_named_with_their_line(row, message, tmp_path, tokenizer):
    file = jsonl(tmp_path / "d.jsonl", [{"text": "good"}, row])
    with pytest.raises(DataError, match=message):
        load_data([file], tokenizer, samples=1, length=64, pack=False)


def test_no_demonstration_is_an_error(tmp_path, tokenizer):
    for rows in ([], [{"prompt": " ", "answer": ""}]):
        with pytest.raises(DataError, match="no text in"):
            load_data([jsonl(tmp_path / "d.jsonl", rows)], tokenizer, samples=5, length=64, pack=False)
    with pytest.raises(DataError, match="the query is empty"):
        from_text("  ", tokenizer, name="query")


def test_a_template_that_refuses_a_dialogue_is_a_typed_error(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    file = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(DataError, match="roles must alternate"):
        load_data([file], tokenizer, samples=1, length=64, pack=False)


def test_the_command_line_takes_demonstrations(tmp_path):
    import json

    from inprocess import cli

    source = saved("mixtral", tmp_path, vocab_size=4096)
    file = tmp_path / "chat.jsonl"
    lines = [{"prompt": f"Count to {n}.", "answer": " ".join(map(str, range(n)))} for n in (5, 40, 20)]
    file.write_text("\n".join(map(json.dumps, lines)))
    asked = ("--method", "easy-ep", "--keep", 0.5, "--data", file, "--length", 64, "--demonstrations", 2)
    done = cli("compress", source, tmp_path / "out", *asked, "--json")
    assert done.code == 0, done.err
    record = done.json()
    assert record["recipe"]["samples"] == 2
    assert cli("profile", source, "--out", tmp_path / "seen", "--data", file, "--demonstrations", 1).code == 0
