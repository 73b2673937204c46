"""Carry out MC-SMoE's compression: experts become U V + S in memory, train, lose rows of S, and are written.

The equations are in `compression.factorizing.mc_smoe`; the training is `distil`, with one callback that scores rows
before each optimiser step and clears rows after it. The model is whole in memory in float32: its experts twice (U V and
S), their gradients and two moments. Written are U, V, the rows of S that stayed and everything else that learned;
routers and what a checkpoint holds beside parameters are copied byte for byte. A killed run goes on from its last
checkpoint.
"""

# K stored experts, O outputs and I inputs of a projection, Q rank, N rows of S

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from coterie.anatomy import MoELayer, moe_layers
from coterie.anatomy.forms import projection_shapes
from coterie.compression.apply import Output, is_matrix
from coterie.compression.compress import Result
from coterie.compression.factorizing.mc_smoe import McSmoe, staying
from coterie.compression.forecast import Forecast, forecast
from coterie.compression.merging.operators import MATRIX, factorise, stable_rank
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.records import record_of, versions
from coterie.compression.sizes import measure, measure_written
from coterie.errors import UsageError
from coterie.experts import factored
from coterie.experts.forward import projections
from coterie.streaming.checkpoint import DTYPES
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace
from coterie.text import TokenData
from coterie.training.heal import Distillation, distil
from coterie.training.teacher import TeacherCache, vocabulary, write_cache
from coterie.training.trainer import Rule, learning, router_parameters, shown_on

TOP = 64  # of the teacher's tokens that are kept; all others are one bucket


