"""Heal a compressed checkpoint: train it on text until it says again what its teacher, the original, says.

Both read the same text (teacher forcing); at every token the student is drawn to the teacher's distribution over the
next one (`coterie.training.distillation`). The teacher is either asked while training (online) or was read once and
its most likely tokens kept (cached, `coterie.training.teacher`), so that it need not fit.

`distil` trains a model that is in memory already, in place, and knows nothing of checkpoints: other methods bring
their own modules, callbacks and rates. `heal` is the job around it: a checkpoint in, a checkpoint out.

Both models run in evaluation mode: no dropout, no routing noise. A router's own balancing loss stays out of it.
"""

# B batch, L sequence, T predicted tokens

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback

from coterie.anatomy import decoder_layers, moe_layers
from coterie.compression.records import earlier_steps
from coterie.compression.sizes import measure
from coterie.errors import ModelError, UsageError
from coterie.streaming.config import one_line
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import write_json
from coterie.text import TokenData, together
from coterie.training.distillation import LOSSES, TopK, lm_losses, predicted, token_losses
from coterie.training.teacher import TeacherCache, vocabulary, write_cache
from coterie.training.trainer import (
    Kept,
    OnLog,
    PlainTrainer,
    Rows,
    Rule,
    Told,
    by_row,
    expert_parameters,
    learning,
    no_denormals,
    processes,
    router_parameters,
    shared_workspace,
    stand_ins,
    training_arguments,
    write_trained,
)

Train = Literal["all", "routers", "experts", "lora"]
TRAIN: tuple[str, ...] = get_args(Train)
RATES = {"all": 5e-5, "routers": 1e-3, "experts": 5e-5, "lora": 2e-4}


@dataclass(frozen=True)
class Distillation:
    """How a student is drawn to its teacher.

    steps, rate, batch_size : optimiser steps, highest learning rate, sequences per step and process.
    accumulate : batches whose gradients make one step. schedule : how the rate falls after `warmup`, a share of the
    steps in which it rises: "linear", "cosine" or "constant_with_warmup".
    loss, temperature : see `coterie.training.distillation`. top : how many of the teacher's tokens count.
    kd_weight, lm_weight : weights of that loss and of the usual one, -log p of the text's own next token.
    precision : "float32", or autocast to "bfloat16" or "float16"; the weights that learn are float32.
    """

    steps: int = 200
    rate: float = 5e-5
    batch_size: int = 8
    accumulate: int = 1
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    adam_beta2: float = 0.95
    loss: str = "tail"
    temperature: float = 1.0
    top: int = 64
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    precision: str = "float32"

    def check(self, device: str = "") -> None:
        """Raise UsageError for values that make no sense, or not on this device."""
        if self.precision == "float16" and device == "cpu":
            raise UsageError("float16 needs an accelerator", "On a CPU, compute in float32 or bfloat16.")
        positive = ("steps", "rate", "batch_size", "accumulate", "temperature", "top")
        for name in (*positive, "kd_weight", "lm_weight", "weight_decay"):
            value = getattr(self, name)
            least = 0 if name in positive else -1e-30
            if not least < value < float("inf"):
                raise UsageError(
                    f"{name}={value} makes no sense", f"It must be {'above' if least == 0 else 'at least'} 0."
                )
        if not 0 <= self.warmup < 1:
            raise UsageError(f"warmup={self.warmup} makes no sense", "It is a share of the steps, below 1.")
        if not self.kd_weight and not self.lm_weight:
            raise UsageError("kd_weight and lm_weight are both 0: there is nothing to learn")
        for name, value, known in (
            ("loss", self.loss, LOSSES),
            ("schedule", self.schedule, ("linear", "cosine", "constant_with_warmup")),
            ("precision", self.precision, ("float32", "bfloat16", "float16")),
        ):
            if value not in known:
                raise UsageError(f"no {name} {value!r}", f"There are {', '.join(known)}.")


