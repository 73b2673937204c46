"""`coterie race`: several configs trained on the same text in the same order, with the same seeds, and compared.

Every config is trained once per seed, in turns (seed by seed, config by config), so that an early look is fair. What is
equal is the number of tokens, or the floating-point operations (`flops`): then each config reads as many tokens as its
operations per token allow, counted beforehand with all slots of its routers in use. Either way the operations that were
really done are counted, from what the routers did, and the losses are told at equal tokens and at equal operations (on
the curve of held-out losses, in between linearly; a config that is cut short there had not finished its schedule).

Figures are means over seeds with two standard errors; differences to the first config are paired by seed. A killed race
goes on with the runs that were not finished.
"""

# T tokens, K slots per token

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from coterie.anatomy import any_moe_layers
from coterie.compression.records import versions
from coterie.errors import UsageError
from coterie.routing.record import Record
from coterie.streaming.checkpoint import Checkpoint, resolve
from coterie.streaming.lockstep import Progress
from coterie.streaming.writer import Workspace, write_json
from coterie.training.config import TrainConfig
from coterie.training.flops import training_flops
from coterie.training.pretrain import Loads
from coterie.training.stream import Windows
from coterie.training.train import Text, build, read_text
from coterie.training.train import run as run_config
from coterie.training.trainer import no_denormals, shown_on


@dataclass
class Run:
    """One config with one seed.

    curve : [(tokens, operations, held-out loss)]. losses : by domain, at the end. layers : figures of the experts on
    held-out text. fluctuation : share of held-out tokens whose first expert changed between the last two evaluations,
    mean over layers. flops_per_token : in training, as it was. seconds, tokens : of training.
    """

    name: str
    seed: int
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    fluctuation: float | None = None
    flops_per_token: float = 0.0
    parameters: int = 0
    tokens: int = 0
    seconds: float = 0.0
    entries: list[dict[str, Any]] = field(default_factory=list)

    def mean(self, figure: str) -> float:
        """A figure of the experts, mean over layers."""
        return statistics.fmean(layer[figure] for layer in self.layers.values()) if self.layers else math.nan

    def at_flops(self, flops: float) -> float:
        """Held-out loss where the curve reaches so many operations; at its end if it never does."""
        before = self.curve[0]
        for point in self.curve:
            if point[1] >= flops:
                span = point[1] - before[1]
                return point[2] if span <= 0 else before[2] + (point[2] - before[2]) * (flops - before[1]) / span
            before = point
        return self.curve[-1][2]


