"""Make the experts of a checkpoint narrower, layer by layer, safe against crashes.

First every neuron (and group of attention heads, if some shall go) gets a score: by gradients of the model whole in
memory, or streamed, from what experts pass on to their second projection or from the weights alone. Then one layer
after the other is read, its tensors are cut and written straight into the result; everything else is copied byte for
byte. That the result's config describes just the tensors that will be written is checked before anything is read.

The result is a plain checkpoint of the same architecture. A killed run, started again, does not repeat finished scores
or layers, and ends with the same bytes.
"""

# E owners (experts, or 1), U units, F kept units, I neurons of an expert

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.anatomy.forms import form_of
from coterie.anatomy.heads import head_groups
from coterie.anatomy.resizing import resized
from coterie.anatomy.widths import Units, neurons
from coterie.compression.apply import model_card
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast, forecast
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.records import earlier_steps, record_of, versions
from coterie.compression.rewrite import Rewrite
from coterie.compression.sizes import Size, measure
from coterie.compression.slimming.slimmoe import SlimMoE
from coterie.errors import ModelError, OutputError, UsageError
from coterie.profiling.gradients import resident, sensitivity, top_logits
from coterie.profiling.neurons import NeuronActivation, magnitudes
from coterie.profiling.observe import LayerObservation
from coterie.streaming.lockstep import Batch, Progress, States, sweep
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace, copy_small_files, disk_error, write_json
from coterie.text import TokenData


