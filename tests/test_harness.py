"""Benchmark tasks: streamed against the harness' own model class, one sweep for all, comparisons, bad requests."""

# B batch, L sequence, R requests

import ast
import builtins
import functools
import json
import math
import shutil
import socket
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub.constants
import lm_eval.evaluator
import lm_eval.tasks.manager
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

import coterie
import coterie.evaluation
from coterie import api
from coterie.assets import pocket
from coterie.errors import CoterieError, DataError, ModelError, OutputError, UsageError
from coterie.evaluation import harness, likelihood
from coterie.evaluation.likelihood import distinct, likelihoods
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.text import load_tokenizer
from families import FEW, edit_json, saved
from inprocess import cli

TASKS = Path(__file__).parent / "tasks"
OWN = ("--include-path", TASKS)
ALL = ["coterie_choices", "coterie_stories", "coterie_words"]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("no_network")]


@pytest.fixture(scope="module")
def no_network(tmp_path_factory):
    """Any connection fails; data sets are prepared in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))

        def refuse(*arguments):
            raise AssertionError("a test asked the network")

        patch.setattr(socket, "create_connection", refuse)
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Checkpoint folders by family, with the pocket model's vocabulary; each made once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family, seed=0):
        if family == "pocket":
            return pocket()
        return saved(family, root / str(seed), torch.float32, vocab_size=4096, seed=seed)

    return functools.cache(folder)


def opened(folder):
    return StreamedModel(Checkpoint.open(folder), compute_dtype="float32")


def streamed_lm(folder, **options):
    return harness.StreamedLM(opened(folder), load_tokenizer(folder), **options)


def plain_lm(folder, **options):
    """The harness' own class around plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return HFLM(
        pretrained=model, tokenizer=load_tokenizer(folder), **{"batch_size": 1, "logits_cache": False, **options}
    )


def instances(kind, arguments):
    return [Instance(kind, {}, each, number, ("own", number, 1)) for number, each in enumerate(arguments)]


LONG = " ".join(f"the boat number {n} came back late," for n in range(40))
PAIRS = [
    ("The river", " was wide"),
    ("The river ", "was wide"),  # the space belongs to the continuation
    ("The river was", " wide and slow, as every year"),
    ("The river was", " wide"),
    ("The river was", " deep"),
    ("The river was wide", " and"),  # its input begins another one's
    ("", "def main():\n    return 1"),
    ("", "<|endoftext|>The"),  # begins with the start token itself
    ("El presidente", " dijo que no"),
    ("x", "y" * 40),
    (LONG, " again"),  # longer than the model takes
    ("The river", " was wide"),
]
TEXTS = ["Rain.", "The mayor opened the bridge and the children crossed it first.", LONG, ""]


# -- the same numbers as the harness' own class -----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pocket", *FEW])
def test_every_answer_is_that_of_the_harness_own_model_class(checkpoint, family):
    folder = checkpoint(family)
    ours, theirs = streamed_lm(folder, batch_size=3), plain_lm(folder)
    ours._max_length = theirs._max_length = 256
    pairs, texts = instances("loglikelihood", PAIRS), instances("loglikelihood_rolling", [(t,) for t in TEXTS])
    found, expected = ours.loglikelihood(pairs), theirs.loglikelihood(pairs, disable_tqdm=True)
    for (total, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert abs(total - wanted) < 1e-4
        assert greedy == wanted_greedy
    rolling = zip(ours.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts), strict=True)
    for total, wanted in rolling:
        assert total == pytest.approx(wanted, abs=1e-4, rel=2e-7)  # one of them is a sum of 400 tokens
    assert len({round(total, 3) for total, _ in found}) >= len(PAIRS) - 2  # no constant answers


def test_the_greedy_continuation_is_called_greedy(checkpoint):
    lm = plain_lm(pocket())
    context = lm.tok_encode("Once upon a time there was")
    written = lm.model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[0].tolist()
    right = (context, written[len(context) :])
    wrong = (context, [*right[1][:-1], (right[1][-1] + 1) % 4096])
    found = likelihoods(opened(pocket()), [right, wrong], max_length=1024)
    assert found.greedy_R.tolist() == [True, False]