@dataclass
class Race:
    """All runs, in the order they were made."""

    runs: list[Run]
    names: list[str]
    seeds: list[int]
    equal: str
    record: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> list[Run]:
        """The runs of a config, by seed."""
        return sorted((run for run in self.runs if run.name == name), key=lambda run: run.seed)

    def table(self) -> list[dict[str, Any]]:
        """A row for each config; spreads are two standard errors over seeds, None with one seed."""
        first = {run.seed: run for run in self.of(self.names[0])}
        budget = min(run.curve[-1][1] for run in self.runs)
        rows = []
        for name in self.names:
            runs = self.of(name)
            loss, spread = mean_and_error([run.losses["all"] for run in runs])
            gap, gap_spread = mean_and_error([run.losses["all"] - first[run.seed].losses["all"] for run in runs])
            fluctuations = [run.fluctuation for run in runs if run.fluctuation is not None]
            rows.append(
                {
                    "name": name,
                    "loss": loss,
                    "spread": spread,
                    "difference": gap,
                    "difference_spread": gap_spread,
                    "loss_at_equal_flops": mean_and_error([run.at_flops(budget) for run in runs])[0],
                    "experts_per_token": statistics.fmean(run.mean("experts_per_token") for run in runs),
                    "max_vio": statistics.fmean(run.mean("max_vio") for run in runs),
                    "entropy": statistics.fmean(run.mean("entropy") for run in runs),
                    "fluctuation": statistics.fmean(fluctuations) if fluctuations else None,
                    "flops_per_token": statistics.fmean(run.flops_per_token for run in runs),
                    "tokens": runs[0].tokens,
                    "parameters": runs[0].parameters,
                    "tokens_per_second": statistics.fmean(run.tokens / max(run.seconds, 1e-9) for run in runs),
                }
            )
        return rows


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and two standard errors of it; None for a single value."""
    if len(values) < 2:
        return values[0], None
    return statistics.fmean(values), 2 * statistics.stdev(values) / math.sqrt(len(values))


def race(
    configs: Mapping[str, TrainConfig],
    out: Path | None,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    equal: str = "tokens",
    device: str = "cpu",
    overwrite: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    after: Callable[[Run, Any, Text], None] | None = None,
    on_run: Callable[[str, int, int, int], None] = lambda name, seed, done, of: None,
) -> Race:
    """Train all configs with all seeds and compare them.

    Parameters
    ----------
    out : folder for results, which a killed race goes on from; None: nothing is written.
    equal : "tokens" or "flops".
    after : called with each run, its trained model and the text, for measurements of one's own.
    on_run : called with (name, seed, runs done, runs in all) before each run.

    Raises UsageError for configs that cannot be compared: other text, tokenizer, window length or tokens.
    """
    names = list(configs)
    if len(names) < 1 or not seeds:
        raise UsageError("a race needs configs and seeds", "Name at least one YAML file.")
    if equal not in ("tokens", "flops"):
        raise UsageError(f"equal={equal!r} is neither tokens nor flops")
    first = configs[names[0]]
    for name, config in configs.items():
        differs = [
            what
            for what, own, theirs in (
                ("data", first.data, config.data),
                ("evaluate", first.evaluate, config.evaluate),
                ("tokenizer", first.tokenizer, config.tokenizer),
                ("training.length", first.training.length, config.training.length),
                ("training.evaluate_samples", first.training.evaluate_samples, config.training.evaluate_samples),
            )
            if own != theirs
        ]
        if differs:
            raise UsageError(
                f"{name} and {names[0]} differ in {', '.join(differs)}: their losses could not be compared",
                "Give all configs the same.",
            )
    tokens = _tokens(first)
    planned = {name: _planned(config, tokens, first, equal=equal, offline=offline) for name, config in configs.items()}
    job = {
        "configs": {name: config.model_dump(mode="json") for name, config in planned.items()},
        "seeds": list(seeds),
        "equal": equal,
        "versions": versions(),
    }
    if out is None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix="coterie-race-") as folder:
            runs = _all(planned, Path(folder), None, seeds, device, offline, progress, after, on_run)
        return Race(runs, names, list(seeds), equal, job)
    with Workspace(out, job, overwrite=overwrite) as work:
        runs = _all(planned, work.folder, work, seeds, device, offline, progress, after, on_run)
        result = Race(runs, names, list(seeds), equal, job)
        result.record = {**job, "table": result.table()}
        write_json(work.folder / "race.json", {**result.record, "runs": [asdict(run) for run in runs]})
        from coterie.training.pictures import write_race

        write_race(result, work.folder / "race.html")
        work.publish(["race.json", "race.html"])
    return result


def _tokens(config: TrainConfig) -> int:
    return config.training.total() * config.training.step_tokens()


def _planned(config: TrainConfig, tokens: int, first: TrainConfig, *, equal: str, offline: bool) -> TrainConfig:
    """The config with as many tokens as it may read."""
    if equal == "flops":
        costs = []
        for one in (first, config):
            source = None if one.init is None else resolve(one.init, offline=offline)
            costs.append(training_flops(build(one, source)[0], one.training.length))
        tokens = round(tokens * costs[0] / costs[1])
    settings = config.training.model_copy(update={"tokens": tokens, "steps": None})
    return config.model_copy(update={"training": settings})


def _all(
    configs: Mapping[str, TrainConfig],
    folder: Path,
    work: Workspace | None,
    seeds: Sequence[int],
    device: str,
    offline: bool,
    progress: Progress | None,
    after: Callable[[Run, Any, Text], None] | None,
    on_run: Callable[[str, int, int, int], None],
) -> list[Run]:
    known = {(e["name"], e["seed"]): Run(**e) for e in work.journal() if "curve" in e} if work is not None else {}
    most = max(configs.values(), key=_tokens)
    first_source = None if most.init is None else resolve(most.init, offline=offline)
    with no_denormals():
        text = read_text(most, first_source, folder, seed=0, progress=progress)
        windows = Windows(text.stream, most.training.length)
        runs: list[Run] = []
        for seed in seeds:
            for name, config in configs.items():
                on_run(name, seed, len(runs), len(seeds) * len(configs))
                run = known.get((name, seed))
                if run is None or after is not None:
                    run = _one(name, config, seed, text, windows, folder, device, offline, progress, after)
                    if work is not None:
                        work.record(asdict(run))
                runs.append(run)
    return runs


def _one(
    name: str,
    config: TrainConfig,
    seed: int,
    text: Text,
    windows: Windows,
    folder: Path,
    device: str,
    offline: bool,
    progress: Progress | None,
    after: Callable[[Run, Any, Text], None] | None,
) -> Run:
    torch.manual_seed(seed)
    source = None if config.init is None else resolve(config.init, offline=offline)
    if source is not None:
        Checkpoint.open(source)
    model, _ = build(config, source, seed=seed)
    seen = Seen()
    bar = progress or Progress()
    place = folder / "runs" / f"{name}-{seed}-{time.monotonic_ns()}"
    model, history = run_config(
        config,
        model,
        windows,
        text.tests,
        folder=place,
        callbacks=[seen],
        listeners=[seen],
        device=device,
        seed=seed,
        checkpoints=False,
        on_log=shown_on(bar),
    )
    bar.done()
    run = Run(
        name,
        seed,
        losses=history.losses,
        layers={str(index): load.figures() for index, load in sorted(seen.loads.layers.items())},
        fluctuation=seen.fluctuation(),
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=history.tokens,
        seconds=history.seconds,
        entries=[{k: v for k, v in entry.items() if k != "load"} for entry in history.entries],
    )
    run.curve = _curve(model, history.entries, history.curve, config)
    run.flops_per_token = run.curve[-1][1] / max(run.tokens, 1)
    if after is not None:
        after(run, model.eval(), text)
    return run


def _curve(
    model: Any, entries: Sequence[Mapping[str, Any]], losses: Sequence[tuple[int, int, float]], config: TrainConfig
) -> list[tuple[int, float, float]]:
    """Operations so far at every evaluation, from what the routers did in between."""
    done, at, curve = 0.0, 0, []
    waiting = list(losses)
    one_each = {layer.index: 1.0 for layer in any_moe_layers(model)}  # in a model that has yet to grow
    length, twice = config.training.length, config.training.gradient_checkpointing
    cost = training_flops(model, length, checkpointed=twice)
    for entry in entries:
        if "layers" in entry:
            slots = {int(i): figures["experts_per_token"] for i, figures in entry["layers"].items()}
            if not slots and config.grow is not None:
                slots = one_each
            cost = training_flops(model, length, slots, checkpointed=twice)
            done += cost * (entry["tokens"] - at)
            at = entry["tokens"]
        while waiting and waiting[0][1] <= at:
            _, tokens, loss = waiting.pop(0)
            curve.append((tokens, done - cost * (at - tokens), loss))
    return curve + [(tokens, done + cost * (tokens - at), loss) for _, tokens, loss in waiting]


class Seen(TrainerCallback):  # type: ignore[misc]
    """What the experts do on the held-out text: loads of the last evaluation, first experts of the last two."""

    def __init__(self) -> None:
        self.loads = Loads(training=False)
        self._now: dict[int, list[torch.Tensor]] = {}
        self._before: list[dict[int, torch.Tensor]] = []
        self._fresh = True

    def __call__(self, record: Record) -> None:
        if record.grad:
            self._close()
            return
        if self._fresh:
            self.loads.take()
            self._fresh = False
        self.loads(record)
        for layer, routing in record.routings.items():
            first_T = routing.expert_TK.gather(-1, routing.weight_TK.argmax(-1, keepdim=True))[:, 0]
            kept_T = first_T if routing.mask_T is None else first_T[routing.mask_T]
            self._now.setdefault(layer, []).append(kept_T.to(torch.int16))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close()

    def _close(self) -> None:
        """An evaluation of all domains is over: training goes on, or has ended."""
        if self._now:
            self._before = [*self._before[-1:], {layer: torch.cat(ids) for layer, ids in self._now.items()}]
            self._now, self._fresh = {}, True

    def fluctuation(self) -> float | None:
        """Share of tokens whose first expert differs between the last two evaluations, mean over layers."""
        if len(self._before) < 2:
            return None
        old, new = self._before
        return statistics.fmean(float((old[layer] != new[layer]).float().mean()) for layer in new)


def read_race(file: Path) -> Race:
    """A finished race again. Raises UsageError if the file is none."""
    try:
        told = json.loads(file.read_text())
        runs = [Run(**entry) for entry in told["runs"]]
        return Race(runs, list(told["configs"]), told["seeds"], told["equal"], told)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file} holds no race: {error}") from error
