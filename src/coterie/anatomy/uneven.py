"""Checkpoints whose layers differ: how many experts each has, written down in config.json and read back.

A plain config has one expert count for all layers. Where layers keep different numbers, the config says so in two
places that transformers already knows: `per_layer_config` holds the counts (the largest stands for all others), and
`quantization_config` names "coterie" as the one who rebuilds the model before its weights are loaded:

    "num_experts": 8,
    "per_layer_config": {"3": {"num_experts": 5}},
    "allow_global_per_layer_attribute_access": true,
    "quantization_config": {"quant_method": "coterie", "format": 1, "version": "0.1.0"}

The model is built with the largest count on the meta device, and the layers named are then cut to size. The same
function does it for plain `from_pretrained` (see `coterie.plugin`) and for streaming. Weights are not its business.
What else may be special about a layer's experts stands in the same header, see `forms`. Where the weights are stored in
a packed form of others (FP8, MXFP4), the `quantization_config` that describes it moves into the header, as `packed`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from coterie.anatomy.architectures import COUNT_FIELDS
from coterie.anatomy.forms import Form, Linears, apply_forms, apply_linears, forms_of, linears_of
from coterie.anatomy.layers import MoELayer, moe_layers
from coterie.anatomy.slicing import select
from coterie.errors import CheckpointError, ModelError
from coterie.experts.packed import damaged

METHOD, FORMAT = "coterie", 1
# entries of a header this version can rebuild, beside the sizes of layers
KNOWN = frozenset({"layers", "linears", "checksums", "packed"})
_ACCESS = "allow_global_per_layer_attribute_access"  # without it, building the model stops at the ambiguous count


def header(version: str, **entries: Any) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint that only Coterie can rebuild; `entries` say what is special in it."""
    return {"quant_method": METHOD, "format": FORMAT, "version": version, **entries}


def marked(entry: Mapping[str, Any] | None, version: str) -> dict[str, Any]:
    """The header of a checkpoint whose config had the `quantization_config` `entry` so far."""
    if not entry:
        return header(version)
    return {**entry, **header(version)} if is_coterie(entry) else header(version, packed=dict(entry))


