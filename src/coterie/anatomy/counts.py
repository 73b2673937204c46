"""Write new expert counts into a config.json, under every name readers know them by.

transformers v5 renamed counts (`num_experts` became `num_local_experts` for some families) and older readers fall
back to a default when their name is missing. So the raw JSON is edited, not re-serialised: all names the family
answers to get the number, everything else stays as it was found.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coterie.anatomy.architectures import COUNT_FIELDS
from coterie.anatomy.uneven import is_coterie, layer_counts, marked, special, unmarked, write_counts
from coterie.errors import ModelError


def with_expert_counts(
    raw: dict[str, Any], config: Any, before: int, counts: Mapping[int, int], version: str
) -> dict[str, Any]:
    """A copy of the raw config in which MoE layer i has counts[i] routed experts.

    Equal counts make a plain config; with different ones it is marked as a "coterie" checkpoint (see `uneven`).

    Parameters
    ----------
    raw : dict
        Parsed config.json.
    config : PreTrainedConfig
        The same, as transformers reads it (it knows which names are aliases).
    before : int
        Most routed experts in any layer so far: the number the config names.
    counts : {decoder layer: routed experts}
    version : str
        Of Coterie, for the record.

    Raises
    ------
    ModelError
        If no name of the count is found, or reading the result back does not give the counts.
    """
    text = config.get_text_config(decoder=True)
    names = [name for name in COUNT_FIELDS if _value(text, name) == before]
    if not names:
        raise ModelError(f"cannot find where the config of {text.model_type} keeps its number of experts ({before})")
    result = copy.deepcopy(raw)
    section = text_section(result, config, text)
    write_counts(section, names, text, counts)
    if len(set(counts.values())) > 1:
        result["quantization_config"] = marked(result.get("quantization_config"), version)
    elif is_coterie(result.get("quantization_config")) and not special(result["quantization_config"]) - {"packed"}:
        packed = unmarked(result.pop("quantization_config"))
        result |= {"quantization_config": packed} if packed else {}
    most = max(counts.values())
    with tempfile.TemporaryDirectory() as folder:  # read as a checkpoint's config is read, special values and all
        (Path(folder) / "config.json").write_text(json.dumps(result), encoding="utf-8")
        again = type(config).from_pretrained(folder)
    reread = again.get_text_config(decoder=True)
    wrong: dict[Any, Any] = {name: _value(reread, name) for name in names if _value(reread, name) != most}
    wrong |= {i: n for i, n in layer_counts(again).items() if counts.get(i) != n}
    missing = {i: n for i, n in counts.items() if n != most} if len(set(counts.values())) > 1 else {}
    if wrong or missing.keys() - layer_counts(again).keys():
        raise ModelError(f"config of {text.model_type} does not take new expert counts: {wrong or missing}")
    return result


def _value(text: Any, name: str) -> int | None:
    value = getattr(text, name, None)
    return value if isinstance(value, int) else None


def text_section(raw: dict[str, Any], config: Any, text: Any) -> dict[str, Any]:
    """The part of the raw config that describes the text decoder: the whole, or a nested sub-config."""
    if config is text:
        return raw
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if sub is not None and (
            sub is text or (hasattr(sub, "sub_configs") and sub.get_text_config(decoder=True) is text)
        ):
            nested = raw.setdefault(name, {})
            return text_section(nested, sub, text)
    return raw
