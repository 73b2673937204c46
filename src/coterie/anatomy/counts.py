"""Write a new expert count into a config.json, under every name readers know it by.

transformers v5 renamed counts (`num_experts` became `num_local_experts` for some families) and older readers fall
back to a default when their name is missing. So the raw JSON is edited, not re-serialised: all names the family
answers to get the number, everything else stays as it was found.
"""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from coterie.anatomy.architectures import COUNT_FIELDS
from coterie.errors import ModelError


def with_expert_count(raw: dict[str, Any], config: Any, before: int, after: int) -> dict[str, Any]:
    """A copy of the raw config with `after` routed experts instead of `before`.

    Parameters
    ----------
    raw : dict
        Parsed config.json.
    config : PreTrainedConfig
        The same, as transformers reads it (it knows which names are aliases).
    before, after : int
        Routed experts per MoE layer.

    Raises
    ------
    ModelError
        If no name of the count is found, or reading the result back does not give `after`.
    """
    text = config.get_text_config(decoder=True)
    names = [name for name in COUNT_FIELDS if _value(text, name) == before]
    if not names:
        raise ModelError(f"cannot find where the config of {text.model_type} keeps its number of experts ({before})")
    result = copy.deepcopy(raw)
    section = _section(result, config, text)
    section |= dict.fromkeys(names, after)
    with tempfile.TemporaryDirectory() as folder:  # read as a checkpoint's config is read, special values and all
        (Path(folder) / "config.json").write_text(json.dumps(result), encoding="utf-8")
        again = type(config).from_pretrained(folder).get_text_config(decoder=True)
    wrong = {name: _value(again, name) for name in names if _value(again, name) != after}
    if wrong:
        raise ModelError(f"config of {text.model_type} does not take a new expert count: {wrong} after {after}")
    return result


def _value(text: Any, name: str) -> int | None:
    value = getattr(text, name, None)
    return value if isinstance(value, int) else None


def _section(raw: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The part of the raw config that describes the text decoder: the whole, or a nested sub-config."""
    if config is text:
        return raw
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None and (
            sub is text or (hasattr(sub, "sub_configs") and sub.get_text_config(decoder=True) is text)
        ):
            nested = raw.setdefault(name, {})
            return _section(nested, sub, text)
    return raw
