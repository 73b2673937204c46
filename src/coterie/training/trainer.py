"""What all training here shares: rows, the Hugging Face Trainer with few changes, several processes, saving.

The Trainer does the optimiser, schedule, checkpoints, resuming, mixed precision, gradient accumulation, devices and
processes. Changed is: its checkpoints hold what is trained alone, under the names of memory (it would look for fused
experts by the names they have on disk, and silently skip them); parameters may have rates and decays of their own;
the held-out loss is a mean over tokens, whatever the batches and processes.

The result of a training is written from the source: tensors that were not trained are copied byte for byte, the
others take the dtype and the names they are stored with, the config is the source's.
"""

# B batch, L sequence, V vocabulary, K the teacher's most likely tokens, T predicted tokens

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from coterie.anatomy import moe_layers, slice_names
from coterie.errors import ModelError, UsageError
from coterie.streaming.checkpoint import DTYPES
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel, all_finite
from coterie.streaming.writer import DEFAULT_SHARD_BYTES, ShardWriter, Spec, Workspace, copy_small_files
from coterie.text import TokenData, sample_key
from coterie.training.distillation import lm_losses, predicted
from coterie.training.teacher import TeacherCache

OnLog = Callable[[str, int, int, float], None]  # (phase, step, steps, training loss)
_WEIGHTS, _WHOLE = "trained.safetensors", ".whole"


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences as the Trainer takes them, with the teacher's top `k` where there is a cache.

    A label that is padding, or follows padding, is -100: nothing predicts it.
    """

    def __init__(self, data: TokenData, cache: TeacherCache | None = None, k: int = 0) -> None:
        self.cache, self.k = cache, k
        self.rows: list[dict[str, Tensor]] = []
        for batch in data.batches:
            mask_BL = batch.mask_BL if batch.mask_BL is not None else torch.ones_like(batch.ids_BL, dtype=torch.bool)
            for ids_L, mask_L in zip(batch.ids_BL, mask_BL, strict=True):
                labels_L = torch.full_like(ids_L, -100)
                labels_L[1:] = ids_L[1:].masked_fill(~(mask_L[1:] & mask_L[:-1]), -100)
                self.rows.append({"input_ids": ids_L, "attention_mask": mask_L.long(), "labels": labels_L})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        row = self.rows[number]
        if self.cache is None:
            return row
        mask_L = row["attention_mask"].bool()
        told = {}
        for name, kept_T in self.cache.take(sample_key(row["input_ids"], mask_L), self.k).items():
            whole = kept_T.new_zeros((len(mask_L), *kept_T.shape[1:]))
            whole[mask_L] = kept_T
            told[f"teacher_{name}"] = whole
        return row | told


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of any lengths as one batch, padded on the right."""
    batch = {}
    for name in rows[0]:
        fill = -100 if name == "labels" else 0
        batch[name] = nn.utils.rnn.pad_sequence([row[name] for row in rows], batch_first=True, padding_value=fill)
    return batch


@dataclass(frozen=True)
class Rule:
    """What parameters whose whole name matches the regular expression `pattern` do differently; the first rule counts.

    rate : times the learning rate. weight_decay : instead of the run's; None leaves it.
    """

    pattern: str
    rate: float = 1.0
    weight_decay: float | None = None


def stand_ins(rate: float = 50.0) -> Rule:
    """How the vectors of compressed experts (arXiv:2503.00634) learn: at a multiple of the rate, for they start at 1
    and have to get some tenths away from it; and without weight decay, which would pull them to 0."""
    return Rule(r".*\.theta", rate=rate, weight_decay=0.0)