@pytest.mark.parametrize("family", [*FEW, "qwen3-next", "lfm2-moe", "jamba", "deepseek-v2"])
def test_neither_padding_nor_batches_nor_shared_inputs_change_a_log_likelihood(checkpoint, family):
    """Each pair against one plain forward of its own, without any padding."""
    folder, generator = checkpoint(family), torch.Generator().manual_seed(0)
    draw = lambda length: torch.randint(1, 4096, (length,), generator=generator).tolist()  # noqa: E731
    shared = draw(30)
    pairs = [(draw(a), draw(b)) for a, b in ((1, 1), (2, 9), (40, 3), (7, 1), (25, 12))]
    pairs += [(shared, [5]), (shared, [6]), (shared[:12], shared[12:20]), (shared, [5, 7, 9])]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = []
    for context, continuation in pairs:
        with torch.no_grad():
            log_LV = (
                model(torch.tensor([[*context, *continuation]]), use_cache=False).logits[0].double().log_softmax(-1)
            )
        places = range(len(context) - 1, len(context) + len(continuation) - 1)
        expected.append(sum(float(log_LV[place, token]) for place, token in zip(places, continuation, strict=True)))
    for batch_size in (1, 4, None):
        found = likelihoods(opened(folder), pairs, max_length=256, batch_size=batch_size)
        assert found.sum_R.tolist() == pytest.approx(expected, abs=2e-5)
        assert found.rows == 6  # of nine pairs, four share one input
        assert found.tokens == sum(len(c) + len(k) - 1 for c, k in pairs[:5]) + 32


def test_states_that_wait_on_disk_and_logits_in_chunks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randint(1, 4096, (n,), generator=generator).tolist(), [n, n + 1]) for n in range(1, 20)]
    pairs.append((pairs[0][0], torch.randint(1, 4096, (90,), generator=generator).tolist()))
    found = likelihoods(opened(pocket()), pairs, max_length=1024, batch_size=5)
    monkeypatch.setattr(likelihood, "CHUNK_BYTES", 1)  # 16 places at a time
    again = likelihoods(opened(pocket()), pairs, max_length=1024, batch_size=5, memory=0)
    assert torch.equal(again.greedy_R, found.greedy_R)
    assert (again.sum_R - found.sum_R).abs().max() < 1e-5


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple), max_size=25))
@settings(max_examples=200, deadline=None)
def test_every_input_is_the_beginning_of_its_row_and_no_row_begins_another(inputs):
    rows, row_R = distinct(inputs)
    assert len(row_R) == len(inputs)
    assert all(rows[row][: len(ids)] == ids for ids, row in zip(inputs, row_R, strict=True))
    assert set(rows) <= set(inputs)
    assert not any(a != b and b[: len(a)] == a for a in rows for b in rows)
    assert len(set(rows)) == len(rows)
    assert [len(row) for row in rows] == sorted(map(len, rows), reverse=True)


# -- tasks ------------------------------------------------------------------------------------------------------------


class Count(Progress):
    """What a progress bar is told."""

    def __init__(self):
        self.begun, self.seen = [], 0

    def start(self, what, layers, first=0):
        self.begun.append((what, layers))

    def tokens(self, count):
        self.seen += count


@pytest.fixture(scope="module")
def scored():
    """The pocket model on all tasks, streamed, with two examples each."""
    bar = Count()
    (scores,) = api.score_tasks([str(pocket())], ALL, include_path=[str(TASKS)], num_fewshot=2, progress=bar)
    return SimpleNamespace(scores=scores, bar=bar)


def test_all_tasks_and_kinds_of_requests_are_one_sweep_over_the_checkpoint(scored):
    scores, files = scored.scores, Checkpoint.open(pocket())
    embeddings = files.tensors["model.embed_tokens.weight"].nbytes
    assert scored.bar.begun == [("layers", 4)]
    assert (scores.how, scores.sweeps) == ("streamed", 1)
    assert scores.bytes_read == files.nbytes + embeddings  # tied: once to embed, once as the head
    assert scores.requests == 24 * 4 + 22 * 4 + 5 + 12
    assert scores.rows < scores.requests
    assert scored.bar.seen >= scores.tokens * 4


def test_accuracies_and_their_errors_are_those_of_the_harness(scored, monkeypatch):
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)  # slow: asks pip, git and the compiler
    with harness.quiet():
        manager = TaskManager(include_path=str(TASKS), include_defaults=False)
        loaded = harness.find_tasks(ALL, [str(TASKS)])
        manager.load = lambda names: loaded  # data files stand beside the task files
        raw = simple_evaluate(
            plain_lm(pocket(), batch_size=4), tasks=ALL, task_manager=manager, num_fewshot=2, bootstrap_iters=1000
        )
    assert {m.task for m in scored.scores.metrics} == {
        *("coterie_choices", "coterie_patterns", "coterie_sums", "coterie_stories", "coterie_words")
    }
    for m in scored.scores.metrics:
        theirs = raw["results"][m.task]
        assert m.value == pytest.approx(theirs[f"{m.name},{m.filter}"], rel=1e-5), m
        error = theirs[f"{m.name}_stderr,{m.filter}"]
        assert m.stderr == (None if error == "N/A" else pytest.approx(error, rel=1e-4)), m
        assert m.documents == theirs["sample_len"]
    shots = {m.task: m.fewshot for m in scored.scores.metrics}
    assert shots["coterie_patterns"] == shots["coterie_sums"] == 2
    asked = [r.args[0] for r in loaded["tasks"]["coterie_patterns"].instances]
    assert all(context.count("\n\n") == 2 for context in asked)  # two examples, then the question


