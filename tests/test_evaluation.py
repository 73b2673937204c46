"""Losses against plain transformers; comparisons of models; intervals; text to batches."""

# B batch, L sequence, V vocabulary, S sequences

import functools
import gzip
import itertools
import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from coterie.assets import pocket
from coterie.errors import DataError
from coterie.evaluation import compare
from coterie.evaluation.bootstrap import interval
from coterie.evaluation.compare import HiddenStates, ModelResult, evaluate_models
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Batch
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData, load_data, load_tokenizer, load_tokens
from families import FEW, resident, saved, tiny, token_file, tokens

# Granite multiplies embeddings, attention, residuals and divides logits; the default config does none of it.
GRANITE = {"logits_scaling": 4.0, "embedding_multiplier": 6.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
CHANGES = {"granite-moe": GRANITE}
LOSSES = ("qwen3-moe", "gpt-oss", "granite-moe")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint folders by family and seed, each made once."""
    root = tmp_path_factory.mktemp("checkpoints")
    return functools.cache(lambda family, seed=0: saved(family, root / str(seed), seed=seed, **CHANGES.get(family, {})))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(pocket())


def opened(folder):
    return StreamedModel(Checkpoint.open(folder), compute_dtype="float32")


def text(padded=True):
    """Five sequences of two domains in two batches; padding in the first."""
    mask = torch.ones(3, 20, dtype=torch.bool)
    if padded:
        mask[1, 13:], mask[2, 2:] = False, False
    batches = [Batch(tokens(3, 20), mask if padded else None, torch.tensor([0, 1, 0]))]
    batches.append(Batch(tokens(2, 24, seed=1), None, torch.tensor([1, 1])))
    return TokenData(batches, ["prose", "code"], "digest", {})


def evaluate(folders, data, **options):
    return evaluate_models([(f"model {n}", opened(f)) for n, f in enumerate(folders)], data, **options)


def per_sequence(folder, data):
    """[(domain, log-probabilities [L-1, V], targets [L-1])] of every sequence, by plain transformers."""
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    for batch in data.batches:
        mask_BL = torch.ones_like(batch.ids_BL) if batch.mask_BL is None else batch.mask_BL.long()
        with torch.no_grad():
            log_BLV = model(batch.ids_BL, attention_mask=mask_BL, use_cache=False).logits.double().log_softmax(-1)
        for row, real in enumerate(mask_BL.sum(1).tolist()):
            found.append((int(batch.domain_B[row]), log_BLV[row, : real - 1], batch.ids_BL[row, 1:real]))
    return found


# -- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", LOSSES)
def test_the_loss_of_a_domain_is_the_cross_entropy_of_plain_transformers(family, padded, checkpoint):
    data = text(padded)
    (result,) = evaluate([checkpoint(family)], data)
    plain = per_sequence(checkpoint(family), data)
    assert [d.domain for d in result.domains] == data.domains
    for number, found in enumerate(result.domains):
        log_TV = torch.cat([log for domain, log, _ in plain if domain == number])
        target_T = torch.cat([target for domain, _, target in plain if domain == number])
        assert found.tokens == len(target_T)
        assert found.loss == pytest.approx(float(F.nll_loss(log_TV, target_T)), abs=2e-5)
        assert found.perplexity == pytest.approx(float(F.nll_loss(log_TV, target_T).exp()), rel=2e-5)


def test_granites_logit_scaling_matters_in_this_test(checkpoint, tmp_path):
    """Otherwise the test above would pass without the family's own head."""
    unscaled = saved("granite-moe", tmp_path, **{**GRANITE, "logits_scaling": 1.0})
    (one,), (two,) = evaluate([checkpoint("granite-moe")], text()), evaluate([unscaled], text())
    assert abs(one.mean_loss - two.mean_loss) > 0.01


@pytest.mark.parametrize("family", FEW)
def test_losses_do_not_depend_on_batches_or_padding(family, checkpoint):
    data = text()
    rows = []
    for batch in data.batches:
        masks = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
        rows += [Batch(i[m][None], None, d[None]) for i, m, d in zip(batch.ids_BL, masks, batch.domain_B)]
    (one,), (two,) = (evaluate([checkpoint(family)], d) for d in (data, TokenData(rows[::-1], data.domains, "", {})))
    for a, b in zip(one.domains, two.domains, strict=True):
        assert a.tokens == b.tokens
        assert a.loss == pytest.approx(b.loss, abs=2e-5)


@pytest.mark.parametrize("family", [*LOSSES, "deepseek-v3"])
def test_computing_logits_in_chunks_changes_nothing_beyond_1e_6(family, checkpoint, monkeypatch):
    folders = [checkpoint(family), checkpoint(family, 1)]
    whole = evaluate(folders, text())
    calls, original = [], compare.logits
    monkeypatch.setattr(compare, "CHUNK_BYTES", 1)
    monkeypatch.setattr(compare, "logits", lambda s, h: calls.append(h.shape[1]) or original(s, h))
    chunked = evaluate(folders, text())
    assert max(calls) == 16  # really in chunks
    for one, two in zip(whole, chunked, strict=True):
        for a, b in zip(one.domains, two.domains, strict=True):
            assert a.loss == pytest.approx(b.loss, abs=1e-6)
            assert a.agreement == b.agreement
            if a.kl is not None:
                assert a.kl == pytest.approx(b.kl, abs=1e-6)


@pytest.mark.parametrize("family", ["qwen3-moe", "gpt-oss"])
def test_hidden_states_in_files_give_the_same_numbers(family, checkpoint, monkeypatch):
    folders, files = [checkpoint(family), checkpoint(family, 1)], []
    in_memory = evaluate(folders, text())
    original = compare.save_file
    monkeypatch.setattr(compare, "save_file", lambda tensors, file: files.append(file) or original(tensors, file))
    assert evaluate(folders, text(), memory=0) == in_memory
    assert len(files) == 4  # two models, two batches
    assert not any(file.exists() for file in files)


def test_a_full_disk_for_hidden_states_is_an_error_a_user_can_read(monkeypatch):
    def full(tensors, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compare, "save_file", full)
    with pytest.raises(compare.OutputError, match="hidden states"):
        HiddenStates(0).put(0, Batch(tokens()), torch.zeros(1, 2, 3))


def test_a_domain_without_a_token_to_predict_is_refused_before_anything_is_read(checkpoint):
    data = TokenData([Batch(tokens(2, 8)[:, :1], None, torch.zeros(2).long())], ["prose"], "", {})
    model = opened(checkpoint("qwen3-moe"))
    with pytest.raises(DataError, match="'prose' has no token to predict"):
        evaluate_models([("model", model)], data)
    assert model.checkpoint.bytes_read == 0


# -- two models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FEW, "granite-moe"])
def test_a_model_against_itself_shows_no_difference(family, checkpoint):
    one, two = evaluate([checkpoint(family), checkpoint(family)], text())
    for a, b in zip(one.domains, two.domains, strict=True):
        assert (b.kl, b.kl_low, b.kl_high) == (0.0, 0.0, 0.0)
        assert (b.delta, b.delta_low, b.delta_high) == (0.0, 0.0, 0.0)
        assert b.agreement == 1.0
        assert (a.loss, a.loss_low, a.loss_high) == (b.loss, b.loss_low, b.loss_high)
    assert (two.mean_kl, two.mean_agreement) == (0.0, 1.0)


@pytest.mark.parametrize("family", LOSSES)
def test_kl_and_agreement_are_those_of_plain_transformers(family, checkpoint):
    data, folders = text(), [checkpoint(family), checkpoint(family, 1)]
    one, two = evaluate(folders, data)
    p, q = (per_sequence(folder, data) for folder in folders)
    for number, found in enumerate(two.domains):
        log_p = torch.cat([log for domain, log, _ in p if domain == number])
        log_q = torch.cat([log for domain, log, _ in q if domain == number])
        expected = float(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
        assert expected > 1e-3
        assert found.kl == pytest.approx(expected, rel=1e-3, abs=2e-6)
        assert found.agreement == pytest.approx(float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))
        assert found.delta == pytest.approx(found.loss - one.domains[number].loss, abs=1e-9)


def test_the_first_model_has_nothing_to_be_compared_with(checkpoint):
    (one,) = evaluate([checkpoint("qwen3-moe")], text())
    assert (one.mean_kl, one.mean_agreement) == (None, None)
    assert all((d.kl, d.agreement, d.delta) == (None, None, 0.0) for d in one.domains)


def test_every_model_is_compared_with_the_first(checkpoint):
    a, b = checkpoint("qwen3-moe"), checkpoint("qwen3-moe", 1)
    _, second, third = evaluate([a, b, a], text())
    assert second.mean_kl > 1e-3
    assert third.mean_kl == 0.0


def test_a_mean_weighs_domains_equally(checkpoint):
    (result,) = evaluate([checkpoint("qwen3-moe")], text())
    prose, code = result.domains
    assert prose.tokens != code.tokens
    assert result.mean_loss == pytest.approx((prose.loss + code.loss) / 2, rel=1e-12)


def test_results_are_json(checkpoint):
    _, two = evaluate([checkpoint("qwen3-moe"), checkpoint("qwen3-moe", 1)], text())
    described = json.loads(json.dumps(two.describe(), allow_nan=False))
    assert described["model"] == "model 1"
    assert described["mean"] == {"loss": two.mean_loss, "kl": two.mean_kl, "agreement": two.mean_agreement}
    assert [d["domain"] for d in described["domains"]] == ["prose", "code"]
    assert isinstance(two, ModelResult)


# -- intervals --------------------------------------------------------------------------------------------------------


def draws(S, seed=0, spread=1.0):
    """(sums, tokens) of S sequences of 10 to 50 tokens whose mean per token is 2."""
    g = torch.Generator().manual_seed(seed)
    tokens_S = torch.randint(10, 51, (S,), generator=g)
    return (2 + spread * torch.randn(S, generator=g, dtype=torch.float64)) * tokens_S, tokens_S


@pytest.mark.parametrize("S", [2, 5, 50])
def test_an_interval_covers_its_mean(S):
    for seed in range(20):
        sum_S, tokens_S = draws(S, seed)
        mean, low, high = interval(sum_S, tokens_S)
        assert mean == pytest.approx(float(sum_S.sum() / tokens_S.sum()))
        assert low < mean < high


def test_a_95_percent_interval_covers_the_truth_about_as_often():
    covered = 0
    for seed in range(300):
        _, low, high = interval(*draws(40, seed), resamples=300)
        covered += low < 2 < high
    assert 0.89 <= covered / 300 <= 0.98


def test_a_level_is_the_share_that_is_covered():
    wide, narrow = interval(*draws(40), level=0.99), interval(*draws(40), level=0.5)
    assert wide[1] < narrow[1] < narrow[2] < wide[2]


def test_an_interval_depends_on_its_seed_alone():
    torch.manual_seed(1)
    one = interval(*draws(20), seed=3)
    torch.manual_seed(2)
    assert interval(*draws(20), seed=3) == one
    assert interval(*draws(20), seed=4)[1:] != one[1:]


def test_an_interval_shrinks_with_the_root_of_the_number_of_sequences():
    width = {S: sum((r := interval(*draws(S, seed)))[2] - r[1] for seed in range(8)) / 8 for S in (20, 80, 320)}
    assert width[20] / width[80] == pytest.approx(2, rel=0.3)
    assert width[80] / width[320] == pytest.approx(2, rel=0.3)


def test_a_single_sequence_has_no_interval():
    assert interval(torch.tensor([6.0]), torch.tensor([3])) == (2.0, 2.0, 2.0)


def test_sequences_are_resampled_whole_not_token_by_token():
    """Ten tokens that are alike in each sequence say no more than one of them."""
    g = torch.Generator().manual_seed(0)
    value_S = torch.randn(30, generator=g, dtype=torch.float64)
    one, ten = (interval(value_S * n, torch.full((30,), n)) for n in (1, 10))
    assert one == pytest.approx(ten)


def test_a_paired_interval_is_narrower_than_two_unpaired_ones_for_nearly_equal_models(tmp_path):
    model = tiny("qwen3-moe", torch.bfloat16)
    model.save_pretrained(tmp_path / "one")
    model.model.layers[2].mlp.experts.down_proj.data[0] *= 1.5
    model.save_pretrained(tmp_path / "two")
    data = TokenData([Batch(tokens(12, 16), None, torch.zeros(12).long())], ["prose"], "", {})
    one, two = (result.domains[0] for result in evaluate([tmp_path / "one", tmp_path / "two"], data))
    assert two.delta_low <= two.delta <= two.delta_high
    assert two.delta_low < two.delta_high
    widths = (two.delta_high - two.delta_low, one.loss_high - one.loss_low, two.loss_high - two.loss_low)
    assert widths[0] < 0.5 * min(widths[1:])


# -- text -------------------------------------------------------------------------------------------------------------

DOCUMENTS = [f"Document {n} tells of {n * n} things, and of a few more. " * (1 + n % 4) for n in range(30)]


def write_jsonl(path, rows, opener=open):
    with opener(path, "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.fixture
def prose(tmp_path):
    return write_jsonl(tmp_path / "prose.jsonl", [{"text": t} for t in DOCUMENTS])


def ids_of(data):
    """Every sequence without its padding, in order."""
    masks = [torch.ones_like(b.ids_BL, dtype=torch.bool) if b.mask_BL is None else b.mask_BL for b in data.batches]
    return [ids[mask].tolist() for b, ms in zip(data.batches, masks) for ids, mask in zip(b.ids_BL, ms)]


def documents_of(tokenizer):
    """Ids of every document with the start token before it."""
    return {(tokenizer.bos_token_id, *tokenizer(t, add_special_tokens=False)["input_ids"]) for t in DOCUMENTS}


def test_packed_windows_are_full(prose, tokenizer):
    data = load_data([prose], tokenizer, samples=6, length=32)
    assert all(b.mask_BL is None for b in data.batches)
    assert [len(ids) for ids in ids_of(data)] == [32] * 6
    assert (data.samples, data.length, data.tokens, data.warnings) == (6, 32, {"prose": 192}, [])


def test_packed_windows_are_whole_documents_one_after_another_each_behind_the_start_token(prose, tokenizer):
    stream = [i for window in ids_of(load_data([prose], tokenizer, samples=6, length=32)) for i in window]
    start, known = tokenizer.bos_token_id, documents_of(tokenizer)
    edges = [n for n, i in enumerate(stream) if i == start] + [len(stream)]
    pieces = [tuple(stream[a:b]) for a, b in itertools.pairwise(edges)]
    assert edges[0] == 0
    assert len(pieces) > 3
    assert all(piece in known for piece in pieces[:-1])
    assert any(document[: len(pieces[-1])] == pieces[-1] for document in known)


def test_a_document_is_packed_only_once(prose, tokenizer):
    data = load_data([prose], tokenizer, samples=10**6, length=8)
    stream = sum(len(ids) for ids in ids_of(data))
    assert 0 <= sum(map(len, documents_of(tokenizer))) - stream < 8


@pytest.mark.parametrize("add_start", [False, True])
def test_a_start_token_that_the_tokenizer_adds_itself_is_not_doubled(add_start, prose):
    class Words:
        """A tokenizer with a start token of its own, in front of a document or not."""

        bos_token_id, eos_token_id, cls_token_id, pad_token_id = 1, 2, None, 0

        def __call__(self, text, add_special_tokens=True, **options):
            ids = [3 + len(word) for word in text.split()]
            return {"input_ids": [1, *ids] if add_special_tokens and add_start else ids}

    for ids in ids_of(load_data([prose], Words(), samples=5, length=100, pack=False)):
        assert ids[0] == 1
        assert 1 not in ids[1:]


def test_without_packing_a_sequence_is_one_document_padded_on_the_right(prose, tokenizer):
    data = load_data([prose], tokenizer, samples=8, length=24, batch_size=4, pack=False)
    known = {document[:24] for document in documents_of(tokenizer)}
    assert {tuple(ids) for ids in ids_of(data)} <= known
    assert len(ids_of(data)) == 8
    assert any(b.mask_BL is not None for b in data.batches)
    for batch in data.batches:
        if batch.mask_BL is not None:
            assert (batch.mask_BL[:, :-1] >= batch.mask_BL[:, 1:]).all()  # once padding begins it goes on to the end
            assert (batch.ids_BL[~batch.mask_BL] == tokenizer.pad_token_id).all()


@pytest.mark.parametrize("pack", [True, False])
def test_samples_and_digest_do_not_depend_on_the_batch_size(pack, prose, tokenizer):
    options = {"samples": 7, "length": 24, "pack": pack}
    one, two = (load_data([prose], tokenizer, batch_size=size, **options) for size in (1, 4))
    assert ids_of(one) == ids_of(two)
    assert one.digest == two.digest
    assert (len(one.batches), len(two.batches)) == (7, 2)


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 25}, {"samples": 6}, {"pack": False}])
def test_a_digest_tells_other_samples_apart(change, prose, tokenizer):
    options = {"samples": 7, "length": 24}
    assert (
        load_data([prose], tokenizer, **options).digest != load_data([prose], tokenizer, **{**options, **change}).digest
    )