class PlainTrainer(Trainer):  # type: ignore[misc]
    """The Trainer on a model's own loss. `rules` : see `Rule`. Its columns are what `held_out` averages."""

    columns: tuple[str, ...] = ("loss",)

    def __init__(
        self,
        model: nn.Module,
        arguments: TrainingArguments,
        train: Rows,
        test: Rows | None,
        callbacks: Sequence[TrainerCallback] = (),
        rules: Sequence[Rule] = (),
    ) -> None:
        self.rules = rules
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=test,
            data_collator=collate,
            callbacks=[_Whole(), *callbacks],
            compute_metrics=self._means,
        )
        self.remove_callback(PrinterCallback)  # progress is the caller's business

    def trained_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: parameters that learn, once each, and buffers."""
        names = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        buffers = {name: t for name, t in self.model.state_dict().items() if name not in names}
        return {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad} | buffers

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({n: t.contiguous() for n, t in self.trained_state().items()}, folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        restore(self.trained_state(), Path(resume_from_checkpoint) / _WEIGHTS)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:  # type: ignore[has-type]
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[float, float], list[nn.Parameter]] = {}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    rule = next((r for r in self.rules if re.fullmatch(r.pattern, name)), Rule(""))
                    decay = self.args.weight_decay if name in decayed else 0.0
                    decay = decay if rule.weight_decay is None else rule.weight_decay
                    groups.setdefault((self.args.learning_rate * rule.rate, decay), []).append(parameter)
            made, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options.pop("lr", None)
            self.optimizer = made(
                [{"params": p, "lr": lr, "weight_decay": decay} for (lr, decay), p in groups.items()],
                lr=self.args.learning_rate,
                **options,
            )
        return self.optimizer

    def row_sums(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Sums over the predicted tokens of each row, one column each, and their number last: [B, C + 1]."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        logits_BLV = model(**given, use_cache=False).logits
        real_BL = predicted(inputs["labels"])
        loss_T = lm_losses(logits_BLV[:, :-1][real_BL], inputs["labels"][:, 1:][real_BL])
        return by_row(real_BL, [loss_T])

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            sums = self.row_sums(model, inputs)
        return None, sums, torch.zeros(len(sums), device=sums.device)  # labels: there must be some

    def _means(self, found: Any) -> dict[str, float]:
        sums = torch.from_numpy(found.predictions).double().sum(0)
        return {name: float(sums[i] / sums[-1]) for i, name in enumerate(self.columns)}

    def fit(self) -> dict[str, float]:
        """Train, going on from the last whole checkpoint if there is one. Returns the held-out means of before the
        first step, {} without held-out rows."""
        last = last_checkpoint(Path(self.args.output_dir))
        # not `evaluate()` before `train()`: it marks the bare model as prepared, and several processes would then train
        # without ever exchanging gradients
        self.args.eval_on_start = last is None and self.eval_dataset is not None
        self.train(resume_from_checkpoint=last)
        first: dict[str, float] = next(
            (entry for entry in self.state.log_history if f"eval_{self.columns[0]}" in entry), {}
        )
        return {name: float(first[f"eval_{name}"]) for name in self.columns if first}

    def held_out(self) -> dict[str, float]:
        """Means over all predicted tokens of the held-out rows, after training."""
        found = self.evaluate()
        return {name: float(found[f"eval_{name}"]) for name in self.columns}


def by_row(real_BL: Tensor, values: Sequence[Tensor]) -> Tensor:
    """Values [T] of the real positions, summed for each row, and how many there are: [B, len(values) + 1]."""
    row_T = real_BL.nonzero()[:, 0]
    columns = [torch.zeros(len(real_BL), device=v.device).index_add_(0, row_T, v.detach().float()) for v in values]
    return torch.stack([*columns, real_BL.sum(1).float()], 1)


class Told(TrainerCallback):  # type: ignore[misc]
    """Passes on the training loss; a loss that is no number ends the run."""

    def __init__(self, phase: str, on_log: OnLog) -> None:
        self.phase, self.say = phase, on_log

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            if not torch.isfinite(torch.tensor(float(logs["loss"]))):
                raise ModelError(f"the loss is {logs['loss']} after {state.global_step} steps", "Lower the rate.")
            if state.is_world_process_zero:
                self.say(self.phase, state.global_step, state.max_steps, float(logs["loss"]))


def shown_on(bar: Progress) -> OnLog:
    """Training steps on a progress bar, anew for every phase."""
    told = {"phase": ""}

    def log(phase: str, step: int, steps: int, loss: float) -> None:
        if phase != told["phase"]:
            told["phase"] = phase
            bar.start("steps", steps)
        bar.layer(step - 1)

    return log


class Kept(TrainerCallback):  # type: ignore[misc]
    """Tells the workspace that there is something to go on with, so that an interrupted run keeps it."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.work.record({"checkpoint": state.global_step})


