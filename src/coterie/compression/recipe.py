"""A recipe: one or more compressions, one after the other, as a short YAML file that people can share.

model: Qwen/Qwen3-30B-A3B
data: [calibration.jsonl]
samples: 128
length: 512
steps:
  - method: dern
    parameters: {selector: reap}
    budget: {keep: 0.5}

Every step works on the checkpoint that the step before it wrote, and is calibrated on that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

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


class RecipeStep(BaseModel):
    """One method with its parameters and budget."""

    model_config = ConfigDict(extra="forbid")

    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    budget: RecipeBudget = Field(default_factory=RecipeBudget)
    propagate: bool = False


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
        """Read a recipe. Raises UsageError saying which entry is wrong."""
        try:
            return cls.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise UsageError(f"cannot read the recipe {file}: {error.strerror}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{file} is not YAML: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "recipe"
            raise UsageError(f"{file}: {where}: {first['msg']}") from error
