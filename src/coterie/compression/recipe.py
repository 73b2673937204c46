"""A recipe: compressions and the healing between them, one after the other, as a short YAML file people can share.

model: Qwen/Qwen3-30B-A3B
data: [calibration.jsonl]
samples: 128
length: 512
steps:
  - method: dern
    parameters: {selector: reap}
    budget: {keep: 0.5}
  - heal: {train: routers, steps: 200}

Every step works on the checkpoint that the step before it wrote, and is calibrated on that. The teacher of `heal` is
the model the recipe began with, unless it names another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coterie.assets import recipes
from coterie.errors import UsageError


class RecipeBudget(BaseModel):
    """How much may stay: the options of the command line under their own names."""

    model_config = ConfigDict(extra="forbid")

    keep: float | None = None
    keep_experts: Annotated[int | None, Field(ge=1)] = None
    target_size: str | int | None = None
    scope: str = "uniform"
    minimum: Annotated[int, Field(ge=1)] = 1
    layers: str | None = None
    exclude_layers: str | None = None
    protect: list[str] = Field(default_factory=list)


ORIGINAL = "original"


class RecipeHeal(BaseModel):
    """Distillation from a teacher: what `coterie heal` takes, under the same names; what is left out has its defaults.

    teacher : "original", the model the recipe began with, or a checkpoint.
    data, samples, length : of this step; otherwise `data` of the recipe, and as much of it as `heal` takes by itself.
    """

    model_config = ConfigDict(extra="forbid")

    teacher: str = ORIGINAL
    train: str = "all"
    steps: Annotated[int, Field(ge=1)] = 200
    rate: float | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    accumulate: Annotated[int, Field(ge=1)] = 1
    schedule: str = "linear"
    warmup: float = 0.05
    weight_decay: float = 0.0
    loss: str | None = None
    temperature: float = 1.0
    top: Annotated[int, Field(ge=1)] = 64
    kd_weight: float = 1.0
    lm_weight: float = 0.0
    logits: str = "cached"
    cache: str | None = None
    lora_rank: Annotated[int, Field(ge=1)] = 16
    precision: str = "float32"
    data: list[str] = Field(default_factory=list)
    samples: Annotated[int | None, Field(ge=1)] = None
    held_out_samples: Annotated[int | None, Field(ge=1)] = None
    length: Annotated[int | None, Field(ge=2)] = None


class RecipeStep(BaseModel):
    """One method with its parameters and budget; or healing."""

    model_config = ConfigDict(extra="forbid")

    method: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    budget: RecipeBudget = Field(default_factory=RecipeBudget)
    propagate: bool = False
    heal: RecipeHeal | None = None

    @model_validator(mode="after")
    def _one_thing(self) -> RecipeStep:
        if (self.method is None) == (self.heal is None):
            raise ValueError("a step names a method or heal, one of them")
        if self.heal is not None and (others := sorted(self.model_fields_set - {"heal", "method"})):
            raise ValueError(f"a step that heals has no {others[0]}: all of it stands under heal")
        return self


class Recipe(BaseModel):
    """A chain of steps on one calibration set.

    `model` says what it was made for; the command line names the model that is compressed.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    data: list[str] = Field(default_factory=list)
    samples: int = Field(128, ge=1)
    length: int = Field(512, ge=2)
    seed: int = 0
    steps: list[RecipeStep] = Field(min_length=1)

    @classmethod
    def load(cls, file: Path) -> Recipe:
        """Read a recipe: a file, or one that ships with the package by its name. Raises UsageError saying which entry
        is wrong."""
        shipped = recipes()
        if not file.exists() and str(file) in shipped:
            file = shipped[str(file)]
        try:
            return cls.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise UsageError(
                f"cannot read the recipe {file}: {error.strerror}", f"These ship with Coterie: {', '.join(shipped)}."
            ) from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{file} is not YAML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            raise UsageError(f"{file}: {where}: {first['msg']}") from error
