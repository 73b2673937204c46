"""Store the weights of a checkpoint in few bits, layer by layer, safe against crashes.

Every method gives a `BitPlan` first: at once, from the weights, or from one sweep over the text. Then one sweep
quantizes: the inputs of every matrix are measured on text that went through the quantized layers below (gptq), the
matrices of the layer are rounded and written packed, and the text goes on through what they have become. Rounding that
looks at no inputs runs no text.

All matrices of a decoder layer are rounded on the same inputs: what the attention's rounding changes inside its own
layer is not seen by that layer's experts, as in the released code of MC (arXiv:2410.06270). An expert that few tokens
reached is rounded to the nearest value, and the record says so.
"""

# E experts, O outputs, I inputs of a matrix

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.anatomy.forms import Form
from coterie.anatomy.uneven import with_forms
from coterie.compression.apply import Output
from coterie.compression.bits import (
    Allocation,
    BitPlan,
    Widths,
    check_widths,
    header_entries,
    mean_bits,
    protect,
    replaced,
    shapes_of,
    total_bytes,
)
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast, forecast
from coterie.compression.observing import profile_first
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import check_editable, check_plan, check_profile
from coterie.compression.quantizers import Report, Spec
from coterie.compression.quantizing.base import Quantizer
from coterie.compression.records import earlier_steps, record_of, versions
from coterie.compression.sites import Inputs, Site, sites
from coterie.compression.sizes import Size, measure
from coterie.errors import CheckpointError, UsageError
from coterie.experts import nested, packed, packing
from coterie.experts.nested import NestedCodes
from coterie.experts.packed import PLAIN
from coterie.experts.packing import Coded
from coterie.profiling.profile import LayerProfile, Profile
from coterie.profiling.run import survey
from coterie.streaming.lockstep import Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace
from coterie.text import TokenData

Figures = dict[str, float]


class QuantizedOutput(Output):
    """The checkpoint that is being written: matrices become codes, all else is copied."""

    def __init__(
        self, streamed: StreamedModel, folder: Path, plan: BitPlan, method: Quantizer, shard_bytes: int
    ) -> None:
        self.checksums: dict[str, int] = {}
        self.widths, self.linears, self.grids = plan.experts(), plan.linears, plan.grids
        counts = {index: moe.num_experts for index, moe in streamed.moe.items()}
        super().__init__(streamed, folder, counts, method, shard_bytes)

    @property
    def special(self) -> bool:
        return bool(self.widths or self.linears) or super().special

    def _replaced(self, streamed: StreamedModel) -> tuple[dict[int, set[str]], dict[int, dict[str, Tensor]]]:
        return replaced(streamed, self.widths, self.linears, self.grids)

    def _config(self, plan: Plan, raw: dict[str, Any], version: str) -> dict[str, Any]:
        entries, linears = header_entries(self.widths, self.linears, self.grids)
        forms = {
            index: Form.model_validate({**form.describe(), **entries.get(index, {})})
            for index, form in self.forms.items()
        }
        config = with_forms(dict(raw), forms, version, linears)
        if self.checksums:
            config["quantization_config"]["checksums"] = dict(sorted(self.checksums.items()))
        return config

    def write(
        self, state: Mapping[str, Tensor], keep: Sequence[int] | None = None, *, as_read: Collection[str] = ()
    ) -> dict[str, float]:
        self.checksums |= {name: packed.checksum(tensor) for name, tensor in state.items()}
        return super().write(state, keep, as_read=as_read)


def check_quantizable(streamed: StreamedModel, method: Quantizer) -> None:
    """Raise UsageError for a model this cannot work on."""
    method.check()
    streamed.refuse_packed("rounding what is rounded already is not built")
    check_editable(streamed, method)


