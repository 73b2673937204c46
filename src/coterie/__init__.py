"""Coterie: the toolkit for sparse mixture-of-experts models.

    import coterie
    coterie.compress("Qwen/Qwen3-30B-A3B", "smaller", method="reap", keep=0.5, data=["calibration.jsonl"])
    model, tokenizer = coterie.load("smaller")

Everything is imported when it is first used: `import coterie` itself costs nothing.
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["compress", "evaluate", "load", "plan", "profile"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from coterie import api

        return getattr(api, name)
    raise AttributeError(f"module 'coterie' has no attribute {name!r}")