def factorize(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: McSmoe,
    name: str,
    data: TokenData,
    teacher: StreamedModel | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint whose experts are low rank plus rows to `out`.

    Parameters
    ----------
    streamed : the source, freshly opened. It is used up.
    teacher : what it learns from; None: the source as it is.
    data : text to train on, or to score rows on with steps=0.

    Raises UsageError where experts are factored already or a rank is too high, and what `distil` raises.
    """
    check_dense(streamed, model)
    ranks = {index: method.ranks(layer) for index, layer in streamed.moe.items()}
    guide, bar = teacher or streamed, progress or Progress()
    digest, before = streamed.checkpoint.digest(), measure(streamed)
    job = {
        "mc-smoe": method.model_dump(mode="json"),
        "checkpoint": digest,
        "teacher": guide.checkpoint.digest(),
        "data": data.digest,
        "compute": [str(guide.compute_dtype), torch.device(streamed.device).type, torch.get_num_threads()],
        "shard_bytes": shard_bytes,
        "seed": seed,
        "versions": versions(),
    }
    with Workspace(out, job, overwrite=overwrite) as work:
        options, rules = _options(method, data)
        place = work.folder / "teacher"
        if not (place / "cache.json").exists():
            top, temperature = min(TOP, vocabulary(guide)), options.temperature
            write_cache(guide, data, place, k=top, temperature=temperature, memory=memory, progress=bar)
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_pretrained(streamed.checkpoint.folder, dtype=torch.float32)
        figures = factor_experts(student, ranks)
        frozen = set(router_parameters(student))
        for parameter_name, parameter in student.named_parameters():
            parameter.requires_grad_(parameter_name not in frozen)
        done = distil(
            student,
            data,
            TeacherCache(place),
            options,
            folder=work.folder / "training",
            callbacks=[RowPruning(student, method)],
            rules=rules,
            device=streamed.device,
            seed=seed,
            on_log=shown_on(bar),
        )
        bar.done()
        shares = drop_rows(student, method.rows)
        for index, found in figures.items():
            found |= shares[index]
        plan = Plan(
            model=model,
            model_digest=digest,
            method=name,
            parameters=method.model_dump(mode="json"),
            data_digest=data.digest,
            layers=[
                LayerPlan(index=i, name=layer.name, experts=layer.num_experts, keep=list(range(layer.num_experts)))
                for i, layer in streamed.moe.items()
            ],
        )
        output = TrainedOutput(streamed, work.folder, method, learned_tensors(student), shard_bytes)
        counts = {index: layer.num_experts for index, layer in streamed.moe.items()}
        after = measure_written(streamed, output.specs, output.fresh_of, counts)
        try:
            output.write_all()
            record = record_of(
                plan,
                streamed,
                data=data,
                seed=seed,
                before=before,
                after=after,
                figures=figures,
                notes=method.notes(),
                sweeps=1,
                forms=True,
                teacher_digest=guide.checkpoint.digest(),
                training={**asdict(options), "seconds": round(done.seconds, 3)},
            )
            names = output.finish(plan, record)
        finally:
            output.writer.close()
        read, written = streamed.checkpoint.bytes_read, output.writer.bytes_written
        work.publish(names)
    return Result(work.out, plan, before, after, 1, read, written, work.resumed, record, figures)


def factorize_forecast(
    out: Path,
    *,
    streamed: StreamedModel,
    model: str,
    method: McSmoe,
    name: str,
    data: TokenData,
    teacher: StreamedModel | None,
    seed: int,
    memory: int,
) -> Forecast:
    """What `factorize` with the same arguments will need; checks ranks as it does, writes nothing."""
    check_dense(streamed, model)
    for layer in streamed.moe.values():
        method.ranks(layer)
    size = measure(streamed)
    ahead = forecast(streamed, size, 1.0, out, data, memory, 1)
    experts = size.parameters_of_expert * size.experts_total
    learned = size.parameters + experts  # experts are there as factors and as rows
    return replace(ahead, memory_bytes=ahead.memory_bytes + 16 * learned, scratch_bytes=2 * 12 * learned)


def check_dense(streamed: StreamedModel, model: str) -> None:
    """Raise UsageError where experts are no matrices any more, ModelError where they are stored packed."""
    streamed.refuse_packed("low-rank factors of its experts would not be")
    if any(layer.bank.factored for layer in streamed.moe.values()):
        raise UsageError(f"the experts of {model} are stored as factors already", "Start from the checkpoint before.")


def _options(method: McSmoe, data: TokenData) -> tuple[Distillation, list[Rule]]:
    """How the student trains; with steps=0 once over the text at a rate of zero, for the gradients alone."""
    zero_shot = method.steps == 0
    options = Distillation(
        steps=math.ceil(data.samples / method.batch_size) if zero_shot else method.steps,
        rate=method.rate,
        batch_size=method.batch_size,
        weight_decay=0.0 if zero_shot else 0.01,
        loss="tail",
        temperature=method.temperature,
        top=TOP,
        kd_weight=0.0 if zero_shot else method.alpha,
        lm_weight=1.0,
    )
    return options, [Rule(".*", rate=0.0, weight_decay=0.0)] if zero_shot else []


# -- the model in memory ------------------------------------------------------------------------------------------


@torch.no_grad()
def factor_experts(model: nn.Module, ranks: Mapping[int, Mapping[str, int]]) -> dict[int, dict[str, float]]:
    """Make every expert U V + S, in place and exactly; returns the mean stable rank of each layer's matrices.

    Memory: a second copy of one layer's experts while it is made.
    """
    figures = {}
    for layer in moe_layers(model):
        bank, experts = layer.bank, range(layer.num_experts)
        shapes = projection_shapes(bank)
        weights = [bank.read(expert) for expert in experts]
        found: dict[str, Tensor] = {}
        stable = []
        for p, (outputs, inputs) in shapes.items():
            dense = [getattr(w, MATRIX[p]) for w in weights]
            parts = [factorise(w_OI, ranks[layer.index][p]) for w_OI in dense]
            found[f"factor_{p}_a"] = torch.stack([u_OQ for u_OQ, _ in parts])
            found[f"factor_{p}_b"] = torch.stack([v_QI for _, v_QI in parts])
            rest = [w_OI - u_OQ @ v_QI for w_OI, (u_OQ, v_QI) in zip(dense, parts, strict=True)]
            found[f"sparse_{p}"] = torch.stack(rest).view(-1, inputs)
            found[f"sparse_{p}_row"] = torch.arange(len(experts) * outputs)
            stable += [stable_rank(w_OI) for w_OI in dense]
        every = {p: len(experts) * outputs for p, (outputs, _) in shapes.items()}
        del weights, dense
        factored.convert(layer.experts, shapes, ranks[layer.index], every)
        factored.with_factors(layer.experts, found)
        for p in shapes:  # buffers, so that the Trainer's checkpoints hold them
            layer.experts.register_buffer(f"sparse_{p}_score", torch.zeros(every[p]))
        figures[layer.index] = {"stable_rank": sum(stable) / len(stable)}
    return figures


def rows_of(model: nn.Module, what: str) -> dict[str, Tensor]:
    """{"layer.projection": tensor} of all S ("sparse_{p}"), or of their scores ("sparse_{p}_score")."""
    return {
        f"{layer.index}.{p}": getattr(layer.experts, what.format(p=p))
        for layer in moe_layers(model)
        for p in projections(layer.experts)
    }


class RowPruning(TrainerCallback):  # type: ignore[misc]
    """Scores the rows of every S before a step and clears those below the threshold after it."""

    def __init__(self, model: nn.Module, method: McSmoe) -> None:
        self.model, self.method = model, method

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        scores = rows_of(self.model, "sparse_{p}_score")
        for key, rows_NI in rows_of(self.model, "sparse_{p}").items():
            assert rows_NI.grad is not None
            now_N = (rows_NI.detach() * rows_NI.grad).abs().mean(1)
            if self.method.steps:
                scores[key].mul_(self.method.beta).add_(now_N, alpha=1 - self.method.beta)
            else:
                scores[key].add_(now_N)

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.method.steps:
            clear_rows(self.model, self.method.share(state.global_step + 1))


@torch.no_grad()
def clear_rows(model: nn.Module, share: float) -> None:
    """Set the rows of all S to zero but a `share` of them, those of the largest scores."""
    if share < 1:
        kept = staying(rows_of(model, "sparse_{p}_score"), share)
        for key, rows_NI in rows_of(model, "sparse_{p}").items():
            rows_NI[~kept[key].to(rows_NI.device)] = 0


@torch.no_grad()
def drop_rows(model: nn.Module, share: float) -> dict[int, dict[str, float]]:
    """Take all but a `share` of the rows of all S out of memory; returns what share of its rows each layer kept."""
    kept = staying(rows_of(model, "sparse_{p}_score"), share)
    figures: dict[int, dict[str, float]] = {}
    for layer in moe_layers(model):
        module, ours = layer.experts, []
        for p in projections(module):
            stays_N = kept[f"{layer.index}.{p}"].to(layer.router_device)
            rows: Tensor = getattr(module, f"sparse_{p}")
            setattr(module, f"sparse_{p}", nn.Parameter(rows.detach()[stays_N].clone(), requires_grad=True))
            module._buffers[f"sparse_{p}_row"] = getattr(module, f"sparse_{p}_row")[stays_N]
            del module._buffers[f"sparse_{p}_score"]
            ours.append(stays_N)
        figures[layer.index] = {"rows_kept": float(torch.cat(ours).double().mean())}
    return figures


# -- writing --------------------------------------------------------------------------------------------------------


class TrainedOutput(Output):
    """The checkpoint that is being written: whatever learned is new, experts are factors and rows."""

    def __init__(
        self, streamed: StreamedModel, folder: Path, method: McSmoe, trained: Mapping[str, Tensor], shard_bytes: int
    ) -> None:
        self.trained = trained
        counts = {index: layer.num_experts for index, layer in streamed.moe.items()}
        super().__init__(streamed, folder, counts, method, shard_bytes)
        for index, layer in streamed.moe.items():
            names = projections(layer.experts)
            self.rows[index] = {p: len(trained[f"{layer.experts_name}.sparse_{p}"]) for p in names}

    def write_all(self) -> None:
        """Write what learned, and copy the rest."""
        for fresh in self.fresh.values():
            self.write({name: self.trained[name].cpu().to(meta.dtype) for name, meta in fresh.items()})
        self.copy_rest(self.through)
        self.writer.sync()

    def _replaced(self, streamed: StreamedModel) -> tuple[dict[int, set[str]], dict[int, dict[str, Tensor]]]:
        gone: dict[int, set[str]] = {}
        fresh: dict[int, dict[str, Tensor]] = {}
        tensors = streamed.checkpoint.tensors  # of what a sweep has loaded, the model's own dtype is another
        stored = {name: DTYPES[tensors[key].dtype] for key, name in streamed.params.items() if name is not None}
        for name in stored.keys() & self.trained.keys():
            index = layer_of(streamed, name)
            meta = streamed.model.get_parameter_or_buffer(name).detach()
            gone.setdefault(index, set()).add(name)
            fresh.setdefault(index, {})[name] = torch.empty(meta.shape, dtype=stored[name], device="meta")
        for index, layer in streamed.moe.items():
            gone.setdefault(index, set()).update(n for n in stored if is_matrix(layer, n))
            dtype = next(kind for name, kind in stored.items() if is_matrix(layer, name))
            for name in new_names(layer, self.trained):
                value = self.trained[name]
                kind = dtype if value.is_floating_point() else value.dtype
                fresh.setdefault(index, {})[name] = torch.empty(value.shape, dtype=kind, device="meta")
        return gone, fresh


def learned_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Everything that learned, and where the rows that stayed belong, by name."""
    names = learning(student)
    found = {name: p.detach() for name, p in student.named_parameters(remove_duplicate=False) if name in names}
    return found | {name: b for name, b in student.named_buffers() if ".sparse_" in name and name.endswith("_row")}


def layer_of(streamed: StreamedModel, name: str) -> int:
    """The decoder layer a parameter belongs to; -1 for what surrounds them."""
    below = name.removeprefix(f"{streamed.prefix}.")
    return int(below.split(".")[0]) if below != name else -1


def new_names(layer: MoELayer, trained: Mapping[str, Tensor]) -> list[str]:
    """Names of a layer's factors and rows."""
    at = (f"{layer.experts_name}.factor_", f"{layer.experts_name}.sparse_")
    return [name for name in trained if name.startswith(at)]