def test_a_resident_model_has_the_same_scores(scored):
    bar = Count()
    (resident,) = api.score_tasks(
        [str(pocket())], ALL, include_path=str(TASKS), num_fewshot=2, how="resident", progress=bar
    )
    assert resident.how == "resident"
    assert [(m.task, m.name) for m in resident.metrics] == [(m.task, m.name) for m in scored.scores.metrics]
    for ours, theirs in zip(scored.scores.metrics, resident.metrics, strict=True):
        assert ours.value == pytest.approx(theirs.value, rel=1e-5)
    assert [what for what, _ in bar.begun] == ["loglikelihood", "loglikelihood rolling"]
    assert bar.seen == resident.tokens > 0


def test_differences_have_the_error_of_paired_documents(checkpoint):
    names = [str(pocket()), str(checkpoint("mixtral")), str(pocket())]
    first, other, same = api.score_tasks(names, ["coterie_choices", "coterie_words"], include_path=[str(TASKS)])
    for name in ("coterie_patterns", "coterie_choices"):
        key = (name, "acc", "none")
        before, after = first.per_document[key], other.per_document[key]
        assert len(before) == {"coterie_patterns": 24, "coterie_choices": 46}[name]
        changes = [after[document] - before[document] for document in before]
        (metric,) = [m for m in other.metrics if (m.task, m.name) == (name, "acc")]
        assert metric.paired
        assert any(changes)
        assert metric.delta == pytest.approx(statistics.fmean(changes))
        assert metric.delta_stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(len(changes)))
    (metric,) = [m for m in other.metrics if m.name == "perplexity"]
    (reference,) = [m for m in first.metrics if m.name == "perplexity"]
    assert metric.paired is False
    assert metric.delta == metric.value - reference.value
    assert metric.delta_stderr == pytest.approx(math.hypot(metric.stderr, reference.stderr))
    assert {(m.delta, m.delta_stderr) for m in same.metrics if m.paired} == {(0.0, 0.0)}
    (alone,) = api.score_tasks(names[1], ["coterie_choices", "coterie_words"], include_path=[str(TASKS)])
    assert [m.value for m in alone.metrics] == [m.value for m in other.metrics]  # tasks keep nothing of the first model


def test_without_its_tasks_the_model_class_sweeps_once_per_call():
    lm = streamed_lm(pocket())
    lm.loglikelihood(instances("loglikelihood", PAIRS[:2]))
    lm.loglikelihood_rolling(instances("loglikelihood_rolling", [("Rain.",)]))
    assert lm.sweeps == 2
    assert lm.loglikelihood(instances("loglikelihood", PAIRS[:1])) == lm.loglikelihood(
        instances("loglikelihood", PAIRS[:1])
    )
    assert lm.sweeps == 2  # known by now


def test_requests_longer_than_the_model_takes_are_counted(checkpoint, tmp_path):
    folder = shutil.copytree(pocket(), tmp_path / "short")
    edit_json(folder / "config.json", lambda config: config.update(max_position_embeddings=12))
    for how in ("streamed", "resident"):
        (scores,) = api.score_tasks([str(folder)], ["coterie_sums"], include_path=[str(TASKS)], num_fewshot=1, how=how)
        assert "lost their beginning" in scores.warnings[0]
    (scores,) = api.score_tasks([str(pocket())], ["coterie_sums"], include_path=[str(TASKS)])
    assert scores.warnings == []


def test_a_chat_template_is_applied_as_the_harness_does(tmp_path):
    folder = shutil.copytree(pocket(), tmp_path / "chat")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=template))
    plain, chat = (
        api.score_tasks(
            [str(folder)], ["coterie_words"], include_path=[str(TASKS)], num_fewshot=1, apply_chat_template=on
        )[0]
        for on in (False, True)
    )
    (other,) = api.score_tasks(
        [str(folder)],
        ["coterie_words"],
        include_path=[str(TASKS)],
        num_fewshot=1,
        apply_chat_template=True,
        how="resident",
    )
    assert chat.tokens > plain.tokens
    assert [m.value for m in chat.metrics] == pytest.approx([m.value for m in other.metrics], rel=1e-5)
    with pytest.raises(UsageError, match="no chat template"):
        api.score_tasks([str(pocket())], ["coterie_words"], include_path=[str(TASKS)], apply_chat_template=True)


