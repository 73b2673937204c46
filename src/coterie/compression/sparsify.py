"""Zero single weights of a checkpoint, layer by layer, safe against crashes.

One sweep: a layer's matrices are measured on the text (every matrix its own inputs, every expert its own routed
tokens), pruned, written, and the text is passed on through the pruned layer. A method that first compares the layers
of the original (OWL) needs one sweep more; one that looks at no data runs no text.

Pruned are the routed and shared experts and every linear layer of the decoder layers: attention, dense MLPs, and what
else there is. Never routers, gates with a single output, norms, biases, embeddings or the head.

The result is as large as before: zeros are stored like all numbers. What a bit mask and the remaining values would
take is counted and reported, not written. A killed run, started again, goes on after its last whole layer and ends
with the same bytes.
"""

# B batch, L sequence, T tokens, E experts, K slots per token, O outputs, I inputs of a matrix, R rows of one expert

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.compression.apply import Output
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast, forecast
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.planning import check_editable
from coterie.compression.records import earlier_steps, record_of, versions
from coterie.compression.sites import Inputs, Site, matrix, sites
from coterie.compression.sizes import Size, measure, router_parameters_per_expert
from coterie.compression.sparsifying.base import Sparsifier
from coterie.compression.sparsifying.owl import Owl
from coterie.errors import UsageError
from coterie.profiling.weights import Moments
from coterie.streaming.lockstep import Progress, States, Step, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace
from coterie.text import TokenData

Figures = dict[str, float]


class SparseOutput(Output):
    """The checkpoint that is being written: every tensor keeps its shape, those with pruned matrices are new."""

    def __init__(self, streamed: StreamedModel, folder: Path, method: Sparsifier, shard_bytes: int) -> None:
        self.sites = {index: sites(streamed, index) for index in range(len(streamed.layers))}
        counts = {index: moe.num_experts for index, moe in streamed.moe.items()}
        super().__init__(streamed, folder, counts, method, shard_bytes)

    def _replaced(self, streamed: StreamedModel) -> tuple[dict[int, set[str]], dict[int, dict[str, Tensor]]]:
        fresh = {
            index: {s.name: streamed.model.get_parameter_or_buffer(s.name).detach() for s in found}
            for index, found in self.sites.items()
        }
        return {index: set(tensors) for index, tensors in fresh.items()}, fresh


