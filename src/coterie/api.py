"""The Python API: what the command line does, as functions. Names and defaults are the same."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coterie import comparison
from coterie.analysis import ablation
from coterie.analysis import super_experts as massive
from coterie.anatomy import moe_layers
from coterie.compression import padding
from coterie.compression.compress import Result, run_forecast
from coterie.compression.compress import compress as run_compress
from coterie.compression.forecast import Forecast
from coterie.compression.methods import closest, get_method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import make_plan, plan_method
from coterie.compression.recipe import Recipe
from coterie.compression.selector import Budget, parse_layers, parse_protect
from coterie.compression.sparsify import sparsify, sparsify_forecast
from coterie.compression.sparsifying.base import Sparsifier
from coterie.decoding.skipping import Skipped, betas, check_fit, skip
from coterie.errors import UsageError
from coterie.evaluation.compare import ModelResult, evaluate_models
from coterie.evaluation.variants import RunLosses
from coterie.patterns.retrieval import Match, match
from coterie.patterns.store import PatternStore, build_store, check_out
from coterie.profiling.contribution import Shift
from coterie.profiling.observe import unique
from coterie.profiling.observers import OBSERVERS, Observer
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.config import choose_compute_dtype
from coterie.streaming.lockstep import Progress, States
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, check_place, parse_size
from coterie.text import TokenData, check_ids, from_text, held_out, load_data, load_tokenizer, load_tokens

if TYPE_CHECKING:
    from coterie.evaluation.harness import TaskScores
    from coterie.training.finetune import FineTuned

SAMPLES, LENGTH = 128, 512


@dataclass(frozen=True)
class Runtime:
    """Where and how models run.

    device : "cpu" or "cuda". compute_dtype : "auto", "float32", "bfloat16", "float16". threads : 0 = all cores.
    offline : never ask the hub. memory : limit for waiting hidden states, e.g. "2GiB".
    """

    device: str = "cpu"
    compute_dtype: str = "auto"
    threads: int = 0
    offline: bool = False
    trust_remote_code: bool = False
    allow_nonfinite: bool = False
    memory: str = "2GiB"

    def open(self, model: str) -> StreamedModel:
        """Open a checkpoint; every tensor's place and shape is checked, no weight is read."""
        self.ready()
        return StreamedModel(
            Checkpoint.open(model, offline=self.offline),
            device=self.device,
            compute_dtype=self.compute_dtype,
            allow_nonfinite=self.allow_nonfinite,
            trust_remote_code=self.trust_remote_code,
        )

    def ready(self) -> None:
        """Check the device; apply threads and offline to this process. `open` does it by itself."""
        _check_device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
            for name in ("huggingface_hub.constants", "datasets.config"):  # read when transformers was imported
                if name in sys.modules:
                    sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _check_device(name: str) -> None:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number.isdecimal() or name == kind):
        raise UsageError(f"--device {name}: no such device", "Use cpu, cuda or cuda:1.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this PyTorch sees no CUDA device", "Use --device cpu.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        there = torch.cuda.device_count()
        raise UsageError(f"--device {name}: this machine has {there} CUDA device(s)", "They are counted from 0.")


def _vocabulary(streamed: StreamedModel) -> int:
    return int(streamed.model.get_input_embeddings().weight.shape[0])


def calibration(
    model: str,
    data: Sequence[str] = (),
    *,
    tokens: str | None = None,
    tokenizer: str | None = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    batch_size: int | None = None,
    pack: bool = True,
    demonstrations: int | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
) -> TokenData | None:
    """Samples from text files, folders, dataset names (`data`) or a file of token ids (`tokens`); None if neither.

    demonstrations : that many of each domain's longest documents, one a sequence, instead of `samples` and `pack`.
    """
    runtime = runtime or Runtime()
    if demonstrations is not None and demonstrations < 1:
        raise UsageError(f"{demonstrations} demonstrations are none", "EASY-EP works with 5 to 25.")
    if tokens is not None and data:
        raise UsageError("--data and --tokens both say what to run on", "Give one of them.")
    if tokens is not None:
        return load_tokens(Path(tokens), batch_size)
    if not data:
        return None
    folder = resolve(tokenizer or model, offline=runtime.offline)
    return load_data(
        [data] if isinstance(data, str) else data,
        load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code),
        samples=demonstrations or samples,
        length=length,
        batch_size=batch_size,
        pack=pack and demonstrations is None,
        longest=demonstrations is not None,
        seed=seed,
    )


