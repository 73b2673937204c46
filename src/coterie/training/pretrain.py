"""Train a whole model on text: the Hugging Face Trainer, and what an MoE needs beside it.

That is: balancing terms in the loss (of a model call, see `balancing.base`), controllers that change routers after a
step, dials that turn with the step, and a journal of what the experts did (`metrics.jsonl`): load, violation of
balance, entropy, experts per token, dropped tokens, layer by layer. A loss or a gradient that is no number ends the
run before the step is taken, so that the last checkpoint stays good. Everything that changes with time is a function of
the step, or stands in the checkpoint: a killed run, started again, goes on as if nothing had been.

What the model is, where text comes from and where the result goes is known elsewhere (`train`, `race`).
"""

# B batch, L sequence, T tokens, E experts, N router outputs, K slots per token

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments

from coterie.anatomy import any_moe_layers
from coterie.balancing.base import Balance
from coterie.balancing.controllers import Bias
from coterie.balancing.loads import load_figures
from coterie.errors import ModelError, UsageError
from coterie.routing.attention_aware import AttentionAware, settle
from coterie.routing.base import Router, entropy
from coterie.routing.record import Record, listening
from coterie.text import TokenData
from coterie.training.config import TrainingSettings
from coterie.training.dials import Dial, Turning
from coterie.training.stream import Order, Windows
from coterie.training.trainer import OnLog, PlainTrainer, Rows, last_checkpoint

METRICS = "metrics.jsonl"
_SCHEDULES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("linear", {}),
    "cosine": ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    "constant": ("constant_with_warmup", {}),
    "wsd": ("warmup_stable_decay", {}),
}


@dataclass
class History:
    """What a training did.

    losses : held-out loss by domain after training, "all" over all tokens. curve : [(step, tokens, held-out loss)].
    entries : what was logged, as in metrics.jsonl. seconds : in training. tokens : read, over all processes.
    """

    losses: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[int, int, float]] = field(default_factory=list)
    entries: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0

    def then(self, later: History) -> History:
        """This training and one that went on behind it, as one."""
        moved = [{**e, "step": e["step"] + self.steps, "tokens": e["tokens"] + self.tokens} for e in later.entries]
        curve = [(step + self.steps, tokens + self.tokens, loss) for step, tokens, loss in later.curve]
        return History(
            later.losses,
            [*self.curve, *curve],
            [*self.entries, *moved],
            self.seconds + later.seconds,
            self.tokens + later.tokens,
            self.steps + later.steps,
        )


@dataclass
class Load:
    """Sums over the calls of one layer since the last log."""

    load_N: Tensor
    experts: int
    tokens: float = 0.0
    slots: float = 0.0
    dropped: float = 0.0
    entropy: float = 0.0

    def figures(self) -> dict[str, float]:
        """Figures of the layer: experts per token, dropped share of slots, mean gate entropy, and of the load."""
        told = {
            "experts_per_token": self.slots / max(self.tokens, 1),
            "dropped": self.dropped / max(self.slots + self.dropped, 1),
            "entropy": self.entropy / max(self.tokens, 1),
        }
        load_E = self.load_N[: self.experts]
        if not load_E.any():  # every token chose null experts
            return told | {"max_vio": 0.0, "min_load": 0.0, "cv": 0.0, "load_entropy": 0.0, "dead": 1.0}
        found = asdict(load_figures(load_E))
        return told | {"load_entropy" if name == "entropy" else name: value for name, value in found.items()}


class Loads:
    """Counts, call by call, what the experts of each layer get. `training` : only calls in training."""

    def __init__(self, *, training: bool = True) -> None:
        self.training = training
        self.layers: dict[int, Load] = {}

    @torch.no_grad()
    def __call__(self, record: Record) -> None:
        if record.grad != self.training:
            return
        for layer, routing in record.routings.items():
            load_N = routing.load_N().double()
            known = self.layers.setdefault(layer, Load(torch.zeros_like(load_N), routing.experts))
            mask_T = routing.mask_T
            expert_TK, entropy_T = routing.expert_TK, entropy(routing.probability_TN.detach())
            kept_TK = routing.kept_TK
            if mask_T is not None:
                expert_TK, entropy_T = expert_TK[mask_T], entropy_T[mask_T]
                kept_TK = None if kept_TK is None else kept_TK[mask_T]
            known.load_N += load_N
            known.tokens += len(expert_TK)
            known.slots += float((expert_TK < routing.experts).sum())
            known.entropy += float(entropy_T.sum())
            if kept_TK is not None:
                index_TK = routing.index_TK if mask_T is None else routing.index_TK[mask_T]
                known.dropped += float(((index_TK < routing.experts) & ~kept_TK).sum())

    def take(self) -> dict[int, Load]:
        """What was counted since the last time."""
        taken, self.layers = self.layers, {}
        return taken


