"""Make a model smaller: budgets, plans, one compression or several, and which is best for a model and a text."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from coterie import comparison
from coterie.compression import exporting, gguf_export, padding
from coterie.compression.bits import load_plan
from coterie.compression.compress import Result, run_forecast
from coterie.compression.compress import compress as run_compress
from coterie.compression.factorizing.mc_smoe import McSmoe
from coterie.compression.fitting import relative
from coterie.compression.forecast import Forecast
from coterie.compression.methods import OwnJob, get_method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import make_plan, plan_method
from coterie.compression.quantize import plan_bits, quantize_checkpoint, quantize_forecast
from coterie.compression.quantizing.base import Quantizer
from coterie.compression.quantizing.d2moe_router import D2MoeRouter
from coterie.compression.recipe import ORIGINAL, Recipe, RecipeHeal
from coterie.compression.selector import Budget, parse_layers, parse_protect
from coterie.compression.skipping.otp import Otp
from coterie.compression.slim import slim, slim_forecast
from coterie.compression.slimming.slimmoe import SlimMoE
from coterie.compression.sparsify import sparsify, sparsify_forecast
from coterie.compression.sparsifying.base import Sparsifier
from coterie.errors import UsageError
from coterie.profiling.profile import LayerProfile, Profile
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, check_place, parse_size
from coterie.text import TokenData, check_ids, held_out

if TYPE_CHECKING:
    from coterie.architectures.stock import Stock
    from coterie.training.heal import Healed
from coterie.api.runtime import SAMPLES, Runtime, calibration, vocabulary_of
from coterie.api.train import HEAL_OPTIONS, check_teacher, heal, heal_options


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
        target_bytes=None if target_size is None else target_bytes(target_size, streamed),
        scope=scope,
        minimum=minimum,
        layers=parse_layers(layers, exclude_layers, sorted(streamed.moe)),
        protect=parse_protect([protect] if isinstance(protect, str) else list(protect), streamed.checkpoint.digest),
    )


def target_bytes(size: str | int, streamed: StreamedModel) -> int:
    """Bytes of a size as it is written: "12GB", "0.25x" of a checkpoint's tensors, or a number."""
    if not isinstance(size, str):
        return size
    share = relative(size, streamed)
    return parse_size(size) if share is None else share


def plan(
    model: str,
    profile: str | Profile | None = None,
    *,
    method: str = "reap",
    parameters: dict[str, Any] | None = None,
    out: str | None = None,
    runtime: Runtime | None = None,
    **budget: Any,
) -> Plan:
    """Decide, on a finished profile, which experts stay, or how many bits each gets.

    Keywords beyond these are `budget_of`'s (keep=0.5, ...); a method that quantizes takes `protect` of them, and needs
    no profile if it looks at weights alone.
    """
    streamed = (runtime or Runtime()).open(model)
    loaded = Profile.load(Path(profile)) if isinstance(profile, str) else profile
    chosen = get_method(method, parameters)
    if isinstance(chosen, Quantizer):
        protected = budget_of(streamed, keep=1.0, protect=budget.pop("protect", ())).protect
        if (size := budget.pop("target_size", None)) is not None:
            chosen = chosen.fitted(streamed, target_bytes(size, streamed))
        _refuse_budget({k: v for k, v in budget.items() if v is not None}, chosen.how_much)
        bits = plan_bits(streamed, model, method, chosen, loaded, protected)
        if out is not None:
            bits.save(Path(out))
        return bits
    if loaded is None:
        raise UsageError(
            f"{method} plans on a finished profile", "Make one with `coterie profile` and name it with --profile."
        )
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


def _factorize(*given: Any, **named: Any) -> Result:
    from coterie.training.factorize import factorize  # the Trainer loads here, not for every verb

    return factorize(*given, **named)


def _factorize_forecast(*given: Any, **named: Any) -> Forecast:
    from coterie.training.factorize import factorize_forecast

    return factorize_forecast(*given, **named)


