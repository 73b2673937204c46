"""The Python API: what the command line does, as functions. Names and defaults are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coterie.compression.compress import Result, run_forecast
from coterie.compression.compress import compress as run_compress
from coterie.compression.forecast import Forecast
from coterie.compression.methods import closest, get_method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import make_plan, plan_method
from coterie.compression.recipe import Recipe
from coterie.compression.selector import Budget, parse_layers, parse_protect
from coterie.errors import UsageError
from coterie.evaluation.compare import ModelResult, evaluate_models
from coterie.profiling.observe import unique
from coterie.profiling.observers import OBSERVERS, Observer
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.lockstep import Progress, States
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, check_place, parse_size
from coterie.text import TokenData, check_ids, load_data, load_tokenizer, load_tokens

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
        _check_device(self.device)
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.offline:
            import os

            os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        return StreamedModel(
            Checkpoint.open(model, offline=self.offline),
            device=self.device,
            compute_dtype=self.compute_dtype,
            allow_nonfinite=self.allow_nonfinite,
            trust_remote_code=self.trust_remote_code,
        )


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
    seed: int = 0,
    runtime: Runtime | None = None,
) -> TokenData | None:
    """Samples from text files, folders, dataset names (`data`) or a file of token ids (`tokens`); None if neither."""
    runtime = runtime or Runtime()
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
        samples=samples,
        length=length,
        batch_size=batch_size,
        pack=pack,
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
        protect=parse_protect([protect] if isinstance(protect, str) else list(protect)),
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


_TEXT = ("tokens", "tokenizer", "samples", "length", "batch_size", "pack")  # of what `calibration` takes


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
    streamed = runtime.open(model)
    how_much = None if ready_plan else budget_of(streamed, **budget)
    found = None
    if ready_plan is None and ready_profile is None and chosen.observes():
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
    result = run_compress(
        given.pop("streamed"),
        Path(out),
        shard_bytes=parse_size(shard_size) if shard_size else DEFAULT_SHARD_BYTES,
        overwrite=overwrite,
        progress=progress,
        on_first_layer=on_first_layer,
        **given,
    )
    result.warnings[:0] = given["data"].warnings if given["data"] else []
    return result


def recipe_request(recipe: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe file as keywords of `compress`."""
    loaded = Recipe.load(Path(recipe))
    step = loaded.steps[0]
    request: dict[str, Any] = {
        "method": step.method,
        "parameters": step.parameters,
        "propagate": step.propagate,
        "data": loaded.data,
        "samples": loaded.samples,
        "length": loaded.length,
        "seed": loaded.seed,
    }
    return {**request, **step.budget.model_dump(exclude_unset=True), **(extra or {})}


def evaluate(
    models: Sequence[str],
    data: Sequence[str] = (),
    *,
    samples: int = 64,
    seed: int = 0,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> list[ModelResult]:
    """Loss and perplexity of every model on text and, for all but the first, KL to and agreement with the first.

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
    return evaluate_models(opened, found, memory=parse_size(runtime.memory, least=0), progress=progress, seed=seed)


def load(path: str, *, dtype: str = "auto", **options: Any) -> tuple[Any, Any]:
    """A model and its tokenizer, whole in memory, by plain transformers. Options go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    folder = resolve(path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    return model, load_tokenizer(folder)
