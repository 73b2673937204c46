"""Compare methods and budgets on your model and your data, without writing a checkpoint.

Two passes over the weights, whatever the number of contenders:

1. one profile sweep on the calibration text with the statistics of all methods together; then every plan is made;
2. one evaluation sweep: the original and every contender run side by side. While a layer is in memory it is narrowed
   to what a plan keeps, its contender's batches pass, and it is put back; a method that recombines weights works on a
   copy of the layer's experts.

Checkpoints that are there already (healed, trained, quantized elsewhere) stand beside them, each read once more.

What a contender would weigh follows from its plan. Quality is loss on held-out text, with paired bootstrap intervals
over sequences: against the original, and against the best contender of the same budget.
"""

# S sequences

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from coterie.analysis.frontier import render_comparison
from coterie.analysis.page import write_page
from coterie.anatomy import MoELayer, narrowed, slice_names
from coterie.anatomy.forms import put_back_dense
from coterie.compression.apply import replaced, router_rows
from coterie.compression.methods import Method, OwnJob, get_method
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import known_counts, make_plan, plan_method
from coterie.compression.rewrite import layout
from coterie.compression.selector import Budget
from coterie.compression.sizes import Size, measure, measure_written
from coterie.errors import CoterieError, UsageError
from coterie.evaluation.bootstrap import stratified
from coterie.evaluation.compare import ModelResult
from coterie.evaluation.variants import RunLosses
from coterie.experts.forward import rerouted
from coterie.profiling.observe import unique
from coterie.profiling.observers import Observer
from coterie.profiling.profile import Profile
from coterie.profiling.run import profile_model
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import Workspace, write_json
from coterie.text import TokenData

ORIGINAL, CHECKPOINT = "original", "checkpoint"


@dataclass(frozen=True)
class Difference:
    """A rise of the loss, mean over domains, with its paired 95% interval, nats per token."""

    mean: float = 0.0
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Contender:
    """One method under one budget.

    label : method, its parameters and what it keeps; or a checkpoint. plan : what it decided; None for a checkpoint.
    refused : why it cannot be had, or "".
    size : of the checkpoint its plan would make. quality : loss, KL and agreement by domain.
    delta : rise of the loss against the original. behind : against the best contender of its budget; 0 for that one.
    pareto : nothing here is smaller (in bytes) and better.
    """

    label: str
    method: str
    parameters: dict[str, Any]
    budget: str
    plan: Plan | None = None
    refused: str = ""
    size: Size | None = None
    quality: ModelResult | None = None
    delta: Difference = Difference()
    behind: Difference = Difference()
    pareto: bool = False

    def describe(self) -> dict[str, Any]:
        told = ("label", "method", "parameters", "budget", "refused")
        entry = {name: getattr(self, name) for name in told}
        if self.quality is None or self.size is None:
            return entry
        entry |= {"delta": asdict(self.delta), "behind": asdict(self.behind), "pareto": self.pareto}
        return {**entry, "size": self.size.describe(), "quality": self.quality.describe()}