def unmarked(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a checkpoint in which nothing is special any more."""
    return entry.get("packed") if is_coterie(entry) else dict(entry)


def check_header(entry: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless this version can rebuild what the header describes."""
    found = entry.get("format")
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(f"config.json names no format of its coterie checkpoint: {found!r}")
    if found > FORMAT:
        raise CheckpointError(
            f"the checkpoint has coterie format {found} (written by version {entry.get('version', 'unknown')}), this"
            f" version reads formats up to {FORMAT}",
            "Install a newer Coterie: pip install -U coterie.",
        )
    unknown = sorted(special(entry) - KNOWN)
    if unknown:
        raise CheckpointError(
            f"config.json describes changes this version does not know: {', '.join(unknown)}",
            "Install a newer Coterie: pip install -U coterie.",
        )


def special(entry: Mapping[str, Any]) -> set[str]:
    """What a header describes beside the sizes of layers."""
    return set(entry) - {"quant_method", "format", "version"}


def is_coterie(entry: Any) -> bool:
    """Is this `quantization_config` (a dict or transformers' object) one of ours?"""
    method = entry.get("quant_method") if isinstance(entry, Mapping) else getattr(entry, "quant_method", None)
    return str(getattr(method, "value", method)) == METHOD


def layer_counts(config: Any) -> dict[int, int]:
    """Experts of each decoder layer that `per_layer_config` names, as transformers reads it.

    Raises CheckpointError for a count that is no positive number.
    """
    text = config.get_text_config(decoder=True)
    if not getattr(text, "is_heterogeneous", False):
        return {}
    wanted = {real_name(text, name) for name in COUNT_FIELDS} & set(text.per_layer_attributes or ())
    counts = {}
    for index in range(text.num_hidden_layers):
        for name in sorted(wanted):
            count = getattr(text.per_layer_config[index], name)
            if count != getattr(text, name):
                if not isinstance(count, int) or count < 1:
                    raise CheckpointError(f"per_layer_config: layer {index} has {name}={count!r}")
                counts[index] = count
    return counts


def rebuild(model: nn.Module, header: Mapping[str, Any]) -> None:
    """Cut the layers of a freshly built model (on the meta device) to the sizes its config names, and give their
    experts the forms its header describes.

    Raises CheckpointError where sizes and model do not go together.
    """
    counts = layer_counts(model.config)
    layers: dict[int, MoELayer] = {layer.index: layer for layer in moe_layers(model)}
    for index, count in counts.items():
        if index not in layers:
            raise CheckpointError(f"per_layer_config gives layer {index} {count} experts, but it is no MoE layer")
        layer = layers[index]
        if count > layer.num_experts:
            raise CheckpointError(
                f"per_layer_config gives layer {index} {count} experts, more than the {layer.num_experts} of the model"
            )
        try:
            select(layer, _any(count, layer))
        except ModelError as error:
            raise CheckpointError(f"per_layer_config does not fit the model: {error.message}", error.hint) from error
    apply_forms(model, forms_of(header))
    apply_linears(model, linears_of(header))


def check_codes(model: nn.Module, header: Mapping[str, Any]) -> None:
    """Raise CheckpointError if codes of a model just loaded are not those that were written."""
    if name := damaged(model, checksums_of(header)):
        raise damage(name)


def checksums_of(header: Any) -> dict[str, int]:
    """{tensor, by the model's name: CRC-32 of its bytes} of a header. Raises CheckpointError if it is no such table."""
    found = header.get("checksums", {}) if isinstance(header, Mapping) else {}
    if not isinstance(found, dict) or not all(isinstance(value, int) for value in found.values()):
        raise CheckpointError("config.json: quantization_config.checksums is no table of numbers")
    return found


def damage(name: str) -> CheckpointError:
    return CheckpointError(f"{name} is damaged: its bytes are not those that were written", "Fetch the file again.")


def _any(count: int, layer: MoELayer) -> list[int]:
    """Any `count` experts, equally many of each routing group: only the sizes matter on the meta device."""
    if count % layer.groups:
        return list(range(count))
    size = layer.num_experts // layer.groups
    return [g * size + i for g in range(layer.groups) for i in range(count // layer.groups)]


def write_counts(section: dict[str, Any], names: list[str], text: Any, counts: Mapping[int, int]) -> None:
    """Put one count per layer into a raw config section: the largest under `names`, the others per layer."""
    most = max(counts.values())
    section |= dict.fromkeys(names, most)
    real = sorted({real_name(text, name) for name in names})
    kept = {str(int(key)): dict(entry) for key, entry in section.pop("per_layer_config", {}).items()}
    for index in counts:
        entry = kept.setdefault(str(index), {})
        for name in COUNT_FIELDS:
            entry.pop(name, None)
        if counts[index] != most:
            entry |= dict.fromkeys(real, counts[index])
    kept = {key: entry for key, entry in kept.items() if entry}
    if kept:
        section["per_layer_config"] = dict(sorted(kept.items(), key=lambda item: int(item[0])))
        section[_ACCESS] = True
    else:
        section.pop(_ACCESS, None)


def real_name(config: Any, name: str) -> str:
    """The field a config class really has under this name; readers also know it by others."""
    aliases: Mapping[str, str] = getattr(config, "attribute_map", {})
    return aliases.get(name, name)


def with_forms(
    config: dict[str, Any], forms: Mapping[int, Form], version: str, linears: Linears | None = None
) -> dict[str, Any]:
    """A raw config whose header describes these forms; without a header where nothing is special any more.

    linears : packed linear layers, beside those the header names already.
    """
    told = {str(index): entry for index, form in sorted(forms.items()) if (entry := form.describe())}
    entries: dict[str, Any] = {"layers": told} if told else {}
    if linears is not None:
        entries["linears"] = linears.model_dump()
    if not entries:
        return config
    kept = {k: v for k, v in marked(config.get("quantization_config"), version).items() if k != "layers"}
    return {**config, "quantization_config": {**kept, **entries}}