def profile(
    model: str,
    data: Sequence[str] = (),
    *,
    out: str | None = None,
    observers: Sequence[str | type[Observer]] = (),
    methods: Sequence[str] = (),
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> Profile:
    """What every MoE layer does on text. Without `observers` or `methods`, all statistics are recorded.

    Returns the profile; with `out` it is also written there. Keywords beyond these are `calibration`'s: samples, ...
    """
    runtime = runtime or Runtime()
    wanted: list[type[Observer]] = []
    for name in observers:
        if isinstance(name, str) and name not in OBSERVERS:
            raise UsageError(f"no statistic {name!r}", closest(name, list(OBSERVERS)))
        wanted.append(OBSERVERS[name] if isinstance(name, str) else name)
    for method in methods:
        wanted += get_method(method).observes()
    if out is not None:
        check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    samples_in = calibration(model, data, runtime=runtime, **text)
    if samples_in is None:
        raise UsageError("profiling needs text", "Name some with --data.")
    streamed = runtime.open(model)
    check_ids(samples_in, _vocabulary(streamed))
    observed = unique(wanted) or list(OBSERVERS.values())
    states = States(limit=parse_size(runtime.memory, least=0))
    result = profile_model(streamed, samples_in, observed, model=model, states=states, progress=progress)
    if out is not None:
        result.save(Path(out), overwrite=overwrite)
    return result


def budget_of(
    streamed: StreamedModel,
    *,
    keep: float | None = None,
    keep_experts: int | None = None,
    target_size: str | int | None = None,
    scope: str = "uniform",
    minimum: int = 1,
    layers: str | None = None,
    exclude_layers: str | None = None,
    protect: Sequence[str] = (),
) -> Budget:
    """A budget from the command line's options."""
    return Budget(
        keep=keep,
        keep_experts=keep_experts,
        target_bytes=parse_size(target_size) if isinstance(target_size, str) else target_size,
        scope=scope,
        minimum=minimum,
        layers=parse_layers(layers, exclude_layers, sorted(streamed.moe)),
        protect=parse_protect([protect] if isinstance(protect, str) else list(protect), streamed.checkpoint.digest),
    )


def plan(
    model: str,
    profile: str | Profile,
    *,
    method: str = "reap",
    parameters: dict[str, Any] | None = None,
    out: str | None = None,
    runtime: Runtime | None = None,
    **budget: Any,
) -> Plan:
    """Decide, on a finished profile, which experts stay. Keywords beyond these are `budget_of`'s (keep=0.5, ...)."""
    streamed = (runtime or Runtime()).open(model)
    loaded = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    chosen = get_method(method, parameters)
    result = make_plan(streamed, model, method, chosen, budget_of(streamed, **budget), loaded)
    if out is not None:
        result.save(Path(out))
    return result


_TEXT = (
    "tokens",
    "tokenizer",
    "samples",
    "length",
    "batch_size",
    "pack",
    "demonstrations",
)  # of what `calibration` takes


def prepare(
    model: str,
    *,
    runtime: Runtime | None = None,
    method: str = "reap",
    parameters: dict[str, Any] | None = None,
    data: Sequence[str] = (),
    profile: str | Profile | None = None,
    plan: str | Plan | None = None,
    propagate: bool = False,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """A checked request for `forecast` and `compress`: checkpoint opened, text tokenized, nothing read or written yet.

    Everything a user can get wrong is found here. Keywords as in `compress`. A request serves one `compress`.
    """
    runtime = runtime or Runtime()
    text = {name: options.pop(name) for name in _TEXT if name in options}
    budget = {name: value for name, value in options.items() if value is not None}
    ready_plan = Plan.load(Path(plan)) if isinstance(plan, str) else plan
    ready_profile = Profile.load(Path(profile)) if isinstance(profile, str) else profile
    if ready_plan is not None and (budget or ready_profile):
        raise UsageError("a plan already says what stays: give it alone, without a budget or a profile")
    if ready_profile is not None and (data or text.get("tokens")):
        given = "--data" if data else "--tokens"
        raise UsageError(f"--profile and {given} both say what experts are judged by", "Give one of them.")
    chosen = plan_method(ready_plan) if ready_plan else get_method(method, parameters)
    if isinstance(chosen, Sparsifier):
        return _prepare_sparsifier(
            model, chosen, method, runtime, data, seed, text, budget, profile=profile, plan=plan, propagate=propagate
        )
    streamed = runtime.open(model)
    how_much = None if ready_plan else budget_of(streamed, **budget)
    found = None
    if ready_plan is None and ready_profile is None and any(o.needs_text for o in chosen.observes()):
        found = calibration(model, data, seed=seed, runtime=runtime, **text)
    if found is not None:
        check_ids(found, _vocabulary(streamed))
    return {
        "streamed": streamed,
        "model": model,
        "method": chosen,
        "name": ready_plan.method if ready_plan else method,
        "budget": how_much,
        "data": found,
        "profile": ready_profile,
        "plan": ready_plan,
        "propagate": propagate,
        "seed": seed,
        "memory": parse_size(runtime.memory, least=0),
    }


_NO_BUDGET: dict[str, Any] = {"scope": "uniform", "minimum": 1, "protect": ()}  # what says nothing


def _prepare_sparsifier(
    model: str,
    method: Sparsifier,
    name: str,
    runtime: Runtime,
    data: Sequence[str],
    seed: int,
    text: dict[str, Any],
    budget: dict[str, Any],
    **other: Any,
) -> dict[str, Any]:
    """The checked request of a method that zeroes weights: it has no budget of experts, no profile and no plan."""
    said = [key for key, value in budget.items() if value not in (_NO_BUDGET.get(key), [])]
    said += [key for key, value in other.items() if value]
    if said:
        options = ", ".join("--" + key.replace("_", "-") for key in said)
        raise UsageError(
            f"this method removes no expert: {options} would be ignored",
            f"Leave out {options}; how much to zero is a parameter, e.g. --set sparsity=0.5.",
        )
    method.check()
    streamed = runtime.open(model)
    found = calibration(model, data, seed=seed, runtime=runtime, **text) if method.needs_text else None
    if found is not None:
        check_ids(found, _vocabulary(streamed))
    memory = parse_size(runtime.memory, least=0)
    request = {"streamed": streamed, "model": model, "method": method, "name": name, "data": found}
    return {**request, "seed": seed, "memory": memory}


def forecast(
    model: str,
    out: str,
    *,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    measure: bool = False,
    prepared: dict[str, Any] | None = None,
    **request: Any,
) -> Forecast:
    """What `compress` with the same keywords will need, without writing anything.

    With `measure`, the first layers are run until the first MoE layer is planned: gives seconds and redundancy.
    Raises whatever `compress` would raise before it writes.
    """
    given = prepared or prepare(model, runtime=runtime, **request)
    if isinstance(given["method"], Sparsifier):
        return sparsify_forecast(Path(out), **given)
    return run_forecast(Path(out), progress=progress, measure_first=measure, **given)


def compress(
    model: str,
    out: str,
    *,
    shard_size: str = "",
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    on_first_layer: Callable[[LayerProfile, LayerPlan], None] = lambda profile, plan: None,
    prepared: dict[str, Any] | None = None,
    **request: Any,
) -> Result:
    """Write a smaller checkpoint to `out`.

    Parameters
    ----------
    model : checkpoint folder or hub id.
    method, parameters : name and parameters of a method (`coterie methods`).
    keep, keep_experts, target_size, scope, minimum, layers, exclude_layers, protect : the budget, see `budget_of`.
    data, tokens, tokenizer, samples, length, batch_size, pack, seed : calibration, see `calibration`.
    profile : a finished profile (folder or object) instead of data. plan : a finished plan instead of all of these.
    propagate : later layers see what changed earlier layers put out.
    prepared : the request already checked by `prepare`, instead of the keywords above.
    shard_size : largest shard, e.g. "5GB". overwrite : replace `out`.

    Raises a `CoterieError` for anything the request, the checkpoint, the text or the disk has wrong.
    """
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    given = dict(prepared or prepare(model, runtime=runtime, **request))
    streamed, shard_bytes = given.pop("streamed"), parse_size(shard_size) if shard_size else DEFAULT_SHARD_BYTES
    options: dict[str, Any] = {"shard_bytes": shard_bytes, "overwrite": overwrite, "progress": progress}
    if isinstance(given["method"], Sparsifier):
        result = sparsify(streamed, Path(out), **options, **given)
    else:
        result = run_compress(streamed, Path(out), on_first_layer=on_first_layer, **options, **given)
    result.warnings[:0] = given["data"].warnings if given["data"] else []
    return result


def recipe_requests(recipe: str, extra: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A recipe file as keywords of `compress`, one set for each step. Methods and parameters are checked."""
    loaded = Recipe.load(Path(recipe))
    requests = []
    for step in loaded.steps:
        get_method(step.method, step.parameters)
        request: dict[str, Any] = {
            "method": step.method,
            "parameters": step.parameters,
            "propagate": step.propagate,
            "data": loaded.data,
            "samples": loaded.samples,
            "length": loaded.length,
            "seed": loaded.seed,
        }
        requests.append({**request, **step.budget.model_dump(exclude_unset=True), **(extra or {})})
    return requests


def carry_out(
    model: str,
    out: str,
    requests: Sequence[dict[str, Any]],
    *,
    shard_size: str = "",
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, Result], None] = lambda number, result: None,
) -> Result:
    """Compress in several steps, each on the checkpoint the one before wrote; returns the last result.

    Parameters
    ----------
    requests : keywords of `compress` for each step, as `recipe_requests` makes them.
    on_step : called with (number from 1, result) after every step.

    Steps in between stand beside `out` as OUT.step1, ... until the last one is done. A killed run, started again, goes
    on in the step it was in. Every record (coterie.json) also holds those of the earlier steps.
    """
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    source, between = model, list[Path]()
    identity = Checkpoint.open(model, offline=(runtime or Runtime()).offline).digest()
    for number, request in enumerate(requests, 1):
        identity = hashlib.sha256(json.dumps([identity, request], sort_keys=True, default=str).encode()).hexdigest()
        if number == len(requests):
            break
        folder = Path(f"{out}.step{number}")
        mark = folder / ".step"
        if not (mark.is_file() and mark.read_text() == identity):
            options: dict[str, Any] = {"shard_size": shard_size, "runtime": runtime, "progress": progress}
            result = compress(source, str(folder), overwrite=overwrite or folder.exists(), **options, **request)
            mark.write_text(identity)
            on_step(number, result)
        between.append(folder)
        source = str(folder)
    result = compress(
        source, out, shard_size=shard_size, overwrite=overwrite, runtime=runtime, progress=progress, **requests[-1]
    )
    on_step(len(requests), result)
    for folder in between:
        shutil.rmtree(folder)
    return result


def evaluate(
    models: Sequence[str],
    data: Sequence[str] = (),
    *,
    samples: int = 64,
    skip_profile: str | Profile | None = None,
    skip_quantile: float = 0.5,
    seed: int = 0,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> list[ModelResult]:
    """Loss and perplexity of every model on text and, for all but the first, KL to and agreement with the first.

    skip_profile : a profile of the first model that holds `GateRatio`; that model is then measured a second time, with
        its weak experts skipped at run time (see `skipping`), and what was skipped is told in its name.
    Keywords beyond these are `calibration`'s: length, tokens, ...
    """
    runtime = runtime or Runtime()
    names = [models] if isinstance(models, str) else list(models)
    found = calibration(names[0], data, samples=samples, seed=seed, runtime=runtime, **text)
    if found is None:
        raise UsageError("evaluation needs text", "Name some with --data.")
    opened = [(name, runtime.open(name)) for name in names]
    for _, streamed in opened:
        check_ids(found, _vocabulary(streamed))
    sizes = {m.config.get_text_config(decoder=True).vocab_size for _, m in opened}
    if len(sizes) > 1:
        raise UsageError(f"these models have different vocabularies ({sorted(sizes)}) and cannot be compared")
    memory = parse_size(runtime.memory, least=0)
    with ExitStack() as stack:
        skipped = None
        if skip_profile is not None:
            seen = skip_profile if isinstance(skip_profile, Profile) else Profile.load(Path(skip_profile))
            again = runtime.open(names[0])
            check_fit(seen, again.moe.values())
            skipped = stack.enter_context(skip(again.moe.values(), betas(seen, skip_quantile)))
            opened.append((f"{names[0]} skipping", again))
        results = evaluate_models(opened, found, memory=memory, progress=progress, seed=seed)
    if skipped is not None:
        results[-1].model += f" ({skipped.active:.2f} experts per token)"
    return results


def super_experts(
    model: str,
    data: Sequence[str] = (),
    *,
    out: str | None = None,
    layers: str = "first_fraction",
    fraction: float = 0.75,
    scope: str = "selected_layers",
    percentile: float = 99.5,
    factor: float = 0.1,
    verify: bool = True,
    controls: int = 5,
    ablate: Sequence[str] = (),
    samples: int = 64,
    length: int = LENGTH,
    pack: bool = False,
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> massive.SuperExperts:
    """The experts that make massive activations and must not be pruned, merged or squeezed (arXiv:2507.23279).

    Parameters
    ----------
    out : JSON file; `compress(..., protect=[out])` keeps what it lists.
    layers, fraction, scope, percentile, factor : the rule, see `coterie.analysis.super_experts.Rule`.
    verify : run the model without them, and `controls` times without as many random experts of each kind.
    ablate : further experts to run the model without, as "layer:expert".
    pack : windows cut from joined documents; off, because these experts act on the first token of a document.

    Two sweeps, one without `verify`. Keywords beyond these are `calibration`'s: tokens, tokenizer, ...
    """
    runtime = runtime or Runtime()
    rule = massive.Rule(layers, fraction, scope, percentile, factor)
    if out is not None:
        massive.check_file(Path(out), overwrite=overwrite)
    found = calibration(model, data, samples=samples, length=length, pack=pack, seed=seed, runtime=runtime, **text)
    if found is None:
        raise UsageError("finding super experts needs text", "Name some with --data.")
    streamed = runtime.open(model)
    check_ids(found, _vocabulary(streamed))
    memory = parse_size(runtime.memory, least=0)
    given = parse_protect([ablate] if isinstance(ablate, str) else list(ablate), streamed.checkpoint.digest)
    ablation.check_pairs(given, streamed.moe)
    seen = massive.watch(streamed, found, states=States(limit=memory), progress=progress)
    chosen = massive.choose(seen, rule)
    finding = massive.describe(seen, rule, chosen)
    runs = massive.variants(seen, chosen, streamed.moe, given=given, controls=controls, seed=seed) if verify else []
    finding["verification"] = None
    if runs:
        heads = int(streamed.config.get_text_config(decoder=True).num_attention_heads)
        losses = RunLosses(ablation.smaller_batches(found, heads), memory)
        states = States(limit=memory)
        trace = ablation.run(streamed, losses.data.batches, runs, losses.finish, states=states, progress=progress)
        results = losses.results(streamed, [variant.name for variant in runs], seed)
        rows = {result.model: asdict(result.domains[0]) for result in results}
        finding["verification"] = massive.verification(runs, rows, trace, chosen)
    dtype = str(streamed.compute_dtype).removeprefix("torch.")
    result = massive.report(model, streamed.checkpoint.digest(), found, dtype, finding)
    if out is not None:
        result.save(Path(out), overwrite=overwrite)
    return result


def score_tasks(
    models: Sequence[str],
    tasks: Sequence[str],
    *,
    include_path: Sequence[str] = (),
    how: str = "auto",
    num_fewshot: int | None = None,
    limit: float | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    tokenizer: str | None = None,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> list[TaskScores]:
    """Score models on tasks of the lm-evaluation-harness, all of them in one sweep over each checkpoint.

    Parameters
    ----------
    tasks : names of tasks, groups or tags, or task files. include_path : folders with task files of your own.
    how : "streamed"; "resident", the whole model in memory by plain transformers (any causal model, computing in the
        same dtype); or "auto": streamed, so that a result never depends on how much memory happens to be free, unless a
        task makes the model write text. These are resident, if the weights fit into 80% of the free memory.
    num_fewshot, limit, apply_chat_template, seed : see `harness.run_tasks`.
    batch_size : inputs per batch; None: about 8192 tokens' worth streamed, 8 resident.

    Needs `pip install 'coterie[eval]'`. Raises a `CoterieError` for whatever the request, a task or a model has wrong.
    """
    try:
        from coterie.evaluation import harness
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "lm_eval":
            raise
        raise UsageError("--tasks needs the lm-evaluation-harness", "pip install 'coterie[eval]'") from error
    if how not in ("auto", "streamed", "resident"):
        raise UsageError(f"no way {how!r} to score tasks", "Use auto, streamed or resident.")
    runtime = runtime or Runtime()
    runtime.ready()
    names = [models] if isinstance(models, str) else list(models)
    folders = [resolve(name, offline=runtime.offline) for name in names]
    opened = {name: runtime.open(name) for name in names} if how != "resident" else {}
    texts = [resolve(tokenizer, offline=runtime.offline)] * len(names) if tokenizer else folders
    tokenizers = [load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code) for folder in texts]
    own = [include_path] if isinstance(include_path, str) else list(include_path)
    found = harness.find_tasks([tasks] if isinstance(tasks, str) else list(tasks), own, progress)
    writing = harness.generating(found)
    if how == "streamed" and writing:
        raise harness.cannot_generate(writing)
    if how == "auto" and writing:
        for streamed in opened.values():
            harness.check_memory(found, streamed)
    results: list[TaskScores] = []
    for name, folder, words in zip(names, folders, tokenizers, strict=True):
        lm: harness.StreamedLM | harness.ResidentLM
        if how == "resident" or writing:
            as_stored = runtime.compute_dtype == "auto" and not runtime.device.startswith("cpu")
            width = choose_compute_dtype(runtime.compute_dtype, runtime.device, torch.float32)
            dtype: Any = "auto" if as_stored else width
            with harness.quiet():
                model, _ = load(str(folder), dtype=dtype, trust_remote_code=runtime.trust_remote_code)
            lm = harness.ResidentLM(model.to(runtime.device), words, batch_size=batch_size, progress=progress)
        else:
            lm = harness.StreamedLM(
                opened[name],
                words,
                tasks=list(found["tasks"].values()),
                batch_size=batch_size,
                memory=parse_size(runtime.memory, least=0),
                progress=progress,
            )
        results.append(
            harness.run_tasks(
                name,
                lm,
                found,
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=apply_chat_template,
                seed=seed,
            )
        )
        if len(results) > 1:
            results[-1].compare(results[0])
    return results


def build_patterns(
    model: str,
    tasks: Mapping[str, str | Sequence[str]],
    *,
    out: str | None = None,
    score: str = "tcess",
    parameters: dict[str, Any] | None = None,
    candidates: int = 1,
    key_threshold: float = -1.0,
    shift: Shift = "none",
    add: bool = False,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> PatternStore:
    """What each task needs of every expert, kept for `load(pattern=...)` (PreMoe, arXiv:2505.17639).

    Parameters
    ----------
    tasks : {name: files, folders or datasets of its text}.
    score, parameters : "tcess" or any method that scores experts on text. candidates, key_threshold, shift : K_a, r and
        shift of the keys that queries are compared with.
    add : put the tasks into the store `out` beside those it has; tasks of the same name are replaced.

    Keywords beyond these are `calibration`'s: samples, length, demonstrations, ... for each task.
    """
    runtime = runtime or Runtime()
    before = check_out(Path(out), overwrite=overwrite, add=add) if out is not None else None
    found = {}
    for task, sources in tasks.items():
        samples_in = calibration(model, sources, runtime=runtime, **text)
        if samples_in is None:
            raise UsageError(f"task {task!r} has no text", "Name some: --task math=FILE.")
        found[task] = samples_in
    streamed = runtime.open(model)
    if before is not None:
        before.check(streamed)
    for samples_in in found.values():
        check_ids(samples_in, _vocabulary(streamed))
    store = build_store(
        streamed,
        found,
        model=model,
        score=score,
        parameters=parameters,
        candidates=candidates,
        threshold=key_threshold,
        shift=shift,
        memory=parse_size(runtime.memory, least=0),
        progress=progress,
    )
    store = before.joined(store) if before is not None else store
    if out is not None:
        store.save(Path(out), overwrite=overwrite or add)
    return store


def match_pattern(
    store: str | PatternStore,
    model: str,
    *,
    query: Any = None,
    data: Sequence[str] = (),
    threshold: float | None = None,
    runtime: Runtime | None = None,
    **text: Any,
) -> Match:
    """The stored task nearest to a query, or to text files, by the first MoE layer's router; reads no expert.

    query : a text, or a dialogue of turns with `role` and `content`. threshold : beyond this distance no task matches.
    """
    runtime = runtime or Runtime()
    loaded = store if isinstance(store, PatternStore) else PatternStore.load(Path(store))
    if (query is None) == (not data):
        raise UsageError("a query is either one text or text files", "Give --text or --data.")
    if query is not None:
        folder = resolve(text.pop("tokenizer", None) or model, offline=runtime.offline)
        found = from_text(query, load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code), name="query")
    else:
        found = calibration(model, data, runtime=runtime, **text)  # type: ignore[assignment]
    streamed = runtime.open(model)
    check_ids(found, _vocabulary(streamed))
    return match(loaded, streamed, found, threshold)


def load(
    path: str,
    *,
    dtype: str = "auto",
    pattern: Any = None,
    task: str | Sequence[str] | None = None,
    query: Any = None,
    keep: float | None = None,
    keep_experts: int | None = None,
    threshold: float | None = None,
    groups: bool = True,
    device: str = "cpu",
    experts_implementation: str | None = None,
    **options: Any,
) -> tuple[Any, Any]:
    """A model and its tokenizer, whole in memory, by plain transformers. Options go to `from_pretrained`.

    With `pattern`, only the experts that a task needs are read and held (PreMoe, arXiv:2505.17639).

    Parameters
    ----------
    pattern : a pattern store (folder or object), a plan (file or object), or an order {layer: experts, best first}.
    task : a task of the store; several, as "math+code" or a list, have equal say. query : a text instead, whose nearest
        task is taken; where none is within `threshold`, all tasks with equal say.
    keep, keep_experts : share or number of experts of each layer.
    groups : False switches group-limited routing off, as the paper does, so that any experts may stay.
    """
    folder = resolve(path)
    chosen = {"task": task, "query": query, "keep": keep, "keep_experts": keep_experts, "threshold": threshold}
    if pattern is None:
        if given := [name for name, value in chosen.items() if value is not None]:
            raise UsageError(f"{given[0]} says which experts to load, but there is no pattern", "Give pattern=STORE.")
        from transformers import AutoModelForCausalLM

        more = {"experts_implementation": experts_implementation} if experts_implementation else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more, **options).eval()
        return (model if device == "cpu" else model.to(device)), load_tokenizer(folder)
    if options:
        raise UsageError(f"load with a pattern has no option {min(options)!r}")
    from coterie.patterns.loading import load_pattern

    _check_device(device)
    tokenizer = load_tokenizer(folder)
    how = {"groups": groups, "dtype": str(dtype), "device": device, "experts": experts_implementation}
    return load_pattern(folder, pattern, tokenizer, **chosen, **how), tokenizer  # type: ignore[arg-type]


@contextmanager
def skipping(
    model: Any,
    profile: str | Profile,
    *,
    quantile: float = 0.5,
    renormalise: bool = True,
    protect: Sequence[str] = (),
) -> Iterator[Skipped]:
    """Skip a token's weak experts while a model in memory runs (NAEE, arXiv:2402.14800); gives the counts.

    profile : holds `GateRatio` of this very model. quantile, renormalise : see `coterie.decoding.skipping`.
    protect : experts that are never skipped, as "layer:expert".
    """
    loaded = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    check_fit(loaded, moe_layers(model))
    held = parse_protect([protect] if isinstance(protect, str) else list(protect))
    with skip(model, betas(loaded, quantile), renormalise=renormalise, protect=held) as done:
        yield done


def compare(
    model: str,
    data: Sequence[str] = (),
    *,
    methods: Sequence[str] = ("reap",),
    keep: Sequence[float] = (),
    keep_experts: Sequence[int] = (),
    eval_data: Sequence[str] = (),
    eval_tokens: str | None = None,
    eval_samples: int = 32,
    samples: int = SAMPLES,
    scope: str = "uniform",
    minimum: int = 1,
    layers: str | None = None,
    exclude_layers: str | None = None,
    protect: Sequence[str] = (),
    out: str | None = None,
    overwrite: bool = False,
    seed: int = 0,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> comparison.Comparison:
    """Methods under budgets, side by side, in two sweeps over the weights; no checkpoint is written.

    Parameters
    ----------
    data : calibration text. eval_data : text to evaluate on; by default held-out samples of `data`.
    methods : names, with parameters as in "dern:alpha=0.3,selector=reap".
    keep, keep_experts : budgets: shares of the experts, or numbers per layer.
    samples, eval_samples : sequences per domain to calibrate and to evaluate on.
    out : folder for comparison.json, comparison.html and a plan of every contender, ready for `compress(plan=...)`.

    Keywords beyond these are `calibration`'s (length, tokenizer, ...) and hold for both texts.
    """
    runtime = runtime or Runtime()
    wanted: list[dict[str, Any]] = [{"keep": share} for share in keep] + [{"keep_experts": n} for n in keep_experts]
    if not wanted:
        raise UsageError("say how much may stay", "For example --keep 0.75,0.5,0.25.")
    names = [methods] if isinstance(methods, str) else list(methods)
    entries = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not entries:
        raise UsageError("no method is named", "Name some with --methods, e.g. reap,dern; see `coterie methods`.")
    parsed = [comparison.Entry.parse(name) for name in entries]
    if out is not None:
        check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    separate = bool(eval_data) or eval_tokens is not None
    tokens = text.pop("tokens", None)
    more = 0 if separate else eval_samples
    given = calibration(model, data, tokens=tokens, samples=samples + more, seed=seed, runtime=runtime, **text)
    if given is None:
        raise UsageError("comparing needs text", "Name some with --data.")
    if separate:
        other = calibration(
            model, eval_data, tokens=eval_tokens, samples=eval_samples, seed=seed, runtime=runtime, **text
        )
        assert other is not None
        first, second = given, other
    else:
        first, second = held_out(given, given.samples // 2 if tokens is not None else samples)
    streamed = runtime.open(model)
    for found in (first, second):
        check_ids(found, _vocabulary(streamed))
    options: dict[str, Any] = {"scope": scope, "minimum": minimum, "layers": layers, "exclude_layers": exclude_layers}
    budgets = [budget_of(streamed, protect=protect, **options, **budget) for budget in wanted]
    memory = parse_size(runtime.memory, least=0)
    result = comparison.compare(
        streamed, model, parsed, budgets, first, second, memory=memory, seed=seed, progress=progress
    )
    if out is not None:
        comparison.save(result, Path(out), overwrite=overwrite)
    return result


def export(
    model: str,
    out: str,
    data: Sequence[str] = (),
    *,
    samples: int = 64,
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> padding.Padded:
    """A uniform copy of a checkpoint whose layers differ, for software that knows one expert count.

    `data` is needed where routers have no bias, see `coterie.compression.padding`. Keywords beyond these are
    `calibration`'s.
    """
    runtime = runtime or Runtime()
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    found = calibration(model, data, samples=samples, seed=seed, runtime=runtime, **text)
    streamed = runtime.open(model)
    if found is not None:
        check_ids(found, _vocabulary(streamed))
    memory = parse_size(runtime.memory, least=0)
    return padding.pad(
        streamed, Path(out), model=model, data=found, overwrite=overwrite, memory=memory, progress=progress
    )


def finetune(
    model: str,
    out: str,
    data: Sequence[str] = (),
    *,
    router_steps: int = 100,
    router_rate: float = 1e-3,
    steps: int = 500,
    rate: float = 5e-5,
    batch_size: int = 8,
    balance: float = 0.01,
    samples: int = 1024,
    held_out_samples: int = 16,
    length: int = 256,
    tokens: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> FineTuned:
    """Train a checkpoint in two phases, routers alone and then everything, see `coterie.training.finetune`.

    `held_out_samples` sequences of each domain are kept out of training; with `tokens`, a quarter of the rows.
    Keywords beyond these are `calibration`'s.
    """
    from coterie.training.finetune import Schedule
    from coterie.training.finetune import finetune as run_finetune

    runtime = runtime or Runtime()
    runtime.ready()
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    more = samples + held_out_samples
    given = calibration(model, data, tokens=tokens, samples=more, length=length, seed=seed, runtime=runtime, **text)
    if given is None:
        raise UsageError("fine-tuning needs text", "Name some with --data.")
    least = min(given.samples // len(given.domains), more)
    test, train = held_out(given, min(held_out_samples, max(1, least // 4)))
    bar, told = progress or Progress(), {"phase": ""}

    def log(phase: str, step: int, total: int, loss: float) -> None:
        if phase != told["phase"]:
            told["phase"] = phase
            bar.start("steps", total)
        bar.layer(step - 1)

    schedule = Schedule(router_steps, router_rate, steps, rate, batch_size, balance)
    try:
        return run_finetune(
            resolve(model, offline=runtime.offline),
            Path(out),
            train,
            held_out=test,
            schedule=schedule,
            device=runtime.device,
            seed=seed,
            overwrite=overwrite,
            on_log=log,
        )
    finally:
        bar.done()
