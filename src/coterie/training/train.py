"""`coterie train`: one config in, one run folder out: the model, how it came to be, and what its experts did.

    OUT/  config.json, model.safetensors, tokenizer     what transformers loads after `import coterie`
          train.yaml                                    the config, every default written out
          coterie.json                                  record: losses, experts, versions, digests
          metrics.jsonl, experts.html                   the journal, and its pictures
          tensorboard/                                  the same for TensorBoard, where it is installed

A fresh model is a decoder of the toolkit; one that starts from a checkpoint keeps its architecture and may get another
router or residual rule. It is whole in memory. Work happens in OUT.partial; a killed run, started again with the same
config, goes on from its last checkpoint, with another one it is refused, naming what differs.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.anatomy.routers import put_residual, put_routers, remember, show_attention
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM
from coterie.balancing.base import Balance
from coterie.balancing.controllers import Bias
from coterie.compression.records import versions
from coterie.conversion.spawn import spawn
from coterie.errors import ModelError, UsageError
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.lockstep import Progress
from coterie.streaming.model import StreamedModel, all_finite
from coterie.streaming.writer import check_place, save_whole, write_json
from coterie.text import TokenData, check_ids, load_data, load_tokenizer
from coterie.training.config import TrainConfig
from coterie.training.flops import forward_flops
from coterie.training.pictures import write_page
from coterie.training.pretrain import METRICS, History, fit, routers_of
from coterie.training.stream import Stream, Windows, by_domain, evaluation_rows, tokenized
from coterie.training.trainer import Kept, no_denormals, processes, shared_workspace, shown_on


@dataclass
class Trained:
    """What a training gave. main : False in processes that only helped; they have written nothing."""

    out: Path
    history: History = field(default_factory=History)
    record: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    main: bool = True


@dataclass
class Text:
    """What a model learns from and is measured on."""

    stream: Stream
    tests: dict[str, TokenData]
    tokenizer: Path


def train(
    config: TrainConfig,
    out: Path,
    *,
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    offline: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Train what `config` describes and write it to `out`.

    Raises UsageError, DataError or ModelError for what cannot be, before the first step wherever it can be known;
    ModelError if a loss is no number (the last checkpoint stays); OutputError for unfinished work of another config.
    """
    check_place(out, overwrite=overwrite)
    if not config.data:
        raise UsageError("there is no text to learn from", "Name some: data: [...] in the config, or --data.")
    bar, team = progress or Progress(), processes(device)
    told = config.model_dump(mode="json")
    source = None if config.init is None else resolve(config.init, offline=offline)
    digest = None if source is None else Checkpoint.open(source).digest()
    job = {**told, "seed": seed, "checkpoint": digest, "processes": team.num_processes, "versions": versions()}
    with shared_workspace(out, job, team=team, overwrite=overwrite) as (place, work), no_denormals():
        torch.manual_seed(seed)
        model, notes = build(config, source, seed=seed, trust_remote_code=trust_remote_code)
        text = read_text(config, source, place, seed=seed, main=work is not None, team=team, progress=bar)
        vocabulary = int(model.config.get_text_config(decoder=True).vocab_size)  # type: ignore[union-attr,operator]
        for data in text.tests.values():
            check_ids(data, vocabulary)
        windows = Windows(text.stream, config.training.length)
        again = config.training.total(team.num_processes) * config.training.step_tokens(team.num_processes)
        if again > 1.5 * text.stream.tokens:
            notes.append(
                f"the text has {text.stream.tokens:,} tokens and is read {again / text.stream.tokens:.1f} times"
            )
        model, history = run(
            config,
            model,
            windows,
            text.tests,
            folder=place / "training",
            callbacks=[*([Kept(work)] if work is not None else []), *_tensorboard(place)],
            device=device,
            seed=seed,
            processes=team.num_processes,
            on_log=shown_on(bar),
        )
        bar.done()
        done = Trained(out, history, notes=notes, main=work is not None)
        if work is None:
            return done
        done.record = _record(config, model, text, history, notes, seed, digest)
        names = write_run(model, config, text, place, done.record, history)
        work.publish(names)
    return done


def run(
    config: TrainConfig,
    model: Any,
    windows: Windows,
    tests: Mapping[str, TokenData],
    *,
    folder: Path,
    processes: int = 1,
    callbacks: Sequence[Any] = (),
    **how: Any,
) -> tuple[Any, History]:
    """Train `model` as the config says; returns the model that came out of it, which is another one if it grew.

    A model that grows is trained first with one expert per layer, at a constant rate; then with all of them, on the
    text that follows, by the config's own schedule. Keywords beyond these are `fit`'s.
    """
    settings, skip, before = config.training, 0, None
    seed = int(how.get("seed", 0))
    how |= {"processes": processes, "callbacks": callbacks}
    if config.grow is not None:
        steps = settings.total(processes)
        first = max(1, round(config.grow.share * steps))
        phase = settings.model_copy(update={"steps": first, "tokens": None, "schedule": "constant"})
        settings = settings.model_copy(update={"steps": max(1, steps - first), "tokens": None})
        torch.manual_seed(seed)
        dense = CoterieForCausalLM(one_expert(model.config)).train()
        before = fit(dense, windows, tests, phase, folder=folder / "first", **how)
        model = spawn(dense, model.config, seed=seed, **config.grow.model_dump(exclude={"share"}))
        skip, folder = first * phase.step_tokens(processes) // phase.length, folder / "second"
    history = fit(
        model,
        windows,
        tests,
        settings,
        folder=folder,
        dials=config.dials,
        controllers=[Bias(told, model) for told in config.controllers],
        balance=Balance.of(config.balancing) if config.balancing else None,
        skip=skip,
        **how,
    )
    return model, history if before is None else before.then(history)


