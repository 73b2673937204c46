"""Benchmarks of the lm-evaluation-harness (`lm_eval`), also for models that do not fit in memory.

`lm_eval.evaluate` builds the requests of all tasks first and then asks the model once per kind of request.
`StreamedLM` answers the first such call for all kinds and all tasks together: one sweep over the checkpoint, however
many tasks there are. `ResidentLM` is the harness' own model class around a model in memory, and can also generate text.

Everything about text is the harness' own `HFLM` in both: a context and its continuation are encoded together and split,
spaces at the end of a context belong to the continuation, special tokens are added as the tokenizer does by itself
(never twice), an empty context becomes the beginning-of-text token (end-of-text where there is none), too long inputs
lose their beginning, rolling log-likelihoods use its windows. The only difference: log-probabilities are always taken
in float32. This file knows tasks and requests, not weights; importing it imports lm_eval.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import math
import os
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch
import tqdm
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from coterie.errors import CoterieError, DataError, ModelError, UsageError
from coterie.evaluation.likelihood import Pair, check_pairs, likelihoods
from coterie.streaming.config import one_line
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel

STREAMABLE = ("loglikelihood", "loglikelihood_rolling")
BOOTSTRAP = 1000  # resamples for the standard errors of metrics that are no means; means have a formula
WRITES = "the model has to write text"
FILLS = 0.8  # of the free memory a resident model may take; activations and logits need the rest


@dataclass
class Metric:
    """One number of one task.

    task, name, filter : as the harness calls them. documents, fewshot : how many, and examples before each.
    value, stderr : as the harness computes them; stderr is None where it has none.
    delta, delta_stderr : difference to the first model. `paired`: its error is computed from the differences of single
    documents, which is smaller than what both models' own errors say; otherwise from these.
    """

    task: str
    name: str
    filter: str
    value: float
    stderr: float | None
    documents: int
    fewshot: int | None
    higher_is_better: bool | None
    delta: float | None = None
    delta_stderr: float | None = None
    paired: bool | None = None


@dataclass
class TaskScores:
    """One model on all tasks, and what it cost.

    how : "streamed" or "resident". sweeps, bytes_read : over and from the checkpoint. requests : what the tasks asked.
    rows, tokens : inputs that were run for it, without padding. seconds : without building the requests.
    """

    model: str
    how: str
    metrics: list[Metric] = field(default_factory=list)
    requests: int = 0
    rows: int = 0
    tokens: int = 0
    sweeps: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    limit: float | None = None
    warnings: list[str] = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    per_document: dict[tuple[str, str, str], dict[tuple[str, int], float]] = field(default_factory=dict, repr=False)

    def describe(self) -> dict[str, Any]:
        """For JSON, which knows no NaN and no infinity: these become None."""
        own = {name: value for name, value in vars(self).items() if name not in ("metrics", "per_document")}
        rows = [asdict(metric) for metric in self.metrics]
        for row in rows:
            row.update((n, None) for n, v in row.items() if isinstance(v, float) and not math.isfinite(v))
        return {**own, "metrics": rows}

    def compare(self, first: TaskScores) -> None:
        """Fill in the differences to `first`."""
        theirs = {(m.task, m.name, m.filter): m for m in first.metrics}
        for metric in self.metrics:
            key = (metric.task, metric.name, metric.filter)
            if key not in theirs:
                continue
            other = theirs[key]
            metric.delta = metric.value - other.value
            here, there = self.per_document.get(key, {}), first.per_document.get(key, {})
            metric.paired = bool(here) and here.keys() == there.keys()
            if metric.paired:
                metric.delta_stderr = _mean_stderr([here[document] - there[document] for document in here])
            elif metric.stderr is not None and other.stderr is not None:
                metric.delta_stderr = math.hypot(metric.stderr, other.stderr)


def _mean_stderr(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


# ---- the two models ----


class StreamedLM(HFLM):  # type: ignore[misc]
    """A checkpoint on disk as the harness sees it; log-likelihoods only.

    Parameters
    ----------
    tasks : what will be asked; with it the first question is answered together with all others, in one sweep.
        Without it there is one sweep per call.
    batch_size : rows per batch; None: about 8192 tokens' worth. memory : see `likelihoods`.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        tokenizer: Any,
        *,
        tasks: Sequence[Any] = (),
        batch_size: int | None = None,
        memory: int = 2 * 2**30,
        progress: Progress | None = None,
    ) -> None:
        with quiet():
            super().__init__(pretrained=streamed.model, tokenizer=tokenizer, backend="causal")
        self.streamed, self.tasks, self.rows_per_batch = streamed, tasks, batch_size
        self.memory, self.progress = memory, progress
        self.asked, self.rows, self.tokens, self.sweeps, self.bytes_read, self.cut = 0, 0, 0, 0, 0, 0
        self._known: dict[tuple[str, tuple[str, ...]], tuple[float, bool]] = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        _check_continuations(requests)
        return self._answers("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        return [total for total, _ in self._answers("loglikelihood_rolling", requests)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise cannot_generate(sorted({str(request.task_name) for request in requests}))

    def _answers(self, kind: str, requests: list[Any]) -> list[tuple[float, bool]]:
        self.asked += len(requests)
        questions = [(kind, request.args) for request in requests]
        if any(question not in self._known for question in questions):
            instances = [instance for task in self.tasks for instance in task.instances or ()]
            coming = [(i.request_type, i.args) for i in instances if i.request_type in STREAMABLE]
            self._sweep([q for q in dict.fromkeys([*questions, *coming]) if q not in self._known])
        return [self._known[question] for question in questions]

    def _sweep(self, questions: list[tuple[str, tuple[str, ...]]]) -> None:
        pairs: list[Pair] = []
        spans: list[tuple[int, int]] = []
        for kind, args in questions:
            parts = [self._pair(*args)] if kind == "loglikelihood" else self._windows(*args)
            spans.append((len(pairs), len(pairs) + len(parts)))
            pairs += parts
        found = likelihoods(
            self.streamed,
            pairs,
            max_length=self.max_length,
            batch_size=self.rows_per_batch,
            memory=self.memory,
            progress=self.progress,
        )
        for question, (first, last) in zip(questions, spans, strict=True):
            total, greedy = float(found.sum_R[first:last].sum()), bool(found.greedy_R[first:last].all())
            self._known[question] = (total, greedy)
        self.sweeps += bool(pairs)
        self.rows, self.tokens, self.cut = self.rows + found.rows, self.tokens + found.tokens, self.cut + found.cut
        self.bytes_read += found.bytes_read

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            before, after = self._encode_pair(context, continuation)
            return before, after
        ids: list[int] = self.tok_encode(continuation, add_special_tokens=False)
        start: int = self.prefix_token_id
        return (ids[:1], ids[1:]) if ids[:1] == [start] else ([start], ids)

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text)
        windows = get_rolling_token_windows(ids, self.prefix_token_id, max_seq_len=self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]