def make_bit_plan(
    streamed: StreamedModel,
    model: str,
    name: str,
    method: Quantizer,
    layers: Mapping[int, LayerProfile],
    data_digest: str,
    protected: Collection[tuple[int, int]] = (),
) -> BitPlan:
    """The plan of one method. layers : the statistics it observes. protected : (layer, expert) pairs that stay."""
    for index, expert in protected:
        if index not in streamed.moe or not 0 <= expert < streamed.moe[index].num_experts:
            raise UsageError(f"--protect {index}:{expert} is no expert of this model")
    made = method.allocate(streamed, layers)
    experts = {
        index: widths
        for index, widths in protect(made.experts, protected).items()
        if any(b != PLAIN for bits in widths.values() for b in bits)
    }
    check_widths(streamed, experts, made.linears, method.grids)
    return BitPlan(
        model=model,
        model_digest=streamed.checkpoint.digest(),
        method=name,
        parameters=method.model_dump(mode="json"),
        data_digest=data_digest,
        layers=[_layer_plan(streamed, index, experts.get(index), made, protected) for index in sorted(streamed.moe)],
        grids=method.grids,
        linears=made.linears,
        expert_bits=round(mean_bits(streamed.moe, experts, method.grids.planes or 0), 6),
        bytes=total_bytes(streamed, experts, made.linears, method.grids),
    )


def plan_bits(
    streamed: StreamedModel,
    model: str,
    name: str,
    method: Quantizer,
    profile: Profile | None,
    protected: Collection[tuple[int, int]] = (),
) -> BitPlan:
    """The plan of one method, on a finished profile if it looks at text. Raises UsageError if that does not fit."""
    check_quantizable(streamed, method)
    layers: dict[int, LayerProfile] = {}
    if profile is not None:
        check_profile(profile, streamed, streamed.checkpoint.digest())
        profile.require(method.observes())
        layers = dict(profile.layers)
    elif any(observer.needs_text for observer in method.observes()):
        raise UsageError(
            f"{name} allocates bits by what experts do on text, and no profile was given",
            f"Make one: coterie profile {model} --out PROFILE --data TEXT --method {name}",
        )
    elif method.observes():
        layers = survey(streamed, list(method.observes()))
    digest = profile.data_digest if profile is not None else ""
    return make_bit_plan(streamed, model, name, method, layers, digest, protected)


def _layer_plan(
    streamed: StreamedModel,
    index: int,
    widths: Widths | None,
    made: Allocation,
    protected: Collection[tuple[int, int]],
) -> LayerPlan:
    moe = streamed.moe[index]
    extra: dict[str, Any] = {} if widths is None else {"bits": widths}
    if index in made.why:
        why = list(made.why[index])
        for layer, expert in protected:
            if layer == index:
                why[expert] = "protected"
        extra["why"] = why
    if index in made.facts:
        extra["facts"] = made.facts[index]
    E = moe.num_experts
    scores = made.scores.get(index, [])
    return LayerPlan(index=index, name=moe.name, experts=E, keep=list(range(E)), scores=scores, extra=extra)