@dataclass
class Distilled:
    """What a distillation did.

    before, after : means over the predicted tokens of the held-out text: `loss` and `kd` of the student, and the
    `teacher`'s own loss; {} without such text. seconds : of training, in this run.
    """

    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    steps: int = 0


@dataclass
class Healed:
    """What `heal` did. losses : {"before", "after", "teacher"} on the held-out text. main : False in the processes that
    only helped; they have written nothing."""

    out: Path
    losses: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    main: bool = True


class _Student(PlainTrainer):
    """The Trainer on the distillation loss: a mean over all predicted tokens of a step, of all processes."""

    columns = ("loss", "kd", "teacher")

    def __init__(
        self,
        *given: Any,
        teacher: nn.Module | None,
        options: Distillation,
        penalty: Callable[[dict[str, Tensor]], Tensor] | None = None,
        **named: Any,
    ) -> None:
        self.teacher, self.options, self.penalty = teacher, options, penalty
        super().__init__(*given, **named)
        self.model_accepts_loss_kwargs = True  # makes the Trainer count the tokens of a step
        self.loss_is_scaled_for_ga = True

    def token_losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Which positions predict [B, L-1], and at each: the student's loss, the distillation's, the teacher's loss."""
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        real_BL = predicted(inputs["labels"])
        target_T = inputs["labels"][:, 1:][real_BL]
        model.eval()
        student_TV = model(**given, use_cache=False).logits[:, :-1][real_BL]
        told: Tensor | TopK
        if self.teacher is not None:
            with torch.no_grad():
                teacher_TV = self.teacher(**given, use_cache=False).logits[:, :-1][real_BL]
            told, own_T = teacher_TV, lm_losses(teacher_TV, target_T)
        else:
            ids_TK, log_p_TK, tail_T, next_T = (
                inputs[f"teacher_{name}"][:, :-1][real_BL] for name in ("ids", "log_p", "tail", "next")
            )
            told, own_T = TopK(ids_TK, log_p_TK, tail_T), -next_T
        o = self.options
        kd_T = token_losses(student_TV, told, o.loss, k=o.top, temperature=o.temperature)
        with torch.set_grad_enabled(torch.is_grad_enabled() and o.lm_weight > 0):
            lm_T = lm_losses(student_TV, target_T)
        return real_BL, lm_T, kd_T, own_T

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        _, lm_T, kd_T, _ = self.token_losses(model, inputs)
        total = self.options.kd_weight * kd_T.sum()
        if self.options.lm_weight:
            total = total + self.options.lm_weight * lm_T.sum()
        if self.penalty is not None:
            total = total + self.penalty(inputs) * len(kd_T)
        return total * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)

    def row_sums(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        real_BL, *values = self.token_losses(model, inputs)
        return by_row(real_BL, values)


def distil(
    model: nn.Module,
    data: TokenData,
    teacher: nn.Module | TeacherCache,
    options: Distillation,
    *,
    folder: Path,
    held_out: TokenData | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    rules: Sequence[Rule] = (),
    penalty: Callable[[dict[str, Tensor]], Tensor] | None = None,
    device: str = "cpu",
    seed: int = 0,
    phase: str = "distillation",
    on_log: OnLog = lambda phase, step, steps, loss: None,
) -> Distilled:
    """Train a model in memory, in place, towards a teacher.

    Parameters
    ----------
    model : a causal language model; its parameters that require a gradient learn. They should be float32.
    teacher : a model in memory, or a cache of this very text (`write_cache`).
    folder : where checkpoints go. Started again with the same folder, a killed run goes on from its last one.
    held_out : text whose losses are measured before and after; with a cache, it must hold that text too.
    callbacks : of the Hugging Face Trainer. Gradients are there in `on_pre_optimizer_step`, weights may be changed in
        `on_optimizer_step`; kwargs hold `model` and `optimizer`.
    rules : learning rates and weight decays by name, see `Rule`.
    penalty : what a batch costs beside, asked after the student has seen it; a mean, like the other losses.
    on_log : called with (phase, step, steps, training loss) now and then.

    A run that was killed and resumed ends with the same weights as one that was not, where the device's arithmetic is
    deterministic (a CPU with the same number of threads is), if callbacks keep no state of their own: data order,
    optimiser, schedule and random numbers are restored by the Trainer.

    Raises UsageError for options that make no sense, DataError for a cache of other text, ModelError where nothing
    learns or the loss is no number. Peak memory: weights, gradients and two moments of what learns, and a batch's
    logits about three times in float32.
    """
    options.check(device)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("no parameter of the student learns")
    cache = teacher if isinstance(teacher, TeacherCache) else None
    check_choices("all", "cached" if cache is not None else "online", options.loss)
    k = cache.enough(options.top, options.temperature) if cache is not None else 0
    arguments = training_arguments(
        folder,
        steps=options.steps,
        rate=options.rate,
        batch_size=options.batch_size,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        device=device,
        seed=seed,
        accumulate=options.accumulate,
        schedule=options.schedule,
        adam_beta2=options.adam_beta2,
        precision=options.precision,
    )
    online = None if isinstance(teacher, TeacherCache) else teacher.eval().to(arguments.device)
    test = Rows(held_out, cache, k) if held_out is not None else None
    with no_denormals(), _without_balancing(model):
        trainer = _Student(
            model,
            arguments,
            Rows(data, cache, k),
            test,
            [Told(phase, on_log), *callbacks],
            [*rules, stand_ins()],
            teacher=online,
            options=options,
            penalty=penalty,
        )
        result = Distilled(steps=options.steps)
        began = time.monotonic()
        result.before = trainer.fit()
        result.seconds = time.monotonic() - began
        if test is not None:
            result.after = trainer.held_out()
    return result


def check_vocabularies(student: StreamedModel, teacher: StreamedModel, tokenizers: Sequence[Any] = ()) -> None:
    """Raise UsageError unless both give logits for the same tokens. tokenizers : of both, where both have one."""
    sizes = vocabulary(student), vocabulary(teacher)
    if sizes[0] != sizes[1]:
        raise UsageError(
            f"student and teacher have different vocabularies: {sizes[0]} and {sizes[1]} tokens",
            "A student is healed by the model it was made from, or one with the same tokens.",
        )
    if len(tokenizers) == 2:
        one, two = (t.get_vocab() for t in tokenizers)
        differ = sorted(token for token in one.keys() | two.keys() if one.get(token) != two.get(token))
        if differ:
            raise UsageError(
                f"the tokenizers of student and teacher differ in {len(differ)} tokens, first {differ[0]!r}"
                f" ({one.get(differ[0])} and {two.get(differ[0])})",
                "A teacher's logits mean nothing for other tokens.",
            )


def heal(
    student: StreamedModel,
    out: Path,
    teacher: StreamedModel,
    data: TokenData,
    held_out: TokenData,
    *,
    options: Distillation,
    train: str = "all",
    logits: str = "cached",
    lora_rank: int = 16,
    cache: Path | None = None,
    names: tuple[str, str] = ("", ""),
    memory: int = 2 * 2**30,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_log: OnLog = lambda phase, step, steps, loss: None,
) -> Healed:
    """Train the checkpoint `student` towards `teacher` and write the result to `out`.

    Parameters
    ----------
    data, held_out : sequences to learn from, and to measure losses on.
    train : what learns: "all", "routers", "experts" (the routed ones), or "lora" (low-rank updates of the linear layers
        of decoder layers and of the experts, merged into the weights). All else stays as it is, byte for byte.
    logits : "cached": the teacher is streamed once, before; "online": it is whole in memory and asked at every step.
    lora_rank : rank of the updates; their scale is twice that.
    cache : folder that keeps the teacher's logits or holds them already; None: they are deleted at the end.
    names : of student and teacher, for the record.

    The student is whole in memory, in float32. Several processes (torchrun, accelerate) share the batches; the main one
    alone writes. A killed run, started again, goes on where it was. Raises what `distil` and `write_cache` raise.
    """
    began = time.monotonic()
    options.check(student.device)
    check_choices(train, logits, options.loss, lora_rank)
    student.refuse_packed("what is trained would not be")
    if logits == "online":
        teacher.refuse_packed("a teacher like that has to be asked before (--logits cached)")
    team = processes(student.device)
    versions = {n: importlib.metadata.version(n) for n in ("coterie", "torch", "transformers", "accelerate")}
    asked = {**asdict(options), "train": train, "logits": logits} | (
        {"lora_rank": lora_rank} if train == "lora" else {}
    )
    digests = {"student": student.checkpoint.digest(), "teacher": teacher.checkpoint.digest()}
    compute = [str(teacher.compute_dtype), torch.device(teacher.device).type, team.num_processes]
    text = together(data, held_out)
    job = {"heal": digests, "data": data.digest, "held_out": held_out.digest, "options": asked, "seed": seed}
    earlier = earlier_steps(student.checkpoint.folder)
    with shared_workspace(out, job | {"compute": compute}, team=team, overwrite=overwrite) as (folder, work):
        told: nn.Module | TeacherCache
        if logits == "cached":
            k, temperature = options.top, options.temperature
            place = cache or folder / "cache"
            if work is not None and not (place / "cache.json").exists():
                try:
                    write_cache(teacher, text, place, k=k, temperature=temperature, memory=memory, progress=progress)
                finally:
                    if place.exists() or place.with_name(f"{place.name}.partial").exists():
                        work.record({"teacher": "read, or partly"})  # an interrupted run keeps it
            team.wait_for_everyone()
            told = TeacherCache(place)
            told.check(
                data=text.digest,
                teacher=digests["teacher"],
                vocabulary=vocabulary(student),
                k=k,
                temperature=temperature,
            )
        else:
            told = AutoModelForCausalLM.from_pretrained(teacher.checkpoint.folder, dtype=teacher.compute_dtype)
        asked_at = time.monotonic()
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(student.checkpoint.folder, dtype=torch.float32)
        total = sum(p.numel() for p in model.parameters())
        trained, finish = choose(model, train, lora_rank)
        counts = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "all": total}
        callbacks = [Kept(work)] if work is not None else []
        done = distil(
            model,
            data,
            told,
            options,
            folder=folder / "training",
            held_out=held_out,
            callbacks=callbacks,
            device=student.device,
            seed=seed,
            on_log=on_log,
        )
        del told
        finish()
        losses: dict[str, Any] = {"teacher": done.after.pop("teacher")}
        done.before.pop("teacher")
        losses = {"before": done.before, "after": done.after} | losses
        result = Healed(out, losses, warnings=data.warnings, main=team.is_main_process)
        if work is not None:
            files = write_trained(model, trained, student, folder)
            size = measure(student).describe()
            result.record = {
                "recipe": {
                    "model": names[0],
                    "method": "heal",
                    "parameters": asked,
                    "teacher": names[1],
                    "data": data.sources,
                    "samples": data.samples,
                    "length": data.length,
                    "seed": seed,
                },
                "model_digest": digests["student"],
                "teacher_digest": digests["teacher"],
                "data_digest": data.digest,
                "domains": data.domains,
                "tokens": data.tokens,
                "losses": losses,
                "phases": {
                    "teacher": {"seconds": round(asked_at - began, 3), "tokens": sum(text.tokens.values())},
                    "training": {
                        "steps": options.steps,
                        "sequences": options.steps * options.batch_size * options.accumulate * team.num_processes,
                        "seconds": round(done.seconds, 3),
                        "processes": team.num_processes,
                    },
                },
                "parameters": counts,
                "before": size,
                "after": size,
                "notes": [],
                "versions": versions,
                **({"earlier_steps": earlier} if earlier else {}),
            }
            write_json(folder / "coterie.json", result.record)
            files += _card(student, folder, result.record)
            work.publish([*files, "coterie.json"])
    return result