def test_a_digest_tells_domains_apart(tmp_path):
    """The same ids under two names; loaded text of two names would be in another order as well."""
    one, two = (load_tokens(token_file(tmp_path / f"{name}.safetensors")) for name in ("one", "two"))
    assert ids_of(one) == ids_of(two)
    assert one.digest != two.digest


def test_the_order_of_documents_is_seeded(prose, tokenizer):
    one, again, other = (load_data([prose], tokenizer, samples=5, length=24, seed=seed) for seed in (3, 3, 4))
    assert ids_of(one) == ids_of(again)
    assert ids_of(one) != ids_of(other)


def test_a_domain_is_what_its_field_says_else_the_name_of_the_file(tmp_path, tokenizer):
    rows = [{"text": t, "domain": "maths"} if n % 2 else {"text": t} for n, t in enumerate(DOCUMENTS)]
    write_jsonl(tmp_path / "mixed.jsonl", rows)
    write_jsonl(tmp_path / "more.jsonl.gz", [{"text": t} for t in DOCUMENTS], gzip.open)
    (tmp_path / "plain.txt").write_text(" ".join(DOCUMENTS))
    data = load_data([str(tmp_path)], tokenizer, samples=3, length=16)
    assert data.domains == ["maths", "mixed", "more", "plain"]


