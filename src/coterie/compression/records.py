"""What coterie.json says of a finished job: the recipe that repeats it, digests, sizes, and what came before."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.compression.plan import Plan
from coterie.compression.sizes import Size
from coterie.errors import CheckpointError
from coterie.streaming.model import StreamedModel
from coterie.text import TokenData


def record_of(
    plan: Plan,
    streamed: StreamedModel,
    *,
    data: TokenData | None,
    seed: int,
    before: Size,
    after: Size,
    figures: Mapping[int, Mapping[str, float]],
    notes: Sequence[str],
    sweeps: int,
    propagate: bool = False,
    budget: Mapping[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The record of one job that a plan describes; entries beyond the common ones are `more`.

    data : the text the job looked at, or None. figures : the method's own, by layer. budget : of experts, if any.
    """
    earlier = earlier_steps(streamed.checkpoint.folder)
    return {
        "recipe": {
            "model": plan.model,
            "method": plan.method,
            "parameters": plan.parameters,
            "budget": dict(budget or {}),
            "propagate": propagate,
            "data": data.sources if data else [],
            "samples": data.samples if data else 0,
            "length": data.length if data else 0,
            "seed": seed,
        },
        "plan_digest": plan.digest(),
        "model_digest": plan.model_digest,
        "data_digest": plan.data_digest,
        "domains": data.domains if data else [],
        "tokens": data.tokens if data else {},
        "compute_dtype": str(streamed.compute_dtype).removeprefix("torch."),
        "sweeps": sweeps,
        "before": before.describe(),
        "after": after.describe(),
        **more,
        "figures": {str(index): dict(values) for index, values in sorted(figures.items()) if values},
        "notes": list(notes),
        "versions": versions(),
        **({"earlier_steps": earlier} if earlier else {}),
    }


def earlier_steps(folder: Path) -> list[dict[str, Any]]:
    """The records of what Coterie has already done to the checkpoint in `folder`, oldest first; [] for none."""
    try:
        record = json.loads((folder / "coterie.json").read_text(encoding="utf-8"))
        before = record.pop("earlier_steps", [])
        return [*before, record] if all(isinstance(step, dict) for step in before) else []
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / 'coterie.json'} is damaged: {error}", "Delete it if it is not wanted."
        ) from error


def versions() -> dict[str, str]:
    """Versions of what decides the result."""
    return {name: importlib.metadata.version(name) for name in ("coterie", "torch", "transformers", "safetensors")}