class MoETrainer(PlainTrainer):
    """The Trainer of whole MoE models. A step whose loss or gradient is no number is not taken. The order of its text
    is the text's business."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise _no_number(f"the loss is {float(loss)}", self)
        return loss


def _no_number(what: str, trainer: Any) -> ModelError:
    last = last_checkpoint(Path(trainer.args.output_dir))
    kept = f"the last good checkpoint is {Path(last).name}" if last else "no checkpoint was written before it"
    return ModelError(f"{what} at step {trainer.state.global_step + 1}; {kept}", "Lower the rate, or warm up longer.")


class _Steps(TrainerCallback):  # type: ignore[misc]
    """What happens around each optimizer step."""

    def __init__(self, controllers: Sequence[Bias], steps: int) -> None:
        self.controllers, self.steps = controllers, steps
        self.trainer: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(grads)) if grads else torch.zeros(1)
        if not bool(torch.isfinite(norms).all()):
            raise _no_number("a gradient is no number", self.trainer)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for controller in self.controllers:
            controller.update(state.global_step + 1, self.steps, summed)


def summed(value: Tensor) -> Tensor:
    """Over all processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value


def _whole_lines(file: Path) -> list[dict[str, Any]]:
    """The entries of a journal; the line in which its run was killed is left out."""
    told = []
    for line in file.read_text().splitlines():
        try:
            told.append(json.loads(line))
        except ValueError:
            break
    return told


