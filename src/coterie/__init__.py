"""Coterie: the toolkit for sparse mixture-of-experts models.

    import coterie
    coterie.compress("Qwen/Qwen3-30B-A3B", "smaller", method="reap", keep=0.5, data=["calibration.jsonl"])
    model, tokenizer = coterie.load("smaller")

Everything is imported when it is first used: `import coterie` itself costs nothing. It does teach transformers, whether
loaded before or after, to load checkpoints whose layers differ (see `coterie.plugin`).
"""

from typing import Any

from coterie import plugin

__version__ = "0.1.0"
__all__ = [
    "aggregate",
    "build_patterns",
    "compare",
    "compare_at_size",
    "compress",
    "evaluate",
    "export",
    "export_gguf",
    "finetune",
    "heal",
    "load",
    "match_pattern",
    "plan",
    "profile",
    "race",
    "score_tasks",
    "segment",
    "skipping",
    "super_experts",
    "train",
    "unpack",
]


plugin.install()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from coterie import api

        return getattr(api, name)
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")
