"""Look into a model: profile it, find its super experts, learn the pattern of experts of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.analysis import ablation
from coterie.analysis import super_experts as massive
from coterie.compression.methods import closest, get_method
from coterie.compression.selector import parse_protect
from coterie.errors import UsageError
from coterie.evaluation.variants import RunLosses
from coterie.patterns.retrieval import Match, match
from coterie.patterns.store import PatternStore, build_store, check_out
from coterie.profiling.contribution import Shift
from coterie.profiling.observe import unique
from coterie.profiling.observers import OBSERVERS, Observer
from coterie.profiling.profile import Profile
from coterie.profiling.run import profile_model
from coterie.streaming.checkpoint import resolve
from coterie.streaming.lockstep import Progress, States
from coterie.streaming.writer import check_place, parse_size
from coterie.text import check_ids, from_text, load_tokenizer

if TYPE_CHECKING:
    pass
from coterie.api.runtime import LENGTH, Runtime, calibration, vocabulary_of


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
    """What every MoE layer does on text. Without `observers` or `methods`, all statistics are recorded but
    those for which every expert runs on every token (DenseOutput, OutputCosine).

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
    check_ids(samples_in, vocabulary_of(streamed))
    observed = unique(wanted) or [o for o in OBSERVERS.values() if not o.watches_all]
    states = States(limit=parse_size(runtime.memory, least=0))
    result = profile_model(streamed, samples_in, observed, model=model, states=states, progress=progress)
    if out is not None:
        result.save(Path(out), overwrite=overwrite)
    return result


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
    check_ids(found, vocabulary_of(streamed))
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
        check_ids(samples_in, vocabulary_of(streamed))
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
    check_ids(found, vocabulary_of(streamed))
    return match(loaded, streamed, found, threshold)
