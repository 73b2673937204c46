"""Fine-tune a checkpoint in two phases: routers alone, then everything. What a compression with new routers needs.

A thin recipe on the Hugging Face Trainer, which does the optimiser, schedule, checkpoints, resuming and devices. The
model is whole in memory and trains in float32; the result is stored in the checkpoint's own dtype.
"""

# B batch, L sequence

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from coterie.anatomy import moe_layers, slice_names
from coterie.errors import ModelError, UsageError
from coterie.experts.compressed import Compressed
from coterie.streaming.writer import Workspace, copy_small_files, write_json
from coterie.text import TokenData


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
    """What a fine-tuning did. losses : mean loss on the held-out text before, after the routers, and at the end."""

    out: Path
    losses: dict[str, float] = field(default_factory=dict)
    trained: dict[str, int] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Rows(Dataset[dict[str, Tensor]]):
    """Sequences as the Trainer takes them; padding has no label."""

    def __init__(self, data: TokenData) -> None:
        self.rows: list[dict[str, Tensor]] = []
        for batch in data.batches:
            mask_BL = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
            for ids_L, mask_L in zip(batch.ids_BL, mask_BL, strict=True):
                labels_L = ids_L.masked_fill(~mask_L, -100)
                self.rows.append({"input_ids": ids_L, "attention_mask": mask_L.long(), "labels": labels_L})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return self.rows[number]


def router_parameters(model: nn.Module) -> list[str]:
    """Names of everything that decides where tokens go: parameters with one entry per expert outside of the experts,
    and whatever else a router owns."""
    names: set[str] = set()
    for layer in moe_layers(model):
        names |= {name for name in slice_names(layer) if not name.startswith(f"{layer.experts_name}.")}
        names |= {f"{layer.router_name}.{name}" for name, _ in layer.router.named_parameters()}
    return [name for name, _ in model.named_parameters() if name in names]


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
    on_log: Callable[[str, int, int, float], None] = lambda phase, step, steps, loss: None,
) -> FineTuned:
    """Train the checkpoint in `folder` and write the result to `out`.

    Parameters
    ----------
    data : sequences to learn from. held_out : sequences whose loss is measured before, between and after.
    on_log : called with (phase, step, steps, training loss) now and then.

    A killed run, started again, goes on from its last saved step. Raises UsageError where there is nothing to do,
    ModelError if the loss is no number. Peak memory: weights, gradients and two moments in float32.
    """
    from transformers import AutoModelForCausalLM

    schedule = schedule or Schedule()
    if schedule.router_steps + schedule.steps == 0:
        raise UsageError("no steps to train", "Give --router-steps or --steps.")
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    job = {"finetune": stored, "data": data.digest, "schedule": asdict(schedule), "seed": seed}
    with Workspace(out, json.loads(json.dumps(job, default=str)), overwrite=overwrite) as work, _no_denormals():
        torch.manual_seed(seed)
        done = {line["phase"]: line for line in work.journal()}
        start = work.folder / "routers" / "done" if "routers" in done else folder
        model = AutoModelForCausalLM.from_pretrained(start, dtype="auto")
        dtype = _DTYPES[next(iter(done.values()))["dtype"]] if done else next(model.parameters()).dtype
        model = model.float().to(device)
        own = _settings(model)
        balance = _balance(model, schedule.balance)
        result = FineTuned(out)
        for line in done.values():
            result.losses |= line["losses"]
        test = _Rows(held_out) if held_out is not None else None
        routers = set(router_parameters(model))
        result.trained = {
            "routers": sum(p.numel() for n, p in model.named_parameters() if n in routers),
            "all": sum(p.numel() for p in model.parameters()),
        }
        phases = [
            ("routers", schedule.router_steps, schedule.router_rate, routers),
            ("all", schedule.steps, schedule.rate, None),
        ]
        for phase, steps, rate, names in phases:
            if not steps or phase in done:
                continue
            kept = sorted((work.folder / phase).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
            if kept:  # the Trainer would look for fused experts by their names in memory and silently skip them
                model.load_state_dict(AutoModelForCausalLM.from_pretrained(kept[-1], dtype=torch.float32).state_dict())
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(names is None or name in names)
            trainer = _trainer(
                model, work.folder / phase, data, test, schedule, steps, rate, device, seed, on_log, phase
            )
            if test is not None and "before" not in result.losses:
                result.losses["before"] = _loss(trainer)
            trainer.train(resume_from_checkpoint=str(kept[-1]) if kept else None)
            if test is not None:
                result.losses[phase] = _loss(trainer)
            if phase != phases[-1][0]:  # a restart need not train it again
                model.save_pretrained(work.folder / phase / "done")
                work.record({"phase": phase, "losses": result.losses, "dtype": str(dtype).removeprefix("torch.")})
        for name, value in own.items():
            setattr(model.config.get_text_config(decoder=True), name, value)
        final = work.folder / "model"
        model.to(dtype).save_pretrained(final)
        for file in sorted(final.iterdir()):
            file.replace(work.folder / file.name)
        files = [file.name for file in sorted(work.folder.iterdir()) if file.suffix in (".safetensors", ".json")]
        files = [name for name in files if name != "job.json"]
        files += copy_small_files(folder, work.folder, but=[*files, "job.json"])
        result.record = {
            "finetuned": folder.name,
            "schedule": asdict(schedule),
            "balance": balance,
            "data_digest": data.digest,
            "tokens": data.tokens,
            "losses": result.losses,
            "trained": result.trained,
            "seed": seed,
            "versions": {n: importlib.metadata.version(n) for n in ("coterie", "torch", "transformers", "accelerate")},
        }
        write_json(work.folder / "coterie.json", result.record)
        work.publish(sorted({*files, "coterie.json"}))
    return result


def stand_in_group(optimizer: torch.optim.Optimizer, model: nn.Module, rate: float) -> None:
    """Give the vectors of compressed experts (arXiv:2503.00634) a group of their own in a fresh optimizer: learning
    rate `rate`, and no weight decay, which would pull them to 0 instead of to 1."""
    modules = [m for m in model.modules() if isinstance(m, Compressed)]
    vectors = {id(m.theta): m.theta for m in modules if m.theta.requires_grad}
    if not vectors:
        return
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in vectors]
    optimizer.add_param_group({"params": list(vectors.values()), "lr": rate, "weight_decay": 0.0})


