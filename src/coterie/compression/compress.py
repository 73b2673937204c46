"""Compress a checkpoint: profile, plan and apply in one sweep, safe against crashes.

- A method that judges each layer alone, under a uniform budget, takes one sweep: a layer is profiled, planned, edited
  and written while it is in memory.
- A finished plan or profile takes one sweep too, without running the model.
- A budget over all layers, and a method that looks at weights alone, needs all layers before it can plan: one sweep to
  profile, one over the weights to apply.

A killed run, started again, goes on after the last whole layer and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from coterie.compression.apply import Output
from coterie.compression.forecast import Forecast, forecast, redundancy
from coterie.compression.methods import Method
from coterie.compression.observing import Seen, profile_first
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import (
    check_editable,
    check_plan,
    check_profile,
    known_counts,
    layer_plan_of,
    plan_layers,
)
from coterie.compression.records import earlier_steps, record_of, versions
from coterie.compression.selector import Budget, check_protect
from coterie.compression.sizes import Size, measure, measure_written
from coterie.errors import UsageError
from coterie.profiling.observe import LayerObservation, unique
from coterie.profiling.observers import MeanOutput, Observer, SelectionCount
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import survey
from coterie.streaming.lockstep import Progress, States, Step, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace
from coterie.text import TokenData

FORECAST: tuple[type[Observer], ...] = (SelectionCount, MeanOutput)  # what the redundancy estimate needs


@dataclass
class Result:
    """What `compress` did. `figures` are the method's own, per layer; `loads` the share of routed slots per expert."""

    out: Path
    plan: Plan
    before: Size
    after: Size
    sweeps: int
    bytes_read: int
    bytes_written: int
    resumed: bool
    record: dict[str, Any]
    figures: dict[int, dict[str, float]] = field(default_factory=dict)
    layers: dict[int, LayerProfile] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def compress(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: Method,
    name: str,
    budget: Budget | None = None,
    data: TokenData | None = None,
    profile: Profile | None = None,
    plan: Plan | None = None,
    propagate: bool = False,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    on_first_layer: Callable[[LayerProfile, LayerPlan], None] = lambda profile, plan: None,
    seed: int = 0,
) -> Result:
    """Write a smaller checkpoint to `out`.

    Parameters
    ----------
    streamed : StreamedModel
        The source, freshly opened. It is used up.
    method, name : the method and its registered name.
    budget : how much may stay; not with `plan`.
    data : calibration samples; needed unless the method looks at no data, or a profile or plan is given.
    propagate : later layers see what the changed earlier layers put out.
    memory : bytes of waiting hidden states kept in memory; the rest is spilled next to `out`.
    on_first_layer : called once the first MoE layer is planned (the forecast's moment).

    Raises UsageError, ModelError, CheckpointError, OutputError. Peak memory: one layer, the hidden states up to
    `memory`, and what the method states.
    """
    run = _Run(streamed, model, method, name, budget, data, profile, plan, propagate, shard_bytes, seed)
    with Workspace(out, run.job(), overwrite=overwrite) as work:
        return run.go(work, memory, progress or Progress(), on_first_layer)


def run_forecast(
    out: Path, *, measure_first: bool = False, progress: Progress | None = None, memory: int = 2 * 2**30, **request: Any
) -> Forecast:
    """What `compress` with the same arguments will need; checks the request as `compress` does, writes nothing.

    With `measure_first` and calibration data, runs up to the first MoE layer for seconds and a redundancy estimate.
    """
    run = _Run(shard_bytes=DEFAULT_SHARD_BYTES, **request)
    counts = {p.index: len(p.keep) for p in run.given.layers} if run.given else run.counts
    budget = run.budget
    share = sum(counts.values()) / run.before.experts_total if counts else (budget.keep if budget else 1) or 1
    ahead = forecast(run.streamed, run.before, share, out, run.data if run.needs_data else None, memory, run.sweeps)
    if not measure_first or run.data is None or not run.one_sweep:
        return ahead
    began = 0.0
    steps = sweep(run.streamed, run.data.batches, states=States(limit=memory), progress=progress)
    for step in steps:
        began = began or time.monotonic()
        if step.index in run.streamed.moe:
            layer = run._observe(step)
            seconds = (time.monotonic() - began) / (step.index + 1) * len(run.streamed.layers)
            plans = {step.index: run._plan_layer(layer)}
            steps.close()
            return replace(ahead, seconds=seconds, redundancy=redundancy({step.index: layer}, plans))
    return ahead