def check_choices(train: str, logits: str, loss: str, lora_rank: int = 16) -> None:
    """Raise UsageError for choices there are not, or that do not go together."""
    if train not in TRAIN:
        raise UsageError(f"nothing called {train!r} to train", f"There are {', '.join(TRAIN)}.")
    if logits not in ("cached", "online"):
        raise UsageError(f"no way {logits!r} to ask the teacher", "It is cached or online.")
    if logits == "cached" and loss == "full":
        raise UsageError(
            "the full loss needs all of the teacher's logits, and a cache holds the most likely ones",
            "Take --loss tail, which is the same with --top as large as the vocabulary, or --logits online.",
        )
    if lora_rank < 1:
        raise UsageError(f"lora_rank={lora_rank} makes no sense", "It must be above 0.")
    if train == "lora":
        _peft()


def choose(model: Any, train: str, lora_rank: int = 16) -> tuple[set[str], Callable[[], None]]:
    """Let just this part of a model learn. Returns the names of what will have changed, and what to call afterwards
    (with "lora" it puts the updates into the weights; otherwise it does nothing)."""
    model.requires_grad_(False)
    if train == "lora":
        return _with_lora(model, lora_rank)
    chosen = {"routers": router_parameters, "experts": expert_parameters}
    wanted = set(chosen[train](model)) if train in chosen else None
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted is None or name in wanted)
    return learning(model), lambda: None