def _trainer(
    model: Any,
    folder: Path,
    data: TokenData,
    test: _Rows | None,
    schedule: Schedule,
    steps: int,
    rate: float,
    device: str,
    seed: int,
    on_log: Callable[[str, int, int, float], None],
    phase: str,
) -> Any:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Told(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                if not torch.isfinite(torch.tensor(float(logs["loss"]))):
                    raise ModelError(f"the loss is {logs['loss']} after {state.global_step} steps", "Lower the rate.")
                on_log(phase, state.global_step, steps, float(logs["loss"]))

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=round(schedule.warmup * steps),
        weight_decay=schedule.weight_decay,
        max_grad_norm=1.0,
        adam_beta2=0.95,
        per_device_train_batch_size=schedule.batch_size,
        per_device_eval_batch_size=schedule.batch_size,
        logging_steps=max(1, steps // 50),
        save_steps=max(10, steps // 5),
        save_total_limit=1,
        seed=seed,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        prediction_loss_only=True,
    )

    class Grouped(Trainer):  # type: ignore[misc]
        def create_optimizer(self, *given: Any) -> Any:
            optimizer = super().create_optimizer(*given)
            stand_in_group(optimizer, self.model, rate * schedule.stand_in)
            return optimizer

    trainer = Grouped(model=model, args=arguments, train_dataset=_Rows(data), eval_dataset=test, callbacks=[Told()])
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)  # progress is the caller's business
    return trainer


def _loss(trainer: Any) -> float:
    """Mean loss on the held-out text, without the load-balancing part."""
    config = trainer.model.config.get_text_config(decoder=True)
    before = getattr(config, "output_router_logits", None)
    if before is not None:
        config.output_router_logits = False
    loss = float(trainer.evaluate()["eval_loss"])
    if before is not None:
        config.output_router_logits = before
    return loss


def _settings(model: Any) -> dict[str, Any]:
    """What training changes in a config, to be put back before the model is saved."""
    config = model.config.get_text_config(decoder=True)
    names = ("output_router_logits", "router_aux_loss_coef", "use_cache")
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


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


@contextlib.contextmanager
def _no_denormals() -> Iterator[None]:
    """CPU training slows down several times once weights' moments become denormal numbers."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
