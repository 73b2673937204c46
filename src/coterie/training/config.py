"""What `coterie train` is told: one YAML file, every field typed, bounded and documented.

model:                          # a fresh decoder ...
  hidden_size: 256
  num_experts: 16
  router: {kind: top-k, top_k: 2}
balancing: [{name: switch, weight: 0.01}]
data: [corpus/]
training: {steps: 2000, batch_size: 16, length: 256, rate: 1e-3}

init: mistralai/Mixtral-8x7B-v0.1          # ... or a checkpoint, perhaps with another router
router: {kind: adamoe, nulls: 8, top_k: 3}
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coterie.balancing.controllers import BiasSettings
from coterie.errors import UsageError
from coterie.training.dials import Dial


class TrainingSettings(BaseModel):
    """How long, how fast, on how much.

    Parameters
    ----------
    steps : int
        Optimizer steps. tokens : int, instead: as many steps as read so many tokens.
    batch_size, length, accumulate : int
        Windows per device and forward, tokens of a window, forwards per step.
    rate, warmup, schedule : float, float, str
        Peak learning rate, share of the steps in which it rises, and what it does then: "linear" to 0, "cosine" to a
        tenth, "constant", or "wsd": constant, and to 0 in the last fifth.
    weight_decay, beta2, clip : float
        Of AdamW; and the largest norm of a gradient.
    precision : str
        "float32" or "bfloat16" (weights and moments stay float32).
    freeze : list of str
        Regular expressions: parameters whose whole name matches one do not learn.
    evaluate_every, evaluate_samples : float, int
        Share of the steps between evaluations, and windows of each domain.
    gradient_checkpointing : bool
        Less memory, one more forward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    length: int = Field(default=256, ge=2)
    accumulate: int = Field(default=1, ge=1)
    rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant", "wsd"] = "cosine"
    weight_decay: float = Field(default=0.1, ge=0)
    beta2: float = Field(default=0.95, gt=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    precision: Literal["float32", "bfloat16"] = "float32"
    freeze: list[str] = []
    evaluate_every: float = Field(default=0.1, gt=0, le=1)
    evaluate_samples: int = Field(default=16, ge=1)
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_length(self) -> TrainingSettings:
        if self.steps is not None and self.tokens is not None:
            raise ValueError("steps and tokens both say how long: give one")
        return self

    def step_tokens(self, processes: int = 1) -> int:
        """Tokens of one optimizer step."""
        return self.batch_size * self.length * self.accumulate * processes

    def total(self, processes: int = 1) -> int:
        """Optimizer steps."""
        if self.tokens is not None:
            return max(1, self.tokens // self.step_tokens(processes))
        return self.steps or 1000


class Growth(BaseModel):
    """EvoMoE's expert-diversify: layers hold one expert at first, which then becomes many (arXiv:2112.14397).

    Parameters
    ----------
    share : float
        Of the training, in which there is one expert.
    ratio : float
        Share of each spawned expert's weights that is set to zero. granularity : "element" or "neuron".
    noise : float
        Relative spread of what is added to them. rescale : bool, weights that stay are divided by 1 - ratio.
    router_std : float
        Spread of the new routers' weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: float = Field(default=0.1, gt=0, lt=1)
    ratio: float = Field(default=0.5, ge=0, lt=1)
    granularity: Literal["element", "neuron"] = "element"
    noise: float = Field(default=0.0, ge=0)
    rescale: bool = False
    router_std: float = Field(default=1e-3, ge=0)


class TrainConfig(BaseModel):
    """A training.

    Parameters
    ----------
    model : dict
        Of a fresh decoder, see `architectures.config.CoterieConfig`. init : str, instead: a checkpoint to start from.
    router, residual : dict
        With `init`: a router (`kind` and its settings, perhaps `layers`) and a residual rule to put into it.
    balancing : list of dict
        Terms added to the loss, each a `name` and its settings. controllers : bias updates after each step.
    dials : list of dict
        Schedules.
    grow : dict
        A fresh model starts with one expert per layer, see `Growth`. Balancing, controllers and dials are for the
        second phase.
    data, evaluate : list of str
        Text: files, folders, datasets. Without `evaluate` some documents of `data` are held out.
    tokenizer : str
        Folder of one; by default that of `init`, or of the pocket model.
    training : dict
        See `TrainingSettings`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: dict[str, Any] | None = None
    init: str | None = None
    router: dict[str, Any] | None = None
    residual: dict[str, Any] | None = None
    balancing: list[dict[str, Any]] = []
    controllers: list[BiasSettings] = []
    dials: list[Dial] = []
    grow: Growth | None = None
    data: list[str] = []
    evaluate: list[str] = []
    tokenizer: str | None = None
    training: TrainingSettings = TrainingSettings()

    @model_validator(mode="after")
    def _one_start(self) -> TrainConfig:
        if (self.model is None) == (self.init is None):
            raise ValueError("give either model, for a fresh one, or init, a checkpoint to start from")
        if self.model is not None and (self.router is not None or self.residual is not None):
            raise ValueError("router and residual go with init; those of a fresh model stand in model")
        if self.grow is not None and self.model is None:
            raise ValueError("grow is for a fresh model: it starts with one expert per layer")
        return self


def read_config(file: Path, changes: dict[str, Any] | None = None) -> TrainConfig:
    """A config from YAML, with `changes` {dotted.name: value} set in it. Raises UsageError that names the field."""
    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(told, dict):
        raise UsageError(f"{file} holds no table of settings", "See `coterie train --help`.")
    return checked_config(changed(told, changes or {}), str(file))


def changed(told: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Plain settings with others set in them."""
    told = yaml.safe_load(yaml.safe_dump(told))
    for name, value in changes.items():
        place, (*path, last) = told, name.split(".")
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"{name}: {part} is no table of settings")
        place[last] = value
    return told


def checked_config(told: dict[str, Any], where: str) -> TrainConfig:
    """A config from plain settings. Raises UsageError that names the field."""
    try:
        return TrainConfig.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{where}: {name + ': ' if name else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from error