def test_a_seed_draws_other_examples_and_the_same_seed_the_same():
    def values(seed):
        (scores,) = api.score_tasks(
            [str(pocket())], ["coterie_sums"], include_path=[str(TASKS)], num_fewshot=3, seed=seed, limit=6
        )
        return scores.tokens

    assert values(0) == values(0)
    assert len({values(0), values(1), values(2)}) > 1


# -- tasks that write -------------------------------------------------------------------------------------------------


def test_writing_tasks_are_resident_and_as_the_harness_writes():
    (scores,) = api.score_tasks([str(pocket())], ["coterie_writing", "coterie_words"], include_path=[str(TASKS)])
    assert scores.how == "resident"
    found = harness.find_tasks(["coterie_writing"], [str(TASKS)])
    with harness.quiet():
        raw = harness.evaluate(plain_lm(pocket()), found)
    (metric,) = [m for m in scores.metrics if m.name == "exact_match"]
    assert metric.value == raw["results"]["coterie_writing"]["exact_match,none"]
    written = [r.resps[0] for r in found["tasks"]["coterie_writing"].instances]
    assert len(set(written)) > 3


def test_writing_is_refused_where_it_cannot_be_streamed_or_does_not_fit(monkeypatch):
    with pytest.raises(ModelError, match=r"coterie_writing: the model has to write text; streamed") as refused:
        api.score_tasks([str(pocket())], ["coterie_writing"], include_path=[str(TASKS)], how="streamed")
    assert "--resident" in refused.value.hint
    with pytest.raises(ModelError, match="write text"):
        streamed_lm(pocket()).generate_until(instances("generate_until", [("a", {})]))
    monkeypatch.setattr(harness.psutil, "virtual_memory", lambda: SimpleNamespace(available=50_000_000))
    with pytest.raises(ModelError, match=r"0\.0 GB of weights, 0\.1 GB free"):
        api.score_tasks([str(pocket())], ["coterie_writing"], include_path=[str(TASKS)])
    (scores,) = api.score_tasks([str(pocket())], ["coterie_words"], include_path=[str(TASKS)])
    assert scores.how == "streamed"  # whatever the memory


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_metric_and_a_column_per_model(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # data files are found beside their task file
    told = cli("evaluate", pocket(), checkpoint("mixtral"), "--tasks", "coterie_words,coterie_sums", *OWN, "--limit", 5)
    assert told.code == 0, told.err
    rows = [line.split() for line in told.out.splitlines()]
    (perplexity,) = [row for row in rows if row[:2] == ["coterie_words", "perplexity"]]
    assert perplexity[2:4] == ["5", "0"]
    assert len(perplexity) == 4 + 2 + 4  # value and error; value, error, change and its error
    assert any(row[:2] == ["coterie_sums", "acc"] for row in rows)
    assert "1 sweep" in told.err
    assert "--limit" in told.err
    assert "it/s" not in told.err


def test_json_says_everything(checkpoint):
    models = [pocket(), checkpoint("mixtral")]
    told = cli("evaluate", *models, "--tasks", "coterie_patterns", *OWN, "--num-fewshot", 1, "--json")
    assert told.code == 0, told.err
    first, other = told.json()
    assert [first["model"], other["model"]] == [str(m) for m in models]
    assert first["sweeps"] == 1
    assert first["versions"]["lm_eval"]
    metric = other["metrics"][0]
    assert (metric["task"], metric["name"], metric["documents"], metric["fewshot"]) == (
        "coterie_patterns",
        "acc",
        24,
        1,
    )
    assert first["metrics"][0]["delta"] is None
    assert metric["delta"] == metric["value"] - first["metrics"][0]["value"]


def test_what_json_cannot_hold_is_null():
    metric = harness.Metric("t", "perplexity", "none", math.inf, math.nan, 3, 0, False)
    (row,) = harness.TaskScores("m", "streamed", [metric]).describe()["metrics"]
    assert (row["value"], row["stderr"]) == (None, None)


def test_the_harness_is_imported_only_when_tasks_are_scored():
    """No module imports it, or the file that needs it, when it is itself imported."""
    for file in Path(coterie.__file__).parent.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            found = {"lm_eval", "coterie.evaluation.harness", "harness"} & {n.removesuffix(".*") for n in names}
            assert not found or file == Path(harness.__file__), file


# -- what users get wrong ---------------------------------------------------------------------------------------------


def refused(*arguments, says):
    told = cli("evaluate", pocket(), *arguments)
    assert told.code == 2, told.err
    assert "Traceback" not in told.err
    for words in [says] if isinstance(says, str) else says:
        assert words in told.err, told.err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--tasks", "coterie_words", "--data", "x.txt"), ["--tasks and --data", "Give one"]),
        (("--tasks", "coterie_words", "--tokens", "x"), "--tasks and --tokens"),
        (("--tasks", ","), "no task is named"),
        (("--num-fewshot", 2), "no task is named"),
        (("--resident",), "Name some with --tasks"),
        (("--tasks", "coterie_words", *OWN, "--limit", 0), "leaves no document"),
        (("--tasks", "coterie_words", "--include-path", "nowhere"), "no such folder"),
        (("--tasks", "coterie_sums", *OWN, "--num-fewshot", 99), ["cannot be built", "--num-fewshot"]),
        (("--tasks", "coterie_words", *OWN, "--apply-chat-template"), "no chat template"),
        (("--tasks", "coterie_writing", *OWN, "--streamed"), "coterie_writing"),
    ],
)
def test_bad_options_are_told(options, says):
    refused(*options, says=says)


