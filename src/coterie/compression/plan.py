"""The plan: which experts stay, written down between decision and surgery so that a person can read and edit it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from coterie.errors import UsageError
from coterie.streaming.writer import write_json


class LayerPlan(BaseModel):
    """What happens to one MoE layer.

    index, name, experts : the layer as it is. keep : experts that stay, ascending. scores : the saliency that decided.
    extra : what the method's `rebuild` needs (JSON).
    """

    model_config = ConfigDict(extra="forbid")

    index: int
    name: str
    experts: int
    keep: list[int]
    scores: list[FiniteFloat] = Field(default_factory=list)
    extra: dict[str, Any] = Field(default_factory=dict)


class Plan(BaseModel):
    """What happens to a model: one method, its parameters, and a `LayerPlan` for every MoE layer."""

    model_config = ConfigDict(extra="forbid")

    format: Literal[1] = 1
    model: str
    model_digest: str
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    budget: dict[str, Any] = Field(default_factory=dict)
    data_digest: str = ""
    layers: list[LayerPlan]

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def save(self, file: Path) -> None:
        write_json(file, self.model_dump(mode="json"))

    @classmethod
    def load(cls, file: Path) -> Plan:
        """Read a plan. Raises UsageError saying which field is wrong."""
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"cannot read the plan {file}: {error.strerror}") from error
        except (UnicodeDecodeError, ValidationError) as error:
            detail = error.errors()[0] if isinstance(error, ValidationError) else None
            text = f"{'.'.join(str(p) for p in detail['loc'])}: {detail['msg']}" if detail else str(error)
            raise UsageError(f"{file} is not a plan: {text}") from error
