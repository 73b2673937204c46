"""Use a model: measure it, load it, skip its weak experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from coterie.anatomy import moe_layers
from coterie.anatomy.forms import with_planes
from coterie.compression.selector import parse_layers, parse_protect
from coterie.decoding.skipping import Skipped, betas, check_fit, counted, skip
from coterie.errors import UsageError
from coterie.evaluation.compare import ModelResult, evaluate_models
from coterie.experts.nested import nested_modules
from coterie.profiling.profile import Profile
from coterie.streaming.checkpoint import resolve
from coterie.streaming.config import choose_compute_dtype
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import parse_size
from coterie.text import check_ids, load_tokenizer

if TYPE_CHECKING:
    from coterie.evaluation.harness import TaskScores
from coterie.api.runtime import Runtime, calibration, check_device, vocabulary_of


def evaluate(
    models: Sequence[str],
    data: Sequence[str] = (),
    *,
    samples: int = 64,
    skip_profile: str | Profile | None = None,
    skip_quantile: float = 0.5,
    skip_tokens: float = 0.0,
    skip_layers: str | None = None,
    planes: int | None = None,
    seed: int = 0,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> list[ModelResult]:
    """Loss and perplexity of every model on text and, for all but the first, KL to and agreement with the first.

    skip_profile : a profile of the first model that holds `GateRatio`; that model is then measured a second time, with
        its weak experts skipped at run time (see `skipping`), and what was skipped is told in its name. skip_quantile,
        skip_tokens, skip_layers : quantile, protect_tokens and layers there.
    planes : checkpoints with nested experts are read with only so many planes; others as they are.
    Checkpoints with mask routers (OTP) tell in their name how many experts per token they ran.

    Keywords beyond these are `calibration`'s: length, tokens, ...
    """
    runtime = runtime or Runtime()
    names = [models] if isinstance(models, str) else list(models)
    found = calibration(names[0], data, samples=samples, seed=seed, runtime=runtime, **text)
    if found is None:
        raise UsageError("evaluation needs text", "Name some with --data.")
    opened = [(name, runtime.open(name)) for name in names]
    if planes is not None:
        opened = _with_planes(opened, runtime, planes)
    for _, streamed in opened:
        check_ids(found, vocabulary_of(streamed))
    sizes = {m.config.get_text_config(decoder=True).vocab_size for _, m in opened}
    if len(sizes) > 1:
        raise UsageError(f"these models have different vocabularies ({sorted(sizes)}) and cannot be compared")
    memory = parse_size(runtime.memory, least=0)
    with ExitStack() as stack:
        counts = [stack.enter_context(counted(streamed.moe.values())) for _, streamed in opened]
        if skip_profile is not None:
            seen = skip_profile if isinstance(skip_profile, Profile) else Profile.load(Path(skip_profile))
            again = runtime.open(names[0])
            check_fit(seen, again.moe.values())
            thresholds = _of_layers(betas(seen, skip_quantile), skip_layers)
            counts.append(stack.enter_context(skip(again, thresholds, protect_tokens=skip_tokens)))
            opened.append((f"{names[0]} skipping", again))
        results = evaluate_models(opened, found, memory=memory, progress=progress, seed=seed)
    for result, skipped in zip(results, counts, strict=True):
        if skipped is not None:
            result.model += f" ({skipped.active:.2f} experts per token)"
    return results


def _with_planes(
    opened: list[tuple[str, StreamedModel]], runtime: Runtime, planes: int
) -> list[tuple[str, StreamedModel]]:
    """The same checkpoints, those with nested experts opened with only so many planes. Raises UsageError if none is."""
    nested = [bool(nested_modules(streamed.model)) for _, streamed in opened]
    if not any(nested):
        raise UsageError(
            f"--planes {planes}: no expert of {', '.join(name for name, _ in opened)} is stored in planes",
            "Only what --method d2moe wrote has planes to leave.",
        )
    return [
        (f"{name}, {planes} planes", runtime.open(name, planes=planes)) if has else (name, streamed)
        for has, (name, streamed) in zip(nested, opened, strict=True)
    ]


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
    planes: int | None = None,
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
    planes : of nested experts (method d2moe), only the base and so many planes are read and held.
    groups : False switches group-limited routing off, as the paper does, so that any experts may stay.
    """
    folder = resolve(path)
    chosen = {"task": task, "query": query, "keep": keep, "keep_experts": keep_experts, "threshold": threshold}
    if pattern is None:
        if given := [name for name, value in chosen.items() if value is not None]:
            raise UsageError(f"{given[0]} says which experts to load, but there is no pattern", "Give pattern=STORE.")
        from transformers import AutoModelForCausalLM

        more: dict[str, Any] = {"experts_implementation": experts_implementation} if experts_implementation else {}
        if planes is not None:
            more["config"] = _narrower(folder, planes, trust_remote_code=bool(options.get("trust_remote_code")))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more, **options).eval()
        if str(dtype).endswith("float32") and not getattr(model, "is_quantized", False):
            model = model.float()  # of packed checkpoints, transformers leaves what is not packed as it is stored
        return (model if device == "cpu" else model.to(device)), load_tokenizer(folder)
    if planes is not None:
        options["planes"] = planes
    if options:
        raise UsageError(f"load with a pattern has no option {min(options)!r}")
    from coterie.patterns.loading import load_pattern

    check_device(device)
    tokenizer = load_tokenizer(folder)
    how = {"groups": groups, "dtype": str(dtype), "device": device, "experts": experts_implementation}
    return load_pattern(folder, pattern, tokenizer, **chosen, **how), tokenizer  # type: ignore[arg-type]


def _narrower(folder: Path, planes: int, *, trust_remote_code: bool) -> Any:
    """The config of a checkpoint as if its nested experts had only so many planes."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    config.quantization_config = with_planes(getattr(config, "quantization_config", None) or {}, planes)
    return config


@contextmanager
def skipping(
    model: Any,
    profile: str | Profile,
    *,
    quantile: float = 0.5,
    renormalise: bool = True,
    protect: Sequence[str] = (),
    protect_tokens: float = 0.0,
    layers: str | None = None,
) -> Iterator[Skipped]:
    """Skip a token's weak experts while a model in memory runs (NAEE, arXiv:2402.14800); gives the counts.

    With protect_tokens=0.02 it is ODP (arXiv:2410.06270).

    profile : holds `GateRatio` of this very model. quantile, renormalise : see `coterie.decoding.skipping`.
    protect : experts that are never skipped, as "layer:expert". protect_tokens : share of each sequence's tokens, the
        most important ones, that keep all experts; attention then runs in its plain form.
    layers : only these decoder layers skip, e.g. "4-30".
    """
    loaded = profile if isinstance(profile, Profile) else Profile.load(Path(profile))
    check_fit(loaded, moe_layers(model))
    held = parse_protect([protect] if isinstance(protect, str) else list(protect))
    thresholds = _of_layers(betas(loaded, quantile), layers)
    with skip(model, thresholds, renormalise=renormalise, protect=held, protect_tokens=protect_tokens) as done:
        yield done


def _of_layers(found: dict[int, torch.Tensor], layers: str | None) -> dict[int, torch.Tensor]:
    """The thresholds of some decoder layers. Raises UsageError if there is none among them."""
    chosen = parse_layers(layers, None, sorted(found))
    return found if chosen is None else {index: beta_R for index, beta_R in found.items() if index in chosen}