def quantize_checkpoint(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: Quantizer,
    name: str,
    data: TokenData | None = None,
    profile: Profile | None = None,
    plan: BitPlan | None = None,
    protected: Collection[tuple[int, int]] = (),
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint with packed weights to `out`.

    Parameters
    ----------
    streamed : the source, freshly opened. It is used up.
    data : text to allocate and round by; needed for gptq, and for methods that observe, unless `profile` or `plan` is.
    profile : statistics made before. plan : bits decided before; nothing is then measured but inputs for gptq.
    protected : (layer, expert) pairs that stay as they are.
    memory : bytes of waiting hidden states kept in memory; the rest is spilled next to `out`.

    `record["quantization"]` says what became of the weights, and how far off they are. Raises UsageError, ModelError,
    CheckpointError, OutputError. Peak memory: one layer, its codes, the hidden states up to `memory`; with gptq also
    the second moments of `sites.Inputs`.
    """
    run = _Run(streamed, model, method, name, data, profile, plan, protected, shard_bytes, seed)
    with Workspace(out, run.job(), overwrite=overwrite) as work:
        return run.go(work, memory, progress or Progress())


def quantize_forecast(
    out: Path,
    *,
    streamed: StreamedModel,
    model: str,
    method: Quantizer,
    name: str,
    data: TokenData | None,
    profile: Profile | None = None,
    plan: BitPlan | None = None,
    protected: Collection[tuple[int, int]] = (),
    seed: int,
    memory: int,
) -> Forecast:
    """What `quantize_checkpoint` with the same arguments will need; checks the request as it does, writes nothing."""
    run = _Run(streamed, model, method, name, data, profile, plan, protected, DEFAULT_SHARD_BYTES, seed)
    ahead = forecast(streamed, run.before, 1.0, out, run.data, memory, run.sweeps)
    moments = 0
    if method.quantizer == "gptq":
        every = [sites(streamed, index) for index in range(len(streamed.layers))]
        moments = max(sum(4 * max(s.experts, 1) * s.inputs**2 for s in found) for found in every)
    return replace(ahead, memory_bytes=ahead.memory_bytes + moments)


class _Run:
    """One job, from checked request to published folder."""

    def __init__(
        self,
        streamed: StreamedModel,
        model: str,
        method: Quantizer,
        name: str,
        data: TokenData | None,
        profile: Profile | None,
        plan: BitPlan | None,
        protected: Collection[tuple[int, int]],
        shard_bytes: int,
        seed: int,
    ) -> None:
        check_quantizable(streamed, method)
        self.streamed, self.model, self.method, self.name = streamed, model, method, name
        self.profile, self.plan, self.protected = profile, plan, sorted(protected)
        self.shard_bytes, self.seed = shard_bytes, seed
        self.digest, self.before = streamed.checkpoint.digest(), measure(streamed)
        earlier_steps(streamed.checkpoint.folder)
        observed = () if profile is not None or plan is not None else method.observes()
        self.observed = list(observed)
        on_text = any(o.needs_text for o in self.observed)
        self.rounds_on_text = method.quantizer == "gptq"
        if data is None and (on_text or self.rounds_on_text):
            raise UsageError(f"{name} looks at text, and no text was given", method.without_text)
        self.data = data if on_text or self.rounds_on_text else None
        self.observes_text = on_text
        self.sweeps = 1 + bool(self.observed)
        if profile is not None:
            check_profile(profile, streamed, self.digest)
            profile.require(method.observes())
        if plan is not None:
            check_plan(plan, streamed, self.digest)
            check_widths(streamed, plan.experts(), plan.linears, plan.grids)

    def job(self) -> dict[str, Any]:
        """Everything the written bytes depend on."""
        return {
            "checkpoint": self.digest,
            "method": self.name,
            "parameters": self.method.model_dump(mode="json"),
            "protected": [list(pair) for pair in self.protected],
            "data": self.data.digest if self.data else None,
            "batches": [list(b.ids_BL.shape) for b in self.data.batches] if self.data else None,
            "profile": [self.profile.data_digest, self.profile.settings] if self.profile else None,
            "plan": self.plan.digest() if self.plan else None,
            "compute": [str(self.streamed.compute_dtype), torch.device(self.streamed.device).type],
            "experts": self.streamed.experts,
            "threads": torch.get_num_threads(),
            "shard_bytes": self.shard_bytes,
            "versions": versions(),
        }

    def go(self, work: Workspace, memory: int, progress: Progress) -> Result:
        self.work = work
        self.figures: dict[int, Figures] = {}
        plan = self.plan or self._planned(States(work.folder / "watched", memory, durable=True), progress)
        self.output = QuantizedOutput(self.streamed, work.folder, plan, self.method, self.shard_bytes)
        self.sites = {index: self._sites(plan, index) for index in range(len(self.streamed.layers))}
        try:
            if self.data is not None and self.rounds_on_text:
                self._on_text(plan, States(work.folder / "states", memory, durable=True), progress)
            else:
                self._weights_only(plan, progress)
            self.output.copy_rest(self.output.through)
            self.output.writer.sync()
            after = replace(self.before, bytes=self.output.writer.total_size)
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
            {},
            list(record["notes"]),
        )

    # -- the ways -------------------------------------------------------------------------------------------------

    def _planned(self, states: States, progress: Progress) -> BitPlan:
        for line in self.work.journal():
            if "bit_plan" in line:
                return BitPlan.model_validate(line["bit_plan"])
        layers: dict[int, LayerProfile] = dict(self.profile.layers) if self.profile else {}
        digest = self.profile.data_digest if self.profile else ""
        if self.observes_text:
            assert self.data is not None
            layers = profile_first(self.streamed, self.data, self.observed, self.work, states, progress)
            digest = self.data.digest
        elif self.observed:
            layers = survey(self.streamed, self.observed, progress)
        if self.data is not None:
            digest = self.data.digest
        plan = make_bit_plan(self.streamed, self.model, self.name, self.method, layers, digest, self.protected)
        self.work.record({"bit_plan": plan.model_dump(mode="json")})
        return plan

    def _on_text(self, plan: BitPlan, states: States, progress: Progress) -> None:
        assert self.data is not None
        done = {line["layer"]: line for line in self.work.journal() if "layer" in line}
        first = states.following(done, range(len(self.streamed.layers)))
        for index in range(first):
            self._passed(index, done[index])
        for step in sweep(self.streamed, self.data.batches, states=states, first=first, progress=progress):
            found = self.sites[step.index]
            with Inputs(self.streamed, step.index, found, full=True) as inputs:
                if found:
                    step.run(last=False, before=inputs.batch)
            self._quantize(plan, step.index, inputs)
            step.run()

    def _weights_only(self, plan: BitPlan, progress: Progress) -> None:
        done = {line["layer"]: line for line in self.work.journal() if "layer" in line}
        progress.start("layers", len(self.streamed.layers), 0)
        for index in range(len(self.streamed.layers)):
            if index in done:
                self._passed(index, done[index])
            else:
                self.streamed.load_layer(index)
                self._quantize(plan, index, None)
                self.streamed.free_layer(index)
            progress.layer(index)
        self.streamed.forget_buffers()
        progress.done()

    def _passed(self, index: int, line: Mapping[str, Any]) -> None:
        """A layer was written by an earlier run, whose journal has this line of it."""
        if line["figures"]:
            self.figures[index] = line["figures"]
        self.output.checksums |= line["checksums"]
        self.output.mark_written(index)

    # -- one layer ------------------------------------------------------------------------------------------------

    def _sites(self, plan: BitPlan, index: int) -> list[Site]:
        """What is quantized of a decoder layer."""
        widths = plan.experts()
        return [
            site
            for site in sites(self.streamed, index)
            if (index in widths if site.experts else site.name.removesuffix(".weight") in plan.linears)
        ]

    def _quantize(self, plan: BitPlan, index: int, inputs: Inputs | None) -> None:
        """Round the layer in memory, in what is written and in what runs; write it."""
        streamed, figures = self.streamed, _Errors()
        state: dict[str, Tensor] = {}
        stored = {site.name: streamed.retained.pop(site.name) for site in self.sites[index]}
        for site in self.sites[index]:
            if not site.experts:
                name = site.name.removesuffix(".weight")
                weight = streamed.model.get_parameter_or_buffer(site.name).detach()
                coded, reports = self._rounded(
                    weight, plan.linears[name], stored[site.name].dtype, inputs, site, 0, site.name
                )
                assert isinstance(coded, Coded)
                figures.add("linears", reports[-1])
                parts = {"packed": coded.packed(), "scale": coded.scale_OG, "zero": coded.zero_OG}
                state |= {f"{name}.{part}": value for part, value in parts.items() if value is not None}
                weight.copy_(coded.dense())
        stacked = [site for site in self.sites[index] if site.experts]
        if stacked:
            state |= self._experts(plan.experts()[index], index, stacked, inputs, figures)
        self.output.write(state)
        self.output.copy_rest(streamed.layer_keys[index])
        self.output.writer.sync()
        told = figures.describe()
        if told:
            self.figures[index] = told
        sums = {name: self.output.checksums[name] for name in state}
        self.work.record({"layer": index, "figures": told, "checksums": sums})

    def _experts(
        self, widths: Widths, index: int, stacked: list[Site], inputs: Inputs | None, figures: _Errors
    ) -> dict[str, Tensor]:
        """Codes of all experts of a layer, by tensor; the layer's experts become what the codes stand for."""
        moe = self.streamed.moe[index]
        upper, lower = stacked
        dtype: torch.dtype = moe.experts.down_proj.dtype  # type: ignore[assignment]
        made: dict[str, list[Any]] = {p: [] for p in widths}  # Coded or NestedCodes, or what stays as it is
        for e in range(moe.bank.num_experts):
            weights = moe.bank.read(e)
            for p, field in (("gate", "gate_IH"), ("up", "up_IH"), ("down", "down_HI")):
                if p not in widths:
                    continue
                weight: Tensor = getattr(weights, field)
                if widths[p][e] == PLAIN:
                    made[p].append(weight.clone())
                    continue
                site = lower if p == "down" else upper
                where = f"layer {index}, expert {e}, {p}"
                coded, reports = self._rounded(weight, widths[p][e], dtype, inputs, site, e, where)
                figures.add("experts", reports[-1])
                for level, report in enumerate(reports if len(reports) > 1 else ()):
                    figures.add(f"experts_{widths[p][e] + level}_bits", report)
                made[p].append(coded)
                setattr(weights, field, coded.dense())
            moe.bank.write(e, weights)
        state: dict[str, Tensor] = {}
        grids = self.output.grids
        for p, shape in shapes_of(moe).items():
            if grids.planes is not None:
                parts = nested.assembled(made.pop(p), dtype)
            else:
                parts = packed.assembled(made.pop(p), shape, grids.group, dtype, symmetric=grids.symmetric)
            state |= {f"{moe.experts_name}.{part}_{p}": value for part, value in parts.items()}
        return state

    def _rounded(
        self,
        weight: Tensor,
        bits: int,
        stored: torch.dtype,
        inputs: Inputs | None,
        site: Site,
        expert: int,
        where: str,
    ) -> tuple[Coded | NestedCodes, list[Report]]:
        """One matrix, rounded as the plan says, and what that costs at each width it can be read at."""
        grids, method = self.output.grids, self.method
        w_OI = weight.detach().float()
        if not bool(torch.isfinite(w_OI).all()):
            raise CheckpointError(f"{where}: weights are NaN or infinite and cannot be rounded")
        spec = Spec(
            bits,
            grids.group,
            grids.symmetric,
            packing.scale_dtype(stored),
            search=method.search,
            narrowest=method.narrowest,
            float_zero=method.float_zero and not grids.symmetric,
        )
        gram_II = None if inputs is None else inputs.gram(site, expert)
        tokens = 0 if inputs is None else inputs.tokens(site, expert)
        everything = 0 if self.data is None else sum(self.data.tokens.values())
        how = method.round_expert if site.experts else method.round_linear
        return how(w_OI, spec, grids, gram_II, tokens=tokens, calibration_tokens=everything)

    # -- records --------------------------------------------------------------------------------------------------

    def _record(self, plan: BitPlan, after: Size) -> dict[str, Any]:
        few = int(sum(f.get("experts_rounded", 0) for f in self.figures.values()))
        notes = list(self.output.notes)
        if few and self.rounds_on_text:
            notes.append(f"{few} matrices of experts saw too few tokens for gptq and were rounded to nearest")
        summary = {
            "expert_bits": plan.expert_bits,
            "linear_bits": dict(plan.linears),
            **plan.grids.model_dump(exclude_none=True),
            "bytes_planned": plan.bytes,
            "bytes": after.bytes,
            "matrices_rounded_to_nearest": few,
        }
        return record_of(
            plan,
            self.streamed,
            data=self.data,
            seed=self.seed,
            before=self.before,
            after=after,
            figures=self.figures,
            notes=notes,
            sweeps=self.sweeps,
            propagate=self.rounds_on_text,
            quantization=summary,
            forms=self.output.special,
        )


class _Errors:
    """Mean relative errors of a layer's matrices, and how many were not rounded as asked."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, kind: str, report: Report) -> None:
        entry = self.sums.setdefault(kind, [0.0, 0.0, 0.0, 0.0, 0.0])
        entry[0] += 1
        entry[1] += report.weight_error
        if not math.isnan(report.output_error):
            entry[2] += 1
            entry[3] += report.output_error
        entry[4] += report.fallback

    def describe(self) -> Figures:
        told: Figures = {}
        for kind, (count, weight, seen, output, fallbacks) in self.sums.items():
            told |= {f"{kind}_matrices": count, f"{kind}_weight_error": weight / count}
            if seen:
                told[f"{kind}_output_error"] = output / seen
            told[f"{kind}_rounded"] = fallbacks
        return told