class _Whole(TrainerCallback):  # type: ignore[misc]
    """Marks checkpoints that were written to their end."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a run, for `Trainer.train(resume_from_checkpoint=...)`."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def restore(state: Mapping[str, Tensor], file: Path) -> None:
    """Put a saved state back in place. Raises ModelError if it is not the one of these parameters."""
    stored = load_file(file)
    if stored.keys() != state.keys():
        raise ModelError(f"{file} holds other parameters than are trained now", "Start afresh with --overwrite.")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(stored[name])


def training_arguments(
    folder: Path,
    *,
    steps: int,
    rate: float,
    batch_size: int,
    warmup: float,
    weight_decay: float,
    device: str,
    seed: int,
    accumulate: int = 1,
    schedule: str = "linear",
    adam_beta2: float = 0.95,
    precision: str = "float32",
) -> TrainingArguments:
    """What the Trainer is to do: logs 50 times a run, a checkpoint five times, both at the same steps."""
    often = max(1, steps // 50)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type=schedule,
        warmup_steps=round(warmup * steps),
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        adam_beta2=adam_beta2,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        logging_steps=often,
        logging_nan_inf_filter=False,  # it would hide what `Told` looks for
        save_steps=often * max(1, round(max(10, steps / 5) / often)),
        save_total_limit=2,  # one whole checkpoint stays while the next is written
        seed=seed,
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        ddp_timeout=int(_PATIENCE.total_seconds()),
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process uses one device; several are for torchrun
    return arguments


# -- several processes ------------------------------------------------------------------------------------------------

_PATIENCE = timedelta(days=7)  # the others wait while one reads a large teacher


def processes(device: str) -> PartialState:
    """This process among those that torchrun or accelerate started; alone without them."""
    if device.startswith("cuda:") and int(device.removeprefix("cuda:")):
        raise UsageError(
            f"training takes the first visible device, not {device}",
            f"Say CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')} and --device cuda.",
        )
    return PartialState(cpu=device == "cpu", timeout=_PATIENCE)


@contextlib.contextmanager
def shared_workspace(
    out: Path, job: dict[str, Any], *, team: PartialState, overwrite: bool = False
) -> Iterator[tuple[Path, Workspace | None]]:
    """The folder OUT.partial for all processes; only the main one owns it (gets the Workspace), the others see it.

    All enter once it is claimed and leave together.
    """
    if team.is_main_process:
        with Workspace(out, job, overwrite=overwrite) as work:
            team.wait_for_everyone()
            yield work.folder, work
            team.wait_for_everyone()
    else:
        team.wait_for_everyone()
        here = Path(os.path.realpath(out))
        yield here.with_name(here.name + ".partial"), None
        team.wait_for_everyone()


# -- which parameters, and writing them -------------------------------------------------------------------------------


def router_parameters(model: nn.Module) -> list[str]:
    """Names of everything that decides where tokens go: parameters with one entry per expert outside of the experts,
    and whatever else a router owns."""
    names: set[str] = set()
    for layer in moe_layers(model):
        names |= {name for name in slice_names(layer) if not name.startswith(f"{layer.experts_name}.")}
        names |= {f"{layer.router_name}.{name}" for name, _ in layer.router.named_parameters()}
    return [name for name, _ in model.named_parameters() if name in names]


def expert_parameters(model: nn.Module) -> list[str]:
    """Names of the routed experts' parameters."""
    prefixes = tuple(f"{layer.experts_name}." for layer in moe_layers(model))
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


def learning(model: nn.Module) -> set[str]:
    """Names of all parameters that learn, under every name a tied one has."""
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def write_trained(
    model: nn.Module,
    trained: set[str],
    streamed: StreamedModel,
    folder: Path,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> list[str]:
    """Write the checkpoint `streamed` with the parameters `trained` taken from `model`; returns the names of all files.

    Everything else is copied byte for byte, with config, tokenizer and model card. Peak memory: one layer's trained
    parameters in the stored dtype. Raises ModelError if a trained parameter is no number.
    """
    checkpoint = streamed.checkpoint
    stored = {name: checkpoint.tensors[key] for key, name in streamed.params.items() if name in trained}
    replaced = set(streamed.keys_of(stored))
    groups: dict[str, list[str]] = {}
    for name in stored:
        below = name.removeprefix(f"{streamed.prefix}.")
        groups.setdefault(below.split(".")[0] if below != name else "", []).append(name)

    def tensors(names: Sequence[str], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the checkpoint has them."""
        plain = {name: state[name] for name in names if name not in streamed.fused}
        made = streamed.checkpoint_tensors(plain) if plain else {}
        for name in names:
            if name in streamed.fused:
                made |= dict(streamed.fused[name].tensors(state[name], range(len(state[name]))))
        return made

    metas = {n: streamed.model.get_parameter_or_buffer(n).detach().to(dtype=DTYPES[stored[n].dtype]) for n in stored}
    fresh = {key: t for names in groups.values() for key, t in tensors(names, metas).items()}
    kept = {key: info.meta() for key, info in checkpoint.tensors.items() if key not in replaced}
    layout = {key: (kept | fresh)[key] for key in checkpoint.tensors if key in kept or key in fresh} | fresh
    writer = ShardWriter(folder, [Spec(key, t.dtype, tuple(t.shape)) for key, t in layout.items()], shard_bytes)
    now = dict(model.named_parameters(remove_duplicate=False))
    try:
        for names in groups.values():
            state = {}
            for name in names:
                state[name] = now[name].detach().to("cpu", DTYPES[stored[name].dtype])
                if not all_finite(state[name]):
                    raise ModelError(f"{name} is no number any more after training", "Lower the rate.")
            for key, tensor in tensors(names, state).items():
                writer.write(key, tensor)
        streamed.on_read = writer.write
        for key in kept:
            streamed.pass_on(key)
        writer.sync()
    finally:
        writer.close()
    shutil.copyfile(checkpoint.folder / "config.json", folder / "config.json")
    names = [*writer.files, "config.json"]
    return [*names, *copy_small_files(checkpoint.folder, folder)]


@contextlib.contextmanager
def no_denormals() -> Iterator[None]:
    """CPU training slows down several times once weights' moments become denormal numbers."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