class _Journal(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl and tells the progress bar."""

    def __init__(
        self, file: Path, loads: Loads, balance: Balance | None, turning: Turning, step_tokens: int, on_log: OnLog
    ) -> None:
        self.file, self.loads, self.balance, self.turning = file, loads, balance, turning
        self.step_tokens, self.say = step_tokens, on_log
        self.entries: list[dict[str, Any]] = []
        self.since, self.at = time.perf_counter(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since, self.at = time.perf_counter(), state.global_step
        if self.file.exists():  # a resumed run goes on behind its checkpoint; what was logged after it comes again
            self.entries = [e for e in _whole_lines(self.file) if e["step"] <= state.global_step and state.global_step]
            if state.is_world_process_zero:
                self.file.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = dict(logs or {})
        entry: dict[str, Any] = {"step": state.global_step, "tokens": state.global_step * self.step_tokens}
        evaluated = {k.removeprefix("eval_").removesuffix("_loss"): v for k, v in logs.items() if k.endswith("_loss")}
        if "loss" in logs:
            now = time.perf_counter()
            entry |= {
                "loss": float(logs["loss"]),
                "rate": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "tokens_per_second": round((state.global_step - self.at) * self.step_tokens / (now - self.since), 1),
                "terms": dict(self.balance.told) if self.balance is not None else {},
                "dials": dict(self.turning.now),
                "layers": {str(i): load.figures() for i, load in sorted(self.loads.layers.items())},
                "load": {str(i): load.load_N.tolist() for i, load in sorted(self.loads.take().items())},
            }
            self.since, self.at = now, state.global_step
            if state.is_world_process_zero:
                self.say("training", state.global_step, state.max_steps, entry["loss"])
        elif evaluated and "train_loss" not in logs:
            entry["held_out"] = {k: float(v) for k, v in evaluated.items() if k != "train"}
        else:
            return
        self.entries.append(entry)
        if state.is_world_process_zero:
            with self.file.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since, self.at = time.perf_counter(), state.global_step  # the time it took is not training's


def fit(
    model: nn.Module,
    windows: Windows,
    tests: Mapping[str, TokenData],
    settings: TrainingSettings,
    *,
    folder: Path,
    dials: Sequence[Dial] = (),
    controllers: Sequence[Bias] = (),
    balance: Balance | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    listeners: Sequence[Callable[[Record], None]] = (),
    device: str = "cpu",
    seed: int = 0,
    processes: int = 1,
    checkpoints: bool = True,
    skip: int = 0,
    on_log: OnLog = lambda phase, step, steps, loss: None,
) -> History:
    """Train a model in memory, going on from the last whole checkpoint in `folder`.

    Parameters
    ----------
    windows : what it learns from. tests : held-out text by domain.
    balance : terms of the loss; a model that has its own keeps them where None.
    listeners : shown the record of every model call, in training and in evaluations.
    checkpoints : False: none are written, a killed run starts again.
    skip : windows that were read before.

    Raises ModelError if a loss or a gradient is no number, UsageError for dials that do not fit. Peak memory: weights,
    gradients and two moments in float32, and the activations of a batch.
    """
    steps = settings.total(processes)
    _freeze(model, settings.freeze)
    if balance is not None:
        balance.watch(model)
    turning = Turning(dials, model, balance or getattr(model, "_coterie_balance", None), steps)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    rows = {name: Rows(data) for name, data in tests.items()}
    loads, around = Loads(), _Steps(controllers, steps)
    journal = _Journal(folder / METRICS, loads, turning.balance, turning, settings.step_tokens(processes), on_log)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = MoETrainer(
        model,
        _arguments(folder, settings, steps, device, seed, checkpoints=checkpoints, evaluate=bool(rows)),
        Order(windows, steps * settings.step_tokens(processes) // settings.length, seed=seed, skip=skip),  # type: ignore[arg-type]
        rows or None,  # type: ignore[arg-type]
        [turning, around, journal, *callbacks],
    )
    trainer.model_accepts_loss_kwargs = False  # a step's loss is the mean over its forwards, and so are its terms
    around.trainer = trainer
    if rows and last_checkpoint(folder) is None:
        _settle(model, trainer.train_dataset, settings.batch_size)
    torch.manual_seed(seed)
    began = time.perf_counter()
    with listening_all(model, [loads, *(c.observe for c in controllers), *listeners]):
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    seconds = time.perf_counter() - began
    history = History(entries=journal.entries, seconds=seconds, steps=steps)
    history.tokens = steps * settings.step_tokens(processes)
    weights = {name: _predictions(data) for name, data in tests.items()}
    curve: dict[int, dict[str, float]] = {}
    for entry in journal.entries:
        curve.setdefault(entry["step"], {}).update(entry.get("held_out", {}))
    for step, losses in sorted(curve.items()):
        if losses.keys() == weights.keys() and losses:
            mean = sum(losses[name] * count for name, count in weights.items()) / sum(weights.values())
            history.curve.append((step, step * settings.step_tokens(processes), mean))
            history.losses = {**losses, "all": mean}
    return history


def _settle(model: nn.Module, order: Order, count: int) -> None:
    """Routers that learn from text which heads to look at see the first batch, for an evaluation comes before it."""
    if all(router.settled for router in model.modules() if isinstance(router, AttentionAware)):
        return
    ids_BL = torch.stack([order[place]["input_ids"] for place in range(min(count, len(order)))])
    settle(model.eval(), [ids_BL.to(next(model.parameters()).device)])


def listening_all(model: nn.Module, listeners: Sequence[Callable[[Record], None]]) -> Any:
    """All listeners hear of every call of the model."""

    def hear(record: Record) -> None:
        for listener in listeners:
            listener(record)

    return listening(model, hear)


def _predictions(data: TokenData) -> int:
    return sum(int(b.mask_BL[:, 1:].sum()) if b.mask_BL is not None else b.ids_BL[:, 1:].numel() for b in data.batches)


def _freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            found = [p for n, p in model.named_parameters() if re.fullmatch(pattern, n)]
        except re.error as error:
            raise UsageError(f"freeze: {pattern!r} is no regular expression: {error}") from error
        if not found:
            raise UsageError(f"freeze: no parameter has a name that matches {pattern!r}")
        for parameter in found:
            parameter.requires_grad_(False)


def _arguments(
    folder: Path,
    settings: TrainingSettings,
    steps: int,
    device: str,
    seed: int,
    *,
    checkpoints: bool,
    evaluate: bool,
) -> TrainingArguments:
    schedule, more = _SCHEDULES[settings.schedule]
    warmup = round(settings.warmup * steps)
    if settings.schedule == "wsd":
        more = {"num_decay_steps": max(1, steps // 5), "num_stable_steps": max(0, steps - steps // 5 - warmup)}
    often = max(1, steps // 50)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=settings.rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=more,
        warmup_steps=warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        adam_beta2=settings.beta2,
        optim="adamw_torch_fused" if device == "cpu" else "adamw_torch",
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        bf16=settings.precision == "bfloat16",
        logging_steps=often,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=max(1, math.ceil(settings.evaluate_every * steps)) if evaluate else None,
        eval_on_start=evaluate and last_checkpoint(folder) is None,
        save_strategy="steps" if checkpoints else "no",
        save_steps=max(1, math.ceil(steps / 5)),
        save_total_limit=2,
        seed=seed,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def routers_of(model: nn.Module) -> dict[int, str]:
    """Kind of each MoE layer's router; of the architecture's own, the name of its class."""
    return {
        layer.index: layer.router.kind if isinstance(layer.router, Router) else type(layer.router).__name__
        for layer in any_moe_layers(model)
    }