class ResidentLM(HFLM):  # type: ignore[misc]
    """A model in memory: the harness' own class, with our errors and our progress bar."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int | None = None, progress: Progress | None = None
    ) -> None:
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=tokenizer,
                backend="causal",
                batch_size=batch_size or 8,
                softmax_dtype="float32",
            )
        self.progress = progress or Progress()
        self.asked, self.rows, self.tokens, self.sweeps, self.bytes_read, self.cut = 0, 0, 0, 0, 0, 0

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        _check_continuations(requests)
        return self._run("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._run("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
        return self._run("generate_until", requests)

    def _run(self, kind: str, requests: list[Any]) -> Any:
        self.asked += len(requests)
        self._seen = 0
        self.progress.start(kind.replace("_", " "), len(requests))
        try:
            return getattr(super(), kind)(requests, disable_tqdm=True)
        finally:
            self.progress.done()

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, override_bs: Any = None) -> Any:
        pairs = [(context, continuation) for _, context, continuation in requests]
        check_pairs(pairs, self.max_length, int(self.model.get_input_embeddings().weight.shape[0]))
        self.cut += sum(len(context) + len(continuation) - 1 > self.max_length for context, continuation in pairs)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Any:
        self._count(inps)
        return super()._model_call(inps, *arguments, **options)

    def _model_generate(self, context: Tensor, *arguments: Any, **options: Any) -> Any:
        self._count(context)
        return super()._model_generate(context, *arguments, **options)

    def _count(self, ids_BL: Tensor) -> None:
        self.rows, self.tokens = self.rows + len(ids_BL), self.tokens + ids_BL.numel()
        self._seen += len(ids_BL)
        self.progress.tokens(ids_BL.numel())
        self.progress.layer(self._seen - 1)


def _check_continuations(requests: Sequence[Any]) -> None:
    for request in requests:
        if not request.args[1]:
            raise DataError(
                f"task {request.task_name!r}, document {request.doc_id}: one of its answers is empty",
                "Nothing can be scored.",
            )


def cannot_generate(names: Sequence[str]) -> ModelError:
    return ModelError(
        f"{', '.join(names)}: {WRITES}; streamed, that is one sweep over the checkpoint for every token",
        "Run it with --resident where the model fits in memory, or choose tasks that score given answers.",
    )


# ---- tasks ----


def find_tasks(
    names: Sequence[str], include_path: Sequence[str] = (), progress: Progress | None = None
) -> dict[str, Any]:
    """Tasks and groups by name, tag, group or YAML file, their datasets loaded: {"tasks": ..., "groups": ...}.

    If all names are tasks of `include_path`, or groups of them, only that is read; otherwise the harness' 14 000 files
    are, which takes about ten seconds. A task file of `include_path` may name its data files from its own folder.

    Raises UsageError for unknown names, and for tasks that run generated code or need images or sound; DataError for a
    dataset that cannot be had.
    """
    for folder in include_path:
        if not Path(folder).is_dir():
            raise UsageError(f"--include-path {folder}: no such folder", "It holds task files (*.yaml).")
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with quiet():
        manager = TaskManager(include_path=list(include_path), include_defaults=False)
        if not all(_complete(name, manager.task_index) or Path(name).is_file() for name in names):
            (progress or Progress()).start("reading the harness' task files", 1)
            manager = TaskManager(include_path=list(include_path))
        for name in names:
            entry = manager.task_index.get(name)
            if entry is None and not Path(name).is_file():
                raise UsageError(f"no task {name!r}", _nearest(name, manager.all_tasks))
            if entry is not None and (entry.cfg or {}).get("unsafe_code"):  # before it is loaded, which may run code
                raise _unsafe(name)
        for entry in manager.task_index.values():
            if entry.yaml_path is not None and any(Path(f) in Path(entry.yaml_path).parents for f in include_path):
                _find_data_files(entry)
        for name in names:
            try:
                loaded = manager.load([name])
            except Exception as error:  # building a task runs its code and the datasets library
                raise _task_error(name, error) from error
            for part in found:
                found[part].update(loaded.get(part, {}))
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise _unsafe(name)
        if getattr(task, "MULTIMODAL", False):
            raise UsageError(f"task {name!r} needs images or sound; only text can be scored here")
    return found


def _complete(name: Any, index: dict[str, Any]) -> bool:
    """Whether `name` is a task of this index, or a group of nothing but such."""
    entry = index.get(name)
    if entry is None or not entry.cfg:  # no such name; or a tag, of which the harness may have more tasks
        return False
    members = entry.cfg["task"] if "group" in entry.cfg else []
    return all(_complete(m.get("task", m.get("group")) if isinstance(m, dict) else m, index) for m in members)


def _unsafe(name: str) -> UsageError:
    return UsageError(f"task {name!r} runs code that the model writes; that is not done here", "lm-eval itself can.")


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"Did you mean {' or '.join(repr(n) for n in near)}?"
    return "`lm-eval ls tasks` lists the harness' own; --include-path adds a folder of yours."


def _find_data_files(entry: Any) -> None:
    """Let a task file name data files that lie beside it; without this they are looked for in the working folder."""
    files = (entry.cfg.get("dataset_kwargs") or {}).get("data_files")
    beside = _beside(files, Path(entry.yaml_path).resolve().parent)
    if beside != files:
        config = load_yaml(entry.yaml_path, resolve_func=True)
        config["dataset_kwargs"] = {**config["dataset_kwargs"], "data_files": beside}
        entry.cfg, entry.yaml_path = config, None


def _beside(files: Any, folder: Path) -> Any:
    if isinstance(files, str):
        return str(folder / files) if not Path(files).exists() and (folder / files).exists() else files
    if isinstance(files, list):
        return [_beside(file, folder) for file in files]
    if isinstance(files, dict):
        return {split: _beside(file, folder) for split, file in files.items()}
    return files


def _task_error(name: str, error: Exception) -> CoterieError:
    if isinstance(error, OSError):  # what the datasets library raises for anything it cannot find or reach
        return DataError(
            f"the data of task {name!r} cannot be had: {one_line(error)}",
            "Without a network it must be in the local cache, or be a file: write a task of your own (YAML with"
            " `dataset_path: json` and `dataset_kwargs: {data_files: FILE}`) and name its folder with --include-path.",
        )
    if isinstance(error, ModuleNotFoundError):
        return UsageError(f"task {name!r} needs the package {error.name!r}", f"pip install {error.name}")
    return DataError(f"task {name!r} cannot be built: {one_line(error)}", "Its task file and its data do not fit.")


def generating(found: dict[str, Any]) -> list[str]:
    """Names of the tasks that make the model write text."""
    return [name for name, task in found["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]


def check_memory(found: dict[str, Any], streamed: StreamedModel) -> None:
    """Raise ModelError if the weights would not fit into 80% of the free memory."""
    keys = [key for key, param in streamed.params.items() if param is not None]
    need = sum(math.prod(streamed.checkpoint.tensors[key].shape) for key in keys) * streamed.compute_dtype.itemsize
    cuda = torch.device(streamed.device).type == "cuda"
    free = torch.cuda.mem_get_info(streamed.device)[0] if cuda else psutil.virtual_memory().available
    if need > FILLS * free:
        raise ModelError(
            f"{', '.join(generating(found))}: {WRITES}, for which it must be in memory as a whole:"
            f" {need / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB free",
            "Choose tasks that score given answers, or a narrower --compute-dtype; --resident tries it all the same.",
        )


# ---- running ----


def run_tasks(
    model: str,
    lm: StreamedLM | ResidentLM,
    found: dict[str, Any],
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> TaskScores:
    """Score one model on tasks that `find_tasks` has found; they may be used again for the next model.

    Parameters
    ----------
    num_fewshot : examples before each document; None: what a task says. Tasks that fix it at 0 keep 0, as in lm_eval.
    limit : only so many documents of each task, or this share of them if below 1.
    apply_chat_template : format prompts as a conversation; few-shot examples become turns.
    seed : 0 means lm_eval's own seeds, with which its published numbers were made; others draw other examples.
    """
    if apply_chat_template and not getattr(lm.tokenizer, "chat_template", None):
        raise UsageError(f"the tokenizer of {model} has no chat template", "Leave out --apply-chat-template.")
    random.seed(seed)
    numpy.random.seed(seed or 1234)  # noqa: NPY002, tasks draw from the global generator
    torch.manual_seed(seed or 1234)
    for task in found["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=num_fewshot or 0)
        task.set_fewshot_seed(seed=seed or 1234)
    began = time.monotonic()
    try:
        with quiet():
            raw = evaluate(
                lm,
                found,
                limit=limit,
                bootstrap_iters=BOOTSTRAP,
                apply_chat_template=apply_chat_template,
                fewshot_as_multiturn=apply_chat_template,
            )
    except CoterieError:
        raise
    except Exception as error:
        if lm.asked:  # the requests were built: what fails now is not the task's fault
            raise
        raise DataError(
            f"the requests cannot be built: {one_line(error)}", "Are there enough documents for --num-fewshot?"
        ) from error
    scores = TaskScores(
        model,
        "streamed" if isinstance(lm, StreamedLM) else "resident",
        requests=lm.asked,
        rows=lm.rows,
        tokens=lm.tokens,
        sweeps=lm.sweeps,
        bytes_read=lm.bytes_read,
        seconds=time.monotonic() - began,
        limit=limit,
        versions={"lm_eval": version("lm_eval"), **raw["versions"]},
    )
    if lm.cut:
        scores.warnings.append(
            f"{lm.cut} requests are longer than the {lm.max_length} tokens the model takes and lost their beginning"
        )
    _collect(scores, raw)
    return scores


def _collect(scores: TaskScores, raw: dict[str, Any]) -> None:
    """The harness' results as `Metric`s, and the values of single documents for those that are means of them."""
    for task, values in raw["results"].items():
        leaves = _leaves(task, raw["group_subtasks"])
        for key, value in values.items():
            name, comma, filter_ = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{filter_}")
            metric = Metric(
                task,
                name,
                filter_,
                float(value),
                float(stderr) if isinstance(stderr, int | float) else None,
                int(values["sample_len"]),
                raw["n-shot"].get(task),
                (raw["higher_is_better"].get(task) or {}).get(name),
            )
            scores.metrics.append(metric)
            single = {
                (leaf, sample["doc_id"]): float(sample[name])
                for leaf in leaves
                for sample in raw["samples"].get(leaf, ())
                if sample["filter"] == filter_ and isinstance(sample.get(name), int | float)
            }
            if single and math.isclose(statistics.fmean(single.values()), metric.value, rel_tol=1e-9, abs_tol=1e-12):
                scores.per_document[task, name, filter_] = single


def _leaves(task: str, children: dict[str, list[str]]) -> list[str]:
    return [leaf for child in children[task] for leaf in _leaves(child, children)] if children.get(task) else [task]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the harness' bars, notes and prints away from our output, and its standard errors in this process."""
    logger, bar = logging.getLogger("lm_eval"), tqdm.std.tqdm
    level, init, forked = logger.level, bar.__init__, os.environ.get("DISABLE_MULTIPROC")
    logger.setLevel(logging.ERROR)
    bar.__init__ = functools.partialmethod(init, disable=True)
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
        bar.__init__ = init
        if forked is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = forked