class _Run:
    """One compression, from checked request to published folder."""

    def __init__(
        self,
        streamed: StreamedModel,
        model: str,
        method: Method,
        name: str,
        budget: Budget | None,
        data: TokenData | None,
        profile: Profile | None,
        plan: Plan | None,
        propagate: bool,
        shard_bytes: int,
        seed: int,
    ) -> None:
        if plan is None and budget is None:
            raise UsageError("say how much may stay", "For example --keep 0.5.")
        self.streamed, self.model, self.method, self.name = streamed, model, method, name
        self.budget, self.data, self.profile, self.given = budget, data, profile, plan
        self.propagate, self.shard_bytes, self.seed = propagate, shard_bytes, seed
        self.digest = streamed.checkpoint.digest()
        earlier_steps(streamed.checkpoint.folder)  # damaged records are found before hours of work
        self.counts: dict[int, int] | None = None  # known beforehand under a uniform budget
        self.before = measure(streamed)
        check_editable(streamed, method)
        if budget is not None:
            check_protect(budget, streamed.moe)
            self.counts = known_counts(streamed, method, budget, self.before)
        self.observed = method.observes_for(self.counts) if profile is None and plan is None else ()
        self.needs_data = any(observer.needs_text for observer in self.observed) or method.sees_twice
        if self.needs_data and data is None:
            raise UsageError(
                f"{name} judges experts by what they do on text, and no text was given",
                "Name some with --data, or a finished profile with --profile.",
            )
        self.one_sweep = self.needs_data and self.counts is not None
        self.sweeps = 2 if self.observed and not self.one_sweep else 1
        if method.sees_twice and (plan is not None or profile is not None):
            raise UsageError(
                f"{name} with these parameters looks at the text again while it writes, which a plan or profile is not",
                "Give --data and a budget instead.",
            )
        if propagate and not self.one_sweep:
            raise UsageError("--propagate works while profiling: with --data and a uniform budget only")
        if plan is not None:
            check_plan(plan, streamed, self.digest)
        if profile is not None:
            check_profile(profile, streamed, self.digest)
            profile.require(method.observes_for(self.counts))

    def job(self) -> dict[str, Any]:
        """Everything the written bytes depend on."""
        return {
            "checkpoint": self.digest,
            "method": self.name,
            "parameters": self.method.model_dump(mode="json"),
            "budget": self.budget.describe() if self.budget else None,
            "data": self.data.digest if self.data and self.needs_data else None,
            "batches": [list(b.ids_BL.shape) for b in self.data.batches] if self.data and self.needs_data else None,
            "profile": [self.profile.data_digest, self.profile.settings] if self.profile else None,
            "plan": self.given.digest() if self.given else None,
            "propagate": self.propagate,
            "compute": [str(self.streamed.compute_dtype), torch.device(self.streamed.device).type],
            "experts": self.streamed.experts,
            "threads": torch.get_num_threads(),
            "shard_bytes": self.shard_bytes,
            "versions": versions(),
        }

    def go(
        self,
        work: Workspace,
        memory: int,
        progress: Progress,
        on_first_layer: Callable[[LayerProfile, LayerPlan], None],
    ) -> Result:
        self.work, self.on_first_layer = work, on_first_layer
        self.figures: dict[int, dict[str, float]] = {}
        self.layers: dict[int, LayerProfile] = dict(self.profile.layers) if self.profile else {}
        states = States(work.folder / "states", memory, durable=True)
        plans = self._plans_before(states, progress)
        if plans:
            counts = {i: len(p.keep) for i, p in plans.items()}
        else:
            assert self.counts is not None
            counts = {i: self.method.stored(n, self.streamed.moe[i]) for i, n in self.counts.items()}
        for layer_plan in plans.values():
            if reason := self.method.plain_checkpoint(layer_plan):
                raise UsageError(f"{self.name}: {reason}")
        self.output = Output(self.streamed, work.folder, counts, self.method, self.shard_bytes)
        active = {i: self.method.active(layer) for i, layer in self.streamed.moe.items()}
        after = measure_written(self.streamed, self.output.specs, self.output.fresh_of, counts, active)
        try:
            if plans and self.method.sees_twice:
                self._apply_on_text(plans, States(work.folder / "again", memory, durable=True), progress)
            elif plans:
                self._apply(plans, progress)
            else:
                plans = self._profile_plan_apply(states, progress)
            self.output.copy_rest(self.output.through)
            self.output.writer.sync()
            plan = self._plan(plans)
            record = self._record(plan, after)
            names = self.output.finish(plan, record)
        finally:
            self.output.writer.close()
        work.publish(names)
        return Result(
            work.out,
            plan,
            self.before,
            after,
            self.sweeps,
            self.streamed.checkpoint.bytes_read,
            self.output.writer.bytes_written,
            work.resumed,
            record,
            self.figures,
            self.layers,
            self._notes(),
        )

    def _notes(self) -> list[str]:
        return [*self.output.notes, *self.output.packed_notes(self.figures), *self.method.notes()]

    # -- the three ways -------------------------------------------------------------------------------------------

    def _plans_before(self, states: States, progress: Progress) -> dict[int, LayerPlan]:
        """All layer plans, unless each is made when its layer is there."""
        if self.given is not None:
            return {p.index: p for p in self.given.layers}
        if self.one_sweep:
            return {}
        if self.needs_data:
            assert self.data is not None
            watched = unique([*self.observed, *FORECAST])
            self.layers |= profile_first(self.streamed, self.data, watched, self.work, states, progress)
        elif self.observed:
            self.layers = survey(self.streamed, self.observed, progress)
        assert self.budget is not None
        return plan_layers(self.streamed, self.method, self.budget, self.layers, self.counts)

    def _apply(self, plans: Mapping[int, LayerPlan], progress: Progress) -> None:
        """One sweep over the weights alone."""
        done = self._applied()
        progress.start("layers", len(self.streamed.layers), 0)
        for index in range(len(self.streamed.layers)):
            if index in plans and index not in done:
                if self.output.touched[index]:
                    self.streamed.load_moe(index)
                if self.output.touched[index] or self.output.added[index]:
                    self.figures[index] = self.output.edit(plans[index], in_memory=False)
                self.output.copy_rest(self.streamed.layer_keys[index])
                self.streamed.free_layer(index)
                self._journal(plans[index])
            elif index in done:
                self.output.mark_written(index)
            progress.layer(index)
        self.streamed.forget_buffers()
        progress.done()

    def _applied(self) -> set[int]:
        """Layers an earlier run has written; what it told of them is told again."""
        lines = [line for line in self.work.journal() if "layer" in line]
        self.figures |= {line["layer"]: line["figures"] for line in lines if line["figures"]}
        return {line["layer"] for line in lines}

    def _apply_on_text(self, plans: Mapping[int, LayerPlan], states: States, progress: Progress) -> None:
        """A second sweep with the text: each layer is looked at again, edited and written."""
        assert self.data is not None
        first = states.following(self._applied(), plans)
        for index in range(first):
            self.output.mark_written(index)
        for step in sweep(self.streamed, self.data.batches, states=states, first=first, progress=progress):
            if step.index not in plans:
                step.run()
                continue
            plan = plans[step.index]
            seen = self._look(step, self.method.looks_again(plan), last=True)
            self.figures[step.index] = self.output.edit(plan, in_memory=False, seen=seen)
            self._journal(plan)

    def _profile_plan_apply(self, states: States, progress: Progress) -> dict[int, LayerPlan]:
        """One sweep: each layer is profiled, planned, edited and written while it is in memory."""
        assert self.data is not None
        plans: dict[int, LayerPlan] = {}
        journal = self.work.journal()
        first = states.following({line["layer"] for line in journal}, self.streamed.moe)
        for line in journal:
            if line["layer"] < first:
                plans[line["layer"]] = LayerPlan.model_validate(line["plan"])
                self.figures[line["layer"]] = line["figures"]
                self.layers[line["layer"]] = Seen(self.work).again(line["layer"], line["profile"])
        for index in range(first):
            self.output.mark_written(index)
        forecast_due = True
        for step in sweep(self.streamed, self.data.batches, states=states, first=first, progress=progress):
            if step.index not in self.streamed.moe:
                step.run()
                continue
            again = self.method.sees_twice
            layer = self._observe(step, last=not self.propagate and not again)
            self.layers[step.index] = layer
            plans[step.index] = self._plan_layer(layer)
            if forecast_due:
                self.on_first_layer(layer, plans[step.index])
                forecast_due = False
            looked = self.method.looks_again(plans[step.index])
            seen = self._look(step, looked, last=not self.propagate) if again else None
            self.figures[step.index] = self.output.edit(plans[step.index], in_memory=self.propagate, seen=seen)
            self._journal(plans[step.index])
            if self.propagate:
                step.run()
        return plans

    def _observe(self, step: Step, *, last: bool = True) -> LayerProfile:
        return self._look(step, unique([*self.observed, *FORECAST]), last=last)

    def _look(self, step: Step, observers: Sequence[type[Observer]], *, last: bool) -> LayerProfile:
        """What observers see of one layer; with `last`, the text then goes on to the next one."""
        assert self.data is not None
        with LayerObservation(self.streamed.moe[step.index], observers, len(self.data.domains)) as watch:
            step.run(last=last, before=lambda number, batch: watch.batch(batch))
        return watch.result()

    def _plan_layer(self, layer: LayerProfile) -> LayerPlan:
        assert self.budget is not None
        assert self.counts is not None
        moe = self.streamed.moe[layer.index]
        picked = self.method.pick(layer, moe, self.counts[layer.index], self.budget)
        plan = layer_plan_of(self.method, layer, picked)
        if reason := self.method.plain_checkpoint(plan):
            raise UsageError(f"{self.name}: {reason}")
        return plan

    def _journal(self, plan: LayerPlan) -> None:
        self.output.writer.sync()
        figures = self.figures.get(plan.index, {})
        line = {"layer": plan.index, "plan": plan.model_dump(mode="json"), "figures": figures}
        if self.one_sweep:  # a resumed run reports on these layers too
            line["profile"] = Seen(self.work).keep(self.layers[plan.index])
        self.work.record(line)

    # -- records --------------------------------------------------------------------------------------------------

    def _plan(self, plans: Mapping[int, LayerPlan]) -> Plan:
        return self.given or Plan(
            model=self.model,
            model_digest=self.digest,
            method=self.name,
            parameters=self.method.model_dump(mode="json"),
            budget=self.budget.describe() if self.budget else {},
            data_digest=self._data_digest(),
            layers=[plans[index] for index in sorted(plans)],
        )

    def _data_digest(self) -> str:
        if self.profile is not None:
            return self.profile.data_digest
        return self.data.digest if self.data is not None and self.needs_data else ""

    def _record(self, plan: Plan, after: Size) -> dict[str, Any]:
        more = {"domains": self.profile.domains} if self.profile and not self.needs_data else {}
        return record_of(
            plan,
            self.streamed,
            data=self.data if self.needs_data else None,
            seed=self.seed,
            before=self.before,
            after=after,
            figures=self.figures,
            notes=self._notes(),
            sweeps=self.sweeps,
            propagate=self.propagate,
            budget=plan.budget,
            forms=self.output.special,
            **more,
        )