def sparsify(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: Sparsifier,
    name: str,
    data: TokenData | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint with zeroed weights to `out`.

    Parameters
    ----------
    streamed : the source, freshly opened. It is used up.
    method, name : the method and its registered name.
    data : calibration samples; needed unless the method looks at no data.
    memory : bytes of waiting hidden states kept in memory; the rest is spilled next to `out`.

    `record["sparsity"]` of the result says what was asked, what there is now, and where. Raises UsageError, ModelError,
    CheckpointError, OutputError. Peak memory: one layer, the hidden states up to `memory`, one expert's importances.
    """
    run = _Run(streamed, model, method, name, data, shard_bytes, seed)
    with Workspace(out, run.job(), overwrite=overwrite) as work:
        return run.go(work, memory, progress or Progress())


def sparsify_forecast(
    out: Path,
    *,
    streamed: StreamedModel,
    model: str,
    method: Sparsifier,
    name: str,
    data: TokenData | None,
    seed: int,
    memory: int,
) -> Forecast:
    """What `sparsify` with the same arguments will need; checks the request as it does, writes nothing."""
    run = _Run(streamed, model, method, name, data, DEFAULT_SHARD_BYTES, seed)
    return forecast(streamed, run.before, 1.0, out, run.data, memory, run.sweeps)


class _Run:
    """One job, from checked request to published folder."""

    def __init__(
        self,
        streamed: StreamedModel,
        model: str,
        method: Sparsifier,
        name: str,
        data: TokenData | None,
        shard_bytes: int,
        seed: int,
    ) -> None:
        method.check()
        check_editable(streamed, method)
        if method.needs_text and data is None:
            raise UsageError(
                f"{name} judges weights by what they are multiplied with on text, and no text was given",
                "Name some with --data, or use --method magnitude.",
            )
        self.streamed, self.model, self.method, self.name = streamed, model, method, name
        self.data = data if method.needs_text else None
        self.shard_bytes, self.seed = shard_bytes, seed
        self.digest, self.before = streamed.checkpoint.digest(), measure(streamed)
        self.sites = {index: sites(streamed, index) for index in range(len(streamed.layers))}
        self.weights = {i: sum(s.weights for s in found) for i, found in self.sites.items()}
        self.earlier = earlier_steps(streamed.checkpoint.folder)
        self.removed = self._removed()
        if method.total is not None and self.removed is None:
            raise UsageError(
                f"how many experts earlier steps removed is not known: {model} has no coterie.json that accounts for"
                " its size",
                "Give --set sparsity= instead, or run all steps as one recipe.",
            )
        self.share = method.share(sum(self.weights.values()), self.removed or 0)
        self._check_blocks()
        self.sweeps = 2 if method.needs_ratios else 1

    def _removed(self) -> int | None:
        """Weights of the kinds counted here that went with experts before; None if no record accounts for them."""
        records = [r for r in self.earlier if isinstance(r.get("before"), dict) and isinstance(r.get("after"), dict)]
        if not records or len(records) < len(self.earlier):
            return None
        first, last = records[0]["before"], records[-1]["after"]
        gone = int(first.get("experts_total", 0)) - self.before.experts_total
        moe = next(iter(self.streamed.moe.values()))
        explained = gone * (self.before.parameters_of_expert + router_parameters_per_expert(self.streamed))
        if last.get("parameters") != self.before.parameters or gone < 0:
            return None
        if first.get("parameters") != self.before.parameters + explained:
            return None
        return gone * sum(s.weights // s.experts for s in self.sites[moe.index] if s.experts)

    def _check_blocks(self) -> None:
        if self.method.blocks is not None:
            m = self.method.blocks[1]
            for site in (s for found in self.sites.values() for s in found):
                if site.inputs % m:
                    raise UsageError(
                        f"pattern {self.method.pattern}: {site.name} has {site.inputs} inputs, no multiple of {m}",
                        "Use --set pattern=row.",
                    )

    def job(self) -> dict[str, Any]:
        """Everything the written bytes depend on."""
        return {
            "checkpoint": self.digest,
            "method": self.name,
            "parameters": self.method.model_dump(mode="json"),
            "share": self.share,
            "data": self.data.digest if self.data else None,
            "batches": [list(b.ids_BL.shape) for b in self.data.batches] if self.data else None,
            "compute": [str(self.streamed.compute_dtype), torch.device(self.streamed.device).type],
            "experts": self.streamed.experts,
            "threads": torch.get_num_threads(),
            "shard_bytes": self.shard_bytes,
            "versions": versions(),
        }

    def go(self, work: Workspace, memory: int, progress: Progress) -> Result:
        self.work = work
        self.figures: dict[int, Figures] = {}
        ratios = self._outliers(States(work.folder / "watched", memory, durable=True), progress)
        self.shares = self.method.layer_shares(self.share, self.weights, ratios)
        for index, ratio in (ratios or {}).items():
            self.figures.setdefault(index, {})["outlier_ratio"] = ratio
        self.output = SparseOutput(self.streamed, work.folder, self.method, self.shard_bytes)
        try:
            if self.data is None:
                self._weights_only(progress)
            else:
                self._run_and_prune(States(work.folder / "states", memory, durable=True), progress)
            self.output.copy_rest(self.output.through)
            self.output.writer.sync()
            plan = self._plan()
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

    def _outliers(self, states: States, progress: Progress) -> dict[int, float] | None:
        """D_l of every layer of the original, if the method asks for it. A restart goes on after the last layer."""
        if not isinstance(self.method, Owl):
            return None
        assert self.data is not None
        ratios = {line["watched"]: line["ratio"] for line in self.work.journal() if "watched" in line}
        if ratios.keys() == self.sites.keys():
            return ratios
        first = states.following(ratios, self.sites)
        for step in sweep(self.streamed, self.data.batches, states=states, first=first, progress=progress):
            inputs = self._watch(step, last=True)
            ratios[step.index] = self.method.outlier_ratio(
                lambda inputs=inputs, index=step.index: self._importances(index, inputs)  # type: ignore[misc]
            )
            self.work.record({"watched": step.index, "ratio": ratios[step.index]})
        return {index: ratios[index] for index in sorted(ratios)}

    def _run_and_prune(self, states: States, progress: Progress) -> None:
        assert self.data is not None
        done = self._done()
        first = states.following(done, self.sites)
        for index in range(first):
            self.figures[index] = done[index]
            self.output.mark_written(index)
        for step in sweep(self.streamed, self.data.batches, states=states, first=first, progress=progress):
            inputs = self._watch(step, last=False)
            self._prune(step.index, inputs)
            step.run()

    def _weights_only(self, progress: Progress) -> None:
        done = self._done()
        progress.start("layers", len(self.streamed.layers), 0)
        for index in range(len(self.streamed.layers)):
            if index in done:
                self.figures[index] = done[index]
                self.output.mark_written(index)
            else:
                self.streamed.load_layer(index)
                self._prune(index, None)
                self.streamed.free_layer(index)
            progress.layer(index)
        self.streamed.forget_buffers()
        progress.done()

    def _done(self) -> dict[int, Figures]:
        return {line["layer"]: line["figures"] for line in self.work.journal() if "layer" in line}

    # -- one layer ------------------------------------------------------------------------------------------------

    def _watch(self, step: Step, *, last: bool) -> Inputs:
        with Inputs(self.streamed, step.index, self.sites[step.index]) as inputs:
            step.run(last=last, before=inputs.batch)
        return inputs

    def _importances(self, index: int, inputs: Inputs) -> Iterator[Tensor]:
        """Of every matrix of the layer in memory that tokens have reached."""
        for site in self.sites[index]:
            weight = self.streamed.model.get_parameter_or_buffer(site.name).detach()
            for expert in range(max(site.experts, 1)):
                norm_I = inputs.norm(site, expert)
                if norm_I is not None:
                    matrix_OI = matrix(weight, site, expert)
                    yield self.method.importance(matrix_OI, norm_I.to(matrix_OI.device))

    def _prune(self, index: int, inputs: Inputs | None) -> None:
        """Zero weights of the layer in memory, in what is written and in what runs; write it."""
        share, streamed = self.shares[index], self.streamed
        stored = {site.name: streamed.retained.pop(site.name) for site in self.sites[index]}
        figures: Figures = {**self.figures.get(index, {}), "share": share, "weights": self.weights[index]}
        figures |= {"zeros": 0, "bytes_sparse": 0, "unreached_experts": 0, "unreached_linears": 0}
        E = max((site.experts for site in self.sites[index]), default=0)
        before, after = [Moments() for _ in range(E)], [Moments() for _ in range(E)]
        unreached: set[int] = set()
        for site in self.sites[index]:
            kept = stored[site.name]
            live = streamed.model.get_parameter_or_buffer(site.name).detach()
            zeros = 0
            for expert in range(max(site.experts, 1)):
                norm_I = None if inputs is None else inputs.norm(site, expert)
                if inputs is not None and norm_I is None:
                    if site.experts:
                        unreached.add(expert)
                    else:
                        figures["unreached_linears"] += 1
                matrix_OI = matrix(kept, site, expert)
                on_device = norm_I if norm_I is None else norm_I.to(matrix_OI.device)
                if site.experts:
                    before[expert].add(matrix_OI)
                gone_OI = self.method.dropped(self.method.importance(matrix_OI, on_device), share)
                matrix_OI.masked_fill_(gone_OI, 0)
                matrix(live, site, expert).masked_fill_(gone_OI, 0)
                if site.experts:
                    after[expert].add(matrix_OI)
                zeros += int((matrix_OI == 0).sum())
            figures["zeros"] += zeros
            figures[f"zeros_{site.kind}"] = figures.get(f"zeros_{site.kind}", 0) + zeros
            figures[f"weights_{site.kind}"] = figures.get(f"weights_{site.kind}", 0) + site.weights
            figures["bytes_sparse"] += sparse_bytes(site.weights, zeros, self._bytes_per_weight(site))
        figures["unreached_experts"] = len(unreached)
        if E:
            figures["kurtosis_before"] = sum(m.kurtosis for m in before) / E
            figures["kurtosis_after"] = sum(m.kurtosis for m in after) / E
        figures |= self.output.write(stored, range(E))
        self.output.copy_rest(streamed.layer_keys[index])
        self.output.writer.sync()
        self.figures[index] = figures
        self.work.record({"layer": index, "figures": figures})

    def _bytes_per_weight(self, site: Site) -> float:
        """As it is stored, with its scales where it is packed."""
        infos = [self.streamed.checkpoint.tensors[key] for key in self.streamed.keys_of([site.name])]
        return sum(info.nbytes for info in infos) / sum(info.numel for info in infos)

    # -- records --------------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        """No expert goes: the plan of this job keeps all of them."""
        layers = [
            LayerPlan(index=i, name=moe.name, experts=moe.num_experts, keep=list(range(moe.num_experts)))
            for i, moe in self.streamed.moe.items()
        ]
        return Plan(
            model=self.model,
            model_digest=self.digest,
            method=self.name,
            parameters=self.method.model_dump(mode="json"),
            data_digest=self.data.digest if self.data else "",
            layers=layers,
        )

    def _summary(self) -> dict[str, Any]:
        """What was asked for and what there is now, over all layers."""

        def total(entry: str) -> int:
            return int(sum(figures.get(entry, 0) for figures in self.figures.values()))

        weights, zeros = total("weights"), total("zeros")
        kinds = sorted({s.kind for found in self.sites.values() for s in found})
        removed = self.removed
        names = [s.name for found in self.sites.values() for s in found]
        dense = sum(self.streamed.checkpoint.tensors[key].nbytes for key in self.streamed.keys_of(names))
        return {
            "requested": self.share,
            "measured": zeros / weights,
            "requested_total": self.method.total,
            "measured_total": None if removed is None else (zeros + removed) / (weights + removed),
            "weights": weights,
            "zeros": zeros,
            "weights_removed_before": removed,
            "by_kind": {kind: {"weights": total(f"weights_{kind}"), "zeros": total(f"zeros_{kind}")} for kind in kinds},
            "unreached_experts": total("unreached_experts"),
            "unreached_linears": total("unreached_linears"),
            "bytes_dense": self.output.writer.total_size,
            "bytes_if_stored_sparse": self.output.writer.total_size - dense + total("bytes_sparse"),
            **_mean_kurtosis(self.figures),
        }

    def _record(self, plan: Plan, after: Size) -> dict[str, Any]:
        data, summary = self.data, self._summary()
        notes = [*self.output.notes, *self.output.packed_notes(self.figures)]
        if summary["unreached_experts"]:
            notes.append(
                f"{summary['unreached_experts']} experts received no calibration token and were pruned by magnitude"
            )
        if summary["unreached_linears"]:
            notes.append(f"{summary['unreached_linears']} linear layers were never called and were pruned by magnitude")
        return record_of(
            plan,
            self.streamed,
            data=data,
            seed=self.seed,
            before=self.before,
            after=after,
            figures=self.figures,
            notes=notes,
            sweeps=self.sweeps,
            propagate=True,
            sparsity=summary,
        )


def sparse_bytes(weights: int, zeros: int, itemsize: float) -> int:
    """Bytes of one bit per weight and the values that are not zero."""
    return -(-weights // 8) + round((weights - zeros) * itemsize)


def _mean_kurtosis(figures: Mapping[int, Figures]) -> dict[str, float]:
    """Mean over MoE layers of their experts' mean kurtosis, before and after."""
    layers = [f for f in figures.values() if "kurtosis_before" in f]
    names = ("kurtosis_before", "kurtosis_after")
    return {name: sum(f[name] for f in layers) / max(len(layers), 1) for name in names}
