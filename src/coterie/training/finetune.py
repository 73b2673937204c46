"""Fine-tune a checkpoint in two phases: routers alone, then everything. What a compression with new routers needs.

A thin recipe on the Hugging Face Trainer, which does the optimiser, schedule, checkpoints, resuming and devices. The
model is whole in memory and trains in float32; the result is stored in the checkpoint's own dtypes.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from coterie.anatomy import moe_layers
from coterie.errors import UsageError
from coterie.streaming.checkpoint import Checkpoint
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import write_json
from coterie.text import TokenData
from coterie.training.trainer import (
    Kept,
    OnLog,
    PlainTrainer,
    Rows,
    Told,
    learning,
    no_denormals,
    processes,
    restore,
    router_parameters,
    shared_workspace,
    stand_ins,
    training_arguments,
    write_trained,
)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    router_steps, router_rate : steps in which only routers learn, and their learning rate.
    steps, rate : steps in which everything learns.
    batch_size : sequences per step. balance : weight of the model's own load-balancing loss, where it has one.
    warmup : share of each phase's steps in which the rate rises; it then falls linearly to 0.
    stand_in : the vectors of compressed experts learn with this multiple of the rate. They start at 1 and have to get
        some tenths away from it: at the rate of weights that takes thousands of steps.
    """

    router_steps: int = 100
    router_rate: float = 1e-3
    steps: int = 500
    rate: float = 5e-5
    batch_size: int = 8
    balance: float = 0.01
    weight_decay: float = 0.001
    warmup: float = 0.05
    stand_in: float = 50.0


@dataclass
class FineTuned:
    """What a fine-tuning did. losses : mean loss on the held-out text before, after the routers, and at the end.
    main : False in the processes that only helped; they have written nothing."""

    out: Path
    losses: dict[str, float] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    main: bool = True


def finetune(
    folder: Path,
    out: Path,
    data: TokenData,
    *,
    held_out: TokenData | None = None,
    schedule: Schedule | None = None,
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    on_log: OnLog = lambda phase, step, steps, loss: None,
) -> FineTuned:
    """Train the checkpoint in `folder` and write the result to `out`.

    Parameters
    ----------
    data : sequences to learn from. held_out : sequences whose loss is measured before, between and after.
    on_log : called with (phase, step, steps, training loss) now and then.

    A killed run, started again, goes on from its last saved step. Raises UsageError where there is nothing to do,
    ModelError if the loss is no number. Peak memory: weights, gradients and two moments in float32.
    """
    schedule = schedule or Schedule()
    if schedule.router_steps + schedule.steps == 0:
        raise UsageError("no steps to train", "Give --router-steps or --steps.")
    team = processes(device)
    student = StreamedModel(Checkpoint.open(folder), device=device)
    student.refuse_packed("what is trained would not be")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    job = {"finetune": stored, "data": data.digest, "schedule": asdict(schedule), "seed": seed}
    job = json.loads(json.dumps(job, default=str))
    with shared_workspace(out, job, team=team, overwrite=overwrite) as (place, work), no_denormals():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        balance = _balance(model, schedule.balance)
        result = FineTuned(out, main=team.is_main_process)
        test = Rows(held_out) if held_out is not None else None
        routers = set(router_parameters(model))
        result.trained = {
            "routers": sum(p.numel() for n, p in model.named_parameters() if n in routers),
            "all": sum(p.numel() for p in model.parameters()),
        }
        phases = [
            ("routers", schedule.router_steps, schedule.router_rate, routers),
            ("all", schedule.steps, schedule.rate, None),
        ]
        trained: set[str] = set()
        for phase, steps, rate, names in phases:
            if not steps:
                continue
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(names is None or name in names)
            trained |= learning(model)
            arguments = training_arguments(
                place / phase,
                steps=steps,
                rate=rate,
                batch_size=schedule.batch_size,
                warmup=schedule.warmup,
                weight_decay=schedule.weight_decay,
                device=device,
                seed=seed,
            )
            callbacks = [Told(phase, on_log), *([Kept(work)] if work is not None else [])]
            rules = [stand_ins(schedule.stand_in)]
            trainer = PlainTrainer(model, arguments, Rows(data), test, callbacks, rules)
            done = place / phase / "done"
            if (done / "losses.json").exists():
                restore(trainer.trained_state(), done / "trained.safetensors")
                result.losses = json.loads((done / "losses.json").read_text(encoding="utf-8"))
                continue
            before = trainer.fit()
            if test is not None:
                result.losses.setdefault("before", before["loss"])
                result.losses[phase] = trainer.held_out()["loss"]
            if work is not None:  # a restart need not train it again
                trainer.save_model(str(done))
                write_json(done / "losses.json", result.losses)
                work.record({"phase": phase})
        if work is not None:
            files = write_trained(model, trained, student, place)
            result.record = {
                "finetuned": folder.name,
                "schedule": asdict(schedule),
                "balance": balance,
                "data_digest": data.digest,
                "tokens": data.tokens,
                "losses": result.losses,
                "trained": result.trained,
                "seed": seed,
                "versions": {
                    n: importlib.metadata.version(n) for n in ("coterie", "torch", "transformers", "accelerate")
                },
            }
            write_json(place / "coterie.json", result.record)
            work.publish([*files, "coterie.json"])
    return result


def _balance(model: Any, weight: float) -> float:
    """Switch on the model's own load-balancing loss with `weight`; returns 0 where it has none that could be used."""
    config = model.config.get_text_config(decoder=True)
    counts = {layer.num_experts for layer in moe_layers(model)}
    usable = hasattr(config, "router_aux_loss_coef") and hasattr(config, "output_router_logits") and len(counts) == 1
    if not usable or not weight:
        return 0.0
    config.output_router_logits, config.router_aux_loss_coef = True, weight
    model.router_aux_loss_coef = weight
    return weight