def test_an_unknown_task_names_its_neighbours(monkeypatch):
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(TASKS / "x.py"))  # instead of the harness' 14 000
    refused("--tasks", "coterie_word", says=["no task 'coterie_word'", "'coterie_words'"])
    refused("--tasks", "zzzzzz", says=["no task 'zzzzzz'", "--include-path"])


def task_file(folder, **changes):
    file = folder / "own.yaml"
    words = {"task": "own", "output_type": "loglikelihood", "test_split": "train", "dataset_path": "json"}
    words |= {"doc_to_text": "{{text}}", "doc_to_target": " {{word}}", "metric_list": [{"metric": "acc"}]}
    file.write_text(json.dumps({**words, "dataset_kwargs": {"data_files": "own.jsonl"}, **changes}))
    return file


def test_data_that_cannot_be_had_are_named(tmp_path):
    file = task_file(tmp_path)
    refused("--tasks", file, says=["data of task", "own.jsonl", "--include-path"])
    file = task_file(tmp_path, dataset_path="someone/something", dataset_kwargs={})
    refused("--tasks", "own", "--include-path", tmp_path, says=["'own'", "someone/something", "dataset_path: json"])


def test_broken_task_files_and_empty_answers_are_told(tmp_path):
    (tmp_path / "own.jsonl").write_text('{"text": "a", "word": "b"}\n')
    own = ("--tasks", "own", "--include-path", tmp_path)
    task_file(tmp_path, doc_to_text="{{ missing.field }}")
    refused(*own, says=["task 'own' cannot be built"])
    task_file(tmp_path, unsafe_code=True, dataset_kwargs={"data_files": "none"})  # told before anything is loaded
    refused(*own, says=["runs code that the model writes"])
    task_file(tmp_path, doc_to_target="", target_delimiter="")
    for mode in ("--streamed", "--resident"):
        refused(*own, mode, says=["task 'own', document 0", "empty"])


def test_a_missing_harness_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "coterie.evaluation.harness")
    before = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "lm_eval":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return before(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delattr(coterie.evaluation, "harness")
    refused("--tasks", "coterie_words", says=["lm-evaluation-harness", "pip install 'coterie[eval]'"])


def test_pairs_without_a_log_likelihood_are_refused_before_anything_is_read(monkeypatch):
    model = opened(pocket())
    for pair, says in [
        (([], [1]), "empty context"),
        (([1], []), "empty continuation"),
        (([1], [2] * 9), "9 tokens, more than the 8"),
        (([1], [4096]), "token id 4096; the model knows 4096"),
    ]:
        with pytest.raises(DataError, match=says):
            likelihoods(model, [([1], [2]), pair], max_length=8)
    monkeypatch.setattr(likelihood.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(OutputError, match="hidden states would wait") as told:
        likelihoods(model, [([1] * 100, [2])], max_length=128, memory=0)
    assert "--limit" in told.value.hint
    assert model.checkpoint.bytes_read == 0
    assert likelihoods(model, [], max_length=8).sum_R.tolist() == []


def test_other_failures_are_not_blamed_on_the_task(monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(harness, "likelihoods", broken)
    with pytest.raises(ZeroDivisionError):
        api.score_tasks([str(pocket())], ["coterie_words"], include_path=[str(TASKS)])
    assert not issubclass(ZeroDivisionError, CoterieError)
