"""How large a model is: bytes on disk, parameters, parameters a token really uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from coterie.anatomy import slice_names
from coterie.streaming.model import StreamedModel


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
    tensors = streamed.checkpoint.tensors
    first = next(iter(streamed.moe.values()))
    per_expert_bytes = per_expert_parameters = 0
    for name in slice_names(first):
        infos = [tensors[key] for key in streamed.keys_of([name])]
        per_expert_bytes += sum(info.nbytes for info in infos) // first.num_experts
        if name.startswith(f"{first.experts_name}."):
            per_expert_parameters += sum(info.numel for info in infos) // first.num_experts
    total = sum(info.numel for key, info in tensors.items() if streamed.params[key] is not None)
    experts = sum(layer.num_experts for layer in streamed.moe.values())
    active = total - sum((layer.num_experts - layer.top_k) * per_expert_parameters for layer in streamed.moe.values())
    return Size(
        bytes=streamed.checkpoint.nbytes,
        parameters=total,
        active_parameters=active,
        experts=max(layer.num_experts for layer in streamed.moe.values()),
        bytes_of_expert=per_expert_bytes,
        parameters_of_expert=per_expert_parameters,
        other_bytes=streamed.checkpoint.nbytes - experts * per_expert_bytes,
        experts_total=experts,
        layers=len(streamed.moe),
    )


def router_parameters_per_expert(streamed: StreamedModel) -> int:
    """Numbers a router holds for one expert (its row and biases), in one layer."""
    layer = next(iter(streamed.moe.values()))
    names = [n for n in slice_names(layer) if not n.startswith(f"{layer.experts_name}.")]
    total = sum(int(streamed.model.get_parameter_or_buffer(n).numel()) for n in names)
    return total // layer.num_experts


def without(streamed: StreamedModel, size: Size, removed: int, most: int) -> Size:
    """The size after `removed` experts are gone and no layer has more than `most`."""
    router = router_parameters_per_expert(streamed) * removed
    return replace(
        size,
        bytes=size.bytes - removed * size.bytes_of_expert,
        parameters=size.parameters - removed * size.parameters_of_expert - router,
        active_parameters=size.active_parameters - router,
        experts=most,
        experts_total=size.experts_total - removed,
    )