def _with_lora(model: Any, rank: int) -> tuple[set[str], Callable[[], None]]:
    """Low-rank updates of the linear layers of all decoder layers, routers aside, and of the fused experts."""
    peft = _peft()
    prefix, layers = decoder_layers(model)
    routers, experts = (
        [f"{getattr(m, which)}." for m in moe_layers(model)] for which in ("router_name", "experts_name")
    )
    linear = [
        name
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and not f"{prefix}.{name}.".startswith((*routers, *experts))
    ]
    fused = [n for n, p in layers.named_parameters() if p.dim() == 3 and f"{prefix}.{n}".startswith(tuple(experts))]
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, target_parameters=fused)
    try:  # the layers alone: of a whole transformers model, peft takes dense layers for the experts of old checkpoints
        tuner = peft.LoraModel(layers, config, "default")
    except (ValueError, NotImplementedError, TypeError) as error:
        raise ModelError(
            f"peft cannot adapt {type(model).__name__}: {one_line(error)}", "Take --train all, experts or routers."
        ) from error
    return {
        *(f"{prefix}.{name}.weight" for name in linear),
        *(f"{prefix}.{name}" for name in fused),
    }, tuner.merge_and_unload


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise UsageError("--train lora needs peft", "pip install 'coterie[heal]'") from error
    return peft


@contextlib.contextmanager
def _without_balancing(model: nn.Module) -> Iterator[None]:
    """No load-balancing loss, whatever the config says; the config is as before afterwards."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    before = getattr(text, "output_router_logits", None)
    if before:
        text.output_router_logits = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        if before:
            text.output_router_logits = before  # type: ignore[union-attr]


def _card(student: StreamedModel, folder: Path, record: dict[str, Any]) -> list[str]:
    """The model card with a section on what was done."""
    source = student.checkpoint.folder / "README.md"
    before = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    asked, losses = record["recipe"]["parameters"], record["losses"]
    lines = [
        "",
        "## Healed with Coterie",
        "",
        f"- distilled from `{Path(record['recipe']['teacher']).name}`, {asked['steps']} steps: {asked['train']}",
        f"- loss on held-out text: {losses['before']['loss']:.4f} -> {losses['after']['loss']:.4f}"
        f" (teacher {losses['teacher']:.4f})",
        "",
    ]
    (folder / "README.md").write_text(before + "\n".join(lines), encoding="utf-8")
    return ["README.md"]