@dataclass
class Comparison:
    """What `compare` found. sweeps and bytes_read count passes over the weights for all contenders together."""

    model: str
    original: ModelResult
    size: Size
    contenders: list[Contender]
    sweeps: int
    bytes_read: int
    domains: list[str]
    calibration: dict[str, Any]
    evaluation: dict[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def ran(self) -> list[Contender]:
        return [c for c in self.contenders if not c.refused]

    def describe(self) -> dict[str, Any]:
        names = ("model", "sweeps", "bytes_read", "domains", "calibration", "evaluation", "warnings")
        return {
            **{name: getattr(self, name) for name in names},
            "original": {"size": self.size.describe(), "quality": self.original.describe()},
            "contenders": [c.describe() for c in self.contenders],
        }


@dataclass(frozen=True)
class Entry:
    """A method as it was asked for: `dern` or `dern:alpha=0.3,selector=reap`."""

    name: str
    parameters: dict[str, Any]

    @property
    def label(self) -> str:
        return self.name + (":" + ",".join(f"{k}={v}" for k, v in self.parameters.items()) if self.parameters else "")

    @classmethod
    def parse(cls, text: str) -> Entry:
        name, _, rest = text.strip().partition(":")
        parameters = {}
        for item in filter(None, (part.strip() for part in rest.split(","))):
            key, equals, value = item.partition("=")
            if not equals:
                raise UsageError(f"cannot read the method {text!r}", "Write name or name:parameter=value,other=value.")
            parameters[key.strip().replace("-", "_")] = yaml.safe_load(value)
        return cls(name, parameters)


def compare(
    streamed: StreamedModel,
    model: str,
    entries: Sequence[Entry],
    budgets: Sequence[Budget],
    calibration: TokenData,
    evaluation: TokenData,
    *,
    checkpoints: Sequence[tuple[str, StreamedModel]] = (),
    memory: int = 2 * 2**30,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Every method under every budget, in two sweeps.

    Parameters
    ----------
    streamed : the original, freshly opened.
    entries, budgets : what to compare. A pair that cannot be (a budget below top-k) is reported, not raised, unless
        no pair can be.
    calibration, evaluation : what experts are judged by, and text that no method has seen.
    checkpoints : names and finished checkpoints with the same vocabulary, to stand beside the methods.
    memory : bytes of hidden states kept in memory; the rest is spilled.

    Raises UsageError for an unknown method or parameter, or if nothing can be compared. Peak memory: one layer (with
    a copy of its experts for methods that recombine them), the hidden states up to `memory` twice, the head.
    """
    methods = [get_method(entry.name, entry.parameters) for entry in entries]
    for entry, chosen in zip(entries, methods, strict=True):
        if isinstance(chosen, OwnJob):
            raise UsageError(
                f"{entry.name} cannot be compared on the fly: {chosen.on_the_fly}",
                f"Write it with `coterie compress --method {entry.name}` and name the result with --checkpoint.",
            )
    size = measure(streamed)
    read = streamed.checkpoint.bytes_read
    profile = Profile(model, streamed.checkpoint.digest(), calibration.digest, calibration.domains, {})
    if methods:  # checkpoints alone were judged by nothing
        observers = _observers(streamed, methods, budgets, size)
        profile = profile_model(
            streamed, calibration, observers, model=model, states=States(limit=memory), progress=progress
        )
    pairs = [(e, m, b) for b in budgets for e, m in zip(entries, methods, strict=True) if not m.keeps_all]
    pairs += [(e, m, Budget(keep=1.0)) for e, m in zip(entries, methods, strict=True) if m.keeps_all]
    contenders = [_planned(streamed, model, entry, chosen, budget, profile, size) for entry, chosen, budget in pairs]
    running = [c for c in contenders if not c.refused]
    if not running and not checkpoints:
        raise UsageError(f"nothing to compare: {contenders[0].label}: {contenders[0].refused}")
    plans = [c.plan for c in running if c.plan is not None]
    losses = _run(streamed, plans, [plan_method(plan) for plan in plans], evaluation, memory, progress)
    results = losses.results(streamed, [ORIGINAL, *(c.label for c in running)], seed)
    read_here = streamed.checkpoint.bytes_read - read
    for name, other in checkpoints:
        contenders.append(Contender(name, "checkpoint", {}, CHECKPOINT, size=measure(other)))
        running.append(contenders[-1])
        results.append(losses.other(streamed, other, name, memory=memory, progress=progress, seed=seed))
        read_here += other.checkpoint.bytes_read
    streamed.free_outer()
    judged = _judged(running, results, losses, seed)
    by_label = {c.label: c for c in judged}
    return Comparison(
        model,
        results[0],
        size,
        [by_label.get(c.label, c) for c in contenders],
        sweeps=1 + bool(methods) + len(checkpoints),
        bytes_read=read_here,
        domains=evaluation.domains,
        calibration={
            **{name: getattr(calibration, name) for name in ("samples", "length", "tokens", "sources", "digest")}
        },
        evaluation={"samples": evaluation.samples, "tokens": evaluation.tokens, "digest": evaluation.digest},
        warnings=[*calibration.warnings],
    )


def _observers(
    streamed: StreamedModel, methods: Sequence[Method], budgets: Sequence[Budget], size: Size
) -> list[type[Observer]]:
    """The statistics of all methods under all budgets, each once."""
    wanted: list[type[Observer]] = []
    for budget in [*budgets, Budget(keep=1.0)]:
        for chosen in methods:
            if chosen.keeps_all != (budget.keep == 1.0 and budget not in budgets):
                continue
            try:
                wanted += chosen.observes_for(known_counts(streamed, chosen, budget, size))
            except UsageError:
                continue  # said again when it is planned
    return list(unique(wanted))


def _planned(
    streamed: StreamedModel,
    model: str,
    entry: Entry,
    chosen: Method,
    budget: Budget,
    profile: Profile,
    size: Size,
) -> Contender:
    told = "all kept" if chosen.keeps_all else _told(budget)
    base = Contender(f"{entry.label} {told}", entry.name, entry.parameters, told)
    try:
        if chosen.sees_twice:
            raise UsageError("with these parameters it looks at the text again while it writes")
        plan = make_plan(streamed, model, entry.name, chosen, budget, profile)
        for layer in plan.layers:
            if reason := chosen.plain_checkpoint(layer):
                raise UsageError(reason)
    except CoterieError as error:
        return replace(base, refused=error.message)
    counts = {layer.index: len(layer.keep) for layer in plan.layers}
    active = {index: chosen.active(moe) for index, moe in streamed.moe.items()}
    written = measure_written(streamed, *layout(streamed, *replaced(streamed, counts, chosen)), counts, active)
    return replace(base, plan=plan, size=written)


def _told(budget: Budget) -> str:
    if budget.keep is not None:
        return f"{budget.keep:g}"
    return f"{budget.keep_experts} experts" if budget.keep_experts is not None else f"{budget.target_bytes} bytes"


def _run(
    streamed: StreamedModel,
    plans: Sequence[Plan],
    methods: Sequence[Method],
    data: TokenData,
    memory: int,
    progress: Progress | None,
) -> RunLosses:
    """The original and every plan through one sweep: batch number // batches per run says whose batch it is."""
    losses, count = RunLosses(data, memory, pool=False), len(data.batches)
    batches = data.batches * (1 + len(plans))
    layers = [{layer.index: layer for layer in plan.layers} for plan in plans]
    # routers are wanted as they are stored, as in a checkpoint that is written
    router = {n for moe in streamed.moe.values() for n in _router_names(streamed, moe)}
    streamed.retain = router

    def finish(number: int, batch: Batch, hidden_BLH: torch.Tensor) -> None:
        losses.finish(number // count, number % count, batch, hidden_BLH)

    for step in sweep(streamed, batches, finish=finish, states=States(limit=memory), progress=progress):
        if step.index not in streamed.moe:
            step.run()
            continue
        moe = streamed.moe[step.index]
        stored = {name: streamed.retained.pop(name) for name in _router_names(streamed, moe)}
        with ExitStack() as stack:
            present = 0

            def switch(
                number: int,
                batch: Batch,
                stack: ExitStack = stack,
                moe: MoELayer = moe,
                stored: Mapping[str, torch.Tensor] = stored,
            ) -> None:
                nonlocal present
                run = number // count
                if run != present:
                    stack.close()  # the layer is as it was
                    stack.enter_context(as_planned(moe, methods[run - 1], layers[run - 1][moe.index], stored))
                    present = run

            step.run(before=switch)
    streamed.retain = set()
    return losses


def _router_names(streamed: StreamedModel, moe: MoELayer) -> list[str]:
    return [name for name in slice_names(moe) if not name.startswith(f"{moe.experts_name}.")]


@contextmanager
def as_planned(moe: MoELayer, method: Method, plan: LayerPlan, stored: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let a layer be, for a while, what a plan makes of it: experts recombined, cut away or shared.

    stored : the layer's router tensors by model name, as stored; only methods that make router rows ask for them.
    Memory: a copy of the layer's experts where weights change. Afterwards the layer is as it was.
    """
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    if method.rebuilds or method.ranks(moe):
        saved = [(p.data, p.detach().clone()) for p in moe.experts.parameters(recurse=False)]
        factors = method.factor(moe.bank, plan)
        method.rebuild(moe.bank, plan)
        if factors is not None:
            put_back_dense(moe.bank, plan.keep, factors)
    try:
        with ExitStack() as stack:
            if (slot := method.slot(moe)) is not None:
                stack.enter_context(rerouted(moe.experts, slot))
            target = method.expert_map(plan)
            if target is None:
                stack.enter_context(narrowed(moe, plan.keep, router_rows(method, moe, stored, plan) or None))
            else:
                stand_in = [plan.keep[position] for position in target] + [moe.num_experts]
                table = torch.tensor(stand_in, device=moe.router_device)
                stack.enter_context(rerouted(moe.experts, lambda i, w: (table[i.clamp(max=len(target))], w)))
            yield
    finally:
        for tensor, before in saved:
            tensor.copy_(before)


def _judged(
    running: Sequence[Contender], results: Sequence[ModelResult], losses: RunLosses, seed: int
) -> list[Contender]:
    """Quality, intervals against the original and against the best of each budget, and the Pareto front."""

    def difference(run: int, other: int) -> Difference:
        strata = []
        for domain in range(len(losses.data.domains)):
            here_S = (losses.domain_S == domain) & (losses.tokens_S > 0)
            strata.append((losses.loss_S[run][here_S] - losses.loss_S[other][here_S], losses.tokens_S[here_S]))
        return Difference(*stratified(strata, seed=seed))

    judged = []
    for run, contender in enumerate(running, 1):
        quality = replace(results[run], model=contender.label)
        judged.append(replace(contender, quality=quality, delta=difference(run, 0)))
    best = {
        budget: min((c.delta.mean, run) for run, c in enumerate(judged, 1) if c.budget == budget)[1]
        for budget in {c.budget for c in judged}
    }
    judged = [replace(c, behind=difference(run, best[c.budget])) for run, c in enumerate(judged, 1)]
    return [replace(c, pareto=not any(_beats(other, c) for other in judged)) for c in judged]


def _beats(a: Contender, b: Contender) -> bool:
    """Is `a` at least as small and as good as `b`, and one of them strictly?"""
    assert a.size is not None
    assert b.size is not None
    mine, theirs = (a.size.bytes, a.delta.mean), (b.size.bytes, b.delta.mean)
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def save(comparison: Comparison, folder: Path, *, overwrite: bool = False) -> None:
    """Write comparison.json, comparison.html and one plan per contender to `folder`, whole or not at all."""
    names = ["comparison.json", "comparison.html"]
    with Workspace(folder, {"comparison": comparison.evaluation["digest"]}, overwrite=overwrite) as work:
        write_json(work.folder / names[0], comparison.describe())
        write_page(render_comparison(comparison.describe()), work.folder / names[1])
        for contender in comparison.ran:
            if contender.plan is None:
                continue
            name = f"plan-{re.sub(r'[^a-zA-Z0-9.]+', '-', contender.label)}.json"
            contender.plan.save(work.folder / name)
            names.append(name)
        work.publish(names)
