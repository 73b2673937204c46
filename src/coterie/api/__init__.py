"""The Python API: what the command line does, as functions. Names and defaults are the same."""

from coterie.api.at_size import compare_at_size
from coterie.api.grow import aggregate, segment
from coterie.api.look import build_patterns, match_pattern, profile, super_experts
from coterie.api.runtime import Runtime, calibration
from coterie.api.shrink import (
    budget_of,
    carry_out,
    compare,
    compress,
    export,
    export_gguf,
    forecast,
    plan,
    prepare,
    recipe_requests,
    unpack,
)
from coterie.api.train import finetune, heal, race, train, training_config
from coterie.api.use import evaluate, load, score_tasks, skipping

__all__ = [
    "Runtime",
    "aggregate",
    "budget_of",
    "build_patterns",
    "calibration",
    "carry_out",
    "compare",
    "compare_at_size",
    "compress",
    "evaluate",
    "export",
    "export_gguf",
    "finetune",
    "forecast",
    "heal",
    "load",
    "match_pattern",
    "plan",
    "prepare",
    "profile",
    "race",
    "recipe_requests",
    "score_tasks",
    "segment",
    "skipping",
    "super_experts",
    "train",
    "training_config",
    "unpack",
]
