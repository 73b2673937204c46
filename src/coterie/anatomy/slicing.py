"""Keep some experts of an MoE layer: experts, router rows and router biases together, or not at all.

Everything with one entry per expert is sliced: the parameters of the experts module, the router's, and biases that
some families keep on the block itself (`e_score_correction_bias`, `expert_bias`). Counts stored as attributes follow.
The number in the config is written by `anatomy.counts`. Shared experts are not touched.
"""

# E experts

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coterie.anatomy.layers import MoELayer
from coterie.errors import ModelError
from coterie.experts.forward import rerouted
from coterie.routing.base import Router


def check_keep(layer: MoELayer, keep: Sequence[int]) -> None:
    """Raise ModelError unless `keep` can be the experts of `layer`: valid, enough for top-k, equal in groups."""
    E, where = layer.num_experts, f"in layer {layer.index}"
    if layer.router_size != E and list(keep) != list(range(E)):
        raise ModelError(
            f"cannot remove experts {where}: its router names {layer.router_size} experts, which share the {E} stored"
            " ones",
            "Prune before merging, or merge with --set router=reduced.",
        )
    if sorted(set(keep)) != list(keep) or (keep and not 0 <= keep[0] <= keep[-1] < E):
        raise ModelError(
            f"the kept experts {where} must be ascending, distinct and within 0..{E - 1}, not {list(keep)}"
        )
    if len(keep) == E:
        return
    if len(keep) < layer.top_k:
        raise ModelError(
            f"cannot keep {len(keep)} of {E} experts {where}: the router picks {layer.top_k} per token",
            f"Keep at least {layer.top_k} (--keep-experts {layer.top_k}).",
        )
    if layer.groups > 1:
        size = E // layer.groups
        per_group = Counter(expert // size for expert in keep)
        counts = [per_group[g] for g in range(layer.groups)]
        if len(set(counts)) != 1:
            raise ModelError(
                f"unequal survivors per routing group {where}: {counts} of {size} in {layer.groups} groups",
                f"Its router splits experts into equal groups: keep a multiple of {layer.groups}, the same in each.",
            )
        if counts[0] * layer.groups_used < layer.top_k:
            raise ModelError(
                f"cannot keep {counts[0]} experts per group {where}: the router picks {layer.top_k} experts"
                f" from {layer.groups_used} of its {layer.groups} groups",
                f"Keep at least {minimum_keep(layer)} experts.",
            )
    if len(keep) // layer.groups < layer.group_minimum:
        raise ModelError(
            f"cannot keep {len(keep)} of {E} experts {where}: a routing group is scored by its"
            f" {layer.group_minimum} best experts",
            f"Keep at least {minimum_keep(layer)} experts.",
        )


def minimum_keep(layer: MoELayer) -> int:
    """The smallest number of experts the router of `layer` can work with."""
    per_group = max(layer.group_minimum, -(-layer.top_k // layer.groups_used)) if layer.groups > 1 else 0
    return max(layer.top_k, layer.group_minimum, per_group * layer.groups)


def slice_names(layer: MoELayer) -> dict[str, int]:
    """Tensors with one entry per expert: {name inside the model: dimension}, parameters and buffers, fused ones too.

    Of a router whose outputs share experts, those with one entry per output.
    """
    found: dict[str, int] = {}
    owned = [(layer.experts_name, layer.experts, False), (layer.router_name, layer.router, True)]
    for path, module, recurse in [*owned, (layer.name, layer.block, False)]:
        E = layer.num_experts if module is layer.experts else layer.router_size
        rowless = module.rowless if isinstance(module, Router) else ()
        tensors = [*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)]
        for name, tensor in tensors:
            if name in rowless:
                continue
            if tensor.dim() and tensor.shape[0] == E:
                found[f"{path}.{name}"] = 0
            elif tensor.numel() == E:  # a [1, E] bias, as Ernie keeps it
                found[f"{path}.{name}"] = list(tensor.shape).index(E)
    return found


@torch.no_grad()
def select(layer: MoELayer, keep: Sequence[int]) -> None:
    """Reduce `layer` to the experts `keep`, in place. Works on meta tensors too (for planning what will be written).

    Raises ModelError as `check_keep`. One tensor is copied at a time: the peak is the largest sliced tensor.
    """
    check_keep(layer, keep)
    if len(keep) == layer.num_experts:
        return
    before = layer.num_experts
    index = torch.tensor(list(keep))
    for path, dim in slice_names(layer).items():
        owner, name = _owner(layer, path)
        tensor = getattr(owner, name)
        _replace(owner, name, tensor.index_select(dim, index.to(tensor.device)))
    for module in (layer.block, layer.experts, *layer.router.modules()):
        _recount(module, before, len(keep))


@torch.no_grad()
def cut_experts(layer: MoELayer, keep: Sequence[int]) -> None:
    """Reduce only the experts of `layer` to `keep`, in place, and leave the router as it is: for an expert map."""
    before, index = layer.num_experts, torch.tensor(list(keep))
    if len(index) == before:
        return
    for path, dim in slice_names(layer).items():
        if path.startswith(f"{layer.experts_name}."):
            owner, name = _owner(layer, path)
            tensor = getattr(owner, name)
            _replace(owner, name, tensor.index_select(dim, index.to(tensor.device)))
    _recount(layer.experts, before, len(index))


@contextmanager
def narrowed(layer: MoELayer, keep: Sequence[int], rows: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Run `layer` as if it had only the experts `keep`: the same results as `select`, and no expert is copied.

    The router and its biases are sliced; expert ids are mapped back on their way to the experts, which need the
    "coterie" implementation. Afterwards the layer is as it was.

    rows : router tensors by model name to use instead of sliced ones (a method that makes a new router).
    """
    check_keep(layer, keep)
    if len(keep) == layer.num_experts and rows is None:
        yield
        return
    E, device = layer.num_experts, layer.router_device
    index = torch.tensor(list(keep), device=device)
    old_id = torch.cat([index, index.new_full((1,), E)])  # whatever is no expert stays none
    tensors: list[tuple[dict[str, Any], str, Any]] = []
    counts: list[tuple[nn.Module, str, int]] = []
    try:
        for path, dim in slice_names(layer).items():
            if path.startswith(f"{layer.experts_name}."):
                continue
            owner, name = _owner(layer, path)
            kind = owner._parameters if name in owner._parameters else owner._buffers
            tensors.append((kind, name, kind[name]))
            old = kind[name]
            assert old is not None
            new = rows[path].to(old) if rows is not None and path in rows else old.detach().index_select(dim, index)
            _replace(owner, name, new)
        for module in (layer.block, *layer.router.modules()):
            counts += [(module, name, E) for name in _recount(module, E, len(keep))]
        with rerouted(layer.experts, lambda i, w: (old_id[i.clamp(max=len(keep))], w)):
            yield
    finally:
        for kind, name, value in tensors:
            kind[name] = value
        for module, name, count in counts:
            setattr(module, name, count)


def _owner(layer: MoELayer, path: str) -> tuple[nn.Module, str]:
    owner_path, _, name = path[len(layer.name) + 1 :].rpartition(".")
    return layer.block.get_submodule(owner_path), name


def _recount(module: nn.Module, before: int, after: int) -> list[str]:
    """Counts of experts that a module remembers; returns the names of those that changed."""
    names = [n for n in _COUNTS if getattr(module, n, None) == before]
    for name in names:
        setattr(module, name, after)
    return names


_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts", "out_features")


def _replace(owner: nn.Module, name: str, value: Tensor) -> None:
    if name in owner._parameters:
        old = owner._parameters[name]
        owner._parameters[name] = nn.Parameter(value, requires_grad=old is not None and old.requires_grad)
    else:
        owner._buffers[name] = value
