"""Find the MoE layers of a model: by contract, never by model name.

An MoE block is the parent of a fused experts module. Its router is the sibling that owns one row of weights per
expert. Shared experts are siblings too; they are seen, named and left alone. Decoder layers without an experts module
are dense. What a block computes is not known here, only where its parts are.
"""

# E experts, K experts per token

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from coterie.anatomy.architectures import quirks_of
from coterie.anatomy.experts import ExpertBank, is_experts_module
from coterie.errors import ModelError
from coterie.experts.compressed import main_experts
from coterie.experts.mapped import expert_map
from coterie.routing.base import Router


@dataclass
class MoELayer:
    """One MoE block of a decoder layer.

    index : position of the decoder layer (not a counter of MoE layers).
    name, router_name, experts_name : module paths inside the model.
    decoder : the decoder layer the block is part of.
    shared : paths of shared experts and their gates; part of the block, never sliced.
    top_k : experts the router picks per token.
    groups, groups_used : group-limited routing; 1, 1 where there is none.
    group_minimum : experts a group needs for its score to be defined.
    """

    index: int
    name: str
    block: nn.Module
    router_name: str
    router: nn.Module
    experts_name: str
    experts: nn.Module
    decoder: nn.Module
    top_k: int
    groups: int = 1
    groups_used: int = 1
    group_minimum: int = 1
    shared: list[str] = field(default_factory=list)

    @property
    def bank(self) -> ExpertBank:
        return ExpertBank(self.experts)

    @property
    def num_experts(self) -> int:
        return self.bank.num_experts

    @property
    def router_size(self) -> int:
        """Experts the router names: more than there are where several of its outputs share one (an expert map)."""
        target = expert_map(self.experts)
        return self.num_experts if target is None else len(target)

    @property
    def active_experts(self) -> int:
        """Experts that run for a token: fewer than the router picks where vectors stand in for the others."""
        return min(main_experts(self.experts) or self.top_k, self.top_k)

    @property
    def router_like(self) -> Tensor:
        """A tensor with the device and dtype of the router; of its decoder layer where a router has no numbers."""
        tensors = (*self.router.parameters(), *self.router.buffers(), *self.decoder.parameters())
        return next(tensor for tensor in tensors if tensor.is_floating_point())

    @property
    def router_device(self) -> torch.device:
        return self.router_like.device


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers that the experts live in, with its path, also inside a multimodal wrapper.

    Raises ModelError if the model has no fused experts, or no list of layers around them.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr,operator]
    names = [name for name, module in model.named_modules() if is_experts_module(module)]
    if not names:
        raise ModelError(
            f"{type(model).__name__} has no MoE layers",
            "Coterie works on sparse mixture-of-experts models: see `coterie inspect --architectures`.",
        )
    candidates: dict[str, nn.ModuleList] = {}
    for name in names:
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                prefix = ".".join(parts[:i])
                module = model.get_submodule(prefix)
                if isinstance(module, nn.ModuleList):
                    candidates.setdefault(prefix, module)
                break
    matching = {prefix: module for prefix, module in candidates.items() if len(module) == depth}
    for choice in (matching, candidates):
        if choice:
            prefix = min(choice, key=len)
            return prefix, choice[prefix]
    raise ModelError(f"{type(model).__name__} keeps its experts outside a list of decoder layers")


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """All MoE layers of the text decoder, in order. Raises ModelError if there are none or one breaks the contract."""
    prefix, layers = decoder_layers(model)
    return [_moe_layer(model, prefix, index, name) for index, name in _experts_of(prefix, layers)]


def any_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The same for models that may be dense: [] for one without experts."""
    return moe_layers(model) if any(is_experts_module(module) for module in model.modules()) else []


def _experts_of(prefix: str, layers: nn.ModuleList) -> list[tuple[int, str]]:
    found = []
    for index, layer in enumerate(layers):
        names = [n for n, m in layer.named_modules() if is_experts_module(m)]
        if len(names) > 1:
            raise ModelError(
                f"decoder layer {index} holds {len(names)} banks of experts ({', '.join(names)})",
                "Only layers with one bank of routed experts can be handled.",
            )
        found += [(index, f"{prefix}.{index}.{name}") for name in names]
    return found


def _moe_layer(model: nn.Module, prefix: str, index: int, experts_name: str) -> MoELayer:
    block_name = experts_name.rpartition(".")[0]
    block, experts = model.get_submodule(block_name), model.get_submodule(experts_name)
    target = expert_map(experts)
    E = ExpertBank(experts).num_experts if target is None else len(target)
    routers, shared = {}, []
    for name, child in block.named_children():
        path = f"{block_name}.{name}"
        if "shared" in name:
            shared.append(path)
        elif isinstance(child, Router) or (
            child is not experts and any(p.dim() and p.shape[0] == E for p in child.parameters())
        ):
            routers[path] = child
    preferred = {n: m for n, m in routers.items() if _first(m, "num_experts", "top_k") is not None} or routers
    if len(preferred) != 1:
        raise ModelError(
            f"{block_name}: found {len(preferred)} candidates for the router of its {E} experts, expected one",
            "The router must be a sibling of the experts module and own one row of weights per expert.",
        )
    router_name, router = next(iter(preferred.items()))
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    top_k = _first(router, "top_k", "topk") or _first(block, "top_k") or _first(config, *TOP_K)
    if not isinstance(top_k, int):
        raise ModelError(f"{block_name}: cannot tell how many experts its router picks per token")
    groups = _first(router, "num_group", "n_group") or 1
    biased = any("correction_bias" in n for n, _ in block.named_buffers()) or any(
        "correction_bias" in n for n, _ in block.named_parameters()
    )
    return MoELayer(
        index=index,
        name=block_name,
        block=block,
        router_name=router_name,
        router=router,
        experts_name=experts_name,
        experts=experts,
        decoder=model.get_submodule(f"{prefix}.{index}"),
        top_k=top_k,
        groups=groups,
        groups_used=(_first(router, "topk_group") or 1) if groups > 1 else 1,
        # the sigmoid-and-bias routers of the DeepSeek-V3 line score a group by its two best experts
        group_minimum=2 if biased and _first(router, "num_group", "n_group") else 1,
        shared=shared,
    )


# Config fields that hold the experts per token, under all the names families use.
TOP_K = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token", "top_k_experts")


def _first(owner: object, *names: str) -> int | None:
    return next((v for n in names if isinstance(v := getattr(owner, n, None), int)), None)


def refuse_unsliceable(model: nn.Module) -> None:
    """Raise ModelError where the architecture table, or a router of ours, says that experts cannot be removed."""
    model_type = model.config.get_text_config(decoder=True).model_type  # type: ignore[union-attr,operator]
    reason = quirks_of(model_type).unsliceable
    if reason:
        raise ModelError(f"experts of {model_type} cannot be removed: {reason}")
    for layer in moe_layers(model):
        if isinstance(layer.router, Router) and layer.router.unsliceable:
            raise ModelError(
                f"experts cannot be removed: the {layer.router.kind} router of layer {layer.index}"
                f" {layer.router.unsliceable}"
            )