def slim(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: SlimMoE,
    name: str,
    data: TokenData | None = None,
    teacher: StreamedModel | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint with narrower experts to `out`.

    Parameters
    ----------
    streamed : the source, freshly opened. It is used up.
    method, name : the method and its registered name.
    data : calibration samples; needed unless weights alone decide.
    teacher : the model whose likeliest tokens kd_top8 asks for; None where the model is its own teacher.
    memory : bytes of waiting hidden states kept in memory; the rest is spilled next to `out`.

    `record["slimming"]` of the result says what was kept of what. Raises UsageError, ModelError, CheckpointError,
    OutputError. Peak memory: one layer and its kept part; with a criterion of gradients before that the whole model in
    float32, its largest tensor once more, and one sequence's activations and logits.
    """
    run = _Run(streamed, model, method, name, data, teacher, shard_bytes, seed)
    with Workspace(out, run.job(), overwrite=overwrite) as work:
        return run.go(work, memory, progress or Progress())


def slim_forecast(
    out: Path,
    *,
    streamed: StreamedModel,
    model: str,
    method: SlimMoE,
    name: str,
    data: TokenData | None,
    teacher: StreamedModel | None,
    seed: int,
    memory: int,
) -> Forecast:
    """What `slim` with the same arguments will need; checks the request as it does, writes nothing."""
    run = _Run(streamed, model, method, name, data, teacher, DEFAULT_SHARD_BYTES, seed)
    ahead = forecast(streamed, run.before, 1.0, out, run.data, memory, run.sweeps)
    need = ahead.memory_bytes
    if method.needs_gradients and run.units:
        assert run.data is not None
        vocabulary = int(streamed.model.get_input_embeddings().weight.shape[0])
        largest = max(_numel(streamed, axis.name) for unit in run.units for axis in unit.axes)
        need = max(need, 4 * (run.before.parameters + 2 * largest + 4 * run.data.length * vocabulary))
    after = run.after()
    scratch = 0 if run.data is None or method.needs_gradients else ahead.scratch_bytes
    return replace(ahead, memory_bytes=need, disk_bytes=after.bytes, scratch_bytes=scratch)


class _Run:
    """One job, from checked request to published folder."""

    def __init__(
        self,
        streamed: StreamedModel,
        model: str,
        method: SlimMoE,
        name: str,
        data: TokenData | None,
        teacher: StreamedModel | None,
        shard_bytes: int,
        seed: int,
    ) -> None:
        method.check()
        if method.needs_text and data is None:
            raise UsageError(
                f"{name} judges neurons by what they do on text, and no text was given",
                "Name some with --data, or use --set criterion=magnitude.",
            )
        streamed.refuse_packed("narrower experts would not fit its blocks")
        self.streamed, self.model, self.method, self.name = streamed, model, method, name
        self.data = data if method.needs_text else None
        self.shard_bytes, self.seed = shard_bytes, seed
        self.digest, self.before = streamed.checkpoint.digest(), measure(streamed)
        self.teacher = teacher if teacher is not None and teacher.checkpoint.digest() != self.digest else None
        if self.teacher is not None:
            _check_vocabularies(streamed, self.teacher)
        earlier_steps(streamed.checkpoint.folder)  # damaged records are found before hours of work
        self.notes: list[str] = []
        self.width = self._width()
        self.neurons = method.neurons_of(self.width)
        self.units = [neurons(moe) for moe in streamed.moe.values()] if self.neurons < self.width else []
        if self.units:
            self.notes += method.notes_on(self.width)
        self.heads = self._heads()
        self.units += self.heads.values()
        self.fresh = self._fresh()
        self.config = self._resize()
        if not self.units:
            self.data = None  # nothing goes, so nothing has to be judged
        self.sweeps = 1 + (self.data is not None) + (self.teacher is not None and self.data is not None)

    # -- what goes ------------------------------------------------------------------------------------------------

    def _width(self) -> int:
        widths = {moe.bank.intermediate_size: index for index, moe in self.streamed.moe.items()}
        if len(widths) > 1:
            told = ", ".join(f"{width} in layer {index}" for width, index in sorted(widths.items()))
            raise ModelError(f"experts have different widths: {told}", "Only experts of one width can be slimmed.")
        return next(iter(widths))

    def _heads(self) -> dict[int, Units]:
        """{decoder layer: its groups of heads}, if some go."""
        wanted = self.method.kv_heads
        if wanted is None:
            return {}
        found = head_groups(self.streamed.model)
        there = next(iter(found.values())).count
        if not 1 <= wanted <= there:
            raise UsageError(
                f"attention with {there} key and value heads cannot keep {wanted}", f"Ask for 1 to {there}."
            )
        return found if wanted < there else {}

    def kept(self, unit: Units) -> int:
        """How many of these units stay, of every owner."""
        if unit.kind == "neurons":
            return self.neurons
        assert self.method.kv_heads is not None
        return self.method.kv_heads

    def _fresh(self) -> dict[int, dict[str, Tensor]]:
        """{layer: {tensor: meta tensor of its new shape}}."""
        fresh: dict[int, dict[str, Tensor]] = {}
        for unit in self.units:
            for axis in unit.axes:
                old = self.streamed.model.get_parameter_or_buffer(axis.name).detach()
                shape = axis.shape(old.shape, self.kept(unit))
                fresh.setdefault(unit.layer, {})[axis.name] = torch.empty(shape, dtype=old.dtype, device="meta")
        return fresh

    def _resize(self) -> dict[str, Any]:
        """The raw config of the result."""
        self.fields: dict[str, Any] = {}
        raw = self.streamed.checkpoint.raw_config
        if not self.units:
            return raw
        heads = None
        if self.heads:
            first = next(iter(self.heads.values()))
            config = self.streamed.config.get_text_config(decoder=True)
            groups = self.kept(first)
            rows = next(a for a in first.axes if a.name.endswith("k_proj.weight")).block
            heads = (groups * (config.num_attention_heads // first.count), groups, rows)
        wanted = {name: meta.shape for tensors in self.fresh.values() for name, meta in tensors.items()}
        width = (self.width, self.neurons) if self.neurons < self.width else None
        result = resized(raw, self.streamed.config, wanted, width=width, heads=heads)
        self.fields = result.fields
        self.notes += result.notes
        orphans = [key for key in self.streamed.checkpoint.tensors if self._left_out(key)]
        if orphans:
            self.notes.append(
                "extra prediction layers (multi-token prediction) were left out: their experts do not fit"
            )
            for name in ("num_nextn_predict_layers", "num_mtp_layers"):
                if name in result.raw:
                    result.raw[name] = 0
        return result.raw

    def _left_out(self, key: str) -> bool:
        """Tensors of extra prediction layers that the model ignores: with other sizes they would no longer fit."""
        if self.streamed.params[key] is not None or not self.units:
            return False
        found = re.search(r"\.layers\.(\d+)\.", key)
        return found is not None and int(found[1]) >= len(self.streamed.layers)

    def after(self) -> Size:
        """Sizes of the result, from shapes alone."""
        bytes_gone = gone = active = of_expert = 0
        for unit in self.units:
            moe = self.streamed.moe[unit.layer] if unit.kind == "neurons" else None
            for axis in unit.axes:
                new = self.fresh[unit.layer][axis.name]
                fewer = _numel(self.streamed, axis.name) - new.numel()
                gone += fewer
                bytes_gone += fewer * new.element_size()
                active += fewer if moe is None else fewer * moe.top_k // moe.num_experts
                if moe is not None and unit is self.units[0]:
                    of_expert += fewer // moe.num_experts
        tensors = self.streamed.checkpoint.tensors
        bytes_gone += sum(tensors[key].nbytes for key in tensors if self._left_out(key))
        size = self.before.bytes_of_expert // max(self.before.parameters_of_expert, 1)
        return replace(
            self.before,
            bytes=self.before.bytes - bytes_gone,
            parameters=self.before.parameters - gone,
            active_parameters=self.before.active_parameters - active,
            parameters_of_expert=self.before.parameters_of_expert - of_expert,
            bytes_of_expert=self.before.bytes_of_expert - of_expert * size,
        )

    def job(self) -> dict[str, Any]:
        """Everything the written bytes depend on."""
        return {
            "checkpoint": self.digest,
            "method": self.name,
            "parameters": self.method.model_dump(mode="json", exclude={"teacher"}),
            "teacher": self.teacher.checkpoint.digest() if self.teacher is not None else None,
            "neurons": [self.neurons, self.width],
            "seed": self.seed if self.method.criterion == "random" else None,
            "data": self.data.digest if self.data else None,
            "batches": [list(b.ids_BL.shape) for b in self.data.batches] if self.data else None,
            "compute": [str(self.streamed.compute_dtype), torch.device(self.streamed.device).type],
            "experts": self.streamed.experts,
            "threads": torch.get_num_threads(),
            "shard_bytes": self.shard_bytes,
            "versions": versions(),
        }

    # -- the way --------------------------------------------------------------------------------------------------

    def go(self, work: Workspace, memory: int, progress: Progress) -> Result:
        self.work = work
        gone = {index: list(tensors) for index, tensors in self.fresh.items()}
        self.output = Rewrite(self.streamed, work.folder, gone, self.fresh, self.shard_bytes, self._left_out)
        try:
            self.scores = self._scores(memory, progress)
            self._cut(progress)
            self.output.copy_rest(self.output.through)
            self.output.writer.sync()
            plan, after = self._plan(), self.after()
            record = self._record(plan, after)
            names = self._finish(plan, record)
        finally:
            self.output.writer.close()
        work.publish(names)
        figures = {index: line["figures"] for index, line in self.lines.items()}
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
            figures,
            {},
            list(record["notes"]),
        )

    def _scores(self, memory: int, progress: Progress) -> dict[str, Tensor]:
        """{units' name: [E, U]}; {} where a layer's own weights decide. A restart finds them in a file."""
        self.told: dict[str, Any] = {}
        if self.data is None:
            return {}
        file = self.work.folder / "scores.safetensors"
        finished = [line["scored"] for line in self.work.journal() if "scored" in line]
        if finished:
            self.told = finished[-1]
            try:
                return load_file(file)
            except (OSError, SafetensorError) as error:
                raise OutputError(f"{file} is damaged: {error}", "Start this run afresh with --overwrite.") from error
        if self.method.needs_gradients:
            top = None
            if self.teacher is not None:
                top = top_logits(self.teacher, self.data, memory=memory, progress=progress)
            whole = resident(self.streamed, self.streamed.device)
            found = sensitivity(whole, self.units, self.data, self.method.criterion, teacher=top, progress=progress)
            del whole
            scores = found.scores
            self.told = {"gradient": found.norm, "tokens": found.tokens, "warnings": found.warnings}
        else:
            scores = self._activations(States(self.work.folder / "states", memory), progress)
        try:
            save_file({name: score.contiguous() for name, score in scores.items()}, file)
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep scores in {file}: {error}") from error
        self.work.record({"scored": self.told})
        return scores

    def _activations(self, states: States, progress: Progress) -> dict[str, Tensor]:
        """Mean size of what every neuron passes on, and of what every group of heads does, over real tokens."""
        assert self.data is not None
        streamed, scores = self.streamed, dict[str, Tensor]()
        slim_neurons = self.neurons < self.width
        for step in sweep(streamed, self.data.batches, states=states, progress=progress):
            moe = streamed.moe.get(step.index) if slim_neurons else None
            with ExitStack() as stack:
                experts = heads = None
                if moe is not None:
                    experts = stack.enter_context(LayerObservation(moe, [NeuronActivation], len(self.data.domains)))
                if step.index in self.heads:
                    heads = stack.enter_context(HeadOutputs(streamed.model, self.heads[step.index]))

                def before(number: int, batch: Batch, watched: tuple[Any, ...] = (experts, heads)) -> None:
                    for one in watched:
                        if one is not None:
                            one.batch(batch)

                step.run(before=before)
            if moe is not None and experts is not None:
                stats = experts.result().stats
                scores[moe.experts_name] = stats["activation_sum_EI"] / stats["count_E"].clamp(min=1)[:, None]
            if heads is not None:
                scores[heads.unit.name] = heads.sum_U[None]
            streamed.retained.clear()
        return scores

    def _cut(self, progress: Progress) -> None:
        """Every layer: choose, cut, write."""
        self.lines: dict[int, dict[str, Any]] = {line["layer"]: line for line in self.work.journal() if "layer" in line}
        progress.start("layers", len(self.streamed.layers), 0)
        for index in range(len(self.streamed.layers)):
            if index in self.lines:
                self.output.mark_written(index)
            elif index in self.fresh:
                self._cut_layer(index)
            progress.layer(index)
        self.streamed.forget_buffers()
        progress.done()

    def _cut_layer(self, index: int) -> None:
        streamed = self.streamed
        streamed.load_keys(streamed.keys_of(self.fresh[index]))
        line: dict[str, Any] = {"layer": index, "kept": {}, "figures": {}}
        state: dict[str, Tensor] = {}
        for unit in (u for u in self.units if u.layer == index):
            stored = {name: streamed.retained.pop(name) for name in unit.names}
            score_EU, unseen = self._judged(unit, stored)
            kept_EF = choose(score_EU, self.kept(unit))
            for axis in unit.axes:
                state[axis.name] = axis.select(stored[axis.name], kept_EF)
            held_E = score_EU.gather(1, kept_EF).sum(1) / score_EU.sum(1).clamp(min=1e-300)
            line["kept"][unit.kind] = {"kept": [packed(row, unit.count) for row in kept_EF], "share": held_E.tolist()}
            line["figures"][f"score_kept_{unit.kind}"] = float(held_E.mean())
            if unit.kind == "neurons":
                line["figures"]["unseen_experts"] = unseen
        self.output.write(state)
        self.output.copy_rest(streamed.layer_keys[index])
        self.output.writer.sync()
        streamed.free_layer(index)
        self.work.record(line)
        self.lines[index] = line

    def _judged(self, unit: Units, stored: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        """Scores [E, U], and how many experts have them from their weights because no token said anything of them."""
        if self.method.criterion == "random":
            draw = torch.Generator().manual_seed(self.seed * 1_000_003 + unit.layer)
            return torch.rand(unit.owners, unit.count, dtype=torch.float64, generator=draw), 0
        given_EU = self.scores.get(unit.name)
        unseen_E = torch.zeros(0) if given_EU is None else given_EU.sum(1) == 0
        if given_EU is not None and not bool(unseen_E.any()):
            return given_EU, 0
        if unit.kind == "neurons":
            size_EU = magnitudes(self.streamed.moe[unit.layer])
        else:
            size_EU = sum(axis.totals(stored[axis.name].float().square()) for axis in unit.axes)  # type: ignore[assignment]
        if given_EU is None:
            return size_EU.cpu(), 0
        return torch.where(unseen_E[:, None], size_EU.cpu(), given_EU), int(unseen_E.sum())

    # -- records --------------------------------------------------------------------------------------------------

    def _plan(self) -> Plan:
        """No expert goes. `extra` of a layer says what stays of each: the share of its score, and which neurons (see
        `packed`); the budget says which heads."""
        layers = []
        for index, moe in self.streamed.moe.items():
            entry = self.lines.get(index, {}).get("kept", {}).get("neurons")
            extra: dict[str, Any] = {}
            if entry:
                extra = {"neurons": self.neurons, "of": self.width, "score_kept": entry["share"], "kept": entry["kept"]}
            keep = list(range(moe.num_experts))
            layers.append(LayerPlan(index=index, name=moe.name, experts=len(keep), keep=keep, extra=extra))
        budget: dict[str, Any] = {"neurons": self.neurons, "of": self.width}
        if self.heads:
            count = next(iter(self.heads.values())).count
            budget |= {"kv_heads": self.method.kv_heads, "of_kv_heads": count}
            budget["kept_kv_heads"] = {
                str(index): unpacked(self.lines[index]["kept"]["heads"]["kept"][0], count) for index in self.heads
            }
        return Plan(
            model=self.model,
            model_digest=self.digest,
            method=self.name,
            parameters=self.method.model_dump(mode="json"),
            budget=budget,
            data_digest=self.data.digest if self.data else "",
            layers=layers,
        )

    def _record(self, plan: Plan, after: Size) -> dict[str, Any]:
        data, notes = self.data, [*self.notes, *self.told.get("warnings", [])]
        unseen = sum(line["figures"].get("unseen_experts", 0) for line in self.lines.values())
        if unseen:
            notes.append(f"{unseen} experts received no calibration token; their neurons were judged by their weights")
        budget = {name: value for name, value in plan.budget.items() if name != "kept_kv_heads"}
        slimming = {
            **budget,
            "config": self.fields,
            "teacher": self.teacher.checkpoint.digest() if self.teacher is not None else self.digest,
            **{name: value for name, value in self.told.items() if name != "warnings"},
        }
        if self.method.criterion != "kd_top8":
            del slimming["teacher"]
        return record_of(
            plan,
            self.streamed,
            data=data,
            seed=self.seed,
            before=self.before,
            after=after,
            figures={index: line["figures"] for index, line in self.lines.items()},
            notes=notes,
            sweeps=self.sweeps,
            slimming=slimming,
            forms=any(form_of(moe).describe() for moe in self.streamed.moe.values()),
        )

    def _finish(self, plan: Plan, record: dict[str, Any]) -> list[str]:
        """Write what is not weights; returns the names of all files."""
        source, folder = self.streamed.checkpoint.folder, self.work.folder
        write_json(folder / "config.json", self.config)
        write_json(folder / "coterie.json", record)
        plan.save(folder / "plan.json")
        card = source / "README.md"
        before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        try:
            (folder / "README.md").write_text(before + model_card(record), encoding="utf-8")
        except OSError as error:
            raise disk_error(error, folder) from error
        names = [*self.output.writer.files, "config.json", "coterie.json", "plan.json", "README.md"]
        return names + copy_small_files(source, folder)


class HeadOutputs:
    """Size of what each group of heads hands to the output projection, summed over real tokens."""

    def __init__(self, model: torch.nn.Module, unit: Units) -> None:
        self.unit, self.sum_U = unit, torch.zeros(unit.count, dtype=torch.float64)
        name = next(axis.name for axis in unit.axes if axis.dim == 1)
        self._module = model.get_submodule(name.rpartition(".")[0])
        self._batch: Batch | None = None

    def batch(self, batch: Batch) -> None:
        self._batch = batch

    def __enter__(self) -> HeadOutputs:
        self._hook = self._module.register_forward_pre_hook(self._see)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    def _see(self, module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        assert self._batch is not None
        x_TD = args[0].detach().reshape(-1, args[0].shape[-1])
        if self._batch.mask_BL is not None:
            x_TD = x_TD[self._batch.mask_BL.reshape(-1).to(x_TD.device)]
        self.sum_U += x_TD.abs().sum(0, dtype=torch.float64).view(self.unit.count, -1).sum(1).cpu()


def choose(score_EU: Tensor, count: int) -> Tensor:
    """The `count` units of every owner with the largest scores, ascending; of equal ones the first. Shape [E, F]."""
    return score_EU.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values


def packed(kept_F: Tensor, units: int) -> str:
    """Which of so many units are kept, one bit each, in hexadecimal: 5 of 8 units `b5` are 0, 2, 3, 5 and 7."""
    bits = numpy.zeros(units, dtype=numpy.uint8)
    bits[kept_F.cpu().numpy()] = 1
    return numpy.packbits(bits).tobytes().hex()


def unpacked(text: str, units: int) -> list[int]:
    """The kept units of `packed`, ascending."""
    bits = numpy.unpackbits(numpy.frombuffer(bytes.fromhex(text), dtype=numpy.uint8), count=units)
    found: list[int] = numpy.flatnonzero(bits).tolist()
    return found


def _numel(streamed: StreamedModel, name: str) -> int:
    return int(streamed.model.get_parameter_or_buffer(name).numel())


def _check_vocabularies(streamed: StreamedModel, teacher: StreamedModel) -> None:
    """Raise UsageError unless a teacher's tokens are the model's."""
    one, two = (int(s.model.get_input_embeddings().weight.shape[0]) for s in (streamed, teacher))
    if one != two:
        raise UsageError(
            f"the teacher knows {two} tokens, the model {one}: its likeliest tokens mean something else",
            "Name the model that this one was made from.",
        )
