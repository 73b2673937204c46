"""Small modules that are trained beside the unchanged weights of a checkpoint, and written with them.

A teacher is read once, layer by layer, before; the student, the checkpoint itself with fresh modules in its MoE layers,
is drawn to it (`heal.distil`) at the price of a penalty. What the modules are, what the penalty is and what there is to
tell afterwards is the method's business. The student is whole in memory, in float32 (packed experts as they are
stored); nothing of it has a gradient but these modules, yet the activations of all layers are held. A killed run goes
on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from coterie.compression.apply import Output
from coterie.compression.compress import Result
from coterie.compression.forecast import Forecast, forecast
from coterie.compression.methods import OwnJob
from coterie.compression.plan import LayerPlan, Plan
from coterie.compression.records import record_of, versions
from coterie.compression.sizes import measure, measure_written
from coterie.errors import ModelError
from coterie.streaming.lockstep import Batch, Progress
from coterie.streaming.model import StreamedModel, all_finite
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, Workspace
from coterie.text import TokenData
from coterie.training.heal import Distillation, check_vocabularies, distil
from coterie.training.teacher import TeacherCache, vocabulary, write_cache
from coterie.training.trainer import Kept, shown_on


@dataclass(frozen=True)
class Told:
    """What a trained student does on the text. summary : for the record. figures : of each layer. active : experts that
    run per token, of each layer; None: as many as before."""

    summary: dict[str, Any]
    figures: dict[int, dict[str, float]]
    active: dict[int, float] | None = None


@dataclass(frozen=True)
class Equipped:
    """A student that is ready to learn.

    method : the method, with what had to be found out about the model. penalty : see `distil`. callbacks : of the
    Trainer. told : asked once after training, of the trained student.
    """

    method: OwnJob
    penalty: Callable[[dict[str, Tensor]], Tensor]
    callbacks: Sequence[TrainerCallback]
    told: Callable[[], Told]


def learn_beside(
    streamed: StreamedModel,
    out: Path,
    *,
    model: str,
    method: OwnJob,
    name: str,
    data: TokenData,
    options: Distillation,
    child: str,
    section: str,
    phase: str,
    equip: Callable[[nn.Module], Equipped],
    teacher: StreamedModel | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    memory: int = 2 * 2**30,
    progress: Progress | None = None,
    seed: int = 0,
) -> Result:
    """Write a checkpoint with trained modules to `out`.

    Parameters
    ----------
    streamed : the source, freshly opened. It is used up.
    data : text to train on. teacher : what the student is drawn to; None: the source itself.
    child : name that the modules have in the experts module they belong to; `method.added` says what they hold.
    section : of the record, for what `Equipped.told` says. phase : for the progress bar.
    equip : gives the student its modules, freshly loaded, and lets nothing else learn.

    Raises what `distil` raises, and ModelError if a trained weight is no number.
    """
    method.check_model(streamed.moe)
    bar, digest, before = progress or Progress(), streamed.checkpoint.digest(), measure(streamed)
    if teacher is not None:
        check_vocabularies(streamed, teacher)
    job = {
        name: method.model_dump(mode="json"),
        "checkpoint": digest,
        **({"teacher": teacher.checkpoint.digest()} if teacher is not None else {}),
        "data": data.digest,
        "compute": [str(streamed.compute_dtype), torch.device(streamed.device).type, torch.get_num_threads()],
        "shard_bytes": shard_bytes,
        "seed": seed,
        "versions": versions(),
    }
    asked = teacher or streamed
    with Workspace(out, job, overwrite=overwrite) as work:
        place = work.folder / "teacher"
        if not (place / "cache.json").exists():
            try:
                k = min(options.top, vocabulary(asked))
                write_cache(asked, data, place, k=k, temperature=options.temperature, memory=memory, progress=bar)
            finally:
                if place.exists() or place.with_name(f"{place.name}.partial").exists():
                    work.record({"teacher": "read, or partly"})  # an interrupted run keeps it
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_pretrained(streamed.checkpoint.folder, dtype=torch.float32).eval()
        student.requires_grad_(False)
        equipped = equip(student)
        done = distil(
            student,
            data,
            TeacherCache(place),
            options,
            folder=work.folder / "training",
            callbacks=[*equipped.callbacks, Kept(work)],
            penalty=equipped.penalty,
            device=streamed.device,
            seed=seed,
            phase=phase,
            on_log=shown_on(bar),
        )
        bar.done()
        told = equipped.told()
        trained = learned_tensors(student, child)
        method = equipped.method
        del student, equipped
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
        counts = {index: layer.num_experts for index, layer in streamed.moe.items()}
        output = Output(streamed, work.folder, counts, method, shard_bytes)
        after = measure_written(streamed, output.specs, output.fresh_of, counts, told.active)
        try:
            for index, fresh in output.fresh.items():
                output.write({name: trained[name] for name in fresh if name.startswith(streamed.moe[index].name)})
            output.copy_rest(output.through)
            output.writer.sync()
            more: dict[str, Any] = {section: told.summary}
            more["training"] = {**asdict(options), "seconds": round(done.seconds, 3)}
            record = record_of(
                plan,
                streamed,
                data=data,
                seed=seed,
                before=before,
                after=after,
                figures=told.figures,
                notes=method.notes(),
                sweeps=1,
                forms=True,
                **more,
            )
            names = output.finish(plan, record)
        finally:
            output.writer.close()
        read, written = streamed.checkpoint.bytes_read, output.writer.bytes_written
        work.publish(names)
    return Result(work.out, plan, before, after, 1, read, written, work.resumed, record, warnings=method.notes())


def learn_beside_forecast(
    out: Path, *, streamed: StreamedModel, method: OwnJob, data: TokenData, memory: int
) -> Forecast:
    """What `learn_beside` with the same arguments will need, activations aside; checks the model as it does."""
    method.check_model(streamed.moe)
    size = measure(streamed)
    ahead = forecast(streamed, size, 1.0, out, data, memory, 1)
    return replace(ahead, memory_bytes=ahead.memory_bytes + max(4 * size.parameters, size.bytes))


def learned_tensors(model: nn.Module, child: str) -> dict[str, Tensor]:
    """The weights of all modules called `child`, by name. Raises ModelError if one is no number."""
    found = {n: p.detach().cpu() for n, p in model.named_parameters() if f".{child}." in n}
    for name, tensor in found.items():
        if not all_finite(tensor):
            raise ModelError(f"{name} is no number after training", "Lower the rate.")
    return found


def real_tokens(batch: Batch) -> Tensor:
    """Which tokens of a batch are no padding, [B, L] bool."""
    return batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)


@torch.no_grad()
def run_through(model: nn.Module, batch: Batch) -> None:
    """One forward pass that nobody wants logits of."""
    device = next(model.parameters()).device
    model(
        input_ids=batch.ids_BL.to(device),
        attention_mask=real_tokens(batch).long().to(device),
        use_cache=False,
        logits_to_keep=1,
    )