def _learn_masks(*given: Any, **named: Any) -> Result:
    from coterie.training.skipping import learn_masks

    return learn_masks(*given, **named)


def _learn_masks_forecast(*given: Any, **named: Any) -> Forecast:
    from coterie.training.skipping import learn_masks_forecast

    return learn_masks_forecast(*given, **named)


def _learn_widths(*given: Any, **named: Any) -> Result:
    from coterie.training.widths import learn_widths

    return learn_widths(*given, **named)


def _learn_widths_forecast(*given: Any, **named: Any) -> Forecast:
    from coterie.training.widths import learn_widths_forecast

    return learn_widths_forecast(*given, **named)


JOBS: dict[type[OwnJob], tuple[Callable[..., Result], Callable[..., Forecast]]] = {
    Sparsifier: (sparsify, sparsify_forecast),
    SlimMoE: (slim, slim_forecast),
    McSmoe: (_factorize, _factorize_forecast),
    Quantizer: (quantize_checkpoint, quantize_forecast),
    D2MoeRouter: (_learn_widths, _learn_widths_forecast),
    Otp: (_learn_masks, _learn_masks_forecast),
}

_NO_BUDGET: dict[str, Any] = {"scope": "uniform", "minimum": 1, "protect": ()}  # what says nothing


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
    ready_plan = load_plan(Path(plan)) if isinstance(plan, str) else plan
    ready_profile = Profile.load(Path(profile)) if isinstance(profile, str) else profile
    if ready_plan is not None and (budget or ready_profile):
        raise UsageError("a plan already says what stays: give it alone, without a budget or a profile")
    if ready_profile is not None and (data or text.get("tokens")):
        given = "--data" if data else "--tokens"
        raise UsageError(f"--profile and {given} both say what experts are judged by", "Give one of them.")
    chosen = plan_method(ready_plan) if ready_plan else get_method(method, parameters)
    if isinstance(chosen, OwnJob):
        return _prepare_job(
            model,
            chosen,
            ready_plan.method if ready_plan else method,
            runtime,
            data,
            seed,
            text,
            budget,
            profile=ready_profile,
            plan=ready_plan,
            propagate=propagate,
        )
    if chosen.keeps_all:
        _refuse_budget(budget, f"see `coterie methods {method}`", profile=profile, propagate=propagate)
        budget = {} if ready_plan else {"keep": 1.0}
    streamed = runtime.open(model)
    how_much = None if ready_plan else budget_of(streamed, **budget)
    found = None
    if ready_plan is None and ready_profile is None and any(o.needs_text for o in chosen.observes()):
        found = calibration(model, data, seed=seed, runtime=runtime, **text)
    if found is not None:
        check_ids(found, vocabulary_of(streamed))
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


def _prepare_job(
    model: str,
    method: OwnJob,
    name: str,
    runtime: Runtime,
    data: Sequence[str],
    seed: int,
    text: dict[str, Any],
    budget: dict[str, Any],
    **other: Any,
) -> dict[str, Any]:
    """The checked request of a method with a job of its own: it has no budget of experts, and of protected experts,
    profile and plan what it takes."""
    taken = {key: value for key, value in other.items() if key in method.takes}
    protected = budget.pop("protect", ()) if "protect" in method.takes else ()
    size = budget.pop("target_size", None) if "target_size" in method.takes else None
    _refuse_budget(budget, method.how_much, **{key: value for key, value in other.items() if key not in taken})
    method.check()
    streamed = runtime.open(model)
    if isinstance(method, Quantizer) and size is not None and taken.get("plan") is None:
        method = method.fitted(streamed, target_bytes(size, streamed))
    if "protect" in method.takes:
        taken["protected"] = budget_of(streamed, keep=1.0, protect=protected).protect
    found = calibration(model, data, seed=seed, runtime=runtime, **text) if method.needs_text else None
    if method.needs_text and found is None and not any(taken.get(key) for key in ("profile", "plan")):
        raise UsageError(f"{name} looks at text, and no text was given", method.without_text)
    if found is not None:
        check_ids(found, vocabulary_of(streamed))
    memory = parse_size(runtime.memory, least=0)
    request = {"streamed": streamed, "model": model, "method": method, "name": name, "data": found, **taken}
    if "teacher" in type(method).model_fields:
        teacher = getattr(method, "teacher")  # noqa: B009
        request["teacher"] = None if teacher in (None, ORIGINAL, model) else runtime.open(str(teacher))
    return {**request, "seed": seed, "memory": memory}


