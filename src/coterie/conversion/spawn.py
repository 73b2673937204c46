"""Experts spawned from one: the second half of EvoMoE's expert-diversify (arXiv:2112.14397).

A decoder whose MoE layers hold a single expert (dense layers: the same thing) has learned what an expert is. Each such
layer becomes N experts, copies of it in which different random parts are set to zero, and may train away from it again.
The router is new and small, so that tokens are spread almost evenly at first.

    W_i = W * M_i / (1 - ratio if rescale else 1)            M_i independent Bernoulli, of elements or of whole neurons

A masked neuron loses its column of the down projection alone: with gate and up gone as well nothing could ever bring it
back. With ratio 0 and weights that sum to one the model computes what it did. The optimizer's moments start anew.
"""

# N experts, I expert intermediate, H hidden

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from coterie.anatomy import moe_layers
from coterie.architectures.config import CoterieConfig
from coterie.architectures.decoder import CoterieForCausalLM, CoterieMLP
from coterie.errors import ModelError, UsageError


@torch.no_grad()
def spawn(
    model: Any,
    config: CoterieConfig,
    *,
    ratio: float = 0.5,
    granularity: Literal["element", "neuron"] = "element",
    noise: float = 0.0,
    rescale: bool = False,
    router_std: float = 1e-3,
    seed: int = 0,
) -> Any:
    """A new decoder of `config`, its experts spawned from the dense layers of `model`.

    Parameters
    ----------
    config : the same decoder with MoE layers where `model` has dense ones; experts as wide as these.
    ratio : share that is set to zero. granularity : of single weights, or of neurons.
    noise : standard deviation, relative to each matrix's, of what is added instead or as well.
    router_std : spread of the new routers' weights.

    Raises UsageError for a ratio out of range, ModelError where the two do not fit.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"ratio={ratio} is not a share below one")
    torch.manual_seed(seed)
    made = CoterieForCausalLM(config).to(next(model.parameters()))
    ours, theirs = dict(model.named_parameters()), dict(made.named_parameters())
    sparse = {layer.index: layer for layer in moe_layers(made)}
    for name, target in theirs.items():
        if any(name.startswith(f"{layer.name}.") for layer in sparse.values()):
            continue
        if name not in ours or ours[name].shape != target.shape:
            raise ModelError(f"{name} of the new model is not in the one it is spawned from")
        target.copy_(ours[name])
    generator = torch.Generator().manual_seed(seed)
    for index, layer in sparse.items():
        dense = model.get_submodule(layer.name)
        if not isinstance(dense, CoterieMLP):
            raise ModelError(f"layer {index} is no dense layer to spawn experts from")
        gate_IH, up_IH, down_HI = (p.weight.detach() for p in (dense.gate_proj, dense.up_proj, dense.down_proj))
        if gate_IH.shape[0] != layer.bank.intermediate_size:
            raise ModelError(
                f"layer {index} has {gate_IH.shape[0]} neurons, and its experts would have"
                f" {layer.bank.intermediate_size}",
                "Train the first phase with intermediate_size as wide as one expert.",
            )
        for expert in range(layer.num_experts):
            bank = layer.bank.read(expert)
            bank.gate_IH, bank.up_IH, bank.down_HI = _diversified(
                (gate_IH, up_IH, down_HI), ratio, granularity, noise, rescale, generator
            )
            layer.bank.write(expert, bank)
        for parameter in layer.router.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(0.0, router_std)
    return made.train(model.training)


def _diversified(
    weights: tuple[Tensor, Tensor, Tensor],
    ratio: float,
    granularity: str,
    noise: float,
    rescale: bool,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    def drawn(shape: tuple[int, ...]) -> Tensor:
        return (torch.rand(shape, generator=generator) >= ratio).float()

    gate_IH, up_IH, down_HI = weights
    if granularity == "neuron":
        kept_I = drawn((gate_IH.shape[0],))
        masks = (torch.ones(1), torch.ones(1), kept_I[None])
    else:
        masks = (drawn(tuple(gate_IH.shape)), drawn(tuple(up_IH.shape)), drawn(tuple(down_HI.shape)))
    made = []
    for weight, mask in zip(weights, masks, strict=True):
        new = weight * mask.to(weight)
        if noise:
            new = new + noise * weight.std() * torch.randn(weight.shape, generator=generator).to(weight)
        made.append(new / (1 - ratio) if rescale else new)
    return made[0], made[1], made[2]