def test_every_domain_gives_the_same_number_of_samples_numbered_by_domain(tmp_path, tokenizer):
    for name in ("b", "a", "c"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {t}"} for t in DOCUMENTS])
    data = load_data([str(tmp_path)], tokenizer, samples=4, length=16, batch_size=3)
    assert torch.cat([b.domain_B for b in data.batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.domains == ["a", "b", "c"]
    assert data.tokens == {"a": 64, "b": 64, "c": 64}
    for number, name in enumerate(data.domains):
        first = ids_of(data)[4 * number]
        assert tokenizer.decode(first).removeprefix(tokenizer.bos_token).startswith(f"{name} Document")


def test_a_domain_with_too_little_text_warns_and_with_none_is_refused(tmp_path, tokenizer):
    write_jsonl(tmp_path / "short.jsonl", [{"text": DOCUMENTS[0]}])
    data = load_data([str(tmp_path)], tokenizer, samples=1000, length=4)
    assert data.warnings == [f"domain 'short' gives only {data.samples} of 1000 samples of 4 tokens"]
    with pytest.raises(DataError, match="'short' is too short"):
        load_data([str(tmp_path)], tokenizer, samples=1, length=1000)


def test_loss_of_loaded_text_is_that_of_the_resident_model_on_the_same_windows(prose, tokenizer, tmp_path):
    folder = saved("qwen3-moe", tmp_path, vocab_size=len(tokenizer))
    data = load_data([prose], tokenizer, samples=6, length=24, batch_size=4, pack=False)
    (result,) = evaluate([folder], data)
    model, losses = resident(folder), []
    for ids in ids_of(data):
        with torch.no_grad():
            logits_LV = model(torch.tensor([ids]), use_cache=False).logits[0]
        losses.append(F.cross_entropy(logits_LV[:-1], torch.tensor(ids[1:]), reduction="none"))
    assert result.domains[0].loss == pytest.approx(float(torch.cat(losses).double().mean()), abs=2e-5)