def _refuse_budget(budget: dict[str, Any], instead: str, **other: Any) -> None:
    """Raise UsageError for options that say which experts stay, where all do."""
    said = [key for key, value in budget.items() if value not in (_NO_BUDGET.get(key), [])]
    said += [key for key, value in other.items() if value]
    if said:
        options = ", ".join("--" + key.replace("_", "-") for key in said)
        raise UsageError(
            f"this method removes no expert: {options} would be ignored", f"Leave out {options}; {instead}."
        )


def _job_of(method: OwnJob) -> tuple[Callable[..., Result], Callable[..., Forecast]]:
    """What carries a method with a job of its own out, and what says beforehand what it needs."""
    return next(job for kind, job in JOBS.items() if isinstance(method, kind))


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
    if isinstance(given["method"], OwnJob):
        return _job_of(given["method"])[1](Path(out), **given)
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
    if isinstance(given["method"], OwnJob):
        result = _job_of(given["method"])[0](streamed, Path(out), **options, **given)
    else:
        result = run_compress(streamed, Path(out), on_first_layer=on_first_layer, **options, **given)
    result.warnings[:0] = given["data"].warnings if given["data"] else []
    return result


def recipe_requests(recipe: str, extra: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """A recipe file as keywords of `compress`, one set for each step; those of `heal` stand under "heal" instead.

    Methods, parameters and options are checked. recipe : a file, or the name of one that ships with Coterie.
    extra : how text is read, in every step; with `data`, the text of a recipe that names none.
    """
    loaded, extra = Recipe.load(Path(recipe)), dict(extra or {})
    if text := extra.pop("data", None):
        if loaded.data:
            raise UsageError(
                f"the recipe {recipe} names its text already: --data would be ignored", "Leave one of them out."
            )
        loaded = loaded.model_copy(update={"data": list(text)})
    requests: list[dict[str, Any]] = []
    for step in loaded.steps:
        if step.heal is not None:
            requests.append({"heal": _heal_request(step.heal, loaded, extra)})
            continue
        assert step.method is not None
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
        requests.append({**request, **step.budget.model_dump(exclude_unset=True), **extra})
    return requests


def _heal_request(step: RecipeHeal, recipe: Recipe, extra: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `api.heal` for a step of a recipe, checked."""
    request: dict[str, Any] = {
        **step.model_dump(exclude_unset=True),
        "teacher": step.teacher,
        "data": step.data or recipe.data,
        "seed": recipe.seed,
        **{name: extra[name] for name in ("tokenizer", "pack") if name in extra},
    }
    if "tokens" in extra and not step.data:
        request["tokens"] = extra["tokens"]
    heal_options(**{k: v for k, v in request.items() if k in HEAL_OPTIONS})
    return request


def _with_teacher(request: dict[str, Any], original: str) -> dict[str, Any]:
    """A step whose parameters name a teacher `original` means the model that the recipe began with."""
    parameters = request.get("parameters") or {}
    if parameters.get("teacher") != "original":
        return request
    return {**request, "parameters": {**parameters, "teacher": original}}


def carry_out(
    model: str,
    out: str,
    requests: Sequence[dict[str, Any]],
    *,
    shard_size: str = "",
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    on_step: Callable[[int, Result | Healed], None] = lambda number, result: None,
) -> Result | Healed:
    """Compress and heal in several steps, each on the checkpoint the one before wrote; returns the last result.

    Parameters
    ----------
    requests : keywords of `compress` or `heal` for each step, as `recipe_requests` makes them.
    on_step : called with (number from 1, result) after every step.

    A parameter `teacher: original` of a step means `model`, in every step.

    Steps in between stand beside `out` as OUT.step1, ... until the last one is done. A killed run, started again, goes
    on in the step it was in. Every record (coterie.json) also holds those of the earlier steps.
    """
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    options: dict[str, Any] = {"shard_size": shard_size, "runtime": runtime, "progress": progress}
    for request in requests:
        if "heal" in request:
            _check_heal(model, request["heal"], runtime or Runtime())
    requests = [_with_teacher(request, model) for request in requests]
    source, between = model, list[Path]()
    identity = Checkpoint.open(model, offline=(runtime or Runtime()).offline).digest()
    for number, request in enumerate(requests, 1):
        identity = hashlib.sha256(json.dumps([identity, request], sort_keys=True, default=str).encode()).hexdigest()
        if number == len(requests):
            break
        folder = Path(f"{out}.step{number}")
        mark = folder / ".step"
        if not (mark.is_file() and mark.read_text() == identity):
            result = _step(model, source, str(folder), request, overwrite=overwrite or folder.exists(), **options)
            mark.write_text(identity)
            on_step(number, result)
        between.append(folder)
        source = str(folder)
    result = _step(model, source, out, requests[-1], overwrite=overwrite, **options)
    on_step(len(requests), result)
    for folder in between:
        shutil.rmtree(folder)
    return result


def _step(
    model: str, source: str, out: str, request: dict[str, Any], *, shard_size: str, **options: Any
) -> Result | Healed:
    """One step of a recipe that began with `model`: from `source` to `out`."""
    if "heal" not in request:
        return compress(source, out, shard_size=shard_size, **options, **request)
    asked = dict(request["heal"])
    teacher = asked.pop("teacher")
    return heal(source, out, teacher=model if teacher == ORIGINAL else teacher, **options, **asked)


def _check_heal(model: str, request: dict[str, Any], runtime: Runtime) -> None:
    """What is wrong with a step that heals should not be found after hours of compressing."""
    if request["teacher"] != ORIGINAL:
        check_teacher(model, request["teacher"], runtime)
    text = {name: request[name] for name in ("tokens", "tokenizer", "pack") if name in request}
    if (
        calibration(model, request["data"], samples=2, length=request.get("length", 256), runtime=runtime, **text)
        is None
    ):
        raise UsageError("healing needs text", "Name some with --data, or under `data` in the recipe.")


def two_texts(
    model: str,
    data: Sequence[str],
    eval_data: Sequence[str],
    eval_tokens: str | None,
    eval_samples: int,
    samples: int,
    seed: int,
    runtime: Runtime,
    text: dict[str, Any],
) -> tuple[TokenData, TokenData]:
    """Text to calibrate and to evaluate on; from one text for both, no sequence is in both."""
    separate = bool(eval_data) or eval_tokens is not None
    tokens = text.pop("tokens", None)
    more = 0 if separate else eval_samples
    given = calibration(model, data, tokens=tokens, samples=samples + more, seed=seed, runtime=runtime, **text)
    if given is None:
        raise UsageError("comparing needs text", "Name some with --data.")
    if not separate:
        return held_out(given, given.samples // 2 if tokens is not None else samples)
    second = calibration(model, eval_data, tokens=eval_tokens, samples=eval_samples, seed=seed, runtime=runtime, **text)
    assert second is not None
    return given, second


def compare(
    model: str,
    data: Sequence[str] = (),
    *,
    methods: Sequence[str] = ("reap",),
    checkpoints: Sequence[str] = (),
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
    checkpoints : finished checkpoints with the same vocabulary, to stand beside the methods; each is read once more.
    keep, keep_experts : budgets: shares of the experts, or numbers per layer.
    samples, eval_samples : sequences per domain to calibrate and to evaluate on.
    out : folder for comparison.json, comparison.html and a plan of every contender, ready for `compress(plan=...)`.

    Keywords beyond these are `calibration`'s (length, tokenizer, ...) and hold for both texts.
    """
    runtime = runtime or Runtime()
    wanted: list[dict[str, Any]] = [{"keep": share} for share in keep] + [{"keep_experts": n} for n in keep_experts]
    names = [methods] if isinstance(methods, str) else list(methods)
    entries = list(dict.fromkeys(name.strip() for name in names if name.strip()))
    if not entries and not checkpoints:
        raise UsageError("no method is named", "Name some with --methods, e.g. reap,dern; see `coterie methods`.")
    parsed = [comparison.Entry.parse(name) for name in entries]
    if not wanted and not all(get_method(e.name, e.parameters).keeps_all for e in parsed):
        raise UsageError("say how much may stay", "For example --keep 0.75,0.5,0.25.")
    if out is not None:
        check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    first, second = two_texts(model, data, eval_data, eval_tokens, eval_samples, samples, seed, runtime, text)
    streamed = runtime.open(model)
    for found in (first, second):
        check_ids(found, vocabulary_of(streamed))
    options: dict[str, Any] = {"scope": scope, "minimum": minimum, "layers": layers, "exclude_layers": exclude_layers}
    budgets = [budget_of(streamed, protect=protect, **options, **budget) for budget in wanted]
    memory = parse_size(runtime.memory, least=0)
    ready = [(name, runtime.open(name)) for name in checkpoints]
    for name, found_model in ready:
        if vocabulary_of(found_model) != vocabulary_of(streamed):
            raise UsageError(
                f"{name} knows {vocabulary_of(found_model)} tokens and {model} {vocabulary_of(streamed)}: they cannot"
                " be compared"
            )
    result = comparison.compare(
        streamed,
        model,
        parsed,
        budgets,
        first,
        second,
        checkpoints=ready,
        memory=memory,
        seed=seed,
        progress=progress,
    )
    if out is not None:
        comparison.save(result, Path(out), overwrite=overwrite)
    return result


def unpack(
    model: str,
    out: str,
    form: str,
    *,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> exporting.Exported | Stock:
    """A checkpoint in the form other software reads: a quantized one as "dense" or "compressed-tensors", see
    `coterie.compression.exporting`; a decoder of ours as "stock", see `coterie.architectures.stock`."""
    if form not in (*exporting.FORMS, "stock"):
        raise UsageError(f"no form {form!r}", f"There is {', '.join(exporting.FORMS)} and stock.")
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    if form == "stock":
        from coterie.architectures.stock import export_stock

        return export_stock(resolve(model, offline=(runtime or Runtime()).offline), Path(out), overwrite=overwrite)
    streamed = (runtime or Runtime()).open(model)
    return exporting.export(
        streamed, Path(out), cast(exporting.Form, form), model=model, overwrite=overwrite, progress=progress
    )


def export_gguf(
    model: str,
    out: str,
    kind: str = "Q8_0",
    *,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> exporting.Exported:
    """A checkpoint, plain or quantized, as one GGUF file in the folder `out`, see `coterie.compression.gguf_export`.

    kind : F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, MXFP4 (experts), TQ2_0 or TQ1_0.
    """
    gguf_export.check_type(kind)
    gguf_export.load_gguf()
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    streamed = (runtime or Runtime()).open(model)
    return gguf_export.export_gguf(streamed, Path(out), kind, model=model, overwrite=overwrite, progress=progress)


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
        check_ids(found, vocabulary_of(streamed))
    memory = parse_size(runtime.memory, least=0)
    return padding.pad(
        streamed, Path(out), model=model, data=found, overwrite=overwrite, memory=memory, progress=progress
    )