def one_expert(config: CoterieConfig) -> CoterieConfig:
    """The same decoder with a single expert, a dense layer, wherever there are many. Raises UsageError for layers that
    would differ in width."""
    told = config.to_dict()
    sparse = [config.settings_of(i) for i in range(config.num_hidden_layers)]
    widths = {layer.width for layer in sparse if not layer.dense}
    if len(widths) > 1 or any(layer.dense for layer in sparse):
        raise UsageError("only a decoder whose layers all have experts of one width can grow", "Drop grow.")
    for name in ("layer_types", "model_type", "transformers_version"):
        told.pop(name, None)
    told |= {"intermediate_size": widths.pop(), "first_dense": config.num_hidden_layers, "residual": None}
    return CoterieConfig(**told)


def build(
    config: TrainConfig, source: Path | None, *, seed: int = 0, trust_remote_code: bool = False
) -> tuple[nn.Module, list[str]]:
    """The model before its first step, in float32, with notes for the user."""
    notes: list[str] = []
    if source is None:
        given = dict(config.model or {})
        try:
            made = CoterieConfig(**given)
        except TypeError as error:
            raise UsageError(f"model: {error}", "See `coterie train --help` for what a decoder is made of.") from error
        unknown = sorted(set(given) - set(CoterieConfig().to_dict()))
        if unknown:
            raise UsageError(f"model: {', '.join(unknown)} is unknown", "See the decoder's settings in docs/train.md.")
        model: Any = CoterieForCausalLM(made)
    else:
        StreamedModel(Checkpoint.open(source)).refuse_packed("what is trained would not be")
        stored = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            source, config=stored, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        if config.router is not None:
            told = dict(config.router)
            kind, layers = str(told.pop("kind", "top-k")), told.pop("layers", None)
            notes += put_routers(model, kind, told, layers=layers, seed=seed)
    show_attention(model)
    if config.residual is not None:
        put_residual(model, config.residual)
    return model.train(), notes


def read_text(
    config: TrainConfig,
    source: Path | None,
    folder: Path,
    *,
    seed: int,
    main: bool = True,
    team: Any = None,
    progress: Progress | None = None,
) -> Text:
    """Tokenize what a config names; the main process writes, the others read what it wrote."""
    from coterie.assets import pocket

    place = Path(config.tokenizer) if config.tokenizer else source or pocket()
    tokenizer, settings = load_tokenizer(place), config.training
    count = team.num_processes if team is not None else 1
    wanted: dict[str, Any] = {
        "tokens": settings.total(count) * settings.step_tokens(count),
        "held_out": 0 if config.evaluate else settings.evaluate_samples * settings.length,
        "seed": seed,
    }
    if main:
        tokenized(config.data, tokenizer, folder / "text", progress=progress, **wanted)
    if team is not None:
        team.wait_for_everyone()
    stream = tokenized(config.data, tokenizer, folder / "text", **wanted)
    if config.evaluate:
        held = load_data(
            config.evaluate, tokenizer, samples=settings.evaluate_samples, length=settings.length, seed=seed
        )
    else:
        held = evaluation_rows(stream, settings.length, settings.evaluate_samples)
    return Text(stream, by_domain(held), place)


def _tensorboard(folder: Path) -> list[Any]:
    if importlib.util.find_spec("tensorboard") is None:
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    writer = SummaryWriter(log_dir=str(folder / "tensorboard"))
    return [TensorBoardCallback(writer)]


def _record(
    config: TrainConfig,
    model: nn.Module,
    text: Text,
    history: History,
    notes: list[str],
    seed: int,
    digest: str | None,
) -> dict[str, Any]:
    last: dict[str, Any] = next((entry for entry in reversed(history.entries) if "layers" in entry), {"layers": {}})
    slots = {int(i): figures["experts_per_token"] for i, figures in last["layers"].items()}
    return {
        "job": "train",
        "checkpoint": digest,
        "seed": seed,
        "losses": history.losses,
        "steps": history.steps,
        "tokens": history.tokens,
        "seconds": round(history.seconds, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "learning": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "forward_flops_per_token": forward_flops(model, config.training.length, slots),
        "routers": {str(index): kind for index, kind in routers_of(model).items()},
        "experts": last["layers"],
        "text": {"digest": text.stream.digest, "tokens": text.stream.tokens, "domains": text.stream.domains},
        "notes": notes,
        "versions": versions(),
    }


def write_run(
    model: Any, config: TrainConfig, text: Text, folder: Path, record: dict[str, Any], history: History
) -> list[str]:
    """Write the finished model with all that belongs to it; returns the names of what was written.

    Raises ModelError if a weight is no number.
    """
    for name, parameter in model.named_parameters():
        if not all_finite(parameter.detach()):
            raise ModelError(f"{name} is no number after training", "Lower the rate.")
    remember(model)
    written = save_whole(model.eval(), text.tokenizer, folder)
    (folder / "train.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_json(folder / "coterie.json", record)
    (folder / METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in history.entries))
    write_page(history, folder / "experts.html", title=folder.name.removesuffix(".partial"))
    written += ["train.yaml", "coterie.json", METRICS, "experts.html"]
    return [*written, "tensorboard"] if (folder / "tensorboard").exists() else written
