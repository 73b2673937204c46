"""How large a model is: bytes on disk, parameters, parameters a token really uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from coterie.anatomy import slice_names
from coterie.experts import levels, masks
from coterie.experts.packed import logical_sizes
from coterie.streaming.model import StreamedModel
from coterie.streaming.writer import Spec


@dataclass(frozen=True)
class Size:
    """Sizes of a checkpoint.

    bytes : of all tensors. parameters : numbers in them. active_parameters : those one token is multiplied with
    (embeddings and head included once, as model cards count). experts : most routed experts in any layer.
    experts_total : routed experts of all layers. layers : MoE layers.
    bytes_of_expert, parameters_of_expert : of one routed expert. other_bytes : everything but routed experts and
    their router rows.
    """

    bytes: int
    parameters: int
    active_parameters: int
    experts: int
    bytes_of_expert: int
    parameters_of_expert: int
    other_bytes: int
    experts_total: int
    layers: int

    def describe(self) -> dict[str, int]:
        told = ("bytes", "parameters", "active_parameters", "experts", "experts_total", "layers")
        return {k: v for k, v in asdict(self).items() if k in told}


def spoken_experts(size: Mapping[str, int]) -> str:
    """Experts per layer, from `Size.describe()`: `8`, or `up to 8, 37 in all` where layers differ."""
    even = size["experts_total"] == size["experts"] * size["layers"]
    return f"{size['experts']}" if even else f"up to {size['experts']}, {size['experts_total']} in all"


def measure(streamed: StreamedModel) -> Size:
    """Size of a checkpoint, from its headers alone."""
    tensors, packed = streamed.checkpoint.tensors, logical_sizes(streamed.model)
    sizes = {key: (packed.get(streamed.params[key] or "", info.numel), info.nbytes) for key, info in tensors.items()}
    return _size(streamed, sizes, streamed.params)


def measure_written(
    streamed: StreamedModel,
    specs: Sequence[Spec],
    fresh_of: Mapping[str, int],
    counts: Mapping[int, int],
    active: Mapping[int, float] | None = None,
) -> Size:
    """Size of what will be written from `streamed`: `layout`'s specs, its layers holding `counts` experts, of which
    `active` run per token, or do on average (by default as many as do now)."""
    packed = logical_sizes(streamed.model)
    sizes = {
        spec.key: (packed.get(streamed.params.get(spec.key) or "", torch.Size(spec.shape).numel()), spec.nbytes)
        for spec in specs
    }
    params: dict[str, str | None] = {}
    for key in sizes:  # a name the source does not have is a new form of the experts, or what chooses among them
        if key in streamed.params:
            params[key] = streamed.params[key]
        else:
            beside = "".join(f"{name}." for name in (masks.NAME, levels.NAME) if name in key.split("."))
            params[key] = f"{streamed.moe[fresh_of[key]].experts_name}.{beside}"
    return _size(streamed, sizes, params, counts, active)


def _size(
    streamed: StreamedModel,
    sizes: Mapping[str, tuple[int, int]],
    params: Mapping[str, str | None],
    counts: Mapping[int, int] | None = None,
    active: Mapping[int, float] | None = None,
) -> Size:
    """sizes : {checkpoint key: (numbers, bytes)}. params : the model's name of each, None where it ignores the key."""
    layers = streamed.moe
    counts = counts or {index: layer.num_experts for index, layer in layers.items()}
    active = active or {index: layer.active_experts for index, layer in layers.items()}
    of_experts, of_rows = {index: [0, 0] for index in layers}, {index: [0, 0] for index in layers}
    experts = {f"{layer.experts_name}.": index for index, layer in layers.items()}
    rows = {name: index for index, layer in layers.items() for name in slice_names(layer)}
    for key, (numel, nbytes) in sizes.items():
        name = params[key] or ""
        inside = experts.get(name[: name.rfind(".") + 1])
        for index, group in ((inside, of_experts), (rows.get(name) if inside is None else None, of_rows)):
            if index is not None:
                group[index][0] += numel
                group[index][1] += nbytes
    total = sum(numel for key, (numel, _) in sizes.items() if params[key] is not None)
    spare = {i: max(counts[i] - active[i], 0) / counts[i] for i in layers}
    first = next(iter(layers))
    shares = layers[first].router_size == layers[first].num_experts == counts[first]
    bytes_of_expert = (of_experts[first][1] + of_rows[first][1] * shares) // counts[first]
    nbytes = sum(size for _, size in sizes.values())
    stored = sum(counts.values())
    return Size(
        bytes=nbytes,
        parameters=total,
        active_parameters=total - round(sum(of_experts[i][0] * spare[i] for i in layers)),
        experts=max(counts.values()),
        bytes_of_expert=bytes_of_expert,
        parameters_of_expert=of_experts[first][0] // counts[first],
        other_bytes=nbytes - stored * bytes_of_expert,
        experts_total=stored,
        layers=len(layers),
    )


def router_parameters_per_expert(streamed: StreamedModel) -> int:
    """Numbers a router holds for one expert (its row and biases), in one layer."""
    layer = next(iter(streamed.moe.values()))
    names = [n for n in slice_names(layer) if not n.startswith(f"{layer.experts_name}.")]
    total = sum(int(streamed.model.get_parameter_or_buffer(n).numel()) for n in names)
    return total // layer.num_experts
