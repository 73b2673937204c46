"""What conversions share: a config with other experts, a model of it, and weights carried over.

Configs are changed by what their fields do, not by family: see `anatomy.counts` and `anatomy.resizing`. Conversions
work on models in memory and make new ones; the peak is both.
"""

# E experts, K experts per token, I expert intermediate

from __future__ import annotations

import copy
import importlib.metadata
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy import moe_layers, slice_names
from coterie.anatomy.counts import text_section, with_expert_counts
from coterie.anatomy.layers import TOP_K
from coterie.anatomy.resizing import resized
from coterie.errors import ModelError


def with_experts(model: Any, experts: int, *, top_k: int | None = None, width: int | None = None) -> Any:
    """The config of `model` with so many experts in every MoE layer, perhaps another top-k and width.

    Raises ModelError where layers differ, or the config does not take it.
    """
    layers = moe_layers(model)
    first = layers[0]
    E, K, wide = first.num_experts, first.top_k, first.bank.intermediate_size
    if any((x.num_experts, x.top_k, x.bank.intermediate_size) != (E, K, wide) for x in layers):
        raise ModelError(
            "the MoE layers of this model differ in experts, their width or top-k", "Convert a uniform one."
        )
    config = model.config
    raw = json.loads(config.to_json_string(use_diff=False))
    raw.setdefault("architectures", [type(model).__name__])
    if experts != E:
        counts = {layer.index: experts for layer in layers}
        raw = with_expert_counts(raw, config, E, counts, importlib.metadata.version("coterie"))
    text = config.get_text_config(decoder=True)
    if top_k is not None and top_k != K:
        section = text_section(raw, config, text)
        names = [name for name in TOP_K if section.get(name) == K]
        if isinstance(section.get("router"), dict):
            section["router"]["top_k"] = top_k
        elif names:
            section |= dict.fromkeys(names, top_k)
        else:
            raise ModelError(f"cannot find where the config of {text.model_type} keeps its {K} experts per token")
    changed = read_back(raw, config)
    if width is not None and width != wide:
        wanted = {}
        for layer in layers:
            for name, tensor in layer.experts.named_parameters(recurse=False):
                shape = [experts, *tensor.shape[1:]]
                if (axis := _neurons(layer, name)) is not None:
                    shape[axis] = shape[axis] // wide * width
                wanted[f"{layer.experts_name}.{name}"] = torch.Size(shape)
        changed = read_back(resized(raw, changed, wanted, width=(wide, width)).raw, config)
    return changed


def _neurons(layer: Any, name: str) -> int | None:
    """Which dimension of an experts tensor is made of neurons."""
    transposed = bool(layer.experts.is_transposed)
    if name in ("gate_up_proj", "up_proj"):
        return 2 if transposed else 1
    if name == "down_proj":
        return 1 if transposed else 2
    return 1 if name in ("gate_up_proj_bias", "up_proj_bias") else None


def read_back(raw: dict[str, Any], like: Any) -> Any:
    """A raw config as transformers reads it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(raw), encoding="utf-8")
        return type(like).from_pretrained(folder)


@torch.no_grad()
def built(model: Any, config: Any, tensors: Callable[[str, Tensor], Tensor | None]) -> Any:
    """A model of `config`, of the class and dtype of `model`. `tensors(name, target)` gives what each becomes; None
    leaves it (experts, which are written apart). Raises ModelError for a tensor of another shape."""
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    made = type(model)._from_config(copy.deepcopy(config), dtype=dtype).to(device)
    for name, target in [*made.named_parameters(), *made.named_buffers()]:
        value = tensors(name, target)
        if value is None:
            continue
        if value.shape != target.shape:
            raise ModelError(f"{name} would be {list(value.shape)}, and the new model has {list(target.shape)}")
        target.copy_(value)
    return made.train(model.training)


def state(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name."""
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def router_rows(model: nn.Module) -> dict[str, int]:
    """Tensors outside of experts with one entry per expert: {name: dimension}."""
    return {
        name: axis
        for layer in moe_layers(model)
        for name, axis in slice_names(layer).items()
        if not name.startswith(f"{layer.experts_name}.")
    }
