"""Train a model: whole, on text; or fine-tune it, or heal it after a compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.errors import UsageError
from coterie.streaming.checkpoint import resolve
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import check_place, parse_size
from coterie.text import TokenData, check_ids, held_out, load_tokenizer

if TYPE_CHECKING:
    from coterie.training.finetune import FineTuned
    from coterie.training.heal import Distillation, Healed
    from coterie.training.race import Race
    from coterie.training.train import Trained
from coterie.api.runtime import Runtime, calibration, vocabulary_of


def train(
    config: str | dict[str, Any] | None,
    out: str,
    *,
    init: str | None = None,
    router: str | None = None,
    data: Sequence[str] = (),
    evaluate: Sequence[str] = (),
    steps: int | None = None,
    settings: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train a model on text, see `coterie.training.train`.

    Parameters
    ----------
    config : str or dict, optional
        A YAML file or the same as a dict, see `coterie.training.config.TrainConfig`. Without one, `init` says what.
    init, router, data, evaluate, steps : instead of what the config says.
    settings : sequence of str
        "dotted.name=value" each, set in the config.
    """
    from coterie.training.train import train as run_train

    runtime = runtime or Runtime()
    runtime.ready()
    return run_train(
        training_config(config, init=init, router=router, data=data, evaluate=evaluate, steps=steps, settings=settings),
        Path(out),
        device=runtime.device,
        seed=seed,
        overwrite=overwrite,
        offline=runtime.offline,
        trust_remote_code=runtime.trust_remote_code,
        progress=progress,
    )


def race(
    configs: Sequence[str] | Mapping[str, str | dict[str, Any]],
    out: str | None,
    *,
    seeds: int | Sequence[int] = 3,
    equal: str = "tokens",
    tokens: int | None = None,
    data: Sequence[str] = (),
    evaluate: Sequence[str] = (),
    settings: Sequence[str] = (),
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **hooks: Any,
) -> Race:
    """Train several configs at equal cost and compare them, see `coterie.training.race`.

    Parameters
    ----------
    configs : YAML files, called by their names; or {name: file or plain settings}. The first is the reference.
    seeds : how many, or which.
    equal : "tokens" or "flops". tokens : of all configs; of the first with flops.
    data, evaluate, settings : as `train`, for all configs.
    """
    from coterie.training.race import race as run_race

    runtime = runtime or Runtime()
    runtime.ready()
    if not isinstance(configs, Mapping):
        named = {Path(file).stem: file for file in configs}
        if len(named) < len(configs):
            raise UsageError("two configs have the same file name", "Rename one: it is what the table calls them.")
        configs = dict(named)
    told = {
        name: training_config(config, data=data, evaluate=evaluate, settings=settings)
        for name, config in configs.items()
    }
    if tokens is not None:
        told = {
            name: config.model_copy(
                update={"training": config.training.model_copy(update={"tokens": tokens, "steps": None})}
            )
            for name, config in told.items()
        }
    return run_race(
        told,
        None if out is None else Path(out),
        seeds=range(seeds) if isinstance(seeds, int) else seeds,
        equal=equal,
        device=runtime.device,
        overwrite=overwrite,
        offline=runtime.offline,
        progress=progress,
        **hooks,
    )


def training_config(
    config: str | dict[str, Any] | None,
    *,
    init: str | None = None,
    router: str | None = None,
    data: Sequence[str] = (),
    evaluate: Sequence[str] = (),
    steps: int | None = None,
    settings: Sequence[str] = (),
) -> Any:
    """A `TrainConfig` from a file or plain settings and what is said instead of them."""
    import yaml

    from coterie.training.config import changed, checked_config, read_config

    changes: dict[str, Any] = {}
    for entry in settings:
        name, sign, value = entry.partition("=")
        if not sign:
            raise UsageError(f"--set {entry!r} is not name=value")
        changes[name.strip()] = yaml.safe_load(value)
    if init is not None:
        changes["init"] = init
    if router is not None:
        changes = {"router": {"kind": router}, **changes}
    if data:
        changes["data"] = [data] if isinstance(data, str) else list(data)
    if evaluate:
        changes["evaluate"] = [evaluate] if isinstance(evaluate, str) else list(evaluate)
    if steps is not None:
        changes |= {"training.steps": steps, "training.tokens": None}
    if config is None and init is None:
        raise UsageError("there is nothing to train", "Name a config file, or a checkpoint with --init.")
    if isinstance(config, str):
        return read_config(Path(config), changes)
    return checked_config(changed(dict(config or {}), changes), "config")


