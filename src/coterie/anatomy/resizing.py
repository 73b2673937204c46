"""Write another expert width, or another number of attention heads, into a config.json.

Which field of a config sets a width is found by trying: the field is changed, the model is built again without weights,
and every tensor must have just the shape that will be written. No family's field is known here, and no field that
merely holds the same number is touched. The raw JSON is edited; whatever else is in it stays.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coterie.anatomy.architectures import model_class_of
from coterie.anatomy.counts import text_section
from coterie.anatomy.uneven import is_coterie, rebuild
from coterie.errors import ModelError

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Resized:
    """A raw config with other sizes. fields : {name: new value} of what was changed. notes : for the user."""

    raw: dict[str, Any]
    fields: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def shapes_of(config: Any, header: Mapping[str, Any] | None = None) -> Shapes:
    """The shape of every parameter and buffer of the model a config describes; nothing is allocated.

    header : its `quantization_config`, where that is one of ours (see `uneven`).
    """
    with torch.device("meta"):
        model: Any = model_class_of(config)._from_config(copy.deepcopy(config))  # type: ignore[attr-defined]
        if header is not None and is_coterie(header):
            rebuild(model, header)
    return {name: tensor.shape for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def resized(
    raw: dict[str, Any],
    config: Any,
    wanted: Mapping[str, torch.Size],
    *,
    width: tuple[int, int] | None = None,
    heads: tuple[int, int, int] | None = None,
) -> Resized:
    """The config of a model whose tensors `wanted` have these shapes, and all others the shapes they have now.

    Parameters
    ----------
    raw, config : parsed config.json, and the same as transformers reads it.
    wanted : {tensor: new shape}.
    width : expert width before and after.
    heads : query heads, key and value heads and head dimension that there will be.

    Where the width of shared experts is a number of them times the expert width (the DeepSeek line), that number is
    raised so that shared experts stay as they are. Raises ModelError if no field, or none alone, does it.
    """
    text = config.get_text_config(decoder=True)
    before = shapes_of(config, raw.get("quantization_config"))
    target = before | dict(wanted)
    changed: dict[str, Any] = {}
    if heads is not None:
        names = ("num_attention_heads", "num_key_value_heads", "head_dim")
        changed = dict(zip(names, heads, strict=True))
    if width is None:
        result = Resized(_with(raw, config, text, changed), changed)
        if wrong := _differences(result.raw, config, target):
            raise ModelError(f"the config of {text.model_type} does not take {changed}: {_told(wrong, target)}")
        return result
    coupled: dict[str, dict[str, Any]] = {}
    for name, value in _fields(text, width[0]).items():
        trial = {**changed, name: value(width[1])}
        wrong = _differences(_with(raw, config, text, trial), config, target)
        if not wrong:
            return Resized(_with(raw, config, text, trial), trial)
        if wrong.keys() & wanted.keys() or None in wrong.values():
            continue  # another field's width, or a model that cannot be built
        coupled[name] = wrong
        for shared, count in _shared_counts(text).items():
            if count * width[0] % width[1] == 0:
                more = {**trial, shared: count * width[0] // width[1]}
                if not _differences(_with(raw, config, text, more), config, target):
                    note = f"{shared} {count} -> {more[shared]}: shared experts keep their width in a config that"
                    return Resized(
                        _with(raw, config, text, more), more, [f"{note} counts it in experts of {width[1]} neurons"]
                    )
    for name, wrong in coupled.items():
        raise ModelError(
            f"{name} of {text.model_type} sets the expert width and that of {len(wrong)} other tensors, which would"
            f" no longer fit: {_told(wrong, target)}",
            _hint(text, width),
        )
    raise ModelError(f"no field of the config of {text.model_type} sets the width of its experts ({width[0]})")


def _hint(text: Any, width: tuple[int, int]) -> str:
    """Widths at which the shared experts could stay as they are."""
    for count in _shared_counts(text).values():
        near = sorted((f for f in range(1, width[0]) if count * width[0] % f == 0), key=lambda f: abs(f - width[1]))
        if near:
            return f"Its shared experts can stay as they are with {near[0]} neurons (--set neurons={near[0]})."
    return "Such a model can only be slimmed by removing experts."


def _fields(text: Any, size: int) -> dict[str, Any]:
    """{field: how a new size is written} of all fields that hold `size`, alone or once per layer."""
    found: dict[str, Any] = {}
    values = text.to_dict()
    for name in sorted(values, key=lambda n: ("moe" not in n, "intermediate" not in n)):
        value = values[name]
        if type(value) is int and value == size:
            found[name] = lambda new: new
        elif isinstance(value, list) and value and all(type(v) is int and v == size for v in value):
            found[name] = lambda new, old=value: [new] * len(old)
    return found


def _shared_counts(text: Any) -> dict[str, int]:
    return {n: v for n, v in text.to_dict().items() if "shared" in n and type(v) is int and v > 0}


def _with(raw: dict[str, Any], config: Any, text: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the raw config with other values, under every name of a field that stands in it."""
    result = copy.deepcopy(raw)
    section = text_section(result, config, text)
    aliases: Mapping[str, str] = getattr(text, "attribute_map", {})
    for name, value in changes.items():
        section[name] = value
        for alias, real in aliases.items():
            if real == name and alias in section:
                section[alias] = value
    return result


def _differences(raw: dict[str, Any], config: Any, target: Shapes) -> dict[str, torch.Size | None]:
    """{tensor: shape, None where there is none} of what a raw config makes that is not as in `target`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        try:
            again = type(config).from_pretrained(folder)
            again.architectures = config.architectures
            found = shapes_of(again, raw.get("quantization_config"))
        except Exception:  # a field with another meaning makes anything from a KeyError to a failed assertion
            return dict.fromkeys(target)
    return {n: found.get(n) for n in sorted(target.keys() | found.keys()) if found.get(n) != target.get(n)}


def _told(wrong: Mapping[str, torch.Size | None], target: Shapes) -> str:
    name = next(iter(wrong))
    shape = wrong[name]
    if shape is None:
        return "the model cannot be built"
    there = target.get(name)
    return f"{name} would be {list(shape)}" + ("" if there is None else f", not {list(there)}")