def finetune(
    model: str,
    out: str,
    data: Sequence[str] = (),
    *,
    router_steps: int = 100,
    router_rate: float = 1e-3,
    steps: int = 500,
    rate: float = 5e-5,
    batch_size: int = 8,
    balance: float = 0.01,
    stand_in: float = 50.0,
    samples: int = 1024,
    held_out_samples: int = 16,
    length: int = 256,
    tokens: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> FineTuned:
    """Train a checkpoint in two phases, routers alone and then everything, see `coterie.training.finetune`.

    `held_out_samples` sequences of each domain are kept out of training; with `tokens`, a quarter of the rows.
    Keywords beyond these are `calibration`'s.
    """
    from coterie.training.finetune import Schedule
    from coterie.training.finetune import finetune as run_finetune
    from coterie.training.trainer import shown_on

    runtime = runtime or Runtime()
    runtime.ready()
    check_place(Path(out), overwrite=overwrite, source=Path(model) if Path(model).is_dir() else None)
    more = samples + held_out_samples
    given = calibration(model, data, tokens=tokens, samples=more, length=length, seed=seed, runtime=runtime, **text)
    if given is None:
        raise UsageError("fine-tuning needs text", "Name some with --data.")
    test, train = _apart(given, held_out_samples, more)
    bar = progress or Progress()
    schedule = Schedule(router_steps, router_rate, steps, rate, batch_size, balance, stand_in=stand_in)
    try:
        return run_finetune(
            resolve(model, offline=runtime.offline),
            Path(out),
            train,
            held_out=test,
            schedule=schedule,
            device=runtime.device,
            seed=seed,
            overwrite=overwrite,
            on_log=shown_on(bar),
        )
    finally:
        bar.done()


def heal(
    student: str,
    out: str,
    data: Sequence[str] = (),
    *,
    teacher: str,
    train: str = "all",
    steps: int = 200,
    rate: float | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    schedule: str = "linear",
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    loss: str | None = None,
    temperature: float = 1.0,
    top: int = 64,
    kd_weight: float = 1.0,
    lm_weight: float = 0.0,
    logits: str = "cached",
    cache: str | None = None,
    lora_rank: int = 16,
    precision: str = "float32",
    samples: int = 1024,
    held_out_samples: int = 16,
    length: int = 256,
    tokens: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    runtime: Runtime | None = None,
    progress: Progress | None = None,
    **text: Any,
) -> Healed:
    """Train a compressed checkpoint until it says again what its teacher says, see `coterie.training.heal`.

    Parameters
    ----------
    student, teacher : checkpoint folders or hub ids with the same vocabulary; the teacher need not fit into memory.
    train : "all", "routers", "experts" or "lora". rate : learning rate; None: 5e-5, for routers 1e-3, for lora 2e-4.
    logits : "cached" (the teacher is streamed once) or "online" (it is whole in memory beside the student).
    loss : "tail", "renormalised", "cross-entropy", or "full" with online logits; None: "tail" or "full".
    cache : folder to keep the teacher's logits in, or that holds them.
    steps, batch_size, accumulate, schedule, warmup, weight_decay, temperature, top, kd_weight, lm_weight, precision :
        see `coterie.training.heal.Distillation`.
    held_out_samples : sequences of each domain kept out of training; with `tokens`, a quarter of the rows.

    Keywords beyond these are `calibration`'s. Raises a `CoterieError` for whatever the request, the checkpoints or the
    text have wrong.
    """
    from coterie.training.heal import heal as run_heal
    from coterie.training.trainer import shown_on

    runtime = runtime or Runtime()
    options = heal_options(
        train=train,
        steps=steps,
        rate=rate,
        batch_size=batch_size,
        accumulate=accumulate,
        schedule=schedule,
        warmup=warmup,
        weight_decay=weight_decay,
        loss=loss,
        temperature=temperature,
        top=top,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        logits=logits,
        lora_rank=lora_rank,
        precision=precision,
    )
    for source in (student, teacher):
        check_place(Path(out), overwrite=overwrite, source=Path(source) if Path(source).is_dir() else None)
        if cache is not None and Path(source).is_dir():
            check_place(Path(cache), overwrite=True, source=Path(source))
    opened = check_teacher(student, teacher, runtime)
    more = samples + held_out_samples
    given = calibration(student, data, tokens=tokens, samples=more, length=length, seed=seed, runtime=runtime, **text)
    if given is None:
        raise UsageError("healing needs text", "Name some with --data.")
    check_ids(given, vocabulary_of(opened[0]))
    test, rest = _apart(given, held_out_samples, more)
    bar = progress or Progress()
    try:
        return run_heal(
            opened[0],
            Path(out),
            opened[1],
            rest,
            test,
            options=options,
            train=train,
            logits=logits,
            lora_rank=lora_rank,
            cache=Path(cache) if cache is not None else None,
            names=(student, teacher),
            memory=parse_size(runtime.memory, least=0),
            seed=seed,
            overwrite=overwrite,
            progress=bar,
            on_log=shown_on(bar),
        )
    finally:
        bar.done()


HEAL_OPTIONS = (
    "train", "steps", "rate", "batch_size", "accumulate", "schedule", "warmup", "weight_decay", "loss", "temperature",
    "top", "kd_weight", "lm_weight", "logits", "lora_rank", "precision",
)  # fmt: skip


def heal_options(
    *,
    train: str = "all",
    rate: float | None = None,
    loss: str | None = None,
    logits: str = "cached",
    lora_rank: int = 16,
    **others: Any,
) -> Distillation:
    """Options of `heal` as the distillation takes them, checked, with the defaults that depend on others."""
    from coterie.training.heal import RATES, Distillation, check_choices

    loss = loss or ("full" if logits == "online" else "tail")
    check_choices(train, logits, loss, lora_rank)
    options = Distillation(rate=RATES[train] if rate is None else rate, loss=loss, **others)
    options.check()
    return options


def check_teacher(student: str, teacher: str, runtime: Runtime) -> tuple[StreamedModel, StreamedModel]:
    """Both, opened. Raises UsageError unless they know the same tokens, by number and, where both say it, by name."""
    from coterie.training.heal import check_vocabularies

    one, two = runtime.open(student), runtime.open(teacher)
    folders = [m.checkpoint.folder for m in (one, two)]
    named = [f for f in folders if any((f / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))]
    tokenizers = [load_tokenizer(folder, trust_remote_code=runtime.trust_remote_code) for folder in named]
    check_vocabularies(one, two, tokenizers)
    return one, two


def _apart(given: TokenData, held_out_samples: int, asked: int) -> tuple[TokenData, TokenData]:
    """Held-out sequences and the others: so many of each domain, but no more than a quarter of what there is."""
    least = min(given.samples // len(given.domains), asked)
    return held_out(given, min(held_out_samples, max(1, least // 4)))
